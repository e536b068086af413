"""Time grids: 0 = t_0 < … < t_T = 1."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from driftstream.envs.errors import ConfigError, require


@dataclass(frozen=True)
class GridConfig:
    """Which time grid to simulate on; `sampling_steps` (T) None is derived from the target when a run starts, and so is
    the kind `auto`.

    `given` takes `times`: 0, ..., 1, rising; it has its own number of steps. With `coarse_steps` training begins on
    grids of so many steps, which cost less: up to `coarse_until` (a fraction of training); from there on their number
    grows geometrically, to `sampling_steps` at `fine_from`.

    Source: Berner et al. 2025 (arXiv 2501.06148), where samplers trained on coarse random grids work on fine ones.
    """

    kind: Literal["auto", "uniform", "random", "given"] = "uniform"
    sampling_steps: int | None = None
    times: tuple[float, ...] = ()
    coarse_steps: int | None = None
    coarse_until: float = 0.3
    fine_from: float = 0.8

    def __post_init__(self) -> None:
        kinds = ("auto", "uniform", "random", "given")
        require(self.kind in kinds, "grid.kind", self.kind, "'auto', 'uniform', 'random' or 'given'")
        steps, times = self.sampling_steps, self.times
        require(steps is None or steps >= 1, "grid.sampling_steps", steps, "at least 1")
        if self.kind == "given":
            # As float32, in which it will be used.
            rises = len(times) >= 2 and bool((torch.tensor(times, dtype=torch.float32).diff() > 0).all())
            require(rises and (times[0], times[-1]) == (0.0, 1.0), "grid.times", times, "rising numbers, 0 to 1")
            fits = steps in (None, len(times) - 1)
            require(fits, "grid.sampling_steps", steps, f"{len(times) - 1}, as grid.times says, or nothing")
        else:
            require(not times, "grid.times", times, "nothing unless grid.kind = 'given'")
        coarse, until = self.coarse_steps, self.coarse_until
        allowed = "at least 1, and at most grid.sampling_steps"
        require(coarse is None or 1 <= coarse <= (steps or coarse), "grid.coarse_steps", coarse, allowed)
        require(coarse is None or self.kind != "given", "grid.coarse_steps", coarse, "nothing, as the grid is given")
        require(
            0 <= until < self.fine_from <= 1, "grid.coarse_until", until, "a fraction in [0, 1], below grid.fine_from"
        )

    def steps_at(self, progress: float) -> int:
        """T when the fraction `progress` of training is done; ConfigError while it is unresolved."""
        steps = self.sampling_steps
        if steps is None:
            raise ConfigError("grid.sampling_steps", None, "a number of steps (the configuration is not resolved)")
        if self.coarse_steps is None:
            return steps
        share = (progress - self.coarse_until) / (self.fine_from - self.coarse_until)
        return round(self.coarse_steps * (steps / self.coarse_steps) ** min(1.0, max(0.0, share)))


def uniform_grid(
    sampling_steps: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """times [T+1], equally spaced."""
    return torch.linspace(0.0, 1.0, sampling_steps + 1, dtype=torch.float64).to(device, dtype)


def random_grid(
    sampling_steps: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """times [T+1], the normalised cumulative sums of T draws from U[1, 10]."""
    draw_device = device if generator is None else generator.device
    steps = torch.rand(sampling_steps, dtype=torch.float64, device=draw_device, generator=generator)
    ends = (1.0 + 9.0 * steps).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends / ends[-1]]).to(device, dtype)


def make_grid(
    config: GridConfig,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: float = 1.0,
) -> Tensor:
    """times [T+1] with exact ends 0 and 1, newly drawn if random, for a fraction of training that is done.

    Raises ConfigError while T is unresolved.
    """
    if config.kind == "given":
        return torch.tensor(config.times, dtype=torch.float64).to(device, dtype)
    steps = config.steps_at(progress)
    if config.kind == "random":
        return random_grid(steps, generator, device, dtype)
    return uniform_grid(steps, device, dtype)
