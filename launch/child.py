"""A text computed by a child of the fork server, which has imported what this process has not."""

import contextlib
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

from driftstream.launch.flags import answer


def compute_in_child(
    context: ForkServerContext, function: Callable[..., str], arguments: tuple[list[str], str], name: str
) -> tuple[str | None, int]:
    """`function(*arguments)`, or None and an exit code if there is none (the child has said why).

    `arguments` are a command line and the name of the command in its messages.
    """
    receiver, sender = context.Pipe(duplex=False)
    child: Any = context.Process(target=_send, args=(sender, function, arguments), name=name)
    try:
        child.start()
        sender.close()
        with contextlib.suppress(EOFError):
            return receiver.recv_bytes().decode(), 0
        child.join()
        return None, child.exitcode or 1
    finally:
        if child.pid is not None:
            child.kill()
            child.join()


def _send(reply: Connection, function: Callable[..., str], arguments: tuple[list[str], str]) -> None:
    def send() -> int:
        reply.send_bytes(function(*arguments).encode())
        return 0

    sys.exit(answer(arguments[1], send))
