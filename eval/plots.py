"""Figures: samples over the target's density, and the course of a training run.

Built on `Figure` objects without pyplot: nothing global is touched, and any process or thread may draw.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor

from driftstream.envs.targets import Target, unwrap
from driftstream.envs.targets_funnel import Funnel
from driftstream.envs.targets_manywell import ManyWell

_BLUE, _RED, _GREEN = "#3b6ea5", "#d1495b", "#2e8b57"
_ORANGE, _PURPLE, _GREY = "#e8871e", "#7d5ba6", "#555555"

_GRID = 100  # points a side
_CHUNK = 4096  # points at which the target is evaluated at a time
_DEPTH = 8.0  # nats below the highest point that the contours reach
_MAX_SAMPLES = 2000  # more make a blot
_MARKED = 25  # points of a curve up to which each gets a mark

DensityCache = dict[tuple[int, int], tuple[Tensor, str]]
"""A target's log density on the plots' grids and the note on it, by the pair of coordinates."""


def plot_samples(target: Target, samples: Tensor, path: Path, cache: DensityCache | None = None) -> Path:
    """Draws samples [N,D] over contours of the log density, one panel for each of the target's projections.

    In more than two dimensions the contours are those of the exact marginal where it is known (funnel, manywell),
    else of the slice at 0 of the other coordinates, and the panel says so. In one dimension, a histogram over the
    density. The target is evaluated at 100 points a side, in the default dtype on its own device, without being
    counted; `cache` (empty at first, one for each target) keeps that for the next plot.
    Writes a PNG at `path` and returns it. Raises ValueError unless `samples` is [N,D], and what the target raises.
    """
    cache = {} if cache is None else cache
    if samples.ndim != 2 or samples.shape[1] != target.dim:
        raise ValueError(f"samples has shape {list(samples.shape)}, expected [N,{target.dim}]")
    samples = samples.detach().to("cpu", torch.float64)
    pairs = target.projections if target.dim > 1 else ((0, 0),)
    figure = Figure(figsize=(4.2 * len(pairs), 4.3), layout="constrained")
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        if target.dim == 1:
            _draw_histogram(axes, target, samples, cache)
        else:
            _draw_projection(axes, target, samples[:, list(pair)], pair, cache)
    figure.suptitle(target.name, fontsize=11)
    return save_figure(figure, path)


def _draw_projection(axes: Axes, target: Target, points: Tensor, pair: tuple[int, int], cache: DensityCache) -> None:
    low, high = target.plot_range
    side = torch.linspace(low, high, _GRID, dtype=torch.float64)
    pair = pair[0], pair[1]  # a user's may be a list, which is no key
    if pair not in cache:
        rows, columns = torch.meshgrid(side, side, indexing="ij")
        cache[pair] = _log_density(target, torch.stack([columns, rows], -1).reshape(-1, 2), pair)
    log_density, note = cache[pair]
    height = log_density.reshape(_GRID, _GRID)
    height = (height - height.max()).clamp_min(-_DEPTH)
    levels = np.linspace(-_DEPTH, 0.0, 9)
    axes.contourf(side, side, height, levels=levels, cmap="Blues", alpha=0.6)
    axes.contour(side, side, height, levels=levels[1:-1], colors=_BLUE, linewidths=0.4, linestyles="solid")

    shown = _mark_range(axes, target, points, note)
    x, y = shown[:_MAX_SAMPLES].unbind(1)
    axes.scatter(x, y, s=6, color=_RED, alpha=0.5, linewidths=0)
    axes.set(ylim=(low, high), aspect="equal")
    axes.set(xlabel=f"$x_{{{pair[0] + 1}}}$", ylabel=f"$x_{{{pair[1] + 1}}}$")


def _draw_histogram(axes: Axes, target: Target, points: Tensor, cache: DensityCache) -> None:
    x = torch.linspace(*target.plot_range, 5 * _GRID, dtype=torch.float64).unsqueeze(-1)
    if (0, 0) not in cache:
        cache[0, 0] = _evaluate(unwrap(target), x), ""
    density = cache[0, 0][0].softmax(0)
    axes.fill_between(x[:, 0], density / (x[1] - x[0]), color=_BLUE, alpha=0.3, linewidth=0, label="density")
    shown = _mark_range(axes, target, points)
    axes.hist(shown[:, 0], bins=60, density=True, histtype="step", color=_RED, label="samples")
    axes.set(xlabel="$x$", ylabel="probability density")
    axes.legend(fontsize=8, frameon=False)


def _mark_range(axes: Axes, target: Target, points: Tensor, note: str = "") -> Tensor:
    """The points within the plot's range; what share lies outside is said above the panel."""
    low, high = target.plot_range
    shown = ((points >= low) & (points <= high)).all(1)
    outside = "" if shown.all() else f"{(~shown).double().mean():.1%} of samples outside"
    axes.set_title("; ".join(filter(None, (note, outside))), fontsize=8, color=_GREY)
    axes.set_xlim(low, high)
    return points[shown]


