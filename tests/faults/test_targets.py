"""Targets that raise, hang or are undefined, in real runs: named with the input that did it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from driftstream.envs.errors import TargetError
from driftstream.envs.targets import CountedTarget, Target

pytestmark = pytest.mark.timeout(120)
Train = Callable[..., Any]
TARGETS = """
import time
import torch
from driftstream.envs.targets import Target

class Gaussian(Target):
    dim = 2

    def log_reward(self, x):
        return -0.5 * x.square().sum(-1)

class Undefined(Gaussian):
    name = "undefined"

    def log_reward(self, x):
        return torch.where(x[..., 0] > 1.0, torch.nan, super().log_reward(x))

class NeverDefined(Gaussian):
    name = "never-defined"

    def log_reward(self, x):
        return x.sum(-1) * torch.nan

class Broken(Gaussian):
    name = "broken"

    def log_reward(self, x):
        if (x[..., 0] > 2.0).any():
            raise RuntimeError("the simulator is not licensed")
        return super().log_reward(x)

class Hangs(Gaussian):
    name = "hangs"

    def log_reward(self, x):
        while (x[..., 0] > 2.0).any():
            time.sleep(0.1)
        return super().log_reward(x)
"""
POINT = r"x = \[(-?[\d.e-]+), (-?[\d.e-]+)\]"


@pytest.fixture
def targets(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(TARGETS)
    return str(path)


def first_coordinate(text: str) -> float:
    match = re.search(POINT, text)
    assert match, text
    return float(match[1])


def test_a_target_that_raises_ends_the_run_by_name_with_the_point(train: Train, targets: str) -> None:
    training = train(f"{targets}:Broken", "--minutes", "5", "--out", "{root}")
    training.wait_for(lambda: training.processes())
    assert training.end(30) == 1
    last = training.text().splitlines()[-1]
    assert "target 'broken' raised RuntimeError: the simulator is not licensed" in last
    assert first_coordinate(last) > 2.0
    assert "in log_reward" in training.text()


def test_a_target_that_raises_is_a_restart_where_that_is_asked_for(train: Train, targets: str) -> None:
    restart = ("--supervisor.target-error", "restart", "--supervisor.max-restarts", "2", "--refiners", "0")
    training = train(f"{targets}:Broken", "--minutes", "5", *restart, "--out", "{root}")
    assert training.end(60) == 1
    text = training.text()
    assert len(re.findall(r"actor-0 ended: TargetError: target 'broken' raised .*; restarted in", text)) == 2
    last = text.splitlines()[-1]
    assert "actor-0 ended" in last
    assert "given up after 3 starts" in last


def test_a_target_that_hangs_is_named_with_the_batch_and_ends_the_run(train: Train, targets: str) -> None:
    limits = ("--supervisor.hang-timeout-s", "2", "--supervisor.max-restarts", "1")
    training = train(f"{targets}:Hangs", "--minutes", "5", "--refiners", "0", *limits, "--out", "{root}")
    assert training.end(60) == 1
    last = training.text().splitlines()[-1]
    assert re.search(r"hung: no sign of work for 2\.\d s in target 'hangs' at " + POINT + ", the first of 50", last), (
        last
    )
    assert "given up after 2 starts" in last
    assert "in log_reward" in (training.root / "logs" / "actor-0.log").read_text(), "where it hangs"


def test_undefined_rewards_are_counted_named_and_the_run_goes_on(train: Train, targets: str) -> None:
    training = train(f"{targets}:Undefined", "--steps", "100", "--out", "{root}")
    assert training.end() == 0, training.text()
    assert max(row.get("stream/rejected", 0) for row in training.rows()) > 0
    assert all(row["train/loss"] is not None for row in training.rows() if "train/loss" in row)
    log = (training.root / "logs" / "actor-0.log").read_text()
    (line,) = [line for line in log.splitlines() if "undefined log reward" in line]
    assert first_coordinate(line) > 1.0


def test_a_target_that_is_never_defined_ends_the_run_by_name(train: Train, targets: str) -> None:
    training = train(f"{targets}:NeverDefined", "--minutes", "5", "--out", "{root}")
    assert training.end() == 1
    last = training.text().splitlines()[-1]
    assert "target 'never-defined': every trajectory has an undefined log reward" in last
    first_coordinate(last)


class Picky(Target):
    """Raises at points whose first coordinate is 7, or at any batch of two."""

    name = "picky"

    def __init__(self, dim: int, batches: bool = False) -> None:
        self.dim, self._batches = dim, batches

    def log_reward(self, x: Tensor) -> Tensor:
        if (x[..., 0] == 7).any() or (self._batches and x.shape[0] == 2):
            raise ValueError("no")
        return -x.square().sum(-1)


@pytest.mark.parametrize("row", [0, 3, 6])
def test_the_point_is_found_wherever_it_is_in_the_batch(row: int) -> None:
    x = torch.arange(14.0).reshape(7, 2) / 100
    x[row, 0] = 7
    with pytest.raises(TargetError, match=rf"raised ValueError: no \(at x = \[7, {x[row, 1]:.6g}\]\)$"):
        CountedTarget(Picky(2)).log_reward(x)
    with pytest.raises(TargetError, match=rf"\(at x = \[7, {x[row, 1]:.6g}\]\)$"):
        CountedTarget(Picky(2)).log_reward_and_score(x.reshape(7, 1, 2))


def test_a_batch_that_fails_as_a_whole_is_told_by_its_first_point() -> None:
    with pytest.raises(TargetError, match=r"\(at x = \[1, 1\], the first of 2\)$"):
        CountedTarget(Picky(2, batches=True)).log_reward(torch.ones(2, 2))


def test_a_point_of_many_dimensions_is_cut() -> None:
    with pytest.raises(TargetError, match=r"\(at x = \[7, 7, 7, 7, 7, 7, 7, 7, …\]\)$"):
        CountedTarget(Picky(32)).log_reward(torch.full((1, 32), 7.0))


def test_what_is_evaluated_can_be_asked_for_meanwhile() -> None:
    said: list[str] = []

    class Asks(Target):
        name, dim = "asks", 1

        def log_reward(self, x: Tensor) -> Tensor:
            said.append(counted.doing())
            return -x.square().sum(-1)

    counted = CountedTarget(Asks())
    counted.log_reward(torch.tensor([[2.0], [3.0]]))
    assert said == ["target 'asks' at x = [2], the first of 2"]
    assert counted.doing() == ""
