"""How often the learner replays, whatever the relative speeds of actors and learner."""

import math
from typing import Literal

from driftstream.envs.errors import require


class RateLimiter:
    """Decides whether the learner's next batch is fresh or replayed, so that replayed : fresh = `ratio`.

    Deterministic: a replayed batch is due once `ratio` times the fresh batches allow one more. Fresh batches
    count from the moment replay holds `minimum` states, so a late start brings no burst of replay.
    Raises ConfigError for a negative or non-finite `ratio`, or a `minimum` below 1.
    """

    def __init__(self, ratio: float, minimum: int) -> None:
        require(ratio >= 0 and math.isfinite(ratio), "ratio", ratio, "a finite number, at least 0")
        require(minimum >= 1, "minimum", minimum, "at least 1")
        self.ratio, self.minimum = ratio, minimum
        self._fresh = 0
        self._replayed = 0

    def next(self, replay_size: int) -> Literal["fresh", "replay"]:
        """The kind of the next batch, which is thereby counted; `replay_size` is in states."""
        if replay_size < self.minimum:
            return "fresh"
        # The slack keeps 0.29 * 100 = 28.999... from delaying a batch.
        if self._replayed + 1 <= self.ratio * self._fresh + 1e-9:
            self._replayed += 1
            return "replay"
        self._fresh += 1
        return "fresh"

    def state_dict(self) -> dict[str, int]:
        return {"fresh": self._fresh, "replayed": self._replayed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._fresh, self._replayed = int(state["fresh"]), int(state["replayed"])
