"""The flags of every command, and how a command line becomes them: every mistake is one line.

Nothing here imports torch, so that a mistyped flag is answered at once.
"""

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from driftstream.envs.errors import ConfigError, PluginError, TargetError

Flags = TypeVar("Flags")
Optional = arg(help_behavior_hint="")
N = arg(metavar="N", help_behavior_hint="")
Checkpoint = Annotated[str, arg(metavar="last|best|step-N|DIR")]
KINDS = arg(metavar="N|KIND:N,…", help_behavior_hint="")


class UsageError(ValueError):
    """A command line that makes no sense: one line for the user, exit code 2."""


class CommandError(RuntimeError):
    """A command that makes sense and cannot be done: one line for the user, exit code 1."""


@dataclass(frozen=True)
class TrainFlags:
    """Train a sampler of TARGET: a learner, actors and refiners that feed it, and an evaluator.

    Every field of the configuration is a flag too, as --component.field VALUE, and so is every option of the kinds
    of actors and refiners that run, as --KIND.option VALUE (--help-all lists them with their values); --dry-run
    shows what a command resolves to. Limits given here replace those of the method.
    """

    target: Annotated[str | None, Positional, arg(metavar="TARGET", help_behavior_hint="")] = None
    """Name of a target, or path/file.py:Class; not needed with --resume."""
    method: Annotated[str, arg(metavar="NAME|FILE.toml")] = "default"
    """What to start from."""
    target_options: Annotated[
        dict[str, int | float | bool | str], arg(metavar="KEY VALUE …", help_behavior_hint="")
    ] = field(default_factory=dict)
    """Options of the target, such as: dim 16."""
    actors: Annotated[str | None, KINDS] = None
    """Processes that explore: a number, or counts by kind such as explore:2,teacher:1,./mine.py:Mine:1."""
    refiners: Annotated[str | None, KINDS] = None
    """Processes that refine states by Markov chains: a number, or counts by kind such as mala:1,tempering:1."""
    steps: Annotated[int | None, N] = None
    """Limit: learner updates."""
    minutes: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Limit: minutes of training."""
    energy_budget: Annotated[int | None, N] = None
    """Limit: energy and gradient calls of all roles together."""
    sampling_steps: Annotated[int | None, N] = None
    """Steps of the diffusion."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Run directory; by default runs/TARGET-METHOD-TIME."""
    resume: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Go on with the run in this directory."""
    data: Annotated[Literal["stream", "on_policy"] | None, Optional] = None
    """Who makes the data: actors and refiners (stream), or the learner itself (on_policy)."""
    seed: Annotated[int | None, N] = None
    """Decides every random number of a --sync run."""
    device: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """The learner's device: auto, cpu, cuda:0 …"""
    wandb: Annotated[Literal["auto", "online", "offline", "disabled"] | None, Optional] = None
    """Weights & Biases; auto is online where an API key is configured, else offline."""
    sync: bool = False
    """Run all roles in this process, bitwise reproducible."""
    dry_run: bool = False
    """Show the configuration and placement, check the target's gradient, and end."""
    help_all: bool = False
    """Show the flags of the whole configuration, with the method's values, and end."""


@dataclass(frozen=True)
class JoinFlags:
    """Run actors and refiners on this host for a run whose learner is on another, until it ends."""

    file: Annotated[Path, Positional, arg(metavar="FILE")]
    """A copy of the run's keys/join.toml, readable by you only (chmod 600)."""
    actors: Annotated[str | None, KINDS] = None
    """Processes that explore, on this host: a number, or counts by kind; by default 1, or none beside --refiners."""
    refiners: Annotated[str | None, KINDS] = None
    """Processes that refine states by Markov chains, on this host: a number, or counts by kind."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Directory for this host's logs; by default runs/TARGET-METHOD-joined-TIME."""


@dataclass(frozen=True)
class SampleFlags:
    """Draw samples of a trained sampler, with log reward and log importance weight, into an .npz file."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Run directory."""
    n: Annotated[int, arg(aliases=("-n",), metavar="N")]
    """Samples to draw."""
    output: Annotated[Path, arg(aliases=("-o",), metavar="FILE.npz")]
    """File to write; one that exists is replaced."""
    seed: int = 0
    """Seed of the draws."""
    batch_size: int = 1000
    """Samples drawn at a time."""
    checkpoint: Checkpoint = "last"
    """last, best (of the evaluations during training), step-N, or a checkpoint's directory."""


