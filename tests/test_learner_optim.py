"""The optimiser: clipping, schedule, what is not finite, and the moving average."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.envs.errors import ConfigError
from driftstream.learner.optim import OptimConfig, Optimizer, WeightAverage


def make_parts(**options: Any) -> tuple[DiffusionPolicy, nn.Parameter, Optimizer]:
    torch.manual_seed(0)
    policy = DiffusionPolicy(2, PolicyConfig(hidden=8, harmonics=4, state_flow="plain"))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_()
    log_z = nn.Parameter(torch.tensor(0.5))
    return policy, log_z, Optimizer(policy, log_z, OptimConfig(**options))


def make_loss(policy: DiffusionPolicy, log_z: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (log_z + sum(parameter.square().sum() for parameter in policy.parameters()))


@pytest.mark.parametrize("clip", [0.0, 0.1, 1e6])
def test_a_step_is_torchs_on_clipped_gradients(clip: float) -> None:
    policy, log_z, optimizer = make_parts(clip_grad_norm=clip)
    twin, twin_log_z, _ = make_parts()
    make_loss(twin, twin_log_z).backward()
    rest = [each for name, each in twin.named_parameters() if not name.startswith("flow_net.")]
    groups = [(rest, 1e-3), ([twin_log_z], 1e-1), (list(twin.parameters())[len(rest) :], 1e-2)]
    adam = torch.optim.Adam([{"params": parameters, "lr": rate} for parameters, rate in groups])
    norm = nn.utils.clip_grad_norm_([*twin.parameters(), twin_log_z], clip or math.inf)
    adam.step()
    assert optimizer.step(make_loss(policy, log_z), 0.0) == pytest.approx(float(norm), rel=1e-6)
    for key, value in optimizer.state_dict().items():
        index, name = key.split(".")
        torch.testing.assert_close(value, adam.state_dict()["state"][int(index)][name])
    for one, other in zip([*policy.parameters(), log_z], [*twin.parameters(), twin_log_z], strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_the_step_before_are_gone() -> None:
    policy, log_z, optimizer = make_parts()
    make_loss(policy, log_z, 100.0).backward()
    twin, twin_log_z, other = make_parts()
    assert optimizer.step(make_loss(policy, log_z), 0.0) == other.step(make_loss(twin, twin_log_z), 0.0)
    assert all(map(torch.equal, policy.parameters(), twin.parameters()))


@pytest.mark.parametrize("scale", [math.inf, math.nan, 1e38])
def test_what_is_not_finite_changes_nothing(scale: float) -> None:
    policy, log_z, optimizer = make_parts(clip_grad_norm=1.0)
    before = [parameter.detach().clone() for parameter in (*policy.parameters(), log_z)]
    assert not math.isfinite(optimizer.step(make_loss(policy, log_z, scale), 0.0))
    assert all(map(torch.equal, before, (*policy.parameters(), log_z)))
    assert math.isfinite(optimizer.step(make_loss(policy, log_z), 0.0))


def test_each_group_has_its_rate_and_all_fall_alike() -> None:
    policy, log_z, _ = make_parts()
    assert policy.flow_net is not None
    steps = {"policy": policy.forward_net.state_net.weight, "flow": policy.flow_net.state_net.weight, "log_z": log_z}
    for progress, factor in ((0.0, 1.0), (1.0, 0.1)):
        optimizer = Optimizer(policy, log_z, OptimConfig(schedule="cosine", final_fraction=0.1))
        before = {name: parameter.detach().clone() for name, parameter in steps.items()}
        optimizer.step(make_loss(policy, log_z), progress)
        # Adam's first step is its rate, whatever the gradient.
        for name, rate in (("policy", 1e-3), ("flow", 1e-2), ("log_z", 1e-1)):
            moved = (steps[name].detach() - before[name]).abs()
            torch.testing.assert_close(moved, torch.full_like(moved, rate * factor), rtol=1e-2, atol=1e-6)
        assert optimizer.learning_rate == pytest.approx(1e-3 * factor)


def test_a_state_goes_on_exactly() -> None:
    policy, log_z, optimizer = make_parts()
    optimizer.step(make_loss(policy, log_z), 0.0)
    twin, twin_log_z, other = make_parts()
    twin.load_state_dict(policy.state_dict())
    twin_log_z.data.copy_(log_z.detach())
    other.load_state_dict({name: value.clone() for name, value in optimizer.state_dict().items()})
    optimizer.step(make_loss(policy, log_z), 0.0)
    other.step(make_loss(twin, twin_log_z), 0.0)
    assert all(map(torch.equal, policy.parameters(), twin.parameters()))
    assert torch.equal(log_z, twin_log_z)


def test_the_average_warms_up_and_then_forgets_slowly() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 0.0)
    average = WeightAverage(module, 0.9)
    nn.init.constant_(module.weight, 1.0)
    expected = 0.0
    for update in range(1, 200):
        average.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1.0 - decay)
        assert float(average.tensors["weight"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("field", "value"), [("learning_rate", 0.0), ("clip_grad_norm", -1.0), ("ema_decay", 1.0)])
def test_a_bad_value_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"optim.{field}"):
        OptimConfig(**{field: value})


def test_parameters_that_were_moved_are_noticed() -> None:
    policy, log_z, optimizer = make_parts()
    policy.double().float()
    with pytest.raises(RuntimeError, match="moved or replaced"):
        optimizer.step(make_loss(policy, log_z), 0.0)


def test_a_graph_older_than_its_parameters_is_noticed() -> None:
    policy, log_z, optimizer = make_parts()
    loss = make_loss(policy, log_z)
    optimizer.step(make_loss(policy, log_z), 0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_parameter_has_a_count_of_its_own() -> None:
    policy, log_z, optimizer = make_parts()
    optimizer.step(make_loss(policy, log_z), 0.0)
    state = optimizer.state_dict()
    steps = [value for name, value in state.items() if name.endswith(".step")]
    assert len({value.data_ptr() for value in steps}) == len(steps) > 1
