"""The speed benchmarks: floors with the operations of the real thing, yardsticks with the same loss, whole reports."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from driftstream.actors.mala import MalaConfig
from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import rollout
from driftstream.envs.processes import BrownianProcess, OrnsteinUhlenbeckProcess
from driftstream.envs.targets import make_target, unwrap
from driftstream.eval.bench_data import SortedArray, bench_decode, bench_replay, bench_weights, make_batch
from driftstream.eval.bench_floors import Chain, RolloutFloor, RolloutNetwork, UpdateFloor, UpdateNetwork
from driftstream.eval.bench_naive import NaiveTrajectoryBalance, diffusion_variance_of
from driftstream.eval.bench_published import PublishedTrajectoryBalance, published_policy
from driftstream.eval.bench_rounds import Comparison, compare, time_rounds
from driftstream.eval.bench_speed import Steps, bench_mala, bench_rollout, bench_update
from driftstream.eval.bench_stream import bench_stream
from driftstream.launch import bench_speed
from driftstream.launch.cli import main
from driftstream.launch.config import RunConfig, resolve
from driftstream.launch.methods import load_method
from driftstream.launch.roles import build_learner
from driftstream.learner.learner import Learner
from driftstream.learner.losses import Paths, path_loss

pytestmark = pytest.mark.timeout(120)


def small(langevin: bool = False, learned_variance: bool = False, target: str = "gmm25") -> RunConfig:
    """Trajectory balance on five steps, with a small network."""
    config = load_method("tb+expl+lp" if langevin else "tb+expl").config
    config = replace(
        config,
        target=target,
        device="cpu",
        grid=replace(config.grid, sampling_steps=5),
        policy=replace(config.policy, hidden=8, harmonics=4, learned_variance=learned_variance),
        learner=replace(config.learner, batch_size=6),
        replay=replace(config.replay, capacity=100, minimum=1),
    )
    return resolve(config)


def small_learner(*arguments: bool, target: str = "gmm25") -> Learner:
    """A learner whose policy is not at its start, where most of the network has no gradient."""
    learner = build_learner(small(*arguments, target=target), 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return learner


def flops_of(action: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of `action`, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@pytest.mark.parametrize("yardstick", [NaiveTrajectoryBalance, PublishedTrajectoryBalance])
@pytest.mark.parametrize("langevin", [False, True])
@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("exploration_std", [0.0, 2.0])
def test_yardsticks_have_our_paths_loss_and_gradient(
    yardstick: type[NaiveTrajectoryBalance], langevin: bool, learned_variance: bool, exploration_std: float
) -> None:
    learner = small_learner(langevin, learned_variance)
    policy, process, target = learner.policy.double(), learner.process, learner.target
    times = torch.tensor([0.0, 0.1, 0.35, 0.5, 0.9, 1.0], dtype=torch.float64)
    log_z = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    ours = rollout(policy, process, target, times, 6, exploration_std, torch.Generator().manual_seed(8))
    paths = Paths(ours["states"], times, ours["log_reward"], ours.get("scores", None))
    loss, _ = path_loss(learner.objective, policy, process, target, paths, log_z)
    parameters = list(policy.parameters())
    gradients = torch.autograd.grad(loss, [*parameters, log_z])
    naive = yardstick(
        policy,
        log_z,
        unwrap(target),
        diffusion_variance_of(process),
        times,
        6,
        exploration_std,
        torch.Generator().manual_seed(8),
    )
    naive_loss, naive_states = naive.loss()
    assert torch.allclose(naive_states, ours["states"], rtol=1e-10, atol=1e-10)
    assert loss.item() == pytest.approx(naive_loss.item(), rel=1e-9)
    for mine, other in zip(gradients, torch.autograd.grad(naive_loss, [*parameters, naive.log_z]), strict=True):
        assert torch.allclose(mine, other, rtol=1e-7, atol=1e-9 * float(loss.detach()))


def test_the_published_network_has_outputs_for_a_fixed_variance_too() -> None:
    learner = small_learner(target="manywell")
    steps = Steps(learner)
    assert steps.published.policy.forward_net.joint_net[-1].out_features == 2 * 32  # type: ignore[union-attr]
    arguments = (learner.log_z, unwrap(learner.target), 1.0, steps.times, 6, 0.0)
    losses = [
        PublishedTrajectoryBalance(policy, *arguments, torch.Generator().manual_seed(1)).loss()[0]
        for policy in (learner.policy, published_policy(learner.policy))
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", ["naive", "published"])
def test_a_yardstick_trains_its_own_policy(name: str) -> None:
    learner = small_learner()
    steps = Steps(learner)
    yardstick: NaiveTrajectoryBalance = getattr(steps, name)
    before = {name: value.clone() for name, value in learner.policy_tensors().items()}
    first = float(yardstick.log_z.detach())
    yardstick()
    assert float(yardstick.log_z.detach()) == pytest.approx(first, abs=0.11)
    assert float(yardstick.log_z.detach()) != first
    assert all(torch.equal(value, before[name]) for name, value in learner.policy_tensors().items())
    moved = yardstick.policy.state_dict()
    assert not torch.equal(moved["forward_net.joint_net.5.weight"], before["forward_net.joint_net.5.weight"])


def test_the_yardstick_knows_what_it_cannot_follow() -> None:
    assert diffusion_variance_of(BrownianProcess(2.5)) == 2.5
    with pytest.raises(ValueError, match="OrnsteinUhlenbeckProcess"):
        diffusion_variance_of(OrnsteinUhlenbeckProcess(1.0))
    with pytest.raises(ValueError, match="Brownian"):
        diffusion_variance_of(BrownianProcess(1.0, "linear"))
    policy = DiffusionPolicy(2, PolicyConfig(precondition=True))
    with pytest.raises(ValueError, match="preconditioned"):
        NaiveTrajectoryBalance(policy, torch.zeros(()), make_target("gmm9"), 1.0, torch.linspace(0.0, 1.0, 4), 5)


@pytest.mark.parametrize("input_gradient", [False, True])
def test_a_chain_has_the_operations_of_a_perceptron(input_gradient: bool) -> None:
    chain = Chain(7, [3, 5, 4, 2], torch.Generator().manual_seed(0), input_gradient)
    forward = 2 * 7 * (3 * 5 + 5 * 4 + 4 * 2)
    by_input = 2 * 7 * (5 * 4 + 4 * 2 + (3 * 5 if input_gradient else 0))
    assert (chain.forward_flops, chain.backward_flops) == (forward, forward + by_input)
    assert flops_of(chain.forward) == forward
    assert flops_of(chain.backward) == forward + by_input


@pytest.mark.parametrize("langevin", [False, True])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_floors_do_the_products_of_ours_and_no_others(langevin: bool, learned_variance: bool) -> None:
    # A target without products of its own.
    steps = Steps(small_learner(langevin, learned_variance, target="manywell"))
    policy, generator = steps.learner.policy, torch.Generator().manual_seed(0)
    floor = RolloutFloor(policy, 6, 5, generator, unwrap(steps.learner.target) if langevin else None)
    alone = RolloutNetwork(policy, 6, steps.times, generator)
    assert flops_of(floor) == floor.flops == flops_of(steps.rollout) == flops_of(alone)
    update = UpdateFloor(policy, 6, 5, generator)
    update_alone = UpdateNetwork(policy, 6, steps.times, generator)
    assert flops_of(update) == update.flops == flops_of(steps.update) == flops_of(update_alone)


def test_the_floor_draws_the_noise_of_a_rollout() -> None:
    learner = small_learner()
    floor = RolloutFloor(learner.policy, 6, 5, learner.generator)
    learner.generator.manual_seed(4)
    floor()
    after = learner.generator.get_state()
    learner.generator.manual_seed(4)
    steps = torch.linspace(0.0, 1.0, 6)
    rollout(learner.policy, learner.process, learner.target, steps, 6, 0.0, learner.generator)
    assert torch.equal(after, learner.generator.get_state())


def test_rounds_run_everything_in_turns() -> None:
    calls: list[str] = []
    seconds = time_rounds({name: lambda name=name: calls.append(name) for name in "abc"}, 2, units=4)
    assert "".join(calls) == "abcbcacab"
    assert {name: values.shape for name, values in seconds.items()} == dict.fromkeys("abc", torch.Size([2]))


def test_ratios_are_taken_round_by_round() -> None:
    # A machine that slows down tenfold leaves the ratios as they are.
    load = torch.tensor([1.0, 10.0, 1.0, 10.0, 3.0], dtype=torch.float64)
    found = compare("x", "call", "floor", {"ours": 3.0 * load, "floor": load}, {"size": 2.0})
    assert found.rows["floor"].seconds.median == 3.0
    ratio = found.rows["ours"].ratio
    assert (ratio.lower, ratio.median, ratio.upper) == pytest.approx((3.0, 3.0, 3.0))
    assert found.figures == {"size": 2.0}


def check(found: Comparison, name: str, rows: list[str], figures: set[str]) -> None:
    """A comparison is complete and its numbers make sense."""
    assert found.name == name
    assert list(found.rows) == rows
    assert set(found.figures) == figures
    assert found.rows[found.floor].ratio.median == 1.0
    for row in found.rows.values():
        for values in (row.seconds, row.ratio):
            assert 0.0 < values.lower <= values.median <= values.upper
    assert all(value > 0.0 for value in found.figures.values())


def test_computing_is_compared() -> None:
    flops = {"floor_flops", "floor_gflops_per_s"}
    rows = ["rollout", "floor", "network alone", "naive rollout"]
    check(bench_rollout(small_learner(True), 2, 1.0), "rollout", rows, flops)
    rows = ["update", "floor", "network alone", "learner step", "rollout + update", "naive step", "published step"]
    check(bench_update(small_learner(), 2), "update", rows, {*flops, "speed_up", "published_speed_up"})
    check(bench_mala(small_learner(), MalaConfig(4, 6, 3), 2), "mala", ["mala", "floor"], set())


def test_moving_data_is_compared() -> None:
    figures = {"entries", "slowest_s", "speed_up"}
    check(bench_replay(3, 10, 1000, 2), "replay", ["replay", "memcpy", "sorted array"], figures)
    rows = ["encode, decode, load", "memcpy", "encode", "decode", "load"]
    check(bench_weights(small_learner().policy, 2, units=2), "weights", rows, {"bytes"})
    rows = ["decode", "memcpy", "checksum", "finiteness", "encode"]
    found = bench_decode(make_batch(4, 5, 2), 2)
    check(found, "decode", rows, {"bytes", "checksum_share"})
    assert found.figures["bytes"] == 4 * (4 * 6 * 2 + 6 + 4)


def test_the_sorted_array_prefers_the_best() -> None:
    array = SortedArray(100, 2, 0.01, torch.Generator().manual_seed(0))
    best = torch.tensor([[7.0, 7.0]])
    array.add(best, torch.tensor([1e3]))
    terminal, log_reward = array.sample(4000)
    expected = 1.0 / sum(1.0 / (1.0 + rank) for rank in range(100))
    share: Tensor = (log_reward == 1e3).double().mean()
    assert share.item() == pytest.approx(expected, abs=0.03)
    assert torch.equal(terminal[log_reward == 1e3][0], best[0])


def test_the_stream_is_compared_between_two_processes() -> None:
    found = bench_stream((4, 5, 2), 2, batches=3)
    check(found, "stream", ["stream", "bare ZeroMQ"], {"bytes", "rate"})


TINY = "--batch-size 4 --sampling-steps 5 --repeats 2"


def test_bench_all_prints_one_object(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_speed, "ENTRIES", 1000)
    assert main(f"bench all {TINY} --json".split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["target"], result["repeats"], result["threads"]) == ("manywell", 2, 1)
    assert list(result["parts"]) == ["rollout", "update", "mala", "replay", "weights", "decode", "stream"]
    assert result["parts"]["update"]["rows"]["update"]["ratio"]["median"] > 0
    assert result["parts"]["replay"]["figures"]["entries"] == 1000


def test_bench_update_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"bench update {TINY} --langevin".split()) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("gmm25", "floor", "learner step", "naive step", "times as fast"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("bench rollout --steps 5", ["--steps", "gradients"]),
        ("bench update --segment-length 5", ["--segment-length", "objectives"]),
        ("bench all --lam 1", ["--lam", "objectives"]),
        ("bench stream --repeats 0", ["--repeats 0", "at least 1"]),
        ("bench rollout --batch-size 1", ["learner.batch_size = 1", "at least 2"]),
        ("bench rollout --sampling-steps 0", ["grid.sampling_steps = 0"]),
        ("bench mala --target gmm7", ["target = 'gmm7'", "gmm9"]),
        ("bench gradients --langevin", ["--langevin", "gradients"]),
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
