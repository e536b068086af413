"""What each kind of data brings: rewards, the student's residuals, new regions, and its share of the batches."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.buffers.replay import TerminalReplay

NOVELTY_EVERY_S = 2.0
"""Of each kind, the novelty of at most one batch in so many seconds is measured."""
NOVELTY_ROWS = 128
FAR_QUANTILE = 0.95


@dataclass
class _Kind:
    """Sums over a window, and the newest novelty."""

    batches: int = 0
    trajectories: int = 0
    residuals: int = 0
    log_reward_sum: Tensor | float = 0.0
    residual_sum: Tensor | float = 0.0
    novelty: float | None = None


class KindStatistics:
    """Figures of every kind of actor, and of replay, over the time between two reports.

    `kind/<kind>/share` of the learner's batches, `trajectories_per_s`, mean `log_reward`, mean absolute `residual` of
    the student, and `novelty`: the share of terminal states that lie farther from replay than 95% of replay's own
    states lie from each other (of the newest ones).
    """

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self._since = time.monotonic()
        self._novelty_due: dict[str, float] = {}

    def add(
        self,
        kind: str,
        log_reward: Tensor,
        residual: Tensor | None,
        novelty: float | None = None,
        trained: bool = True,
    ) -> None:
        """Count a batch, log_reward [B] and residual [B]; one that was not trained on has no share."""
        entry = self._kinds.setdefault(kind, _Kind())
        entry.batches += trained
        entry.trajectories += len(log_reward)
        entry.log_reward_sum = entry.log_reward_sum + log_reward.sum()
        if residual is not None:
            entry.residuals += len(residual)
            entry.residual_sum = entry.residual_sum + residual.abs().sum()
        if novelty is not None:
            entry.novelty = novelty

    def novelty(self, kind: str, terminal: Tensor, replay: TerminalReplay) -> float | None:
        """Share of `terminal [B, D]` that is new to `replay`, or None where it is not time to measure it."""
        now = time.monotonic()
        if now < self._novelty_due.get(kind, 0.0) or len(replay) < 2 * NOVELTY_ROWS:
            return None
        self._novelty_due[kind] = now + NOVELTY_EVERY_S
        return novelty(terminal[:NOVELTY_ROWS], replay.recent(NOVELTY_ROWS))

    def metrics(self) -> dict[str, float]:
        """The figures since last asked, under their metric names; a new window starts."""
        now = time.monotonic()
        figures = dict(self._figures(max(now - self._since, 1e-9)))
        self._kinds, self._since = {}, now
        return figures

    def _figures(self, seconds: float) -> Iterator[tuple[str, float]]:
        batches = sum(entry.batches for entry in self._kinds.values())
        for kind, entry in self._kinds.items():
            prefix = f"kind/{kind}"
            yield f"{prefix}/share", entry.batches / max(1, batches)
            yield f"{prefix}/trajectories_per_s", entry.trajectories / seconds
            yield f"{prefix}/log_reward", float(entry.log_reward_sum) / entry.trajectories
            if entry.residuals:
                yield f"{prefix}/residual", float(entry.residual_sum) / entry.residuals
            if entry.novelty is not None:
                yield f"{prefix}/novelty", entry.novelty


def novelty(states: Tensor, known: Tensor) -> float:
    """Share of `states [B, D]` farther from their nearest of `known [M, D]` than 95% of `known` from theirs."""
    among = torch.cdist(known, known).fill_diagonal_(torch.inf).amin(1)
    far = torch.cdist(states.to(known), known).amin(1) > torch.quantile(among, FAR_QUANTILE)
    return float(far.float().mean())
