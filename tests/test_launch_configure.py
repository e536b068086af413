"""From flags to a configuration: what contradicts itself, and what a resumed run must keep."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from driftstream.actors.actor import ActorConfig
from driftstream.actors.refiner import RefinerConfig
from driftstream.buffers.control import ControlClient, Endpoints, RoleContext
from driftstream.buffers.replay import ReplayConfig
from driftstream.envs.errors import ConfigError
from driftstream.envs.processes import ProcessConfig
from driftstream.envs.targets import make_target
from driftstream.envs.targets_funnel import Funnel
from driftstream.launch.cli import main
from driftstream.launch.config import RunConfig, resolve, to_toml
from driftstream.launch.configure import configure
from driftstream.launch.roles import run_role
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.train import read_flags

pytestmark = pytest.mark.timeout(60)


def resumed(run: RunDirectory, *arguments: str) -> RunConfig:
    flags, config_flags = read_flags(["--resume", str(run.root), *arguments], "driftstream train")
    return configure(flags, config_flags, "driftstream train")


def make_run(root: Path, **changes: object) -> RunDirectory:
    run = RunDirectory.create(root / "run")
    run.write_config(to_toml(resolve(replace(RunConfig(target="manywell", target_options={"dim": 4}), **changes))))
    return run


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ("--target-options dim 6", "target_options"),
        ("--sync", "sync"),
        ("--policy.hidden 32", "policy.hidden"),
        ("--policy.langevin", "policy.langevin"),
        ("--process.diffusion-variance 7", "process.diffusion_variance"),
        ("--replay.capacity 1000", "replay.capacity"),
        ("--replay.source terminals", "replay.source"),
        ("--replay.prioritization uniform", "replay.prioritization"),
        ("--device nonsense", "device"),
    ],
)
def test_a_resumed_run_keeps_what_its_saved_state_depends_on(
    flags: str, field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    before = run.config.read_text()
    with pytest.raises(ConfigError) as refusal:
        resumed(run, *flags.split())
    assert refusal.value.field == field
    assert main(["train", "--resume", str(run.root), "--dry-run", *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{field} = " in line
    assert run.config.read_text() == before
    assert not list(run.logs.iterdir())


def test_only_a_sync_run_keeps_its_roles(tmp_path: Path) -> None:
    assert resumed(make_run(tmp_path / "stream"), "--actors", "3", "--refiners", "2").actor.count == 3
    run = make_run(tmp_path / "sync", sync=True)
    for flag, field in (("--actors", "actor.count"), ("--refiners", "refiner.count")):
        with pytest.raises(ConfigError, match=f"{field} = 2: expected 1, as in the run to be resumed"):
            resumed(run, flag, "2")


def test_a_resumed_run_may_change_the_rest(tmp_path: Path) -> None:
    flags = ["--grid.kind", "random", "--sampling-steps", "9", "--replay.ratio", "2", "--optim.learning-rate", "0.1"]
    config = resumed(make_run(tmp_path), *flags)
    assert (config.grid.kind, config.grid.sampling_steps, config.replay.ratio) == ("random", 9, 2.0)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "gmm25", "--sync", "--device", device]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"device = '{device}'" in line
    assert not list(tmp_path.iterdir())


def test_on_policy_runs_have_no_refined_states() -> None:
    config = RunConfig(data="on_policy")
    assert resolve(config).replay.source == "terminals"
    with pytest.raises(ConfigError, match=r"replay\.source = 'refined'"):
        resolve(replace(config, replay=ReplayConfig(source="refined")))


@pytest.mark.parametrize(("role", "threads"), [("actor", 2), ("refiner", 3)])
def test_roles_have_the_threads_that_are_configured(role: str, threads: int, tmp_path: Path) -> None:
    config = resolve(RunConfig(target="gmm25", actor=ActorConfig(threads=2), refiner=RefinerConfig(threads=3)))
    endpoints = Endpoints(
        **{name: f"ipc://{tmp_path}/{name}" for name in ("stream", "weights", "ema_weights", "control")}
    )
    before = torch.get_num_threads()
    with ControlClient(endpoints.control, f"{role}-0") as control:
        control.stop.set()
        try:
            run_role(role, config, RoleContext(role, 0, 1, 0, tmp_path, endpoints, control))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ("--method pis --data stream", "data"),
        ("--method pis --replay.ratio 1", "replay.ratio"),
        ("--method tb --policy.state-flow plain", "policy.state_flow"),
        ("--method subtb --policy.state-flow none", "policy.state_flow"),
        ("--method subtb --objective.segment-length 101", "objective.segment_length"),
        ("--method tb --rollout.checkpoint-segments 4", "rollout.checkpoint_segments"),
        ("--method pis --rollout.detach-score", "rollout.detach_score"),
        ("--method tb --exploration.std 2", "exploration.std"),
        ("--method mle --data on_policy", "data"),
        ("--method mle --replay.ratio 0", "replay.ratio"),
        ("--method mle --replay.source terminals", "replay.source"),
        ("--method mle --refiners 0", "refiner.count"),
    ],
)
def test_what_a_method_cannot_use_is_refused(flags: str, field: str) -> None:
    own, config_flags = read_flags(["gmm25", *flags.split()], "driftstream train")
    with pytest.raises(ConfigError) as refusal:
        configure(own, config_flags, "driftstream train")
    assert refusal.value.field == field


def test_given_times_replace_the_methods_number_of_steps() -> None:
    own, config_flags = read_flags(
        ["gmm25", "--method", "pis", "--grid.kind", "given", "--grid.times", "0", "0.25", "1"], "driftstream train"
    )
    config = configure(own, config_flags, "driftstream train")
    assert (config.grid.sampling_steps, config.grid.times) == (2, (0.0, 0.25, 1.0))


def test_a_contradiction_within_a_component_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "gmm25", "--dry-run", "--method", "tb", "--objective.segment-length", "5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    start = "driftstream train: objective.segment_length = 5: expected nothing"
    assert line == f"{start}, as objective.name = 'trajectory_balance' balances no flow"


def configured(arguments: str) -> RunConfig:
    flags, config_flags = read_flags(arguments.split(), "driftstream train")
    return configure(flags, config_flags, "driftstream train")


@pytest.mark.parametrize(
    ("target", "process", "expected"),
    [
        ("funnel", ProcessConfig(schedule="geometric"), (9.0, 9.0 * math.exp(4.5), 40)),
        ("funnel", ProcessConfig(schedule="geometric", diffusion_variance=2.0), (2.0, 9.0 * math.exp(4.5), 40)),
        ("funnel", ProcessConfig(schedule="geometric", schedule_ratio=7.0), (9.0, 7.0, 40)),
        ("funnel", ProcessConfig(), (1.0, 10.0, 20)),
        ("funnel", ProcessConfig(kind="dis", schedule="geometric"), (1.0, 10.0, 20)),
        ("gmm25", ProcessConfig(schedule="geometric"), (25.3, 25.3 / 0.3, 20)),
        ("manywell", ProcessConfig(schedule="geometric"), (1.0, 10.0, 40)),
    ],
)
def test_a_falling_noise_follows_the_targets_range(
    target: str, process: ProcessConfig, expected: tuple[float, float, int]
) -> None:
    config = resolve(RunConfig(target=target, process=process))
    found = (config.process.diffusion_variance, config.process.schedule_ratio, config.grid.sampling_steps)
    assert found == pytest.approx(expected)
    given = process.diffusion_variance or make_target(target).diffusion_variance
    assert config.exploration.std == pytest.approx(given**0.5)
    assert resolve(config) == config


@pytest.mark.parametrize("noise", [(0.01, 9.0), (9.0, 0.0), (9.0,), [9.0, 1.0], (math.inf, 1.0), (math.nan, 1.0), 3])
def test_a_range_of_noise_that_is_none_is_refused(noise: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Funnel, "noise_range", property(lambda self: noise, lambda self, value: None), raising=False)
    with pytest.raises(ConfigError, match=r"funnel\.noise_range = .*: expected \(wide, narrow\)"):
        make_target("funnel")


@pytest.mark.parametrize("variance", [0.25, 1e6])
def test_a_funnel_whose_neck_is_not_narrow_has_no_range(variance: float) -> None:
    assert make_target("funnel", variance=variance).noise_range is None


@pytest.mark.parametrize(
    ("flags", "grid", "evaluated_on"),
    [
        ("gmm25", ("uniform", 20), None),
        ("manywell", ("random", 10), 40),
        ("manywell --sampling-steps 100", ("random", 100), 100),
        ("manywell --policy.learned-variance True", ("uniform", 40), None),
        ("manywell --grid.kind uniform", ("uniform", 40), None),
        ("manywell --eval.sampling-steps 16", ("random", 10), 16),
    ],
)
def test_the_default_grid_follows_from_the_variance(
    flags: str, grid: tuple[str, int], evaluated_on: int | None, tmp_path: Path
) -> None:
    config = configured(flags)
    assert (config.grid.kind, config.grid.sampling_steps) == grid
    assert config.eval.sampling_steps == evaluated_on
    run = RunDirectory.create(tmp_path / "run")
    run.write_config(to_toml(config))
    assert resumed(run) == config


@pytest.mark.parametrize("refiners", ["", " --refiners 0"])
def test_the_default_method_may_do_without_its_actors_and_refiners(refiners: str) -> None:
    assert configured(f"manywell --data on_policy{refiners}").replay.source == "terminals"
    with pytest.raises(ConfigError, match=r"refiner\.kinds = .*: expected none"):
        configured("manywell --data on_policy --refiners hmc:1")
