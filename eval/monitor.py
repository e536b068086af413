"""Where metrics go: `metrics.jsonl`, always and at once, and Weights & Biases, when it can be had.

W&B is a guest. It runs in a thread of its own behind a bounded queue, so that neither its failure nor its
slowness reaches the run: a row that finds the queue full is dropped from W&B and counted, and stays in the
JSONL.
"""

import errno
import json
import logging
import math
import netrc
import os
import queue
import secrets
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from driftstream.envs.errors import require

WandbMode = Literal["auto", "online", "offline", "disabled"]
ResolvedMode = Literal["online", "offline", "disabled"]

METRICS_FILE = "metrics.jsonl"

_QUEUE_ROWS = 1000
_UNWRITTEN_ROWS = 100_000
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class MonitorConfig:
    """Where W&B sends the run; raises ConfigError for an unknown mode.

    `auto` obeys WANDB_MODE where it is set; else it is `online` where an API key is configured (WANDB_API_KEY
    or netrc) and `offline` otherwise. `name` defaults to the run directory's.
    """

    wandb: WandbMode = "auto"
    project: str = "driftstream"
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        modes = get_args(WandbMode)
        require(self.wandb in modes, "monitor.wandb", self.wandb, f"one of {', '.join(modes)}")


def resolve_mode(mode: WandbMode) -> ResolvedMode:
    """What `auto` means here and now; the other modes mean themselves. Reads no key, only looks for one."""
    if mode != "auto":
        return mode
    wanted = os.environ.get("WANDB_MODE")
    if wanted in get_args(ResolvedMode):
        return cast(ResolvedMode, wanted)
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = os.environ.get("NETRC", str(Path.home() / ".netrc"))
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False


