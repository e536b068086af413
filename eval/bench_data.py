"""What moving data costs beside its floor: replay, weights, and decoding a batch."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from driftstream.buffers.checksum import checksum
from driftstream.buffers.replay import ReplayConfig, TerminalReplay
from driftstream.buffers.weights_wire import WeightSnapshot, decode_weights, encode_weights
from driftstream.buffers.wire import Buffer, Message, byte_view, decode, encode
from driftstream.envs.finiteness import is_finite
from driftstream.eval.bench_rounds import Comparison, compare, median_ratio, time_rounds

PAIRS = 10
"""Inserts, with a draw after each, that are timed together: ranks are renewed once in so many."""


class SortedArray:
    """The yardstick of replay: a ring of states that is sorted anew after every insert, drawn by exact weights."""

    def __init__(self, capacity: int, dim: int, rank_k: float, generator: torch.Generator) -> None:
        self._terminal = torch.randn(capacity, dim, generator=generator)
        self._log_reward = torch.randn(capacity, generator=generator)
        self._rank_k = rank_k
        self._generator = generator
        self._cursor = 0

    def add(self, terminal: Tensor, log_reward: Tensor) -> None:
        """Overwrite the oldest states."""
        slots = (self._cursor + torch.arange(len(terminal))) % len(self._terminal)
        self._terminal[slots], self._log_reward[slots] = terminal, log_reward
        self._cursor += len(terminal)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """States [n, D] and log rewards [n], with replacement."""
        entries = len(self._terminal)
        order = self._log_reward.argsort(descending=True)
        cdf = (1.0 / (self._rank_k * entries + torch.arange(entries, dtype=torch.float64))).cumsum(0)
        uniform = torch.rand(n, dtype=torch.float64, generator=self._generator)
        drawn = order[torch.searchsorted(cdf, uniform * cdf[-1]).clamp_max(entries - 1)]
        return self._terminal[drawn], self._log_reward[drawn]


def bench_replay(dim: int, batch_size: int, entries: int, repeats: int, seed: int = 0) -> Comparison:
    """Inserting and drawing a batch by rank in a full memory, against a sorted array and copies of the same rows.

    The figure `slowest_s` is the longest single pair of insert and draw.
    """
    generator = torch.Generator().manual_seed(seed)
    config = ReplayConfig(capacity=entries, minimum=1)
    replay = TerminalReplay(dim, config, generator=generator)
    replay.add(torch.randn(entries, dim, generator=generator), torch.randn(entries, generator=generator))
    array = SortedArray(entries, dim, config.rank_k, generator)
    terminal, log_reward = torch.randn(batch_size, dim, generator=generator), torch.randn(batch_size)
    inside = [(torch.empty_like(terminal), torch.empty_like(log_reward)) for _ in range(2)]
    pairs: list[float] = []

    def ours() -> None:
        for _ in range(PAIRS):
            start = time.perf_counter()
            replay.add(terminal, log_reward)
            replay.sample(batch_size)
            pairs.append(time.perf_counter() - start)

    def sorted_array() -> None:
        # Each of its draws costs the same, so that one stands for all.
        array.add(terminal, log_reward)
        array.sample(batch_size)

    def copies() -> None:
        for _ in range(PAIRS):
            for rows, values in inside:
                rows.copy_(terminal)
                values.copy_(log_reward)

    seconds = time_rounds({"replay": ours, "memcpy": copies, "sorted array": sorted_array}, repeats)
    for name in ("replay", "memcpy"):
        seconds[name] /= PAIRS
    figures = {
        "entries": float(entries),
        "slowest_s": max(pairs[PAIRS:]),
        "speed_up": median_ratio(seconds["sorted array"], seconds["replay"]),
    }
    return compare("replay", "insert and draw", "memcpy", seconds, figures)


def bench_weights(policy: nn.Module, repeats: int, units: int = 20) -> Comparison:
    """A policy's way from the learner to an actor without the sockets: encode, decode, load; against one copy."""
    tensors = {name: value.detach() for name, value in policy.state_dict().items()}
    copies = {name: value.clone() for name, value in tensors.items()}
    snapshot = WeightSnapshot(1, 0.0, 0.0, 0, tensors)
    frame = bytearray(encode_weights(snapshot))
    flat = torch.cat([value.reshape(-1) for value in tensors.values()])
    other = torch.empty_like(flat)

    def load(arrived: Mapping[str, Tensor]) -> None:
        for name, value in arrived.items():
            copies[name].copy_(value)

    contenders: dict[str, Callable[[], object]] = {
        "encode, decode, load": lambda: load(decode_weights(bytearray(encode_weights(snapshot))).tensors),
        "memcpy": lambda: other.copy_(flat),
        "encode": lambda: encode_weights(snapshot),
        "decode": lambda: decode_weights(frame),
        "load": lambda: load(tensors),
    }
    repeated = {name: _repeat(action, units) for name, action in contenders.items()}
    seconds = time_rounds(repeated, repeats, units)
    return compare("weights", "snapshot", "memcpy", seconds, {"bytes": float(flat.nbytes)})


def make_batch(batch_size: int, sampling_steps: int, dim: int, seed: int = 0) -> Message:
    """A batch of trajectories such as actors send, of random states [B, T+1, D]."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "states": torch.randn(batch_size, sampling_steps + 1, dim, generator=generator),
        "times": torch.linspace(0.0, 1.0, sampling_steps + 1),
        "log_reward": torch.randn(batch_size, generator=generator),
    }
    return Message("trajectories", "actor-0", 0, 1, 0, {}, tensors)


def bench_decode(batch: Message, repeats: int, units: int = 5) -> Comparison:
    """Decoding a batch with all checks, against a copy of its bytes, and what two of the checks take of it."""
    # Received frames are writable memory of their own; views of these are not copied either.
    frames: Sequence[Buffer] = [bytearray(frame) for frame in encode(batch)]
    views = [byte_view(frame) for frame in frames[1:]]
    source = batch.tensors["states"]
    other = torch.empty_like(source)
    contenders: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(frames),
        "memcpy": lambda: other.copy_(source),
        "checksum": lambda: checksum(views),
        "finiteness": lambda: [is_finite(tensor) for tensor in batch.tensors.values()],
        "encode": lambda: encode(batch),
    }
    seconds = time_rounds({name: _repeat(action, units) for name, action in contenders.items()}, repeats, units)
    figures = {
        "bytes": float(sum(len(view) for view in views)),
        "checksum_share": median_ratio(seconds["checksum"], seconds["decode"]),
    }
    return compare("decode", "batch", "memcpy", seconds, figures)


def _repeat(action: Callable[[], object], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            action()

    return repeated
