"""Fixtures shared by the whole suite."""

import json
import signal
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from wandb.proto import wandb_internal_pb2

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The suite shares its cores with the role processes that it starts.
    torch.set_num_threads(1)


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
