"""`driftstream soak`: a real run under faults at random times, and what of the promises was kept."""

import itertools
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from driftstream.envs.targets import make_target
from driftstream.launch.flags import CommandError, SoakFlags, UsageError, parse, split_config_flags
from driftstream.launch.run_directory import RunDirectory, default_root
from driftstream.launch.soak_faults import CHECKPOINT_S, FAULTS, HEARTBEAT_TIMEOUT_S, START_S, Finding
from driftstream.launch.soak_frames import POISON
from driftstream.launch.soak_run import TRAIN, SoakedRun, alive, wait

LAST_FAULT_S = 20.0
"""Before the end of training, so that a fault's promises can be seen through."""
FINAL_S = 900.0
COMPARED = ("eval/delta_log_z", "eval/delta_log_z_rw", "eval/log_z_lower_bound", "eval/w2", "eval/ess", "eval/khat")


def run(arguments: list[str], prog: str) -> int:
    """Soak; returns 0 where every promise held, else 1."""
    own, config_flags = split_config_flags(arguments)
    flags = parse(SoakFlags, own, prog)
    kinds = fault_kinds(flags.faults)
    if not Path("/proc/self/stat").exists():
        raise CommandError("a soak looks for its processes in /proc, which this system does not have")
    if flags.minutes <= 0 or flags.every_s <= 0 or flags.compare < 0 or flags.fuzz < 0:
        raise UsageError("--minutes and --every-s must be positive, --compare and --fuzz not negative")
    dim = make_target(flags.target).dim
    root = (flags.out or default_root(flags.target, "soak")).absolute()
    console, findings = Console(), []
    soaked = SoakedRun(root, [*_train_flags(flags), *config_flags])
    try:
        for finding in _soak(soaked, flags, kinds, dim):
            findings.append(finding)
            if not finding.held:
                console.print(f"[red]broken[/]: {finding}")
    finally:
        soaked.kill()
    if flags.fuzz:
        findings += _fuzz(flags.fuzz, flags.seed)
    (soaked.directory.root / "soak.json").write_text(json.dumps([asdict(finding) for finding in findings], indent=1))
    console.print(_findings_table(f"{flags.target}, {flags.minutes:g} minutes of training", findings))
    console.print(_figures(soaked))
    if flags.compare:
        console.print(_compare(soaked, flags, config_flags))
    broken = [finding for finding in findings if not finding.held]
    print(f"{len(findings) - len(broken)} promises held, {len(broken)} broken; run directory: {soaked.directory.shown}")
    return 1 if broken else 0


def fault_kinds(text: str) -> tuple[str, ...]:
    """The kinds that `--faults` names; UsageError for one that there is not."""
    kinds = tuple(FAULTS) if text == "all" else tuple(word.strip() for word in text.split(","))
    for kind in kinds:
        if kind not in FAULTS:
            raise UsageError(f"--faults {kind!r}: expected all, or some of {', '.join(FAULTS)}")
    return kinds


def _train_flags(flags: SoakFlags) -> list[str]:
    """What a run is started with. Budgets are for crash loops: here every role dies again and again."""
    return [
        *(flags.target, "--method", flags.method, "--minutes", str(flags.minutes), "--seed", str(flags.seed)),
        *("--actors", "2", "--wandb", "disabled", "--checkpoint.every-s", str(CHECKPOINT_S)),
        *("--supervisor.heartbeat-timeout-s", str(HEARTBEAT_TIMEOUT_S)),
        *("--supervisor.max-restarts", "1000", "--supervisor.restart-reset-s", "1"),
    ]


def _soak(soaked: SoakedRun, flags: SoakFlags, kinds: Sequence[str], dim: int) -> Iterator[Finding]:
    rng = random.Random(flags.seed)
    yield Finding("start", "training", soaked.goes_on(START_S), START_S)
    # Every kind comes up before one does again, each time in another order.
    rounds = itertools.chain.from_iterable(rng.sample(kinds, len(kinds)) for _ in itertools.count())
    for kind in rounds:
        time.sleep(rng.expovariate(1.0 / flags.every_s))
        if soaked.latest("wall_s") > 60.0 * flags.minutes - LAST_FAULT_S or soaked.process.poll() is not None:
            break
        print(f"{time.strftime('%H:%M:%S')} {kind} at step {soaked.latest('step'):,.0f}", flush=True)
        yield from FAULTS[kind](soaked, rng, dim)
    family = soaked.family()
    wait(lambda: soaked.process.poll() is not None, 60.0 * flags.minutes + FINAL_S)
    yield Finding("end", "exit code", soaked.process.poll(), 0.0)
    yield Finding("end", "results", 0.0 if soaked.directory.results.exists() else None, 0.0)
    wait(lambda: not alive(family), 5.0)
    yield Finding("end", "orphans", float(alive(family) + len(soaked.processes())), 0.0)
    # Every batch that is trained on counts in the mean log reward of its kind. Losses would not tell: a path that
    # strays far has one without bound.
    poisoned = sum(highest_reward(row) > POISON**0.5 for row in soaked.rows())
    yield Finding("end", "bad batches trained on", float(poisoned), 0.0)


