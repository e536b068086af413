"""Atomic checkpoints: safetensors files and a manifest, written off the learner's path.

A checkpoint is a directory `step-<n>` that appears by one rename when it is complete: every file is written and
synced under a temporary name first, the manifest, which holds their SHA-256 sums, last. The learner keeps the newest
ones; beside them `best/` holds one that the evaluator keeps, of the averaged weights that it scored highest.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from driftstream.envs.errors import require

FORMAT = 3
MANIFEST = "manifest.json"
BEST = "best"
_NAME = re.compile(r"step-(\d+)")
_REPLACED = re.compile(r"\.(step-\d+)\.replaced\.partial")


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every_s` seconds and at the end; the newest `keep` stay."""

    every_s: float = 60.0
    keep: int = 3

    def __post_init__(self) -> None:
        require(self.every_s > 0, "checkpoint.every_s", self.every_s, "a positive number of seconds")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete or damaged."""


@dataclass
class CheckpointState:
    """What a checkpoint holds: groups of named tensors (a file each), and numbers (in the manifest)."""

    step: int
    groups: dict[str, dict[str, Tensor]]
    numbers: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(directory: Path, state: CheckpointState) -> Path:
    """Write `directory/step-<n>` atomically; returns its path.

    One of the same step that is whole and equal stays as it is; any other is replaced, and moved out of the way
    rather than deleted until the new one is in place.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{state.step}"
    partial, replaced = directory / f".{final.name}.partial", directory / f".{final.name}.replaced.partial"
    for draft in (partial, replaced):
        shutil.rmtree(draft, ignore_errors=True)
    partial.mkdir()
    files = {}
    for group, tensors in state.groups.items():
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        name = f"{group}.safetensors"
        _write_synced(partial / name, data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    content = {"format": FORMAT, "step": state.step, "numbers": state.numbers, "files": files}
    manifest = json.dumps(content, indent=1, sort_keys=True).encode()
    if _is_whole(final, manifest):
        shutil.rmtree(partial)
        return final
    _write_synced(partial / MANIFEST, manifest)
    _sync_directory(partial)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    _sync_directory(directory)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _is_whole(path: Path, manifest: bytes) -> bool:
    """Whether a checkpoint has this manifest, and the files that it lists."""
    try:
        load_checkpoint(path)
        return (path / MANIFEST).read_bytes() == manifest
    except (CheckpointError, OSError):
        return False


def load_checkpoint(path: Path, groups: tuple[str, ...] | None = None) -> CheckpointState:
    """Read a checkpoint, or only some of its groups, checking sizes and sums.

    Raises:
        CheckpointError: it names the file that is missing or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        step, numbers, files = manifest["step"], manifest["numbers"], manifest["files"]
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: format {version}, this version reads {FORMAT}")
    loaded: dict[str, dict[str, Tensor]] = {}
    for name, entry in files.items():
        group = name.removesuffix(".safetensors")
        if groups is not None and group not in groups:
            continue
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path / name}: unreadable ({error})") from error
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path / name}: damaged (its SHA-256 is not the manifest's)")
        try:
            loaded[group] = load(data)
        except SafetensorError as error:
            raise CheckpointError(f"{path / name}: no safetensors file ({error})") from error
    return CheckpointState(step, loaded, numbers)


def checkpoint_paths(directory: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def load_latest(
    directory: Path, groups: tuple[str, ...] | None = None
) -> tuple[CheckpointState, list[CheckpointError]]:
    """The newest checkpoint that is whole, and the errors of the newer ones that are not.

    Raises:
        CheckpointError: there is none.
    """
    damaged: list[CheckpointError] = []
    for path in reversed(checkpoint_paths(directory)):
        try:
            return load_checkpoint(path, groups), damaged
        except CheckpointError as error:
            damaged.append(error)
    cause = f" ({damaged[0]})" if damaged else ""
    raise CheckpointError(f"no usable checkpoint in {directory}{cause}")


def find_checkpoint(directory: Path, name: str) -> Path | None:
    """The checkpoint that a user means by `best`, `step-N` or a path; None for `last`, the newest whole one.

    Raises:
        CheckpointError: there is no such checkpoint; it says which there are.
    """
    if name == "last":
        return None
    paths = checkpoint_paths(directory / BEST)[-1:] if name == BEST else [directory / name, Path(name)]
    found = next((path for path in paths if (path / MANIFEST).exists()), None)
    if found is None:
        there = [path.name for path in checkpoint_paths(directory)]
        known = ["last", *([BEST] if checkpoint_paths(directory / BEST) else []), *there]
        raise CheckpointError(f"no checkpoint {name!r} in {directory}: expected {', '.join(known)}, or a path")
    return found


def keep_only(directory: Path, state: CheckpointState, keep: int, spare_later: bool = False) -> Path:
    """Write a checkpoint, then remove all but it and the `keep - 1` before it; returns its path.

    One of a later step must not stand for a newer one. With `spare_later` the latest of them is set aside under the
    name `step-<n>.skipped`: a run that went on from before it could not read it.
    """
    path = save_checkpoint(directory, state)
    paths = checkpoint_paths(directory)
    end = paths.index(path) + 1
    later = paths[end:]
    if later and spare_later:
        for skipped in directory.glob("step-*.skipped"):
            shutil.rmtree(skipped, ignore_errors=True)
        latest = later.pop()
        latest.rename(directory / f"{latest.name}.skipped")
    for old in (*paths[: max(0, end - keep)], *later):
        shutil.rmtree(old, ignore_errors=True)
    return path


def clean_up(directory: Path) -> None:
    """Remove what a process that was killed left half written, and put back what it was replacing."""
    for partial in directory.glob(".step-*.partial"):
        replaced = _REPLACED.fullmatch(partial.name)
        if replaced and not (directory / replaced[1]).exists():
            partial.rename(directory / replaced[1])
        else:
            shutil.rmtree(partial, ignore_errors=True)


class Checkpointer:
    """Writes checkpoints in a thread of its own, one at a time, and removes old ones.

    A write that fails (a full disk) is kept in `error`, counted in `failures` and tried again at the next interval;
    the checkpoints before it stay. What a process that was killed left half written is removed.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = directory
        self.config = config
        self.error: str | None = None
        self.failures = 0
        self._told: str | None = None
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        clean_up(directory)

    def news(self) -> str | None:
        """The error of the last write, where it has not been given before."""
        before, self._told = self._told, self.error
        return None if self._told == before else self._told

    def due(self) -> bool:
        """Whether the interval is over and the last write has ended."""
        idle = self._thread is None or not self._thread.is_alive()
        return idle and time.monotonic() - self._last >= self.config.every_s

    def save(self, state: CheckpointState) -> None:
        """Start to write `state`; its tensors are copied first, so that learning can go on."""
        self.wait()
        self._last = time.monotonic()
        groups = {
            group: {name: tensor.detach().clone() for name, tensor in tensors.items()}
            for group, tensors in state.groups.items()
        }
        copied = CheckpointState(state.step, groups, state.numbers)
        self._thread = threading.Thread(target=self._write, args=(copied,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write under way."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, state: CheckpointState) -> None:
        try:
            keep_only(self.directory, state, self.config.keep, spare_later=True)
            self.error = None
        except Exception as error:
            # Whatever it is: unseen, it would end the thread and with it the run's last state.
            self.error = str(error) or type(error).__name__
            self.failures += 1
            shutil.rmtree(self.directory / f".step-{state.step}.partial", ignore_errors=True)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
