"""From a resolved configuration to the components of each role, and from a role's name to its function.

The components are the same whether every role has a process of its own or all of them share one (`--sync`).
"""

import logging
from dataclasses import replace

import torch

from driftstream.actors.actor import ExplorationActor, run_actor
from driftstream.actors.policy import DiffusionPolicy
from driftstream.actors.refiner import Refiner, run_refiner
from driftstream.buffers.control import RoleContext
from driftstream.envs.errors import ConfigError
from driftstream.envs.processes import make_process
from driftstream.envs.targets import CountedTarget, make_target
from driftstream.eval.evaluator import Evaluator, run_evaluator
from driftstream.launch.config import RunConfig
from driftstream.launch.seeding import derive_seed
from driftstream.learner.learner import Learner
from driftstream.learner.role import run_learner

# It announces the allocation of every replay memory.
logging.getLogger("torchrl").setLevel(logging.WARNING)


def resolve_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: a device that torch does not know or that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Some devices (meta) hold tensors and cannot draw random numbers.
        torch.zeros(1, device=torch.Generator(device).device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", device, "auto, cpu, or a device that is there, such as cuda:0") from error


def build_target(config: RunConfig, device: torch.device) -> CountedTarget:
    """The run's target, counting its evaluations."""
    return CountedTarget(make_target(config.target, **config.target_options).to(device))


def build_learner(config: RunConfig, seed: int) -> Learner:
    """The learner; its seed decides the initial parameters and every random draw of its own."""
    device = resolve_device(config.device)
    return Learner(
        build_target(config, device),
        make_process(config.process),
        config.grid,
        config.policy,
        config.replay,
        config.objective,
        config.optim,
        config.learner,
        config.rollout,
        seed,
        device,
    )


def build_on_policy_actors(config: RunConfig, learner: Learner, seed: int) -> list[ExplorationActor]:
    """Who rolls out in the learner's process: nobody where the learner differentiates through its own simulation."""
    return [] if config.objective.pathwise else [build_actor(config, seed, learner.policy)]


def build_actor(config: RunConfig, seed: int, policy: DiffusionPolicy | None = None) -> ExplorationActor:
    """An actor, with a policy of its own or sharing the learner's."""
    target = build_target(config, torch.device("cpu") if policy is None else policy_device(policy))
    device = target.device
    if policy is None:
        policy = DiffusionPolicy(target.dim, config.policy).requires_grad_(False)
    exploration = config.exploration
    if config.data == "on_policy":
        exploration = replace(exploration, std=0.0)
    return ExplorationActor(
        policy,
        make_process(config.process),
        target,
        config.grid,
        exploration,
        config.learner.batch_size,
        torch.Generator(device).manual_seed(seed),
    )


def policy_device(policy: DiffusionPolicy) -> torch.device:
    """The device that a policy's parameters are on."""
    return next(policy.parameters()).device


def build_refiner(config: RunConfig, seed: int) -> Refiner:
    """A refiner; like actors it works on the CPU, whatever the learner's device."""
    device = torch.device("cpu")
    generator = torch.Generator(device).manual_seed(seed)
    return Refiner(build_target(config, device), config.refiner.mala, generator)


def build_evaluator(config: RunConfig, seed: int | None = None) -> Evaluator:
    """The evaluator; by default its draws depend on the run's seed alone, so that evaluations compare."""
    device = torch.device("cpu")
    if seed is None:
        seed = derive_seed(config.seed, "evaluator")
    return Evaluator(
        build_target(config, device),
        make_process(config.process),
        config.grid,
        config.policy,
        config.eval,
        seed,
        device,
    )


def run_role(role: str, config: RunConfig, context: RoleContext) -> None:
    """Run one role in this process until it is done or the run stops."""
    threads = {
        "learner": config.learner.threads,
        "actor": config.actor.threads,
        "refiner": config.refiner.threads,
    }
    torch.set_num_threads(threads.get(role, 1))
    if role == "learner":
        learner = build_learner(config, context.seed)
        on_policy_actors = None
        if config.data == "on_policy":
            on_policy_actors = build_on_policy_actors(config, learner, derive_seed(context.seed, "actor"))
        run_learner(
            context,
            learner,
            config.limits,
            config.checkpoint,
            config.stream,
            config.refiner.every,
            on_policy_actors,
        )
    elif role == "actor":
        run_actor(context, build_actor(config, context.seed), config.stream)
    elif role == "refiner":
        run_refiner(context, build_refiner(config, context.seed), config.stream)
    elif role == "evaluator":
        run_evaluator(context, build_evaluator(config))
    else:
        raise ValueError(f"unknown role {role!r}")
