"""`driftstream eval` of one run and of several, on one number of steps and on many; and what `list methods` says."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from driftstream.actors.policy import DiffusionPolicy
from driftstream.eval.sampling_steps import StepSweep, plot_sampling_steps
from driftstream.launch.cli import main
from driftstream.launch.commands import sweep_table
from driftstream.launch.config import RunConfig, from_toml, to_toml
from driftstream.launch.describe import describe_data, describe_objective, describe_policy
from driftstream.launch.methods import load_method, method_names
from driftstream.launch.run_directory import RunDirectory
from driftstream.learner.checkpoint import CheckpointState, save_checkpoint

pytestmark = pytest.mark.timeout(120)

OPEN = """
import torch
from driftstream.envs.targets import Target

class Open(Target):
    name, dim = "open", 2

    def log_reward(self, x):
        return -x.abs().sum(-1)
"""
TINY = "--steps 3 --sampling-steps 4 --sync --wandb disabled --learner.batch-size 20 --eval.samples 60"
TINY += " --policy.hidden 16 --policy.harmonics 8"
Answer = Callable[..., str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny trained runs `fixed` and `learned`, and one of a target about which nothing is known."""
    folder = tmp_path_factory.mktemp("runs")
    with redirect_stdout(io.StringIO()):
        for name, method in (("fixed", "fl-subtb"), ("learned", "tb+lv")):
            arguments = f"train gmm9 --method {method} --out {folder / name} {TINY}"
            assert main(arguments.split()) == 0
    (folder / "open.py").write_text(OPEN)
    run = RunDirectory.create(folder / "open")
    fixed = from_toml(folder / "fixed" / "config.toml")
    run.write_config(to_toml(replace(fixed, target=f"{folder}/open.py:Open")))
    policy = DiffusionPolicy(2, fixed.policy)
    save_checkpoint(run.checkpoints, CheckpointState(5, {"ema": policy.state_dict()}, {"energy_evaluations": 7}))
    return folder


