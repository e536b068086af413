"""Names for things that are chosen by configuration, and objects loaded from a user's own code."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from driftstream.envs.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name; an unknown name raises a ConfigError that lists the known ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an object under a name; a name that is taken raises ValueError."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """The object of that name; raises ConfigError where there is none."""
        if name not in self._items:
            raise ConfigError(self.kind, name, f"one of {', '.join(self.names())}{suggest(name, self._items)}")
        return self._items[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._items)


def suggest(word: str, known: Iterable[str]) -> str:
    """` (did you mean …?)`, where something known is close to a word."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def load_object(spec: str, field: str = "object") -> Any:
    """The object that "package.module:Attr" or "./path/file.py:Attr" names.

    Raises ConfigError, under the name `field`, where the file, module or attribute is missing or its code
    does not import.
    """
    location, colon, attribute = spec.rpartition(":")
    if not (colon and location and attribute):
        raise ConfigError(field, spec, "package.module:Attr or path/file.py:Attr")
    if location.endswith(".py") and not Path(location).is_file():
        raise ConfigError(field, spec, f"an existing file ({location} is missing)")
    try:
        load = _import_file if location.endswith(".py") else importlib.import_module
        module = load(location)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(field, spec, f"code that imports ({location} raised {reason})") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        hint = suggest(attribute, vars(module))
        raise ConfigError(field, spec, f"an attribute of {location}{hint}") from None


def _import_file(path: str) -> ModuleType:
    # The whole path as a name keeps files of one stem apart; loaded once, a class stays identical to itself.
    name = f"driftstream_plugin:{Path(path).resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python source")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, as dataclasses look their module up while they are defined.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
