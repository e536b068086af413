"""Checkpoints under SIGKILL, at any byte of their writing, and on disks that take no more."""

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from driftstream.learner.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointState,
    checkpoint_paths,
    clean_up,
    load_latest,
    save_checkpoint,
)

pytestmark = pytest.mark.timeout(150)
KILLS = 100


def state(step: int, values: int = 20_000) -> CheckpointState:
    """A checkpoint of which every byte says what step it is of."""
    groups = {group: {"weight": torch.full((values,), float(step))} for group in ("policy", "optimizer", "replay")}
    return CheckpointState(step, groups, {"energy_evaluations": step})


def write_for_ever(directory: str, announced: Any, keep: int) -> None:
    torch.set_num_threads(1)
    checkpointer = Checkpointer(Path(directory), CheckpointConfig(every_s=1.0, keep=keep))
    while True:
        # Every second one is written twice, as at the end of a run that ends right after a checkpoint.
        step = announced.value + 1
        for _ in range(1 + step % 2):
            checkpointer.save(state(step))
            checkpointer.wait()
            assert checkpointer.error is None
        announced.value = step


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    # Asked for once: every child forks from a process that has torch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["driftstream.learner.checkpoint"])
    return context


def check_resumes(directory: Path, announced: int) -> None:
    """What a learner finds at its start: nothing announced is lost, and nothing is half there."""
    clean_up(directory)
    found, damaged = load_latest(directory)
    assert not damaged
    assert found.step in (announced, announced + 1)
    for tensors in found.groups.values():
        assert torch.equal(tensors["weight"], torch.full((20_000,), float(found.step)))


@pytest.mark.parametrize("keep", [1, 3])
def test_a_writer_killed_at_random_loses_nothing_it_announced(
    keep: int, tmp_path: Path, context: ForkServerContext
) -> None:
    rng, announced = random.Random(keep), context.Value("q", 0, lock=False)
    left_over = 0
    for _ in range(KILLS // 2):
        before = announced.value
        writer = context.Process(target=write_for_ever, args=(str(tmp_path), announced, keep))
        writer.start()
        while announced.value < before + 1:
            assert writer.exitcode is None
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.02))
        writer.kill()
        writer.join()
        left_over += any(tmp_path.glob(".step-*.partial"))
        check_resumes(tmp_path, announced.value)
    # The kills must have hit the writing, not the pauses.
    assert left_over > KILLS // 10


CALLS = ("mkdir", "write", "fsync", "rename", "rmdir", "unlink")


def dies_at(call: int, directory: str, announced: Any) -> None:
    """Write checkpoints, the same step twice among them, and be killed before the n-th call that changes the disk."""
    count = 0

    def killed(function: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)

        return maybe

    for name in CALLS:
        setattr(os, name, killed(getattr(os, name)))
    for value in (1, 2):
        save_checkpoint(Path(directory), CheckpointState(5, state(5).groups, {"energy_evaluations": value}))
        announced.value = value


def test_no_step_of_the_writing_leaves_a_run_without_a_checkpoint(tmp_path: Path, context: ForkServerContext) -> None:
    """Killed before each call in turn: the checkpoint before, or the new one, is whole."""
    for call in range(1000):
        directory, announced = tmp_path / str(call), context.Value("q", 0, lock=False)
        directory.mkdir()
        writer = context.Process(target=dies_at, args=(call, str(directory), announced))
        writer.start()
        writer.join()
        if announced.value:
            clean_up(directory)
            found, damaged = load_latest(directory)
            assert not damaged
            assert found.numbers["energy_evaluations"] in (announced.value, announced.value + 1)
        if writer.exitcode == 0:
            break
    assert writer.exitcode == 0
    assert call > 20


def test_every_file_is_synced_before_its_name_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power: the order of the calls is the defence, which no kill can show."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        calls.append(f"rename {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save_checkpoint(tmp_path, state(7))
    files = [f"sync {group}.safetensors" for group in ("policy", "optimizer", "replay")]
    partial = ["sync manifest.json", "sync .step-7.partial"]
    assert calls == [*files, *partial, "rename step-7", f"sync {tmp_path.name}"]


def limited(directory: str, limit: int, error: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpointer = Checkpointer(Path(directory), CheckpointConfig())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    checkpointer.save(state(6))
    checkpointer.wait()
    error.value = (checkpointer.error or "").encode()


def test_a_file_that_may_not_grow_leaves_the_old_checkpoint_as_it_was(
    tmp_path: Path, context: ForkServerContext
) -> None:
    save_checkpoint(tmp_path, state(5))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for limit in (0, 100, 40_000):
        error = context.Array("c", 1000)
        writer = context.Process(target=limited, args=(str(tmp_path), limit, error))
        writer.start()
        writer.join()
        assert b"File too large" in error.value
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def newest_step(root: Path) -> int:
    paths = checkpoint_paths(root / "checkpoints")
    return int(paths[-1].name.removeprefix("step-")) if paths else 0


@pytest.fixture
def trained(train: Callable[..., Any], tmp_path: Path) -> tuple[Any, Path]:
    root = tmp_path / "run"
    run = train("gmm9", "--minutes", "10", "--checkpoint.every-s", "1", "--out", str(root), root=root)
    run.wait_for(lambda: newest_step(root))
    return run, root


def test_a_killed_learner_and_a_killed_supervisor_lose_at_most_an_interval(
    trained: tuple[Any, Path], train: Callable[..., Any]
) -> None:
    run, root = trained
    every_s, slack_s = 1.0, 1.5
    for victim in ("learner", "supervisor", "learner"):
        time.sleep(random.Random(victim).uniform(0.5, 1.5))
        last = run.rows()[-1]
        os.kill(run.processes()[victim], signal.SIGKILL)
        if victim == "learner":
            assert run.end(20) == 1
            assert run.text().splitlines()[-1].endswith(f"driftstream train --resume {root}")
        else:
            run.process.wait()
            end = time.monotonic() + 10.0
            while run.processes():
                assert time.monotonic() < end, f"orphans: {run.processes()}"
                time.sleep(0.05)
        step = newest_step(root)
        clean_up(root / "checkpoints")
        saved = load_latest(root / "checkpoints")[0]
        assert saved.step == step
        assert last["wall_s"] - saved.numbers["elapsed_s"] < every_s + slack_s
        run = train("--resume", str(root), "--minutes", "10", root=root)
        run.wait_for(lambda run=run, step=step: f"resumed at step {step}\n" in run.text())
        run.wait_for(lambda run=run, step=step: newest_step(root) > step)
    run.process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert run.end(12) == 130
    assert time.monotonic() - start < 10.0