@pytest.fixture
def answer(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Answer:
    """What `driftstream eval` prints when it is run in the folder of the runs."""
    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> str:
        assert main(["eval", *arguments]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        return output.out

    return run


def test_one_run_is_one_flat_object(answer: Answer, runs: Path) -> None:
    results = json.loads(answer("fixed", "--json"))
    at_the_end = json.loads((runs / "fixed" / "results.json").read_text())
    assert results == pytest.approx(at_the_end, nan_ok=True)
    assert results["eval/flow_error"] > 0


def test_a_checkpoint_is_named(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    last = json.loads(answer("fixed", "--json"))
    for name in ("best", "last", "step-3", "fixed/checkpoints/step-3"):
        assert json.loads(answer("fixed", "--checkpoint", name, "--json"))["step"] == last["step"]
    assert main(["eval", "fixed", "--checkpoint", "step-2"]) == 1
    assert "no checkpoint 'step-2'" in capsys.readouterr().err


def test_several_runs_are_a_table_each(answer: Answer) -> None:
    text = answer("fixed", "learned")
    assert text.count("Δlog Z RW") == 2
    assert text.index("fixed, step 3") < text.index("learned, step 3")
    first, second = json.loads(answer("fixed", "learned", "--json"))["runs"]
    assert (first.pop("run"), second.pop("run")) == ("fixed", "learned")
    assert first == json.loads(answer("fixed", "--json"))
    assert second == json.loads(answer("learned", "--json"))


def test_figures_by_number_of_steps(answer: Answer, runs: Path) -> None:
    plot = runs / "fixed" / "plots" / "sampling_steps.png"
    plot.unlink(missing_ok=True)
    text = answer("fixed", "learned", "--sampling-steps", "4,1,2")
    assert "fixed, step 3, fixed variance" in text
    assert "learned, step 3, learned variance" in text
    assert f"plot: {plot}" in text
    assert imread(plot).shape[0] > 100
    assert not (runs / "learned" / "plots" / "sampling_steps.png").exists()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["1", "2", "4"] * 2
    headings = next(line for line in text.splitlines() if "steps ┃" in line)
    assert [cell.strip() for cell in headings.split("┃")[1:-1]] == [
        *("steps", "Δlog Z", "Δlog Z RW", "W2", "ESS", "mode coverage")
    ]

    results = json.loads(answer("fixed", "--json", "--sampling-steps", "1,4"))
    (run,) = results["runs"]
    assert (run["run"], run["step"], run["learned_variance"]) == ("fixed", 3, False)
    one, four = run["by_sampling_steps"]
    assert (one["sampling_steps"], four["sampling_steps"]) == (1, 4)
    assert f"{one['eval/delta_log_z']:.3f}" == rows[0][1]
    assert "eval/flow_error" not in one  # one step has no time inside
    # The grid of training is one like the others.
    trained = json.loads(answer("fixed", "--json"))
    assert four.items() <= {**trained, "sampling_steps": 4}.items()


def test_without_log_z_its_estimates_are_shown(answer: Answer, runs: Path) -> None:
    text = answer("open", "--sampling-steps", "1,2")
    headings = next(line for line in text.splitlines() if "steps ┃" in line)
    assert [cell.strip() for cell in headings.split("┃")[1:-1]] == [
        *("steps", "log Z lower bound", "log Z importance", "ESS")
    ]
    assert (runs / "open" / "plots" / "sampling_steps.png").is_file()


@pytest.mark.parametrize("numbers", ["0", "1,0", "few", "1,,2", "1,2,", "-1,2", "1.5", "", "1 2", "1e2", "9999999"])
def test_a_bad_list_is_one_line(numbers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "nowhere", f"--sampling-steps={numbers}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"driftstream eval: --sampling-steps '{numbers}': expected positive integers")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nowhere --sampling-steps 1,2,1", "--sampling-steps '1,2,1': a number is there twice"),
        ("nowhere --sampling-steps", "--sampling-steps"),
        ("nowhere --sampling-steps 1,2", "a run directory"),
        ("nowhere ./nowhere", "a run is named twice"),
        ("", "RUN"),
    ],
)
def test_other_mistakes_are_one_line(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *arguments.split()]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert words in line


def test_a_run_that_is_not_there_is_told_before_any_is_evaluated(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    assert main(["eval", "fixed", "nowhere"]) == 2
    assert capsys.readouterr().out == ""


def test_a_figure_that_one_number_of_steps_lacks_leaves_its_cell_empty() -> None:
    table = sweep_table("run", {1: {"eval/nonfinite": 9.0}, 2: {"eval/ess": 0.5}})
    assert [column.header for column in table.columns] == ["steps", "ESS"]
    assert [list(column.cells) for column in table.columns] == [["1", "2"], ["", "0.500"]]


def test_the_plot_has_a_panel_for_each_figure_there_is(tmp_path: Path) -> None:
    one, four = tmp_path / "one.png", tmp_path / "four.png"
    assert plot_sampling_steps([StepSweep("a", {1: {"eval/nonfinite": 2.0}})], one) is None
    assert plot_sampling_steps([StepSweep("a", {1: {"eval/ess": 0.1}, 8: {"eval/ess": float("nan")}})], one) == one
    rows = {
        count: {
            "eval/delta_log_z": 30.0 / count,
            "eval/ess": 0.1,
            "eval/mode_coverage": 0.2,
            "eval/mode_coverage_true": 0.15,
            "eval/w2": 3.0,
            "eval/w2_floor": 2.0,
        }
        for count in (1, 2, 16)
    }
    assert plot_sampling_steps([StepSweep("a", rows), StepSweep("b", {4: rows[1]})], four) == four
    assert imread(four).shape[1] == pytest.approx(3 * imread(one).shape[1], abs=3)
    assert imread(four).shape[0] > 1.8 * imread(one).shape[0]


def describe(config: RunConfig) -> tuple[str, str, str]:
    return describe_objective(config), describe_data(config), describe_policy(config)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            "default",
            (
                "trajectory balance",
                "explore:1 + refined replay",
                "Langevin + preconditioning + learned variance (D ≤ 10)",
            ),
        ),
        ("tb", ("trajectory balance", "on-policy", "PIS net")),
        ("tb+lv", ("trajectory balance", "on-policy", "PIS net + learned variance")),
        ("tb+lb", ("trajectory balance", "on-policy", "PIS net + learned backward")),
        ("vargrad+expl+lp", ("log variance (VarGrad)", "explore:1", "Langevin")),
        ("tb+expl+lp+ls", ("trajectory balance", "explore:1 + refined replay", "Langevin")),
        ("db", ("detailed balance", "on-policy", "PIS net + state flow")),
        ("fl-subtb+lp", ("subtrajectory balance (λ = 2)", "on-policy", "Langevin + forward-looking flow")),
        ("pis+lp", ("reverse KL", "on-policy, pathwise gradient", "Langevin")),
        ("dds", ("reverse KL", "on-policy, pathwise gradient", "Langevin, DDS process")),
        ("mle", ("maximum likelihood", "refined replay", "PIS net")),
    ],
)
def test_a_method_in_a_few_words(method: str, words: tuple[str, str, str]) -> None:
    assert describe(load_method(method).config) == words


def test_what_a_users_method_may_add_is_said() -> None:
    config = load_method("subtb").config
    config = replace(
        config,
        objective=replace(config.objective, lam=0.9, segment_length=20),
        policy=replace(config.policy, state_flow="auto"),
        replay=replace(config.replay, ratio=1.0),
    )
    assert describe(config) == (
        "subtrajectory balance (λ = 0.9), segments of 20 steps",
        "on-policy + replay",
        "PIS net + state flow",
    )


def test_list_methods_fits_120_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["list", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split() == ["method", "objective", "data", "policy", "source"]
    first_words = {line.split()[0] for line in lines[1:] if not line.startswith(" ")}
    assert first_words == set(method_names())
