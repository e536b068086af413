"""Objectives of a user's own: functions of per-step log densities, by place or entry point."""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from driftstream.envs.errors import ConfigError, PluginError, require
from driftstream.envs.plugins import installed, load_plugin

OBJECTIVE_GROUP = "driftstream.objectives"
"""Entry points of installed distributions."""

Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(log_pf [B, T], log_pb [B, T], log_reward [B], log_z) -> scalar loss."""


def is_plugin(name: str) -> bool:
    """Whether a name is a place, "package.module:function" or "file.py:function", or an entry point's."""
    return ":" in name or name in installed(OBJECTIVE_GROUP)


@functools.cache
def load_objective(name: str) -> Objective:
    """The function of a place or entry point.

    Raises:
        ConfigError: no such function, code that does not import, or other parameters than an objective has.
    """
    objective = load_plugin(name, OBJECTIVE_GROUP, (), "objective.name", "file.py:function")
    allowed = "a function (log_pf, log_pb, log_reward, log_z) -> loss"
    require(callable(objective) and not isinstance(objective, type), "objective.name", name, allowed)
    try:
        inspect.signature(objective).bind(None, None, None, None)
    except TypeError as error:
        raise ConfigError("objective.name", name, f"{allowed} ({error})") from None
    except ValueError:
        pass  # Written in C: it does not tell.
    return objective


@functools.cache
def uses_log_z(name: str) -> bool:
    """Whether the loss depends on log Z, tried on a small batch; taken to be so if it refuses that batch."""
    steps = torch.linspace(-2.0, -1.0, 12)
    log_z = torch.zeros((), requires_grad=True)
    try:
        loss = load_objective(name)(steps.view(4, 3), steps.flip(0).view(4, 3), steps[:4].clone(), log_z)
        return bool(loss.requires_grad)
    except Exception:
        return True


def plugin_loss(name: str, log_pf: Tensor, log_pb: Tensor, log_reward: Tensor, log_z: Tensor) -> Tensor:
    """The loss of a user's objective; gradients flow to whatever it makes use of.

    Raises:
        PluginError: the function raises, or returns something else than a scalar with a gradient.
    """
    objective = load_objective(name)
    try:
        # A copy: what the function did to it in place, replay would keep.
        loss = objective(log_pf, log_pb, log_reward.clone(), log_z)
    except Exception as error:
        raise PluginError(f"objective {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(loss, Tensor):
        raise PluginError(f"objective {name} returned {type(loss).__name__}: expected a scalar tensor")
    if loss.shape or not loss.is_floating_point():
        returned = f"a tensor of shape {list(loss.shape)} and type {loss.dtype}"
        raise PluginError(f"objective {name} returned {returned}: expected a floating-point scalar")
    differentiable = torch.is_grad_enabled() and (log_pf.requires_grad or log_z.requires_grad)
    if differentiable and not loss.requires_grad:
        raise PluginError(f"objective {name} returned a loss without gradient: expected one to differentiate")
    return loss
