"""The examples run, and do what they say."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torchrl.envs import TransformedEnv

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import score_trajectories
from driftstream.actors.torchrl_policy import make_torchrl_policy
from driftstream.envs.grids import random_grid
from driftstream.envs.processes import BrownianProcess, DiffusionProcess, OrnsteinUhlenbeckProcess
from driftstream.envs.sampling_env import DiffusionSamplingEnv
from driftstream.envs.targets import make_target
from driftstream.envs.trajectory import from_transitions

TORCHRL_PPO = Path(__file__).parent / "examples" / "torchrl_ppo.py"
PROCESSES: dict[str, DiffusionProcess] = {
    "brownian": BrownianProcess(1.7, "linear"),
    "dis": OrnsteinUhlenbeckProcess(1.3, noise=2.0, schedule="geometric"),
    "dds": OrnsteinUhlenbeckProcess(1.3, noise=2.0, exponential=True, schedule="cosine"),
}


@pytest.fixture(scope="module")
def torchrl_ppo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torchrl_ppo", TORCHRL_PPO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass asks for the module by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_torchrls_ppo_raises_the_bound() -> None:
    budget = ["--steps", "6", "--batches", "13", "--episodes", "256", "--minibatches", "2", "--learning-rate", "5e-3"]
    done = subprocess.run([sys.executable, TORCHRL_PPO, *budget], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    batches = re.findall(r"^batch +(\d+)  log Z >= +(\S+)  energy calls +([\d,]+)", done.stdout, flags=re.MULTILINE)
    assert [(int(batch), int(calls.replace(",", ""))) for batch, _, calls in batches] == [
        (batch, 256 * (batch + 1)) for batch in (0, 10, 12)
    ]
    first, *_, last = (float(bound) for _, bound, _ in batches)
    (bound, importance), *_ = re.findall(r"^rollout: log Z >= (\S+), by importance (\S+),", done.stdout, re.MULTILINE)
    assert math.isfinite(first)
    assert first + 0.5 < last < 0.0
    assert first + 0.5 < float(bound) <= float(importance)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("options", [{"learned_variance": True}, {"langevin": True}], ids=str)
def test_the_rewards_of_an_episode_sum_to_its_log_weight(
    torchrl_ppo: ModuleType, options: dict[str, Any], process: DiffusionProcess
) -> None:
    target, times = make_target("gmm25"), random_grid(7, torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.manual_seed(0)
    policy = DiffusionPolicy(target.dim, PolicyConfig(hidden=16, harmonics=8, **options)).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    env = DiffusionSamplingEnv(target, process, times, batch_size=16)
    paid = TransformedEnv(env, torchrl_ppo.PathReward(process, times))
    with torch.no_grad():
        episodes = paid.rollout(7, make_torchrl_policy(policy, process, target, times))
        states = from_transitions(episodes, times)["states"]
        scores = target.score(states[:, :-1]) if policy.langevin else None
        log_pf, log_pb = score_trajectories(policy, process, states, times, scores)
    per_step = log_pb - log_pf
    per_step[:, -1] += target.log_reward(states[:, -1])
    torch.testing.assert_close(episodes["next", "reward"].squeeze(-1), per_step)
    torch.testing.assert_close(episodes["next", "reward"].sum((1, 2)), per_step.sum(1))
