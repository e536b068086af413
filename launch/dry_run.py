"""`--dry-run`: what a command resolves to, where its roles would run, whether the target's gradient is right."""

from pathlib import Path

import torch
from torch import Tensor

from driftstream.envs.targets import CountedTarget, make_target
from driftstream.eval.monitor import resolve_mode
from driftstream.launch.config import RunConfig, to_toml
from driftstream.launch.roles import resolve_device
from driftstream.launch.run_directory import RunDirectory

TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-2}


def show_plan(config: RunConfig, root: Path) -> int:
    """Print configuration and placement, call the target once; returns 1 if its gradient is wrong."""
    print(to_toml(config))
    for line in placement(config, root):
        print(f"# {line}")
    target = CountedTarget(make_target(config.target, **config.target_options))
    error, dtype = gradient_error(target, config.seed)
    good = error < TOLERANCE[dtype]
    verdict = "agrees with" if good else "DISAGREES with"
    print(f"# target: score {verdict} central differences (largest relative error {error:.1e}, {dtype})")
    return 0 if good else 1


def placement(config: RunConfig, root: Path) -> list[str]:
    """Which processes the run would start, and what they share."""
    device = resolve_device(config.device)
    lines = [f"run directory: {RunDirectory(root).shown}", f"W&B: {resolve_mode(config.monitor.wandb)}"]
    learner = f"learner: {device}, {config.learner.threads} thread(s)"
    if config.sync:
        return [*lines, f"{learner}; every role in one process"]
    lines.append(f"{learner}, a process of its own")
    if config.data == "stream":
        lines.append(f"actors: {config.actor.count} process(es), {config.actor.threads} thread(s) each")
        lines.append(f"refiners: {config.refiner.count} process(es), {config.refiner.threads} thread(s) each")
        where = "RUN/sockets" if config.stream.transport == "ipc" else config.stream.host
        lines.append(f"stream: {config.stream.transport}, {where}")
    else:
        lines.append("no actors or refiners: the learner rolls out itself")
    return [*lines, "evaluator: 1 process, at low priority"]


def gradient_error(target: CountedTarget, seed: int) -> tuple[float, torch.dtype]:
    """Largest error of the target's score at a random point, relative to its largest entry.

    Against central differences of the log reward, in float64, or in float32 for a target that keeps to that.
    """
    generator = torch.Generator().manual_seed(seed)
    point = torch.randn(target.dim, generator=generator, dtype=torch.float64)
    dtype = target.log_reward(point[None]).dtype
    if dtype != torch.float64:
        dtype = torch.float32
    step = 1e-5 if dtype == torch.float64 else 1e-2
    shifts = step * torch.eye(target.dim, dtype=torch.float64)
    points = torch.cat([point + shifts, point - shifts]).to(dtype)
    above, below = target.log_reward(points).double().split(target.dim)
    expected = (above - below) / (2 * step)
    score = target.score(point[None].to(dtype))[0].double()
    return _relative_error(score, expected), dtype


def _relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
