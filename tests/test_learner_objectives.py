"""Objectives against golden values and against the equations, transcribed naively in float64."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from driftstream.envs.errors import ConfigError
from driftstream.envs.processes import BrownianProcess
from driftstream.learner.objectives import (
    OBJECTIVES,
    ObjectiveConfig,
    ObjectiveName,
    detailed_balance,
    forward_looking_log_flow,
    log_weights,
    maximum_likelihood,
    reverse_kl,
    subtrajectory_balance,
    trajectory_balance,
    vargrad,
)

Golden = Callable[[str], Mapping[str, np.ndarray]]


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_golden_values(golden: Golden, dtype: torch.dtype, rel: float) -> None:
    values = golden("objectives")
    pf, pb, reward, flow = (
        torch.as_tensor(values[key], dtype=dtype) for key in ("log_pf", "log_pb", "log_reward", "log_flow")
    )
    flow = torch.cat([flow[:, :-1], reward[:, None]], dim=1)
    log_z = torch.as_tensor(values["log_z"], dtype=dtype)
    groups = torch.as_tensor(values["groups"])
    results = {
        "trajectory_balance": trajectory_balance(pf, pb, reward, log_z),
        "vargrad": vargrad(pf, pb, reward),
        "vargrad_grouped": vargrad(pf, pb, reward, groups=groups),
        "reverse_kl": reverse_kl(pf, pb, reward),
        "detailed_balance": detailed_balance(pf, pb, flow),
        "subtrajectory_balance_lambda_0.9": subtrajectory_balance(pf, pb, flow, lam=0.9),
        "subtrajectory_balance_lambda_2.0": subtrajectory_balance(pf, pb, flow, lam=2.0),
    }
    for name, result in results.items():
        assert result.item() == pytest.approx(float(values[name]), rel=rel), name


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_golden_forward_looking_flow(golden: Golden, dtype: torch.dtype, rel: float) -> None:
    values, process = golden("objectives"), golden("process")
    states = torch.as_tensor(process["uniform_states"], dtype=dtype)[:, 1:-1]
    times = torch.as_tensor(process["uniform_times"], dtype=dtype)[1:-1]
    nn, log_reward = (
        torch.as_tensor(values[f"forward_looking_{key}"], dtype=dtype)[:, 1:-1] for key in ("nn", "log_reward")
    )
    reference = BrownianProcess(float(process["sigma_squared"])).log_reference(states, times)
    flow = forward_looking_log_flow(reference, times, log_reward, nn)
    np.testing.assert_allclose(flow, values["forward_looking_log_flow_interior"], rtol=rel)


SHAPES = [(1, 1), (2, 3), (4, 10), (7, 2)]


def draw(batch: int, steps: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_pf, log_pb [B, T], log_reward [B] and log_flow [B, T+1] that ends in it, at the level of Manywell."""
    generator = torch.Generator().manual_seed(batch + 10 * steps)
    pf, pb = (torch.randn(batch, steps, generator=generator, dtype=torch.float64) for _ in range(2))
    flow = torch.randn(batch, steps + 1, generator=generator, dtype=torch.float64) + 160.0
    return pf.to(dtype), pb.to(dtype), flow[:, -1].to(dtype), flow.to(dtype)


@pytest.mark.parametrize(("batch", "steps"), SHAPES)
def test_objectives_equal_their_loops(batch: int, steps: int) -> None:
    pf, pb, reward, flow = draw(batch, steps)
    log_z = torch.tensor(159.0, dtype=torch.float64)
    rows = range(batch)
    weights = [float(reward[b]) + sum(float(pb[b, n]) - float(pf[b, n]) for n in range(steps)) for b in rows]
    mean = sum(weights) / batch
    transitions = [
        float(flow[b, n] + pf[b, n] - flow[b, n + 1] - pb[b, n]) ** 2 / batch for b in rows for n in range(steps)
    ]
    expected = {
        "trajectory_balance": sum((159.0 - weight) ** 2 for weight in weights) / batch,
        "vargrad": sum((weight - mean) ** 2 for weight in weights) / batch,
        "detailed_balance": sum(transitions),
        "reverse_kl": -mean,
        "maximum_likelihood": -sum(float(pf[b, n]) for b in rows for n in range(steps)) / batch,
    }
    results = {
        "trajectory_balance": trajectory_balance(pf, pb, reward, log_z),
        "vargrad": vargrad(pf, pb, reward),
        "detailed_balance": detailed_balance(pf, pb, flow),
        "reverse_kl": reverse_kl(pf, pb, reward),
        "maximum_likelihood": maximum_likelihood(pf),
    }
    assert set(results) | {"subtrajectory_balance"} == set(OBJECTIVES)
    for name, result in results.items():
        assert result.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    np.testing.assert_allclose(log_weights(pf, pb, reward), weights, rtol=1e-12)


