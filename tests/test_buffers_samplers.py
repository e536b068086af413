"""The rank draw against exact probabilities, and the sampler's order against a full sort."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

from driftstream.buffers.samplers import RankSampler, rank_probabilities, ranks_from_uniform
from driftstream.envs.errors import ConfigError


def exact_probabilities(n: int, k: float) -> np.ndarray:
    weight = np.array([1.0 / (k * n + rank) for rank in range(n)])
    return weight / weight.sum()


def buffer_with(sampler: RankSampler, capacity: int, seed: int = 0) -> ReplayBuffer:
    generator = torch.Generator().manual_seed(seed)
    return ReplayBuffer(storage=LazyTensorStorage(capacity), sampler=sampler, generator=generator)


def insert(buffer: ReplayBuffer, log_reward: torch.Tensor) -> None:
    buffer.extend(TensorDict({"log_reward": log_reward}, batch_size=[len(log_reward)]))


def test_probabilities_match_golden(golden: Callable[[str], Mapping[str, np.ndarray]]) -> None:
    reference = golden("replay")
    probability = rank_probabilities(torch.from_numpy(reference["log_reward"]), float(reference["k"]))
    np.testing.assert_allclose(probability.numpy(), reference["probability"], rtol=1e-12)


def test_probabilities_rank_ties_in_order() -> None:
    probability = rank_probabilities(torch.tensor([0.0, 1.0, 1.0, 0.0]), k=0.5)
    np.testing.assert_allclose(probability, exact_probabilities(4, 0.5)[[2, 0, 1, 3]], rtol=1e-12)


@pytest.mark.parametrize(("n", "k", "bound"), [(500, 0.01, 1e-3), (20_000, 0.01, 2e-7), (600_000, 0.01, 2e-10)])
def test_closed_form_total_variation(n: int, k: float, bound: float) -> None:
    """The share of u that each rank gets, from the edges of the cells, against the exact weights."""
    c, rank = k * n, np.arange(n)
    cell = np.log1p(1.0 / (c + rank - 0.5)) / np.log1p(n / (c - 0.5))
    assert 0.5 * np.abs(cell - exact_probabilities(n, k)).sum() < bound
    # The cells are the draw's own: u just inside the two edges of a cell gives its rank.
    upper = np.log1p((rank + 1) / (c - 0.5)) / np.log1p(n / (c - 0.5))
    lower = np.concatenate([[0.0], upper[:-1]])
    for inside in (lower + 0.01 * (upper - lower), lower + 0.99 * (upper - lower)):
        np.testing.assert_array_equal(ranks_from_uniform(torch.from_numpy(inside), n, k), rank)


@pytest.mark.parametrize(("n", "k"), [(1, 0.01), (2, 0.01), (40, 0.01), (40, 1.0), (499, 0.01), (700, 0.01), (50, 3.0)])
def test_equidistributed_u_gives_the_exact_distribution(n: int, k: float) -> None:
    points = 1_000_000
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    share = torch.bincount(ranks_from_uniform(u, n, k), minlength=n).numpy() / points
    assert share.shape == (n,)
    assert 0.5 * np.abs(share - exact_probabilities(n, k)).sum() < 1e-3


@pytest.mark.parametrize("n", [1, 30, 800])
def test_extreme_u_stays_in_range(n: int) -> None:
    u = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert ranks_from_uniform(u, n, 0.01).tolist() == [0, n - 1]


@pytest.mark.parametrize("n", [40, 2_000])
def test_draws_follow_the_rank_weights(n: int) -> None:
    log_reward = torch.randn(n, generator=torch.Generator().manual_seed(3))
    buffer = buffer_with(RankSampler(k=0.01), capacity=n)
    insert(buffer, log_reward)
    draws = torch.cat([buffer.sample(1_000, return_info=True)[1]["index"] for _ in range(100)])
    observed = torch.bincount(draws, minlength=n).double()
    expected = rank_probabilities(log_reward, 0.01) * len(draws)
    frequent = expected >= 10
    observed, expected = observed[frequent].numpy(), expected[frequent].numpy()
    assert chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue > 1e-3


def order_of(sampler: RankSampler) -> torch.Tensor:
    """Slots as the sampler ranks them; they are the low halves of its keys."""
    return sampler.state_dict()["keys"] & (2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 60),
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=20),
    values=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
def test_resorting_at_every_insert_is_a_full_sort(capacity: int, sizes: list[int], values: int, seed: int) -> None:
    """First-in-first-out overwriting, ties (few distinct values) and N = 1 included."""
    generator = torch.Generator().manual_seed(seed)
    sampler = RankSampler(k=0.01, resort_every=1)
    buffer = buffer_with(sampler, capacity)
    for size in sizes:
        insert(buffer, torch.randint(values, (min(size, capacity),), generator=generator).float())
        buffer.sample(4)
        order = order_of(sampler)
        log_reward = buffer[:]["log_reward"]
        assert torch.equal(order.sort().values, torch.arange(len(buffer)))
        assert torch.equal(log_reward[order], log_reward.sort(descending=True).values)


def test_every_float_has_its_place_and_equals_are_ranked_by_slot() -> None:
    values = [0.0, -0.0, 1e30, -1e30, 1e-45, -1e-45, math.inf, -math.inf, 1.0, 1.0, -2.5, -2.5]
    log_reward = torch.tensor(values).repeat(3)
    sampler = RankSampler(resort_every=1)
    buffer = buffer_with(sampler, capacity=len(log_reward))
    insert(buffer, log_reward.flip(0))
    buffer.sample(1)
    insert(buffer, log_reward)  # every slot is written anew
    insert(buffer, log_reward[:5])
    buffer.sample(1)
    order = order_of(sampler)
    ranked = buffer[:]["log_reward"][order]
    assert torch.equal(ranked, log_reward.sort(descending=True).values)
    ties = (ranked[1:] == ranked[:-1]) & (ranked[1:] != 0)
    assert (order[1:] > order[:-1])[ties].all()


@pytest.mark.parametrize("capacity", [4_000, 100_000])
def test_ranks_are_never_ten_inserts_old(capacity: int) -> None:
    """An entry better than all others is the most drawn one at the latest ten inserts after it came."""
    sampler = RankSampler(k=1e-6)
    buffer = buffer_with(sampler, capacity)
    insert(buffer, torch.zeros(4_000))
    buffer.sample(1)
    for best in range(1, 60):
        insert(buffer, torch.tensor([float(best), 0.0]))
        drawn = buffer.sample(50)["log_reward"].max()
        assert drawn > best - 10
        if capacity > 5_000:  # nothing is overwritten: a newcomer is unseen until the merge
            assert drawn == 10 * (best // 10)


def test_order_catches_up_after_many_inserts_without_a_sample() -> None:
    sampler = RankSampler()
    buffer = buffer_with(sampler, capacity=5_000)
    for _ in range(40):
        insert(buffer, torch.randn(300))
    assert len(sampler.state_dict()["changed"]) <= 5_000
    buffer.sample(1)
    log_reward = buffer[:]["log_reward"]
    assert torch.equal(log_reward[order_of(sampler)], log_reward.sort(descending=True).values)


def test_single_adds_and_an_empty_storage() -> None:
    buffer = buffer_with(RankSampler(), capacity=3)
    with pytest.raises(RuntimeError, match="empty"):
        buffer.sample(1)
    for value in range(5):
        buffer.add(TensorDict({"log_reward": torch.tensor(float(value))}))
    assert set(buffer.sample(200)["log_reward"].tolist()) == {2.0, 3.0, 4.0}
    buffer.empty()
    with pytest.raises(RuntimeError, match="empty"):
        buffer.sample(1)


def test_own_generator_goes_before_the_buffers() -> None:
    def draw(seed: int) -> list[int]:
        sampler = RankSampler(generator=torch.Generator().manual_seed(seed))
        buffer = buffer_with(sampler, capacity=50)
        insert(buffer, torch.arange(50.0))
        return buffer.sample(20)["log_reward"].tolist()

    assert draw(1) == draw(1) != draw(2)


def test_dumps_and_loads(tmp_path: Path) -> None:
    sampler = RankSampler()
    buffer = buffer_with(sampler, capacity=1_000)
    insert(buffer, torch.randn(600))
    buffer.sample(1)
    insert(buffer, torch.randn(5))
    sampler.dumps(tmp_path)
    restored = RankSampler()
    restored.loads(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(sampler.state_dict().values(), restored.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("options", [{"k": 0.0}, {"k": float("inf")}, {"resort_every": 0}])
def test_bad_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        RankSampler(**options)  # type: ignore[arg-type]
