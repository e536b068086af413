"""`driftstream train`: from a command line to a run, and to its results.

This process stays light. It imports nothing that the roles need (torch and torchrl take seconds): a child of the
fork server, which has them, turns the command line into a configuration and hands it back as TOML.
"""

import contextlib
import logging
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import setproctitle

from driftstream.envs.errors import PluginError, TargetError
from driftstream.launch.child import compute_in_child
from driftstream.launch.flags import CommandError, TrainFlags, UsageError, complain, parse, split_config_flags
from driftstream.launch.invitation import write_invitation
from driftstream.launch.plan import RunPlan
from driftstream.launch.processes import fork_server
from driftstream.launch.progress import Progress, results_table
from driftstream.launch.run_directory import RunDirectory, default_root
from driftstream.launch.start_up import StartUp

INTERRUPTED = 130
PRELOAD = ("driftstream.launch.preload",)
PATIENCE_S = (10.0, 5.0, 0.5)
"""With W&B at the end of a run under `--sync`, by how often it was interrupted."""


def run(arguments: list[str], prog: str) -> int:
    """Train, or show what would be trained; returns the exit code."""
    start_up = StartUp()
    flags, config_flags = read_flags(arguments, prog)
    if flags.sync or flags.dry_run or flags.help_all:
        return _run_here(flags, config_flags, prog)
    with fork_server(PRELOAD) as context:
        toml, code = compute_in_child(context, _configure, (arguments, prog), "configure")
        if toml is None:
            return code
        start_up.reached("configured")
        plan = RunPlan.from_toml(toml)
        if plan.sync:
            return _run_here(flags, config_flags, prog)

        from driftstream.launch.supervisor import Supervisor

        def supervise(run: RunDirectory, launch: int, progress: Progress) -> tuple[int, str, dict[str, float]]:
            supervisor = Supervisor(plan, run, launch, context, progress, start_up=start_up)
            return supervisor.run(), supervisor.cause, supervisor.final

        return _train(plan, toml, flags, supervise)


def read_flags(arguments: list[str], prog: str) -> tuple[TrainFlags, list[str]]:
    """The command's flags, and those of the configuration's fields; UsageError for what makes no sense."""
    own, config_flags = split_config_flags(arguments)
    flags = parse(TrainFlags, own, prog)
    if flags.resume is not None:
        RunDirectory.open(flags.resume)
        if flags.out is not None:
            raise UsageError("--out and --resume exclude each other: a run stays where it is")
    elif flags.target is None and not config_flags and not flags.help_all:
        raise UsageError("name a target, such as gmm25 (`driftstream list targets` shows them all)")
    return flags, config_flags


def _configure(arguments: list[str], prog: str) -> str:
    from driftstream.launch.config import to_toml
    from driftstream.launch.configure import configure

    return to_toml(configure(*read_flags(arguments, prog), prog))


Train = Callable[[RunDirectory, int, Progress], tuple[int, str, dict[str, float]]]
"""(run, launches before this one, progress) -> (exit code, its cause, final evaluation)."""


def _train(plan: RunPlan, toml: str, flags: TrainFlags, train: Train) -> int:
    """Make or open the run directory, hold it, train, and show the results."""
    if flags.resume is not None:
        run = RunDirectory.open(flags.resume)
    else:
        run = RunDirectory.create(flags.out or default_root(plan.target, plan.method))
    with run.hold(None if plan.sync else plan.stream) as launch:
        run.write_config(toml)
        setproctitle.setproctitle(f"driftstream {'sync' if plan.sync else 'supervisor'} {run.root}")
        progress = Progress(f"{plan.target} · {plan.method} · {run.shown}")
        with contextlib.closing(progress), _warnings_to(progress):
            progress.event(f"run directory: {run.shown}")
            if plan.invites:
                write_invitation(run, toml)
                file = f"{run.shown}/{run.invitation.relative_to(run.root)}"
                progress.event(f"other hosts may join: scp -p {file} there, and driftstream join join.toml")
            code, cause, final = train(run, launch, progress)
    if final:
        progress.console.print(results_table(f"{plan.target}, {plan.method}", final))
        _show_what_is_next(run, progress)
    return complain("driftstream", cause, code) if code else 0


def _run_here(flags: TrainFlags, config_flags: list[str], prog: str) -> int:
    """What happens in this process: `--sync`, `--dry-run` and `--help-all`."""
    from driftstream.eval.monitor import Monitor
    from driftstream.launch.config import to_toml
    from driftstream.launch.configure import configure
    from driftstream.launch.dry_run import show_plan
    from driftstream.launch.sync_run import train_sync
    from driftstream.learner.checkpoint import CheckpointError

    logging.getLogger("torchrl").setLevel(logging.WARNING)
    config = configure(flags, config_flags, prog)
    if flags.dry_run:
        return show_plan(config, flags.resume or flags.out or default_root(config.target, config.method))
    toml = to_toml(config)
    plan = RunPlan.from_toml(toml)

    def train(run: RunDirectory, launch: int, progress: Progress) -> tuple[int, str, dict[str, float]]:
        def show(metrics: dict[str, float]) -> None:
            if "progress" in metrics:
                progress.status("training", int(metrics["step"]), metrics["progress"])
            progress.update({name: value for name, value in metrics.items() if "/" in name})
            progress.tick()

        monitor = Monitor(run.root, plan.monitor, plan.resolved)
        try:
            with _counted_interrupts() as interrupts:
                try:
                    final = train_sync(config, run.root, monitor, show, progress.event, lambda: bool(interrupts))
                finally:
                    monitor.close(PATIENCE_S[min(len(interrupts), 2)])
        except CheckpointError as error:
            raise CommandError(str(error)) from error
        except (TargetError, PluginError) as error:
            for line in traceback.format_exception(error.__cause__) if error.__cause__ else ():
                progress.event(line.rstrip(), "dim")
            raise
        if final is None:
            return INTERRUPTED, f"interrupted; resume with: {run.resume_command}", {}
        return 0, "", final

    return _train(plan, toml, flags, train)


@contextlib.contextmanager
def _counted_interrupts() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM in a list; the second raises KeyboardInterrupt."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _warnings_to(progress: Progress) -> Iterator[None]:
    """Show what this process warns of as events of the run."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            progress.event(record.getMessage(), "yellow")

    log, handler = logging.getLogger("driftstream"), Handler(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _show_what_is_next(run: RunDirectory, progress: Progress) -> None:
    def show(name: str, text: Path | str) -> None:
        progress.console.out(f"{name:<8} {text}")

    for plot in sorted(run.plots.glob("*.png")):
        show("plot", f"{run.shown}/plots/{plot.name}")
    show("metrics", f"{run.shown}/metrics.jsonl, {run.shown}/results.json")
    show("draw", f"driftstream sample {run.shown} -n 10000 -o samples.npz")
    show("check", f"driftstream eval {run.shown} --samples 10000")
    show("longer", f"{run.resume_command} --minutes M")
