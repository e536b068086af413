"""A refiner to start from: a Metropolis random walk from the states that the learner hands out.

A refiner spreads states better over the target. What it sends back is replayed, so that chains should leave the
target invariant: drop what was not yet in balance, and adapt step sizes before that only.

- Check it: driftstream check my_refiner.py:MyRefiner
- Run it: driftstream train gmm9 --refiners my_refiner.py:MyRefiner:1
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.actors.mala import Refinement
from driftstream.actors.refiner import Refiner
from driftstream.envs.errors import require


class MyRefiner(Refiner):
    """Random-walk Metropolis; `self.step_size` starts at `initial_step_size` and carries over to the next cycle."""

    @dataclass(frozen=True)
    class Options:
        """What a run can set, as --MyRefiner.chains 100: plain values with defaults."""

        chains: int = 300
        mcmc_steps: int = 100
        burn_in: int = 50
        initial_step_size: float = 0.5
        target_acceptance: float = 0.3

        def __post_init__(self) -> None:
            require(0 <= self.burn_in < self.mcmc_steps, "burn_in", self.burn_in, "at least 0, below mcmc_steps")

    @torch.no_grad()
    def refine(self, seeds: Tensor) -> Refinement:
        log_reward = self.target.log_reward(seeds)
        # A seed may be undefined under the target, and there may be none at all.
        defined = log_reward.isfinite()
        x, log_reward = seeds[defined], log_reward[defined]
        rate, kept, kept_log_reward = 0.0, [seeds[:0]], [log_reward[:0]]
        for step in range(self.options.mcmc_steps if len(x) else 0):
            # All randomness comes from `self.generator`, so that a run repeats from its seed.
            noise = torch.randn(x.shape, generator=self.generator, device=x.device)
            proposal = x + self.step_size * noise
            proposal_log_reward = self.target.log_reward(proposal)
            uniform = torch.rand(len(x), generator=self.generator, device=x.device)
            accepted = proposal_log_reward.isfinite() & (uniform.log() < proposal_log_reward - log_reward)
            x = torch.where(accepted.unsqueeze(-1), proposal, x)
            log_reward = torch.where(accepted, proposal_log_reward, log_reward)
            rate = float(accepted.float().mean())
            if step < self.options.burn_in:
                self.step_size *= 1.1 if rate > self.options.target_acceptance else 0.9
            else:
                kept.append(x[accepted])
                kept_log_reward.append(log_reward[accepted])
        return Refinement(torch.cat(kept), torch.cat(kept_log_reward), self.step_size, rate)
