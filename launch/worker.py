"""The start and the end of a role's process, whatever the role."""

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import setproctitle

from driftstream.launch.leave import leave
from driftstream.launch.run_directory import RunDirectory

ROLE_FUNCTION = "driftstream.launch.roles:run_role"
FAILED, FAILED_FOR_GOOD = 1, 3
"""Exit codes of a role that may be started again, and of one that would only fail in the same way."""
DUMP_STACK = signal.SIGUSR1
"""Makes a role write to its log where each of its threads is."""
EXIT_S = 2.0
NOTHING_TO_SAVE_S = 4.0
"""What a role other than the learner gets once the supervisor is gone; a library that holds the interpreter's lock may
take longer."""
NICE = {"actor": 10, "refiner": 15, "evaluator": 19}
"""All give way to the learner: where processors are few, what wakes beside it would else take its own for a while.

Nobody waits for a refiner's next states, nor for an evaluation: these give way to actors too.
"""

log = logging.getLogger("driftstream")


def role_name(role: str, index: int) -> str:
    """The name of a role in logs, titles and metrics: "actor-0"; there is one learner and one evaluator."""
    return role if role in ("learner", "evaluator") else f"{role}-{index}"


def worker_main(
    run_root: str, role: str, index: int, epoch: int, seed: int, role_function: str, joined_as: str = ""
) -> None:
    """Run one role in this process, from a bare process to its exit code.

    Only strings and integers cross from the supervisor: the configuration comes from the run directory, the
    role's function from `role_function`, "module:name" or "file.py:name", called with (role, config, context).
    A role on another host than the learner's is `joined_as` a name of its own.
    Exit code 0 is an ordinary end, 1 a failure, 3 a failure that a new process would meet again.
    """
    name, run = joined_as or role_name(role, index), RunDirectory(Path(run_root))
    # The supervisor tells roles when to stop; a Ctrl-C in the terminal, or its end, is the supervisor's affair.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)
    _write_to(run.log(name))
    setproctitle.setproctitle(f"driftstream {name} {run.root}")
    os.nice(NICE.get(role, 0))
    log.info("%s: process %d, epoch %d, seed %d", name, os.getpid(), epoch, seed)
    code = _run(run, role, index, epoch, seed, role_function, joined_as)
    if code == 0:
        log.info("%s: done", name)
    leave(code, EXIT_S)


def _run(run: RunDirectory, role: str, index: int, epoch: int, seed: int, role_function: str, joined_as: str) -> int:
    # Imported here: the supervisor needs this module, but not torch.
    from driftstream.buffers.control import ControlClient, Endpoints, RoleContext
    from driftstream.envs.errors import ConfigError, PluginError, TargetError
    from driftstream.envs.registry import load_object
    from driftstream.launch.config import from_toml
    from driftstream.launch.seeding import seed_everything

    config = from_toml(run.config)
    endpoints = Endpoints(**run.addresses())
    control = ControlClient(endpoints.control, joined_as or role_name(role, index), config.supervisor.heartbeat_s)
    signal.signal(signal.SIGTERM, lambda *_: control.stop.set())
    drain_s = config.supervisor.drain_s
    watch = (control.stop, drain_s if role == "learner" else min(drain_s, NOTHING_TO_SAVE_S))
    threading.Thread(target=_end_with_supervisor, args=watch, daemon=True).start()
    try:
        seed_everything(seed)
        context = RoleContext(role, index, seed, epoch, run.root, endpoints, control, joined_as)
        load_object(role_function, "role_function")(role, config, context)
        return 0
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, (TargetError, PluginError)) and error.__cause__ is not None:
            # Last, as the supervisor shows the last lines: where in the user's code it happened.
            traceback.print_exception(error.__cause__)
        ends_the_run = config.supervisor.target_error == "end"
        fatal = isinstance(error, ConfigError) or (isinstance(error, TargetError) and ends_the_run)
        report = {"type": type(error).__name__, "message": str(error), "fatal": fatal}
        control.report("error", report)
        return FAILED_FOR_GOOD if fatal else FAILED
    finally:
        control.close()


def _end_with_supervisor(stop: threading.Event, grace_s: float) -> None:
    supervisor = multiprocessing.parent_process()
    if supervisor is None:
        return
    if not supervisor.is_alive():
        os._exit(FAILED)  # nothing has been begun
    supervisor.join()
    log.warning("the supervisor is gone: stopping within %g s", grace_s)
    stop.set()
    time.sleep(grace_s)
    os._exit(FAILED)


def _write_to(path: Path) -> None:
    """Send what this process writes, libraries' C code included, to a log file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr, force=True)
    faulthandler.enable()
    faulthandler.register(DUMP_STACK)
