"""Replay of terminal states: a TorchRL `ReplayBuffer` owned by the learner."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler, Sampler

from driftstream.buffers.samplers import RankSampler
from driftstream.envs.errors import require

Prioritization = Literal["rank", "uniform", "loss"]
Source = Literal["auto", "refined", "terminals"]
COLUMNS = ("terminal", "log_reward", "priority")
FIRST = 1e30
"""Priority of a state whose loss is not known yet; finite, as checkpoints hold it."""


@dataclass(frozen=True)
class ReplayConfig:
    """What is replayed, how much of it and how it is chosen; raises ConfigError for a field out of range.

    `ratio` counts replayed batches per fresh batch (0 switches replay off), `minimum` the states held before replay
    starts. `prioritization` draws states by the rank of their log rewards, of the policy's residual on them (`loss`:
    what it sampled too little when they were last trained on comes first, after what is new), or uniformly. `source`
    says which states enter: the refiners' (`refined`), the actors' (`terminals`), or the refiners' where there are any
    (`auto`).
    """

    capacity: int = 600_000
    prioritization: Prioritization = "rank"
    rank_k: float = 0.01
    ratio: float = 1.0
    source: Source = "auto"
    minimum: int = 300

    def __post_init__(self) -> None:
        require(self.capacity >= 1, "replay.capacity", self.capacity, "at least 1")
        kind, kinds, sources = self.prioritization, get_args(Prioritization), get_args(Source)
        require(kind in kinds, "replay.prioritization", kind, f"one of {', '.join(kinds)}")
        require(self.source in sources, "replay.source", self.source, f"one of {', '.join(sources)}")
        require(self.rank_k > 0 and math.isfinite(self.rank_k), "replay.rank_k", self.rank_k, "a positive number")
        require(0 <= self.ratio < math.inf, "replay.ratio", self.ratio, "a finite number, at least 0")
        in_range = 1 <= self.minimum <= self.capacity
        require(in_range, "replay.minimum", self.minimum, f"between 1 and replay.capacity, {self.capacity}")


class TerminalReplay:
    """First-in-first-out memory of terminal states [D] and their log rewards, drawn by rank, by loss or uniformly.

    Rows are float32. One process and one thread own it. `generator=None` draws from the global random stream,
    which is then not part of the state.
    """

    def __init__(
        self,
        dim: int,
        config: ReplayConfig | None = None,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        self.dim = dim
        self.config = config or ReplayConfig()
        self.device = torch.device(device)
        self.generator = generator
        self.inserted = 0
        self.sampled = 0
        self._drawn: Tensor | None = None
        key = {"rank": "log_reward", "loss": "priority"}.get(self.config.prioritization)
        sampler: Sampler = RankSampler(self.config.rank_k, key=key) if key else RandomSampler()
        self._buffer = ReplayBuffer(
            storage=LazyTensorStorage(self.config.capacity, device=self.device),
            sampler=sampler,
            generator=generator,
        )

    def __len__(self) -> int:
        return len(self._buffer)

    @property
    def samples_per_insert(self) -> float:
        """States drawn per state inserted so far."""
        return self.sampled / max(self.inserted, 1)

    @property
    def by_loss(self) -> bool:
        """Whether states are drawn by the student's loss on them."""
        return self.config.prioritization == "loss"

    def add(self, terminal: Tensor, log_reward: Tensor, priority: Tensor | None = None) -> int:
        """Inserts states [N,D] with log rewards [N], detached; returns how many were kept.

        `priority` [N] is that of replay by loss; without it the states come before all whose loss is known. Rows that
        are not finite are left out: no backward path could be scored from them.
        """
        if terminal.shape != (len(log_reward), self.dim):
            raise ValueError(
                f"terminal {tuple(terminal.shape)}, log_reward {tuple(log_reward.shape)}: expected [N,{self.dim}], [N]"
            )
        terminal = terminal.detach().to(self.device, torch.float32)
        log_reward = log_reward.detach().to(self.device, torch.float32)
        finite = terminal.isfinite().all(-1) & log_reward.isfinite()
        if not finite.all():
            terminal, log_reward = terminal[finite], log_reward[finite]
        if self.by_loss:
            priority = torch.full_like(log_reward, FIRST) if priority is None else priority.to(log_reward)[finite]
        else:
            priority = None
        self._insert(terminal, log_reward, priority)
        self.inserted += len(terminal)
        return len(terminal)

    def _insert(self, terminal: Tensor, log_reward: Tensor, priority: Tensor | None) -> None:
        # Rows beyond the capacity would overwrite each other within one write.
        newest = slice(-self.config.capacity, None)
        terminal, log_reward = terminal[newest], log_reward[newest]
        if len(terminal):
            entries = {"terminal": terminal, "log_reward": log_reward}
            if priority is not None:
                entries["priority"] = priority[newest].nan_to_num(-FIRST, FIRST, -FIRST)
            self._buffer.extend(TensorDict(entries, batch_size=[len(terminal)], device=self.device))

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """`n` states [n,D] and log rewards [n], with replacement; raises RuntimeError when there are none."""
        rows, info = self._buffer.sample(n, return_info=True)
        self.sampled += n
        self._drawn = info["index"]
        return rows["terminal"], rows["log_reward"]

    def update_priority(self, priority: Tensor) -> None:
        """Set the priorities [n] of the states that `sample` drew last; ignored where states are not drawn by loss.

        Raises RuntimeError unless n states were drawn since they were last set.
        """
        if not self.by_loss:
            return
        drawn, self._drawn = self._drawn, None
        if drawn is None or len(drawn) != len(priority):
            raise RuntimeError(f"{len(priority)} priorities: expected one for each state of the last draw")
        rows = self._buffer.storage.get(drawn)
        rows["priority"] = priority.detach().to(rows["priority"]).nan_to_num(-FIRST, FIRST, -FIRST)
        self._buffer.storage.set(drawn, rows, set_cursor=False)
        self._buffer.sampler.extend(drawn)

    def recent(self, n: int, among: int = 10_000) -> Tensor:
        """`n` of the `among` newest states (or of all, where they are fewer), evenly spread: [n,D], without a draw."""
        among = min(among, len(self))
        cursor = self._buffer.writer.state_dict()["_cursor"]
        index = (cursor - 1 - torch.arange(n) * among // n) % max(1, len(self))
        return self._buffer.storage.get(index)["terminal"]

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors from which `load_state_dict` restores bitwise the same future draws."""
        state = {f"sampler.{key}": value for key, value in self._buffer.sampler.state_dict().items()}
        if len(self):
            rows = self._buffer[:].clone()
            state |= {name: rows[name] for name in COLUMNS if name in rows}
        cursor = self._buffer.writer.state_dict()["_cursor"]
        state["counters"] = torch.tensor([cursor, self.inserted, self.sampled])
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replaces everything held; the configuration and dimension must be those of the saved replay."""
        self._buffer.empty()
        if "terminal" in state:
            terminal, log_reward, priority = (state.get(name) for name in COLUMNS)
            assert terminal is not None
            assert log_reward is not None
            kept = None if priority is None else priority.to(self.device)
            self._insert(terminal.to(self.device), log_reward.to(self.device), kept)
        cursor, self.inserted, self.sampled = state["counters"].tolist()
        self._buffer.writer.load_state_dict({"_cursor": cursor})
        prefix = "sampler."
        self._buffer.sampler.load_state_dict(
            {key.removeprefix(prefix): value.to(self.device) for key, value in state.items() if key.startswith(prefix)}
        )
        if self.generator is not None and "generator" in state:
            self.generator.set_state(state["generator"].cpu())
