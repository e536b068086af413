"""Actors and refiners by kind: built in, installed (entry points), or in a user's own module or file."""

import inspect
from importlib.metadata import entry_points
from typing import Any, TypeVar

from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.refiner import Refiner
from driftstream.envs.errors import ConfigError
from driftstream.envs.registry import load_object, suggest

P = TypeVar("P", ExplorationActor, Refiner)

ACTORS = {
    "explore": "driftstream.actors.exploration:ExplorationActor",
    "teacher": "driftstream.actors.exploration:TeacherActor",
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
    return _load(kind, Refiner, REFINERS, REFINER_GROUP, "refiner")


def actor_names() -> list[str]:
    """Names of the actors that are built in or installed."""
    return _names(ACTORS, ACTOR_GROUP)


def refiner_names() -> list[str]:
    """Names of the refiners that are built in or installed."""
    return _names(REFINERS, REFINER_GROUP)


def make_options(options: type | None, values: dict[str, Any], field: str) -> Any:
    """A kind's options from their values by name; ConfigError for options where the kind has none."""
    if options is None:
        if values:
            raise ConfigError(field, values, "nothing, as this kind has no options")
        return None
    try:
        return options(**values)
    except TypeError as error:
        known = ", ".join(inspect.signature(options).parameters)
        raise ConfigError(field, values, f"options among: {known} ({error})") from None


def _load(kind: str, base: type[P], built_in: dict[str, str], group: str, field: str) -> type[P]:
    places = built_in | {entry.name: entry.value for entry in entry_points(group=group)}
    if ":" not in kind and kind not in places:
        raise ConfigError(field, kind, f"one of {', '.join(sorted(places))}, or file.py:Class{suggest(kind, places)}")
    plugin = load_object(places.get(kind, kind), field)
    if not (isinstance(plugin, type) and issubclass(plugin, base)):
        raise ConfigError(field, kind, f"a class derived from {base.__module__}.{base.__name__}")
    return plugin


def _names(built_in: dict[str, str], group: str) -> list[str]:
    return sorted(built_in.keys() | {entry.name for entry in entry_points(group=group)})
