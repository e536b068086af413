"""The end of a process, which nothing holds up."""

import contextlib
import os
import sys
import threading
from typing import NoReturn


def leave(code: int, within_s: float) -> NoReturn:
    """End this process; threads and exit handlers of libraries get that many seconds, and no more."""
    deadline = threading.Timer(within_s, os._exit, (code,))
    deadline.daemon = True
    deadline.start()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a full disk
            stream.flush()
    sys.exit(code)
