"""What a soak concludes from a run's figures."""

from driftstream.launch.soak import highest_reward
from driftstream.launch.soak_frames import POISON


def test_a_poisoned_batch_shows_in_the_mean_reward_of_its_kind() -> None:
    clean = {"train/loss": 1e25, "kind/explore/log_reward": -1e20, "kind/replay/log_reward": 150.0}
    assert highest_reward(clean) == 150.0
    # One row of a poisoned batch among very many others is enough.
    assert highest_reward(clean | {"kind/explore/log_reward": POISON / 1e6}) > POISON**0.5
    assert highest_reward({"train/loss": 1.0}) < 0
