"""The policy as TorchRL modules, for `DiffusionSamplingEnv` and whatever else drives a TorchRL environment.

Head -> exploration -> sampler: exploration widens the scale before the action is drawn, so that the
log-probability that TorchRL reports is that of the behaviour policy.
"""

from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor

from driftstream.actors.policy import DiffusionPolicy
from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets_base import Target


class TransitionHead(nn.Module):
    """Mean and scale of the next state: `(state [B, D], step [B, 1]) -> (loc [B, D], scale [B, D])`."""

    times: Tensor

    def __init__(self, policy: DiffusionPolicy, process: DiffusionProcess, target: Target, times: Tensor) -> None:
        super().__init__()
        self.policy = policy
        self.process = process
        self.target = target
        self.register_buffer("times", times)

    def forward(self, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        start = step.squeeze(-1).clamp_max(len(self.times) - 2)
        kernels = self.process.kernels_like(self.times, self.times)
        keep, gain, variance = (part[start].unsqueeze(-1) for part in kernels[:3])
        score = self.target.score(state) if self.policy.langevin else None
        embedding = self.policy.embed_times(self.times[:-1], self.process)
        drift, log_var = self.policy(state, embedding[start], score)
        if log_var is not None:
            variance = variance * log_var.exp()
        return keep * state + gain * drift, variance.sqrt().expand_as(state)


class ExplorationScale(nn.Module):
    """Adds Gaussian exploration's variance, std^2 * gain (dt for the Brownian process): `(scale, step) -> scale`."""

    gain: Tensor

    def __init__(self, std: float, process: DiffusionProcess, times: Tensor) -> None:
        super().__init__()
        self.std = std
        self.register_buffer("gain", process.kernels_like(times, times).gain)

    def forward(self, scale: Tensor, step: Tensor) -> Tensor:
        start = step.squeeze(-1).clamp_max(len(self.gain) - 1)
        return (scale.square() + self.std**2 * self.gain[start].unsqueeze(-1)).sqrt()


def make_torchrl_policy(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target,
    times: Tensor,
    exploration_std: float = 0.0,
) -> ProbabilisticActor:
    """The stochastic policy of `DiffusionSamplingEnv`: reads `state` and `step`, writes `action`.

    Also writes `loc`, `scale` and the log-probability of the action under the behaviour policy. With
    `torch.manual_seed` before it, `env.rollout` draws the same trajectories as `rollout`.
    """
    head = TensorDictModule(
        TransitionHead(policy, process, target, times), in_keys=["state", "step"], out_keys=["loc", "scale"]
    )
    explore = TensorDictModule(
        ExplorationScale(exploration_std, process, times), in_keys=["scale", "step"], out_keys=["scale"]
    )
    return ProbabilisticActor(
        TensorDictSequential(head, explore) if exploration_std else head,
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=IndependentNormal,
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=True,
    )
