"""`driftstream bench rollout|update|mala|replay|weights|stream|all`: the parts of a run beside their floors."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

from driftstream.actors import native
from driftstream.actors.mala import MalaConfig
from driftstream.envs.errors import require
from driftstream.eval.bench_data import bench_decode, bench_replay, bench_weights, make_batch
from driftstream.eval.bench_rounds import Comparison, Quartiles
from driftstream.eval.bench_speed import Calls, Steps, bench_mala, bench_rollout, bench_update
from driftstream.eval.bench_stream import StreamBenchError, bench_stream
from driftstream.launch.config import RunConfig, resolve
from driftstream.launch.flags import BenchFlags, CommandError, UsageError
from driftstream.launch.methods import load_method
from driftstream.launch.roles import build_learner
from driftstream.launch.seeding import derive_seed
from driftstream.learner.learner import Learner

PARTS = ("rollout", "update", "mala", "replay", "weights", "stream")
ENTRIES = 600_000
"""States that replay holds."""
DEFAULT_REPEATS = 20
DEFAULT_BATCH = 300
CAPTIONS = {
    "rollout": "Floor: the policy's matrix products, activations and the noise at the same shapes, into buffers that "
    "are there (and the target's gradient calls, with Langevin policies), by torch's operations. Network alone: the "
    "same by what evaluates the policy, native code where it is built. Naive: per-step embedding of the time, "
    "log-probabilities from torch.distributions, autograd's score, and a graph of it all.",
    "update": "Floor: the policy's matrix products and activations, there and back, by torch's operations. Network "
    "alone: the same by what evaluates the policy, native code where it is built. Update: loss, backward, Adam's "
    "step, from trajectories that are there. Learner step: that, with replay, statistics and the weights' average. "
    "Naive step: rollout with a graph, loss, backward, Adam's step. Published step: that, with the operations "
    "of the published implementation. Both in a process of their own.",
    "mala": "One step of all chains in a cycle. Floor: the bare calls for log reward and gradient.",
    "replay": "One insert of a batch and one draw by rank. Memcpy: the rows alone. Sorted array: sorted anew.",
    "weights": "The policy's tensors. Memcpy: their bytes once.",
    "decode": "Of a received batch, with all checks. Memcpy: its states once. Finiteness, checksum: parts of both.",
    "stream": "From a process to another over ipc. Floor: DEALER to ROUTER, the same frames, no copy, no check.",
}


def speed(flags: BenchFlags, announce: Callable[[str], object]) -> tuple[dict[str, Any], list[Table]]:
    """Every part that is asked for, one after the other."""
    of_others = {
        "steps": "gradients",
        "segment_length": "gradients and objectives",
        "lam": "gradients and objectives",
        "seconds": "end-to-end, step and scale",
        "out": "scale",
    }
    for name, allowed in of_others.items():
        if getattr(flags, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: of `bench {allowed}` only")
    repeats = DEFAULT_REPEATS if flags.repeats is None else flags.repeats
    config = speed_config(flags)
    comparisons: list[Comparison] = []
    for part in PARTS if flags.what == "all" else (flags.what,):
        announce(f"bench {part}")
        comparisons += measure(part, config, repeats)
    setting = {
        "benchmark": flags.what,
        "target": config.target,
        "batch_size": config.learner.batch_size,
        "sampling_steps": flags.sampling_steps,
        "hidden": config.policy.hidden,
        "langevin": config.policy.langevin,
        "repeats": repeats,
        "seed": flags.seed,
        "threads": torch.get_num_threads(),
        "network": native.describe(),
        "torch": torch.__version__,
    }
    tables = [comparison_table(comparison, config) for comparison in comparisons]
    return {**setting, "parts": {comparison.name: asdict(comparison) for comparison in comparisons}}, tables


def speed_method(flags: BenchFlags) -> str:
    """Name of the method that is measured."""
    return "tb+expl+lp" if flags.langevin else "tb+expl"


def speed_config(flags: BenchFlags) -> RunConfig:
    """The method of the published trajectory balance with exploration, at the sizes asked for."""
    config = load_method(speed_method(flags)).config
    batch_size = DEFAULT_BATCH if flags.batch_size is None else flags.batch_size
    config = replace(
        config,
        target=flags.target or ("gmm25" if flags.langevin else "manywell"),
        seed=flags.seed,
        device="cpu",
        grid=replace(config.grid, sampling_steps=flags.sampling_steps),
        learner=replace(config.learner, batch_size=batch_size),
    )
    require(flags.sampling_steps >= 2, "grid.sampling_steps", flags.sampling_steps, "at least 2 steps, to compare")
    return resolve(config)


def measure(part: str, config: RunConfig, repeats: int) -> Iterator[Comparison]:
    """The tables of one part, each with components of its own."""
    learner = _learner(config)
    exploration, batch_size = config.exploration.std or 0.0, config.learner.batch_size
    if part in ("rollout", "update"):
        bench = bench_rollout if part == "rollout" else bench_update
        with yardsticks_of(config) as yardsticks:
            yield bench(learner, repeats, exploration, yardsticks)
    elif part == "mala":
        yield bench_mala(learner, MalaConfig(chains=batch_size), repeats)
    elif part == "replay":
        yield bench_replay(learner.target.dim, batch_size, max(ENTRIES, batch_size), repeats, config.seed)
    elif part == "weights":
        yield bench_weights(learner.policy, repeats)
    else:
        yield from _measure_stream(learner, config, repeats)


@contextmanager
def yardsticks_of(config: RunConfig) -> Iterator[Calls]:
    """Those of `Steps`, in a process of their own.

    They have the heap that a program has by itself, and leave nothing in the heap of what they are compared with.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(config,)) as pool:
        yield {name: partial(_call_there, pool, name) for name in pool.submit(_names).result()}


