"""`driftstream bench`: what objectives and the parts of a run cost, and how noisy gradients are."""

import json
import math
import multiprocessing
import signal
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from driftstream.envs.errors import require
from driftstream.eval.bench_gradients import Moment, bench_gradients
from driftstream.eval.bench_objectives import Update, UpdateTime, peak_bytes, time_updates
from driftstream.launch.bench_runs import PARTS as RUNS
from driftstream.launch.bench_runs import runs
from driftstream.launch.bench_speed import speed
from driftstream.launch.config import RunConfig, resolve
from driftstream.launch.flags import BenchFlags, UsageError
from driftstream.launch.heap import keep_heap
from driftstream.launch.methods import load_method
from driftstream.launch.roles import build_learner, build_on_policy_actors
from driftstream.launch.seeding import derive_seed
from driftstream.learner.objectives import ObjectiveConfig

MIB = 2**20
DEFAULT_BATCH = {"gradients": 100, "objectives": 300}
GRADIENTS_CAPTION = (
    "Gradients of the loss by the forward network, each on new on-policy data, all with the same parameters, and from "
    "as many transitions (B·T). "
    "Objectives have different scales, so that noise/signal = trace / |mean|² is what compares: of so many gradients "
    "the mean has an error as large as itself. |mean|² is free of the bias trace/K; "
    "± is the jackknife's standard error; – where K gradients do not show the signal. s/grad: loss and backward; "
    "s/rollout: the trajectories they are computed from (each segment has one of its own). SubTB has a "
    "forward-looking flow; L: on segments of so many transitions."
)
OBJECTIVES_CAPTION = (
    "One update: loss, backward and Adam's step, from trajectories that are there already; PIS simulates its own as "
    "part of the loss. Peak: growth of the resident memory during one update in a new process, without model, "
    "optimiser, data and code. FL: forward-looking flow. L: on segments of so many transitions, one of each "
    "trajectory. Parts: of the simulation, between checkpoints."
)


def run(flags: BenchFlags) -> int:
    """Run one benchmark and print its figures."""
    least = 3 if flags.what == "gradients" else 1
    if flags.repeats is not None and flags.repeats < least:
        raise UsageError(f"--repeats {flags.repeats}: expected at least {least}")
    if flags.what in ("gradients", "objectives") and flags.langevin:
        raise UsageError(f"--langevin: `bench {flags.what}` has no Langevin policies")
    if flags.what in ("gradients", "objectives") and (flags.seconds, flags.out) != (None, None):
        raise UsageError(f"{'--out' if flags.seconds is None else '--seconds'}: of whole runs, such as `bench scale`")
    keep_heap()
    torch.set_num_threads(1)
    with Console(stderr=True).status(f"bench {flags.what}") as status:
        if flags.what == "gradients":
            result, tables = gradients(flags)
        elif flags.what == "objectives":
            result, tables = objectives(flags)
        elif flags.what in RUNS:
            result, tables = runs(flags, status.update)
        else:
            result, tables = speed(flags, status.update)
        status.stop()
    if flags.json:
        print(json.dumps(result, allow_nan=False))
    else:
        for table in tables:
            Console().print(table)
    return 0


def gradients(flags: BenchFlags) -> tuple[dict[str, Any], list[Table]]:
    """Noise and cost of every objective's gradient, before and after training with forward-looking SubTB."""
    steps = 500 if flags.steps is None else flags.steps
    repeats = 64 if flags.repeats is None else flags.repeats
    if steps < 1:
        raise UsageError(f"--steps {steps}: expected at least 1")
    config = _base(flags, "gmm9")
    subtb = config.objective
    length = _segment_length(flags)
    contenders = {
        "TB": ObjectiveConfig(),
        "SubTB": subtb,
        f"SubTB, L = {length}": replace(subtb, segment_length=length),
        "PIS": ObjectiveConfig("reverse_kl"),
    }
    config = resolve(replace(config, objective=contenders[f"SubTB, L = {length}"]))
    transitions = config.learner.batch_size * flags.sampling_steps
    divides = transitions % length == 0
    require(divides, "objective.segment_length", length, f"a divisor of the batch's {transitions} transitions")
    learner = build_learner(replace(config, objective=subtb), derive_seed(flags.seed, "learner"))
    (actor,) = build_on_policy_actors(config, learner, derive_seed(flags.seed, "actor"))
    moments = bench_gradients(learner, actor, contenders, steps, repeats)
    result = {**_settings(flags, config), "steps": steps, "repeats": repeats, "segment_length": length}
    return (
        {**result, "moments": _json_safe([asdict(moment) for moment in moments])},
        [_gradient_table(config, moment, repeats, moment is moments[-1]) for moment in moments],
    )


def objectives(flags: BenchFlags) -> tuple[dict[str, Any], list[Table]]:
    """Seconds and peak memory of one update under every objective."""
    if flags.steps is not None:
        raise UsageError("--steps: only `bench gradients` trains")
    repeats = 20 if flags.repeats is None else flags.repeats
    configs = _contenders(flags)
    seed = derive_seed(flags.seed, "learner")
    updates = {name: Update(build_learner(config, seed)) for name, config in configs.items()}
    times = time_updates(updates, repeats)
    peaks = {name: _peak_in_new_process(config, seed) for name, config in configs.items()}
    config = configs["TB"]
    rows = {name: {**asdict(times[name]), "peak_bytes": peaks[name]} for name in configs}
    result = {**_settings(flags, config), "repeats": repeats, "segment_length": _segment_length(flags)}
    return {**result, "rows": _json_safe(rows)}, [_objective_table(config, times, peaks, repeats)]


