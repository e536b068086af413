"""`driftstream new` and `check`: what is written works, and what is wrong is said in one line."""

import json
import time
from pathlib import Path

import pytest

from driftstream.launch import findings
from driftstream.launch.check import kind_of
from driftstream.launch.cli import main
from driftstream.launch.findings import Check, ContractError, DoubtError, run_checks
from driftstream.launch.flags import UsageError
from driftstream.launch.new import class_name

pytestmark = pytest.mark.timeout(120)

PLUGINS = """
import time
import torch
from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.mala import Refinement
from driftstream.actors.refiner import Refiner
from driftstream.envs.targets import Target, make_target
from driftstream.envs.trajectory import make_trajectories

class Raises(ExplorationActor):
    def generate(self, context):
        return {}["nothing"]  # line 12

class Undefined(ExplorationActor):
    def generate(self, context):
        batch = super().generate(context)
        batch["states"][0, 3] = torch.nan
        return batch

class Returns(ExplorationActor):
    def generate(self, context):
        return super().generate(context)["states"]

class TooMany(ExplorationActor):
    def generate(self, context):
        return context.rollout(batch_size=context.batch_size + 1)

class OwnRandomness(ExplorationActor):
    def generate(self, context):
        return context.paths_to(torch.randn(context.batch_size, 2))

class NoScores(ExplorationActor):
    def generate(self, context):
        times = context.draw_times()
        states = context.noise(context.batch_size, len(times), 2)
        states[:, 0] = 0.0
        return make_trajectories(states, times, context.target.target.log_reward(states[:, -1]))

class Meddles(ExplorationActor):
    def generate(self, context):
        batch = context.rollout()
        batch["log_reward"] += 1.0
        for parameter in context.policy.parameters():
            parameter += 1.0
        return batch

class Listed(ExplorationActor):
    class Options:
        sizes = [1, 2]

class Frozen(Refiner):
    def refine(self, seeds):
        return Refinement(seeds, self.target.log_reward(seeds), 1.0, 0.0)

class Collapses(Refiner):
    def refine(self, seeds):
        self.cycles = getattr(self, "cycles", 0) + 1
        log_reward = self.target.log_reward(seeds)
        x = 0.0 * seeds[log_reward.isfinite()] - 5.0 + 0.1 * self.cycles
        x = x + 0.1 * torch.randn(x.shape, generator=self.generator)
        return Refinement(x, self.target.log_reward(x), 1.0, 0.0)

class WrongTarget(Target):
    dim, log_z = 2, 1.0

    def log_reward(self, x):
        return -0.5 * (x - x.mean(0)).square().sum(-1)

    def score(self, x):
        return x

    def sample(self, n, generator=None):
        return torch.randn(n, 2)

class WrongConstant(Target):
    dim, log_z = 2, 1.0

    def log_reward(self, x):
        return -0.5 * x.square().sum(-1)

    def sample(self, n, generator=None):
        return torch.randn(n, 2, generator=generator)

class Nowhere(WrongConstant):
    def log_reward(self, x):
        return torch.nan * x.sum(-1)

def nine():
    return make_target("gmm9")

def absolute(log_pf, log_pb, log_reward, log_z):
    return (log_z + log_pf.sum(1) - log_pb.sum(1) - log_reward).abs().mean()

def rows(log_pf, log_pb, log_reward, log_z):
    return (log_z + log_pf.sum(1) - log_pb.sum(1) - log_reward).square()

def half(log_pf, log_pb, log_reward, log_z):
    return log_pf[: len(log_pf) // 2].sum(1).square().mean()

class Nothing:
    pass

number = 3
"""


@pytest.fixture(autouse=True)
def _speeds_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("driftstream.launch.contract.SPEED_S", 0.0)


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    path = tmp_path / "plugins.py"
    path.write_text(PLUGINS)
    return path


