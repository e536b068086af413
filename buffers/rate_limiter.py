"""How often the learner replays, whatever the relative speeds of actors and learner."""

import math
from typing import Literal

from driftstream.envs.errors import require

Kind = Literal["fresh", "replay"]


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

    def next(self, replay_size: int) -> Kind:
        """The kind of the next batch, while replay holds `replay_size` states; `used` counts it."""
        # The slack keeps 0.29 * 100 = 28.999... from delaying a batch.
        due = self._replayed + 1 <= self.ratio * self._fresh + 1e-9
        return "replay" if due and replay_size >= self.minimum else "fresh"

    def used(self, kind: Kind, replay_size: int) -> None:
        """Count the batch that `next(replay_size)` asked for, once it is trained on."""
        if kind == "replay":
            self._replayed += 1
        elif replay_size >= self.minimum:
            self._fresh += 1

    def state_dict(self) -> dict[str, float]:
        return {"ratio": self.ratio, "fresh": self._fresh, "replayed": self._replayed}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict`; counts made at another ratio are dropped, as they would bring a burst."""
        same = state["ratio"] == self.ratio
        self._fresh, self._replayed = (int(state[name]) if same else 0 for name in ("fresh", "replayed"))