def _log_density(target: Target, points: Tensor, pair: tuple[int, int]) -> tuple[Tensor, str]:
    """Log density [N] of a projection at `points` [N,2], up to a constant, and the panel's note on it."""
    # Drawing contours is no sampling, and must not be counted as energy evaluations.
    inner = unwrap(target)
    if isinstance(inner, Funnel) and pair[0] == 0:
        return _evaluate(Funnel(inner.name, 2, inner.variance), points), ""
    x = points.new_zeros(len(points), target.dim)
    x[:, list(pair)] = points
    # Manywell's coordinates are independent: its slices are its marginals.
    exact = target.dim == 2 or isinstance(inner, ManyWell)
    return _evaluate(inner, x), "" if exact else "contours: slice at 0"


@torch.no_grad()
def _evaluate(target: Target, x: Tensor) -> Tensor:
    """Log density [N] at x [N,D], on the CPU in float64, with -inf for NaN."""
    x = x.to(target.device, torch.get_default_dtype())
    log_density = torch.cat([target.log_reward(chunk) for chunk in x.split(_CHUNK)])
    return log_density.to("cpu", torch.float64).nan_to_num(-math.inf, neginf=-math.inf)


@dataclass(frozen=True)
class _Line:
    """A metric (or a pattern of names) in a panel; a reference is dashed."""

    metric: str
    label: str
    color: str
    reference: bool = False


@dataclass(frozen=True)
class _Panel:
    title: str
    lines: Sequence[_Line]
    log_scale: bool = False
    lower: float | None = None
    upper: float | None = None
    zoom_late: bool = False  # to where the curves are after a fifth of the run: they may start thousands off


_LOG_Z_TRUE = "log_z_true"  # not a metric: derived from delta_log_z

_PANELS = (
    _Panel(
        "log Z (nats)",
        (
            _Line("eval/log_z_upper_bound", "upper bound (EUBO)", _ORANGE),
            _Line("eval/log_z_importance", "importance", _GREEN),
            _Line("eval/log_z_lower_bound", "lower bound (ELBO)", _BLUE),
            _Line("train/log_z", "learned", _PURPLE),
            _Line(_LOG_Z_TRUE, "true", _GREY, reference=True),
        ),
        zoom_late=True,
    ),
    _Panel("training loss", (_Line("train/loss", "", _BLUE),), log_scale=True),
    _Panel("effective sample size / n", (_Line("eval/ess", "", _BLUE),), lower=0.0, upper=1.0),
    _Panel(
        "W2 to exact samples",
        (
            _Line("eval/w2", "sampler", _BLUE),
            _Line("eval/w2_floor", "exact against exact", _GREY, reference=True),
        ),
        lower=0.0,
    ),
    _Panel(
        "mode coverage",
        (
            _Line("eval/mode_coverage", "sampler", _BLUE),
            _Line("eval/mode_coverage_worst", "worst pair", _RED),
            _Line("eval/modes", "all modes", _GREY, reference=True),
            _Line("eval/mode_coverage_true", "true left-well mass", _GREY, reference=True),
        ),
        lower=0.0,
    ),
    _Panel("state flow: RMS error (nats)", (_Line("eval/flow_error", "", _BLUE),), log_scale=True),
    _Panel(
        "throughput (1/s)",
        (
            _Line("learner/updates_per_s", "learner: updates", _BLUE),
            _Line("actor/*/trajectories_per_s", "actor: trajectories", _RED),
        ),
        log_scale=True,
    ),
)


