"""Plug-ins by name: what installed distributions offer as entry points, and what a user's own code holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from driftstream.envs.errors import ConfigError
from driftstream.envs.registry import load_object, suggest

BUILT_IN = "built in"


@dataclass(frozen=True)
class Installed:
    """Where an entry point's object is, "package.module:Attr", and the distribution that brings it."""

    place: str
    distribution: str


def installed(group: str) -> dict[str, Installed]:
    """The entry points of a group by name, as the distributions declare them: nothing is imported."""
    return {
        entry.name: Installed(f"{entry.module}:{entry.attr}", entry.dist.name if entry.dist else entry.module)
        for entry in entry_points(group=group)
    }


def load_plugin(name: str, group: str, built_in: Iterable[str], field: str, form: str = "file.py:Class") -> Any:
    """The object of an entry point of `group`, or of "package.module:Attr" or "path/file.py:Attr".

    `built_in` are the names that are known besides, and `form` what a place may look like, for the message.

    Raises:
        ConfigError: an unknown name, or code that does not import; under the name `field`.
    """
    if ":" in name:
        return load_object(name, field)
    offered = installed(group)
    if name not in offered:
        known = sorted({*built_in, *offered})
        raise ConfigError(field, name, f"one of {', '.join(known)}, or {form}{suggest(name, known)}")
    place, distribution = offered[name].place, offered[name].distribution
    try:
        return load_object(place, field)
    except ConfigError as error:
        raise ConfigError(field, name, f"{error.allowed}, as {distribution} installs it at {place}") from error


def plugin_origin(name: str, group: str, built_in: Iterable[str]) -> str:
    """Where a named thing comes from: "built in", the distribution's name, or the file or module of a place."""
    if name in built_in:
        return BUILT_IN
    offered = installed(group).get(name)
    return name.rpartition(":")[0] if offered is None else offered.distribution
