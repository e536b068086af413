"""A target as users write them goes through everything: float32 constants, any attributes, a gradient in numpy."""

from pathlib import Path

import pytest
import torch

from driftstream.actors.mala import MalaConfig, run_mala
from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.envs.grids import uniform_grid
from driftstream.envs.processes import BrownianProcess
from driftstream.envs.targets import CountedTarget, make_target
from driftstream.eval.coverage import mode_coverage
from driftstream.eval.evaluation import EvalConfig, evaluate_sampler
from driftstream.eval.plots import plot_samples
from driftstream.launch.cli import main

MINE = """
import torch
from driftstream.envs.targets import Target

class Regression(Target):
    dim = 3
    projections = [[0, 1], [1, 2]]

    def __init__(self):
        self.P = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 2.0]])
        self.means = {"of": "the data"}
        self.target = torch.zeros(7)

    def log_reward(self, x):
        return -0.5 * (x @ self.P).square().sum(-1)

    def score(self, x):
        P = self.P.numpy()
        return torch.from_numpy(-(x.numpy() @ P) @ P.T)
"""


def test_a_users_target_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    spec = f"{tmp_path}/mine.py:Regression"
    target = CountedTarget(make_target(spec))
    generator = torch.Generator().manual_seed(0)

    policy, process = DiffusionPolicy(3, PolicyConfig(langevin=True)), BrownianProcess(1.0)
    evaluation = evaluate_sampler(policy, process, target, uniform_grid(5), EvalConfig(samples=50), generator)
    assert evaluation.metrics["eval/nonfinite"] == 0
    assert target.calls == 50 * (5 + 1)
    assert mode_coverage(target, evaluation.samples) == {}

    assert plot_samples(target, evaluation.samples, tmp_path / "samples.png").stat().st_size > 0
    assert target.calls == 50 * (5 + 1)

    config = MalaConfig(chains=200, mcmc_steps=400, burn_in=200, initial_step_size=0.1)
    refined = run_mala(torch.randn(200, 3, generator=generator), target, config, generator=generator).terminal
    precision = make_target(spec).P  # type: ignore[attr-defined]
    torch.testing.assert_close(refined.T.cov(), torch.linalg.inv(precision @ precision.T), rtol=0.15, atol=0.1)

    assert main(["train", spec, "--dry-run"]) == 0
    assert "log_reward_and_score agrees" in capsys.readouterr().out
