"""Sampling from a target as a Markov decision process, for any TorchRL policy, collector or loss."""

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets_base import Target


class DiffusionSamplingEnv(EnvBase):
    """B samplers that walk T steps through a target's space and are paid log R where they end.

    Observation: `state` [B, D], and `step` [B, 1] (int64), the index n of the time times[n]. `action` [B, D]
    is the next state itself, so that the policy holds the transition kernel. `reward` [B, 1] is log R(x_T) at
    the last step and 0 before; `done` and `terminated` [B, 1] turn true there. Episodes start in the prior of
    the process. The environment keeps nothing of an episode: its TensorDict says all. Gradients flow from
    reward and next state to action.
    """

    def __init__(
        self,
        target: Target,
        process: DiffusionProcess,
        times: Tensor,
        batch_size: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(device=torch.device(device or "cpu"), batch_size=torch.Size([batch_size]))
        self.target = target
        self.process = process
        self.times = times.to(self.device)
        self.sampling_steps = len(times) - 1
        self._generator: torch.Generator | None = None

        vector = torch.Size([batch_size, target.dim])
        scalar = torch.Size([batch_size, 1])
        self.observation_spec = Composite(
            state=Unbounded(vector, dtype=times.dtype, device=self.device),
            step=Bounded(0, self.sampling_steps, scalar, dtype=torch.int64, device=self.device),
            shape=self.batch_size,
        )
        self.action_spec = Unbounded(vector, dtype=times.dtype, device=self.device)
        self.reward_spec = Unbounded(scalar, dtype=times.dtype, device=self.device)
        self.done_spec = Binary(1, scalar, dtype=torch.bool, device=self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        batch_size = self.batch_size[0]
        state = self.process.sample_prior(batch_size, self.target.dim, self._generator, self.device, self.times.dtype)
        step = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.device)
        return TensorDict({"state": state, "step": step}, batch_size=self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        state = tensordict["action"]
        step = (tensordict["step"] + 1).clamp_max(self.sampling_steps)
        done = step == self.sampling_steps
        if done.any():
            # Rows stand at different steps after a partial reset; only those that end pay for log R.
            ended = done.squeeze(-1)
            log_reward = self.target.log_reward(state if ended.all() else state[ended])
            reward = log_reward.new_zeros(done.shape).masked_scatter(done, log_reward)
        else:
            reward = state.new_zeros(done.shape)
        result = {"state": state, "step": step, "reward": reward, "done": done, "terminated": done.clone()}
        return TensorDict(result, batch_size=self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        self._generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
