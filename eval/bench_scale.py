"""How a run scales: its trajectories a second with the actors, a step's time and memory with the dimension."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from driftstream.eval.bench_objectives import peak_growth
from driftstream.eval.bench_rounds import Quartiles, quartiles, time_rounds
from driftstream.eval.bench_run import Rows, bench_run, learner_reports, pace
from driftstream.eval.bench_speed import Steps
from driftstream.learner.learner import Learner

if TYPE_CHECKING:
    from matplotlib.axes import Axes

START_S = 180.0
RATE = "trajectories_per_s"


@dataclass(frozen=True)
class ActorsRow:
    """A run with so many actors: what they make, what its learner does, and its memory.

    `update_s` is what an update takes once its batch is there; `pss_bytes` is all processes' memory, shared pages
    counted once.
    """

    actors: int
    trajectories_per_s: float
    updates_per_s: float
    wait_fraction: float
    update_s: float
    pss_bytes: int


@dataclass(frozen=True)
class DimensionRow:
    """A rollout and a learner's step in so many dimensions: seconds, and growth of memory over both (if known)."""

    dim: int
    rollout_s: Quartiles
    step_s: Quartiles
    peak_bytes: int | None


def bench_actors(
    command: Callable[[Path, int], Sequence[str]], actors: int, batch_size: int, seconds: float
) -> ActorsRow:
    """A run with so many actors, watched for `seconds` from when all of them are at work.

    `command` trains into a run directory with a number of actors; every update uses one batch of one actor.
    """
    with tempfile.TemporaryDirectory(prefix="driftstream-") as folder:
        root = Path(folder) / "run"
        with bench_run(command(root, actors), root) as run:
            rows = run.wait(lambda rows: _at_work(rows) >= actors and bool(learner_reports(rows)), START_S)
            first = len(rows)
            rows = run.wait(lambda rows: _span_s(rows[first:]) >= seconds, START_S + 4 * seconds)[first:]
            pss = run.pss_bytes()
    found = pace(rows)
    rate = batch_size * found.updates_per_s
    return ActorsRow(actors, rate, found.updates_per_s, found.wait_fraction, found.busy_s, pss)


def efficiency(rows: Sequence[ActorsRow]) -> float:
    """The last row's trajectories a second, as a share of as many times the first row's for each actor."""
    first, last = rows[0], rows[-1]
    return last.trajectories_per_s / last.actors / (first.trajectories_per_s / first.actors)


def bytes_per_actor(rows: Sequence[ActorsRow]) -> float:
    """Memory that an added actor takes, between the first row and the last."""
    first, last = rows[0], rows[-1]
    return (last.pss_bytes - first.pss_bytes) / max(1, last.actors - first.actors)


def bench_dimension(learner: Learner, repeats: int, exploration_std: float) -> DimensionRow:
    """Rollout and step of a learner; meant for a fresh process, as memory that was freed would be used unseen."""
    steps = Steps(learner, exploration_std)

    def both() -> None:
        steps.rollout()
        steps.learn()

    peak = peak_growth(both)
    seconds = time_rounds({"rollout": steps.rollout, "step": steps.learn}, repeats)
    return DimensionRow(learner.target.dim, quartiles(seconds["rollout"]), quartiles(seconds["step"]), peak)


def plot_actors(rows: Mapping[str, Sequence[ActorsRow]], path: Path) -> Path:
    """Draw, for every energy, trajectories a second, an update's time and all memory against the number of actors."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    from driftstream.eval.plots import save_figure

    figure = Figure(figsize=(12.0, 3.6), layout="constrained")
    rates, updates, memory = figure.subplots(1, 3)
    for name, found in rows.items():
        counts = [row.actors for row in found]
        (line,) = rates.plot(counts, [row.trajectories_per_s for row in found], "o-", label=f"{name} energy")
        ideal = [found[0].trajectories_per_s * count / counts[0] for count in counts]
        rates.plot(counts, ideal, ":", color=line.get_color(), label="the first times the number")
        updates.plot(counts, [1e3 * row.update_s for row in found], "o-", label=f"{name} energy")
        memory.plot(counts, [1e-6 * row.pss_bytes for row in found], "o-", label=f"{name} energy")
    rates.set(ylabel="trajectories/s", xscale="log", yscale="log")
    _write_out(rates)
    updates.set(ylabel="an update, its batch there, ms", xscale="log", ylim=(0, None))
    memory.set(ylabel="memory of all processes, MB", ylim=(0, None))
    for axes in (rates, updates, memory):
        axes.set(xlabel="actors", xticks=counts)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, fontsize="small")
    return save_figure(figure, path)


def plot_dimension(rows: Sequence[DimensionRow], path: Path) -> Path:
    """Draw a rollout's and a step's time, and their memory, against the dimension."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    from driftstream.eval.plots import save_figure

    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    times, memory = figure.subplots(1, 2)
    dims = [row.dim for row in rows]
    times.plot(dims, [1e3 * row.rollout_s.median for row in rows], "o-", label="rollout")
    times.plot(dims, [1e3 * row.step_s.median for row in rows], "o-", label="learner step")
    times.set(ylabel="ms")
    times.legend(frameon=False, fontsize="small")
    memory.plot(dims, [float("nan") if row.peak_bytes is None else 1e-6 * row.peak_bytes for row in rows], "o-")
    memory.set(ylabel="growth of memory, MB")
    for axes in (times, memory):
        axes.set(xlabel="dimension", xscale="log", yscale="log", xticks=dims)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        _write_out(axes)
    return save_figure(figure, path)


def _write_out(axes: "Axes") -> None:
    """Numbers, not powers, on a logarithmic vertical axis."""
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _at_work(rows: Rows) -> int:
    """How many actors have reported a rate."""
    return len({name for row in rows for name in row if name.startswith("actor/") and name.endswith(RATE)})


def _span_s(rows: Rows) -> float:
    reports = learner_reports(rows)
    return reports[-1]["wall_s"] - reports[0]["wall_s"] if reports else 0.0