@dataclass(frozen=True)
class EvalFlags:
    """Evaluate a trained sampler: bounds on log Z, distances to exact samples, coverage of modes."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Run directory."""
    more: Annotated[tuple[Path, ...], Positional, arg(metavar="[RUN …]", help_behavior_hint="")] = ()
    """Further runs, to compare."""
    sampling_steps: Annotated[str | None, arg(metavar="N,N,…", help_behavior_hint="")] = None
    """Tabulate and plot the figures against the number of steps, such as: 1,2,4,8,16,32,64,128."""
    samples: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: as in training)")] = None
    """Trajectories to draw."""
    seed: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: as in training)")] = None
    """Seed of the draws."""
    checkpoint: Checkpoint = "last"
    """last, best (of the evaluations during training), step-N, or a checkpoint's directory."""
    json: bool = False
    """Print one JSON object instead of tables."""

    @property
    def runs(self) -> tuple[Path, ...]:
        """Every run directory; UsageError where one is named twice."""
        runs = (self.run, *self.more)
        if len({path.resolve() for path in runs}) < len(runs):
            raise UsageError("a run is named twice")
        return runs

    @property
    def step_counts(self) -> tuple[int, ...] | None:
        """The numbers of steps, rising; None where none are asked for, UsageError for a list that is none."""
        if self.sampling_steps is None:
            return None
        words = self.sampling_steps.split(",")
        if not all(re.fullmatch(r"[1-9][0-9]{0,5}", word.strip(), re.ASCII) for word in words):
            allowed = "positive integers (below a million) with commas between, such as 1,2,4,8"
            raise UsageError(f"--sampling-steps {self.sampling_steps!r}: expected {allowed}")
        counts = sorted(int(word) for word in words)
        if len(set(counts)) < len(counts):
            raise UsageError(f"--sampling-steps {self.sampling_steps!r}: a number is there twice")
        return tuple(counts)


@dataclass(frozen=True)
class ListFlags:
    """List what there is."""

    what: Annotated[Literal["targets", "methods", "actors", "refiners", "objectives"], Positional]
    """targets, methods, actors, refiners or objectives."""


@dataclass(frozen=True)
class BenchFlags:
    """Measure what a run and its parts cost, or how noisy the objectives' gradients are, on the CPU.

    rollout, update, mala, replay, weights and stream are each measured beside a floor, what they cannot do without,
    and some beside a naive way of doing the same and the published one; all is these six. start, end-to-end, step and
    scale measure whole runs, in minutes: the way to the first learner step; the learner with an actor and a refiner
    beside itself fed from memory; a step of learner and actor beside the naive and the published one; trajectories/s
    and memory with the number of actors, and a step's with the dimension, both also as plots.
    gradients trains a sampler and tabulates every objective's gradient noise at equal cost, before and after;
    objectives tabulates seconds and peak memory of one update.
    """

    what: Annotated[
        Literal[
            "gradients",
            "objectives",
            "rollout",
            "update",
            "mala",
            "replay",
            "weights",
            "stream",
            "all",
            "start",
            "end-to-end",
            "step",
            "scale",
        ],
        Positional,
    ]
    """rollout, update, mala, replay, weights, stream, all, start, end-to-end, step, scale, gradients or objectives."""
    target: Annotated[str | None, arg(metavar="TARGET", help_behavior_hint="(default: manywell; gradients: gmm9)")] = (
        None
    )
    """Name of a target, or path/file.py:Class."""
    langevin: bool = False
    """Langevin policies (default target: gmm25)."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(gradients, default: 500)")] = None
    """Updates of training before the second table of gradients."""
    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 300; gradients: 100)")] = None
    """Trajectories of a gradient or update."""
    sampling_steps: Annotated[int, arg(metavar="N")] = 100
    """Steps of the diffusion, T."""
    segment_length: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: T/5)")] = None
    """Transitions of a segment, for gradients and objectives."""
    repeats: Annotated[
        int | None, arg(metavar="K", help_behavior_hint="(default: 20; gradients: 64; whole runs: 3; scale: 5)")
    ] = None
    """Gradients, or timed rounds, of everything that is compared."""
    seconds: Annotated[float | None, arg(metavar="X", help_behavior_hint="(end-to-end, step: 20; scale: 10)")] = None
    """How long each run is watched."""
    actors: Annotated[str, arg(metavar="N,N,…")] = "1,2,4,8,16"
    """Numbers of actors, for scale."""
    dims: Annotated[str, arg(metavar="D,D,…")] = "32,128,512,1600"
    """Dimensions, for scale."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: here)")] = None
    """Where scale draws its plots."""
    lam: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: 2)")] = None
    """The λ of subtrajectory balance, for gradients and objectives."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the networks and of every draw."""
    json: bool = False
    """Print one JSON object instead of tables."""


@dataclass(frozen=True)
class SoakFlags:
    """Train a sampler of TARGET while faults hit the run at random times, and tell which promises held.

    Every field of the configuration is a flag too, as with train. Exit code 1 where a promise broke.
    """

    target: Annotated[str, Positional, arg(metavar="TARGET")]
    """Name of a target, or path/file.py:Class."""
    minutes: Annotated[float, arg(metavar="X")] = 20.0
    """Minutes of training; what a fault costs comes on top."""
    faults: Annotated[str, arg(metavar="all|KIND,…")] = "all"
    """kill-actor, stop-actor, kill-refiner, stop-refiner, kill-evaluator, frames (that nobody may send), suspend,
    interrupt, kill-learner, kill-supervisor (these three with a resume), or all of them."""
    every_s: Annotated[float, arg(metavar="X")] = 5.0
    """Mean seconds from a fault that is over to the next."""
    method: Annotated[str, arg(metavar="NAME|FILE.toml")] = "default"
    """What to train with."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Decides the order, times and victims of the faults, as far as the run's own timing lets it."""
    compare: Annotated[int, arg(metavar="K")] = 0
    """Undisturbed runs of as many steps afterwards, to compare the results with."""
    fuzz: Annotated[int, arg(metavar="N")] = 0
    """Mutated messages for the decoders afterwards."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Run directory; by default runs/TARGET-soak-TIME."""


