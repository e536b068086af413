"""`--sync`: the whole system in one process, bitwise reproducible, and exact to resume."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from driftstream.actors.mala import Refinement
from driftstream.actors.refiner import ChainRefiner
from driftstream.envs.errors import TargetError
from driftstream.eval.monitor import Monitor
from driftstream.launch.cli import main
from driftstream.launch.config import RunConfig, as_dict, resolve, to_toml
from driftstream.launch.methods import load_method
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.sync_run import train_sync
from driftstream.learner.checkpoint import checkpoint_paths, load_checkpoint


def small(method: str, target: str = "gmm25", steps: int = 12, seed: int = 0) -> RunConfig:
    """A method's configuration at toy size; everything that shapes the data path is left as it is."""
    config = load_method(method).config
    mala = replace(config.refiner.mala, chains=20, mcmc_steps=20, burn_in=10)
    return resolve(
        replace(
            config,
            target=target,
            seed=seed,
            limits=replace(config.limits, steps=steps, minutes=None),
            grid=replace(config.grid, sampling_steps=5),
            policy=replace(config.policy, hidden=16, harmonics=8),
            refiner=replace(config.refiner, every=4, mala=mala),
            replay=replace(config.replay, minimum=20),
            learner=replace(config.learner, batch_size=20),
            eval=replace(config.eval, samples=50, w2_samples=50),
            monitor=replace(config.monitor, wandb="disabled"),
        )
    )


def train(
    config: RunConfig, run_dir: Path, stop_at: int | None = None, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Train in `run_dir`, or stop (as by Ctrl-C) once that many steps are done or `should_stop` says so."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "plots").mkdir(exist_ok=True)
    config = replace(config, learner=replace(config.learner, report_every_s=1e-6))
    seen = 0

    def show(metrics: dict[str, float]) -> None:
        nonlocal seen
        seen = int(metrics.get("step", seen))

    monitor = Monitor(run_dir, config.monitor, as_dict(config))
    try:
        return train_sync(
            config,
            run_dir,
            monitor,
            show,
            lambda text: None,
            lambda: should_stop() or (stop_at is not None and seen >= stop_at),
        )
    finally:
        monitor.close()


def digests(run_dir: Path) -> dict[str, str]:
    newest = checkpoint_paths(run_dir / "checkpoints")[-1]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(newest.iterdir())}


@pytest.mark.parametrize("method", ["default", "tb", "tb+expl+lp+ls", "vargrad+expl"])
def test_two_runs_of_one_seed_write_the_same_bytes(method: str, tmp_path: Path) -> None:
    first, second, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    train(small(method), first)
    train(small(method), second)
    train(small(method, seed=1), other)
    assert digests(first) == digests(second)
    assert digests(first)["policy.safetensors"] != digests(other)["policy.safetensors"]


