"""`driftstream bench start|end-to-end|step|scale`: what whole runs take, in processes of their own. Minutes each."""

import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.table import Table

from driftstream.eval import bench_energies
from driftstream.eval.bench_end_to_end import Round, StepRound, bench_round, bench_step
from driftstream.eval.bench_run import RunBenchError
from driftstream.eval.bench_scale import (
    ActorsRow,
    DimensionRow,
    bench_actors,
    bench_dimension,
    bytes_per_actor,
    efficiency,
    plot_actors,
    plot_dimension,
)
from driftstream.eval.bench_start import bench_start
from driftstream.launch.bench_speed import speed_config, speed_method, yardsticks_of
from driftstream.launch.config import RunConfig, resolve
from driftstream.launch.flags import BenchFlags, CommandError, UsageError
from driftstream.launch.methods import load_method
from driftstream.launch.roles import build_learner, build_local_actors, build_refiner
from driftstream.launch.seeding import derive_seed
from driftstream.launch.start_up import STAGES

PARTS = ("start", "end-to-end", "step", "scale")
LONGEST_MIN = 30
"""A run of a bench that was killed ends by itself after so long."""
REPORT_S = 0.5
IN_TURNS = ("--learner.report-every-s", str(REPORT_S), "--eval.every-s", "40")
"""The first report of a turn begins what is counted. The evaluator's clock goes on while its run stands still, half of
the time; it starts as often as by default by that which the run has."""
ENERGIES = ("Sleeping", "Computing")
ACTORS_BATCH, ACTORS_STEPS = 16, 20
MEGABYTE = 1e6
START_CAPTION = (
    "Imports: a process that imports torch, tensordict and torchrl.data, and ends. Configured: the roles' imports are "
    "there, and the configuration. Launched: roles are being started. Training: the first weights are published."
)
END_TO_END_CAPTION = (
    "Updates/s and the learner's processor time an update, in the run and, in turns of seconds with it, for the same "
    "learner alone, fed from memory with batches and refined states that are there. Undelayed: without the time that "
    "either had work and no processor, which other programs take, and other roles where processors are few. Cores: "
    "how many processors each role kept busy."
)
STEP_CAPTION = (
    "A step of trajectory balance: from one update of a run to the next, whose actor rolls out while its learner "
    "updates; and rollout and update one after the other in one process, in a naive and in the published way, while "
    "the run stands still. They take turns of seconds. Each process computes with one thread."
)
ACTORS_CAPTION = (
    f"Langevin policies of 8 hidden units, T = {ACTORS_STEPS}, batch {ACTORS_BATCH}, no replay: every step asks for "
    "the energy, which takes 20 ms a call, and the learner uses each batch once. Scaling: trajectories/s an actor, "
    "over those with the fewest actors. Update: what it takes once its batch is there. Memory: of all processes of "
    "the run, shared pages counted once."
)
DIMENSION_CAPTION = "Step: update, replay, statistics, average. Memory: growth over a rollout and a step, at most."
Announce = Callable[[str], object]
Report = tuple[dict[str, Any], list[Table]]


