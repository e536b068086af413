"""`driftstream train`: from flags to a configuration, and from that to a run and its results."""

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from driftstream.launch.flags import TrainFlags, UsageError, parse_known, refuse
from driftstream.launch.processes import fork_server
from driftstream.launch.progress import Progress, results_table
from driftstream.launch.run_directory import RunDirectory, default_root

if TYPE_CHECKING:
    from driftstream.launch.config import RunConfig

LIMITS = ("steps", "minutes", "energy_budget")


def run(flags: TrainFlags, config_flags: Sequence[str], prog: str) -> int:
    """Train, or show what would be trained; returns the exit code."""
    if flags.resume is None and flags.target is None and not config_flags and not flags.help_all:
        raise UsageError("name a target, such as gmm25 (`driftstream list targets` shows them all)")
    if flags.resume is not None and flags.out is not None:
        raise UsageError("--out and --resume exclude each other: a run stays where it is")
    if flags.resume is not None:
        RunDirectory.open(flags.resume)
    if flags.dry_run or flags.help_all or flags.sync:
        config = configure(flags, config_flags, prog)
        if flags.dry_run:
            from driftstream.launch.dry_run import show_plan

            return show_plan(config, flags.resume or _root(flags, config))
        return _train(config, flags, None)
    # The roles' imports take seconds, and so do those of this process: side by side.
    with fork_server(["driftstream.launch.roles"]) as context:
        config = configure(flags, config_flags, prog)
        return _train(config, flags, None if config.sync else context)


def configure(flags: TrainFlags, config_flags: Sequence[str], prog: str) -> "RunConfig":
    """The resolved configuration: a method's or a resumed run's, then --component.field, then short flags.

    Raises:
        UsageError: a flag that does not exist or whose value does not fit.
        ConfigError: values that cannot work.
    """
    from driftstream.launch.config import RunConfig, from_dict, from_toml, resolve
    from driftstream.launch.methods import load_method
    from driftstream.learner.limits import LimitsConfig

    resumed = None if flags.resume is None else from_toml(RunDirectory.open(flags.resume).config)
    base = resumed or load_method(flags.method).config
    limits = {name: getattr(flags, name) for name in LIMITS if getattr(flags, name) is not None}
    if limits or any(flag.startswith("--limits.") for flag in config_flags):
        base = replace(base, limits=LimitsConfig())
    arguments = ["--help"] if flags.help_all else config_flags
    config, unknown = parse_known(RunConfig, arguments, prog, default=base)
    target = flags.target
    if target is None and len(unknown) == 1 and not unknown[0].startswith("-"):
        # It stood after a flag of the configuration.
        target = unknown.pop()
    refuse(unknown, RunConfig)
    if resumed is not None and target not in (None, resumed.target):
        raise UsageError(f"the run in {flags.resume} has target {resumed.target}, not {target}")
    if resumed is None and target is None:
        raise UsageError("name a target, such as gmm25 (`driftstream list targets` shows them all)")

    given = {
        "target": target and _absolute(target),
        "target_options": flags.target_options or None,
        "seed": flags.seed,
        "device": flags.device,
        "sync": flags.sync or None,
        "actor": {"count": flags.actors},
        "refiner": {"count": flags.refiners},
        "grid": {"sampling_steps": flags.sampling_steps},
        "monitor": {"wandb": flags.wandb},
        "limits": limits,
    }
    config = from_dict(config, _without_none(given))
    return resolve(config)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    plain = {name: _without_none(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _absolute(target: str) -> str:
    """A target in a file keeps its meaning when the run is resumed from elsewhere."""
    path, colon, attribute = target.rpartition(":")
    return f"{Path(path).resolve()}:{attribute}" if colon and path.endswith(".py") else target


def _root(flags: TrainFlags, config: "RunConfig") -> Path:
    return flags.out or default_root(config.target, config.method)


def _train(config: "RunConfig", flags: TrainFlags, context: ForkServerContext | None) -> int:
    from driftstream.launch.config import to_toml

    run = RunDirectory.open(flags.resume) if flags.resume else RunDirectory.create(_root(flags, config))
    tcp_host = config.stream.host if config.stream.transport == "tcp" else None
    with run.hold(tcp_host) as launch:
        run.write_config(to_toml(config))
        progress = Progress(f"{config.target} · {config.method} · {run.shown}")
        progress.event(f"run directory: {run.shown}")
        with contextlib.closing(progress), _warnings_to(progress):
            if context is None:
                final = _train_here(config, run, progress) or {}
                code, cause = (0, "") if final else (130, f"interrupted; resume with: {run.resume_command}")
            else:
                from driftstream.launch.supervisor import Supervisor

                supervisor = Supervisor(config, run, launch, context, progress)
                code, cause, final = supervisor.run(), supervisor.cause, supervisor.final
    if final:
        progress.console.print(results_table(f"{config.target}, {config.method}", final))
        _show_what_is_next(run, progress)
    if code:
        print(f"driftstream: {cause}", file=sys.stderr)
    return code


def _train_here(config: "RunConfig", run: RunDirectory, progress: Progress) -> dict[str, float] | None:
    """`--sync`: all roles in this process; None if it was interrupted."""
    from driftstream.eval.monitor import Monitor
    from driftstream.launch.config import as_dict
    from driftstream.launch.sync_run import train_sync

    interrupts = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt

    def show(metrics: dict[str, float]) -> None:
        if "progress" in metrics:
            progress.status("training", int(metrics["step"]), metrics["progress"])
        progress.update({name: value for name, value in metrics.items() if "/" in name})
        progress.tick()

    monitor = Monitor(run.root, config.monitor, as_dict(config))
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train_sync(config, run.root, monitor, show, progress.event, lambda: interrupts > 0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        monitor.close(2.0 if interrupts else 10.0)


@contextlib.contextmanager
def _warnings_to(progress: Progress) -> Iterator[None]:
    """Show what this process logs as events of the run."""

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
    show = progress.console.out
    for plot in sorted(run.plots.glob("*.png")):
        show(f"plot     {run.shown}/plots/{plot.name}")
    show(f"metrics  {run.shown}/metrics.jsonl, {run.shown}/results.json")
    show(f"draw     driftstream sample {run.shown} -n 10000 -o samples.npz")
    show(f"check    driftstream eval {run.shown} --samples 10000")
    show(f"longer   {run.resume_command} --minutes M (in all)")
