"""Time grids: 0 = t_0 < … < t_T = 1."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from driftstream.envs.errors import ConfigError, require


@dataclass(frozen=True)
class GridConfig:
    """Which time grid to simulate on; `sampling_steps` (T) None is derived from the target when a run starts.

    `given` takes `times`: 0, ..., 1, rising; it has its own number of steps.
    """

    kind: Literal["uniform", "random", "given"] = "uniform"
    sampling_steps: int | None = None
    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        kinds = ("uniform", "random", "given")
        require(self.kind in kinds, "grid.kind", self.kind, "'uniform', 'random' or 'given'")
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
) -> Tensor:
    """times [T+1] with exact ends 0 and 1, newly drawn if random; ConfigError while T is unresolved."""
    if config.kind == "given":
        return torch.tensor(config.times, dtype=torch.float64).to(device, dtype)
    steps = config.sampling_steps
    if steps is None:
        raise ConfigError("grid.sampling_steps", None, "a number of steps (the configuration is not resolved)")
    if config.kind == "random":
        return random_grid(steps, generator, device, dtype)
    return uniform_grid(steps, device, dtype)
