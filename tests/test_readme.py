"""What the README shows is run: its examples of a target, of an actor, of a method, and as a library."""

import re
from pathlib import Path

import pytest
import torch

from driftstream.envs.targets import make_target
from driftstream.launch.cli import main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


def test_example_target_is_a_target(tmp_path: Path) -> None:
    (source,) = (text for language, text in BLOCKS if language == "python" and "class MyTarget" in text)
    path = tmp_path / "my_target.py"
    path.write_text(source)
    target = make_target(f"{path}:MyTarget")
    x = 2.0 * torch.randn(5, 2, dtype=torch.float64)
    log_reward, score = target.log_reward_and_score(x)
    assert log_reward.shape == (5,)
    assert score.isfinite().all()


def test_example_as_a_library_runs() -> None:
    (source,) = (text for language, text in BLOCKS if language == "python" and "env.rollout" in text)
    namespace: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), namespace)
    assert namespace["episodes"].batch_size == (300, 20)  # type: ignore[attr-defined]


def test_example_method_is_a_method(tmp_path: Path) -> None:
    from driftstream.launch.methods import load_method

    (source,) = (text for language, text in BLOCKS if language == "toml" and "summary" in text)
    path = tmp_path / "mine.toml"
    path.write_text(source)
    config = load_method(str(path)).config
    assert (config.policy.hidden, config.replay.ratio) == (128, 0.5)


def test_example_actor_is_sound_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "<!-- code: actor -->" not in TEXT:
        pytest.skip("README.md has no example of an actor")
    (source,) = re.findall(r"<!-- code: actor -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 20
    (name,) = re.findall(r"^class (\w+)\(ExplorationActor\)", source, flags=re.MULTILINE)
    place = f"{tmp_path / 'my_actor.py'}:{name}"
    (tmp_path / "my_actor.py").write_text(source)
    assert main(["check", place]) == 0, capsys.readouterr().out
    small = ("--eval.samples", "50", "--eval.w2-samples", "50", "--wandb", "disabled")
    train = ("train", "gmm9", "--sync", "--steps", "5", "--refiners", "0", "--actors", f"{place}:1")
    assert main([*train, *small, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    option = re.search(rf"--{name}\.(\w+) ([\w.]+)", TEXT)
    assert option is not None
    assert main([*train, option[0].split()[0], option[2], "--dry-run"]) == 0
    assert f"{option[1]} = {option[2]}" in capsys.readouterr().out


def test_nothing_is_left_to_be_filled_in() -> None:
    assert not re.findall(r"\b(?:TODO|[A-Z]+_[A-Z]*(?:ROWS|TABLE|PLACEHOLDER))\b", TEXT)
