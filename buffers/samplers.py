"""Replay samplers: rank-prioritised draws in closed form, as a TorchRL `Sampler`."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from driftstream.envs.errors import require

# Below this offset c = k N the closed form loses accuracy, and the exact weights are cheap.
_EXACT_BELOW = 5.0
# A merge costs O(N): with more than this share of the entries new, it costs O(100) per new entry.
_MERGE_SHARE = 0.01
_SLOT_BITS = 32


def rank_probabilities(log_reward: Tensor, k: float) -> Tensor:
    """Probability of each entry under rank prioritisation: p_i ∝ 1 / (k N + rank_i), rank 0 is the best.

    `log_reward` is [N]; returns float64 [N]. Ties are ranked as they stand. No gradient flows.
    Source: Tripp et al. 2020 (arXiv 2006.09191); for replay: Sendera et al. 2024 (arXiv 2402.05098).
    """
    n = log_reward.numel()
    order = torch.argsort(log_reward.detach(), descending=True, stable=True)
    weight = torch.empty(n, dtype=torch.float64, device=log_reward.device)
    weight[order] = 1.0 / (k * n + torch.arange(n, dtype=torch.float64, device=log_reward.device))
    return weight / weight.sum()


def ranks_from_uniform(u: Tensor, n: int, k: float) -> Tensor:
    """Ranks in [0, n) with probability ∝ 1 / (c + rank), c = k n, by inversion of the distribution function.

    `u` is float64 in [0, 1), of any shape; returns int64 of that shape. From c = 5 on, the density 1 / x on
    [c - ½, c + n - ½], cut into unit cells, stands for the weights: O(1) per draw, and a total variation
    error of 1.6e-10 at n = 600,000, k = 0.01. Below, the exact weights are summed.
    """
    c = k * n
    if c < _EXACT_BELOW:
        cdf = torch.cumsum(1.0 / (c + torch.arange(n, dtype=torch.float64, device=u.device)), 0)
        rank = torch.searchsorted(cdf, u * cdf[-1], right=True)
    else:
        low = c - 0.5
        rank = (low * torch.exp(u * math.log1p(n / low)) - low).long()
    return rank.clamp_(0, n - 1)


class RankSampler(Sampler):
    """Draws storage slots with replacement, with probability ∝ 1 / (k N + rank) by descending log reward.

    The storage must hold TensorDicts with a scalar entry `key` per row, ranked in float32. Ranks are fewer than
    `resort_every` inserts behind the storage: a sample merges the slots written since into the order once so many
    inserts have come, or earlier while that is cheap. Until then a new slot is not drawn, and an overwritten one
    keeps its old rank. The order is in main memory, wherever the storage is. `generator` falls back on the replay
    buffer's, and that on the global one.
    Raises ConfigError for `k` not positive or `resort_every` below 1.
    """

    def __init__(
        self,
        k: float = 0.01,
        resort_every: int = 10,
        generator: torch.Generator | None = None,
        key: str = "log_reward",
    ) -> None:
        require(k > 0 and math.isfinite(k), "k", k, "a positive number")
        require(resort_every >= 1, "resort_every", resort_every, "at least 1")
        self.k, self.resort_every, self.generator, self.key = k, resort_every, generator, key
        self._empty()

    def _empty(self) -> None:
        self._keys: NDArray[np.int64] = np.empty(0, np.int64)  # of all slots, ascending: the best first
        self._key_of: NDArray[np.int64] = np.empty(0, np.int64)  # by slot
        self._changed: list[Tensor] = []  # slots written since the keys were made
        self._changed_rows = 0
        self._inserts = 0

    def add(self, index: int) -> None:
        self.extend(torch.tensor([index]))

    def extend(self, index: Tensor) -> None:
        self._changed.append(index.reshape(-1).cpu())
        self._changed_rows += index.numel()
        self._inserts += 1
        if self._changed_rows > len(self._keys):
            # A full sort is cheaper than the merge of so many; forgetting them also bounds the memory.
            self._empty()

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """`batch_size` slots (int64 [batch_size], in main memory); raises RuntimeError when the storage is empty."""
        if len(storage) == 0:
            raise RuntimeError("cannot sample from an empty storage")
        self._refresh(storage)
        generator = self.generator if self.generator is not None else self._rng
        device = generator.device if generator is not None else None
        u = torch.rand(batch_size, dtype=torch.float64, generator=generator, device=device)
        rank = ranks_from_uniform(u.cpu(), len(self._keys), self.k)
        return torch.from_numpy(_slots(self._keys[rank.numpy()])), {}

    def _refresh(self, storage: Storage) -> None:
        n, rows = len(storage), len(self._keys)
        if rows and self._inserts < self.resort_every and self._changed_rows <= _MERGE_SHARE * rows:
            return
        log_reward = storage.get(slice(0, n))[self.key].reshape(-1)
        if rows:
            changed = torch.cat(self._changed).unique()
            slots = changed.numpy()
            new = _keys(log_reward[changed.to(log_reward.device)], slots)
            keys = _merge(self._keys, self._key_of[slots[slots < rows]], np.sort(new))
            key_of = np.resize(self._key_of, n) if n > rows else self._key_of
            key_of[slots] = new
        else:
            key_of = _keys(log_reward, np.arange(n))
            keys = np.sort(key_of)
        self._empty()
        self._keys, self._key_of = keys, key_of

    def state_dict(self) -> dict[str, Tensor]:
        """The order and what is still to be merged into it: with the same storage it gives the same draws."""
        changed = torch.cat(self._changed) if self._changed else torch.empty(0, dtype=torch.int64)
        keys = torch.from_numpy(self._keys.copy())
        return {"keys": keys, "changed": changed, "inserts": torch.tensor(self._inserts)}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self._keys = state_dict["keys"].cpu().numpy().copy()
        self._key_of = np.empty_like(self._keys)
        self._key_of[_slots(self._keys)] = self._keys
        self._changed = [state_dict["changed"].cpu().clone()]
        self._changed_rows = self._changed[0].numel()
        self._inserts = int(state_dict["inserts"])

    def dumps(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(path) / "rank_sampler.safetensors")

    def loads(self, path: str | Path) -> None:
        self.load_state_dict(load_file(Path(path) / "rank_sampler.safetensors"))

    def __repr__(self) -> str:
        return f"RankSampler(k={self.k}, resort_every={self.resort_every})"


def _keys(log_reward: Tensor, slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """One integer for each slot, that sorts by descending log reward and, among equals, by slot."""
    bits = (-log_reward.detach().float()).cpu().numpy().view(np.int32).astype(np.int64)
    # The bits of negative floats ascend as their values descend; -0.0 takes its place below 0.0.
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return (bits << _SLOT_BITS) | slots


def _slots(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    return keys & (2**_SLOT_BITS - 1)


def _merge(keys: NDArray[np.int64], gone: NDArray[np.int64], new: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ascending `keys` without those `gone` and with the ascending `new`: O(N), far cheaper than a sort."""
    kept = np.delete(keys, np.searchsorted(keys, gone))
    return np.insert(kept, np.searchsorted(kept, new), new)
