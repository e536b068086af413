"""Training objectives as pure functions of per-step log densities.

Shapes: `log_pf`, `log_pb` `[B, T]`; `log_reward` `[B]`; `log_flow` `[B, T+1]`, whose last column is the log
reward. Each returns a scalar; gradients flow to whatever the arguments depend on. `reverse_kl` is meant for
states that were drawn with reparametrisation; the others for detached states of any path distribution.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from driftstream.envs.errors import ConfigError, require
from driftstream.envs.plugins import installed
from driftstream.envs.registry import suggest
from driftstream.learner.objective_plugins import OBJECTIVE_GROUP, is_plugin, uses_log_z

ObjectiveName = Literal[
    "trajectory_balance",
    "vargrad",
    "detailed_balance",
    "subtrajectory_balance",
    "reverse_kl",
    "maximum_likelihood",
]
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which loss the learner minimises.

    `name` is that of a built-in one or of an entry point, or the place of a function of your own, such as
    `./mine.py:my_loss`, called with log_pf [B, T], log_pb [B, T], log_reward [B] and log_z, which returns a scalar.
    `lam` is the λ of subtrajectory balance. With `segment_length` L, the objectives that balance flows train on
    segments of L consecutive transitions, one of each trajectory: an update costs L/T of one on whole trajectories,
    which are drawn whole nevertheless.
    """

    name: str = "trajectory_balance"
    lam: float = 2.0
    segment_length: int | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES and not is_plugin(self.name):
            names = objective_names()
            allowed = f"one of {', '.join(names)}, or path/file.py:function{suggest(self.name, names)}"
            raise ConfigError("objective.name", self.name, allowed)
        require(0 <= self.lam < math.inf, "objective.lam", self.lam, "a number >= 0")
        length = self.segment_length
        require(length is None or length >= 1, "objective.segment_length", length, "at least 1")
        allowed = f"nothing, as objective.name = '{self.name}' balances no flow"
        require(length is None or self.balances_flows, "objective.segment_length", length, allowed)

    @property
    def balances_flows(self) -> bool:
        """Whether the objective needs a state flow."""
        return self.name in ("detailed_balance", "subtrajectory_balance")

    @property
    def pathwise(self) -> bool:
        """Whether the objective differentiates through the simulation, hence needs the learner's own rollouts."""
        return self.name == "reverse_kl"

    @property
    def replay_only(self) -> bool:
        """Whether the objective is trained on replay alone."""
        return self.name == "maximum_likelihood"

    @property
    def learns_log_z(self) -> bool:
        """Whether log Z is a parameter of the loss."""
        if self.plugin:
            return uses_log_z(self.name)
        return self.name == "trajectory_balance" or self.balances_flows

    @property
    def plugin(self) -> bool:
        """Whether the loss is a function of the user's own."""
        return self.name not in OBJECTIVES


def objective_names() -> list[str]:
    """Names of the objectives that are built in, then of those that are installed."""
    return [*OBJECTIVES, *sorted(installed(OBJECTIVE_GROUP).keys() - set(OBJECTIVES))]


def log_weights(log_pf: Tensor, log_pb: Tensor, log_reward: Tensor) -> Tensor:
    """Log importance weight log R + sum log P_B - sum log P_F of each trajectory, `[B]`."""
    return log_reward + (log_pb - log_pf).sum(-1)


def trajectory_balance(log_pf: Tensor, log_pb: Tensor, log_reward: Tensor, log_z: Tensor) -> Tensor:
    """Mean squared trajectory-balance residual, with the learned scalar `log_z`.

    Source: Malkin et al. 2022 (arXiv 2201.13259); Lahlou et al. 2023 (arXiv 2301.12594).
    """
    return (log_z - log_weights(log_pf, log_pb, log_reward)).square().mean()


def vargrad(log_pf: Tensor, log_pb: Tensor, log_reward: Tensor, groups: Tensor | None = None) -> Tensor:
    """Log-variance loss: the variance of the log weight over the batch, or the mean over groups of theirs.

    `groups [B]` holds an integer a trajectory; trajectories of one group share a condition, hence a log Z.

    Source: Richter et al. 2020 (arXiv 2010.10436); Richter & Berner 2024 (arXiv 2307.01198).
    """
    log_weight = log_weights(log_pf, log_pb, log_reward)
    if groups is None:
        return log_weight.var(correction=0)
    _, index = groups.unique(return_inverse=True)
    sizes = torch.bincount(index).to(log_weight.dtype)
    means = torch.zeros_like(sizes).index_add(0, index, log_weight) / sizes
    squares = (log_weight - means[index]).square()
    return (torch.zeros_like(sizes).index_add(0, index, squares) / sizes).mean()


