"""The command line: `driftstream train|sample|eval|list`. Only what a command needs is imported."""

import sys
from collections.abc import Sequence

from driftstream.envs.errors import ConfigError, TargetError
from driftstream.launch.flags import (
    CommandError,
    EvalFlags,
    ListFlags,
    SampleFlags,
    TrainFlags,
    UsageError,
    parse,
    split_config_flags,
    suggestion,
)

USAGE = """\
usage: driftstream COMMAND …

Train diffusion samplers for densities known up to their normaliser.

  driftstream train gmm25                     train, evaluate, plot; Ctrl-C saves and stops
  driftstream sample RUN -n 1000 -o FILE.npz  draw from a trained sampler, with importance weights
  driftstream eval RUN                        how good it is, and how far to trust it
  driftstream list targets                    what there is to sample
  driftstream list methods                    how there is to train

`driftstream COMMAND --help` lists a command's flags.
"""
COMMANDS = ("train", "sample", "eval", "list")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 usage, 130 interrupted."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    if command in ("", "-h", "--help"):
        print(USAGE, end="")
        return 0 if command else 2
    prog = f"driftstream {command}" if command in COMMANDS else "driftstream"
    try:
        return _run(command, rest, prog)
    except (UsageError, ConfigError) as error:
        return _complain(prog, error, 2)
    except (CommandError, TargetError, OSError) as error:
        return _complain("driftstream", error, 1)
    except KeyboardInterrupt:
        return _complain("driftstream", "interrupted", 130)


def _run(command: str, arguments: list[str], prog: str) -> int:
    # Flags are parsed before `commands` is imported, and torch with it.
    if command == "train":
        own, config = split_config_flags(arguments)
        train_flags = parse(TrainFlags, own, prog)
        from driftstream.launch import train

        return train.run(train_flags, config, prog)
    if command == "sample":
        sample_flags = parse(SampleFlags, arguments, prog)
        from driftstream.launch import commands

        return commands.sample(sample_flags)
    if command == "eval":
        eval_flags = parse(EvalFlags, arguments, prog)
        from driftstream.launch import commands

        return commands.evaluate(eval_flags)
    if command == "list":
        list_flags = parse(ListFlags, arguments, prog)
        from driftstream.launch import commands

        return commands.show_list(list_flags)
    close = suggestion(command, COMMANDS)
    raise UsageError(f"unknown command {command!r}{close} (commands: {', '.join(COMMANDS)})")


def _complain(prog: str, error: object, code: int) -> int:
    print(f"{prog}: {error}", file=sys.stderr)
    return code