@pytest.mark.parametrize("groups", [[0, 0, 0, 0], [3, 3, -1, -1], [0, 1, 2, 3], [7, 0, 7, 7]])
def test_vargrad_of_groups_is_the_mean_of_theirs(groups: list[int]) -> None:
    pf, pb, reward, _ = draw(4, 5)
    index = torch.tensor(groups)
    alone = [vargrad(pf[index == group], pb[index == group], reward[index == group]) for group in set(groups)]
    torch.testing.assert_close(vargrad(pf, pb, reward, groups=index), torch.stack(alone).mean())


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0, 2.0])
def test_subtb_keeps_its_digits_in_single_precision(steps: int, lam: float) -> None:
    pf, pb, _, flow = draw(3, steps)
    expected = subtrajectory_balance(pf, pb, flow, lam).item()
    pf, pb, _, flow = draw(3, steps, torch.float32)
    assert subtrajectory_balance(pf, pb, flow, lam).item() == pytest.approx(expected, rel=1e-3)


def test_subtb_of_lambda_0_is_the_mean_over_transitions() -> None:
    pf, pb, _, flow = draw(4, 10)
    torch.testing.assert_close(subtrajectory_balance(pf, pb, flow, 0.0), detailed_balance(pf, pb, flow) / 10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ObjectiveConfig("elbo"), "objective.name = 'elbo': expected one of trajectory_balance, vargrad"),
        (lambda: ObjectiveConfig(lam=-0.5), "objective.lam = -0.5: expected a number >= 0"),
        (lambda: ObjectiveConfig("detailed_balance", segment_length=0), "objective.segment_length = 0: expected at"),
        (lambda: ObjectiveConfig("vargrad", segment_length=5), "objective.segment_length = 5: expected nothing"),
    ],
)
def test_bad_configuration_is_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_say_what_they_need(name: ObjectiveName) -> None:
    config = ObjectiveConfig(name)
    assert config.balances_flows == (name in ("detailed_balance", "subtrajectory_balance"))
    assert config.pathwise == (name == "reverse_kl")


def naive_subtb(pf: Tensor, pb: Tensor, flow: Tensor, lam: float) -> float:
    batch, steps = pf.shape
    total, norm = 0.0, 0.0
    for i in range(steps):
        for j in range(i + 1, steps + 1):
            # The common factor lam cancels; without it lam = 0 is the limit of single transitions.
            weight = lam ** (j - i - 1)
            norm += weight
            for b in range(batch):
                residual = flow[b, i] + pf[b, i:j].sum() - flow[b, j] - pb[b, i:j].sum()
                total += weight * float(residual) ** 2 / batch
    return total / norm


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0, 2.0])
@pytest.mark.parametrize(("batch", "steps"), SHAPES)
def test_subtb_equals_the_double_loop(batch: int, steps: int, lam: float) -> None:
    pf, pb, _, flow = draw(batch, steps)
    expected = naive_subtb(pf, pb, flow, lam)
    assert subtrajectory_balance(pf, pb, flow, lam).item() == pytest.approx(expected, rel=1e-9)


def test_subtb_stays_finite_in_single_precision_on_long_grids() -> None:
    pf, pb = torch.randn(3, 200), torch.randn(3, 200)
    flow = torch.randn(3, 201)
    assert math.isfinite(subtrajectory_balance(pf, pb, flow, lam=2.0).item())
    with pytest.raises(ValueError, match="lam"):
        subtrajectory_balance(pf, pb, flow, lam=-1.0)


def test_vargrad_gradient_equals_that_of_tb_at_the_batch_mean() -> None:
    pf = torch.randn(16, 5, dtype=torch.float64, requires_grad=True)
    pb, reward = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    (grad_vargrad,) = torch.autograd.grad(vargrad(pf, pb, reward), pf)
    log_z = (reward + (pb - pf).sum(-1)).mean().detach()
    (grad_tb,) = torch.autograd.grad(trajectory_balance(pf, pb, reward, log_z), pf)
    torch.testing.assert_close(grad_vargrad, grad_tb)
