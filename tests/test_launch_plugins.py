"""Plug-ins and the options of kinds: from a user's file or an installed distribution to flags, lists and runs."""

import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from driftstream.actors.registry import load_actor, make_options
from driftstream.envs.errors import ConfigError, PluginError
from driftstream.envs.targets import make_target, target_names
from driftstream.launch.cli import main
from driftstream.launch.config import RunConfig, from_toml, resolve, to_toml
from driftstream.launch.configure import configure
from driftstream.launch.describe import describe_data, describe_objective
from driftstream.launch.methods import load_method
from driftstream.launch.roles import build_actor, build_learner, build_refiner
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.train import read_flags
from driftstream.learner.objective_plugins import load_objective, plugin_loss, uses_log_z
from driftstream.learner.objectives import ObjectiveConfig, trajectory_balance

pytestmark = pytest.mark.timeout(120)

PLUGINS = '''
from dataclasses import dataclass
from typing import Literal

from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.refiner import Refiner
from driftstream.envs.targets import Target


@dataclass(frozen=True)
class Options:
    """How wide, and which way."""

    width: float = 2.0
    """How wide it looks."""
    way: Literal["up", "down"] = "up"
    most_steps: int | None = None
    greedy: bool = False

    def __post_init__(self):
        if self.width < 0:
            raise ValueError("too narrow")


class Mine(ExplorationActor):
    """Looks [widely]."""

    Options = Options


@dataclass
class Needed:
    depth: int


class Deep(Refiner):
    Options = Needed

    def refine(self, seeds):
        raise NotImplementedError


@dataclass(frozen=True)
class Several:
    widths: tuple[float, ...] = ()


class Wide(ExplorationActor):
    Options = Several


class grid(Mine):  # noqa: N801
    """Called as a component of the configuration is."""


class Cloud(Target):
    dim = 3

    def log_reward(self, x):
        return -x.square().sum(-1)


def balance(log_pf, log_pb, log_reward, log_z):
    """Squared residuals."""
    return (log_z + log_pf.sum(-1) - log_pb.sum(-1) - log_reward).square().mean()


def spread(log_pf, log_pb, log_reward, log_z):
    return (log_pf.sum(-1) - log_pb.sum(-1) - log_reward).var()


def three(log_pf, log_pb, log_reward):
    return log_pf.mean()


def raises(log_pf, log_pb, log_reward, log_z):
    raise ZeroDivisionError("division by zero")


def number(log_pf, log_pb, log_reward, log_z):
    return 1.0


def rows(log_pf, log_pb, log_reward, log_z):
    return log_pf.sum(-1)


def integer(log_pf, log_pb, log_reward, log_z):
    return log_pf.sum().long()


def detached(log_pf, log_pb, log_reward, log_z):
    return log_pf.detach().mean()


def undefined(log_pf, log_pb, log_reward, log_z):
    return log_pf.mean() * float("nan")


def in_place(log_pf, log_pb, log_reward, log_z):
    log_reward -= 100.0
    return balance(log_pf, log_pb, log_reward, log_z)
'''


def resolved(arguments: str) -> RunConfig:
    """The configuration that `driftstream train` makes of its arguments."""
    flags, config_flags = read_flags(arguments.split(), "driftstream train")
    return configure(flags, config_flags, "driftstream train")