def findings_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code of a check, and its findings as (result, seen) by name."""
    code = main(["check", *arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {row["check"]: (row["result"], row["seen"]) for row in report["findings"]}


def failed(found: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {name: seen for name, (result, seen) in found.items() if result == "FAILED"}


@pytest.mark.parametrize(
    ("name", "check", "words"),
    [
        ("Raises", "schema", ["KeyError: 'nothing'", "plugins.py:12"]),
        ("Undefined", "schema", ["'states'", "not finite"]),
        ("Returns", "schema", ["Tensor", "expected a TensorDict"]),
        ("TooMany", "schema", ["65 trajectories", "at most 64"]),
        ("OwnRandomness", "determinism", ["one seed differ", "context.generator"]),
        ("NoScores", "Langevin policy", ["'scores'"]),
        ("NoScores", "energy calls", ["64 points", "0 counted"]),
        ("Meddles", "log reward", ["not the target's"]),
        ("Meddles", "weights", ["weights were changed"]),
        ("Listed", "options", ["dataclass"]),
        ("Frozen", "determinism", ["same states", "self.generator"]),
        ("Frozen", "undefined seeds", ["not finite"]),
        ("WrongTarget", "score", ["central differences"]),
        ("WrongTarget", "batch independence", ["depends on the batch"]),
        ("WrongTarget", "exact samples", ["generator"]),
        ("WrongConstant", "log Z", ["log_z = 1.0000", "1.8"]),
        ("Nowhere", "finite", ["no log reward is finite"]),
        ("rows", "scalar", ["shape [64]"]),
        ("half", "gradient", ["0 for some trajectories"]),
    ],
)
def test_what_is_wrong_is_found_and_said(
    name: str, check: str, words: list[str], plugins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = findings_of(capsys, f"{plugins}:{name}")
    assert code == 1
    seen = failed(found)[check]
    assert all(word in seen for word in words), seen
    assert "\n" not in seen


def test_what_is_only_odd_is_a_warning(plugins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings_of(capsys, f"{plugins}:Collapses")
    assert code == 0
    assert {name for name, (result, _) in found.items() if result == "warning"} == {"balance", "resumed run"}


def test_code_that_does_not_import_fails_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ny = 1 / 0\n")
    code, found = findings_of(capsys, f"{path}:Actor")
    assert code == 1
    assert "ZeroDivisionError: division by zero" in failed(found)["loads"]
    assert "(broken.py:2)" in failed(found)["loads"]


def test_a_preset_that_is_none_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    for text, word in (
        ("[replay", "mine.toml"),
        ("[replay]\nratoi = 1.0", "replay.ratio"),
        ("[grid]\nkind = 3", "grid.kind"),
    ):
        path.write_text(text)
        code, found = findings_of(capsys, str(path))
        assert code == 1
        assert word in failed(found)["loads"]


def test_what_something_is_shows_in_its_type_or_name(plugins: Path) -> None:
    kinds = {"Raises": "actor", "Frozen": "refiner", "WrongTarget": "target", "nine": "target", "absolute": "objective"}
    assert {name: kind_of(f"{plugins}:{name}") for name in kinds} == kinds
    names = {"explore": "actor", "mala": "refiner", "gmm9": "target", "trajectory_balance": "objective"}
    assert {name: kind_of(name) for name in names} == names
    assert kind_of("driftstream.actors.refiner:MalaRefiner") == "refiner"
    assert kind_of("tb+expl") == "preset"
    with pytest.raises(UsageError, match="actor and preset: say which with --kind"):
        kind_of("teacher")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("check", ["FILE"]),
        ("check nothing", ["'nothing'", "path/file.py:Name"]),
        ("check gmm8", ["gmm9"]),
        ("check nowhere.py:Mine", ["nowhere.py is missing"]),
        ("check nowhere.toml", ["nowhere.toml", "does not exist"]),
        ("check {plugins}:Mine", ["an attribute of"]),
        ("check {plugins}:Nothing", ["driftstream.actors.exploration.ExplorationActor"]),
        ("check {plugins}:number", ["expected a class derived from"]),
        ("check {plugins}:Raises --kind refiner", ["derived from driftstream.actors.refiner.Refiner"]),
        ("check tb --options a 1", ["--options", "no options"]),
        ("new actor", ["FILE"]),
        ("new agent my_agent.py", ["agent", "refiner"]),
        ("new actor my_actor.toml", ["ends in .py"]),
        ("new preset my_preset.py", ["ends in .toml"]),
        ("new actor nowhere/my_actor.py", ["the directory does not exist"]),
        ("new actor 3.py", ["starts with a letter"]),
        ("new target {plugins}", ["exists"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: str,
    words: list[str],
    plugins: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(plugins.parent)
    assert main(arguments.format(plugins=plugins).split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert all(word in line for word in words), line
    assert [path.name for path in plugins.parent.iterdir() if path.suffix] == [plugins.name]
    assert plugins.read_text() == PLUGINS


def test_new_says_how_to_check_and_run_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "refiner", "far-jumps.py"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("driftstream check far-jumps.py:FarJumps")
    assert lines[2].endswith("driftstream train gmm9 --refiners far-jumps.py:FarJumps:1")
    text = Path("far-jumps.py").read_text()
    assert "class FarJumps(Refiner)" in text
    assert "driftstream check far-jumps.py:FarJumps" in text
    assert "my_refiner" not in text.lower()
    assert "MyRefiner" not in text


def test_a_class_is_named_after_its_file() -> None:
    names = {"my_actor": "MyActor", "far-2": "Far2", "x": "X", "HardWall": "HardWall", "options": "MyOptions"}
    assert {stem: class_name("actor", Path(f"{stem}.py")) for stem in names} == names
    assert class_name("target", Path("target.py")) == "MyTarget"


def test_a_table_says_how_many_checks_failed(plugins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{plugins}:absolute"]) == 0
    assert "every check holds" in capsys.readouterr().out
    assert main(["check", f"{plugins}:Raises"]) == 1
    text = capsys.readouterr().out
    assert "1 of 2 checks failed" in text
    assert "KeyError" in text


def test_options_are_those_of_what_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = findings_of(capsys, "manywell", "--options", "dim", "4")
    assert "4 dimensions" in found["loads"][1]
    code, found = findings_of(capsys, "langevin", "--options", "mcmc_steps", "2")
    assert code == 0
    assert "mcmc_steps = 2" in found["options"][1]
    code, found = findings_of(capsys, "explore", "--options", "speed", "2")
    assert code == 1
    assert "no options" in failed(found)["options"]


def test_what_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "LIMIT_S", 0.2)

    def interrupted() -> str:
        raise KeyboardInterrupt

    hung, fine = run_checks([Check("hangs", lambda: time.sleep(60) or ""), Check("fine", lambda: "seen")])
    assert (hung.result, fine.result) == ("FAILED", "ok")
    assert "not done after 0.2 s (test_launch_new_check.py:" in hung.seen
    with pytest.raises(KeyboardInterrupt):
        run_checks([Check("by the user", interrupted)])


def test_an_essential_failure_leaves_out_the_rest() -> None:
    def wrong() -> str:
        raise ContractError("wrong")

    def odd() -> str:
        raise DoubtError("odd")

    checks = [Check("a", odd, essential=True), Check("b", wrong), Check("c", wrong, essential=True), Check("d", odd)]
    assert [finding.result for finding in run_checks(checks)] == ["warning", "FAILED", "FAILED"]
