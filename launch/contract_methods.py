"""The contract of objectives and presets, as checks that `driftstream check` and the test-suite run alike."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import rollout, score_trajectories
from driftstream.envs.grids import uniform_grid
from driftstream.envs.processes import BrownianProcess
from driftstream.envs.targets import CountedTarget, make_target
from driftstream.eval.monitor import Monitor
from driftstream.launch.config import RunConfig, as_dict, resolve
from driftstream.launch.contract import ROWS, STEPS, VARIANCE, random_policy, rate
from driftstream.launch.describe import describe_data, describe_objective, describe_policy
from driftstream.launch.findings import Check, ContractError, Finding, run_checks
from driftstream.launch.methods import load_method
from driftstream.launch.sync_run import train_sync
from driftstream.learner.losses import Paths, path_loss
from driftstream.learner.objective_plugins import load_objective, plugin_loss
from driftstream.learner.objectives import (
    ObjectiveConfig,
    detailed_balance,
    maximum_likelihood,
    reverse_kl,
    subtrajectory_balance,
    trajectory_balance,
    vargrad,
)

TRAINED_STEPS = 3


def check_objective(name: str) -> list[Finding]:
    """Whether an objective, by name or place, is a loss that can be descended: scalar, finite, differentiable."""
    trial = _ObjectiveTrial(name)
    return run_checks(
        [
            Check("loads", trial.loads, essential=True),
            Check("scalar", trial.scalar, essential=True),
            Check("finite", trial.finite),
            Check("gradient", trial.gradient),
            Check("determinism", trial.determinism),
            Check("policy gradient", trial.policy_gradient),
            Check("balance", trial.balance, "info"),
            Check("speed", trial.speed, "info"),
        ]
    )


class _ObjectiveTrial:
    """An objective on log densities of made-up trajectories, and on a policy's own."""

    def __init__(self, name: str) -> None:
        self._name = name
        generator = torch.Generator().manual_seed(8)
        self._log_pf, self._log_pb = (torch.randn(ROWS, STEPS, generator=generator) - 1.0 for _ in range(2))
        self._log_reward = 3.0 * torch.randn(ROWS, generator=generator)
        self._log_z = torch.tensor(0.5)
        self._log_flow = torch.randn(ROWS, STEPS - 1, generator=generator)

    def loads(self) -> str:
        self.config = ObjectiveConfig(name=self._name)
        if self.config.plugin:
            load_objective(self._name)
        return "learns log Z" if self.config.learns_log_z else "has no log Z to learn"

    def scalar(self) -> str:
        loss = self._loss(self._log_reward)
        if loss.shape:
            raise ContractError(f"the loss has shape {list(loss.shape)}: expected a scalar")
        return f"{float(loss):.4g} on random log densities"

    def finite(self) -> str:
        for scale in (1.0, 1e4):
            loss, by_policy, _ = self._gradients(scale * self._log_reward)
            if not bool(loss.isfinite()) or not bool(by_policy.isfinite().all()):
                raise ContractError(f"loss {float(loss)} or its gradient, for log rewards of the size {3 * scale:g}")
        return "for log rewards of the sizes 3 and 30000"

    def gradient(self) -> str:
        _, by_policy, by_log_z = self._gradients(self._log_reward)
        if not bool((by_policy != 0).any(1).all()):
            raise ContractError("the gradient by log_pf is 0 for some trajectories: nothing is learned from them")
        if self.config.learns_log_z and not float(by_log_z):
            raise ContractError("the gradient by log_z is 0, although the loss depends on it")
        return f"by log_pf {float(by_policy.norm()):.3g}, by log_z {float(by_log_z):.3g}"

    def determinism(self) -> str:
        if not torch.equal(self._loss(self._log_reward), self._loss(self._log_reward)):
            raise ContractError("a second call gives another loss")
        return "a second call gives the same"

    def policy_gradient(self) -> str:
        target, process, times = CountedTarget(make_target("gmm9")), BrownianProcess(VARIANCE), uniform_grid(STEPS)
        policy, log_z = self._policy(target.dim), torch.zeros((), requires_grad=True)
        paths = rollout(policy, process, target, times, ROWS, generator=torch.Generator().manual_seed(9))
        states, log_reward = paths["states"], paths["log_reward"]
        if self.config.pathwise:
            # Its paths come from the learner's own simulation; any paths show that the gradient arrives.
            loss = reverse_kl(*score_trajectories(policy, process, states, times), log_reward)
        else:
            loss, _ = path_loss(self.config, policy, process, target, Paths(states, times, log_reward), log_z)
        parameters = list(policy.forward_net.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        if not 0 < norm < math.inf:
            raise ContractError(f"the gradient by the policy's parameters has norm {norm}")
        return f"norm {norm:.3g} on trajectories of gmm9"

    def balance(self) -> str:
        """Where P_F, P_B, R and Z agree, a balance condition has no residual."""
        log_flow = self._log_z + (self._log_pf - self._log_pb).cumsum(1)
        loss, gradient, _ = self._gradients(log_flow[:, -1], log_flow[:, :-1])
        return f"loss {float(loss):.2g}, gradient {float(gradient.norm()):.2g} where P_F, P_B, R and Z agree"

    def speed(self) -> str:
        calls = rate(lambda: self._gradients(self._log_reward))
        return f"{calls:,.0f} gradients/s of {ROWS} rows and {STEPS} steps"

    def _gradients(self, log_reward: Tensor, log_flow: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and its gradients by log_pf [B, T] and log_z."""
        log_pf, log_z = self._log_pf.clone().requires_grad_(), self._log_z.clone().requires_grad_()
        loss = self._loss(log_reward, log_flow, log_pf, log_z)
        by_policy, by_log_z = torch.autograd.grad(loss, (log_pf, log_z), allow_unused=True, materialize_grads=True)
        return loss.detach(), by_policy, by_log_z

    def _loss(
        self,
        log_reward: Tensor,
        log_flow: Tensor | None = None,
        log_pf: Tensor | None = None,
        log_z: Tensor | None = None,
    ) -> Tensor:
        """The loss; log_flow [B, T-1] is that of the states between the ends."""
        config, log_pb = self.config, self._log_pb
        log_pf = self._log_pf if log_pf is None else log_pf
        log_z = self._log_z if log_z is None else log_z
        if config.plugin:
            return plugin_loss(config.name, log_pf, log_pb, log_reward, log_z)
        if config.name == "trajectory_balance":
            return trajectory_balance(log_pf, log_pb, log_reward, log_z)
        if config.name == "vargrad":
            return vargrad(log_pf, log_pb, log_reward)
        if config.name == "reverse_kl":
            return reverse_kl(log_pf, log_pb, log_reward)
        if config.name == "maximum_likelihood":
            return maximum_likelihood(log_pf)
        between = self._log_flow if log_flow is None else log_flow
        log_flows = torch.cat([log_z.expand(len(log_pf), 1), between, log_reward.unsqueeze(1)], 1)
        if config.name == "detailed_balance":
            return detailed_balance(log_pf, log_pb, log_flows)
        return subtrajectory_balance(log_pf, log_pb, log_flows, config.lam)

    def _policy(self, dim: int) -> DiffusionPolicy:
        if not self.config.balances_flows:
            return random_policy(dim, 1).requires_grad_(True)
        return DiffusionPolicy(dim, PolicyConfig(learned_variance=True, state_flow="plain"))


def check_preset(name: str) -> list[Finding]:
    """Whether a preset, by name or path, is a method that trains: it loads, fits gmm9, and takes a few steps."""
    trial = _PresetTrial(name)
    return run_checks(
        [
            Check("loads", trial.loads, essential=True),
            Check("resolves", trial.resolves, essential=True),
            Check("trains", trial.trains),
        ]
    )


class _PresetTrial:
    """A preset on gmm9, in a directory that is gone afterwards."""

    def __init__(self, name: str) -> None:
        self._name = name

    def loads(self) -> str:
        method = load_method(self._name)
        self.config = method.config
        return method.summary or "no summary"

    def resolves(self) -> str:
        self.resolved: RunConfig = resolve(replace(self.config, target="gmm9", target_options={}, sync=True))
        words = (describe_objective(self.resolved), describe_data(self.resolved), describe_policy(self.resolved))
        return "; ".join(words)

    def trains(self) -> str:
        config = replace(
            self.resolved,
            device="cpu",
            learner=replace(self.resolved.learner, report_every_s=1e-6, threads=1),
            eval=replace(self.resolved.eval, every_s=1e9),
            monitor=replace(self.resolved.monitor, wandb="disabled"),
        )
        losses: list[float] = []

        def show(metrics: dict[str, float]) -> None:
            losses.extend([metrics["train/loss"]] if "train/loss" in metrics else [])

        with tempfile.TemporaryDirectory(prefix="driftstream-check-") as root:
            monitor = Monitor(Path(root), config.monitor, as_dict(config))
            try:
                train_sync(config, Path(root), monitor, show, lambda text: None, lambda: len(losses) >= TRAINED_STEPS)
            finally:
                monitor.close()
        if not losses or not all(map(math.isfinite, losses)):
            raise ContractError(f"losses {losses}: expected {TRAINED_STEPS} finite ones")
        return f"losses of {len(losses)} steps: {', '.join(f'{loss:.4g}' for loss in losses)}"