def highest_reward(row: Mapping[str, float]) -> float:
    """The highest mean log reward that a row of metrics has of any kind of data."""
    found = [value for name, value in row.items() if name.startswith("kind/") and name.endswith("/log_reward")]
    return max((value for value in found if value is not None), default=-math.inf)


def _fuzz(frames: int, seed: int) -> list[Finding]:
    from driftstream.buffers.wire_fuzz import MAX_GROWTH_BYTES, fuzz

    report = fuzz(frames, seed)
    for fault in report.faults:
        print(f"fuzz: {fault}")
    growth = report.memory_growth_bytes / 2**20
    return [
        Finding("fuzz", "faults of the decoders", float(len(report.faults)), 0.0),
        Finding("fuzz", "memory growth, MiB", growth, MAX_GROWTH_BYTES / 2**20),
    ]


def _findings_table(title: str, findings: Sequence[Finding]) -> Table:
    """One row a promise: how often it was put to the test, the worst that was measured, whether it held."""
    table = Table(title=title, title_justify="left")
    for heading, side in (("fault", "left"), ("promise", "left"), ("times", "right"), ("worst", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    table.add_column("at most", justify="right")
    table.add_column("held")
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, finding.promise), []).append(finding)
    for (kind, promise), group in groups.items():
        measured = [finding.measured for finding in group]
        worst = "never" if None in measured else f"{max(value for value in measured if value is not None):.2f}"
        held = all(finding.held for finding in group)
        table.add_row(kind, promise, str(len(group)), worst, f"{group[0].limit:g}", "yes" if held else "[red]broken[/]")
    return table


def _figures(soaked: SoakedRun) -> Table:
    table = Table(title="the run", title_justify="left", show_header=False)
    rows = soaked.rows()
    figures = {name: _total(rows, name) for name in ("stream/rejected", "stream/duplicates")}
    figures |= {"step": soaked.latest("step"), **_results(soaked.directory)}
    for name, value in figures.items():
        table.add_row(name, f"{value:,.6g}")
    return table


def _total(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Sum of a counter over the learner's lives: it starts again from 0 in each."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(
        max(0.0, later - value if later >= value else later) for value, later in itertools.pairwise([0, *values])
    )


def _results(directory: RunDirectory) -> dict[str, float]:
    results = json.loads(directory.results.read_text()) if directory.results.exists() else {}
    return {name: results[name] for name in COMPARED if results.get(name) is not None}


def _compare(soaked: SoakedRun, flags: SoakFlags, config_flags: Sequence[str]) -> Table:
    """Undisturbed runs of the same number of steps, each with a seed of its own, beside the soaked one."""
    root, steps, results = soaked.directory.root, int(soaked.latest("step")), []
    for index in range(1, flags.compare + 1):
        calm = RunDirectory(root.with_name(f"{root.name}-undisturbed-{index}"))
        arguments = [flags.target, "--method", flags.method, "--steps", str(steps), "--seed", str(flags.seed + index)]
        arguments += ["--actors", "2", "--wandb", "disabled", "--out", str(calm.root), *config_flags]
        subprocess.run([sys.executable, "-c", TRAIN, "train", *arguments], check=True, stdout=subprocess.DEVNULL)
        results.append(_results(calm))
    table = Table(title=f"beside {flags.compare} undisturbed runs of {steps:,} steps", title_justify="left")
    for heading in ("figure", "under faults", "undisturbed, least", "most", "inside"):
        table.add_column(heading)
    for name, value in _results(soaked.directory).items():
        others = [result[name] for result in results if name in result]
        if others:
            inside = min(others) <= value <= max(others)
            table.add_row(name, f"{value:.4f}", f"{min(others):.4f}", f"{max(others):.4f}", "yes" if inside else "no")
    return table
