"""The loop ends at its limits whatever comes or does not come, and counts what was spent."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path

import pytest
import torch
from torch import Tensor

from driftstream.actors.actor import Actor, as_message
from driftstream.actors.policy import PolicyConfig
from driftstream.actors.refiner import RefinerConfig
from driftstream.buffers.channels import StreamClient, StreamConfig, StreamServer
from driftstream.buffers.replay import ReplayConfig
from driftstream.launch.config import RunConfig, resolve
from driftstream.launch.methods import load_method
from driftstream.launch.roles import build_learner, build_local_actors, build_refiner
from driftstream.learner.checkpoint import CheckpointConfig, Checkpointer, load_latest
from driftstream.learner.learner import Learner, LearnerConfig
from driftstream.learner.limits import Budget, LimitsConfig
from driftstream.learner.loop import TrainingLoop
from driftstream.learner.publisher import Publisher
from driftstream.learner.sources import DataSource, FreshBatch, LocalSource, StreamSource

pytestmark = pytest.mark.timeout(30)
BATCH, STEPS = 4, 3
UNDEFINED = """
import torch
from driftstream.envs.targets import Target

class Undefined(Target):
    name, dim = "undefined", 2

    def log_reward(self, x):
        return torch.full_like(x[..., 0], torch.nan)