class Monitor:
    """The one sink of a run's metrics; used from one thread.

    Writes RUN/metrics.jsonl, one flat JSON object a line, and mirrors it to W&B, whose files are under
    RUN/wandb. Nothing here raises once it is made: what goes wrong with W&B is one warning, and rows that the disk
    does not take wait in memory until it does.
    """

    def __init__(self, run_dir: Path, config: MonitorConfig, resolved_config: Mapping[str, Any]) -> None:
        self._file = _PatientFile(run_dir / METRICS_FILE)
        self._position: dict[str, float | None] = {}
        mode = resolve_mode(config.wandb)
        self._wandb = None if mode == "disabled" else _WandbThread(run_dir, config, mode, resolved_config)

    def log(self, metrics: Mapping[str, float], step: int, wall_s: float, energy_evaluations: int) -> None:
        """One row: on disk when this returns, on its way to W&B. Values that are not finite become null.

        While the disk takes nothing, `monitor/unwritten` counts the rows that wait.
        """
        self._position = {"step": step, "wall_s": wall_s, "energy_evaluations": energy_evaluations}
        row = self._position | json_safe(metrics)
        if self._wandb is not None and self._wandb.dropped:
            row["monitor/dropped"] = self._wandb.dropped
        if self._file.waiting:
            row["monitor/unwritten"] = self._file.waiting
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.put(lambda run: run.log({k: v for k, v in row.items() if v is not None}))

    def log_images(self, images: Mapping[str, Path]) -> None:
        """Shows image files in W&B at the last logged position; those that do not exist are left out."""
        there = {name: path for name, path in images.items() if path.is_file()}
        if self._wandb is not None and there:
            position, image = self._position, self._wandb.image
            self._wandb.put(lambda run: run.log(position | {name: image(there[name]) for name in there}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's final figures, for W&B's table of runs."""
        if self._wandb is not None:
            self._wandb.put(lambda run: run.summary.update(dict(values)))

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the W&B run and its service process within `timeout_s`, uploaded or not; can be repeated."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.close(timeout_s)


def json_safe(figures: Mapping[str, float]) -> dict[str, float | None]:
    """The figures as plain numbers, None where they are not finite: JSON has no word for NaN or infinity."""
    numbers = {name: value if isinstance(value, int) else float(value) for name, value in figures.items()}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


class _PatientFile:
    """Lines appended to a file, each whole; those that the disk does not take wait, the oldest lost beyond a bound."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: deque[bytes] = deque(maxlen=_UNWRITTEN_ROWS)
        self._descriptor = self._open()
        self._warned = ""

    @property
    def waiting(self) -> int:
        return len(self._lines)

    def write(self, line: str) -> None:
        self._lines.append(line.encode())
        self._flush()

    def close(self) -> None:
        if self._descriptor < 0:
            return
        self._flush()
        if self._lines:
            _LOG.warning("%s lacks the last %d rows", self._path, len(self._lines))
        os.close(self._descriptor)
        self._descriptor = -1

    def _flush(self) -> None:
        try:
            if not os.fstat(self._descriptor).st_nlink:
                self._replace()
            while self._lines:
                self._append(self._lines[0])
                self._lines.popleft()
            self._warned = ""
        except OSError as error:
            self._warn(f"{self._path} is not written ({error.strerror}); its rows wait in memory")

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._descriptor).st_size
        if os.write(self._descriptor, line) < len(line):
            os.ftruncate(self._descriptor, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _replace(self) -> None:
        """Go on in a new file where the run directory was removed."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._warn(f"{self._path} was removed: its rows go on in a new file")
        removed, self._descriptor = self._descriptor, self._open()
        os.close(removed)

    def _warn(self, what: str) -> None:
        if what != self._warned:
            self._warned = what
            _LOG.warning("%s", what)


class _WandbThread:
    """Owns the W&B run: every call into wandb happens in this thread, in the order of the queue."""

    def __init__(
        self, run_dir: Path, config: MonitorConfig, mode: ResolvedMode, resolved_config: Mapping[str, Any]
    ) -> None:
        self.dropped = 0
        self._run_dir, self._config, self._mode, self._resolved = run_dir, config, mode, dict(resolved_config)
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue()
        self._service: subprocess.Popen[bytes] | None = None
        self._failed = False
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="wandb", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Any], None]) -> None:
        if self._failed or self._closed:
            return
        if self._queue.qsize() >= _QUEUE_ROWS:
            self.dropped += 1
        else:
            self._queue.put(call)

    def image(self, path: Path) -> Any:
        import wandb

        return wandb.Image(str(path))

    def close(self, timeout_s: float) -> None:
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + timeout_s
        self._queue.put(None)
        # The last tenth is for the service to be killed and the thread to notice.
        self._thread.join(0.9 * timeout_s)
        if self._thread.is_alive():
            _LOG.warning(
                "W&B did not finish within %.3g s; `wandb sync %s` uploads the rest",
                timeout_s,
                self._run_dir / "wandb",
            )
            self._failed = True
            if self._service is not None:
                self._service.kill()
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _main(self) -> None:
        try:
            run = self._start()
            while (call := self._queue.get()) is not None:
                call(run)
            run.finish()
        except Exception as error:
            if not self._failed:
                _LOG.warning("W&B is off from here on (%s: %s); metrics.jsonl goes on", type(error).__name__, error)
            self._failed = True
        finally:
            # SystemExit is how teardown passes on a failed service's exit code.
            with suppress(Exception, SystemExit):
                import wandb

                wandb.teardown()

    def _start(self) -> Any:
        import wandb

        if self._mode == "online" and not _has_key():
            # wandb would ask for it on the terminal that shows the run's progress.
            raise RuntimeError("no API key: run `wandb login`, or set WANDB_API_KEY")
        self._service = _service_process(wandb.setup())
        config = self._config
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or self._run_dir.resolve().name,
            tags=list(config.tags),
            config=self._resolved,
            dir=self._run_dir,
            id=self._run_id(),
            resume="allow" if self._mode == "online" else None,
            mode=self._mode,
            settings=wandb.Settings(silent=True, console="off", save_code=False),
        )
        # Roles report at their own paces: rows need not come in the order of their steps.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _run_id(self) -> str:
        """The same W&B run for a run directory that is resumed."""
        path = self._run_dir / "wandb" / "run-id"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(secrets.token_hex(4))
        return path.read_text()


def _service_process(setup: Any) -> subprocess.Popen[bytes] | None:
    """The service that wandb started, if it did: nothing public ends it without waiting for uploads."""
    try:
        return setup._connection._proc._process
    except AttributeError:
        return None