def complaint(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert main(arguments.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    return line


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of plug-ins in the working directory."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(PLUGINS)
    return file


def test_options_of_kinds_are_flags(mine: Path, tmp_path: Path) -> None:
    config = resolved(
        "gmm9 --actors ./mine.py:Mine:2,local_search --Mine.width 3 --Mine.way=down --Mine.most-steps -4 --Mine.greedy "
        "--local_search.depth 0.5 --refiners hmc,./mine.py:Deep --hmc.mcmc-steps 40 --Deep.depth 7 --seed 3"
    )
    assert config.actor.kinds == {f"{mine}:Mine": 2, "local_search": 1}
    expected = {"width": 3.0, "way": "down", "most_steps": -4, "greedy": True}
    assert config.actor.options["Mine"] == expected
    # What is not given is there too: the file shall say all that the run depends on.
    assert config.actor.options["local_search"]["depth"] == 0.5
    assert set(config.actor.options["local_search"]) == {"depth", "adaptive", "target_acceptance", "accept"}
    assert (config.refiner.options["hmc"]["mcmc_steps"], config.refiner.options["hmc"]["burn_in"]) == (40, 30)
    assert config.refiner.options["Deep"] == {"depth": 7}
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert from_toml(file) == config == resolve(config)
    explorer = build_actor(from_toml(file), seed=0, index=1).explorer
    assert type(explorer).__name__ == "Mine"
    assert vars(explorer.options) == expected
    assert build_refiner(from_toml(file), seed=0, index=1).options.depth == 7


def test_a_method_and_a_run_give_options_their_values(mine: Path, tmp_path: Path) -> None:
    method = tmp_path / "method.toml"
    method.write_text('[actor]\ncount = 2\n[actor.kinds]\n"./mine.py:Mine" = 2\n[actor.options.Mine]\nwidth = 5\n')
    assert resolved("gmm9 --method ./method.toml").actor.options["Mine"]["width"] == 5.0
    config = resolved("gmm9 --method ./method.toml --Mine.way down")
    assert config.actor.options["Mine"] == {"width": 5.0, "way": "down", "greedy": False}
    run = RunDirectory.create(tmp_path / "run")
    run.write_config(to_toml(config))
    assert resolved("--resume run") == config
    resumed = resolved("--resume run --Mine.width 6 gmm9")
    assert resumed.actor.options["Mine"] == {"width": 6.0, "way": "down", "greedy": False}
    # Options of a kind that no longer runs go with it.
    assert resolved("--resume run --actors explore:2").actor.options == {}
    assert resolved("gmm9 --method ./method.toml --actors local_search --refiners 0").actor.count == 1
    with pytest.raises(ConfigError, match=r"actor\.kinds = .*: expected none, as data = 'on_policy'"):
        resolved("gmm9 --actors local_search --data on_policy --refiners 0")
    method.write_text("[actor.options.Mien]\nwidth = 5\n")
    with pytest.raises(ConfigError, match=r"actor\.options\.Mien = .*: expected options of a kind that runs"):
        resolved("gmm9 --method ./method.toml")


def test_counts_by_kind_may_be_a_field_too() -> None:
    assert resolved("gmm9 --actor.kinds explore 2 teacher 1").actor.count == 3


def test_a_run_without_a_teacher_has_none_to_go_on_with(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.write_config(to_toml(resolved("gmm9")))
    with pytest.raises(ConfigError, match=r"actor\.kinds = .*: expected no teacher, as in the run to be resumed"):
        resolved(f"--resume {run.root} --actors explore:1,teacher:1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--actors ./mine.py:Mine --Mine.widht 3", "unknown flag --Mine.widht; did you mean --Mine.width?"),
        ("--actors ./mine.py:Mine --mine.width 3", "unknown flag --mine.width; did you mean --Mine.width?"),
        ("--actors ./mine.py:Mine --Mine.width many", "--Mine.width: could not convert string to float: 'many'"),
        ("--actors ./mine.py:Mine --Mine.way left", "invalid choice 'left' for argument '--Mine.way'"),
        ("--actors ./mine.py:Mine --Mine.width", "Missing value for argument '--Mine.width'"),
        ("--actors ./mine.py:Mine --Mine.width -1", "expected options that it takes (ValueError: too narrow)"),
        ("--actors ./mine.py:Mine --Mine.width 1 2", "unexpected argument '2'"),
        ("--refiners ./mine.py:Deep", "missing: --Deep.depth"),
        ("--hmc.chains 3", "unknown flag --hmc.chains: no hmc runs (kinds that run: explore, annealed)"),
        ("--Other.x 3", "unknown flag --Other.x: no Other runs (kinds that run: explore, annealed)"),
        ("--method pis --local_search.depth 1", "no local_search runs (kinds that run: none)"),
        ("--refiners 0 --hmc.chains 3", "no hmc runs (kinds that run: explore)"),
        ("--explore.std 3", "unknown flag --explore.std: explore has no options"),
        ("--refiners mala --mala.chains 3", "unknown flag --mala.chains; did you mean --refiner.mala.chains?"),
        ("--actors ./mine.py:Wide", "actor.options.Wide.widths = 'tuple': expected int, float, bool, str"),
        ("--actors ./mine.py:grid", "actor.kinds = 'grid': expected another name, as the flags --grid.… are taken"),
        ("--actors ./mine.py:Nowhere", "expected an attribute of"),
        ("--actors lokal_search", "(did you mean 'local_search'?)"),
        ("--objective.name tbb", "objective.name = 'tbb': expected one of trajectory_balance, vargrad"),
        ("--objective.name ./mine.py:balanse", "(did you mean 'balance'?)"),
        ("--objective.name ./mine.py:three", "expected a function (log_pf, log_pb, log_reward, log_z) -> loss"),
        ("--objective.name ./mine.py:Mine", "expected a function (log_pf, log_pb, log_reward, log_z) -> loss"),
        ("--objective.name ./mine.py:balance --objective.segment-length 3", "objective.segment_length = 3"),
        ("--objective.name ./mine.py:balance --policy.state-flow plain", "policy.state_flow = 'plain'"),
        ("--objective.name ./mine.py:balance --method teacher", "as the run has a teacher"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, words: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(f"train gmm9 --dry-run {arguments}", capsys)
    assert line.startswith("driftstream train: ")
    assert words in line


def test_two_kinds_need_names_of_their_own(mine: Path) -> None:
    mine.write_text(PLUGINS + "\n\nclass hmc(Mine):  # noqa: N801\n    pass\n")
    with pytest.raises(ConfigError, match=r"refiner\.kinds = 'hmc': expected another name"):
        resolved("gmm9 --actors ./mine.py:hmc --refiners hmc")


def test_help_shows_the_options_of_the_kinds_that_run(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--help-all", "--actors", "./mine.py:Mine", "--Mine.width", "9", "--refiners", "annealed"])
    assert not end.value.code
    text = capsys.readouterr().out
    for words in ("--Mine.width FLOAT", "How wide it looks. (default: 9.0)", "How wide, and which way."):
        assert words in text
    assert "--annealed.chains" in text
    assert "--optim.learning-rate" in text
    assert str(mine) not in text


def test_dry_run_shows_kinds_and_their_options(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "gmm9", "--dry-run", "--actors", "explore:2,./mine.py:Mine", "--Mine.width", "3"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["actor"]["options"]["Mine"]["width"] == 3.0
    lines = text.splitlines()
    assert "# actors: 3 process(es), 1 thread(s) each" in lines
    assert "#   explore:2" in lines
    assert f"#   Mine:1 (width 3.0, way up, greedy False), from {mine}" in lines
    assert any(line.startswith("#   annealed:1 (chains 300") for line in lines)


def test_methods_show_their_actors() -> None:
    assert describe_data(load_method("teacher").config) == "explore:2 + teacher:1 + replay by loss"
    assert describe_data(load_method("default").config) == "explore:1 + refined replay"


@dataclass(frozen=True)
class Typed:
    """Options of every type that a flag can have."""

    rate: float
    count: int = 1
    name: str = "a"
    on: bool = False
    way: Literal["up", "down"] = "up"
    maybe: int | None = None
    limit: int | None = 3


def test_options_are_made_of_plain_values_of_their_types() -> None:
    assert make_options(Typed, {"rate": 1, "maybe": 2}, "f") == Typed(1.0, maybe=2)
    assert isinstance(make_options(Typed, {"rate": 1}, "f").rate, float)
    assert make_options(None, {}, "f") is None
    for values, words in [
        ({}, "f.rate = None: expected a value"),
        ({"rate": "fast"}, "f.rate = 'fast': expected a value of type float"),
        ({"rate": 1, "count": 1.5}, "f.count = 1.5: expected a value of type int"),
        ({"rate": 1, "on": 1}, "f.on = 1: expected a value of type bool"),
        ({"rate": 1, "way": "left"}, "f.way = 'left': expected one of 'up', 'down'"),
        ({"rate": 1, "conut": 3}, "f.conut = 3: expected an option of this kind (rate, count"),
    ]:
        with pytest.raises(ConfigError) as refusal:
            make_options(Typed, values, "f")
        assert words in str(refusal.value)
    with pytest.raises(ConfigError, match="nothing, as this kind has no options"):
        make_options(None, {"a": 1}, "f")
    with pytest.raises(ConfigError, match="a dataclass as Options"):
        make_options(dict, {"a": 1}, "f")


def test_what_a_file_cannot_say_is_refused(mine: Path) -> None:
    text = PLUGINS.replace("most_steps: int | None = None", "most_steps: int | None = 3")
    mine.write_text(text)
    with pytest.raises(ConfigError, match=r"actor\.options\.Mine\.most_steps = None: expected a value"):
        resolved("gmm9 --actors ./mine.py:Mine --Mine.most-steps None")


ENTRY_POINTS = """
[driftstream.actors]
hunter = hunters:Mine
gone = hunters.nowhere:Mine
wrong = hunters:balance
explore = hunters:Mine
[driftstream.refiners]
digger = hunters:Deep
lost = nohunters:Deep
[driftstream.targets]
cloud = hunters:Cloud
mist = hunters:Mist
[driftstream.objectives]
square = hunters:balance
circle = hunters:circle
"""


@pytest.fixture
def hunters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution "hunters" with entry points, of which some do not import."""
    information = tmp_path / "site" / "hunters-0.3.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hunters\nVersion: 0.3\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "site" / "hunters.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    sys.modules.pop("hunters", None)
    load_objective.cache_clear()
    uses_log_z.cache_clear()


def test_what_is_installed_is_known_by_its_name(hunters: Path) -> None:
    config = resolved(
        "cloud --actors hunter:2 --hunter.width 7 --refiners digger --digger.depth 2 --objective.name square"
    )
    assert config.actor.kinds == {"hunter": 2}
    assert (config.actor.options["hunter"]["width"], config.refiner.options) == (7.0, {"digger": {"depth": 2}})
    assert type(build_actor(config, seed=0).explorer).__module__ == "hunters"
    assert "cloud" in target_names()
    assert (make_target("cloud").dim, make_target("cloud").name) == (3, "cloud")
    assert config.objective.learns_log_z
    # No distribution takes a built-in's name from it.
    assert load_actor("explore").__module__ == "driftstream.actors.exploration"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "gmm9 --actors gone",
            ["actor = 'gone'", "ModuleNotFoundError", "hunters installs it at hunters.nowhere:Mine"],
        ),
        ("gmm9 --actors wrong", ["actor = 'wrong'", "a class derived from"]),
        ("gmm9 --refiners lost", ["refiner = 'lost'", "No module named 'nohunters'"]),
        ("mist", ["target = 'mist'", "an attribute of hunters"]),
        ("gmm9 --objective.name circle", ["objective.name = 'circle'", "an attribute of hunters"]),
        ("gmm9 --objective.name sqare", ["did you mean 'square'?"]),
        ("gmm9 --actors huntr", ["did you mean 'hunter'?"]),
        ("clowd", ["did you mean 'cloud'?"]),
    ],
)
def test_what_is_installed_and_fails_is_one_line(
    arguments: str, words: list[str], hunters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(f"train --dry-run {arguments}", capsys)
    assert all(word in line for word in words), line


def test_lists_show_what_is_there_and_what_does_not_work(hunters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def listed(what: str) -> Callable[[str], str]:
        assert main(["list", what]) == 0
        rows: list[str] = []
        for line in capsys.readouterr().out.splitlines()[1:]:
            if line.startswith(" "):
                rows[-1] += " " + " ".join(line.split())
            else:
                rows.append(" ".join(line.split()))
        return lambda name: next(row for row in rows if row.split()[0] == name)

    actors = listed("actors")
    assert actors("hunter").startswith("hunter Looks [widely]. width 2.0, way up,")
    assert "does not work: actor = 'gone'" in actors("gone")
    assert "hunters" in actors("gone")
    assert "built in" in actors("explore")
    assert all(actors(name) for name in ("teacher", "local_search"))
    refiners = listed("refiners")
    assert "chains 300" in refiners("mala")
    assert refiners("digger") == "digger depth hunters"
    assert "does not work" in refiners("lost")
    objectives = listed("objectives")
    assert "lam, segment_length built in" in objectives("subtrajectory_balance")
    assert objectives("square") == "square Squared residuals. hunters"
    assert "does not work" in objectives("circle")
    targets = listed("targets")
    assert targets("cloud") == "cloud 3 unknown no hunters"
    assert "does not work" in targets("mist")
    assert "built in" in targets("gmm25")


def test_a_distribution_that_pip_installs(tmp_path: Path) -> None:
    (tmp_path / "hunters.py").write_text(PLUGINS)
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "hunters"\nversion = "0.3"\n'
        '[project.entry-points."driftstream.actors"]\nhunter = "hunters:Mine"\n'
        '[tool.setuptools]\npy-modules = ["hunters"]\n'
    )
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps"]
    if not all(map(find_spec, ("pip", "setuptools"))):
        pytest.skip("nothing to install with")
    subprocess.run([*pip, "--target", tmp_path / "site", tmp_path], check=True, timeout=100, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from driftstream.actors.registry import actor_origin, load_actor\n"
        "print(load_actor('hunter').__name__, actor_origin('hunter'))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert output.stdout == "Mine hunters\n"


def draw(rows: int = 6, steps: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_pf, log_pb = (torch.randn(rows, steps, generator=generator) for _ in range(2))
    log_reward = torch.randn(rows, generator=generator)
    return log_pf.requires_grad_(), log_pb, log_reward, torch.tensor(0.5, requires_grad=True)


def test_an_objective_of_ones_own(mine: Path) -> None:
    arguments = draw()
    loss = plugin_loss(f"{mine}:balance", *arguments)
    torch.testing.assert_close(loss, trajectory_balance(*arguments))
    kept = arguments[2].clone()
    plugin_loss(f"{mine}:in_place", *arguments)
    assert torch.equal(arguments[2], kept)
    assert plugin_loss(f"{mine}:undefined", *arguments).isnan()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "raised ZeroDivisionError: division by zero"),
        ("number", "returned float: expected a scalar tensor"),
        ("rows", r"shape \[6\] .*expected a floating-point scalar"),
        ("integer", "int64: expected a floating-point scalar"),
        ("detached", "a loss without gradient"),
    ],
)
def test_an_objective_that_fails_is_named(name: str, words: str, mine: Path) -> None:
    with pytest.raises(PluginError, match=rf"objective .*mine\.py:{name} .*{words}"):
        plugin_loss(f"{mine}:{name}", *draw())


@pytest.mark.parametrize(("name", "learned"), [("balance", True), ("spread", False), ("raises", True)])
def test_an_objective_says_what_it_needs(name: str, learned: bool, mine: Path) -> None:
    config = ObjectiveConfig(f"{mine}:{name}")
    assert config.plugin
    assert not any((config.balances_flows, config.pathwise, config.replay_only))
    assert config.learns_log_z is learned


def small(**changes: object) -> RunConfig:
    config = resolved(
        "gmm9 --sampling-steps 4 --learner.batch-size 32 --policy.hidden 16 --policy.harmonics 4 --refiners 0"
    )
    return resolve(replace(config, **changes))


def test_the_same_loss_built_in_and_plugged_in_trains_the_same(mine: Path) -> None:
    policies = []
    for name in ("trajectory_balance", f"{mine}:balance"):
        config = small(objective=ObjectiveConfig(name))
        learner, actor = build_learner(config, seed=1), build_actor(config, seed=2)
        for _ in range(3):
            learner.learn_fresh(actor.generate(0.0), 0.0)
        policies.append([learner.log_z.detach(), *learner.policy_tensors().values()])
    for one, other in zip(*policies, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_changes_nothing(mine: Path) -> None:
    config = small(objective=ObjectiveConfig(f"{mine}:undefined"))
    learner, actor = build_learner(config, seed=1), build_actor(config, seed=2)
    before = {name: value.clone() for name, value in learner.policy_tensors().items()}
    learner.learn_fresh(actor.generate(0.0), 0.0)
    assert learner.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in learner.policy_tensors().items())


def test_a_run_with_an_objective_and_an_actor_of_ones_own(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = "gmm9 --sync --steps 3 --sampling-steps 4 --wandb disabled --refiners 0 --learner.batch-size 16"
    common += " --eval.samples 200"
    assert main(f"train {common} --out run --actors ./mine.py:Mine --objective.name ./mine.py:spread".split()) == 0
    config = from_toml(Path("run/config.toml"))
    assert config.objective.name == f"{mine}:spread"
    assert describe_objective(config) == "spread"
    capsys.readouterr()
    assert main(f"train {common} --out other --objective.name ./mine.py:raises".split()) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"driftstream: objective {mine}:raises raised ZeroDivisionError: division by zero"
    ]
