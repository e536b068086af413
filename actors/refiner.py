"""Refiners: chains from the learner's terminal states, as components and as a process."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from driftstream.actors.kinds import Option, blaming, check_kinds, is_built_in
from driftstream.actors.mala import MalaConfig, Refinement, run_mala
from driftstream.actors.meter import POLL_S, CallMeter
from driftstream.buffers.channels import StreamClient, StreamConfig
from driftstream.buffers.control import RoleContext
from driftstream.envs.errors import PluginError, require
from driftstream.envs.targets import CountedTarget

CHAINS = 300
"""Seeds that a refiner asks for whose options do not say how many chains it runs."""


@dataclass(frozen=True)
class RefinerConfig:
    """How many refiners there are, of which kinds, and how often one of them runs a cycle.

    A cycle falls due every `every` learner steps. `kinds` counts refiners by kind; without it all `count` are
    `mala`. `options` are those of kinds other than `mala`, by the kind's short name.
    """

    count: int = 1
    threads: int = 1
    every: int = 100
    kinds: dict[str, int] = field(default_factory=dict)
    options: dict[str, dict[str, Option]] = field(default_factory=dict)
    mala: MalaConfig = field(default_factory=MalaConfig)

    def __post_init__(self) -> None:
        require(self.count >= 0, "refiner.count", self.count, "0 or more")
        require(self.threads >= 1, "refiner.threads", self.threads, "at least 1")
        require(self.every >= 1, "refiner.every", self.every, "at least 1 learner step")
        check_kinds(self.kinds, "refiner.kinds")


class Refiner(ABC):
    """Base class of refiners: one cycle after another, from the states that the learner hands out.

    `Options` is a frozen dataclass whose fields are flags, or None. What carries over from cycle to cycle is
    `step_size` (NaN where there is none), which a resumed run goes on with.
    """

    Options: ClassVar[type | None] = None

    def __init__(self, target: CountedTarget, options: Any, generator: torch.Generator) -> None:
        self.target = target
        self.options = options
        self.generator = generator
        self.step_size = float(getattr(options, "initial_step_size", float("nan")))

    @property
    def chains(self) -> int:
        """How many states a cycle starts from."""
        return int(getattr(self.options, "chains", CHAINS))

    @abstractmethod
    def refine(self, seeds: Tensor) -> Refinement:
        """States better spread over the target than `seeds [C, D]`, with their log rewards; any number of them."""

    def run_cycle(self, seeds: Tensor) -> Refinement:
        """`refine`, with what it returns checked.

        Raises:
            PluginError: a plug-in raises, or its states or log rewards have a wrong shape or type, or are not finite.
        """
        name = type(self).__name__
        with blaming(f"refiner {name}", is_built_in(self)):
            refinement = self.refine(seeds)
        if not isinstance(refinement, Refinement):
            raise PluginError(f"refiner {name}: refine returned {type(refinement).__name__}: expected a Refinement")
        terminal, log_reward = refinement.terminal, refinement.log_reward
        if not isinstance(terminal, Tensor) or not isinstance(log_reward, Tensor):
            raise PluginError(f"refiner {name}: terminal and log_reward: expected tensors")
        if terminal.ndim != 2 or terminal.shape[1] != self.target.dim or log_reward.shape != terminal.shape[:1]:
            shapes = f"terminal {list(terminal.shape)}, log_reward {list(log_reward.shape)}"
            raise PluginError(f"refiner {name}: {shapes}: expected [N, {self.target.dim}] and [N]")
        if not bool(terminal.isfinite().all()) or not bool(log_reward.isfinite().all()):
            raise PluginError(f"refiner {name}: states or log rewards that are not finite: expected none")
        return refinement


class ChainRefiner(Refiner):
    """A refiner whose cycle is a function of (seeds, target, options, step size, generator)."""

    cycle: ClassVar[Callable[..., Refinement]]

    def refine(self, seeds: Tensor) -> Refinement:
        refinement = type(self).cycle(seeds, self.target, self.options, self.step_size, self.generator)
        self.step_size = refinement.step_size
        return refinement


class MalaRefiner(ChainRefiner):
    """Chains of the Metropolis-adjusted Langevin algorithm; the adapted step size carries over."""

    Options = MalaConfig
    cycle = staticmethod(run_mala)


def run_refiner(context: RoleContext, refiner: Refiner, stream: StreamConfig) -> None:
    """Ask the learner for seeds, refine them, send what was accepted, until the run stops."""
    client = StreamClient(context.endpoints.stream, context.name, context.epoch, stream, produces="terminals")
    meter = CallMeter(refiner.target)
    refiner.target.on_call = context.turn
    context.control.doing = refiner.target.doing
    try:
        while not context.should_stop:
            context.turn()
            if client.wait_for_credit(POLL_S) is None:
                continue
            seeds = None
            while seeds is None and not context.should_stop:
                context.turn()
                seeds = client.request_seeds(refiner.chains, POLL_S)
            if seeds is None:
                break
            refinement = refiner.run_cycle(seeds.tensors["terminal"])
            client.send(
                "terminals",
                {"terminal": refinement.terminal, "log_reward": refinement.log_reward},
                seeds.policy_version,
                {"energy_evaluations": meter.spent()},
            )
            context.report_metrics(_figures(context.label, refinement))
    finally:
        client.close()


def _figures(label: str, refinement: Refinement) -> Mapping[str, float]:
    return {
        f"refiner/{label}/acceptance_rate": refinement.acceptance_rate,
        f"refiner/{label}/step_size": refinement.step_size,
    }
