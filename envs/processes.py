"""Diffusion processes: how a state moves forward, how likely that was, and the way back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.envs.errors import require

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class ProcessConfig:
    """`diffusion_variance` (σ² per unit of time) None takes the target's suggestion."""

    diffusion_variance: float | None = None

    def __post_init__(self) -> None:
        variance = self.diffusion_variance
        valid = variance is None or 0.0 < variance < math.inf
        require(valid, "process.diffusion_variance", variance, "a positive number")


class BrownianProcess:
    """Controlled Brownian motion from x_0 = 0, with the Brownian bridge as its way back.

    Forward: x_{n+1} ~ N(x_n + u dt_n, σ² dt_n exp(v)), with σ² = `diffusion_variance` per unit of time and a
    policy's drift u and log variance offset v. Backward: x_n | x_{n+1} ~ N(s x_{n+1}, σ² dt_n s) where s is
    t_n/t_{n+1}.

    B trajectories, T steps, D dimensions; `times` is [T+1], or [B, T+1] where each row has its own grid.
    Source: Sendera et al. 2024, arXiv 2402.05098, §2; Zhang and Chen 2022, arXiv 2111.15141.
    """

    def __init__(self, diffusion_variance: float) -> None:
        valid = 0.0 < diffusion_variance < math.inf
        require(valid, "diffusion_variance", diffusion_variance, "a positive number")
        self.diffusion_variance = float(diffusion_variance)

    def sample_prior(
        self,
        batch_size: int,
        dim: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The initial states x_0 [B, D]: zeros, as this process starts at a point (nothing is drawn)."""
        return torch.zeros(batch_size, dim, device=device, dtype=dtype)

    def step(
        self,
        x: Tensor,
        drift: Tensor,
        dt: float | Tensor,
        noise: Tensor,
        log_var: Tensor | None = None,
        extra_variance: float = 0.0,
    ) -> Tensor:
        """One Euler-Maruyama step: x, drift, noise, log_var [..., D] -> the next state [..., D].

        `extra_variance` is a rate (e² for an exploration rate e): the step's variance is
        (σ² exp(log_var) + extra_variance) dt. Gradients flow through every tensor.
        """
        if log_var is None:
            std = ((self.diffusion_variance + extra_variance) * dt) ** 0.5
        else:
            std = ((self.diffusion_variance * log_var.exp() + extra_variance) * dt).sqrt()
        return x + drift * dt + std * noise

    def log_pf(self, states: Tensor, times: Tensor, drift: Tensor, log_var: Tensor | None = None) -> Tensor:
        """log P_F of every step: states [B, T+1, D], drift and log_var [B, T, D] -> [B, T].

        Gradients flow to states, drift and log_var; trajectories that are data should come detached.
        """
        dt = times.to(states.dtype).diff(dim=-1)
        # In place, as a pass over [B, T, D] costs its memory traffic, and a fresh one page faults besides.
        residual = (states[:, 1:] - states[:, :-1]).addcmul_(drift, dt.unsqueeze(-1), value=-1.0)
        variance = self.diffusion_variance * dt
        log_scale = states.shape[-1] * (variance.log() + LOG_2PI)
        if log_var is None:
            return -0.5 * (residual.square().sum(-1) / variance + log_scale)
        squares = (residual.square() * torch.exp(-log_var)).sum(-1)
        return -0.5 * (squares / variance + log_scale + log_var.sum(-1))

    def log_pb(self, states: Tensor, times: Tensor) -> Tensor:
        """log P_B of every step: states [B, T+1, D] -> [B, T]; the certain step to x_0 adds exactly 0."""
        times = times.to(states.dtype)
        dt = times.diff(dim=-1)[..., 1:]
        shrink = times[..., 1:-1] / times[..., 2:]
        residual = torch.addcmul(states[:, 1:-1], states[:, 2:], shrink.unsqueeze(-1), value=-1.0)
        variance = self.diffusion_variance * dt * shrink
        log_scale = states.shape[-1] * (variance.log() + LOG_2PI)
        log_pb = -0.5 * (residual.square().sum(-1) / variance + log_scale)
        return torch.nn.functional.pad(log_pb, (1, 0))

    def sample_bridge(self, terminal: Tensor, times: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Paths of P_B that end in terminal [B, D]: states [B, T+1, D], drawn without a loop over steps.

        x_0 = 0 and x_T = terminal exactly. Gradients flow to terminal. A Brownian motion W, tilted to
        end where it must, is the bridge: x_n = W_n + t_n/t_T (x_T - W_T).
        """
        batch_size, dim = terminal.shape
        times = times.to(terminal.dtype)
        # The buffer of draws becomes the paths in place; standard deviation 0 makes its first column x_0 = 0.
        std = torch.nn.functional.pad((self.diffusion_variance * times.diff(dim=-1)).sqrt(), (1, 0))
        shape = (batch_size, times.shape[-1], dim)
        device = terminal.device if generator is None else generator.device
        states = torch.randn(shape, dtype=terminal.dtype, device=device, generator=generator)
        states = states.to(terminal.device).mul_(std.unsqueeze(-1)).cumsum_(1)
        tilt = (times / times[..., -1:]).unsqueeze(-1)
        states = states.addcmul_(tilt, (terminal - states[:, -1]).unsqueeze(1))
        states[:, -1] = terminal
        return states
