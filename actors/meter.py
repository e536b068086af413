"""What an actor or refiner spent, and how long it waits at a time."""

from driftstream.envs.targets import CountedTarget

POLL_S = 0.2
"""No wait of a role is longer, so that it notices the end of the run."""


class CallMeter:
    """Differences of a target's running counts: what was spent since the last reading."""

    def __init__(self, target: CountedTarget) -> None:
        self._target = target
        self._seen = target.calls

    def spent(self) -> int:
        """Energy and gradient evaluations since the last call."""
        seen, self._seen = self._seen, self._target.calls
        return self._seen - seen
