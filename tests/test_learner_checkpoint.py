"""Checkpoints: replaced without a gap, never half there, and a failed write is known."""

import hashlib
import json
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
    find_checkpoint,
    keep_only,
    load_checkpoint,
    load_latest,
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


def test_what_a_killed_process_was_about_to_replace_is_put_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state())
    path.rename(tmp_path / ".step-5.replaced.partial")
    Checkpointer(tmp_path, CheckpointConfig())
    assert list(tmp_path.iterdir()) == [path]
    assert load_checkpoint(path).step == 5


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_stay_and_none_of_a_later_step(keep: int, tmp_path: Path) -> None:
    for step in (1, 2, 9):
        save_checkpoint(tmp_path, state(step=step))
    (tmp_path / "step-9" / "policy.safetensors").write_bytes(b"torn")
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=keep))
    checkpointer.save(state(step=5))
    checkpointer.wait()
    assert checkpoint_paths(tmp_path) == [tmp_path / f"step-{step}" for step in (2, 5)[-keep:]]


def test_a_file_that_the_manifest_vouches_for_may_still_be_no_tensors(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1.0))
    junk, manifest = b"junk", json.loads((path / "manifest.json").read_text())
    (path / "policy.safetensors").write_bytes(junk)
    manifest["files"]["policy.safetensors"] = {"sha256": hashlib.sha256(junk).hexdigest(), "bytes": len(junk)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"policy\.safetensors: no safetensors file"):
        load_checkpoint(path)


def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step=step))
    (tmp_path / "step-2" / "policy.safetensors").write_bytes(b"torn")
    found, (error,) = load_latest(tmp_path)
    assert found.step == 1
    assert "step-2/policy.safetensors: damaged" in str(error)


def test_one_that_could_not_be_read_is_set_aside_by_the_next_write(tmp_path: Path) -> None:
    for step in (1, 4, 5):
        save_checkpoint(tmp_path, state(step=step))
    keep_only(tmp_path, state(step=2), keep=3, spare_later=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2", "step-5.skipped"]
    (tmp_path / "step-5.skipped").rename(tmp_path / "step-5")
    assert load_latest(tmp_path)[0].step == 5
    keep_only(tmp_path, state(step=3), keep=3, spare_later=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2", "step-3", "step-5.skipped"]


def test_the_best_one_is_replaced_by_one_of_an_earlier_step(tmp_path: Path) -> None:
    for step in (5, 4):
        keep_only(tmp_path, state(step=step), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def test_a_checkpoint_is_found_by_what_a_user_calls_it(tmp_path: Path) -> None:
    paths = [save_checkpoint(tmp_path, state(step=step)) for step in (1, 2)]
    assert find_checkpoint(tmp_path, "last") is None
    assert find_checkpoint(tmp_path, "step-1") == paths[0]
    assert find_checkpoint(tmp_path, str(paths[1])) == paths[1]
    with pytest.raises(CheckpointError, match=r"no checkpoint 'best' in .*: expected last, step-1, step-2, or a path"):
        find_checkpoint(tmp_path, "best")
    best = save_checkpoint(tmp_path / "best", state(step=1))
    assert find_checkpoint(tmp_path, "best") == best
    with pytest.raises(CheckpointError, match="expected last, best, step-1, step-2, or a path"):
        find_checkpoint(tmp_path, "step-3")


def test_whatever_fails_is_kept_as_the_error_until_a_write_succeeds(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(state(unwritable=threading.Lock()))
    checkpointer.wait()
    assert checkpointer.error is not None
    assert "not JSON serializable" in checkpointer.error
    assert checkpointer.failures == 1
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
