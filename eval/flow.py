"""How far a learned state flow is from the true one, where that is known in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.actors.policy import DiffusionPolicy
from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets import Target, unwrap
from driftstream.envs.targets_gmm import GaussianMixture
from driftstream.learner.losses import state_log_flow


@dataclass(frozen=True)
class KnownFlow:
    """The flow log F(x, t_n) = log Z + log p_n(x) at the interior times of a grid, p_n the law of x_n under P_B.

    `times` [T-1], and p_n for each of them. A fixed P_B shrinks x_T to a_n x_T and adds N(0, b_n I), so that a
    mixture Σ w_k N(m_k, s² I) of ends makes x_n ~ Σ w_k N(a_n m_k, (a_n² s² + b_n) I).
    """

    log_z: float
    times: Tensor
    marginals: tuple[GaussianMixture, ...]

    def log_flow(self, states: Tensor) -> Tensor:
        """The true log F at states [B, T-1, D] that stand at `times` -> [B, T-1], in float64."""
        columns = zip(self.marginals, states.double().unbind(1), strict=True)
        return self.log_z + torch.stack([marginal.log_reward(x) for marginal, x in columns], 1)

    @torch.no_grad()
    def residual(self, policy: DiffusionPolicy, process: DiffusionProcess, target: Target, states: Tensor) -> Tensor:
        """Learned minus true log F [B, T-1], in nats (float64), at all interior states of paths [B, T+1, D].

        No gradients. A forward-looking flow evaluates the target at the states.
        """
        inside = states[:, 1:-1]
        return state_log_flow(policy, process, target, inside, self.times).double() - self.log_flow(inside)


def known_flow(policy: DiffusionPolicy, process: DiffusionProcess, target: Target, times: Tensor) -> KnownFlow | None:
    """The flow that a policy's state flow should have learned on the grid `times` [T+1], where it is known.

    None unless the policy has a state flow and a fixed P_B, the target is a Gaussian mixture with a known log Z,
    and the grid has a time inside.
    """
    mixture = unwrap(target)
    learned = policy.flow_net is not None and policy.backward_net is None
    if not (learned and isinstance(mixture, GaussianMixture) and target.log_z is not None and len(times) > 2):
        return None
    moments = torch.stack(process.bridge_moments(times), 1)[1:-1].tolist()
    marginals = tuple(mixture.noised(scale, variance) for scale, variance in moments)
    return KnownFlow(target.log_z, times[1:-1], marginals)
