"""The registry of targets: densities by name, or from a user's own file."""

import inspect
import math
from collections.abc import Callable
from typing import Any

from driftstream.envs.errors import ConfigError, TargetError, require
from driftstream.envs.plugins import installed, load_plugin, plugin_origin
from driftstream.envs.registry import Registry
from driftstream.envs.targets_base import CountedTarget, Target, describe_point, unwrap
from driftstream.envs.targets_funnel import easy_funnel, funnel
from driftstream.envs.targets_gmm import gmm9, gmm25
from driftstream.envs.targets_manywell import ManyWell

__all__ = [
    "TARGETS",
    "CountedTarget",
    "Target",
    "describe_point",
    "make_target",
    "target_names",
    "target_origin",
    "unwrap",
]

TARGET_GROUP = "driftstream.targets"
"""Entry points of installed distributions."""

TARGETS: Registry[Callable[..., Target]] = Registry("target")
TARGETS.register("gmm9")(gmm9)
TARGETS.register("gmm25")(gmm25)
TARGETS.register("funnel")(funnel)
TARGETS.register("easy_funnel")(easy_funnel)
TARGETS.register("manywell")(ManyWell)


def make_target(name: str, /, **options: Any) -> Target:
    """A target by its registered name, an entry point's, or by "package.module:Attr" or "path/file.py:Attr".

    Attr is a Target subclass or a function that returns a Target; both are called with the options. Raises
    ConfigError for an unknown name or option or a value that is not allowed, TargetError where the target's
    own code raises.
    """
    expected = "a Target subclass or a function that returns a Target"
    built_in = TARGETS.names()
    if name in built_in:
        factory = TARGETS.get(name)
    else:
        factory = load_plugin(name, TARGET_GROUP, built_in, "target", "path/file.py:Class")
    require(callable(factory), "target", name, expected)
    _check_options(name, factory, options)
    try:
        target = factory(**options)
    except ConfigError:
        raise
    except Exception as error:
        raise TargetError(f"target {name!r} raised {type(error).__name__}: {error}") from error
    require(isinstance(target, Target), "target", name, expected)
    target.name = target.name or name.rpartition(":")[2]
    dim = getattr(target, "dim", None)
    require(isinstance(dim, int) and dim >= 1, f"{target.name}.dim", dim, "a positive integer")
    noise, allowed = target.noise_range, "(wide, narrow), two variances of which the first is larger, or None"
    require(noise is None or _is_falling(noise), f"{target.name}.noise_range", noise, allowed)
    return target


def _is_falling(noise: object) -> bool:
    if not (isinstance(noise, tuple) and len(noise) == 2 and all(isinstance(value, int | float) for value in noise)):
        return False
    return 0 < noise[1] < noise[0] < math.inf


def target_names() -> list[str]:
    """Names of the targets that are registered or installed, sorted."""
    return sorted({*TARGETS.names(), *installed(TARGET_GROUP)})


def target_origin(name: str) -> str:
    """Where a target comes from: "built in", a distribution, or a file or module."""
    return plugin_origin(name, TARGET_GROUP, TARGETS.names())


def _check_options(name: str, factory: Callable[..., Target], options: dict[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for option, value in options.items():
            allowed = f"an option of {name} ({', '.join(known) or 'it has none'})"
            require(option in known, option, value, allowed)
    for parameter in parameters:
        needed = parameter.name in known and parameter.default is parameter.empty
        given = parameter.name in options
        require(given or not needed, parameter.name, None, f"a value, as {name} needs one")
