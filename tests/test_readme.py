"""What the README shows is run: its example of a target, and its example as a library."""

import re
from pathlib import Path

import torch

from driftstream.envs.targets import make_target

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


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

    (source,) = (text for language, text in BLOCKS if language == "toml")
    path = tmp_path / "mine.toml"
    path.write_text(source)
    config = load_method(str(path)).config
    assert (config.policy.hidden, config.replay.ratio) == (128, 0.5)


def test_nothing_is_left_to_be_filled_in() -> None:
    assert not re.findall(r"\b(?:TODO|[A-Z]+_[A-Z]*(?:ROWS|TABLE|PLACEHOLDER))\b", (ROOT / "README.md").read_text())
