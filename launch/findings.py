"""What a contract test finds, and how it runs: every failure is one line, whatever the plug-in does."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

LIMIT_S = 60.0
"""A check that takes longer is ended: the plug-in hangs."""
NOT_THEIRS = {"driftstream", "torch", "tensordict", "torchrl", "numpy"} | sys.stdlib_module_names
"""Whose lines say nothing of where a plug-in fails."""
Result = Literal["ok", "FAILED", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One check, how it went, and what was seen, in a line."""

    check: str
    result: Result
    seen: str


@dataclass(frozen=True)
class Check:
    """A check by name: `run` says what it saw, or raises.

    Where an `essential` check fails, the rest would only fail likewise, and is left out.
    """

    name: str
    run: Callable[[], str]
    result: Result = "ok"
    essential: bool = False


class ContractError(Exception):
    """What a check found wrong, in a line."""


class DoubtError(Exception):
    """What a check found odd, and is not certain to be wrong."""


def run_checks(checks: Sequence[Check]) -> list[Finding]:
    """Run the checks in their order; whatever they raise is a finding too."""
    findings = []
    for check in checks:
        findings.append(_run(check))
        if check.essential and findings[-1].result == "FAILED":
            break
    return findings


def holds(findings: Sequence[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.result != "FAILED" for finding in findings)


def _run(check: Check) -> Finding:
    hung: list[str] = []
    try:
        with _limit(hung):
            return Finding(check.name, check.result, check.run())
    except DoubtError as doubt:
        return Finding(check.name, "warning", str(doubt))
    except ContractError as broken:
        return Finding(check.name, "FAILED", str(broken))
    except KeyboardInterrupt as interrupt:
        if not hung:
            raise
        return Finding(check.name, "FAILED", f"not done after {LIMIT_S:g} s{place(interrupt)}")
    except Exception as error:
        return Finding(check.name, "FAILED", in_a_line(error))


def in_a_line(error: BaseException) -> str:
    """An exception of somebody's code, with the line that raised it."""
    text = " ".join(str(error).split())
    # Errors of ours that wrap another say its type already.
    name = type(error).__name__
    return (text if type(error).__module__.startswith("driftstream.") else f"{name}: {text}") + place(error)


def place(error: BaseException) -> str:
    """` (file.py:12)`: the last line outside this project and its libraries in the traceback of the first cause."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    frames = list(_frames(cause.__traceback__))
    theirs = [frame for frame in frames if frame[0].partition(".")[0] not in NOT_THEIRS]
    if not theirs and type(error).__module__.startswith("driftstream."):
        return ""
    _, filename, line = (theirs or frames)[-1]
    return f" ({Path(filename).name}:{line})" if Path(filename).is_file() else ""


def _frames(trace: TracebackType | None) -> Iterator[tuple[str, str, int]]:
    while trace is not None:
        frame = trace.tb_frame
        yield str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next


@contextlib.contextmanager
def _limit(hung: list[str]) -> Iterator[None]:
    """Interrupt the body after LIMIT_S, as Ctrl-C would, and say so in `hung`; only in the main thread."""
    main = threading.main_thread()
    lock, done = threading.Lock(), threading.Event()

    def interrupt() -> None:
        with lock:
            if not done.is_set():
                hung.append("interrupted")
                assert main.ident is not None
                signal.pthread_kill(main.ident, signal.SIGINT)

    ours = threading.current_thread() is main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    timer = threading.Timer(LIMIT_S, interrupt)
    timer.daemon = True
    if ours:
        timer.start()
    try:
        yield
    finally:
        with lock:
            done.set()
        timer.cancel()
