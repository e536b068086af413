"""`--dry-run`: what a command resolves to, where its roles would run, whether the target's gradient is right."""

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from driftstream.actors import native
from driftstream.envs.targets import CountedTarget, Target, make_target
from driftstream.eval.monitor import resolve_mode
from driftstream.launch.config import RunConfig, to_toml
from driftstream.launch.describe import describe_kinds
from driftstream.launch.roles import resolve_device
from driftstream.launch.run_directory import RunDirectory

STEP = {torch.float64: 1e-5, torch.float32: 1e-2}
TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-2}


def show_plan(config: RunConfig, root: Path) -> int:
    """Print configuration and placement, call the target at a point; returns 1 if a gradient is wrong."""
    print(to_toml(config))
    for line in placement(config, root):
        print(f"# {line}")
    target = make_target(config.target, **config.target_options)
    errors, dtype = gradient_errors(target, config.seed)
    for method, error in errors.items():
        verdict = "agrees with" if error < TOLERANCE[dtype] else "DISAGREES with"
        print(f"# target: {method} {verdict} central differences (largest relative error {error:.1e}, {dtype})")
    return 0 if all(error < TOLERANCE[dtype] for error in errors.values()) else 1


def placement(config: RunConfig, root: Path) -> list[str]:
    """Which processes the run would start, and what they share."""
    device = resolve_device(config.device)
    lines = [f"run directory: {RunDirectory(root).shown}", f"W&B: {resolve_mode(config.monitor.wandb)}"]
    learner = f"learner: {device}, {config.learner.threads} thread(s)"
    lines.append(f"{learner}; every role in one process" if config.sync else f"{learner}, a process of its own")
    if device.type == "cpu":
        lines.append(f"policies: {native.describe()}")
    if config.data == "on_policy":
        lines.append("no actors or refiners: the learner rolls out itself")
    for role, part in (("actor", config.actor), ("refiner", config.refiner)) if config.data == "stream" else ():
        shared = "" if config.sync else f"process(es), {part.threads} thread(s) each"
        lines.append(f"{role}s: {part.count} {shared}".rstrip())
        for kind, count in part.kinds.items():
            lines.append(f"  {describe_kinds({kind: count}, part.options)}{_from(kind)}")
    if config.sync:
        return lines
    if config.data == "stream":
        where = "RUN/sockets" if config.stream.transport == "ipc" else config.stream.host
        lines.append(f"stream: {config.stream.transport}, {where}")
    return [*lines, "evaluator: 1 process, at low priority"]


def _from(kind: str) -> str:
    """Where a kind's class is, if its name does not say so."""
    place = kind.rpartition(":")[0]
    return f", from {place}" if place else ""


@torch.no_grad()
def gradient_errors(target: Target, seed: int) -> tuple[dict[str, float], torch.dtype]:
    """How far the target's gradients at a random point are from central differences of its log reward.

    By method, the largest error relative to the largest entry; in float64, or in the returned float32 for a target
    that computes in that. Raises TargetError where the target fails in float32, which is what training gives it.
    """
    generator = torch.Generator().manual_seed(seed)
    point = torch.randn(1, target.dim, generator=generator, dtype=torch.float64)
    counted = CountedTarget(target)
    errors = _gradient_errors(counted, point.float())
    # It need not take float64.
    with suppress(Exception):
        log_reward = target.log_reward(point)
        # Whatever its dtype says, a value that float32 holds exactly was computed in float32.
        if not torch.equal(log_reward.float().double(), log_reward.double()):
            return _gradient_errors(counted, point), torch.float64
    return errors, torch.float32


def _gradient_errors(target: Target, point: Tensor) -> dict[str, float]:
    step = STEP[point.dtype]
    shifts = step * torch.eye(target.dim, dtype=point.dtype)
    above, below = target.log_reward(torch.cat([point + shifts, point - shifts])).double().split(target.dim)
    expected = (above - below) / (2 * step)
    score_of_pair = target.log_reward_and_score(point)[1]
    scores = {"score": target.score(point), "log_reward_and_score": score_of_pair}
    return {method: _relative_error(score[0], expected) for method, score in scores.items()}


def _relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