def detailed_balance(log_pf: Tensor, log_pb: Tensor, log_flow: Tensor) -> Tensor:
    """Squared residuals of single transitions, summed over steps, averaged over the batch.

    Source: Bengio et al. 2023 (arXiv 2111.09266); Lahlou et al. 2023 (arXiv 2301.12594).
    """
    residual = log_flow[:, :-1] + log_pf - log_flow[:, 1:] - log_pb
    return residual.square().sum(-1).mean()


def subtrajectory_balance(log_pf: Tensor, log_pb: Tensor, log_flow: Tensor, lam: float) -> Tensor:
    """SubTB(lambda): lambda-weighted mean of the squared residuals of all subtrajectories, batch mean.

    The residual from i to j is G_i - G_j with G_n = log F_n - sum_{m<n} (log P_F - log P_B), so the weighted
    sum over pairs is the quadratic form of a graph Laplacian: O(T^2) weights, O(B T) memory for the batch.
    `lam = 0` is its limit, the mean over single transitions.

    Source: Madan et al. 2023 (arXiv 2209.12782), equation 7.
    """
    if lam < 0:
        raise ValueError(f"lam = {lam}: expected a number >= 0")
    steps = log_pf.shape[-1]
    advance = torch.nn.functional.pad((log_pf - log_pb).cumsum(-1), (1, 0))
    potential = log_flow - advance
    potential = potential - potential.mean(-1, keepdim=True).detach()
    index = torch.arange(steps + 1, device=log_pf.device, dtype=torch.float64)
    gap = (index[:, None] - index[None, :]).abs()
    # Weights relative to the longest (lam > 1) or shortest pair: lam ** T overflows single precision.
    exponent = gap - (steps if lam > 1 else 1)
    weight = torch.where(gap > 0, torch.as_tensor(lam, dtype=torch.float64) ** exponent, 0.0)
    weight = (weight / (0.5 * weight.sum())).to(potential.dtype)
    laplacian = torch.diag(weight.sum(-1)) - weight
    return (potential * (potential @ laplacian)).sum(-1).mean()


def forward_looking_log_flow(log_reference: Tensor, times: Tensor, log_reward: Tensor, correction: Tensor) -> Tensor:
    """Log flow (1 - t) log p_ref(x, t) + t log R(x) + correction, at times t in (0, 1].

    Shapes: all [B, N] (`times` [N] or [B, N]), each at the state of its own time; returns [B, N]. `log_reference` is
    the log density of the uncontrolled process, N(0, σ²t I) for the Brownian one, and `correction` a network's
    output. Gradients flow to every argument.

    Source: Pan et al. 2023 (arXiv 2302.01687); Zhang et al. 2024 (DGFS, arXiv 2310.02679).
    """
    return (1.0 - times) * log_reference + times * log_reward + correction


def reverse_kl(log_pf: Tensor, log_pb: Tensor, log_reward: Tensor) -> Tensor:
    """Reverse KL divergence up to log Z: the mean negative log weight, for reparametrised trajectories.

    Source: Zhang & Chen 2022 (PIS, arXiv 2111.15141).
    """
    return -log_weights(log_pf, log_pb, log_reward).mean()


def maximum_likelihood(log_pf: Tensor) -> Tensor:
    """Mean negative log P_F of whole trajectories, for paths that P_B drew from states of the target.

    Source: Sendera et al. 2024 (arXiv 2402.05098), section 3.
    """
    return -log_pf.sum(-1).mean()


def teacher_reward(residual: Tensor, weight: float) -> Tensor:
    """R_T = log(1.001 + w δ²/2) of a student's residuals δ, of any shape; w = `weight` where δ > 0, else 1.

    δ = log R + Σ log P_B - Σ log P_F - log Z is positive where the student samples too little. It is a constant
    to the teacher: detached.

    Source: Kim et al. 2024 (adaptive teachers, arXiv 2410.01432), with the constants of its published implementation,
    which besides leaves out states of low reward; here α log R alone keeps the teacher from them.
    """
    residual = residual.detach()
    return torch.log(1.001 + 0.5 * torch.where(residual > 0, weight, 1.0) * residual.square())


def teacher_log_reward(residual: Tensor, log_reward: Tensor, alpha: float, weight: float) -> Tensor:
    """What a teacher samples from, unnormalised: log R_T(δ) + α log R; residual and log_reward [B] -> [B].

    Source: Kim et al. 2024 (adaptive teachers, arXiv 2410.01432), section 3.2.
    """
    return teacher_reward(residual, weight).log() + alpha * log_reward
