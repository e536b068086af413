"""The optimiser, its learning-rate schedule, and the moving average of the weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from driftstream.actors.policy import DiffusionPolicy
from driftstream.envs.errors import require


@dataclass(frozen=True)
class OptimConfig:
    """Adam, its schedule over training progress, gradient clipping (0 = off) and the EMA (0 = off).

    `learning_rate` is that of both policies; log Z and the state flow have their own.
    """

    learning_rate: float = 1e-3
    log_z_learning_rate: float = 1e-1
    flow_learning_rate: float = 1e-2
    schedule: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.02
    clip_grad_norm: float = 0.0
    ema_decay: float = 0.998

    def __post_init__(self) -> None:
        for name in ("learning_rate", "log_z_learning_rate", "flow_learning_rate"):
            rate = getattr(self, name)
            require(rate > 0, f"optim.{name}", rate, "a positive number")
        known = ("constant", "cosine")
        require(self.schedule in known, "optim.schedule", self.schedule, "'constant' or 'cosine'")
        fraction = self.final_fraction
        require(0 <= fraction <= 1, "optim.final_fraction", fraction, "a fraction in [0, 1]")
        clip = self.clip_grad_norm
        require(clip >= 0, "optim.clip_grad_norm", clip, "a number >= 0 (0 = no clipping)")
        decay = self.ema_decay
        require(0 <= decay < 1, "optim.ema_decay", decay, "a number in [0, 1) (0 = no average)")

    def rate_at(self, progress: float) -> float:
        """Factor on every learning rate when the fraction `progress` of training is done."""
        if self.schedule == "constant":
            return 1.0
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return self.final_fraction + (1.0 - self.final_fraction) * cosine


class Optimizer:
    """Adam over policy, state flow and log Z (each with its own rate), with schedule and clipping."""

    def __init__(self, policy: DiffusionPolicy, log_z: nn.Parameter, config: OptimConfig) -> None:
        self.config = config
        flow = [] if policy.flow_net is None else list(policy.flow_net.parameters())
        others = set(flow)
        rest = [parameter for parameter in policy.parameters() if parameter not in others]
        self._parameters = [*rest, log_z, *flow]
        groups = [
            {"params": rest, "base_lr": config.learning_rate},
            {"params": [log_z], "base_lr": config.log_z_learning_rate},
        ]
        if flow:
            groups.append({"params": flow, "base_lr": config.flow_learning_rate})
        self.adam = torch.optim.Adam(groups, lr=config.learning_rate, fused=True)

    def step(self, loss: Tensor, progress: float) -> float:
        """One update from `loss`; returns the gradient's norm before clipping, NaN for a loss that is not finite.

        A loss or gradient that is not finite changes nothing but clears the gradients.
        """
        # Of a few small tensors, torch's own functions for these take longer than the work.
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = float(torch.stack(torch._foreach_norm(gradients)).norm())
        if 0.0 < self.config.clip_grad_norm < norm < math.inf:
            torch._foreach_mul_(gradients, self.config.clip_grad_norm / norm)
        # A target's infinite reward is a constant to the gradient, which then tells nothing.
        norm = norm if math.isfinite(loss.detach()) else math.nan
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = group["base_lr"] * self.config.rate_at(progress)
            self.adam.step()
        return norm

    @property
    def learning_rate(self) -> float:
        """The policy's current learning rate."""
        return self.adam.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Tensor]:
        """Adam's moments and step counts by position of the parameter, as flat tensors."""
        state = self.adam.state_dict()["state"]
        return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        full = self.adam.state_dict()
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        self.adam.load_state_dict({"state": state, "param_groups": full["param_groups"]})


class WeightAverage:
    """Exponential moving average of a module's parameters and buffers, with a short warm-up.

    The decay at update n is min(decay, (1 + n) / (10 + n)), so that the start is forgotten early. Decay 0
    follows the module itself.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._source = list(module.state_dict().items())
        self.tensors = {name: value.detach().clone() for name, value in self._source}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's current values."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = [value for _, value in self._source]
        torch._foreach_lerp_(list(self.tensors.values()), values, 1.0 - decay)

    def load(self, tensors: Iterable[tuple[str, Tensor]], updates: int) -> None:
        """Restore the averaged tensors and the number of updates behind them."""
        self.updates = updates
        for name, value in tensors:
            self.tensors[name].copy_(value)
