"""Flags of the options of actor and refiner kinds: --KIND.OPTION VALUE for every kind that runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import partial
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from driftstream.actors.kinds import short_name
from driftstream.actors.registry import actor_names, check_options, plain_options, refiner_names, required_options
from driftstream.envs.errors import require
from driftstream.launch.config import RunConfig, option_classes, settled_kinds
from driftstream.launch.flags import UsageError, flag_names, parse_known, refuse, suggestion


@dataclass(frozen=True)
class KindOptions:
    """The options of a kind that runs: its role, "actor" or "refiner", its short name, and their dataclass."""

    role: str
    name: str
    options: type

    @property
    def prefix(self) -> str:
        """What its flags begin with, after the dashes."""
        return self.name.replace("_", "-")


def without_kinds(config: RunConfig) -> RunConfig:
    """A configuration whose kinds and their options are no flags of their own, as places and names would be."""
    actor = replace(config.actor, kinds={}, options={})
    return replace(config, actor=actor, refiner=replace(config.refiner, kinds={}, options={}))


def restore_kinds(config: RunConfig, base: RunConfig) -> RunConfig:
    """Kinds and options of `base` again, where flags gave no others; a total follows from kinds."""
    parts = {}
    for role in ("actor", "refiner"):
        now, before = getattr(config, role), getattr(base, role)
        count = sum(now.kinds.values()) if now.kinds and now.count == before.count else now.count
        options = before.options | {name: before.options.get(name, {}) | values for name, values in now.options.items()}
        parts[role] = replace(now, kinds=now.kinds or before.kinds, options=options, count=count)
    return replace(config, **parts)


def drop_options(config: RunConfig, base: RunConfig) -> RunConfig:
    """The configuration without the options of kinds of `base` that no longer run."""
    parts = {}
    for role, now in zip(("actor", "refiner"), settled_kinds(config), strict=True):
        part = getattr(config, role)
        gone = {short_name(kind) for kind in getattr(base, role).kinds if kind not in now}
        parts[role] = replace(part, options={name: part.options[name] for name in part.options.keys() - gone})
    return replace(config, **parts)


def read_kind_flags(config: RunConfig, arguments: Sequence[str], prog: str) -> tuple[RunConfig, list[str]]:
    """The configuration with the options that flags set, and the arguments that are no such flags.

    Raises:
        UsageError: a value that does not fit, or none for an option that needs one.
        ConfigError: a kind whose class is not found or whose options cannot be flags.
    """
    kinds = _kinds_with_options(config)
    if not kinds:
        return config, list(arguments)
    flags_class: type[Any] = _flags_class(config, kinds)
    parsed, unknown = parse_known(flags_class, arguments, prog)
    for index, kind in enumerate(kinds):
        part = getattr(config, kind.role)
        values = plain_options(getattr(parsed, f"kind_{index}"), f"{kind.role}.options.{kind.name}")
        config = replace(config, **{kind.role: replace(part, options=part.options | {kind.name: values})})
    return config, unknown


def show_flags(config: RunConfig, prog: str) -> None:
    """Print every flag of the configuration and of its kinds' options, with its value, and exit."""
    bare, kinds = without_kinds(config), _kinds_with_options(config)
    everything: Any = _flags_class(config, kinds, RunConfig)
    default = everything(**{entry.name: getattr(bare, entry.name) for entry in fields(RunConfig)})
    parse_known(everything, ["--help"], prog, default=default)


def refuse_flags(unknown: Sequence[str], config: RunConfig) -> None:
    """Raise UsageError for the first argument that is no flag of the run: a misspelt one, or of a kind that rests."""
    flag = next((token.split("=")[0] for token in unknown if token.startswith("--") and "." in token), None)
    if flag is None:
        refuse(unknown, RunConfig)
        return
    shown = flag[2:].split(".")[0]
    prefix = shown.replace("_", "-")
    kinds = _kinds_with_options(config)
    known = flag_names(RunConfig)
    known += [f"--{kind.prefix}.{entry.name.replace('_', '-')}" for kind in kinds for entry in fields(kind.options)]
    hint = suggestion(flag, known)
    running = [short_name(kind) for counts in _running(config) for kind in counts]
    if prefix in {name.replace("_", "-") for name in running} - {kind.prefix for kind in kinds} - {"mala"}:
        raise UsageError(f"unknown flag {flag}: {shown} has no options")
    resting = {name.replace("_", "-") for name in (*actor_names(), *refiner_names())} - {
        name.replace("_", "-") for name in running
    }
    if prefix in resting or not (hint or prefix in _components()):
        raise UsageError(f"unknown flag {flag}: no {shown} runs (kinds that run: {', '.join(running) or 'none'})")
    raise UsageError(f"unknown flag {flag}{hint}")


def _running(config: RunConfig) -> tuple[dict[str, int], ...]:
    return settled_kinds(config) if config.data == "stream" else ()


def _kinds_with_options(config: RunConfig) -> list[KindOptions]:
    """Every kind that runs and has options, each under a name of its own."""
    found: list[KindOptions] = []
    taken = _components()
    for role, kinds in zip(("actor", "refiner"), _running(config), strict=False):
        for name, options in option_classes(kinds, role).items():
            if options is None:
                continue
            kind = KindOptions(role, name, options)
            allowed = f"another name, as the flags --{kind.prefix}.… are taken"
            require(kind.prefix not in taken, f"{role}.kinds", name, allowed)
            taken.add(kind.prefix)
            found.append(kind)
    return found


def _components() -> set[str]:
    return {entry.name.replace("_", "-") for entry in fields(RunConfig)}


def _flags_class(config: RunConfig, kinds: Sequence[KindOptions], *bases: type) -> type:
    """A dataclass with the options of every kind as a component, and with the fields of `bases`."""
    components = []
    for index, kind in enumerate(kinds):
        given = getattr(config, kind.role).options.get(kind.name, {})
        values = check_options(kind.options, given, f"{kind.role}.options.{kind.name}")
        missing = {name: tyro.MISSING for name in required_options(kind.options) if name not in values}
        options = _unchecked(kind.options)
        annotation = Annotated[options, arg(name=kind.prefix)]  # type: ignore[valid-type]
        # A factory, as options that are not frozen are no default.
        components.append((f"kind_{index}", annotation, field(default_factory=partial(options, **missing, **values))))
    return make_dataclass("Flags", components, bases=bases, frozen=True)


def _unchecked(options: type) -> type:
    """The same options without the checks of their construction, which come once all values are known."""
    frozen = options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    documented = not (options.__doc__ or "").startswith(f"{options.__name__}(")
    namespace = {"__post_init__": lambda self: None, "__doc__": options.__doc__ if documented else ""}
    return make_dataclass(options.__name__, (), bases=(options,), frozen=frozen, namespace=namespace)