def plot_training_curves(metrics_path: Path, path: Path, last: Mapping[str, float | None] | None = None) -> Path | None:
    """Draws a run's `metrics.jsonl` over learner steps, in panels; those without data are left out.

    Panels: log Z and its bounds, loss, effective sample size, W2 and its floor, mode coverage,
    error of the state flow, throughput.
    `last` is one more row, not yet in the file. Writes a PNG at `path` and returns it, or None when there is nothing
    to draw yet.
    """
    rows = _read_rows(metrics_path, last)
    names = sorted({name for row in rows for name in row})
    panels = [p for p in _PANELS if any(fnmatchcase(n, line.metric) for line in p.lines for n in names)]
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, rows, names)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return save_figure(figure, path)


def _read_rows(metrics_path: Path, last: Mapping[str, float | None] | None) -> list[dict[str, Any]]:
    # While the run goes on, the last line may be half written.
    lines = [line for line in metrics_path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    parsed = [json.loads(line) for line in lines] + ([dict(last)] if last else [])
    rows = [{name: value for name, value in row.items() if value is not None} for row in parsed]
    for row in rows:
        if "eval/delta_log_z" in row and "eval/log_z_lower_bound" in row:
            row[_LOG_Z_TRUE] = row["eval/log_z_lower_bound"] + row["eval/delta_log_z"]
    return rows


def _draw_panel(axes: Axes, panel: _Panel, rows: list[dict[str, Any]], names: list[str]) -> None:
    drawn = []
    for line in panel.lines:
        label = line.label
        for name in (n for n in names if fnmatchcase(n, line.metric)):
            points = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=float)
            drawn.append(points)
            _draw_line(axes, line, points, label)
            label = ""  # one entry in the legend for all that match a pattern
    steps, values = np.concatenate(drawn).T
    if panel.log_scale and (values > 0).all():
        axes.set_yscale("log")
    lower, upper = panel.lower, panel.upper
    if panel.zoom_late:
        late = values[steps >= 0.2 * steps.max()]
        margin = 0.05 * np.ptp(late) + 1e-3
        lower, upper = late.min() - margin, late.max() + margin
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("learner step")
    axes.set_xlim(left=0)
    axes.set_ylim(lower, upper)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7.5, frameon=False)


def _draw_line(axes: Axes, line: _Line, points: np.ndarray, label: str) -> None:
    step, value = points.T
    if line.reference:
        axes.plot(step, value, color=line.color, linestyle="--", linewidth=1.2, label=label)
        return
    window = len(value) // 50
    if window < 5:
        # Evaluations are few: marks show each, and one alone would be no line at all.
        marker = "o" if len(value) < _MARKED else None
        axes.plot(step, value, color=line.color, linewidth=1.4, marker=marker, markersize=3, label=label)
        return
    # A long noisy series: all of it faintly, and its running mean.
    axes.plot(step, value, color=line.color, linewidth=0.5, alpha=0.25)
    mean = np.convolve(value, np.full(window, 1.0 / window), mode="valid")
    axes.plot(step[window - 1 :], mean, color=line.color, linewidth=1.4, label=label)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG at `path`, all of it or nothing, and returns it; makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The monitor may be reading the last one.
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=150, format="png")
    return partial.replace(path)
