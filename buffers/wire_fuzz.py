"""Fuzzing of every decoder of the wire: mutated messages must be refused by the decoder's own error, or understood.

What is decoded must survive being encoded and decoded again, and no message may cost memory beyond its own.
"""

import json
import multiprocessing
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from driftstream.buffers import control, wire_mutations
from driftstream.buffers.weights_wire import WeightSnapshot, decode_weights, encode_weights
from driftstream.buffers.wire import Buffer, Message, WireError, byte_view, decode, encode, tensor_bytes
from driftstream.buffers.wire_mutations import LIMITS
from driftstream.envs.errors import require

MAX_GROWTH_BYTES = 32 * 2**20
_WARM_UP = 2_000
_MEASURE_EVERY = 10_000
_KEPT_FAULTS = 20

_Place = tuple[str, int]  # file and line


@dataclass(frozen=True)
class FuzzReport:
    """What became of `frames` mutated messages: `decoded`, `refused`, or a fault.

    `refusals` counts by the line that refused ("wire.py:200"), `faults` holds the first few texts of what must not
    happen. `memory_growth_bytes` is that of the process that grew most.
    """

    frames: int
    decoded: int
    refused: int
    refusals: Mapping[str, int]
    faults: tuple[str, ...]
    memory_growth_bytes: int
    seconds: float

    @property
    def held(self) -> bool:
        """Whether nothing happened that must not."""
        return not self.faults and self.memory_growth_bytes < MAX_GROWTH_BYTES


@dataclass(frozen=True)
class _Decoder:
    """A decoder under test: mutated frames for it, what it makes of them, and whether that encodes to the same."""

    mutated: Callable[[Random], list[Buffer]]
    decode: Callable[[Sequence[Buffer]], Any]
    encodes: Callable[[Any, Sequence[Buffer]], bool]


def fuzz(frames: int, seed: int = 0, processes: int = 1) -> FuzzReport:
    """Decode `frames` mutated messages, weights frames and control reports, drawn from `seed`.

    More than one of `processes` share them, each with a stream of its own. Raises ConfigError for fewer frames than
    processes.
    """
    require(processes >= 1, "processes", processes, "at least 1")
    require(frames >= processes, "frames", frames, f"at least {processes}")
    start = time.monotonic()
    if processes == 1:
        return _fuzz(frames, str(seed))
    shares = [frames * (i + 1) // processes - frames * i // processes for i in range(processes)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        reports = list(pool.map(_fuzz, shares, [f"{seed}/{i}" for i in range(processes)]))
    return FuzzReport(
        frames,
        sum(report.decoded for report in reports),
        sum(report.refused for report in reports),
        dict(sum((Counter(report.refusals) for report in reports), Counter())),
        tuple(fault for report in reports for fault in report.faults)[:_KEPT_FAULTS],
        max(report.memory_growth_bytes for report in reports),
        time.monotonic() - start,
    )


def _fuzz(frames: int, seed: str) -> FuzzReport:
    torch.set_num_threads(1)
    start = time.monotonic()
    random = Random(seed)
    decoders = _decoders(random)
    refusals: Counter[_Place] = Counter()
    faults: list[str] = []
    decoded, growth, memory = 0, 0, _memory()
    for number in range(frames):
        decoder = random.choice(decoders)
        mutated = decoder.mutated(random)
        try:
            found = decoder.decode(mutated)
            if not decoder.encodes(found, mutated):
                raise AssertionError("encodes to something else")
            decoded += 1
        except _RefusedError as error:
            refusals[error.place] += 1
        except Exception as error:
            if len(faults) < _KEPT_FAULTS:
                faults.append(f"{error!r:.200} of {[bytes(byte_view(frame)) for frame in mutated]!r:.4000}")
        if number < _WARM_UP:
            memory = _memory() if number == _WARM_UP - 1 else memory
        elif number % _MEASURE_EVERY == 0:
            growth = max(growth, _growth(memory))
    growth = max(growth, _growth(memory)) if frames > _WARM_UP else growth
    refused = sum(refusals.values())
    by_line = {f"{Path(file).name}:{line}": count for (file, line), count in refusals.items()}
    return FuzzReport(frames, decoded, refused, by_line, tuple(faults), growth, time.monotonic() - start)


class _RefusedError(Exception):
    """Refused by the decoder's own error, at `place`."""

    def __init__(self, place: _Place) -> None:
        self.place = place


def _decoders(random: Random) -> list[_Decoder]:
    """Every decoder, as often as its share of the frames is large."""
    messages, weights = wire_mutations.valid_messages(random), wire_mutations.valid_weights(random)
    reports = wire_mutations.valid_reports()
    of_messages = _Decoder(
        lambda random: wire_mutations.mutate_message(random, *random.choice(messages)),
        partial(_refusing, lambda frames: decode(frames, LIMITS)),
        _message_encodes,
    )
    of_weights = _Decoder(
        lambda random: [wire_mutations.mutate_weights(random, random.choice(weights))],
        partial(_refusing, lambda frames: decode_weights(frames[0], LIMITS)),
        _weights_encode,
    )
    of_reports = _Decoder(
        lambda random: wire_mutations.mutate_report(random, random.choice(reports)),
        _parse_report,
        lambda content, frames: isinstance(content, dict),
    )
    return [of_messages] * 5 + [of_weights] * 3 + [of_reports] * 2


def _refusing(decoder: Callable[[Sequence[Buffer]], Any], frames: Sequence[Buffer]) -> Any:
    """What `decoder` makes of the frames; only here is its error a refusal, and not where it is encoded again."""
    try:
        return decoder(frames)
    except WireError as error:
        traceback = error.__traceback__
        assert traceback is not None
        while traceback.tb_next is not None:
            traceback = traceback.tb_next
        raise _RefusedError((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)) from None


def _parse_report(frames: Sequence[Buffer]) -> Any:
    content = control.parse_content([bytes(byte_view(frame)) for frame in frames])
    if content is None:
        raise _RefusedError((control.__file__, control.parse_content.__code__.co_firstlineno))
    return content


def _message_encodes(message: Message, frames: Sequence[Buffer]) -> bool:
    """Whether a message encodes to the frames that it came from, but for what a header may hold beside its fields."""
    head, *payload = encode(message, LIMITS)
    ours, theirs = json.loads(bytes(head)), json.loads(bytes(byte_view(frames[0])))
    same_header = all(theirs[name] == value for name, value in ours.items())
    return same_header and all(bytes(a) == byte_view(b) for a, b in zip(payload, frames[1:], strict=True))


def _weights_encode(snapshot: WeightSnapshot, frames: Sequence[Buffer]) -> bool:
    """Whether a snapshot comes back from its encoding; not byte by byte, as padding may hold anything."""
    again = decode_weights(encode_weights(snapshot), LIMITS)
    ours, theirs = dict(vars(snapshot)), dict(vars(again))
    x, y = ours.pop("tensors"), theirs.pop("tensors")
    return ours == theirs and list(x) == list(y) and all(_equal(x[name], y[name]) for name in x)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a) == tensor_bytes(b)


def _memory() -> tuple[int, int]:
    """Bytes that this process holds in memory, and the most it ever held (the same where the system tells no more)."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(), most
    except OSError:
        return most, most


def _growth(before: tuple[int, int]) -> int:
    """Bytes by which the memory held, or its peak, has grown."""
    return max(0, *(now - then for now, then in zip(_memory(), before, strict=True)))
