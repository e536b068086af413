"""Fixtures shared by the whole suite."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from wandb.proto import wandb_internal_pb2

from driftstream.actors import native
from driftstream.actors.native import BUILDS, Library

GOLDEN = Path(__file__).parent / "golden"
DRIFTSTREAM = str(Path(sys.executable).with_name("driftstream"))
SMALL = [
    *("--sampling-steps", "10", "--policy.hidden", "16", "--learner.batch-size", "50"),
    *("--refiner.mala.chains", "50", "--refiner.mala.mcmc-steps", "40", "--refiner.mala.burn-in", "20"),
    *("--refiner.every", "20", "--eval.samples", "100", "--eval.w2-samples", "100", "--eval.every-s", "1"),
    *("--replay.minimum", "50", "--checkpoint.every-s", "2"),
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The suite shares its cores with the role processes that it starts.
    torch.set_num_threads(1)


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """That build of the native code is used. An install without a C++ compiler has none."""
    if request.param == "network_avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip(f"{request.param}: not for this processor")
    try:
        built = Library(request.param)
    except OSError:
        assert not any(map(shutil.which, ("c++", "g++", "clang++"))), f"{request.param} was not built"
        pytest.skip(f"{request.param}: there is no C++ compiler")
    monkeypatch.setattr(native, "library", lambda: built)
    return built


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    # What a shell starts in the background ignores SIGINT, and so would the runs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Mapping[str, np.ndarray]]:
    """Loader of the float64 reference values: `golden("targets")["gmm25_x"]`."""

    def load(name: str) -> Mapping[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


def _wandb_records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of a .wandb file: a LevelDB log of protobufs, in blocks of 32 KiB, with a header."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32_768 - position % 32_768 < 7:
            position += 32_768 - position % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or last of several
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def _read_wandb(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], Any]:
    """History rows, configuration, summary and run record of the one offline run."""
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    run = None

    def name(item: Any) -> str:
        return item.key or "/".join(item.nested_key)

    for record in _wandb_records(path):
        if record.HasField("run"):
            run = record.run
            config |= {name(item): json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            history.append({name(item): json.loads(item.value_json) for item in record.history.item})
        if record.HasField("summary"):
            summary |= {name(item): json.loads(item.value_json) for item in record.summary.update}
    return history, config, summary, run


@pytest.fixture(scope="session")
def read_wandb() -> Callable[[Path], tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], Any]]:
    """Reader of a run directory's offline W&B run: history rows, configuration, summary, run record."""
    return _read_wandb


def processes(root: Path) -> dict[str, int]:
    """Every live process of a run by its name, as its title has it."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or []).split()
        if len(words) == 3 and words[0] == "driftstream" and words[2] == str(root):
            found[words[1]] = process.pid
    return found


class Training:
    """One `driftstream train` with its output and the time of each line."""

    def __init__(self, root: Path, *arguments: str, prefix: Sequence[str] = ()) -> None:
        self.root = root
        self.output = root.with_suffix(".txt")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [*prefix, DRIFTSTREAM, "train", *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def wait_for(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"waited in vain; output:\n{self.text()}"
            assert self.process.poll() is None, f"ended early; output:\n{self.text()}"
            time.sleep(0.02)
        return value

    def processes(self) -> dict[str, int]:
        """Every live process of the run by its name."""
        return processes(self.root)

    def text(self) -> str:
        return self.output.read_text()

    def rows(self) -> list[dict[str, Any]]:
        path = self.root / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self) -> int:
        return max((row["step"] for row in self.rows()), default=0)

    def end(self, seconds: float = 120.0) -> int:
        code = self.process.wait(seconds)
        time.sleep(0.2)
        assert processes(self.root) == {}
        return code


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Starts small training runs, `train(*arguments)` with "{root}" for the run directory; none is left behind."""
    yield from _starter(tmp_path)


@pytest.fixture(scope="module")
def train_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Training]]:
    """`train`, for runs that the tests of a file share."""
    yield from _starter(tmp_path_factory.mktemp("runs"))


def _starter(directory: Path) -> Iterator[Callable[..., Training]]:
    started: list[Training] = []

    def start(
        *arguments: str, root: Path | None = None, wandb: str = "disabled", prefix: Sequence[str] = ()
    ) -> Training:
        root = root or directory / f"run{len(started)}"
        given = [argument.replace("{root}", str(root)) for argument in arguments]
        started.append(Training(root, *given, *SMALL, "--wandb", wandb, prefix=prefix))
        return started[-1]

    yield start
    for training in started:
        if training.process.poll() is None:
            for pid in (training.process.pid, *processes(training.root).values()):
                os.kill(pid, signal.SIGKILL)
            training.process.wait(10)