"""


def make(target: str = "gmm25", **changes: object) -> tuple[Learner, Actor]:
    config = RunConfig(target=target, learner=LearnerConfig(batch_size=BATCH, report_every_s=1e-6))
    config = replace(config, policy=PolicyConfig(hidden=8, harmonics=4), **changes)
    config = resolve(replace(config, grid=replace(config.grid, sampling_steps=STEPS)))
    learner = build_learner(config, seed=1)
    (actor,) = build_local_actors(config, learner, [2])
    return learner, actor


def run(
    learner: Learner,
    source: DataSource,
    limits: LimitsConfig,
    run_dir: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[str, list[dict]]:
    """Why the loop ended, and the rows that it reported."""
    rows: list[dict[str, float]] = []

    def report(metrics: dict[str, float], step: int, wall_s: float, energy_evaluations: int, progress: float) -> None:
        rows.append({**metrics, "step": step, "energy_evaluations": energy_evaluations})

    checkpointer = Checkpointer(run_dir, CheckpointConfig())
    loop = TrainingLoop(learner, source, Budget(limits), checkpointer, report, should_stop, refine_every=1)
    return loop.run(), rows


def test_a_target_that_is_never_defined_uses_up_its_budget_visibly(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(UNDEFINED)
    learner, actor = make(f"{tmp_path}/mine.py:Undefined")
    limits = LimitsConfig(energy_budget=10 * BATCH)
    reason, rows = run(learner, LocalSource([actor], []), limits, tmp_path / "run")
    assert reason == "energy_budget"
    assert (learner.step, learner.energy_evaluations) == (0, 10 * BATCH)
    assert rows[-1]["stream/rejected"] == 10 * BATCH
    assert rows[-1]["energy_evaluations"] == 10 * BATCH


def test_minutes_pass_while_nothing_comes(tmp_path: Path) -> None:
    class Silent(LocalSource):
        def fresh(self, timeout_s: float, step: int, progress: float) -> FreshBatch | None:
            time.sleep(0.01)
            return None

    learner, _ = make()
    reason, rows = run(learner, Silent([], []), LimitsConfig(minutes=0.002), tmp_path)
    assert (reason, learner.step) == ("minutes", 0)
    assert all(row["learner/updates_per_s"] == 0 for row in rows if "learner/updates_per_s" in row)


@pytest.mark.parametrize("source", ["refined", "terminals"])
def test_seeds_are_no_samples_of_the_replay_that_is_trained_on(source: str) -> None:
    replay = ReplayConfig(source=source, prioritization="uniform", minimum=1)
    learner, actor = make(replay=replay, refiner=RefinerConfig(count=int(source == "refined")))
    assert learner.terminals.config.prioritization == ("rank" if source == "refined" else "uniform")
    assert learner.draw_seeds(3) is None
    learner.learn_fresh(actor.generate(0.0), 0.0)
    seeds = learner.draw_seeds(100)
    assert seeds is not None
    assert seeds[0].shape == (100, 2)
    assert learner.replay.samples_per_insert == 0


# What senders may send.

Stream = tuple[StreamSource, Callable[..., None], StreamServer]


@contextmanager
def stream(learner: Learner, tmp_path: Path, produces: str = "trajectories", credits: int = 1) -> Iterator[Stream]:
    """A source fed by one real sender: (source, send, server)."""
    endpoints = [f"ipc://{tmp_path}/{name}" for name in ("stream", "weights", "ema")]
    publisher = Publisher(learner, Budget(LimitsConfig()), *endpoints[1:])
    config = StreamConfig(credits=credits)
    server = StreamServer(endpoints[0], config, max_outstanding=credits)
    client = StreamClient(endpoints[0], "actor-0", 0, config, produces=produces)  # type: ignore[arg-type]

    def send(tensors: dict[str, Tensor], **counters: float) -> None:
        while client.wait_for_credit(1.0) is None:
            pass
        client.send(produces, tensors, 0, counters)  # type: ignore[arg-type]

    publisher.publish()
    try:
        yield StreamSource(server, publisher, learner.policy, "window", {}, learner.draw_replayed), send, server
    finally:
        client.close()
        server.close()
        publisher.close()


def received(source: StreamSource, server: StreamServer, batches: int) -> FreshBatch | None:
    """The outcome for the last of so many batches, once all have come."""
    while server.counters()["received_batches"] < batches:
        time.sleep(0.01)
    return source.fresh(1.0, 0, 0.0)


def good(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors = {
        "states": torch.randn(BATCH, STEPS + 1, 2),
        "times": torch.linspace(0, 1, STEPS + 1),
        "log_reward": torch.randn(BATCH),
    }
    return {name: value for name, value in {**tensors, **changes}.items() if value is not None}


def test_what_fits_is_taken_in_the_learners_dtype(tmp_path: Path) -> None:
    learner, _ = make()
    with stream(learner, tmp_path) as (source, send, server):
        send({name: value.double() for name, value in good().items()}, energy_evaluations=7, rejected=2)
        batch = received(source, server, 1)
        assert batch is not None
        assert {value.dtype for value in batch.trajectories.values()} == {torch.float32}
        learner.learn_fresh(batch.trajectories, 0.0)
        source.consumed(batch)
        assert (source.spent(), source.metrics()["stream/rejected"]) == (7, 2)


@pytest.mark.parametrize(
    ("tensors", "counters"),
    [
        (good(states=torch.randn(BATCH, STEPS + 1, 3)), {}),
        (good(scores=torch.randn(BATCH, STEPS, 2)), {}),
        (good(times=torch.linspace(1, 2, STEPS + 1)), {}),
        (good(log_reward=torch.full((BATCH,), 1e300, dtype=torch.float64)), {}),
        (good(), {"energy_evaluations": -1}),
        (good(), {"energy_evaluations": 0.5}),
        (good(), {"rejected": 2**62}),
    ],
)
def test_what_does_not_fit_is_rejected_and_released(
    tensors: dict[str, Tensor], counters: dict[str, float], tmp_path: Path
) -> None:
    learner, _ = make()
    with stream(learner, tmp_path) as (source, send, server):
        send(tensors, **counters)
        assert received(source, server, 1) is None
        assert (source.spent(), source.metrics()["stream/rejected"]) == (0, BATCH)
        send(good())  # the only credit is back
        assert received(source, server, 2) is not None


def test_a_langevin_policy_needs_scores(tmp_path: Path) -> None:
    learner, _ = make()
    learner.policy.langevin = True
    with stream(learner, tmp_path) as (source, send, server):
        send(good())
        assert received(source, server, 1) is None
        send(good(scores=torch.randn(BATCH, STEPS, 2)))
        assert received(source, server, 2) is not None


def test_a_batch_without_rows_brings_its_counters(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(UNDEFINED)
    learner, actor = make(f"{tmp_path}/mine.py:Undefined")
    with stream(learner, tmp_path) as (source, send, server):
        send(as_message(actor.generate(0.0)), energy_evaluations=BATCH, rejected=BATCH)
        assert received(source, server, 1) is None
        assert (source.spent(), source.metrics()["stream/rejected"]) == (BATCH, BATCH)


def test_refined_states_of_another_dimension_are_rejected(tmp_path: Path) -> None:
    learner, _ = make()
    with stream(learner, tmp_path, "terminals", credits=2) as (source, send, server):
        for dim in (3, 2):
            send({"terminal": torch.randn(5, dim), "log_reward": torch.randn(5)}, energy_evaluations=11)
        while server.counters()["terminals_depth"] < 2:
            time.sleep(0.01)
        ((terminal, _),) = source.refined()
        assert terminal.shape == (5, 2)
        assert (source.spent(), source.metrics()["stream/rejected"]) == (22, 5)


def test_what_is_queued_at_the_end_is_counted_as_spent(tmp_path: Path) -> None:
    learner, _ = make()
    with stream(learner, tmp_path, credits=3) as (source, send, server):
        for _ in range(3):
            send(good(), energy_evaluations=10)
        while server.counters()["received_batches"] < 3:
            time.sleep(0.01)
        reason, rows = run(learner, source, LimitsConfig(steps=1), tmp_path / "run")
        assert reason == "steps"
        assert learner.energy_evaluations == rows[-1]["energy_evaluations"] == 30


INFINITE = """
import torch
from driftstream.envs.targets import Target

