"""The command line: one clear line for every mistake, and what flags resolve to."""

import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest

from driftstream.launch.cli import main
from driftstream.launch.config import RunConfig, to_toml
from driftstream.launch.configure import configure
from driftstream.launch.flags import UsageError
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.train import read_flags

pytestmark = pytest.mark.timeout(60)

TARGETS = """
import torch
from driftstream.envs.targets import Target

class Gaussian(Target):
    name, dim = "gaussian", 3

    def log_reward(self, x):
        return -0.5 * x.square().sum(-1)

class WrongScore(Gaussian):
    def score(self, x):
        return x

    def log_reward_and_score(self, x):
        return self.log_reward(x), -x

class WrongPair(Gaussian):
    def score(self, x):
        return -x

    def log_reward_and_score(self, x):
        return self.log_reward(x), x

class Single(Gaussian):
    def __init__(self):
        self.matrix = 3 * torch.eye(3)

    def log_reward(self, x):
        return -(x @ self.matrix).square().sum(-1)

class InsideSingle(Single):
    def log_reward(self, x):
        return super().log_reward(x.float())

class BackFromSingle(InsideSingle):
    def log_reward(self, x):
        return super().log_reward(x).to(x.dtype)

class WrongSingle(Single):
    def score(self, x):
        return x

class Double(Gaussian):
    def log_reward(self, x):
        return -(x @ torch.eye(3).double()).square().sum(-1)

class Raises(Gaussian):
    def log_reward(self, x):
        raise ZeroDivisionError("division by zero")
"""


