"""The replay ratio holds over any prefix of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftstream.buffers.rate_limiter import Kind, RateLimiter
from driftstream.envs.errors import ConfigError


def step(limiter: RateLimiter, replay_size: int) -> Kind:
    """One batch: asked for and used."""
    kind = limiter.next(replay_size)
    limiter.used(kind, replay_size)
    return kind


@given(ratio=st.floats(0, 20), batches=st.integers(1, 400))
def test_ratio_holds_at_every_batch(ratio: float, batches: int) -> None:
    limiter = RateLimiter(ratio, minimum=10)
    counts = {"fresh": 0, "replay": 0}
    for _ in range(batches):
        counts[step(limiter, 10)] += 1
        due = ratio * counts["fresh"]
        assert counts["replay"] <= due + 1e-6
        assert due - counts["replay"] < ratio + 1 + 1e-6


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.29, 29), (0.5, 50), (1.0, 100), (3.0, 300)])
def test_exact_counts(ratio: float, expected: int) -> None:
    limiter = RateLimiter(ratio, minimum=1)
    kinds = []
    while kinds.count("fresh") < 101:  # the 101st ends what the 100th allows
        kinds.append(step(limiter, 1))
    assert kinds.count("replay") == expected


def test_alternates_at_ratio_one() -> None:
    limiter = RateLimiter(1.0, minimum=1)
    assert [step(limiter, 1) for _ in range(4)] == ["fresh", "replay"] * 2


def test_a_batch_that_is_never_used_does_not_count() -> None:
    limiter = RateLimiter(1.0, minimum=1)
    assert [limiter.next(1) for _ in range(3)] == ["fresh"] * 3
    assert [step(limiter, 1) for _ in range(4)] == ["fresh", "replay"] * 2


def test_nothing_counts_below_the_minimum() -> None:
    limiter = RateLimiter(1.0, minimum=300)
    assert [step(limiter, 299) for _ in range(50)] == ["fresh"] * 50
    assert [step(limiter, 300) for _ in range(4)] == ["fresh", "replay"] * 2


def test_state_continues_the_sequence() -> None:
    limiter = RateLimiter(0.7, minimum=1)
    for _ in range(23):
        step(limiter, 1)
    restored = RateLimiter(0.7, minimum=1)
    restored.load_state_dict(limiter.state_dict())
    assert [step(limiter, 1) for _ in range(50)] == [step(restored, 1) for _ in range(50)]


def test_another_ratio_starts_to_count_anew() -> None:
    rare, often = RateLimiter(0.1, minimum=1), RateLimiter(2.0, minimum=1)
    for _ in range(50):
        step(rare, 1)
    often.load_state_dict(rare.state_dict())
    assert [step(often, 1) for _ in range(6)] == ["fresh", "replay", "replay"] * 2


@pytest.mark.parametrize(
    ("ratio", "minimum", "field"), [(-1, 1, "ratio"), (float("nan"), 1, "ratio"), (1, 0, "minimum")]
)
def test_bad_values_are_named(ratio: float, minimum: int, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        RateLimiter(ratio, minimum)
