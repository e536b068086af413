"""`driftstream check`: find out what something is, hold it against its contract, and show what was found."""

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.refiner import Refiner
from driftstream.actors.registry import actor_names, load_actor, load_refiner, refiner_names
from driftstream.envs.errors import ConfigError
from driftstream.envs.registry import load_object, suggest
from driftstream.envs.targets import Target, target_names
from driftstream.launch.contract import check_actor, check_refiner
from driftstream.launch.contract_methods import check_objective, check_preset
from driftstream.launch.contract_targets import check_target
from driftstream.launch.findings import Finding, holds, in_a_line
from driftstream.launch.flags import CheckFlags, UsageError
from driftstream.launch.methods import method_names
from driftstream.learner.objectives import objective_names

NAMES: dict[str, Callable[[], list[str]]] = {
    "actor": actor_names,
    "refiner": refiner_names,
    "target": target_names,
    "objective": objective_names,
    "preset": method_names,
}
STYLE = {"ok": "green", "FAILED": "bold red", "warning": "yellow", "info": "dim"}


def check(flags: CheckFlags) -> int:
    """Run the contract test; returns 0 if nothing failed, else 1.

    Raises:
        UsageError: something that is none of the kinds, or whose kind cannot be told.
        ConfigError: a file, module or attribute that is missing.
    """
    # What it says of its buffers is no finding.
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    kind: str = flags.kind or ""
    try:
        kind = kind or kind_of(flags.what)
        findings = run_contract(kind, flags.what, flags.options)
    except ConfigError as error:
        # Code that does not import is a finding; a name that is nowhere is a mistake on the command line.
        if error.__cause__ is None:
            raise
        findings = [Finding("loads", "FAILED", in_a_line(error))]
    if flags.json:
        rows = [asdict(finding) for finding in findings]
        print(json.dumps({"what": flags.what, "kind": kind, "ok": holds(findings), "findings": rows}))
    else:
        _show(flags.what, kind, findings)
    return 0 if holds(findings) else 1


def kind_of(what: str) -> str:
    """What something is: a preset by its file's name, code by its type, a bare name by who knows it."""
    if what.endswith(".toml"):
        if not Path(what).is_file():
            raise UsageError(f"{what}: the file does not exist")
        return "preset"
    if ":" in what:
        return _kind_of_code(what)
    kinds = [kind for kind, names in NAMES.items() if what in names()]
    if len(kinds) > 1:
        raise UsageError(f"{what!r} is {' and '.join(kinds)}: say which with --kind")
    if not kinds:
        known = sorted({name for names in NAMES.values() for name in names()})
        expected = "path/file.py:Name, package.module:Name, file.toml, or a name from `driftstream list`"
        raise UsageError(f"{what!r}: expected {expected}{suggest(what, known)}")
    return kinds[0]


def _kind_of_code(what: str) -> str:
    """The kind of a class by what it derives from, and of a function by what it takes."""
    code = load_object(what, "check")
    bases = {"actor": ExplorationActor, "refiner": Refiner, "target": Target}
    if isinstance(code, type):
        for kind, base in bases.items():
            if issubclass(code, base):
                return kind
    elif callable(code):
        if _takes(code):
            return "target"
        if _takes(code, None, None, None, None):
            return "objective"
    places = ", ".join(f"{base.__module__}.{base.__name__}" for base in bases.values())
    functions = "a function of (log_pf, log_pb, log_reward, log_z), or one that returns a Target"
    raise UsageError(f"{what}: expected a class derived from {places}, {functions}")


def _takes(function: Callable[..., Any], *arguments: object) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


def run_contract(kind: str, what: str, options: Mapping[str, Any]) -> list[Finding]:
    """The findings of the contract test for a thing of that kind.

    Raises:
        ConfigError: no such thing, or code that does not import or is of another kind.
        UsageError: options for what has none.
    """
    if kind == "actor":
        return check_actor(load_actor(what), options)
    if kind == "refiner":
        return check_refiner(load_refiner(what), options)
    if kind == "target":
        return check_target(what, options)
    if options:
        raise UsageError(f"--options: expected nothing, as the {kind} {what} has no options of its own")
    return check_objective(what) if kind == "objective" else check_preset(what)


def _show(what: str, kind: str, findings: Sequence[Finding]) -> None:
    table = Table(title=Text(f"{kind} {what}".strip()), title_justify="left")
    for heading in ("check", "result", "seen"):
        table.add_column(heading, no_wrap=heading != "seen")
    for finding in findings:
        table.add_row(finding.check, Text(finding.result, STYLE[finding.result]), Text(finding.seen))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    failed = sum(finding.result == "FAILED" for finding in findings)
    warned = sum(finding.result == "warning" for finding in findings)
    verdict = f"{failed} of {len(findings)} checks failed" if failed else "every check holds"
    console.print(Text(verdict + (f" ({warned} with a warning)" if warned else ""), "red" if failed else "green"))
