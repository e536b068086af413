"""Actors and refiners by kind: built in, installed (entry points), or in a user's own module or file."""

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.kinds import Option
from driftstream.actors.refiner import Refiner
from driftstream.envs.convert import convert
from driftstream.envs.errors import ConfigError, require
from driftstream.envs.plugins import installed, load_plugin, plugin_origin
from driftstream.envs.registry import load_object, suggest

P = TypeVar("P", ExplorationActor, Refiner)

ACTORS = {
    "explore": "driftstream.actors.exploration:ExplorationActor",
    "teacher": "driftstream.actors.exploration:TeacherActor",
    "tempered": "driftstream.actors.explorers:TemperedActor",
    "local_search": "driftstream.actors.explorers:LocalSearchActor",
    "langevin": "driftstream.actors.explorers:LangevinActor",
    "replayed": "driftstream.actors.explorers:ReplayedActor",
    "mixture": "driftstream.actors.explorers:MixtureActor",
}
REFINERS = {
    "mala": "driftstream.actors.refiner:MalaRefiner",
    "hmc": "driftstream.actors.hmc:HmcRefiner",
    "annealed": "driftstream.actors.annealed:AnnealedRefiner",
    "tempering": "driftstream.actors.tempering:TemperingRefiner",
}
ACTOR_GROUP, REFINER_GROUP = "driftstream.actors", "driftstream.refiners"


def load_actor(kind: str) -> type[ExplorationActor]:
    """The class of an actor kind: a built-in name, an entry point's, "package.module:Class" or "file.py:Class".

    Raises:
        ConfigError: no such kind, code that does not import, or a class that is no ExplorationActor.
    """
    return _load(kind, ExplorationActor, ACTORS, ACTOR_GROUP, "actor")


def load_refiner(kind: str) -> type[Refiner]:
    """The class of a refiner kind, as `load_actor`; ConfigError for what is no Refiner."""
    return _load(kind, Refiner, REFINERS, REFINER_GROUP, "refiner")  # type: ignore[type-abstract]


def actor_names() -> list[str]:
    """Names of the actors that are built in or installed."""
    return _names(ACTORS, ACTOR_GROUP)


def refiner_names() -> list[str]:
    """Names of the refiners that are built in or installed."""
    return _names(REFINERS, REFINER_GROUP)


def actor_origin(kind: str) -> str:
    """Where an actor comes from: "built in", a distribution, or a file or module."""
    return plugin_origin(kind, ACTOR_GROUP, ACTORS)


def refiner_origin(kind: str) -> str:
    """Where a refiner comes from, as `actor_origin`."""
    return plugin_origin(kind, REFINER_GROUP, REFINERS)


def make_options(options: type | None, values: dict[str, Any], field: str) -> Any:
    """A kind's options from their plain values by name; None for a kind without options.

    Raises:
        ConfigError: an unknown option, a value that is missing, of a wrong type or refused by the kind itself.
    """
    if options is None:
        require(not values, field, values, "nothing, as this kind has no options")
        return None
    converted = check_options(options, values, field)
    for name in required_options(options):
        require(name in converted, f"{field}.{name}", None, "a value, as this kind needs one")
    try:
        return options(**converted)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(field, converted, f"options that it takes ({type(error).__name__}: {error})") from error


def check_options(options: type, values: dict[str, Any], field: str) -> dict[str, Any]:
    """The given values, each as its option's type; ConfigError for an unknown name or a wrong type."""
    hints = option_types(options, field)
    for name, value in values.items():
        known = f"an option of this kind ({', '.join(hints) or 'it has none'}){suggest(name, hints)}"
        require(name in hints, f"{field}.{name}", value, known)
    return {name: convert(hints[name], value, f"{field}.{name}") for name, value in values.items()}


def option_types(options: type, field: str) -> dict[str, Any]:
    """The types of a kind's options by name.

    Raises:
        ConfigError: `options` is no dataclass, or has a field that is not kept in a TOML file as one plain value.
    """
    require(isinstance(options, type) and dataclasses.is_dataclass(options), field, options, "a dataclass as Options")
    try:
        hints = typing.get_type_hints(options)
    except Exception as error:
        allowed = f"annotations of Options that can be read ({type(error).__name__}: {error})"
        raise ConfigError(field, options.__name__, allowed) from error
    found = {entry.name: hints[entry.name] for entry in dataclasses.fields(options) if entry.init}
    for name, hint in found.items():
        allowed = "int, float, bool, str, a Literal of these, or one of them | None"
        require(_is_plain(hint), f"{field}.{name}", getattr(hint, "__name__", str(hint)), allowed)
    return found


def required_options(options: type) -> list[str]:
    """Names of the options that have no default."""
    missing = dataclasses.MISSING
    entries = [entry for entry in dataclasses.fields(options) if entry.init]
    return [entry.name for entry in entries if entry.default is missing and entry.default_factory is missing]


def plain_options(options: Any, field: str) -> dict[str, Option]:
    """The values of a kind's options, as TOML holds them: without those that are None by default.

    Raises:
        ConfigError: None where another value is the default, which the file would then mean.
    """
    values: dict[str, Option] = {}
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        if entry.init and value is not None:
            values[entry.name] = value
        elif entry.init:
            default = None if entry.default is dataclasses.MISSING else entry.default
            require(default is None, f"{field}.{entry.name}", None, "a value, as None is not the default")
    return values


def _is_plain(hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return all(isinstance(value, Option) for value in arguments)
    if origin is types.UnionType or origin is typing.Union:
        return all(part is type(None) or _is_plain(part) for part in arguments)
    return hint in typing.get_args(Option)


def _load(kind: str, base: type[P], built_in: dict[str, str], group: str, field: str) -> type[P]:
    name, colon, _ = kind.partition(":")
    require(not (colon and name in built_in), field, kind, f"a whole number after {name}:")
    plugin = load_object(built_in[kind], field) if kind in built_in else load_plugin(kind, group, built_in, field)
    if not (isinstance(plugin, type) and issubclass(plugin, base)):
        raise ConfigError(field, kind, f"a class derived from {base.__module__}.{base.__name__}")
    return plugin


def _names(built_in: dict[str, str], group: str) -> list[str]:
    return sorted({*built_in, *installed(group)})
