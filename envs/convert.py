"""Plain values, as a TOML file or a message holds them, as the types that a dataclass declares."""

import types
import typing
from typing import Any, Literal

from driftstream.envs.errors import ConfigError, require


def convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type: integers become floats and lists tuples, and nothing else changes.

    Raises:
        ConfigError: a value, of the field `name`, that is not of the type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        require(value in arguments, name, value, "one of " + ", ".join(map(repr, arguments)))
        return value
    if origin is types.UnionType or origin is typing.Union:
        for option in arguments:
            try:
                return convert(option, value, name)
            except ConfigError:
                continue
        names = [getattr(option, "__name__", str(option)) for option in arguments if option is not type(None)]
        raise ConfigError(name, value, " or ".join(names))
    if origin is tuple:
        require(isinstance(value, list | tuple), name, value, "a list")
        return tuple(convert(arguments[0], entry, name) for entry in value)
    if origin is dict:
        require(isinstance(value, dict), name, value, "a table")
        return {key: convert(arguments[1], entry, f"{name}.{key}") for key, entry in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    exact = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    require(exact, name, value, f"a value of type {hint.__name__}")
    return value