@pytest.mark.parametrize("method", ["default", "tb", "tb+expl+lp+ls", "fl-subtb", "pis", "mle"])
def test_a_resumed_run_equals_the_uninterrupted_one(method: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(small(method), whole)
    assert train(small(method), broken, stop_at=7) is None
    assert checkpoint_paths(broken / "checkpoints")[-1].name == "step-7"
    train(small(method), broken)
    assert digests(whole) == digests(broken)


def test_a_stop_during_refinement_is_resumed_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(small("default"), whole)
    refine, cycles = ChainRefiner.refine, 0

    def refine_and_count(refiner: ChainRefiner, seeds: torch.Tensor) -> Refinement:
        nonlocal cycles
        cycles += 1
        return refine(refiner, seeds)

    monkeypatch.setattr(ChainRefiner, "refine", refine_and_count)
    assert train(small("default"), broken, should_stop=lambda: cycles == 2) is None
    monkeypatch.undo()
    train(small("default"), broken)
    assert digests(whole) == digests(broken)


# Of every kind one; tests/test_methods_contract.py has them all.
@pytest.mark.parametrize("method", ["default", "tb+expl+lp+ls", "vargrad+expl", "fl-subtb", "pis", "dds", "mle"])
def test_presets_leave_a_whole_run_behind(method: str, tmp_path: Path) -> None:
    results = train(small(method), tmp_path / "run")
    assert results is not None
    for name in ("eval/log_z_lower_bound", "eval/log_z_importance", "eval/w2", "eval/ess", "eval/mode_coverage"):
        assert results[name] == results[name], name
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all({"step", "wall_s", "energy_evaluations"} <= row.keys() for row in rows)
    final = rows[-1]
    assert (final["step"], final["energy_evaluations"]) == (12, results["eval/energy_evaluations"])
    assert final["wall_s"] > 0
    assert final["eval/w2"] == results["eval/w2"]
    assert (tmp_path / "run" / "results.json").exists()
    assert (tmp_path / "run" / "plots" / "samples.png").stat().st_size > 1000


def test_energy_calls_are_counted_everywhere(tmp_path: Path) -> None:
    results = train(small("tb+expl+lp+ls", steps=8), tmp_path / "run")
    assert results is not None
    # The first fresh batch comes before there is anything to replay; then one replayed for each fresh.
    fresh, replayed, batch, steps, chains, mcmc = 5, 3, 20, 5, 20, 20
    actor = fresh * batch * (1 + steps)  # log R at the end, the score on the way
    refiner = 2 * 2 * chains * (1 + mcmc)  # two cycles; log R and score at every proposal
    learner = replayed * batch * steps  # the score along replayed bridges
    assert results["eval/energy_evaluations"] == actor + refiner + learner


NAN_TARGET = """
import torch
from driftstream.envs.targets import Target

class HalfUndefined(Target):
    name = "half-undefined"
    dim = 2

    def log_reward(self, x):
        return torch.where(x[..., 0] > 1.0, torch.nan, -0.5 * x.square().sum(-1))

class Undefined(HalfUndefined):
    name = "undefined"

    def log_reward(self, x):
        return x.sum(-1) * torch.nan

class Broken(Target):
    name = "broken"
    dim = 2

    def log_reward(self, x):
        raise RuntimeError("the simulator is not licensed")
"""


def test_nan_rewards_are_counted_and_never_trained_on(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(NAN_TARGET)
    results = train(small("default", f"{source}:HalfUndefined"), tmp_path / "run")
    assert results is not None
    assert results["eval/nonfinite"] > 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("stream/rejected", 0) for row in rows) > 0
    assert all(row.get("train/skipped", 0) == 0 for row in rows)
    checkpoint = load_checkpoint(checkpoint_paths(tmp_path / "run" / "checkpoints")[-1])
    for name in ("terminals", "refined"):
        assert checkpoint.groups[name]["log_reward"].isfinite().all()
    assert all(value.isfinite().all() for value in checkpoint.groups["policy"].values())


@pytest.mark.parametrize("attribute", ["Undefined", "Broken"])
def test_a_target_that_is_of_no_use_ends_the_run(attribute: str, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(NAN_TARGET)
    cause = {"Undefined": "'undefined': every trajectory has an undefined log reward", "Broken": "not licensed"}
    with pytest.raises(TargetError, match=cause[attribute]):
        train(small("default", f"{source}:{attribute}"), tmp_path / "run")


def test_the_users_traceback_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mine.py"
    source.write_text(NAN_TARGET)
    flags = ["--sync", "--wandb", "disabled", "--out", str(tmp_path / "run")]
    assert main(["train", f"{source}:Broken", *flags]) == 1
    output = capsys.readouterr()
    assert f'File "{source}"' in output.out
    assert 'raise RuntimeError("the simulator is not licensed")' in output.out
    assert output.err.startswith(
        "driftstream: target 'broken' raised RuntimeError: the simulator is not licensed (at x = ["
    )


def test_checkpoints_that_are_all_damaged_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.write_config(to_toml(replace(small("tb"), sync=True)))
    (run.checkpoints / "step-3").mkdir()
    assert main(["train", "--sync", "--resume", str(run.root)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("driftstream: no usable checkpoint in ")


def test_killed_run_resumes_at_its_last_checkpoint_to_the_same_bytes(tmp_path: Path) -> None:
    """A real process and a real SIGKILL: sync, killed half-way and resumed, equals uninterrupted."""
    flags = [
        *("--sync", "--steps", "150", "--sampling-steps", "5", "--wandb", "disabled", "--policy.hidden", "16"),
        *("--learner.batch-size", "20", "--refiner.mala.chains", "20", "--refiner.every", "20"),
        *("--checkpoint.every-s", "0.05", "--eval.samples", "50", "--eval.w2-samples", "50", "--replay.minimum", "20"),
    ]
    command = [str(Path(sys.executable).with_name("driftstream")), "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command, "gmm25", *flags, "--out", str(whole)], check=True, env=environment, timeout=120)
    process = subprocess.Popen([*command, "gmm25", *flags, "--out", str(broken)], env=environment)
    deadline = time.monotonic() + 60
    while not checkpoint_paths(broken / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert checkpoint_paths(broken / "checkpoints")[-1].name != "step-150"
    subprocess.run([*command, "--resume", str(broken)], check=True, env=environment, timeout=120)
    assert digests(whole) == digests(broken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_loses_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """A real process and a real signal, long before the first checkpoint is due."""
    flags = [
        *("--sync", "--minutes", "10", "--sampling-steps", "5", "--wandb", "disabled", "--policy.hidden", "16"),
        *("--learner.batch-size", "20", "--refiners", "0", "--replay.minimum", "20", "--checkpoint.every-s", "1000"),
    ]
    command = [str(Path(sys.executable).with_name("driftstream")), "train", "gmm25", *flags]
    root, environment = tmp_path / "run", {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--out", str(root)], env=environment, stderr=subprocess.PIPE, text=True)
    metrics, deadline = root / "metrics.jsonl", time.monotonic() + 60
    try:
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not checkpoint_paths(root / "checkpoints")
        process.send_signal(number)
        assert process.communicate(timeout=20)[1].splitlines()[-1].endswith(f"driftstream train --resume {root}")
    finally:
        process.kill()
    assert process.returncode == 130
    (path,) = checkpoint_paths(root / "checkpoints")
    assert load_checkpoint(path).step == json.loads(metrics.read_text().splitlines()[-1])["step"]


def test_threads_of_torch_are_as_configured(tmp_path: Path) -> None:
    train(small("tb", steps=2), tmp_path / "run")
    assert torch.get_num_threads() == 1
