"""The refiner: MALA chains from the learner's terminal states, as a component and as a process."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from driftstream.actors.actor import POLL_S, CallMeter
from driftstream.actors.mala import MalaConfig, Refinement, run_mala
from driftstream.buffers.channels import StreamClient, StreamConfig
from driftstream.buffers.control import RoleContext
from driftstream.envs.errors import require
from driftstream.envs.targets import CountedTarget


@dataclass(frozen=True)
class RefinerConfig:
    """How many refiners there are, and how often one of them runs a cycle: every `every` learner steps."""

    count: int = 1
    threads: int = 1
    every: int = 100
    mala: MalaConfig = field(default_factory=MalaConfig)

    def __post_init__(self) -> None:
        require(self.count >= 0, "refiner.count", self.count, "0 or more")
        require(self.threads >= 1, "refiner.threads", self.threads, "at least 1")
        require(self.every >= 1, "refiner.every", self.every, "at least 1 learner step")


class Refiner:
    """Runs one MALA cycle after another; the adapted step size carries over from cycle to cycle."""

    def __init__(self, target: CountedTarget, config: MalaConfig, generator: torch.Generator) -> None:
        self.target = target
        self.config = config
        self.generator = generator
        self.step_size = config.initial_step_size

    def refine(self, seeds: Tensor) -> Refinement:
        """States accepted by chains from `seeds [C, D]`."""
        refinement = run_mala(seeds, self.target, self.config, self.step_size, self.generator)
        self.step_size = refinement.step_size
        return refinement


def run_refiner(context: RoleContext, refiner: Refiner, stream: StreamConfig) -> None:
    """Ask the learner for seeds, refine them, send what was accepted, until the run stops."""
    client = StreamClient(context.endpoints.stream, context.name, context.epoch, stream, produces="terminals")
    meter = CallMeter(refiner.target)
    try:
        while not context.should_stop:
            if client.wait_for_credit(POLL_S) is None:
                continue
            seeds = None
            while seeds is None and not context.should_stop:
                seeds = client.request_seeds(refiner.config.chains, POLL_S)
            if seeds is None:
                break
            refinement = refiner.refine(seeds.tensors["terminal"])
            client.send(
                "terminals",
                {"terminal": refinement.terminal, "log_reward": refinement.log_reward},
                seeds.policy_version,
                {"energy_evaluations": meter.spent()},
            )
            context.report_metrics(
                {
                    f"refiner/{context.index}/acceptance_rate": refinement.acceptance_rate,
                    f"refiner/{context.index}/step_size": refinement.step_size,
                }
            )
    finally:
        client.close()
