"""Diffusion processes: how a state moves forward, how likely that was, and the way back.

Every process here is a chain of linear Gaussian kernels, so that one implementation serves all of them:

    forward   x_{n+1} ~ N(keep x_n + gain u, variance exp(v)),  u and v from the policy
    backward  x_n     ~ N(back x_{n+1}, back_variance)

B trajectories, T steps, D dimensions; `times` is [T+1], or [B, T+1] where each row has its own points.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from driftstream.envs.densities import log_normal, log_of_energy, step_energy
from driftstream.envs.errors import ConfigError, require
from driftstream.envs.schedules import SCHEDULES, Schedule, clock

SCHEDULE_RATIO = 10.0


@dataclass(frozen=True)
class ProcessConfig:
    """The diffusion between prior and target.

    `diffusion_variance` (σ² per unit of time, `brownian`) None takes the target's suggestion; `prior_std` (of the
    processes that start in a Gaussian: `dis`, `dds`) None its square root. `noise` is their ∫β: e^(-noise/2) of
    the target is left in the prior. `schedule_ratio` is the rate of noise at t = 0 over that at t = 1; None is 10, or
    with a falling schedule of `brownian` that of the target's `noise_range`, where it has one.
    """

    kind: Literal["brownian", "dis", "dds"] = "brownian"
    diffusion_variance: float | None = None
    prior_std: float | None = None
    noise: float = 5.0
    schedule: Schedule = "constant"
    schedule_ratio: float | None = None

    def __post_init__(self) -> None:
        kinds = ("brownian", "dis", "dds")
        require(self.kind in kinds, "process.kind", self.kind, "one of " + ", ".join(kinds))
        for name in ("diffusion_variance", "prior_std"):
            value = getattr(self, name)
            valid = value is None or 0.0 < value < math.inf
            require(valid, f"process.{name}", value, "a positive number")
        require(0.0 < self.noise < math.inf, "process.noise", self.noise, "a positive number")
        require(self.schedule in SCHEDULES, "process.schedule", self.schedule, "one of " + ", ".join(SCHEDULES))
        ratio = self.schedule_ratio
        require(ratio is None or 1.0 < ratio < math.inf, "process.schedule_ratio", ratio, "a number above 1")


class Kernels(NamedTuple):
    """The kernels of all steps of a grid, each [T] or [B, T] (see the module)."""

    keep: Tensor
    gain: Tensor
    variance: Tensor
    back: Tensor
    back_variance: Tensor


class Step(NamedTuple):
    """The kernels of one step, as numbers."""

    keep: float
    gain: float
    variance: float
    back: float
    back_variance: float


class DiffusionProcess(ABC):
    """A chain of linear Gaussian kernels from a prior at t = 0 to the target at t = 1.

    `prior_std` is the standard deviation of x_0, 0 for a start at the origin. A Gaussian prior's log density is
    part of log P_F's first step, so that a log flow at n = 0 is log Z, whatever x_0.
    """

    prior_std: float = 0.0

    @property
    @abstractmethod
    def noise_rate(self) -> float:
        """Variance of the noise per unit of the time that drifts act in, in the limit of small steps."""

    @abstractmethod
    def kernels(self, times: Tensor) -> Kernels:
        """The kernels of the steps between `times` [..., T+1], in its dtype."""

    @abstractmethod
    def log_reference(self, states: Tensor, times: Tensor) -> Tensor:
        """Log density of the uncontrolled process at states [..., N, D] and times [..., N] > 0 -> [..., N]."""

    @abstractmethod
    def noise_left(self, times: Tensor) -> Tensor:
        """Standard deviation of the noise that is to come between `times` [...] and t = 1 -> [...]."""

    @cached_property
    def all_noise(self) -> float:
        """Standard deviation of all the noise between t = 0 and t = 1."""
        return float(self.noise_left(torch.zeros((), dtype=torch.float64)))

    def kernels_like(self, times: Tensor, like: Tensor) -> Kernels:
        """The kernels of `times`, computed in float64, in the dtype of `like`: float32 steps would round them."""
        return Kernels(*(part.to(like.dtype) for part in self.kernels(times.double())))

    def steps(self, times: Tensor) -> list[Step]:
        """The kernels of the grid `times` [T+1], one step after the other."""
        return [Step(*row) for row in torch.stack(self.kernels(times.double())).T.tolist()]

    def sample_prior(
        self,
        batch_size: int,
        dim: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The initial states x_0 [B, D]; nothing is drawn for a process that starts at the origin."""
        if not self.prior_std:
            return torch.zeros(batch_size, dim, device=device, dtype=dtype)
        return self.prior_std * torch.randn(batch_size, dim, generator=generator, device=device, dtype=dtype)

    def log_prior(self, x: Tensor) -> Tensor:
        """Log density of initial states [..., D] -> [...]; 0 where they are certain."""
        if not self.prior_std:
            return x.new_zeros(x.shape[:-1])
        return log_normal(x.square().sum(-1), x.new_tensor(self.prior_std**2), x.shape[-1])

    def step(
        self,
        x: Tensor,
        drift: Tensor,
        step: Step,
        noise: Tensor,
        log_var: Tensor | None = None,
        extra_variance: float = 0.0,
    ) -> Tensor:
        """One step forward: x, drift, noise, log_var [..., D] -> the next state [..., D].

        `extra_variance` is a rate (e² for an exploration rate e): it adds extra_variance * gain to the variance of
        the step (gain is dt for the plain Brownian process). Gradients flow through every tensor.
        """
        kept = x if step.keep == 1.0 else x * step.keep
        mean = torch.add(kept, drift, alpha=step.gain)
        extra = extra_variance * step.gain
        if log_var is None:
            return mean.add_(noise, alpha=math.sqrt(step.variance + extra))
        return mean.addcmul_((step.variance * log_var.exp() + extra).sqrt(), noise)

    def step_back(
        self,
        x: Tensor,
        step: Step,
        noise: Tensor,
        mean_factor: Tensor | None = None,
        variance_factor: Tensor | None = None,
    ) -> Tensor:
        """One step of P_B from the state after the step: x, noise and the policy's factors [..., D] -> [..., D]."""
        mean = step.back * x if mean_factor is None else x - (1.0 - step.back) * mean_factor * x
        std = math.sqrt(step.back_variance)
        return mean + (noise * std if variance_factor is None else noise * std * variance_factor.sqrt())

    def log_pf(
        self,
        states: Tensor,
        times: Tensor,
        drift: Tensor,
        log_var: Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> Tensor:
        """log P_F of every step: states [B, T+1, D], drift and log_var [B, T, D] -> [B, T].

        The first step from t = 0 includes the log density of x_0 in the prior. `kernels`: those of `times`, where they
        are known. Gradients flow to states, drift and log_var; trajectories that are data should come detached.
        """
        kernels = kernels or self.kernels_like(times, states)
        moved = torch.addcmul(states[:, 1:], states[:, :-1], kernels.keep.unsqueeze(-1), value=-1.0)
        energy = step_energy(moved, drift, kernels.gain, kernels.variance, log_var)
        return self.log_pf_of(energy, states, times, kernels)

    def log_pf_of(self, energy: Tensor, states: Tensor, times: Tensor, kernels: Kernels) -> Tensor:
        """`log_pf` from the energies (`step_energy`) of the steps [B, T]."""
        log_pf = log_of_energy(energy, kernels.variance, states.shape[-1])
        if self.prior_std:
            starts = (times[..., 0] == 0).to(states.dtype)
            log_pf = torch.cat([log_pf[:, :1] + (starts * self.log_prior(states[:, 0])).unsqueeze(1), log_pf[:, 1:]], 1)
        return log_pf

    def log_pb(
        self,
        states: Tensor,
        times: Tensor,
        mean_factor: Tensor | None = None,
        variance_factor: Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> Tensor:
        """log P_B of every step: states [B, T+1, D] -> [B, T]; a certain step to x_0 adds exactly 0.

        A learned backward policy's factors [B, T, D] multiply the step's contraction (1 - back) x_{n+1} and its
        variance. `kernels`: those of `times`, where they are known. Gradients flow to states and factors.
        """
        kernels = kernels or self.kernels_like(times, states)
        back = kernels.back.unsqueeze(-1)
        if mean_factor is None:
            residual = torch.addcmul(states[:, :-1], states[:, 1:], back, value=-1.0)
        else:
            residual = states[:, :-1] - states[:, 1:] * (1.0 - (1.0 - back) * mean_factor)
        squares = residual.square()
        log_factor = None
        if variance_factor is not None:
            squares = squares / variance_factor
            log_factor = variance_factor.log().sum(-1)
        return self.log_pb_of(squares.sum(-1), states.shape[-1], kernels, log_factor)

    @staticmethod
    def log_pb_of(squares: Tensor, dim: int, kernels: Kernels, log_factor: Tensor | None = None) -> Tensor:
        """`log_pb` from the squared distances of the states to their means [B, T], and the variances' log factors."""
        certain = kernels.back_variance == 0
        log_pb = log_normal(squares, kernels.back_variance.masked_fill(certain, 1.0), dim)
        if log_factor is not None:
            log_pb = log_pb - 0.5 * log_factor
        return log_pb.masked_fill(certain, 0.0)

    def sample_bridge(self, terminal: Tensor, times: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Paths of P_B that end in terminal [B, D]: states [B, T+1, D], on one grid `times` [T+1].

        x_T = terminal exactly. Gradients flow to terminal.
        """
        device = terminal.device if generator is None else generator.device
        shape = (len(times) - 1, *terminal.shape)
        noise = torch.randn(shape, dtype=terminal.dtype, device=device, generator=generator).to(terminal.device)
        states = [terminal]
        for n, step in reversed(list(enumerate(self.steps(times)))):
            states.append(self.step_back(states[-1], step, noise[n]))
        return torch.stack(states[::-1], 1)

    def bridge_moments(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, variance), each [T+1] in float64: given x_T, x_n ~ N(scale_n x_T, variance_n I) under P_B."""
        scale, variance = 1.0, 0.0
        moments = [(scale, variance)]
        for step in reversed(self.steps(times)):
            scale, variance = step.back * scale, step.back**2 * variance + step.back_variance
            moments.append((scale, variance))
        scales, variances = torch.tensor(moments[::-1], dtype=torch.float64, device=times.device).unbind(-1)
        return scales, variances


class BrownianProcess(DiffusionProcess):
    """Controlled Brownian motion from x_0 = 0, with the Brownian bridge as its way back.

    Forward: x_{n+1} ~ N(x_n + u dt_n, σ² dt_n exp(v)), with σ² = `diffusion_variance` per unit of time. Backward:
    x_n | x_{n+1} ~ N(s x_{n+1}, σ² dt_n s) where s is t_n/t_{n+1}. With a noise schedule, t is its clock.

    Source: Sendera et al. 2024, arXiv 2402.05098, §2; Zhang and Chen 2022, arXiv 2111.15141.
    """

    def __init__(
        self, diffusion_variance: float, schedule: Schedule = "constant", schedule_ratio: float = SCHEDULE_RATIO
    ) -> None:
        valid = 0.0 < diffusion_variance < math.inf
        require(valid, "diffusion_variance", diffusion_variance, "a positive number")
        self.diffusion_variance = float(diffusion_variance)
        self.schedule = schedule
        self.schedule_ratio = schedule_ratio

    def clock(self, times: Tensor) -> Tensor:
        """The schedule's time of `times`: the share of σ² that the process has spent by then."""
        return clock(times, self.schedule, self.schedule_ratio)

    def kernels(self, times: Tensor) -> Kernels:
        tau = self.clock(times)
        dt, back = tau.diff(dim=-1), tau[..., :-1] / tau[..., 1:]
        variance = self.diffusion_variance * dt
        return Kernels(torch.ones_like(dt), dt, variance, back, variance * back)

    @property
    def noise_rate(self) -> float:
        return self.diffusion_variance

    def noise_left(self, times: Tensor) -> Tensor:
        return (self.diffusion_variance * (1.0 - self.clock(times))).sqrt()

    def log_reference(self, states: Tensor, times: Tensor) -> Tensor:
        variance = self.diffusion_variance * self.clock(times)
        return log_normal(states.square().sum(-1), variance, states.shape[-1])

    def sample_bridge(self, terminal: Tensor, times: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Paths of P_B that end in terminal [B, D]: states [B, T+1, D], drawn without a loop over steps.

        x_0 = 0 and x_T = terminal exactly; rows may have grids of their own. Gradients flow to terminal. A
        Brownian motion W, tilted to end where it must, is the bridge: x_n = W_n + t_n/t_T (x_T - W_T).
        """
        batch_size, dim = terminal.shape
        tau = self.clock(times.to(terminal.dtype))
        # The buffer of draws becomes the paths in place; standard deviation 0 makes its first column x_0 = 0.
        std = torch.nn.functional.pad((self.diffusion_variance * tau.diff(dim=-1)).sqrt(), (1, 0))
        shape = (batch_size, tau.shape[-1], dim)
        device = terminal.device if generator is None else generator.device
        states = torch.randn(shape, dtype=terminal.dtype, device=device, generator=generator)
        states = states.to(terminal.device).mul_(std.unsqueeze(-1)).cumsum_(1)
        tilt = (tau / tau[..., -1:]).unsqueeze(-1)
        states = states.addcmul_(tilt, (terminal - states[:, -1]).unsqueeze(1))
        states[:, -1] = terminal
        return states


class OrnsteinUhlenbeckProcess(DiffusionProcess):
    """A variance-preserving noising process run backwards in time, from its stationary N(0, σ_0² I).

    Noising takes the target towards the prior at the rate β: with `noise` = ∫β, e^(-noise/2) of it is left. β falls
    from t = 0 to t = 1 as `schedule` says. Time is measured by the clock of ∫β: the policy's drift u acts as
    u dτ, like that of the Brownian process. Uncontrolled, the process stays in its prior (`exponential` exactly so,
    otherwise up to O(dΛ²); steps of dΛ > 2 overshoot).

    `exponential` (DDS) uses the exact transition of the noising process in both directions; without it (DIS) both
    are Euler-Maruyama steps: keep = back = 1 - dΛ/2, variance σ_0² dΛ, with dΛ the step of ∫β.

    Source: Berner et al. 2022 (DIS, arXiv 2211.01364); Vargas et al. 2023 (DDS, arXiv 2302.13834), equation 18.
    """

    def __init__(
        self,
        prior_std: float,
        noise: float = 5.0,
        exponential: bool = False,
        schedule: Schedule = "constant",
        schedule_ratio: float = SCHEDULE_RATIO,
    ) -> None:
        require(0.0 < prior_std < math.inf, "prior_std", prior_std, "a positive number")
        require(0.0 < noise < math.inf, "noise", noise, "a positive number")
        self.prior_std = float(prior_std)
        self.noise = float(noise)
        self.exponential = exponential
        self.schedule = schedule
        self.schedule_ratio = schedule_ratio

    def kernels(self, times: Tensor) -> Kernels:
        spent = self.noise * clock(times, self.schedule, self.schedule_ratio).diff(dim=-1)
        if self.exponential:
            shrink = torch.exp(-0.5 * spent)
            variance = -(self.prior_std**2) * torch.expm1(-spent)
            gain = -2.0 / self.noise * torch.expm1(-0.5 * spent)
            return Kernels(shrink, gain, variance, shrink, variance)
        variance = self.prior_std**2 * spent
        shrink = 1.0 - 0.5 * spent
        return Kernels(shrink, spent / self.noise, variance, shrink, variance)

    @property
    def noise_rate(self) -> float:
        return self.prior_std**2 * self.noise

    def noise_left(self, times: Tensor) -> Tensor:
        left = self.noise * (1.0 - clock(times, self.schedule, self.schedule_ratio))
        return self.prior_std * (-torch.expm1(-left)).sqrt()

    def log_reference(self, states: Tensor, times: Tensor) -> Tensor:
        return self.log_prior(states)


def make_process(config: ProcessConfig) -> DiffusionProcess:
    """The configured process; ConfigError while what derives from the target is unresolved."""
    name = "diffusion_variance" if config.kind == "brownian" else "prior_std"
    scale = getattr(config, name)
    if scale is None:
        raise ConfigError(f"process.{name}", None, "a positive number (the configuration is not resolved)")
    schedule = (config.schedule, config.schedule_ratio or SCHEDULE_RATIO)
    if config.kind == "brownian":
        return BrownianProcess(scale, *schedule)
    return OrnsteinUhlenbeckProcess(scale, config.noise, config.kind == "dds", *schedule)
