"""Figures by kind of data: shares, means and novelty."""

import pytest
import torch

from driftstream.buffers.replay import ReplayConfig, TerminalReplay
from driftstream.learner.statistics import NOVELTY_ROWS, KindStatistics, novelty


def test_shares_rates_and_means_are_those_of_the_window() -> None:
    statistics = KindStatistics()
    for scale in (1.0, 3.0):
        statistics.add("explore", torch.full((4,), scale), torch.tensor([scale, -scale]))
    statistics.add("Mine", torch.zeros(2), None)
    figures = statistics.metrics()
    assert figures["kind/explore/share"] == pytest.approx(2 / 3)
    assert figures["kind/Mine/share"] == pytest.approx(1 / 3)
    assert figures["kind/explore/log_reward"] == figures["kind/explore/residual"] == 2.0
    assert figures["kind/explore/trajectories_per_s"] == pytest.approx(4 * figures["kind/Mine/trajectories_per_s"])
    assert "kind/Mine/residual" not in figures
    assert statistics.metrics() == {}


def test_novelty_tells_a_new_mode_from_more_of_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(500, 3, generator=generator)
    same = torch.randn(500, 3, generator=generator)
    assert novelty(same, known) < 0.15
    assert novelty(same + 20.0, known) == 1.0
    half = torch.cat([same[:250], same[250:] + 20.0])
    assert novelty(half, known) == pytest.approx(0.5, abs=0.1)


def test_novelty_is_against_recent_replay_and_measured_at_intervals() -> None:
    replay = TerminalReplay(
        2, ReplayConfig(capacity=2 * NOVELTY_ROWS, minimum=1), generator=torch.Generator().manual_seed(0)
    )
    statistics = KindStatistics()
    states = torch.randn(2 * NOVELTY_ROWS, 2, generator=torch.Generator().manual_seed(1))
    assert statistics.novelty("explore", states, replay) is None
    replay.add(states + 50.0, torch.zeros(len(states)))
    assert statistics.novelty("explore", states, replay) == 1.0
    assert statistics.novelty("explore", states, replay) is None
    assert statistics.novelty("Mine", states, replay) == 1.0
    statistics.add("Mine", torch.zeros(1), None, 1.0)
    assert statistics.metrics()["kind/Mine/novelty"] == 1.0


def test_recent_states_are_the_newest_ones_without_a_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    replay = TerminalReplay(1, ReplayConfig(capacity=10, minimum=1), generator=generator)
    replay.add(torch.arange(14.0).unsqueeze(1), torch.zeros(14))
    replay.add(torch.arange(14.0, 17.0).unsqueeze(1), torch.zeros(3))
    before = generator.get_state()
    assert replay.recent(3, among=3).flatten().tolist() == [16.0, 15.0, 14.0]
    assert replay.recent(5).flatten().tolist() == [16.0, 14.0, 12.0, 10.0, 8.0]
    assert torch.equal(generator.get_state(), before)
