"""The whole system as a user starts it: real processes, real sockets, real signals."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    assert config["process"]["diffusion_variance"] == 25.3
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


@pytest.mark.parametrize(("bound", "actors"), [(0, 1), (4, 3)])
def test_staleness_is_bounded_by_pacing(train: Train, bound: int, actors: int) -> None:
    flags = ["--stream.max-staleness", str(bound), "--actors", str(actors)]
    training = train("gmm25", *flags, "--steps", "300", "--out", "{root}")
    assert training.end() == 0, training.text()
    staleness = [row["stream/staleness_max"] for row in training.rows() if "stream/staleness_max" in row]
    assert staleness
    assert max(staleness) <= bound
    assert max(row.get("stream/rejected", 0) for row in training.rows()) == 0
