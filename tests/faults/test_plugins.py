"""Plug-in actors that misbehave, in real runs: each is named, restarted within its budget, and done without."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(180)
Train = Callable[..., Any]
PLUGINS = """
import time
import torch
from driftstream.actors.exploration import ExplorationActor

class Works(ExplorationActor):
    def exploration_std(self, context):
        return 2.0

class Asks(ExplorationActor):
    def generate(self, context):
        drawn = context.replayed(40)
        return super().generate(context) if drawn is None else context.paths_to(*drawn)

class Raises(ExplorationActor):
    def generate(self, context):
        return 1 / 0

class Wrong(ExplorationActor):
    def generate(self, context):
        batch = super().generate(context)
        batch["states"] = batch["states"][..., :1]
        return batch

class Undefined(ExplorationActor):
    def generate(self, context):
        batch = super().generate(context)
        batch["states"][0, -1] = torch.nan
        return batch

class Hangs(ExplorationActor):
    def generate(self, context):
        time.sleep(1000)
"""
WATCH = ("--supervisor.max-restarts", "1", "--supervisor.hang-timeout-s", "4")


def events(text: str, name: str) -> list[str]:
    """Lines on screen that name a role."""
    return [line for line in text.splitlines() if f"({name})" in line]


def test_actors_that_fail_are_named_restarted_and_done_without(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGINS)
    names = ("Works", "Asks", "Raises", "Wrong", "Undefined", "Hangs")
    kinds = ",".join(f"{path}:{name}:1" for name in names)
    training = train("gmm9", "--minutes", "0.6", "--refiners", "0", "--actors", kinds, *WATCH, "--out", "{root}")
    assert training.end() == 0, training.text()
    text = training.text()
    causes = {
        "Raises": "PluginError: actor Raises raised ZeroDivisionError: division by zero",
        "Wrong": "PluginError: actor Wrong: 'states' has shape [50, 11, 1]: expected [B, T+1 (T >= 1), 2]",
        "Undefined": "PluginError: actor Undefined: 'states' has 2 values that are not finite: expected none",
        "Hangs": "hung: no sign of work for",
    }
    for name, cause in causes.items():
        first, last = events(text, name)
        assert cause in " ".join(first.split()), text
        assert "restarted in" in first
        assert "given up after 2 starts" in last
    assert not events(text, "Works")
    assert not events(text, "Asks")
    figures = {name: value for row in training.rows() for name, value in row.items()}
    assert {name.split("/")[1] for name in figures if name.startswith("kind/")} >= {"Works", "Asks"}
    assert figures["kind/Works/trajectories_per_s"] > 0
    assert (training.root / "results.json").exists()


def test_the_last_actor_that_fails_ends_the_run(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGINS)
    kinds = f"{path}:Raises:1"
    training = train("gmm9", "--minutes", "5", "--refiners", "0", "--actors", kinds, *WATCH, "--out", "{root}")
    assert training.end() == 1, training.text()
    last = " ".join(training.text().splitlines()[-1].split())
    assert "actor-0 (Raises) ended: PluginError: actor Raises raised ZeroDivisionError" in last
    assert "given up after 2 starts" in last


def test_an_installed_actor_joins_by_its_entry_point_and_shows_in_wandb(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], Any]
) -> None:
    site = tmp_path / "site"
    information = site / "wanderers-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "wanderers.py").write_text(PLUGINS)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wanderers\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[driftstream.actors]\nwander = wanderers:Works\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    root = tmp_path / "run"
    # Long enough for the actors' reports, which come every two seconds.
    arguments = ("gmm9", "--steps", "600", "--refiners", "0", "--actors", "explore:1,wander:1", "--out", str(root))
    training = train(*arguments, root=root, wandb="offline")
    assert training.end() == 0, training.text()
    rows = read_wandb(root)[0]
    assert any("kind/wander/share" in row for row in rows)
    assert any("actor/1/trajectories_per_s" in row for row in rows)
    assert json.loads((root / "results.json").read_text())
    assert sys.modules.get("wanderers") is None