_prepared: dict[str, Callable[[], object]] = {}
"""What the process of the yardsticks has."""


def _prepare(config: RunConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process answers Ctrl-C
    torch.set_num_threads(1)
    _prepared.update(Steps(_learner(config), config.exploration.std or 0.0).yardsticks)


def _names() -> list[str]:
    return list(_prepared)


def _call(name: str) -> None:
    _prepared[name]()


def _call_there(pool: ProcessPoolExecutor, name: str) -> None:
    pool.submit(_call, name).result()


def _learner(config: RunConfig) -> Learner:
    return build_learner(config, derive_seed(config.seed, "learner"))


def _measure_stream(learner: Learner, config: RunConfig, repeats: int) -> Iterator[Comparison]:
    steps = config.grid.sampling_steps
    assert steps is not None
    shape = (config.learner.batch_size, steps, learner.target.dim)
    yield bench_decode(make_batch(*shape), repeats)
    try:
        yield bench_stream(shape, repeats)
    except StreamBenchError as error:
        raise CommandError(f"bench stream: {error}") from None


def comparison_table(comparison: Comparison, config: RunConfig) -> Table:
    """Milliseconds of every contender and its ratio to the floor, with quartiles."""
    title = (
        f"{comparison.name} on {config.target}: batch {config.learner.batch_size}, T = {config.grid.sampling_steps}, "
        f"one thread{_figures(comparison.figures)}"
    )
    table = Table(
        title=title,
        title_justify="left",
        caption=CAPTIONS[comparison.name],
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column(comparison.name, no_wrap=True)
    for heading in (f"ms/{comparison.unit}", "quartiles", f"× {comparison.floor}", "quartiles"):
        table.add_column(heading, justify="right")
    for name, row in comparison.rows.items():
        seconds, ratio = row.seconds, row.ratio
        milliseconds = Quartiles(*(1e3 * value for value in (seconds.lower, seconds.median, seconds.upper)))
        table.add_row(name, f"{milliseconds.median:.3g}", _range(milliseconds), f"{ratio.median:.3g}", _range(ratio))
    return table


def _range(values: Quartiles) -> str:
    return f"{values.lower:.3g}–{values.upper:.3g}"


def _figures(figures: Mapping[str, float]) -> str:
    words = {
        "floor_gflops_per_s": "floor at {:.0f} GFLOP/s",
        "speed_up": "{:.2f} times as fast as the naive way",
        "published_speed_up": "{:.2f} times as fast as the published one",
        "entries": "{:,.0f} entries",
        "slowest_s": "slowest {:.3g} s",
        "checksum_share": "checksum {:.0%} of decoding",
        "rate": "{:.2f} of the floor's rate",
    }
    found = [text.format(figures[name]) for name, text in words.items() if name in figures]
    size = [f"{1e-6 * figures['bytes']:.3g} MB"] if "bytes" in figures else []
    return "".join(f", {text}" for text in size + found)


__all__ = ["PARTS", "comparison_table", "measure", "speed", "speed_config", "speed_method", "yardsticks_of"]
