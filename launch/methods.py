"""Methods: a preset is a TOML file with a summary, a source, and the fields of `RunConfig` that it sets."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from driftstream.envs.errors import ConfigError
from driftstream.envs.registry import suggest
from driftstream.launch.config import RunConfig, from_dict, read_toml

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Method:
    """A named starting point for a run's configuration."""

    name: str
    summary: str
    source: str
    config: RunConfig


def method_names() -> list[str]:
    """Names of the presets that come with driftstream."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_method(name: str) -> Method:
    """A preset by name, or any TOML file by its path (`./mine.toml`).

    Raises:
        ConfigError: no such preset, or a file that is no preset.
    """
    is_path = name.endswith(".toml")
    path = Path(name) if is_path else PRESETS / f"{name}.toml"
    if not is_path and name not in method_names():
        hint = suggest(name, method_names())
        raise ConfigError("method", name, f"one of {', '.join(method_names())}, or a TOML file{hint}")
    data = read_toml(path)
    summary, source = str(data.pop("summary", "")), str(data.pop("source", ""))
    for role in ("actor", "refiner"):
        _count_kinds(data.get(role))
    config = replace(from_dict(RunConfig(), data), method=name)
    return Method(name, summary, source, config)


def _count_kinds(table: Any) -> None:
    """Let the counts by kind of [actor] or [refiner] say how many there are, where `count` does not."""
    kinds = table.get("kinds") if isinstance(table, dict) else None
    if isinstance(kinds, dict) and all(isinstance(count, int) for count in kinds.values()):
        table.setdefault("count", sum(kinds.values()))
