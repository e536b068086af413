"""The command line: `driftstream train|join|sample|eval|list|new|check|bench`. Only what one needs is imported."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from driftstream.launch.flags import (
    BenchFlags,
    CheckFlags,
    EvalFlags,
    ListFlags,
    NewFlags,
    SampleFlags,
    UsageError,
    answer,
    parse,
    suggestion,
)
from driftstream.launch.leave import leave

USAGE = """\
usage: driftstream COMMAND …

Train diffusion samplers for densities known up to their normaliser.

  driftstream train gmm25                     train, evaluate, plot; Ctrl-C saves and stops
  driftstream join join.toml --actors 4       help a run with actors on another host
  driftstream sample RUN -n 1000 -o FILE.npz  draw from a trained sampler, with importance weights
  driftstream eval RUN                        how good it is, and how far to trust it
  driftstream list targets                    what there is to sample
  driftstream list methods                    how there is to train
  driftstream new actor my_actor.py           an actor to start from; also refiner, target, preset
  driftstream check my_actor.py:MyActor       whether it does what a run expects
  driftstream bench gradients                 how noisy the objectives' gradients are
  driftstream bench objectives                what the objectives cost
  driftstream bench all                       what the parts of a run cost, beside what they must cost
  driftstream bench start                     how long a run takes to its first step; also end-to-end, step, scale
  driftstream soak gmm9 --minutes 5           whether a run keeps what is promised while its parts fail

`driftstream COMMAND --help` lists a command's flags.
"""
EXIT_S = 0.5
"""What exit handlers of libraries get: W&B's would wait for a silent server."""
COMMANDS = ("train", "join", "sample", "eval", "list", "new", "check", "bench", "soak")


def run_and_leave() -> NoReturn:
    """Run the command that this process was started with, and end it."""
    leave(main(), EXIT_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 usage, 130 interrupted."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    if command in ("", "-h", "--help"):
        print(USAGE, end="")
        return 0 if command else 2
    prog = f"driftstream {command}" if command in COMMANDS else "driftstream"
    return answer(prog, lambda: _run(command, rest, prog))


def _run(command: str, arguments: list[str], prog: str) -> int:
    if command == "train":
        from driftstream.launch import train

        return train.run(arguments, prog)
    if command == "join":
        from driftstream.launch import join

        return join.run(arguments, prog)
    # Flags are parsed before `commands` is imported, and torch with it: a mistyped flag is answered at once.
    if command == "sample":
        sample = parse(SampleFlags, arguments, prog)
        from driftstream.launch import commands

        return commands.sample(sample)
    if command == "eval":
        evaluate = parse(EvalFlags, arguments, prog)
        from driftstream.launch import commands

        return commands.evaluate(evaluate)
    if command == "list":
        what = parse(ListFlags, arguments, prog)
        from driftstream.launch import commands

        return commands.show_list(what)
    if command == "new":
        from driftstream.launch import new

        return new.new(parse(NewFlags, arguments, prog))
    if command == "check":
        plugin = parse(CheckFlags, arguments, prog)
        from driftstream.launch import check

        return check.check(plugin)
    if command == "soak":
        from driftstream.launch import soak

        return soak.run(arguments, prog)
    if command == "bench":
        measure = parse(BenchFlags, arguments, prog)
        from driftstream.launch import bench

        return bench.run(measure)
    close = suggestion(command, COMMANDS)
    raise UsageError(f"unknown command {command!r}{close} (commands: {', '.join(COMMANDS)})")
