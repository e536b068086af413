"""MALA: golden values, invariance, adaptation, and what it does with points that are not finite."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from driftstream.actors.mala import MalaConfig, mala_init, mala_log_accept, mala_proposal, mala_step, run_mala
from driftstream.envs.errors import ConfigError
from driftstream.envs.targets import CountedTarget, Target, make_target

Golden = Callable[[str], Mapping[str, np.ndarray]]


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["gmm25", "manywell"])
def test_golden_values(golden: Golden, name: str, dtype: torch.dtype, rel: float) -> None:
    values = golden("mala")
    x, noise = (torch.as_tensor(values[f"{name}_{key}"], dtype=dtype) for key in ("x", "noise"))
    step_size = float(values["step_size"])
    target = make_target(name)
    log_reward, score = target.log_reward_and_score(x)
    proposal = mala_proposal(x, score, step_size, noise)
    np.testing.assert_allclose(proposal, values[f"{name}_proposal"], rtol=rel, atol=rel)
    log_accept = mala_log_accept(x, log_reward, score, proposal, *target.log_reward_and_score(proposal), step_size)
    np.testing.assert_allclose(log_accept, values[f"{name}_log_accept"], rtol=rel, atol=10 * rel)


class Normal(Target):
    name = "normal"
    dim = 2

    def log_reward(self, x: Tensor) -> Tensor:
        return -0.5 * (x / torch.tensor([1.0, 2.0], dtype=x.dtype)).square().sum(-1)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_chains_leave_the_tempered_target_invariant(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    target, stds = Normal(), torch.tensor([1.0, 2.0]) / beta**0.5
    state = mala_init(stds * torch.randn(20_000, 2, generator=generator), target)
    for _ in range(20):
        state, info = mala_step(state, target, 0.4, beta, generator)
    assert 0.3 < info.acceptance_rate < 0.99
    torch.testing.assert_close(state.x.std(0), stds, rtol=0.03, atol=0)
    torch.testing.assert_close(state.log_reward, target.log_reward(state.x))


def test_cycle_keeps_accepted_states_after_burn_in_and_adapts_towards_the_target_rate() -> None:
    target = CountedTarget(make_target("gmm25"))
    config = MalaConfig(chains=200, mcmc_steps=120, burn_in=60)
    seeds = 4.0 * torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    refinement = run_mala(seeds, target, config, generator=torch.Generator().manual_seed(2))
    assert refinement.acceptance_rate == pytest.approx(0.574, abs=0.12)
    assert len(refinement.terminal) == pytest.approx(200 * 60 * refinement.acceptance_rate, rel=1e-6)
    torch.testing.assert_close(refinement.log_reward, target.target.log_reward(refinement.terminal))
    assert target.energy_evaluations == target.gradient_evaluations == 200 * 121
    again = run_mala(seeds, target, config, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.terminal, refinement.terminal)


class Cliff(Target):
    """A Gaussian between a region where it is undefined and one where it is infinite."""

    name = "cliff"
    dim = 1

    def log_reward(self, x: Tensor) -> Tensor:
        log_reward = torch.where(x[..., 0] > 0.5, torch.nan, -0.5 * x[..., 0].square())
        return torch.where(x[..., 0] < -1.5, torch.inf, log_reward)


def test_points_that_are_not_finite_are_never_kept() -> None:
    target = CountedTarget(Cliff())
    seeds = torch.linspace(-2, 2, 50).unsqueeze(-1)
    refinement = run_mala(seeds, target, MalaConfig(chains=50), generator=torch.Generator().manual_seed(0))
    assert len(refinement.terminal) > 0
    assert refinement.log_reward.isfinite().all()
    assert (refinement.terminal.abs() <= 1.5).all()
    assert target.nonfinite > 0
    nothing = run_mala(torch.full((3, 1), 1.0), target, MalaConfig(chains=3))
    assert nothing.terminal.shape == (0, 1)


def test_configuration_errors_name_field_value_and_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"burn_in = 200: expected between 0 and mcmc_steps - 1 = 199"):
        MalaConfig(burn_in=200)