@dataclass(frozen=True)
class NewFlags:
    """Write a short, commented plug-in or preset that works, to be changed."""

    kind: Annotated[Literal["actor", "refiner", "target", "preset"], Positional]
    """actor, refiner, target or preset."""
    file: Annotated[Path, Positional, arg(metavar="FILE")]
    """File to write, such as my_actor.py (its class is then MyActor) or my_preset.toml; never one that exists."""


@dataclass(frozen=True)
class CheckFlags:
    """Check that an actor, refiner, target, objective or preset does what a run expects of it."""

    what: Annotated[str, Positional, arg(metavar="FILE.py:NAME|FILE.toml|NAME")]
    """Your own class or function, in a file or as package.module:Name, a preset's file, or a name from `list`."""
    kind: Annotated[Literal["actor", "refiner", "target", "objective", "preset"] | None, Optional] = None
    """What it is, where its name or its type does not say so."""
    options: Annotated[dict[str, int | float | bool | str], arg(metavar="KEY VALUE …", help_behavior_hint="")] = field(
        default_factory=dict
    )
    """Options of an actor, refiner or target, such as: dim 16."""
    json: bool = False
    """Print one JSON object instead of a table."""


def split_config_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate --component.field flags, with the values after them, from a command's own."""
    own: list[str] = []
    config: list[str] = []
    current = own
    for token in arguments:
        if token.startswith("-") and not re.match(r"-\.?\d", token):
            current = config if "." in token.split("=")[0] else own
        current.append(token)
    return own, config


def parse(kind: type[Flags], arguments: Sequence[str], prog: str) -> Flags:
    """Fill a dataclass from flags; --help prints and exits.

    Raises:
        UsageError: anything that does not fit, in one line.
    """
    flags, unknown = parse_known(kind, arguments, prog, config=(FlagCreatePairsOff,))
    refuse(unknown, kind)
    return flags


def parse_known(kind: type[Flags], arguments: Sequence[str], prog: str, **options: Any) -> tuple[Flags, list[str]]:
    """Fill a dataclass from flags; returns it with the arguments that have no place in it.

    `options` are those of `tyro.cli`. Raises UsageError for a value that does not fit.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=arguments, prog=prog, return_unknown_args=True, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(first_sentence(complaint.getvalue())) from None


def refuse(unknown: Sequence[str], kind: type) -> None:
    """Raise UsageError for the first argument that has no place in `kind`, with what may have been meant."""
    if not unknown:
        return
    flag = next((token.split("=")[0] for token in unknown if token.startswith("-")), None)
    if flag is None:
        raise UsageError(f"unexpected argument {unknown[0]!r}")
    raise UsageError(f"unknown flag {flag}{suggestion(flag, flag_names(kind))}")


def first_sentence(box: str) -> str:
    """What a box that tyro draws around an error says first, in our words."""
    lines = [line.strip(" │") for line in box.splitlines()[1:]]
    rules = [not set(line) - set("─-╰╯") for line in lines]
    start = rules.index(False)
    text = " ".join(lines[start : rules.index(True, start)]).removeprefix("Error parsing ")
    text = re.sub(r"^Missing from .*?: ", "missing: ", text).replace(" (required)", "")
    text = re.sub(r"^[a-z_]+\.[\w.]+: ", "", text)
    text = re.sub(r"^(\w+): (?=\1\.)", "", text)
    text = re.sub(
        r"no type matching (?:{None}\|)?(\S+) could be instantiated from \[(.*)\]\.?", r"expected \1, not \2", text
    )
    return re.sub(r"one of \((.*)\)", lambda choices: f"one of {_choices(choices[1])}", text)


def _choices(text: str) -> str:
    return ", ".join(sorted(set(re.findall(r"'([^']*)'", text)) - {"None"}))


def flag_names(kind: type, prefix: str = "--") -> list[str]:
    """Every flag that a dataclass gives rise to."""
    names = []
    for item in fields(kind):
        flag = prefix + item.name.replace("_", "-")
        if isinstance(item.type, type) and is_dataclass(item.type):
            names += flag_names(item.type, f"{flag}.")
        else:
            names.append(flag)
    return names


def answer(prog: str, action: Callable[[], int]) -> int:
    """Run `action`; what goes wrong with it becomes one line on stderr and an exit code."""
    try:
        return action()
    except (UsageError, ConfigError) as error:
        return complain(prog, error, 2)
    except (CommandError, TargetError, PluginError, OSError) as error:
        return complain("driftstream", error, 1)
    except KeyboardInterrupt:
        return complain("driftstream", "interrupted", 130)


def complain(prog: str, error: object, code: int) -> int:
    """Print one line on stderr; returns the exit code."""
    print(f"{prog}: {error}", file=sys.stderr)
    return code


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, where something known is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
