"""Every preset trains: the loss falls on an easy and on a badly scaled target, and the final figures are finite."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from driftstream.eval.monitor import Monitor
from driftstream.launch.config import RunConfig, as_dict, resolve
from driftstream.launch.methods import load_method, method_names
from driftstream.launch.sync_run import train_sync

STEPS, SAMPLING_STEPS = 300, 6
WINDOW = 50


def shrink(method: str, target: str) -> RunConfig:
    """A method's configuration at a size and a rate that train in seconds; what makes it that method is left."""
    config = load_method(method).config
    mala = replace(config.refiner.mala, chains=32, mcmc_steps=30, burn_in=15)
    # The pathwise gradient of a Langevin policy has the target's curvature in it, and bears no longer steps.
    learning_rate = 5e-3 if config.objective.pathwise else 1e-2
    return resolve(
        replace(
            config,
            target=target,
            limits=replace(config.limits, steps=STEPS, minutes=None),
            grid=replace(config.grid, sampling_steps=SAMPLING_STEPS),
            policy=replace(config.policy, hidden=32, harmonics=8),
            optim=replace(config.optim, learning_rate=learning_rate),
            refiner=replace(config.refiner, mala=mala),
            replay=replace(config.replay, minimum=32),
            learner=replace(config.learner, batch_size=64, report_every_s=1e-6),
            eval=replace(config.eval, samples=200, w2_samples=100, every_s=1e6),
            monitor=replace(config.monitor, wandb="disabled"),
        )
    )


@pytest.mark.parametrize("target", ["gmm25", "funnel"])
@pytest.mark.parametrize("method", method_names())
def test_every_preset_trains_with_falling_loss(
    method: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Plots take half of the time, and have tests of their own.
    monkeypatch.setattr("driftstream.eval.evaluator._image", lambda name, draw: {})
    config = shrink(method, target)
    (tmp_path / "plots").mkdir()
    monitor = Monitor(tmp_path, config.monitor, as_dict(config))
    try:
        results = train_sync(config, tmp_path, monitor, lambda metrics: None, lambda text: None, lambda: False)
    finally:
        monitor.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == STEPS
    assert all(row.get("train/skipped", 0) == 0 for row in rows)
    # Medians, as single batches of the funnel outweigh all others in a mean.
    early, late = statistics.median(losses[:WINDOW]), statistics.median(losses[-WINDOW:])
    assert late < 0.99 * early, (early, late)
    assert results is not None
    figures = {name: value for name, value in results.items() if name.startswith("eval/")}
    assert {"eval/log_z_lower_bound", "eval/log_z_importance", "eval/ess", "eval/w2"} <= figures.keys()
    assert all(math.isfinite(value) for value in figures.values())
