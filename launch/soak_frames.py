"""Messages that no learner may train on: each breaks one rule, and is otherwise in order, checksum included."""

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from driftstream.buffers.checksum import checksum
from driftstream.buffers.wire import MAGIC, SCHEMA

POISON = 1e30
"""The log reward of every such trajectory: a loss that met one would show it at once."""
ROWS, STEPS = 5, 10


def bad_frames(sender: str, epoch: int, dim: int, oversized_bytes: int) -> dict[str, list[bytes]]:
    """Messages in the name of a sender, by what is wrong with them; dim is the target's.

    `replayed` and `wrong shape` are well formed: the first comes a second time, the other is of another target. Both
    are numbered as the sender's first batch.
    """
    whole = _frames(_trajectories(dim), sender, epoch)
    return {
        "junk": [b"\x00" * 64],
        "truncated": [whole[0], whole[1][:-4], *whole[2:]],
        "missing frame": whole[:2],
        "changed": [whole[0], whole[1][:-1] + b"\x40", *whole[2:]],
        "wrong dtype": _frames(_trajectories(dim), sender, epoch, dtype="int32"),
        "contradicting shapes": _frames(_trajectories(dim) | {"log_reward": torch.zeros(ROWS + 1)}, sender, epoch),
        "nan": _frames(_trajectories(dim, math.nan), sender, epoch),
        "inf": _frames(_trajectories(dim, math.inf), sender, epoch),
        "oversized header": [b" " * oversized_bytes],
        "wrong shape": _frames(_trajectories(dim + 1), sender, epoch),
        "replayed": whole,
    }


def _trajectories(dim: int, log_reward: float = POISON) -> dict[str, Tensor]:
    states = torch.zeros(ROWS, STEPS + 1, dim)
    states[:, -1] = 1.0
    return {
        "states": states,
        "times": torch.linspace(0.0, 1.0, STEPS + 1),
        "log_reward": torch.full((ROWS,), log_reward),
    }


def _frames(tensors: Mapping[str, Tensor], sender: str, epoch: int, dtype: str = "float32") -> list[bytes]:
    """What `wire.encode` makes, without its refusals."""
    payload = [value.contiguous().numpy().tobytes() for value in tensors.values()]
    header = {
        "magic": MAGIC,
        "schema": SCHEMA,
        "kind": "trajectories",
        "sender": sender,
        "epoch": epoch,
        "sequence": 1,
        "policy_version": 0,
        "counters": {},
        "tensors": [[name, dtype, list(value.shape)] for name, value in tensors.items()],
        "checksum": checksum(payload),
    }
    return [json.dumps(header).encode(), *payload]
