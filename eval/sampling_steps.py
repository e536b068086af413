"""How a sampler's figures depend on the number of steps it is simulated with, whatever it was trained with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from driftstream.eval.evaluator import Evaluator
from driftstream.eval.plots import save_figure


@dataclass(frozen=True)
class StepSweep:
    """The metrics of one policy by the number of steps of the uniform grid that it was evaluated on."""

    label: str
    metrics: dict[int, dict[str, float]]


def sweep_sampling_steps(evaluator: Evaluator, steps: Sequence[int], label: str) -> StepSweep:
    """Evaluate a loaded policy on one uniform grid after another, with one seed."""
    return StepSweep(label, {count: evaluator.evaluate(count).metrics for count in steps})


@dataclass(frozen=True)
class _Panel:
    title: str
    metric: str
    reference: str | None = None
    log_scale: bool = False


_PANELS = (
    _Panel("Δlog Z (nats)", "eval/delta_log_z", log_scale=True),
    _Panel("Δlog Z RW (nats)", "eval/delta_log_z_rw"),
    _Panel("W2 (dashed: exact against exact)", "eval/w2", "eval/w2_floor"),
    _Panel("effective sample size / n", "eval/ess"),
    _Panel("mode coverage (dashed: all modes)", "eval/mode_coverage", "eval/modes"),
    _Panel("left-well mass (dashed: true)", "eval/mode_coverage", "eval/mode_coverage_true"),
)
_UNKNOWN_LOG_Z = (
    _Panel("log Z: lower bound (nats)", "eval/log_z_lower_bound"),
    _Panel("log Z: importance estimate (nats)", "eval/log_z_importance"),
)


def plot_sampling_steps(sweeps: Sequence[StepSweep], path: Path) -> Path | None:
    """Draws metrics against the number of steps, one line a sweep, in panels; those without data are left out.

    Where log Z is known its errors are drawn, else its estimates. Writes a PNG at `path` and returns it, or None
    when there is nothing to draw.

    Source: the right panel of figure 3 of Sendera et al. 2024 (arXiv 2402.05098).
    """
    there = {name for sweep in sweeps for metrics in sweep.metrics.values() for name in metrics}
    known = "eval/delta_log_z" in there
    panels = [
        panel
        for panel in (_PANELS if known else _UNKNOWN_LOG_Z + _PANELS)
        if panel.metric in there and panel.reference in there | {None}
    ]
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * lines + 0.2 * len(sweeps)), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, sweeps)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False)
    return save_figure(figure, path)


def _draw_panel(axes: Axes, panel: _Panel, sweeps: Sequence[StepSweep]) -> None:
    ticks = sorted({count for sweep in sweeps for count in sweep.metrics})
    drawn: list[float] = []
    for index, sweep in enumerate(sweeps):
        color = f"C{index}"
        points = [(count, row[panel.metric]) for count, row in sweep.metrics.items() if panel.metric in row]
        counts, values = [count for count, _ in points], [value for _, value in points]
        axes.plot(counts, values, color=color, marker="o", markersize=3, linewidth=1.4, label=sweep.label)
        drawn += values
        known = [row[panel.reference] for row in sweep.metrics.values() if panel.reference in row]
        if known:
            axes.axhline(known[0], color=color, linestyle="--", linewidth=0.9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    if panel.log_scale and 0 < 10 * min(drawn) < max(drawn):
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("sampling steps")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
