"""Figures are drawn for every target, from runs complete and incomplete, without touching pyplot."""

import json
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from driftstream.envs.targets import CountedTarget, Target, make_target, target_names
from driftstream.eval.plots import DensityCache, plot_samples, plot_training_curves


class Cube(Target):
    """No known marginals, and a density that is zero, or undefined, in places."""

    name = "cube"
    dim = 3
    projections = ((0, 1), (2, 0), (1, 2))

    def log_reward(self, x: torch.Tensor) -> torch.Tensor:
        inside = (x.abs() < 2).all(-1)
        return torch.where(inside, x[..., 0], -torch.inf).masked_fill(x[..., 1] > 4, torch.nan)


def ink(path: Path) -> float:
    """Share of the pixels that are not white."""
    return float((imread(path)[..., :3] < 0.99).any(-1).mean())


@pytest.mark.parametrize("name", target_names())
def test_samples_of_every_target(tmp_path: Path, name: str) -> None:
    target = CountedTarget(make_target(name))
    samples = target.sample(200, torch.Generator().manual_seed(0))
    assert samples is not None
    path = plot_samples(target, samples, tmp_path / "plots" / "samples.png")
    assert ink(path) > 0.2
    # Drawing is no sampling: it must not count as energy evaluations.
    assert target.calls == 0


def test_a_target_without_known_marginals_and_samples_outside(tmp_path: Path) -> None:
    samples = 4 * torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    one_panel = imread(plot_samples(make_target("gmm9"), samples[:, :2], tmp_path / "one.png"))
    three_panels = imread(plot_samples(Cube(), samples, tmp_path / "three.png"))
    assert three_panels.shape[1] == pytest.approx(3 * one_panel.shape[1], rel=0.01)


def test_the_density_is_evaluated_once_in_small_batches(tmp_path: Path) -> None:
    class Costly(Cube):
        def __init__(self) -> None:
            self.sizes: list[int] = []

        def log_reward(self, x: torch.Tensor) -> torch.Tensor:
            self.sizes.append(len(x))
            return super().log_reward(x)

    costly, cache = Costly(), DensityCache()
    target = CountedTarget(costly)
    for seed in range(2):
        samples = torch.randn(100, 3, generator=torch.Generator().manual_seed(seed))
        plot_samples(target, samples, tmp_path / f"{seed}.png", cache)
        assert sum(costly.sizes) == 3 * 100 * 100
    assert max(costly.sizes) <= 4096
    assert target.calls == 0


def test_one_dimension(tmp_path: Path) -> None:
    class Line(Target):
        name = "line"
        dim = 1

        def log_reward(self, x: torch.Tensor) -> torch.Tensor:
            return -x.square().sum(-1)

    samples = 3 * torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    assert ink(plot_samples(Line(), samples, tmp_path / "line.png")) > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["line.png"]


@pytest.mark.parametrize("shape", [(5, 3), (5,)])
def test_sample_shapes_are_checked(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="samples has shape"):
        plot_samples(make_target("gmm9"), torch.zeros(shape), tmp_path / "samples.png")


def test_the_contours_are_where_the_samples_are(tmp_path: Path) -> None:
    """Axes are not swapped: the funnel opens to the right, so that its left half is nearly bare."""
    target = make_target("funnel")
    image = imread(plot_samples(target, torch.zeros(1, 10), tmp_path / "funnel.png"))[..., :3]
    deep = image.min(-1) < 0.8
    height, width = deep.shape
    left = deep[height // 3 : 2 * height // 3, width // 4 : width // 2].mean()
    right = deep[height // 3 : 2 * height // 3, width // 2 : 3 * width // 4].mean()
    assert right > 2 * left


def write_metrics(path: Path, rows: list[dict[str, float | None]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_training_curves(tmp_path: Path) -> None:
    rows: list[dict[str, float | None]] = []
    for step in range(600):
        row: dict[str, float | None] = {"step": step, "wall_s": step / 10, "energy_evaluations": 300 * step}
        row |= {"train/loss": 100 / (step + 1), "train/log_z": -1.0, "actor/0/trajectories_per_s": 900.0}
        if step % 50 == 0:
            row |= {"eval/log_z_lower_bound": -5e3 if step == 0 else -1.0, "eval/delta_log_z": 1.0}
            row |= {"eval/ess": step / 600, "eval/w2": None, "eval/w2_floor": 1.14, "eval/mode_coverage": 3}
            row |= {"eval/flow_error": 600.0 - step, "learner/updates_per_s": 50.0, "actor/1/trajectories_per_s": 800.0}
        rows.append(row)
    metrics = write_metrics(tmp_path / "metrics.jsonl", rows, tail='{"step": 601, "train/lo')
    path = plot_training_curves(metrics, tmp_path / "plots" / "curves.png")
    assert path == tmp_path / "plots" / "curves.png"
    assert ink(path) > 0.01


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    loss = write_metrics(tmp_path / "loss.jsonl", [{"step": 1, "train/loss": -2.0}, {"step": 2, "train/loss": 3.0}])
    both = write_metrics(tmp_path / "both.jsonl", [{"step": 0, "train/loss": 1.0, "eval/ess": 0.1}])
    one, two = (plot_training_curves(path, path.with_suffix(".png")) for path in (loss, both))
    assert one is not None
    assert two is not None
    assert imread(two).shape[1] == 2 * imread(one).shape[1]


@pytest.mark.parametrize("content", ["", '{"step": 0, "stream/queue_depth": 1}\n', '{"step": 0, "eval/w2": null}\n'])
def test_nothing_to_draw_yet(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    assert plot_training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png") is None


def test_pyplot_stays_out() -> None:
    assert "matplotlib.pyplot" not in sys.modules
