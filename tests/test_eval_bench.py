"""The benchmarks: estimates against naive formulas, equal costs, sane figures, one command each."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from driftstream.envs.errors import ConfigError
from driftstream.eval.bench_gradients import (
    bench_gradients,
    draw_gradient,
    draw_paths,
    gradient_statistics,
    measure_gradients,
)
from driftstream.eval.bench_objectives import Update, peak_growth, time_updates
from driftstream.launch.cli import main
from driftstream.launch.config import RunConfig, resolve
from driftstream.launch.methods import load_method
from driftstream.launch.roles import build_learner, build_on_policy_actors
from driftstream.learner.learner import Learner
from driftstream.learner.objectives import ObjectiveConfig

pytestmark = pytest.mark.timeout(120)

SUBTB = ObjectiveConfig("subtrajectory_balance", lam=1.0)
OBJECTIVES = {
    "TB": ObjectiveConfig(),
    "SubTB": SUBTB,
    "segments": replace(SUBTB, segment_length=2),
    "PIS": ObjectiveConfig("reverse_kl"),
}


def small(**changes: object) -> RunConfig:
    """Forward-looking SubTB on four steps of gmm9, with a small network."""
    config = load_method("fl-subtb").config
    config = replace(
        config,
        target="gmm9",
        device="cpu",
        grid=replace(config.grid, sampling_steps=4),
        policy=replace(config.policy, hidden=8, harmonics=4),
        learner=replace(config.learner, batch_size=6),
    )
    return resolve(replace(config, **changes))  # type: ignore[arg-type]


def small_learner(target: str = "gmm9") -> Learner:
    """A learner whose policy is not at its start, where most of the network has no gradient."""
    learner = build_learner(small(target=target), 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in learner.policy.forward_net.joint_net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return learner


def naive_statistics(gradients: Tensor) -> tuple[float, float, float]:
    """Trace, corrected |mean|² and their ratio, from the definitions."""
    count, size = gradients.shape
    trace = square = 0.0
    for j in range(size):
        column = [float(value) for value in gradients[:, j]]
        mean = sum(column) / count
        trace += sum((value - mean) ** 2 for value in column) / (count - 1)
        square += mean**2
    signal = square - trace / count
    return trace, signal, trace / signal


@pytest.mark.parametrize(("count", "size"), [(3, 2), (8, 1), (12, 5)])
def test_gradient_statistics_equal_the_naive_jackknife(count: int, size: int) -> None:
    generator = torch.Generator().manual_seed(count)
    gradients = 3.0 + torch.randn(count, size, generator=generator, dtype=torch.float64)
    statistics = gradient_statistics(gradients)
    left_out = [naive_statistics(gradients[torch.arange(count) != k])[2] for k in range(count)]
    mean = sum(left_out) / count
    error = math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in left_out))
    expected = (*naive_statistics(gradients), error)
    found = (statistics.trace, statistics.signal, statistics.noise_to_signal, statistics.standard_error)
    assert found == pytest.approx(expected, rel=1e-9)


def test_trace_and_signal_are_unbiased_and_the_error_is_that_of_the_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 1.5])
    draws = mean + std * torch.randn(1000, 64, 4, generator=generator)
    found = [gradient_statistics(gradients) for gradients in draws]
    trace, signal = float(std.square().sum()), float(mean.square().sum())
    assert sum(one.trace for one in found) / 1000 == pytest.approx(trace, rel=0.02)
    assert sum(one.signal for one in found) / 1000 == pytest.approx(signal, rel=0.02)
    ratios = torch.tensor([one.noise_to_signal for one in found])
    errors = torch.tensor([one.standard_error for one in found])
    assert float(errors.median()) == pytest.approx(float(ratios.std()), rel=0.2)


def test_a_signal_lost_in_the_noise_has_no_ratio() -> None:
    statistics = gradient_statistics(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
    assert statistics.trace == pytest.approx(4 / 3)
    assert statistics.signal == pytest.approx(-1 / 3)
    assert math.isnan(statistics.noise_to_signal)
    assert math.isnan(statistics.standard_error)
    with pytest.raises(ValueError, match="at least 3"):
        gradient_statistics(torch.zeros(2, 4))


def test_segments_have_the_transitions_of_whole_trajectories() -> None:
    learner = small_learner()
    whole, parts = draw_paths(learner, SUBTB, 6), draw_paths(learner, OBJECTIVES["segments"], 12)
    assert whole.states.shape == (6, 5, 2)
    assert parts.states.shape == (12, 3, 2)
    seen: dict[str, int] = {}
    forward = learner.policy.forward_net
    for name, objective in OBJECTIVES.items():
        points: list[int] = []
        handle = forward.register_forward_hook(lambda _, __, out, points=points: points.append(out.numel() // 2))
        learner.target.energy_evaluations = 0
        gradient, rollout_s, gradient_s = draw_gradient(learner, objective, 24)
        handle.remove()
        assert gradient.shape == (sum(parameter.numel() for parameter in forward.parameters()),)
        assert gradient.isfinite().all()
        assert gradient_s > 0
        # The last call scores the drawn paths; the simulation of a pathwise loss is all of its calls.
        seen[name] = sum(points) if objective.pathwise else points[-1]
        assert (rollout_s == 0) == objective.pathwise
    assert seen == dict.fromkeys(OBJECTIVES, 24)
    with pytest.raises(ConfigError, match=r"segment_length = 3.*divisor of the batch's 20"):
        measure_gradients(
            build_learner(small(grid=replace(small().grid, sampling_steps=5)), 0),
            {"x": replace(SUBTB, segment_length=3)},
            4,
            3,
        )


@pytest.mark.parametrize("name", ["TB", "segments", "PIS"])
def test_variance_is_halved_by_twice_the_batch(name: str) -> None:
    learner = small_learner()
    learner.log_z.data.fill_(-3.0)
    one, two = (measure_gradients(learner, {name: OBJECTIVES[name]}, batch, 120)[name] for batch in (16, 32))
    assert two.transitions == 2 * one.transitions
    assert one.statistics.trace / two.statistics.trace == pytest.approx(2.0, rel=0.35)


def test_on_policy_trajectory_balance_points_where_reverse_kl_does() -> None:
    # Their expected gradients differ by a factor of 2 and nothing else, whatever log Z is.
    learner = small_learner("manywell")
    learner.log_z.data.fill_(84.0)
    draws = {
        name: torch.stack([draw_gradient(learner, OBJECTIVES[name], 4 * 5000)[0] for _ in range(20)])
        for name in ("TB", "PIS")
    }
    tb, pis = (gradient_statistics(gradients).signal for gradients in draws.values())
    product = float(draws["TB"].mean(0) @ draws["PIS"].mean(0))
    assert product / pis == pytest.approx(2.0, rel=0.1)
    assert tb / pis == pytest.approx(4.0, rel=0.2)


def test_all_objectives_are_measured_before_and_after_training() -> None:
    config = small()
    learner = build_learner(config, 0)
    (actor,) = build_on_policy_actors(config, learner, 1)
    before, after = bench_gradients(learner, actor, OBJECTIVES, steps=5, repeats=4)
    assert (before.step, after.step) == (0, 5)
    assert before.log_z == pytest.approx(before.log_z_lower_bound)
    for moment in (before, after):
        assert list(moment.rows) == list(OBJECTIVES)
        assert {row.transitions for row in moment.rows.values()} == {24}
        assert all(row.statistics.trace > 0 for row in moment.rows.values())
    assert before.rows["TB"].statistics.trace != after.rows["TB"].statistics.trace


def test_updates_are_timed_and_change_the_policy() -> None:
    configs = {
        name: small(
            objective=objective,
            policy=replace(small().policy, state_flow="forward_looking" if objective.balances_flows else "none"),
        )
        for name, objective in OBJECTIVES.items()
    }
    updates = {name: Update(build_learner(config, 0)) for name, config in configs.items()}
    before = {
        name: update.learner.policy_tensors()["forward_net.joint_net.5.weight"].clone()
        for name, update in updates.items()
    }
    times = time_updates(updates, 3)
    assert {name: row.transitions for name, row in times.items()} == {"TB": 24, "SubTB": 24, "segments": 12, "PIS": 24}
    for name, row in times.items():
        assert 0 < row.lower_quartile_s <= row.median_s <= row.upper_quartile_s
        after = updates[name].learner.policy_tensors()["forward_net.joint_net.5.weight"]
        assert not torch.equal(before[name], after)


def test_peak_growth_sees_what_is_freed_again() -> None:
    size = 64 * 2**20

    def allocate() -> None:
        torch.ones(size, dtype=torch.uint8)

    grown = peak_growth(allocate)
    if grown is None:
        pytest.skip("this system does not tell the peak of the resident memory")
    assert 0.95 * size <= grown < 1.5 * size


TINY = "--batch-size 4 --sampling-steps 5 --json"


def test_bench_gradients_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"bench gradients --target gmm25 --steps 2 --repeats 3 --lam 1 {TINY}".split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["target"], result["segment_length"], result["repeats"], result["lam"]) == ("gmm25", 1, 3, 1.0)
    assert [moment["step"] for moment in result["moments"]] == [0, 2]
    rows = result["moments"][1]["rows"]
    assert list(rows) == ["TB", "SubTB", "SubTB, L = 1", "PIS"]
    assert {row["transitions"] for row in rows.values()} == {20}
    assert set(rows["PIS"]["statistics"]) == {"trace", "signal", "noise_to_signal", "standard_error"}


def test_bench_objectives_prints_a_table_or_one_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter(range(2**20, 2**25, 2**20))
    monkeypatch.setattr("driftstream.launch.bench._peak_in_new_process", lambda *_: next(peaks))
    assert main(f"bench objectives --repeats 2 {TINY}".split()) == 0
    result = json.loads(capsys.readouterr().out)
    names = ["TB", "VarGrad", "DB", "SubTB", "SubTB FL", "SubTB FL, L = 1", "PIS", "PIS, 4 parts"]
    assert list(result["rows"]) == names
    assert result["rows"]["SubTB FL, L = 1"]["transitions"] == 4
    assert main(f"bench objectives --repeats 2 {TINY.removesuffix(' --json')}".split()) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in names)


def test_peak_memory_is_measured_in_a_process_of_its_own() -> None:
    from driftstream.launch import bench

    peak = bench._peak_in_new_process(small(learner=replace(small().learner, batch_size=20_000)), 0)
    if peak is None:
        pytest.skip("this system does not tell the peak of the resident memory")
    # The states' activations alone: 20,000 rows x 4 steps x 8 numbers of 4 bytes.
    assert peak > 20_000 * 4 * 8 * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("bench", ["missing", "gradients", "objectives"]),
        ("bench speed", ["speed", "gradients", "objectives"]),
        ("bench gradients --repeats 2", ["--repeats 2", "at least 3"]),
        ("bench gradients --steps 0", ["--steps 0", "at least 1"]),
        ("bench gradients --target gmm7", ["target = 'gmm7'", "gmm9"]),
        ("bench gradients --segment-length 3", ["objective.segment_length = 3", "divisor"]),
        ("bench gradients --segment-length 101", ["objective.segment_length = 101", "at most the 100 steps"]),
        ("bench gradients --lam -1", ["objective.lam = -1.0"]),
        ("bench objectives --batch-size 1", ["learner.batch_size = 1", "at least 2"]),
        ("bench objectives --sampling-steps 0", ["grid.sampling_steps = 0"]),
        ("bench objectives --steps 5", ["--steps", "gradients"]),
        ("bench objectives --repeat 5", ["--repeat"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("driftstream bench: ")
    assert all(word in line for word in words), line
