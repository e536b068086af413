"""The stream's rate between two processes, against bare zero-copy ZeroMQ with the same frames."""

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zmq

from driftstream.buffers.channels import StreamClient, StreamConfig, StreamServer
from driftstream.buffers.wire import encode
from driftstream.eval.bench_data import make_batch
from driftstream.eval.bench_rounds import Comparison, compare, median_ratio, time_rounds

Shape = tuple[int, int, int]
"""B, T and D of a batch of trajectories."""
PATIENCE_S = 60.0


class StreamBenchError(RuntimeError):
    """The sending process is gone or silent."""


def bench_stream(shape: Shape, repeats: int, batches: int = 20) -> Comparison:
    """Seconds a batch from a process that sends `batches` of them in a row to this one.

    Ours is `StreamClient` to `StreamServer`, with every check, credit and acknowledgement; the floor a DEALER and a
    ROUTER without them, which send and receive the same frames without a copy. The figure `rate` is our throughput as
    a share of the floor's.
    """
    config = StreamConfig()
    with tempfile.TemporaryDirectory(prefix="driftstream-") as name:
        ours, bare = config.endpoint(Path(name), "stream"), config.endpoint(Path(name), "bare")
        with StreamServer(ours, config) as server, _bare_router(bare) as router, _sender(ours, bare, shape) as pipe:

            def take() -> None:
                pipe.send(("stream", batches))
                for _ in range(batches):
                    batch = server.take(PATIENCE_S)
                    if batch is None:
                        raise StreamBenchError(f"no batch within {PATIENCE_S:g} s")
                    server.release(batch, 0)

            def receive() -> None:
                pipe.send(("bare", batches))
                for _ in range(batches):
                    if not router.poll(1000 * PATIENCE_S):
                        raise StreamBenchError(f"no frames within {PATIENCE_S:g} s")
                    router.recv_multipart(copy=False)

            seconds = time_rounds({"stream": take, "bare ZeroMQ": receive}, repeats, units=batches)
    size = sum(tensor.nbytes for tensor in make_batch(*shape).tensors.values())
    figures = {"bytes": float(size), "rate": median_ratio(seconds["bare ZeroMQ"], seconds["stream"])}
    return compare("stream", "batch", "bare ZeroMQ", seconds, figures)


@contextmanager
def _bare_router(endpoint: str) -> Iterator[Any]:
    context: zmq.Context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        router.bind(endpoint)
        yield router
    finally:
        router.close(linger=0)
        context.term()


@contextmanager
def _sender(stream: str, bare: str, shape: Shape) -> Iterator[Connection]:
    """A process that sends what it is told to; the end of the connection ends it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_send, args=(there, stream, bare, shape), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(PATIENCE_S):
            raise StreamBenchError(f"the sending process has not started within {PATIENCE_S:g} s")
        here.recv()
        yield here
    except (EOFError, BrokenPipeError) as error:
        raise StreamBenchError("the sending process has ended") from error
    finally:
        here.close()
        process.join(5.0)
        if process.is_alive():
            process.terminate()
            process.join()


def _send(commands: Connection, stream: str, bare: str, shape: Shape) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process answers Ctrl-C
    torch.set_num_threads(1)
    batch = make_batch(*shape)
    frames = encode(batch)
    context: zmq.Context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(bare)
    with StreamClient(stream, batch.sender, 0, StreamConfig()) as client:
        commands.send("ready")
        try:
            while True:
                kind, count = commands.recv()
                for _ in range(count):
                    if kind == "bare":
                        dealer.send_multipart(frames, copy=False)
                    else:
                        _send_next(client, batch.tensors)
        except EOFError:
            pass
    dealer.close(linger=0)
    context.term()


def _send_next(client: StreamClient, tensors: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while client.wait_for_credit(1.0) is None:
        if time.monotonic() > deadline:
            raise StreamBenchError("no credit from the receiving process")
    client.send("trajectories", tensors, 0)
