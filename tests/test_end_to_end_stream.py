"""The whole system as a user starts it: real processes, real sockets, real signals."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from driftstream.learner.checkpoint import checkpoint_paths

pytestmark = pytest.mark.timeout(240)
COMMAND = str(Path(sys.executable).with_name("driftstream"))
Train = Callable[..., Any]
WandbRun = tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], Any]


def test_a_run_ends_with_results_plots_and_the_same_figures_everywhere(
    train: Train, tmp_path: Path, read_wandb: Callable[[Path], WandbRun]
) -> None:
    root = tmp_path / "run"
    training = train("gmm25", "--minutes", "0.2", "--out", str(root), root=root, wandb="offline")
    assert training.end() == 0, training.text()
    results = json.loads((root / "results.json").read_text())
    rows = training.rows()
    names = {name for row in rows for name in row}
    expected = {
        *("eval/log_z_lower_bound", "eval/log_z_importance", "eval/log_z_upper_bound", "eval/delta_log_z"),
        *("eval/delta_log_z_rw", "eval/elbo_eubo_gap", "eval/ess", "eval/khat", "eval/w2", "eval/w2_floor"),
        *("eval/mode_coverage", "eval/energy_evaluations", "train/loss", "train/log_z", "train/grad_norm"),
        *("train/learning_rate", "stream/staleness_mean", "stream/staleness_max", "stream/queue_depth"),
        *("stream/rejected", "stream/duplicates", "learner/updates_per_s", "learner/wait_fraction"),
        *("actor/0/trajectories_per_s", "refiner/0/acceptance_rate", "refiner/0/step_size"),
        *("replay/size", "replay/samples_per_insert"),
    }
    assert expected <= names, expected - names
    assert all({"step", "wall_s", "energy_evaluations"} <= row.keys() for row in rows)
    final = [row for row in rows if "eval/w2" in row][-1]
    assert all(final[name] == results[name] for name in final if name.startswith("eval/"))

    history, config, summary, _ = read_wandb(root)
    wandb_rows = [row for row in history if "train/loss" in row]
    jsonl_rows = [row for row in rows if "train/loss" in row]
    assert [row["train/loss"] for row in wandb_rows] == pytest.approx([row["train/loss"] for row in jsonl_rows])
    assert expected <= {name for row in history for name in row}
    assert summary["eval/w2"] == pytest.approx(results["eval/w2"])
    assert config["target"] == "gmm25"
    assert config["process"]["diffusion_variance"] == 5.0
    images = [path.name for path in root.glob("wandb/offline-run-*/files/media/images/plots/*.png")]
    assert any("samples" in name for name in images)
    assert any("training" in name for name in images)
    for part in ("Δlog Z", "samples.png", "driftstream sample"):
        assert part in training.text()

    draws = tmp_path / "draws.npz"
    command = [COMMAND, "sample", str(root), "-n", "64", "-o", str(draws)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    assert draws.exists()
    command = [COMMAND, "eval", str(root), "--samples", "100", "--json"]
    output = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout
    assert json.loads(output)["eval/log_z_lower_bound"] == pytest.approx(results["eval/log_z_lower_bound"])


def test_killed_roles_are_reported_and_replaced_and_the_run_ends_as_usual(train: Train) -> None:
    training = train("gmm25", "--minutes", "0.4", "--out", "{root}")
    training.wait_for(lambda: training.step() > 0)
    for name in ("actor-0", "refiner-0", "evaluator"):
        pid = training.processes()[name]
        os.kill(pid, signal.SIGKILL)
        training.wait_for(lambda name=name: f"{name} ended: killed by SIGKILL" in training.text(), 5)
        training.wait_for(lambda name=name, pid=pid: training.processes().get(name, pid) != pid, 10)
    assert training.end() == 0, training.text()
    assert (training.root / "results.json").exists()


def test_a_killed_learner_ends_the_run_which_resumes_at_its_last_checkpoint(train: Train) -> None:
    training = train("gmm25", "--minutes", "5", "--out", "{root}")
    training.wait_for(lambda: checkpoint_paths(training.root / "checkpoints"))
    os.kill(training.processes()["learner"], signal.SIGKILL)
    assert training.end(20) == 1
    assert training.text().splitlines()[-1].endswith(f"driftstream train --resume {training.root}")
    step = int(checkpoint_paths(training.root / "checkpoints")[-1].name.removeprefix("step-"))
    resumed = train("--resume", str(training.root), "--steps", str(step + 50), root=training.root)
    assert resumed.end() == 0, resumed.text()
    assert f"resumed at step {step}" in resumed.text()
    assert checkpoint_paths(training.root / "checkpoints")[-1].name == f"step-{step + 50}"


def test_interrupt_drains_and_checkpoints(train: Train) -> None:
    training = train("gmm25", "--minutes", "5", "--checkpoint.every-s", "1000", "--out", "{root}")
    training.wait_for(lambda: training.step() > 0)
    training.process.send_signal(signal.SIGINT)
    assert training.end(12) == 130
    (newest,) = checkpoint_paths(training.root / "checkpoints")
    assert int(newest.name.removeprefix("step-")) > 0


BROKEN = """
import time
import torch
from driftstream.envs.targets import Target

class Undefined(Target):
    name = "undefined"
    dim = 2

    def log_reward(self, x):
        return torch.where(x[..., 0] > 1.0, torch.nan, -0.5 * x.square().sum(-1))

class NeverDefined(Undefined):
    name = "never-defined"

    def log_reward(self, x):
        return torch.full_like(x[..., 0], torch.nan)

class Broken(Target):
    name = "broken"
    dim = 2
    calls = 0

    def log_reward(self, x):
        Broken.calls += 1
        if Broken.calls > 20:
            raise RuntimeError("the simulator is not licensed")
        return -0.5 * x.square().sum(-1)
"""


def test_undefined_rewards_are_counted_and_the_run_goes_on(train: Train, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    training = train(f"{tmp_path}/mine.py:Undefined", "--steps", "100", "--out", "{root}")
    assert training.end() == 0, training.text()
    assert max(row.get("stream/rejected", 0) for row in training.rows()) > 0


def test_a_target_that_is_never_defined_ends_the_run_by_name(train: Train, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    training = train(f"{tmp_path}/mine.py:NeverDefined", "--minutes", "5", "--out", "{root}")
    assert training.end() == 1
    last = training.text().splitlines()[-1]
    assert "target 'never-defined': every trajectory has an undefined log reward" in last


def test_a_target_that_raises_ends_the_run_by_name(train: Train, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    training = train(f"{tmp_path}/mine.py:Broken", "--minutes", "5", "--out", "{root}")
    training.wait_for(lambda: training.processes())
    assert training.end(30) == 1
    last = training.text().splitlines()[-1]
    assert "target 'broken' raised RuntimeError: the simulator is not licensed" in last
    assert "in log_reward" in training.text()


@pytest.mark.parametrize(("bound", "actors"), [(0, 1), (4, 3)])
def test_staleness_is_bounded_by_pacing(train: Train, bound: int, actors: int) -> None:
    flags = ["--stream.max-staleness", str(bound), "--actors", str(actors)]
    training = train("gmm25", *flags, "--steps", "300", "--out", "{root}")
    assert training.end() == 0, training.text()
    staleness = [row["stream/staleness_max"] for row in training.rows() if "stream/staleness_max" in row]
    assert staleness
    assert max(staleness) <= bound
    assert max(row.get("stream/rejected", 0) for row in training.rows()) == 0
