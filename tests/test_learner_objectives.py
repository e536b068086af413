"""Objectives against golden values and against the equations, transcribed naively in float64."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from driftstream.envs.processes import BrownianProcess
from driftstream.learner.objectives import (
    detailed_balance,
    forward_looking_log_flow,
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
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (2, 3), (4, 10)])
def test_subtb_equals_the_double_loop(batch: int, steps: int, lam: float) -> None:
    generator = torch.Generator().manual_seed(steps)
    pf, pb = (torch.randn(batch, steps, generator=generator, dtype=torch.float64) for _ in range(2))
    flow = torch.randn(batch, steps + 1, generator=generator, dtype=torch.float64) + 160.0
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
