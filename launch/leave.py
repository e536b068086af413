"""The end of a process, which nothing holds up."""

import os
import sys
import threading
from typing import NoReturn


def leave(code: int, within_s: float) -> NoReturn:
    """End this process; threads and exit handlers of libraries get that many seconds, and no more."""
    sys.stdout.flush()
    sys.stderr.flush()
    deadline = threading.Timer(within_s, os._exit, (code,))
    deadline.daemon = True
    deadline.start()
    sys.exit(code)
