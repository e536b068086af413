"""Replay: first in first out, statistics, and draws that survive a checkpoint bitwise."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from driftstream.buffers.replay import ReplayConfig, TerminalReplay
from driftstream.buffers.samplers import rank_probabilities
from driftstream.envs.errors import ConfigError

DIM = 3


def states(first: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States that carry their number in every coordinate, with log rewards in another order."""
    number = torch.arange(first, first + n, dtype=torch.float32)
    return number.unsqueeze(-1).repeat(1, DIM), torch.sin(number)


def make_replay(seed: int = 0, **options: object) -> TerminalReplay:
    config = replace(ReplayConfig(capacity=1_000), **options)  # type: ignore[arg-type]
    return TerminalReplay(DIM, config, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prioritization", ["rank", "uniform"])
def test_overwrites_the_oldest_and_keeps_rows_together(prioritization: str) -> None:
    replay = make_replay(capacity=300, prioritization=prioritization)
    for first in range(0, 1_050, 70):
        replay.add(*states(first, 70))
    assert len(replay) == 300
    terminal, log_reward = replay.sample(20_000)
    assert terminal.shape == (20_000, DIM)
    assert set(terminal[:, 0].tolist()) == set(range(750, 1_050))
    torch.testing.assert_close(log_reward, torch.sin(terminal[:, 0]))
    assert replay.inserted == 1_050
    assert replay.samples_per_insert == pytest.approx(20_000 / 1_050)


def test_a_batch_beyond_the_capacity_leaves_its_newest_rows() -> None:
    replay = make_replay(capacity=10, minimum=10)
    assert replay.add(*states(0, 25)) == 25
    assert set(replay.sample(500)[0][:, 0].tolist()) == set(range(15, 25))


def test_rank_prefers_high_rewards_and_uniform_does_not() -> None:
    means = {}
    for prioritization in ("rank", "uniform"):
        replay = make_replay(prioritization=prioritization)
        replay.add(*states(0, 1_000))
        means[prioritization] = float(replay.sample(20_000)[1].mean())
    assert means["rank"] > 0.6
    assert abs(means["uniform"]) < 0.03


def test_rows_that_are_not_finite_stay_out() -> None:
    terminal, log_reward = states(0, 6)
    terminal[1, 2] = torch.inf
    log_reward[3], log_reward[4] = torch.nan, -torch.inf
    replay = make_replay()
    assert replay.add(terminal, log_reward) == 3
    assert set(replay.sample(100)[0][:, 0].tolist()) == {0.0, 2.0, 5.0}
    assert replay.add(torch.full((2, DIM), torch.nan), torch.zeros(2)) == 0
    assert len(replay) == 3


def test_stored_rows_are_independent_of_the_callers_and_carry_no_graph() -> None:
    replay = make_replay(prioritization="uniform")
    terminal, log_reward = states(0, 4)
    terminal.requires_grad_()
    replay.add(terminal.double(), log_reward.double())
    with torch.no_grad():
        terminal.zero_()
    drawn, _ = replay.sample(50)
    assert drawn.dtype == torch.float32
    assert not drawn.requires_grad
    assert drawn.max() == 3
    drawn.zero_()
    assert replay.sample(50)[0].max() == 3


def test_shapes_are_checked() -> None:
    replay = make_replay()
    with pytest.raises(ValueError, match=r"expected \[N,3\]"):
        replay.add(torch.zeros(4, DIM + 1), torch.zeros(4))
    with pytest.raises(ValueError, match=r"log_reward \(5,\)"):
        replay.add(torch.zeros(4, DIM), torch.zeros(5))


def test_sampling_an_empty_replay_raises() -> None:
    with pytest.raises(RuntimeError, match="empty"):
        make_replay().sample(1)


@pytest.mark.parametrize("prioritization", ["rank", "uniform"])
@pytest.mark.parametrize("inserts", [0, 1, 13, 47])
def test_draws_survive_a_checkpoint_bitwise(tmp_path: Path, prioritization: str, inserts: int) -> None:
    """Also with entries not yet merged into the order, and after the buffer has wrapped round."""
    replay = make_replay(prioritization=prioritization)
    for i in range(inserts):
        replay.add(*states(40 * i, 40 if i % 5 else 3))
        replay.sample(7)
    save_file(replay.state_dict(), tmp_path / "replay.safetensors")
    restored = make_replay(seed=99, prioritization=prioritization)
    restored.add(*states(5_000, 77))
    restored.load_state_dict(load_file(tmp_path / "replay.safetensors"))
    assert (len(restored), restored.samples_per_insert) == (len(replay), replay.samples_per_insert)
    for i in range(60):
        for one in (replay, restored):
            one.add(*states(10_000 + 40 * i, 40 if i % 3 else 2))
        for a, b in zip(replay.sample(30), restored.sample(30), strict=True):
            assert torch.equal(a, b)
    assert all(
        torch.equal(a, b) for a, b in zip(replay.state_dict().values(), restored.state_dict().values(), strict=True)
    )


def test_taking_the_state_does_not_change_the_draws() -> None:
    watched, plain = make_replay(), make_replay()
    for i in range(30):
        for replay in (watched, plain):
            replay.add(*states(50 * i, 50))
        watched.state_dict()
        assert torch.equal(watched.sample(20)[0], plain.sample(20)[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity", 0),
        ("prioritization", "reward"),
        ("rank_k", 0.0),
        ("ratio", -1.0),
        ("source", "actors"),
        ("minimum", 0),
        ("minimum", 2_000_000),
    ],
)
def test_bad_configuration_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^replay.{field} = "):
        replace(ReplayConfig(), **{field: value})  # type: ignore[arg-type]


def test_replay_by_loss_draws_what_was_learned_worst() -> None:
    replay = TerminalReplay(1, ReplayConfig(prioritization="loss"), generator=torch.Generator().manual_seed(0))
    states = torch.arange(1000.0).unsqueeze(1)
    replay.add(states, torch.zeros(1000), states.squeeze(1))
    terminal, _ = replay.sample(2000)
    ranks = rank_probabilities(torch.arange(1000.0), 0.01).float()
    assert float(terminal.mean()) == pytest.approx(float(ranks @ torch.arange(1000.0)), rel=0.03)
    # What was drawn is learned now, the rest comes first.
    replay.update_priority(-torch.ones(2000))
    again, _ = replay.sample(2000)
    assert not set(again.flatten().tolist()[:50]) >= set(terminal.flatten().tolist()[:50])
    assert len(replay) == 1000


def test_states_of_unknown_loss_come_first_and_survive_a_checkpoint() -> None:
    config = ReplayConfig(prioritization="loss", rank_k=1e-4)
    replay = TerminalReplay(1, config, generator=torch.Generator().manual_seed(0))
    replay.add(torch.zeros(500, 1), torch.zeros(500), torch.full((500,), 7.0))
    replay.add(torch.ones(3, 1), torch.zeros(3))
    copy = TerminalReplay(1, config, generator=torch.Generator())
    copy.load_state_dict(replay.state_dict())
    first, second = replay.sample(200)[0], copy.sample(200)[0]
    assert torch.equal(first, second)
    assert float(first.mean()) > 0.5


def test_priorities_are_of_the_last_draw() -> None:
    replay = TerminalReplay(1, ReplayConfig(prioritization="loss"))
    replay.add(torch.zeros(5, 1), torch.zeros(5))
    with pytest.raises(RuntimeError, match="last draw"):
        replay.update_priority(torch.ones(3))
    replay.sample(3)
    replay.update_priority(torch.ones(3))
    with pytest.raises(RuntimeError, match="last draw"):
        replay.update_priority(torch.ones(3))
