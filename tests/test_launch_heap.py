"""Pages of freed tensors stay with the process."""

import ctypes
import os
from types import SimpleNamespace

import pytest

from driftstream.launch import heap
from driftstream.launch.heap import heap_variables, keep_heap


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in heap_variables():
        monkeypatch.delenv(name, raising=False)


def test_the_heap_is_kept_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda option, value: calls.append((option, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    keep_heap()
    # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
    assert calls == [(-1, 1_000_000_000), (-3, 2**25)]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "4096")
    calls.clear()
    keep_heap()
    assert calls == [(-3, 2**25)]
    assert heap_variables() == {"MALLOC_TRIM_THRESHOLD_": "4096", "MALLOC_MMAP_THRESHOLD_": str(2**25)}


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    keep_heap()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_glibc_accepts_the_settings() -> None:
    mallopt = ctypes.CDLL(None).mallopt
    assert all(mallopt(option, size) == 1 for option, size in heap._KEPT.values())
    assert os.environ.get("MALLOC_TRIM_THRESHOLD_") is None
