"""The tables of `driftstream list`."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from rich.markup import escape
from rich.table import Table

from driftstream.actors.registry import (
    actor_names,
    actor_origin,
    load_actor,
    load_refiner,
    option_types,
    refiner_names,
    refiner_origin,
)
from driftstream.envs.plugins import plugin_origin
from driftstream.envs.targets import make_target, target_names, target_origin
from driftstream.launch.describe import describe_data, describe_objective, describe_policy
from driftstream.launch.methods import load_method, method_names
from driftstream.learner import objectives
from driftstream.learner.objective_plugins import OBJECTIVE_GROUP, load_objective
from driftstream.learner.objectives import OBJECTIVES, ObjectiveConfig, objective_names

Row = Sequence[str]


def list_table(what: str) -> Table:
    """The table of "targets", "methods", "actors", "refiners" or "objectives".

    What is installed and does not work stands there with the reason.
    """
    tables: dict[str, Callable[[], Table]] = {
        "targets": lambda: _table(
            ("target", "dim", "log Z", "exact samples", "from"),
            (_row(name, target_origin(name), _target_cells, 3) for name in target_names()),
        ),
        "methods": lambda: _table(
            ("method", "objective", "data", "policy", "source"), (_method_row(name) for name in method_names())
        ),
        "actors": lambda: _table(
            ("actor", "what it does", "options", "from"),
            (_row(name, actor_origin(name), lambda name: _kind_cells(load_actor(name)), 2) for name in actor_names()),
        ),
        "refiners": lambda: _table(
            ("refiner", "what it does", "options", "from"),
            (
                _row(name, refiner_origin(name), lambda name: _kind_cells(load_refiner(name)), 2)
                for name in refiner_names()
            ),
        ),
        "objectives": lambda: _table(
            ("objective", "what it is", "options", "from"),
            (
                _row(name, plugin_origin(name, OBJECTIVE_GROUP, OBJECTIVES), _objective_cells, 2)
                for name in objective_names()
            ),
        ),
    }
    return tables[what]()


def _table(headings: Sequence[str], rows: Iterable[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _row(name: str, origin: str, cells: Callable[[str], Row], count: int) -> Row:
    """A name's cells and where it is from; in place of the cells what is wrong with it."""
    try:
        return (name, *cells(name), origin)
    except Exception as error:
        # Whatever an installed plug-in does, the others are to be seen.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return (name, f"does not work: {reason}", *[""] * (count - 1), origin)


def _target_cells(name: str) -> Row:
    target = make_target(name)
    log_z = "unknown" if target.log_z is None else f"{target.log_z:.4f}"
    return str(target.dim), log_z, "no" if target.sample(1) is None else "yes"


def _method_row(name: str) -> Row:
    method = load_method(name)
    config = method.config
    return name, describe_objective(config), describe_data(config), describe_policy(config), method.source


def _kind_cells(kind: type) -> Row:
    options: type | None = kind.Options  # type: ignore[attr-defined]
    if options is None:
        return summary(kind), ""
    option_types(options, "Options")
    values = []
    for entry in dataclasses.fields(options):
        needed = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        values.append(entry.name if needed else f"{entry.name} {entry.default}")
    return summary(kind), ", ".join(values)


def _objective_cells(name: str) -> Row:
    config = ObjectiveConfig(name)
    if config.plugin:
        return summary(load_objective(name)), ""
    options = ["lam"] if name == "subtrajectory_balance" else []
    options += ["segment_length"] if config.balances_flows else []
    return summary(getattr(objectives, name)), ", ".join(options)


def summary(thing: object) -> str:
    """The first line of a docstring of its own, or nothing."""
    return next(iter((thing.__doc__ or "").strip().splitlines()), "")
