"""What the evaluator leaves in a run directory, whatever the checkpoints, figures and plots are like."""

import json
import math
from pathlib import Path

import pytest
import torch

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.envs.grids import GridConfig
from driftstream.envs.processes import BrownianProcess
from driftstream.envs.targets import CountedTarget, Target, make_target
from driftstream.eval.evaluation import EvalConfig, Evaluation
from driftstream.eval.evaluator import Evaluator, final_evaluation
from driftstream.learner.checkpoint import CheckpointState, checkpoint_paths, save_checkpoint

FEW = 10
"""Too few samples for an estimate of khat, which is then NaN."""


def make_evaluator(target: Target) -> Evaluator:
    config = EvalConfig(samples=FEW)
    return Evaluator(CountedTarget(target), BrownianProcess(5.0), GridConfig("uniform", 4), PolicyConfig(), config, 0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints and one row of metrics."""
    policy = DiffusionPolicy(2, PolicyConfig())
    for step in (10, 20):
        state = CheckpointState(step, {"ema": policy.state_dict()}, {"energy_evaluations": 300 * step})
        save_checkpoint(tmp_path / "checkpoints", state)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "train/loss": 1.0}) + "\n")
    return tmp_path


def test_the_flow_is_drawn_where_the_true_one_is_known(run_dir: Path) -> None:
    policy = PolicyConfig(hidden=16, harmonics=8, state_flow="plain")
    state = CheckpointState(30, {"ema": DiffusionPolicy(2, policy).state_dict()}, {"energy_evaluations": 0})
    save_checkpoint(run_dir / "checkpoints", state)
    config, grid = EvalConfig(samples=FEW), GridConfig("uniform", 4)
    target = CountedTarget(make_target("gmm9"))
    evaluator = Evaluator(target, BrownianProcess(5.0), grid, policy, config, 0)
    metrics, images = final_evaluation(evaluator, run_dir)
    assert metrics["eval/flow_error"] > 0
    assert images["plots/flow"] == str(run_dir / "plots" / "flow.png")
    assert (run_dir / "plots" / "flow.png").is_file()


def test_a_policy_is_evaluated_on_any_number_of_steps() -> None:
    evaluator = make_evaluator(make_target("gmm9"))
    first = evaluator.evaluate()
    assert evaluator.evaluate(4).metrics == first.metrics
    assert evaluator.evaluate(3).metrics != first.metrics
    assert evaluator.evaluate(1).samples.shape == (FEW, 2)
    assert evaluator.evaluate().metrics == first.metrics


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def test_results_are_json_even_where_a_figure_is_undefined(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics, images = final_evaluation(make_evaluator(make_target("gmm9")), run_dir)
    assert math.isnan(metrics["eval/khat"])
    results = json.loads((run_dir / "results.json").read_text(), parse_constant=refuse)
    assert results.pop("eval/khat") is None
    assert results == {name: value for name, value in metrics.items() if name != "eval/khat"}
    assert (results["step"], results["energy_evaluations"]) == (20, 6000)
    assert {name: Path(path).is_file() for name, path in images.items()} == {
        "plots/samples": True,
        "plots/training": True,
    }
    assert not caplog.records


def test_a_damaged_checkpoint_is_passed_over_by_name(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run_dir / "checkpoints" / "step-20" / "ema.safetensors").write_bytes(b"torn")
    assert make_evaluator(make_target("gmm9")).load_checkpoint(run_dir)["step"] == 10
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "step-20" in record.message


def scored(log_z_lower_bound: float) -> Evaluation:
    return Evaluation({"eval/log_z_lower_bound": log_z_lower_bound}, torch.empty(0, 2), torch.empty(0))


def test_the_best_weights_stay_whatever_comes_after_them(run_dir: Path) -> None:
    evaluator, best = make_evaluator(make_target("gmm9")), run_dir / "checkpoints" / "best"
    for step, score in ((1, -3.0), (2, -1.0), (3, math.nan), (4, -2.0)):
        torch.nn.init.constant_(next(evaluator.policy.parameters()), step)
        evaluator.keep_best(run_dir, scored(score), {"step": step, "wall_s": 0.5 * step, "energy_evaluations": step})
    assert [path.name for path in checkpoint_paths(best)] == ["step-2"]
    again = make_evaluator(make_target("gmm9"))
    again.keep_best(run_dir, scored(-1.5), {"step": 7, "wall_s": 9.0, "energy_evaluations": 9})
    assert again.load_checkpoint(run_dir, "best") == {"step": 2, "wall_s": 1.0, "energy_evaluations": 2}
    assert bool((next(again.policy.parameters()) == 2).all())
    again.keep_best(run_dir, scored(-0.5), {"step": 1, "wall_s": 9.0, "energy_evaluations": 9})
    assert [path.name for path in checkpoint_paths(best)] == ["step-1"], "a resumed run may be better earlier"


def test_the_last_weights_may_be_the_best(run_dir: Path) -> None:
    evaluator = make_evaluator(make_target("gmm9"))
    final_evaluation(evaluator, run_dir)
    assert evaluator.load_checkpoint(run_dir, "best")["step"] == 20


def test_a_best_checkpoint_that_cannot_be_written_is_a_warning(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run_dir / "checkpoints" / "best").touch()
    position = {"step": 1, "wall_s": 1.0, "energy_evaluations": 1}
    make_evaluator(make_target("gmm9")).keep_best(run_dir, scored(0.0), position)
    assert "the best checkpoint is not kept" in caplog.text


def test_a_plot_that_fails_is_one_warning(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Misplotted(Target):
        name, dim = "misplotted", 2
        projections = ((0, 7),)

        def log_reward(self, x: torch.Tensor) -> torch.Tensor:
            return -x.square().sum(-1)

    metrics, images = final_evaluation(make_evaluator(Misplotted()), run_dir)
    assert "eval/log_z_lower_bound" in metrics
    assert set(images) == {"plots/training"}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "plots/samples is not drawn (IndexError" in record.message
