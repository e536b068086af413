"""The directory that one run owns: where everything lies, who holds it, and how its sockets are addressed."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TextIO

from driftstream.buffers.keys import make_keys
from driftstream.buffers.sockets import MAX_IPC_PATH_BYTES, with_keys
from driftstream.buffers.stream_config import StreamConfig
from driftstream.envs.errors import ConfigError

DATA_SOCKETS = ("stream", "weights", "ema_weights")
SOCKET_NAMES = (*DATA_SOCKETS, "control")


class RunDirectory:
    """Paths of a run, `RUN/…`; make one with `create` or `open`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.config = self.root / "config.toml"
        self.metrics = self.root / "metrics.jsonl"
        self.results = self.root / "results.json"
        self.logs = self.root / "logs"
        self.checkpoints = self.root / "checkpoints"
        self.plots = self.root / "plots"
        self.sockets = self.root / "sockets"
        self.keys = self.root / "keys"
        self.invitation = self.keys / "join.toml"
        self.lock_file = self.root / ".lock"
        self._holder = ""
        self._new_lock: TextIO | None = None

    @classmethod
    def create(cls, root: Path) -> "RunDirectory":
        """Make a new run directory, readable by its owner only.

        Raises:
            ConfigError: something is there already, or the directory cannot be made.
        """
        run = cls(root)
        try:
            run.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            taken = any(run.root.iterdir())
        except OSError as error:
            raise ConfigError("out", str(root), f"a directory that can be written ({error.strerror})") from error
        if taken:
            allowed = "a new or empty directory (continue a run with --resume, or choose another --out)"
            raise ConfigError("out", str(root), allowed)
        run.root.chmod(0o700)
        for folder in (run.logs, run.checkpoints, run.plots):
            folder.mkdir()
        return run

    @classmethod
    def open(cls, root: Path) -> "RunDirectory":
        """The directory of a run that was started earlier; ConfigError where there is none."""
        run = cls(root)
        if not run.config.is_file():
            raise ConfigError("run", str(root), "a run directory (one that holds a config.toml)")
        return run

    @property
    def shown(self) -> str:
        """The path as a user would type it from here."""
        here = Path.cwd()
        return str(self.root.relative_to(here) if self.root.is_relative_to(here) else self.root)

    @property
    def resume_command(self) -> str:
        """What to type to go on with this run."""
        return f"driftstream train --resume {self.shown}"

    def log(self, role: str) -> Path:
        """Log file of a role such as "actor-0"."""
        return self.logs / f"{role}.log"

    def write_config(self, toml: str) -> None:
        """Replace config.toml in one step: a reader sees the old one or the new one."""
        draft = self.config.with_suffix(".tmp")
        draft.write_text(toml)
        draft.replace(self.config)

    @contextlib.contextmanager
    def hold(self, stream: StreamConfig | None = None, elsewhere: Mapping[str, str] | None = None) -> Iterator[int]:
        """Hold the run for this process, choose its sockets' addresses and make the keys that they need.

        Addresses are files, or ports of the host of `stream`; of sockets that others listen on they are given in
        `elsewhere`. Yields how many processes held it before: random streams of a resumed run must not repeat. The
        lock goes with the process, however it ends.

        Raises:
            ConfigError: another process holds the run, the host is not this machine, or the run's keys are not safe.
        """
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                allowed = f"a run that nobody trains at present (it is held: {lock.read()})"
                raise ConfigError("run", str(self.root), allowed) from None
            text = lock.read()
            held_before = json.loads(text)["held"] if text else 0
            lock.seek(0)
            self._holder = json.dumps({"pid": os.getpid(), "held": held_before + 1})
            lock.write(self._holder)
            lock.truncate()
            lock.flush()
            folder = self._make_sockets(stream or StreamConfig(), elsewhere or {})
            try:
                yield held_before
            finally:
                if self._new_lock is not None:
                    self._new_lock.close()
                    self._new_lock = None
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(self.sockets, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self.invitation.unlink()

    def lock_again(self) -> None:
        """Lock the held directory anew where it was removed and made again; OSError where that cannot be."""
        if self._holder and self._new_lock is None and not self.lock_file.exists():
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            self._new_lock = os.fdopen(descriptor, "r+")
            fcntl.flock(self._new_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._new_lock.write(self._holder)
            self._new_lock.flush()

    def _make_sockets(self, stream: StreamConfig, elsewhere: Mapping[str, str]) -> Path:
        # Left over when a supervisor was killed; nobody listens there, as the lock was free.
        shutil.rmtree(self.sockets, ignore_errors=True)
        self.sockets.mkdir(mode=0o700)
        folder = self.sockets
        if max(len(os.fsencode(folder / f"{name}.ipc")) for name in SOCKET_NAMES) > MAX_IPC_PATH_BYTES:
            folder = Path(tempfile.mkdtemp(prefix="driftstream-"))
        addresses = {name: f"ipc://{folder / name}.ipc" for name in SOCKET_NAMES}
        if stream.transport == "tcp" and not elsewhere:
            # Control stays this user's own where nobody else is let in.
            names = SOCKET_NAMES if stream.uses_keys else DATA_SOCKETS
            ports = free_ports(stream.host, len(names))
            addresses |= {name: f"tcp://{stream.host}:{port}" for name, port in zip(names, ports, strict=True)}
            if stream.uses_keys:
                make_keys(self.keys)
                addresses = {name: with_keys(address, self.keys) for name, address in addresses.items()}
        addresses |= elsewhere
        (self.sockets / "addresses.json").write_text(json.dumps(addresses, indent=2))
        return folder

    def addresses(self) -> dict[str, str]:
        """ZeroMQ address of each socket of the run, by name, while a process holds it."""
        return json.loads((self.sockets / "addresses.json").read_text())


def default_root(target: str, method: str, now: datetime | None = None) -> Path:
    """`runs/<target>-<method>-<date>-<time>`; names that are files or modules are reduced to a word."""
    words = [re.sub(r"[^\w.+-]+", "-", Path(name.rpartition(":")[2]).stem) for name in (target, method)]
    stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
    root = Path("runs") / "-".join([*words, stamp])
    tries = (root, *(root.with_name(f"{root.name}-{n}") for n in range(2, 1000)))
    return next(path for path in tries if not path.exists())


def free_ports(host: str, count: int) -> list[int]:
    """TCP ports that nobody listens on at present; ConfigError where the host is not this machine."""
    with contextlib.ExitStack() as stack:
        try:
            listeners = [stack.enter_context(socket.create_server((host, 0))) for _ in range(count)]
        except OSError as error:
            raise ConfigError("stream.host", host, f"an address of this machine ({error.strerror})") from None
        return [listener.getsockname()[1] for listener in listeners]
