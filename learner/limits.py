"""How long a run lasts, and how far along it is."""

import time
from dataclasses import dataclass

from driftstream.envs.errors import require


@dataclass(frozen=True)
class LimitsConfig:
    """The run ends at whichever of these comes first; None is no limit.

    `steps` counts learner updates, `minutes` wall-clock time from when the learner is ready for data,
    `energy_budget` the energy and gradient evaluations of all roles together.
    """

    steps: int | None = None
    minutes: float | None = None
    energy_budget: int | None = None

    def __post_init__(self) -> None:
        steps, minutes, budget = self.steps, self.minutes, self.energy_budget
        require(steps is None or steps >= 1, "limits.steps", steps, "at least 1")
        require(minutes is None or minutes > 0, "limits.minutes", minutes, "a positive number of minutes")
        require(budget is None or budget >= 1, "limits.energy_budget", budget, "at least 1")


class Budget:
    """Training time, and progress towards the limits."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.limits = limits
        self.earlier_s = 0.0
        self._start: float | None = None

    def start(self) -> None:
        """Start the clock (once; later calls do nothing)."""
        if self._start is None:
            self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.earlier_s + (0.0 if self._start is None else time.monotonic() - self._start)

    def shares(self, step: int, energy_evaluations: int) -> dict[str, float]:
        """Used share of every limit that is set."""
        limits = self.limits
        shares = {}
        if limits.steps is not None:
            shares["steps"] = step / limits.steps
        if limits.minutes is not None:
            shares["minutes"] = self.elapsed_s / (60.0 * limits.minutes)
        if limits.energy_budget is not None:
            shares["energy_budget"] = energy_evaluations / limits.energy_budget
        return shares

    def progress(self, step: int, energy_evaluations: int) -> float:
        """Fraction of training done, in [0, 1]: that of the limit that is nearest."""
        return min(1.0, max(self.shares(step, energy_evaluations).values(), default=0.0))

    def reached(self, step: int, energy_evaluations: int) -> str | None:
        """The name of a limit that is reached, or None."""
        shares = self.shares(step, energy_evaluations)
        return next((name for name, share in shares.items() if share >= 1.0), None)
