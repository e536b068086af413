"""Kinds of actors and refiners: how many of each run, by built-in name, entry point, module or file.

What a kind is written as ("explore", "package.module:Class", "./mine.py:Mine") says where its class is;
its short name ("explore", "Class", "Mine") is what logs, metrics and flags call it.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping

from driftstream.envs.errors import ConfigError, PluginError, TargetError, require

Option = int | float | bool | str


def short_name(kind: str) -> str:
    """What a kind is called in logs, metrics and flags: the class's name for one that is given by its place."""
    return kind.rpartition(":")[2]


def is_built_in(part: object) -> bool:
    """Whether an actor, a refiner or its class is driftstream's own, and not a plug-in."""
    kind = part if isinstance(part, type) else type(part)
    return kind.__module__.startswith("driftstream.actors.")


@contextlib.contextmanager
def blaming(who: str, built_in: bool) -> Iterator[None]:
    """Turn whatever a plug-in's code raises into a PluginError that names it; errors of targets are theirs."""
    try:
        yield
    except (TargetError, PluginError):
        raise
    except Exception as error:
        if built_in:
            raise
        raise PluginError(f"{who} raised {type(error).__name__}: {error}") from error


def parse_kinds(text: str, field: str) -> dict[str, int]:
    """Counts by kind of "explore:2,teacher:1,./mine.py:Mine:1"; a count of 1 may be left out.

    Raises ConfigError, under the name `field`, for an empty or double kind or a count that is none.
    """
    kinds: dict[str, int] = {}
    for entry in text.split(","):
        kind, colon, last = entry.strip().rpartition(":")
        is_count = bool(colon) and re.fullmatch(r"[+-]?[0-9]{1,6}", last, re.ASCII) is not None
        if not is_count:
            kind, last = entry.strip(), "1"
        if not kind or kind in kinds:
            problem = "each kind once" if kind else "a number, or kinds with counts such as explore:2,teacher:1"
            raise ConfigError(field, text, problem)
        kinds[kind] = int(last)
    check_kinds(kinds, field)
    return kinds


def check_kinds(kinds: Mapping[str, int], field: str) -> None:
    """Raise ConfigError for a count below 1, and for two kinds with one short name."""
    seen: dict[str, str] = {}
    for kind, count in kinds.items():
        require(count >= 1, f"{field}.{kind}", count, "at least 1")
        name = short_name(kind)
        if name in seen:
            raise ConfigError(field, kind, f"another name than {seen[name]} has, as both would be called {name}")
        seen[name] = kind


def expand_kinds(kinds: Mapping[str, int]) -> list[str]:
    """The kind of every actor (or refiner) by its index."""
    return [kind for kind, count in kinds.items() for _ in range(count)]


def settle_kinds(kinds: Mapping[str, int], count: int, default: str, field: str) -> dict[str, int]:
    """Counts by kind that agree with a total: `count` of `default` where no kinds are given.

    A total that differs replaces the count of a single kind; of several, ConfigError names the field.
    """
    if not kinds:
        return {default: count} if count else {}
    if count == sum(kinds.values()):
        return dict(kinds)
    if len(kinds) > 1:
        given = ",".join(f"{kind}:{number}" for kind, number in kinds.items())
        raise ConfigError(f"{field}.count", count, f"counts by kind, as there are several ({given})")
    return {next(iter(kinds)): count} if count else {}
