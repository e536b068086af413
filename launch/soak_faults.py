"""The faults of a soak: each does its damage to a live run, and tells what of the promises was kept."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq

from driftstream.launch.soak_frames import bad_frames
from driftstream.launch.soak_run import SoakedRun, alive, send, wait

CHECKPOINT_S = 10.0
HEARTBEAT_TIMEOUT_S = 15.0
START_S = 120.0
"""A run that was started again trains by then; nothing is promised, a busy machine takes its time."""
SLACK_S = 2.0
"""Between the learner's last report and its death, and from a checkpoint's falling due to its being there."""


@dataclass(frozen=True)
class Finding:
    """One promise put to the test: what was measured (None: never), and the most that was promised."""

    kind: str
    promise: str
    measured: float | None
    limit: float

    @property
    def held(self) -> bool:
        return self.measured is not None and self.measured <= self.limit


Fault = Callable[[SoakedRun, random.Random, int], Iterator[Finding]]
"""(run, random numbers, dimension of the target) -> findings."""


def _strike(run: SoakedRun, kind: str, name: str, number: signal.Signals, within_s: float) -> Iterator[Finding]:
    """Send one role a signal: it is reported, and replaced."""
    pid, start = run.processes()[name], time.monotonic()
    send(pid, number)
    reported = run.seconds_to_line(rf"{name}\b.* ended: ", start, 60.0)
    yield Finding(kind, "reported", reported, within_s)
    ended = start + (reported or 0.0)
    replaced = wait(lambda: run.processes().get(name, pid) != pid, 60.0)
    yield Finding(kind, "replaced", time.monotonic() - ended if replaced else None, 5.0)
    yield Finding(kind, "training goes on", run.goes_on(), START_S)


def _role(role: str, verb: str, number: signal.Signals, within_s: float) -> Fault:
    def fault(run: SoakedRun, rng: random.Random, dim: int) -> Iterator[Finding]:
        names = sorted(name for name in run.processes() if name.partition("-")[0] == role)
        if names:
            yield from _strike(run, f"{verb}-{role}", rng.choice(names), number, within_s)

    return fault


def _learner(run: SoakedRun, rng: random.Random, dim: int) -> Iterator[Finding]:
    family, seconds = run.family(), run.latest("wall_s")
    send(run.processes()["learner"], signal.SIGKILL)
    code = wait(lambda: run.process.poll() is not None, 60.0) and run.process.returncode
    yield Finding("kill-learner", "exit code 1, how to resume", 0.0 if code == 1 else None, 0.0)
    yield from _resumed(run, "kill-learner", family, seconds, CHECKPOINT_S + SLACK_S)


def _supervisor(run: SoakedRun, rng: random.Random, dim: int) -> Iterator[Finding]:
    family, seconds, start = run.family(), run.latest("wall_s"), time.monotonic()
    send(run.process.pid, signal.SIGKILL)
    run.process.wait()
    ended = wait(lambda: not alive(family), 60.0)
    yield Finding("kill-supervisor", "all children end", time.monotonic() - start if ended else None, 10.0)
    yield from _resumed(run, "kill-supervisor", family, seconds, SLACK_S)


def _interrupt(run: SoakedRun, rng: random.Random, dim: int) -> Iterator[Finding]:
    family, seconds, start = run.family(), run.latest("wall_s"), time.monotonic()
    # What a shell started in the background ignores SIGINT, and so do its children.
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    send(run.process.pid, signal.SIGTERM if ignored else rng.choice([signal.SIGINT, signal.SIGTERM]))
    ended = wait(lambda: run.process.poll() is not None, 60.0)
    yield Finding("interrupt", "drained and ended", time.monotonic() - start if ended else None, 10.0)
    yield Finding("interrupt", "exit code 130", 0.0 if run.process.poll() == 130 else None, 0.0)
    yield from _resumed(run, "interrupt", family, seconds, SLACK_S)


def _resumed(
    run: SoakedRun, kind: str, family: set[tuple[int, str]], seconds: float, loss_s: float
) -> Iterator[Finding]:
    """A run that ended left nobody behind, lost little, and goes on."""
    yield Finding(kind, "orphans", float(alive(family) + len(run.processes())), 0.0)
    yield Finding(kind, "training lost", max(0.0, seconds - run.saved()[1]), loss_s)
    run.kill()
    run.resume()
    yield Finding(kind, "training goes on", run.goes_on(), START_S)


def _suspend(run: SoakedRun, rng: random.Random, dim: int) -> Iterator[Finding]:
    """Stop every process for longer than a role may be silent."""
    before, start = run.processes(), time.monotonic()
    for pid in before.values():
        send(pid, signal.SIGSTOP)
    time.sleep(HEARTBEAT_TIMEOUT_S + 2.0)
    for pid in rng.sample(sorted(before.values()), len(before)):
        send(pid, signal.SIGCONT)
    yield Finding("suspend", "training goes on", run.goes_on(), START_S)
    alarms = sum(at > start and " ended: " in line for at, line in run.lines)
    yield Finding("suspend", "false alarms", float(alarms), 0.0)


def _frames(run: SoakedRun, rng: random.Random, dim: int) -> Iterator[Finding]:
    """Every kind of bad message in the name of an actor that has sent its first batch long ago."""
    rows = len(run.rows())
    if not wait(lambda: any(row.get("actor/0/trajectories_per_s") for row in run.rows()[rows:]), START_S):
        return
    messages = bad_frames("actor-0", run.epoch("actor-0"), dim, oversized_bytes=2**20)
    well_formed = ("wrong shape", "replayed")
    before = {name: run.latest(name) for name in ("stream/rejected", "stream/duplicates")}
    context = zmq.Context()
    try:
        sockets = [context.socket(zmq.DEALER) for _ in range(rng.randint(1, 4))]
        for socket in sockets:
            socket.connect(run.directory.addresses()["stream"])
            for name in rng.sample(sorted(messages), len(messages)):
                socket.send_multipart(messages[name])
        expected = {
            "stream/rejected": len(sockets) * (len(messages) - len(well_formed)),
            "stream/duplicates": len(sockets) * len(well_formed),
        }
        for name, count in expected.items():
            wait(lambda name=name, count=count: run.latest(name) >= before[name] + count, 15.0)  # type: ignore[misc]
            missing = before[name] + count - run.latest(name)
            yield Finding("frames", f"not counted as {name.partition('/')[2]}", max(0.0, missing), 0.0)
    finally:
        context.destroy(linger=0)
    yield Finding("frames", "training goes on", run.goes_on(), START_S)


FAULTS: dict[str, Fault] = {
    "kill-actor": _role("actor", "kill", signal.SIGKILL, 1.0),
    "stop-actor": _role("actor", "stop", signal.SIGSTOP, 5.0),
    "kill-refiner": _role("refiner", "kill", signal.SIGKILL, 1.0),
    "stop-refiner": _role("refiner", "stop", signal.SIGSTOP, 5.0),
    "kill-evaluator": _role("evaluator", "kill", signal.SIGKILL, 5.0),
    "frames": _frames,
    "suspend": _suspend,
    "interrupt": _interrupt,
    "kill-learner": _learner,
    "kill-supervisor": _supervisor,
}