def _base(flags: BenchFlags, target: str) -> RunConfig:
    """Forward-looking SubTB on the target asked for, not resolved."""
    config = load_method("fl-subtb").config
    batch_size = DEFAULT_BATCH[flags.what] if flags.batch_size is None else flags.batch_size
    return replace(
        config,
        target=flags.target or target,
        seed=flags.seed,
        device="cpu",
        grid=replace(config.grid, sampling_steps=flags.sampling_steps),
        learner=replace(config.learner, batch_size=batch_size),
        objective=replace(config.objective, lam=2.0 if flags.lam is None else flags.lam),
    )


def _segment_length(flags: BenchFlags) -> int:
    return max(1, flags.sampling_steps // 5) if flags.segment_length is None else flags.segment_length


def _contenders(flags: BenchFlags) -> dict[str, RunConfig]:
    """A resolved configuration of every objective, otherwise equal."""
    base, length = _base(flags, "manywell"), _segment_length(flags)
    subtb = base.objective
    plain, none = replace(base.policy, state_flow="plain"), replace(base.policy, state_flow="none")
    pis = replace(base, objective=ObjectiveConfig("reverse_kl"), policy=none)
    configs = {
        "TB": replace(base, objective=ObjectiveConfig(), policy=none),
        "VarGrad": replace(base, objective=ObjectiveConfig("vargrad"), policy=none),
        "DB": replace(base, objective=ObjectiveConfig("detailed_balance"), policy=plain),
        "SubTB": replace(base, policy=plain),
        "SubTB FL": base,
        f"SubTB FL, L = {length}": replace(base, objective=replace(subtb, segment_length=length)),
        "PIS": pis,
        "PIS, 4 parts": replace(pis, rollout=replace(pis.rollout, checkpoint_segments=4)),
    }
    return {name: resolve(config) for name, config in configs.items()}


def _peak_in_new_process(config: RunConfig, seed: int) -> int | None:
    # Spawned, as a forked process would share pages with this one; Ctrl-C is answered here.
    context = multiprocessing.get_context("spawn")
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(1, mp_context=context, initializer=signal.signal, initargs=ignore) as pool:
        return pool.submit(_peak_bytes, config, seed).result()


def _peak_bytes(config: RunConfig, seed: int) -> int | None:
    torch.set_num_threads(1)
    return peak_bytes(Update(build_learner(config, seed)))


def _settings(flags: BenchFlags, config: RunConfig) -> dict[str, Any]:
    return {
        "benchmark": flags.what,
        "target": config.target,
        "batch_size": config.learner.batch_size,
        "sampling_steps": flags.sampling_steps,
        "lam": config.objective.lam,
        "seed": flags.seed,
        "torch": torch.__version__,
    }


def _gradient_table(config: RunConfig, moment: Moment, repeats: int, last: bool) -> Table:
    trained = f"after {moment.step:,} updates of SubTB" if moment.step else "untrained"
    title = (
        f"{config.target}, {trained}: log Z {moment.log_z:.3f}, lower bound {moment.log_z_lower_bound:.3f} "
        f"(batch {config.learner.batch_size}, T = {config.grid.sampling_steps}, λ = {config.objective.lam:g}, "
        f"K = {repeats})"
    )
    headings = ("B·T", "s/grad", "s/rollout", "trace", "|mean|²", "noise/signal", "±")
    table = _table(title, headings, GRADIENTS_CAPTION if last else None)
    for name, row in moment.rows.items():
        statistics = row.statistics
        table.add_row(
            name,
            f"{row.transitions:,}",
            f"{row.gradient_s:.3f}",
            f"{row.rollout_s:.3f}" if row.rollout_s else "–",
            f"{statistics.trace:.3g}",
            f"{statistics.signal:.3g}",
            *(_figure(value) for value in (statistics.noise_to_signal, statistics.standard_error)),
        )
    return table


def _objective_table(
    config: RunConfig, times: Mapping[str, UpdateTime], peaks: Mapping[str, int | None], repeats: int
) -> Table:
    title = (
        f"{config.target}, batch {config.learner.batch_size}, T = {config.grid.sampling_steps}, "
        f"{repeats} rounds, one thread"
    )
    headings = ("transitions", "ms/update", "quartiles", "× TB", "peak MiB", "× TB")
    table = _table(title, headings, OBJECTIVES_CAPTION)
    first = next(iter(times))
    for name, row in times.items():
        peak, least = peaks[name], peaks[first]
        table.add_row(
            name,
            f"{row.transitions:,}",
            f"{1e3 * row.median_s:.1f}",
            f"{1e3 * row.lower_quartile_s:.1f}–{1e3 * row.upper_quartile_s:.1f}",
            f"{row.median_s / times[first].median_s:.2f}",
            "–" if peak is None else f"{peak / MIB:.0f}",
            f"{peak / least:.2f}" if peak is not None and least else "–",
        )
    return table


def _table(title: str, headings: tuple[str, ...], caption: str | None) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=None, pad_edge=False)
    table.add_column("objective", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _figure(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _json_safe(value: Any) -> Any:
    """Nested figures with None for those that are not finite."""
    if isinstance(value, dict):
        return {key: _json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_json_safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