class HalfSpace(Target):
    name, dim = "half-space", 2

    def log_reward(self, x):
        return torch.where(x[..., 0] > 0.0, -0.5 * x.square().sum(-1), -torch.inf)

class Nowhere(HalfSpace):
    def log_reward(self, x):
        return x[..., 0] - torch.inf
"""


def make_pathwise(target: str) -> Learner:
    config = replace(load_method("pis").config, target=target, policy=PolicyConfig(hidden=8, harmonics=4))
    config = replace(config, grid=replace(config.grid, sampling_steps=STEPS))
    return build_learner(resolve(replace(config, learner=LearnerConfig(batch_size=64, report_every_s=1e-6))), seed=1)


def test_pathwise_training_leaves_infinite_rewards_out(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(INFINITE)
    learner = make_pathwise(f"{source}:HalfSpace")
    reason, rows = run(learner, LocalSource([], []), LimitsConfig(steps=3), tmp_path / "run")
    assert reason == "steps"
    assert all(isfinite(row["train/loss"]) and isfinite(row["train/log_z"]) for row in rows if "train/loss" in row)
    assert 3 * 10 < rows[-1]["stream/rejected"] < 3 * 54


def test_a_pathwise_step_without_a_finite_reward_changes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(INFINITE)
    learner = make_pathwise(f"{source}:Nowhere")
    before = {name: value.clone() for name, value in learner.policy_tensors().items()}
    learner.learn_pathwise(0.0)
    assert (learner.skipped, learner.rejected, learner.log_z.item()) == (1, 64, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in learner.policy_tensors().items())


def test_what_is_trained_on_replay_alone_gets_as_many_cycles_as_it_needs(tmp_path: Path) -> None:
    """One cycle yields less than replay's minimum, and no step comes before the next."""
    config = replace(load_method("mle").config, target="gmm25", policy=PolicyConfig(hidden=8, harmonics=4))
    mala = replace(config.refiner.mala, chains=4, mcmc_steps=20, burn_in=10)
    config = replace(
        config,
        grid=replace(config.grid, sampling_steps=STEPS),
        learner=LearnerConfig(batch_size=BATCH, report_every_s=1e-6),
        refiner=replace(config.refiner, mala=mala, every=100),
        replay=replace(config.replay, minimum=100),
    )
    config = resolve(config)
    learner = build_learner(config, seed=1)
    source = LocalSource(build_local_actors(config, learner, [2]), [build_refiner(config, 3)])
    assert run(learner, source, LimitsConfig(steps=10), tmp_path)[0] == "steps"


def test_a_figure_of_one_step_outlasts_the_steps_after_it(tmp_path: Path) -> None:
    learner, actor = make()
    learner.config = replace(learner.config, report_every_s=1e6, grad_variance_every=5, grad_variance_parts=2)
    _, rows = run(learner, LocalSource([actor], []), LimitsConfig(steps=9), tmp_path)
    assert [row["step"] for row in rows] == [1, 9]
    assert rows[1]["train/grad_variance"] > 0


@pytest.mark.parametrize("stopped", [False, True])
def test_the_loop_ends_when_its_last_state_is_on_a_slow_disk(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def slowly(descriptor: int) -> None:
        time.sleep(0.2)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slowly)
    learner, actor = make()
    stop = (lambda: learner.step >= 3) if stopped else (lambda: False)
    reason, rows = run(learner, LocalSource([actor], []), LimitsConfig(steps=6), tmp_path, stop)
    assert reason == ("stopped" if stopped else "steps")
    found, damaged = load_latest(tmp_path)
    assert not damaged
    assert found.step == rows[-1]["step"] == (3 if stopped else 6)
