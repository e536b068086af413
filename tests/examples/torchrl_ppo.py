"""Sampling as reinforcement learning: TorchRL's collector, advantage and PPO loss train a diffusion sampler.

The environment pays log R(x_T) at the end. `PathReward` adds log P_B(x_n | x_{n+1}) - log P_F(x_{n+1} | x_n) to every
step, so that an episode's undiscounted return is its log weight. The mean return is then the lower bound on log Z,
and raising it lowers KL(P_F || P_B R/Z), the reverse KL of whole paths.

The entropy is in the reward and not in the loss, as only so is it exact: log P_F is the acting policy's, detached, and
misses no gradient, since E[∇ log P_F] = 0. (For the later epochs on a batch it holds to first order, as all of PPO
does.) The loss's entropy bonus would leave out how a step changes the entropy of the steps that follow. Besides, every
path of a perfect sampler returns log Z: noise vanishes as the policy improves, and values become log flows.

    python tests/examples/torchrl_ppo.py --target gmm9 --steps 10 --batches 80
"""

import time
from dataclasses import dataclass

import torch
import tyro
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import Transform, TransformedEnv
from torchrl.modules import ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig, StateTimeNet
from driftstream.actors.rollout import rollout, score_trajectories
from driftstream.actors.torchrl_policy import make_torchrl_policy
from driftstream.envs.grids import uniform_grid
from driftstream.envs.processes import BrownianProcess, DiffusionProcess
from driftstream.envs.sampling_env import DiffusionSamplingEnv
from driftstream.envs.targets import CountedTarget, make_target
from driftstream.eval.estimators import effective_sample_size, log_z_importance, log_z_lower_bound


@dataclass(frozen=True)
class Options:
    """`batches` of `episodes` with T = `steps`; each is used for `epochs` of `minibatches` gradient steps."""

    target: str = "gmm9"
    steps: int = 10
    batches: int = 80
    episodes: int = 512
    epochs: int = 5
    minibatches: int = 4
    learning_rate: float = 2e-3
    seed: int = 0


class PathReward(Transform):
    """Adds log P_B - log P_F of every step to `reward` [B, 1]; a random x_0 counts to the first step.

    P_B is fixed; log P_F is what the acting policy reports, so that it must act without exploration. Gradients flow
    as through the environment; a collector takes none.
    """

    times: Tensor

    def __init__(self, process: DiffusionProcess, times: Tensor) -> None:
        super().__init__()
        self.process = process
        self.register_buffer("times", times)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        step, state = tensordict["step"], tensordict["state"]
        pair = torch.stack([state, next_tensordict["state"]], dim=1)
        log_pb = self.process.log_pb(pair, self.times[torch.cat([step, step + 1], dim=1)])
        log_pf = tensordict["action_log_prob"].unsqueeze(1) + (step == 0) * self.process.log_prior(state).unsqueeze(1)
        return next_tensordict.set("reward", next_tensordict["reward"] + log_pb - log_pf)


class LogFlow(nn.Module):
    """The critic's network: `(state [..., D], step [..., 1]) -> [..., 1]`."""

    times: Tensor

    def __init__(self, dim: int, times: Tensor) -> None:
        super().__init__()
        self.net = StateTimeNet(dim, outputs=1, hidden=64, harmonics=64)
        self.register_buffer("times", times)

    def forward(self, state: Tensor, step: Tensor) -> Tensor:
        return self.net(state, self.net.embed(self.times)[step.squeeze(-1)])


def main(options: Options) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    target, times = CountedTarget(make_target(options.target)), uniform_grid(options.steps)
    process = BrownianProcess(target.diffusion_variance)
    policy = DiffusionPolicy(target.dim, PolicyConfig(learned_variance=True))
    env = DiffusionSamplingEnv(target, process, times, batch_size=options.episodes)
    env = TransformedEnv(env, PathReward(process, times))

    actor = make_torchrl_policy(policy, process, target, times)
    critic = ValueOperator(LogFlow(target.dim, times), in_keys=["state", "step"])
    frames = options.episodes * options.steps  # whole episodes: all of them end at step T
    budget = {"frames_per_batch": frames, "total_frames": frames * options.batches}
    collector = Collector(env, actor, auto_register_policy_transforms=False, **budget)
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=False, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.batches)

    began = time.monotonic()
    for batch, episodes in enumerate(collector):
        if batch % 10 == 0 or batch == options.batches - 1:
            bound = log_z_lower_bound(episodes["next", "reward"].sum(dim=(1, 2)))
            seconds = time.monotonic() - began
            print(f"batch {batch:3d}  log Z >= {bound:7.3f}  energy calls {target.calls:7,d}  {seconds:5.1f} s")
        for _ in range(options.epochs):
            with torch.no_grad():
                advantage(episodes)
            for transitions in episodes.reshape(-1)[torch.randperm(frames)].chunk(options.minibatches):
                losses = loss(transitions)
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
                optimizer.step()
        schedule.step()
    collector.shutdown()

    # The network that PPO trained is the policy of `rollout`, of the scorer and of all that is built on them.
    with torch.no_grad():
        paths = rollout(policy, process, target, times, 2000)
        log_pf, log_pb = score_trajectories(policy, process, paths["states"], times)
    log_weight = paths["log_reward"] + log_pb.sum(1) - log_pf.sum(1)
    lower, importance = log_z_lower_bound(log_weight), log_z_importance(log_weight)
    ess = effective_sample_size(log_weight)
    print(f"rollout: log Z >= {lower:.3f}, by importance {importance:.3f}, true {target.log_z}, ESS {ess:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