def runs(flags: BenchFlags, announce: Announce) -> Report:
    """The benchmark that is asked for; its runs end with it, however it ends."""
    _check(flags)
    measure = {"start": start, "end-to-end": end_to_end, "step": step, "scale": scale}[flags.what]
    before = signal.signal(signal.SIGTERM, _end)
    try:
        return measure(flags, announce)
    except RunBenchError as error:
        raise CommandError(f"bench {flags.what}: {error}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def start(flags: BenchFlags, announce: Announce) -> Report:
    """From the command to the first learner step, and the stages on the way."""
    target, repeats = flags.target or "gmm25", flags.repeats or 3

    def command(root: Path) -> list[str]:
        # Every step is reported at once, so that the first is.
        return _train(target, root, flags.seed, "--learner.report-every-s", "0.001")

    found = bench_start(command, STAGES, repeats)
    table = _table(f"{target}, default method: seconds from the command, {repeats} starts", START_CAPTION)
    for heading in ("reached", "seconds", "quartiles", "× imports"):
        table.add_column(heading, justify="left" if heading == "reached" else "right")
    for name, row in found.rows.items():
        seconds = row.seconds
        span = f"{seconds.lower:.2f}–{seconds.upper:.2f}"
        table.add_row(name.replace("_", " "), f"{seconds.median:.2f}", span, f"{row.ratio.median:.2f}")
    return {**_settings(flags, target), "repeats": repeats, "parts": {"start": asdict(found)}}, [table]


def end_to_end(flags: BenchFlags, announce: Announce) -> Report:
    """The default method's learner with one actor and one refiner, beside itself fed from memory."""
    target, repeats, seconds = flags.target or "manywell", flags.repeats or 3, flags.seconds or 20.0
    config = load_method("default").config
    reporting = replace(config.learner, report_every_s=REPORT_S)
    config = resolve(replace(config, target=target, seed=flags.seed, device="cpu", learner=reporting))
    rounds: list[Round] = []
    for index in range(repeats):
        announce(f"bench end-to-end: round {index + 1} of {repeats}")
        learner = build_learner(config, derive_seed(flags.seed, "learner", index))
        (actor,) = build_local_actors(config, learner, [derive_seed(flags.seed, "actor", index)])
        refiner = build_refiner(config, derive_seed(flags.seed, "refiner", index))

        def command(root: Path, seed: int = flags.seed + index) -> list[str]:
            return _train(target, root, seed, "--device", "cpu", *IN_TURNS)

        rounds.append(bench_round(command, learner, actor, [refiner], config.refiner.every, seconds))
    result = {
        **_settings(flags, target),
        "repeats": repeats,
        "seconds": seconds,
        "rate": statistics.median(row.rate for row in rounds),
        "undelayed_rate": statistics.median(row.undelayed_rate for row in rounds),
        "wait_fraction": statistics.median(row.stream.wait_fraction for row in rounds),
        "rounds": [asdict(row) | {"rate": row.rate, "undelayed_rate": row.undelayed_rate} for row in rounds],
    }
    return result, [_round_table(target, rounds, seconds)]


def step(flags: BenchFlags, announce: Announce) -> Report:
    """A step of trajectory balance with an actor and a learner, beside whole steps of one process."""
    repeats, seconds = flags.repeats or 3, flags.seconds or 20.0
    config = speed_config(flags)
    settings = {
        "--method": speed_method(flags),
        "--device": "cpu",
        "--sampling-steps": str(config.grid.sampling_steps),
        "--learner.batch-size": str(config.learner.batch_size),
    }
    words = [word for pair in settings.items() for word in pair]
    rounds: list[StepRound] = []
    with yardsticks_of(config) as calls:
        steps = {name: call for name, call in calls.items() if name.endswith(" step")}
        for index in range(repeats):
            announce(f"bench step: round {index + 1} of {repeats}")

            def command(root: Path, seed: int = flags.seed + index) -> list[str]:
                return _train(config.target, root, seed, *words, *IN_TURNS)

            rounds.append(bench_step(command, steps, seconds))
    result = {
        **_settings(flags, config.target),
        "method": speed_method(flags),
        "repeats": repeats,
        "seconds": seconds,
        "step_s": statistics.median(row.step_s for row in rounds),
        "speed_up": {name: statistics.median(row.speed_up(name) for row in rounds) for name in steps},
        "rounds": [asdict(row) for row in rounds],
    }
    return result, [_step_table(f"{speed_method(flags)} on {config.target}", rounds)]


def scale(flags: BenchFlags, announce: Announce) -> Report:
    """Trajectories a second with the number of actors, and time and memory of a step with the dimension."""
    seconds, repeats = flags.seconds or 10.0, flags.repeats or 5
    counts, dims = _numbers("actors", flags.actors), _numbers("dims", flags.dims)
    actors: dict[str, list[ActorsRow]] = {}
    for energy in ENERGIES:
        actors[energy.lower()] = rows = []
        for count in counts:
            announce(f"bench scale: {energy.lower()} energy, actors: {count}")
            rows.append(bench_actors(_actors_command(energy, flags.seed), count, ACTORS_BATCH, seconds))
    dimensions: list[DimensionRow] = []
    for dim in dims:
        announce(f"bench scale: manywell of dimension {dim}")
        dimensions.append(_in_new_process(_dimension_config(flags, dim), repeats))
    out = flags.out or Path()
    plots = [plot_actors(actors, out / "bench-scale-actors.png")] if counts else []
    plots += [plot_dimension(dimensions, out / "bench-scale-dimension.png")] if dims else []
    result = {
        **_settings(flags, "manywell"),
        "seconds": seconds,
        "repeats": repeats,
        "actors": {
            name: {
                "rows": [asdict(row) for row in rows],
                "efficiency": efficiency(rows),
                "bytes_per_actor": bytes_per_actor(rows),
            }
            for name, rows in actors.items()
            if rows
        },
        "dimension": [asdict(row) for row in dimensions],
        "plots": [str(path) for path in plots],
    }
    captions = dict.fromkeys(actors, "") | {list(actors)[-1]: ACTORS_CAPTION}
    tables = [_actors_table(name, rows, seconds, captions[name]) for name, rows in actors.items() if rows]
    return result, tables + ([_dimension_table(dimensions, flags)] if dims else [])


def _train(target: str, root: Path, seed: int, *arguments: str) -> list[str]:
    main = "import sys; from driftstream.launch.cli import main; sys.exit(main())"
    limits = ("--minutes", str(LONGEST_MIN), "--wandb", "disabled")
    return [sys.executable, "-c", main, "train", target, "--out", str(root), "--seed", str(seed), *limits, *arguments]


def _actors_command(energy: str, seed: int) -> Callable[[Path, int], Sequence[str]]:
    """Langevin policies ask for the energy at every step, and their small networks leave the processors idle."""
    target = f"{bench_energies.__file__}:{energy}"
    settings = {
        "--method": "tb+expl+lp",
        "--sampling-steps": str(ACTORS_STEPS),
        "--learner.batch-size": str(ACTORS_BATCH),
        "--policy.hidden": "8",
        "--policy.harmonics": "4",
        "--stream.max-staleness": "1000",
        "--eval.every-s": str(60 * LONGEST_MIN),
    }
    flags = [word for pair in settings.items() for word in pair]
    return lambda root, count: _train(target, root, seed, *flags, "--actors", str(count))


def _dimension_config(flags: BenchFlags, dim: int) -> RunConfig:
    config = replace(speed_config(replace(flags, target="manywell")), target_options={"dim": dim})
    # Little is kept, as what is measured is a step.
    return replace(
        config, replay=replace(config.replay, capacity=max(config.replay.minimum, config.learner.batch_size))
    )


def _in_new_process(config: RunConfig, repeats: int) -> DimensionRow:
    # Spawned, as a forked process would share pages with this one; Ctrl-C is answered here.
    context = multiprocessing.get_context("spawn")
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(1, mp_context=context, initializer=signal.signal, initargs=ignore) as pool:
        return pool.submit(_dimension, config, repeats).result()


def _dimension(config: RunConfig, repeats: int) -> DimensionRow:
    torch.set_num_threads(1)
    learner = build_learner(config, derive_seed(config.seed, "learner"))
    return bench_dimension(learner, repeats, config.exploration.std or 0.0)


def _round_table(target: str, rounds: Sequence[Round], seconds: float) -> Table:
    rate = statistics.median(row.rate for row in rounds)
    undelayed = statistics.median(row.undelayed_rate for row in rounds)
    title = (
        f"{target}, default method: {rate:.2f} of the updates/s from memory ({undelayed:.2f} undelayed), {seconds:g} s"
    )
    table = _table(title, END_TO_END_CAPTION)
    for heading in ("updates/s", "memory", "share", "undelayed", "wait", "cpu ms", "memory"):
        table.add_column(heading, justify="right")
    table.add_column("cores")
    for row in rounds:
        table.add_row(
            f"{row.stream.updates_per_s:.1f}",
            f"{row.memory.updates_per_s:.1f}",
            f"{row.rate:.2f}",
            f"{row.undelayed_rate:.2f}",
            f"{row.stream.wait_fraction:.1%}",
            f"{1e3 * row.stream_cpu_s:.1f}",
            f"{1e3 * row.memory_cpu_s:.1f}",
            " ".join(f"{name.removesuffix('-0')} {cores:.2f}" for name, cores in row.cores.items()),
        )
    return table


def _step_table(what: str, rounds: Sequence[StepRound]) -> Table:
    table = _table(f"{what}: milliseconds a step", STEP_CAPTION)
    names = list(rounds[0].yardsticks)
    for heading in ("step", "wait", *(column for name in names for column in (name, "speed-up"))):
        table.add_column(heading, justify="right")
    for row in rounds:
        cells = [(f"{1e3 * row.yardsticks[name]:.0f}", f"{row.speed_up(name):.2f}") for name in names]
        wait = f"{row.stream.wait_fraction:.1%}"
        table.add_row(f"{1e3 * row.step_s:.1f}", wait, *(cell for pair in cells for cell in pair))
    return table


def _actors_table(name: str, rows: Sequence[ActorsRow], seconds: float, caption: str) -> Table:
    title = (
        f"{name} energy: {efficiency(rows):.2f} of linear, {bytes_per_actor(rows) / MEGABYTE:.0f} MB an added actor, "
        f"{seconds:g} s each"
    )
    table = _table(title, caption)
    for heading in ("actors", "trajectories/s", "scaling", "updates/s", "wait", "ms/update", "memory, MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.actors),
            f"{row.trajectories_per_s:.0f}",
            f"{efficiency([rows[0], row]):.2f}",
            f"{row.updates_per_s:.1f}",
            f"{row.wait_fraction:.0%}",
            f"{1e3 * row.update_s:.1f}",
            f"{row.pss_bytes / MEGABYTE:.0f}",
        )
    return table


def _dimension_table(rows: Sequence[DimensionRow], flags: BenchFlags) -> Table:
    batch_size = _dimension_config(flags, 2).learner.batch_size
    title = f"manywell: batch {batch_size}, T = {flags.sampling_steps}, one thread"
    table = _table(title, DIMENSION_CAPTION)
    for heading in ("dimension", "ms/rollout", "ms/step", "memory, MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        memory = "–" if row.peak_bytes is None else f"{row.peak_bytes / MEGABYTE:.0f}"
        table.add_row(str(row.dim), f"{1e3 * row.rollout_s.median:.0f}", f"{1e3 * row.step_s.median:.0f}", memory)
    return table


def _table(title: str, caption: str) -> Table:
    look: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "box": None, "pad_edge": False}
    return Table(title=title, caption=caption or None, **look)


def _settings(flags: BenchFlags, target: str) -> dict[str, Any]:
    return {
        "benchmark": flags.what,
        "target": target,
        "seed": flags.seed,
        "torch": torch.__version__,
        "processors": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }


def _check(flags: BenchFlags) -> None:
    """Refuse flags that the benchmark has no use for."""
    of_scale, of_step = flags.what == "scale", flags.what == "step"
    unused = {
        "--langevin": flags.langevin and not of_step,
        "--steps": flags.steps is not None,
        "--segment-length": flags.segment_length is not None,
        "--lam": flags.lam is not None,
        "--target": flags.target is not None and of_scale,
        "--batch-size": flags.batch_size is not None and not (of_scale or of_step),
        "--seconds": flags.seconds is not None and flags.what == "start",
        "--out": flags.out is not None and not of_scale,
    }
    for name, given in unused.items():
        if given:
            raise UsageError(f"{name}: `bench {flags.what}` has no use for it")
    if flags.seconds is not None and not flags.seconds > 0:
        raise UsageError(f"--seconds {flags.seconds:g}: expected a positive number")
    if (of_scale or of_step) and flags.sampling_steps < 2:
        raise UsageError(f"--sampling-steps {flags.sampling_steps}: expected at least 2")


def _numbers(name: str, text: str) -> list[int]:
    """Rising positive integers, from a list with commas that may be empty."""
    words = [word for word in text.split(",") if word]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"--{name} {text}: expected positive integers, such as 1,2,4")
    return sorted({int(word) for word in words})


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


__all__ = ["PARTS", "runs"]
