"""The figure of a learned state flow beside the true one."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from torch import Tensor

from driftstream.actors.policy import DiffusionPolicy
from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets import Target, unwrap
from driftstream.eval.flow import known_flow
from driftstream.eval.plots import save_figure
from driftstream.learner.losses import state_log_flow

_SIDE = 120  # points
_SHOWN = (0.25, 0.5, 0.75)


@torch.no_grad()
def plot_flow(
    policy: DiffusionPolicy, process: DiffusionProcess, target: Target, times: Tensor, path: Path
) -> Path | None:
    """Draws F(x, t) / Z, learned above and true below, at the times of the grid [T+1] nearest to 1/4, 1/2 and 3/4.

    Both panels of a time have one colour scale, that of the truth; `mass` is the learned one's integral over the
    panel, 1 at best. The target's evaluations are not counted. Writes a PNG at `path` and returns it, or None
    unless the target has two dimensions and the true flow is known (`known_flow`).
    """
    # Drawing is no evaluation, and must not be counted as energy evaluations.
    target = unwrap(target)
    flow = known_flow(policy, process, target, times)
    if flow is None or target.dim != 2:
        return None
    shown = sorted({int((flow.times - t).abs().argmin()) for t in _SHOWN})
    side = torch.linspace(*target.plot_range, _SIDE, dtype=torch.float64)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    points = torch.stack([columns, rows], -1).reshape(-1, 1, 2).to(times)
    area = float(side[1] - side[0]) ** 2

    figure = Figure(figsize=(3.4 * len(shown), 7.0), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False, sharex=True, sharey=True)
    for (upper, lower), n in zip(panels.T, shown, strict=True):
        time = flow.times[n : n + 1]
        learned = (state_log_flow(policy, process, target, points, time).double() - flow.log_z).exp().cpu()
        true = flow.marginals[n].log_reward(points.double()).exp().cpu()
        peak = float(true.max())
        _draw(upper, side, learned, peak)
        mesh = _draw(lower, side, true, peak)
        upper.set_title(f"t = {float(time):.3g}: learned, mass {area * float(learned.sum()):.3g}", fontsize=9)
        lower.set_title("true", fontsize=9)
        lower.set_xlabel("$x_1$")
        figure.colorbar(mesh, ax=[upper, lower], orientation="horizontal", extend="max", shrink=0.8, aspect=40)
    for axes in panels[:, 0]:
        axes.set_ylabel("$x_2$")
    figure.suptitle(f"{target.name}: flow F(x, t) / Z", fontsize=11)
    return save_figure(figure, path)


def _draw(axes: Axes, side: Tensor, density: Tensor, peak: float) -> QuadMesh:
    axes.set_aspect("equal")
    x, height = side.numpy(), density.reshape(len(side), len(side)).numpy()
    return axes.pcolormesh(x, x, height, cmap="viridis", vmin=0.0, vmax=peak, shading="nearest")
