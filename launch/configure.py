"""From a `driftstream train` command line to a resolved configuration."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from driftstream.actors.kinds import parse_kinds
from driftstream.envs.errors import require
from driftstream.launch.config import RunConfig, from_dict, from_toml, has_teacher, resolve
from driftstream.launch.flags import TrainFlags, UsageError, parse_known
from driftstream.launch.kind_flags import (
    drop_options,
    read_kind_flags,
    refuse_flags,
    restore_kinds,
    show_flags,
    without_kinds,
)
from driftstream.launch.methods import load_method
from driftstream.launch.roles import resolve_device
from driftstream.launch.run_directory import RunDirectory
from driftstream.learner.limits import LimitsConfig

LIMITS = ("steps", "minutes", "energy_budget")
FIXED = (
    *("target", "target_options", "data", "sync", "policy", "process"),
    *("replay.capacity", "replay.source", "replay.prioritization"),
)
"""Fields that the saved state of a run depends on: a resumed run keeps them."""
FIXED_IN_SYNC = ("actor.count", "actor.kinds", "refiner.count", "refiner.kinds")


def configure(flags: TrainFlags, config_flags: Sequence[str], prog: str) -> RunConfig:
    """The resolved configuration: a method's or a resumed run's, then --component.field, then short flags.

    Raises:
        UsageError: a flag that does not exist or whose value does not fit.
        ConfigError: values that cannot work.
    """
    resumed = None if flags.resume is None else from_toml(RunDirectory.open(flags.resume).config)
    base = resumed or load_method(flags.method).config
    limits = {name: getattr(flags, name) for name in LIMITS}
    if any(limits.values()) or any(flag.startswith("--limits.") for flag in config_flags):
        base = replace(base, limits=LimitsConfig())
    given_flags = {flag.split("=")[0].replace("_", "-") for flag in config_flags}
    if "--grid.times" in given_flags and "--grid.sampling-steps" not in given_flags:
        base = replace(base, grid=replace(base.grid, sampling_steps=None))
    config, unknown = parse_known(RunConfig, config_flags, prog, default=without_kinds(base))
    given = {
        "target_options": flags.target_options or None,
        "data": flags.data,
        "seed": flags.seed,
        "device": flags.device,
        "sync": flags.sync or None,
        "actor": _counts(flags.actors, "--actors"),
        "refiner": _counts(flags.refiners, "--refiners"),
        "grid": {"sampling_steps": flags.sampling_steps},
        "monitor": {"wandb": flags.wandb},
        "limits": limits,
    }
    config = from_dict(restore_kinds(config, base), _without_none(given))
    if config.data == "on_policy" and flags.refiners is None and config.refiner.kinds == base.refiner.kinds:
        config = replace(config, refiner=replace(config.refiner, kinds={}))  # the method's, which the flag does without
    config, unknown = read_kind_flags(drop_options(placed(config), placed(base)), unknown, prog)
    if flags.help_all:
        show_flags(config, prog)
    target = flags.target
    if target is None and len(unknown) == 1 and not unknown[0].startswith("-"):
        # It stood after a flag of the configuration.
        target = unknown.pop()
    refuse_flags(unknown, config)
    if resumed is None and target is None:
        raise UsageError("name a target (`driftstream list targets` shows them all)")
    target = target and _absolute(target)
    if resumed is not None and target not in (None, resumed.target):
        raise UsageError(f"the run in {flags.resume} has target {resumed.target}, not {target}")
    config = resolve(config if target is None else replace(config, target=target))
    if resumed is not None:
        _check_kept(resumed, config)
    resolve_device(config.device)
    return config


def _counts(text: str | None, flag: str) -> dict[str, Any]:
    """The fields that --actors or --refiners sets: how many there are, and of which kinds where it names some."""
    if text is None:
        return {}
    if re.fullmatch(r"[+-]?[0-9]{1,6}", text, re.ASCII):
        return {"count": int(text)}
    kinds = parse_kinds(text, flag)
    return {"kinds": kinds, "count": sum(kinds.values())}


def placed(config: RunConfig) -> RunConfig:
    """The configuration with every plug-in in a file at its absolute place."""
    parts = {}
    for role in ("actor", "refiner"):
        part = getattr(config, role)
        kinds = {_absolute(kind): count for kind, count in part.kinds.items()}
        parts[role] = replace(part, kinds=kinds, options={name: _mixed(o) for name, o in part.options.items()})
    objective = replace(config.objective, name=_absolute(config.objective.name))
    return replace(config, objective=objective, **parts)


def _mixed(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a kind, with the places of the kinds that a mixture is `of` absolute."""
    of = options.get("of")
    return options | {"of": ",".join(map(_absolute_entry, of.split(",")))} if isinstance(of, str) else options


def _absolute_entry(entry: str) -> str:
    """`_absolute` of one "kind" or "kind:count"."""
    kind, colon, count = entry.strip().rpartition(":")
    return f"{_absolute(kind)}:{count}" if colon and count.isdigit() else _absolute(entry.strip())


def _check_kept(before: RunConfig, config: RunConfig) -> None:
    """Refuse what a run cannot be resumed with: ConfigError naming the field."""
    for name in (*FIXED, *(FIXED_IN_SYNC if before.sync else ())):
        for field, old, new in _leaves(name, attrgetter(name)(before), attrgetter(name)(config)):
            # The states of actors and refiners are kept by index, hence by the order of their kinds.
            same = new == old and (not isinstance(old, dict) or list(new) == list(old))
            require(same, field, new, f"{old!r}, as in the run to be resumed")
    added = has_teacher(config) and not has_teacher(before)
    require(not added, "actor.kinds", config.actor.kinds, "no teacher, as in the run to be resumed")


def _leaves(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of a field, or of each one below it where it is a component."""
    if not is_dataclass(old):
        yield name, old, new
        return
    for field in fields(old):
        yield from _leaves(f"{name}.{field.name}", getattr(old, field.name), getattr(new, field.name))


def _absolute(place: str) -> str:
    """A target or plug-in in a file keeps its meaning when the run is resumed from elsewhere."""
    path, colon, attribute = place.rpartition(":")
    return f"{Path(path).resolve()}:{attribute}" if colon and path.endswith(".py") else place


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    plain = {key: _without_none(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if value is not None}