def resolved(*arguments: str) -> RunConfig:
    """The configuration that `driftstream train` makes of its arguments."""
    flags, config_flags = read_flags(list(arguments), "driftstream train")
    return configure(flags, config_flags, "driftstream train")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("tran gmm25", ["unknown command 'tran'", "train"]),
        ("train", ["name a target"]),
        ("train gmm25 --methd tb", ["unknown flag --methd", "--method"]),
        ("train gmm25 --steps many", ["--steps", "INT", "many"]),
        ("train gmm25 --steps", ["--steps"]),
        ("train gmm25 --wandb perhaps", ["--wandb", "perhaps", "offline"]),
        ("train gmm25 again", ["unexpected argument 'again'"]),
        ("train --resume nowhere", ["nowhere", "config.toml"]),
        ("train gmm25 --out a --resume .", ["config.toml"]),
        ("train gmm24 --dry-run", ["target = 'gmm24'", "gmm25", "manywell"]),
        ("train gmm25 --method tbb --dry-run", ["method = 'tbb'", "vargrad+expl"]),
        ("train gmm25 --optim.rate 1 --dry-run", ["unknown flag --optim.rate"]),
        ("train gmm25 --optim.learning-ratee 1 --dry-run", ["did you mean --optim.learning-rate?"]),
        ("train gmm25 --optim.learning-rate fast --dry-run", ["--optim.learning-rate", "fast"]),
        ("train gmm25 --optim.learning-rate -1 --dry-run", ["optim.learning_rate = -1.0", "positive"]),
        ("train gmm25 --minutes 0 --dry-run", ["limits.minutes = 0", "positive"]),
        ("train manywell --target-options dim 7 --dry-run", ["dim", "7", "even"]),
        ("train gmm25 --target-options colour red --dry-run", ["colour"]),
        ("list everything", ["everything", "targets", "methods"]),
        ("sample", ["RUN"]),
        ("sample nowhere -n 3 -o x.npz", ["nowhere", "config.toml"]),
        ("sample nowhere -n 0 -o x.npz", ["-n"]),
        ("sample . -n 3 -o nowhere/x.npz", ["nowhere/x.npz", "directory"]),
        ("eval nowhere --samples few", ["--samples", "few"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("driftstream")
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_configuration_ends_every_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from driftstream.launch.cli import main; sys.exit(main())"]
    with subprocess.Popen([*command, "train", "gmm24"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        _, error = process.communicate(timeout=50)
    assert process.returncode == 2
    (line,) = error.splitlines()
    assert line.startswith("driftstream train: target = 'gmm24': expected one of")
    assert not [other for other in psutil.process_iter() if _is_forked_for(other, tmp_path)]


def _is_forked_for(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.mark.parametrize("arguments", [["--help"], ["train", "gmm25", "--foo"], ["list", "foo"]])
def test_what_needs_no_torch_does_not_wait_for_it(arguments: list[str]) -> None:
    code = f"import sys; from driftstream.launch.cli import main; main({arguments}); print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert output.stdout.splitlines()[-1] == "False"


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    for flag in ("--method", "--actors", "--refiners", "--steps", "--sampling-steps", "--minutes"):
        assert flag in text
    for flag in ("--energy-budget", "--out", "--resume", "--seed", "--sync", "--dry-run", "--wandb"):
        assert flag in text


def test_every_field_of_the_configuration_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help-all", "--method", "tb+expl"])
    text = capsys.readouterr().out
    for flag in ("--optim.learning-rate", "--refiner.mala.chains", "--supervisor.drain-s", "--replay.ratio"):
        assert flag in text
    assert "25000" in text


def test_flags_go_over_the_method() -> None:
    config = resolved(
        *("gmm25", "--method", "tb+expl", "--actors", "3", "--optim.learning-rate", "0.01"),
        *("--sampling-steps", "7", "--seed", "5", "--wandb", "disabled", "--policy.learned-variance", "True"),
    )
    assert (config.target, config.method, config.seed) == ("gmm25", "tb+expl", 5)
    assert (config.actor.count, config.grid.sampling_steps) == (3, 7)
    assert (config.optim.learning_rate, config.monitor.wandb) == (0.01, "disabled")
    assert config.policy.learned_variance
    assert config.exploration.std == 2.0
    assert config.limits.steps == 25000


def test_the_target_may_stand_anywhere_and_take_options() -> None:
    assert resolved("--optim.learning-rate", "0.1", "gmm9").target == "gmm9"
    assert resolved("--seed", "1", "manywell", "--target-options", "dim", "6").target_options == {"dim": 6}


@pytest.mark.parametrize("flags", [["--minutes", "3"], ["--limits.minutes", "3"]])
def test_limits_replace_those_of_the_method(flags: list[str]) -> None:
    limits = resolved("gmm25", "--method", "tb+expl", *flags).limits
    assert (limits.steps, limits.minutes, limits.energy_budget) == (None, 3.0, None)


def test_a_method_may_be_a_file(tmp_path: Path) -> None:
    method = tmp_path / "mine.toml"
    method.write_text('summary = "mine"\n[optim]\nlearning_rate = 0.125\n')
    assert resolved("gmm25", "--method", str(method)).optim.learning_rate == 0.125


def test_a_resumed_run_keeps_its_configuration_and_takes_new_limits(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    first = resolved("gmm9", "--method", "tb+expl", "--sampling-steps", "7", "--seed", "3")
    run.write_config(to_toml(first))
    assert resolved("--resume", str(run.root)) == first
    longer = resolved("gmm9", "--resume", str(run.root), "--minutes", "2")
    assert (longer.limits.steps, longer.limits.minutes) == (None, 2.0)
    assert longer.grid == first.grid
    with pytest.raises(UsageError, match="has target gmm9, not gmm25"):
        resolved("gmm25", "--resume", str(run.root))
    with pytest.raises(UsageError, match="exclude each other"):
        resolved("--resume", str(run.root), "--out", "elsewhere")


def test_dry_run_shows_what_would_run_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "manywell", "--dry-run", "--actors", "2"]) == 0
    text = capsys.readouterr().out
    table = tomllib.loads(text)
    assert (table["target"], table["actor"]["count"]) == ("manywell", 2)
    assert "actors: 2 process(es)" in text
    assert "score agrees with central differences" in text
    assert not list(tmp_path.iterdir())


def test_dry_run_checks_the_gradient_of_a_users_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(TARGETS)
    both = ["score", "log_reward_and_score"]
    for name, wrong, dtype in [
        ("Gaussian", [], "float64"),
        ("WrongScore", ["score"], "float64"),
        ("WrongPair", ["log_reward_and_score"], "float64"),
        ("Single", [], "float32"),
        ("InsideSingle", [], "float32"),
        ("BackFromSingle", [], "float32"),
        ("WrongSingle", both, "float32"),
    ]:
        assert main(["train", f"{file}:{name}", "--dry-run"]) == bool(wrong)
        text = capsys.readouterr().out
        assert [method for method in both if f"# target: {method} DISAGREES" in text] == wrong
        assert text.count(f"torch.{dtype})") == 2
    # Training gives it float32.
    assert main(["train", f"{file}:Double", "--dry-run"]) == 1
    assert "target 'gaussian' raised RuntimeError" in capsys.readouterr().err
    assert main(["train", f"{file}:Raises", "--dry-run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "gaussian" in line
    assert "ZeroDivisionError: division by zero" in line


def test_fewer_samples_than_the_distance_takes_by_default() -> None:
    assert resolved("gmm9", "--eval.samples", "500").eval.distance_samples == 500


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "targets"]) == 0
    targets = capsys.readouterr().out
    assert main(["list", "methods"]) == 0
    methods = capsys.readouterr().out
    assert all(name in targets for name in ("gmm25", "gmm9", "funnel", "easy_funnel", "manywell"))
    assert all(name in methods for name in ("default", "tb+expl+lp+ls", "vargrad+expl"))
