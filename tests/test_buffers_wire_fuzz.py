"""Mutated messages: refused by the decoder's own error or understood, at no cost in memory, by every line of it."""

import ast
import dis
import sys
import tracemalloc
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
import torch

from driftstream.buffers import checks, checksum, weights_wire, wire, wire_fuzz
from driftstream.buffers.wire import Message, WireError
from driftstream.buffers.wire_fuzz import MAX_GROWTH_BYTES, FuzzReport, fuzz
from driftstream.envs.errors import ConfigError
from driftstream.envs.finiteness import is_finite

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("error")]

SENDING = ("encode", "encode_weights", "_describe")
"""Functions that no decoder calls."""


def refusing_lines() -> set[str]:
    """Every `raise WireError` of the decoders, as reports name them."""
    lines = set()
    for module in (wire, weights_wire):
        path = Path(module.__file__ or "")
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and function.name not in SENDING:
                lines |= {f"{path.name}:{node.lineno}" for node in ast.walk(function) if isinstance(node, ast.Raise)}
    return lines


@pytest.mark.timeout(900)
def test_a_million_mutated_frames() -> None:
    report = fuzz(1_000_000, seed=0, processes=2)
    assert report.faults == ()
    assert report.held
    assert report.decoded + report.refused == report.frames == 1_000_000
    assert report.decoded > 100_000
    assert report.memory_growth_bytes < MAX_GROWTH_BYTES
    assert not refusing_lines() - report.refusals.keys()


def code_objects(function: Any) -> list[CodeType]:
    """A function's own code and that of what is written inside it."""
    found = [function.__code__]
    for code in found:
        found += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found


def test_every_line_of_the_decoders_is_run() -> None:
    functions: list[Any] = [wire.byte_view, wire.view_tensor, is_finite, wire.decode, weights_wire.decode_weights]
    functions += [checks.is_integer, checks.is_name, checksum.checksum]
    for module in (wire, weights_wire):
        inner = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
        functions += [value for name, value in inner.items() if name.startswith("_") and name not in SENDING]
    codes = {code for function in functions for code in code_objects(function)}
    expected = {(code, line) for code in codes for _, line in dis.findlinestarts(code) if line > code.co_firstlineno}
    run: set[tuple[CodeType, int]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code not in codes:
            return None
        run.add((frame.f_code, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        report = wire_fuzz._fuzz(6_000, "lines")
    finally:
        sys.settrace(before)
    assert report.faults == ()
    assert {f"{code.co_name}:{line}" for code, line in expected - run} == set()


def test_nothing_is_kept() -> None:
    fuzz(500)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        fuzz(2_000, seed=1)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2**20
    assert peak - before < MAX_GROWTH_BYTES


def test_the_same_seed_gives_the_same_frames() -> None:
    def counts(report: FuzzReport) -> tuple[int, dict[str, int]]:
        return report.decoded, dict(report.refusals)

    assert counts(fuzz(500, seed=3)) == counts(fuzz(500, seed=3)) != counts(fuzz(500, seed=4))


def no_error(message: Message, limits: Any) -> list[bytes]:
    raise WireError("refused only when it is encoded")


def key_error(frames: Any, limits: Any) -> Message:
    raise KeyError("kind")


def another_message(frames: Any, limits: Any) -> Message:
    return Message("hello", "someone-else")


held_back: list[torch.Tensor] = []


def hoarding(frames: Any, limits: Any) -> Message:
    held_back.append(torch.ones(100_000))
    raise WireError("no")


@pytest.mark.parametrize(
    ("name", "instead", "fault"),
    [
        ("decode", key_error, "KeyError"),
        ("decode", another_message, "encodes to something else"),
        ("encode", no_error, "refused only when it is encoded"),
        ("decode_weights", key_error, "KeyError"),
    ],
)
def test_a_faulty_decoder_is_found(monkeypatch: pytest.MonkeyPatch, name: str, instead: Any, fault: str) -> None:
    monkeypatch.setattr(wire_fuzz, name, instead)
    report = fuzz(1_000)
    assert not report.held
    assert any(fault in text for text in report.faults)
    assert len(report.faults) <= 20


def test_a_decoder_that_hoards_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_fuzz, "decode", hoarding)
    try:
        report = fuzz(2_400)
    finally:
        held_back.clear()
    assert report.faults == ()
    assert not report.held


@pytest.mark.parametrize(
    ("field", "options"), [("frames", (0, 0, 1)), ("processes", (10, 0, 0)), ("frames", (1, 0, 2))]
)
def test_bad_options_are_named(field: str, options: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=f"^{field} = "):
        fuzz(*options)
