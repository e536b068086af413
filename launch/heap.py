"""Pages of freed tensors stay with the process: glibc would give large ones back, to be faulted in by every update."""

import ctypes
import os

_KEPT = {"MALLOC_TRIM_THRESHOLD_": (-1, 1_000_000_000), "MALLOC_MMAP_THRESHOLD_": (-3, 32 * 2**20)}
"""glibc's variables, for new processes, and the numbers of the same options for `mallopt`, with their values.

Freed memory is kept up to the first, and one allocation may take as much as the second from it, which is as much as
every glibc accepts.
"""


def heap_variables() -> dict[str, str]:
    """The environment in which a new process keeps its pages; what the user has set is left."""
    return {name: os.environ.get(name, str(size)) for name, (_, size) in _KEPT.items()}


def keep_heap() -> None:
    """Keep the pages of this process from now on. Nothing where the C library is not glibc, or the user has set it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, (option, size) in _KEPT.items():
        if name not in os.environ:
            mallopt(option, size)


__all__ = ["heap_variables", "keep_heap"]
