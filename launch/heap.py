"""Pages of freed tensors stay with the process: glibc would give large ones back, to be faulted in by every update."""

import ctypes
import os

KEPT_BYTES = 1_000_000_000
"""Freed memory is kept up to this size, and so is what one allocation may take from it."""
_OPTIONS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
"""glibc's variables, for processes that are started anew, and the numbers of the same options for `mallopt`."""


def heap_variables() -> dict[str, str]:
    """The environment in which a new process keeps its pages; what the user has set is left."""
    return {name: os.environ.get(name, str(KEPT_BYTES)) for name in _OPTIONS}


def keep_heap() -> None:
    """Keep the pages of this process from now on. Nothing where the C library is not glibc, or the user has set it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, option in _OPTIONS.items():
        if name not in os.environ:
            mallopt(option, KEPT_BYTES)


__all__ = ["heap_variables", "keep_heap"]
