"""Timing in rounds: everything that is compared runs in every round, so that the machine's load hits all alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile."""

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class Row:
    """Seconds of one contender, and its ratio to the floor of the same round."""

    seconds: Quartiles
    ratio: Quartiles


@dataclass(frozen=True)
class Comparison:
    """One table: contenders by name, which of them is the `floor`, and further `figures` by name.

    `unit` says what one row's seconds are of.
    """

    name: str
    unit: str
    floor: str
    rows: dict[str, Row]
    figures: dict[str, float] = field(default_factory=dict)


def time_rounds(
    contenders: Mapping[str, Callable[[], object]], repeats: int, units: int = 1, warm_up: int = 1
) -> dict[str, Tensor]:
    """Seconds [repeats] of every contender, in float64, after so many rounds that are not counted.

    Every round starts with another contender. A call does its work `units` times over; seconds are those of one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for index in range(warm_up + repeats):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            contenders[name]()
            if index >= warm_up:
                seconds[name].append((time.perf_counter() - start) / units)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()}


def compare(
    name: str, unit: str, floor: str, seconds: Mapping[str, Tensor], figures: Mapping[str, float] | None = None
) -> Comparison:
    """The table of what `time_rounds` measured; ratios are taken round by round."""
    rows = {
        contender: Row(quartiles(values), quartiles(values / seconds[floor])) for contender, values in seconds.items()
    }
    return Comparison(name, unit, floor, rows, dict(figures or {}))


def quartiles(values: Tensor) -> Quartiles:
    """Quartiles of values [K]."""
    return Quartiles(*values.double().quantile(torch.tensor(_QUARTILES, dtype=torch.float64)).tolist())


def median_ratio(above: Tensor, below: Tensor) -> float:
    """Median over rounds of above [K] over below [K]."""
    return quartiles(above / below).median
