"""Checkpoints: replaced without a gap, never half there, and a failed write is known."""

import threading
from pathlib import Path

import pytest
import torch

from driftstream.learner.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    CheckpointState,
    checkpoint_paths,
    load_checkpoint,
    save_checkpoint,
)


def state(value: float = 1.0, step: int = 5, **numbers: object) -> CheckpointState:
    return CheckpointState(step, {"policy": {"weight": torch.full((3,), value)}}, numbers)


def test_an_equal_checkpoint_stays_as_it_is(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state())
    inode = path.stat().st_ino
    assert save_checkpoint(tmp_path, state()) == path
    assert path.stat().st_ino == inode
    assert [child.name for child in tmp_path.iterdir()] == ["step-5"]


@pytest.mark.parametrize("damaged", [False, True])
def test_another_or_a_damaged_one_of_the_same_step_is_replaced(damaged: bool, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state())
    if damaged:
        (path / "policy.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, state(1.0 if damaged else 2.0))
    assert load_checkpoint(path).groups["policy"]["weight"].tolist() == [1.0 if damaged else 2.0] * 3
    assert [child.name for child in tmp_path.iterdir()] == ["step-5"]


def test_what_a_killed_process_left_is_removed_at_the_start(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state())
    for name in (".step-6.partial", ".step-5.replaced.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.safetensors").touch()
    Checkpointer(tmp_path, CheckpointConfig())
    assert list(tmp_path.iterdir()) == [path]


def test_whatever_fails_is_kept_as_the_error_until_a_write_succeeds(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(state(unwritable=threading.Lock()))
    checkpointer.wait()
    assert checkpointer.error is not None
    assert "not JSON serializable" in checkpointer.error
    assert not list(tmp_path.iterdir())
    checkpointer.save(state())
    checkpointer.wait()
    assert checkpointer.error is None
    assert checkpoint_paths(tmp_path) == [tmp_path / "step-5"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state())
    (path / "policy.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"policy\.safetensors: unreadable"):
        load_checkpoint(path)
