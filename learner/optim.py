"""The optimiser, its learning-rate schedule, and the moving average of the weights."""

import math
from collections.abc import Iterable, Sequence
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


class FlatParameters:
    """Parameters whose values lie in one tensor, `values [N]`, so that what is done to all of them is done once.

    The parameters become views of it: what holds a module's tensors must take them after that, and the module stay on
    its device and in its dtype.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        for parameter, part in zip(self.parameters, self.split(self.values.detach()), strict=True):
            parameter.data = part

    def split(self, flat: Tensor) -> list[Tensor]:
        """A tensor [N] as views, one of each parameter's shape."""
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]

    def join(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Tensors like the parameters, as one [N]; zero where there is none."""
        pairs = zip(parts, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(like) if part is None else part).flatten() for part, like in pairs])

    def take_gradients(self) -> None:
        """Move the parameters' gradients to `values`: zeros of one that has none, but none where no parameter has one.

        Raises RuntimeError where the parameters are views of `values` no more.
        """
        if self.parameters[0].data_ptr() != self.values.data_ptr():
            raise RuntimeError("the optimiser's parameters were moved or replaced: make another optimiser for them")
        gradients = [parameter.grad for parameter in self.parameters]
        self.values.grad = None if all(gradient is None for gradient in gradients) else self.join(gradients)
        for parameter in self.parameters:
            parameter.grad = None


class Optimizer:
    """Adam over policy, state flow and log Z (each with its own rate), with schedule and clipping.

    The parameters of each become views of one tensor (`FlatParameters`).
    """

    def __init__(self, policy: DiffusionPolicy, log_z: nn.Parameter, config: OptimConfig) -> None:
        self.config = config
        flow = [] if policy.flow_net is None else list(policy.flow_net.parameters())
        others = set(flow)
        rest = [parameter for parameter in policy.parameters() if parameter not in others]
        rates = [(rest, config.learning_rate), ([log_z], config.log_z_learning_rate), (flow, config.flow_learning_rate)]
        self._flat: list[FlatParameters] = []
        groups = []
        for parameters, rate in rates:
            if parameters:
                self._flat.append(FlatParameters(parameters))
                groups.append({"params": [self._flat[-1].values], "base_lr": rate})
        self.adam = torch.optim.Adam(groups, lr=config.learning_rate, fused=True)

    def step(self, loss: Tensor, progress: float) -> float:
        """One update from `loss`; returns the gradient's norm before clipping, NaN for a loss that is not finite.

        A loss or gradient that is not finite changes nothing but clears the gradients.
        """
        for flat in self._flat:
            for parameter in flat.parameters:
                parameter.grad = None
        loss.backward()
        for flat in self._flat:
            flat.take_gradients()
        gradients = [flat.values.grad for flat in self._flat if flat.values.grad is not None]
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        if 0.0 < self.config.clip_grad_norm < norm < math.inf:
            for gradient in gradients:
                gradient.mul_(self.config.clip_grad_norm / norm)
        # A target's infinite reward is a constant to the gradient, which then tells nothing.
        norm = norm if math.isfinite(loss.detach()) else math.nan
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = group["base_lr"] * self.config.rate_at(progress)
            self.adam.step()
            for flat in self._flat:
                # Views have versions of their own, by which torch notices a graph that is older than its parameters.
                torch.autograd.graph.increment_version(flat.parameters)
        return norm

    @property
    def learning_rate(self) -> float:
        """The policy's current learning rate."""
        return self.adam.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Tensor]:
        """Adam's moments and step counts by position of the parameter: the policy's, log Z, the state flow's."""
        found: dict[str, Tensor] = {}
        first = 0
        for flat in self._flat:
            for key, value in self.adam.state.get(flat.values, {}).items():
                parts = (
                    flat.split(value) if value.shape == flat.values.shape else [value.clone() for _ in flat.parameters]
                )
                found |= {f"{first + index}.{key}": part for index, part in enumerate(parts)}
            first += len(flat.parameters)
        return found

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, wherever the tensors are."""
        device = self._flat[0].values.device
        tensors = {name: value.to(device) for name, value in tensors.items()}
        state: dict[int, dict[str, Tensor]] = {}
        first = 0
        for group, flat in enumerate(self._flat):
            positions = range(first, first + len(flat.parameters))
            first += len(flat.parameters)
            steps = [tensors[f"{index}.step"] for index in positions if f"{index}.step" in tensors]
            if steps:
                keys = ("exp_avg", "exp_avg_sq")
                moments = {key: flat.join([tensors.get(f"{index}.{key}") for index in positions]) for key in keys}
                state[group] = {"step": torch.stack(steps).max(), **moments}
        self.adam.load_state_dict({"state": state, "param_groups": self.adam.state_dict()["param_groups"]})


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
