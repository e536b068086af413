"""Energies whose cost is known: what actors do beside them is what does not scale."""

import time

import torch
from torch import Tensor

from driftstream.envs.targets import Target


class Sleeping(Target):
    """A standard Gaussian of which every call takes `seconds` and no processor, as one that is computed elsewhere."""

    name = "sleeping"
    log_z = 0.0

    def __init__(self, dim: int = 2, seconds: float = 0.02) -> None:
        self.dim, self.seconds = dim, seconds

    def log_reward(self, x: Tensor) -> Tensor:
        """-|x|²/2 - D log(2π)/2: x [..., D] -> [...]."""
        return self.log_reward_and_score(x)[0]

    def score(self, x: Tensor) -> Tensor:
        """-x [..., D]."""
        return self.log_reward_and_score(x)[1]

    def log_reward_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, in one call."""
        self.spend()
        return -0.5 * (x.square() + torch.tensor(2 * torch.pi).log()).sum(-1), -x

    def spend(self) -> None:
        """Take the time of one call."""
        time.sleep(self.seconds)


class Computing(Sleeping):
    """The same with a processor at work for `seconds` in every call."""

    name = "computing"

    def spend(self) -> None:
        """Take the processor for the time of one call."""
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            pass
