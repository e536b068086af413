"""The learner's end of the stream, over real sockets."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from driftstream.buffers.channels import StreamClient, StreamConfig, StreamServer
from driftstream.buffers.stream_config import Pacing
from driftstream.envs.grids import uniform_grid
from driftstream.launch.config import resolve
from driftstream.launch.methods import load_method
from driftstream.launch.roles import build_learner
from driftstream.learner.limits import Budget
from driftstream.learner.publisher import Publisher
from driftstream.learner.sources import StreamSource

WAIT_S = 10.0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [0, 4], ids=["empty", "used"])
@pytest.mark.parametrize("pacing", ["lock_step", "ahead"])
def test_one_batch_under_way_is_made_with_the_newest_weights(tmp_path: Path, pacing: Pacing, rows: int) -> None:
    config = load_method("tb+expl").config
    learner = build_learner(resolve(replace(config, replay=replace(config.replay, capacity=100, minimum=10))), seed=0)
    stream, endpoint = StreamConfig(max_staleness=0), f"ipc://{tmp_path}/stream"
    publisher = Publisher(learner, Budget(config.limits), f"ipc://{tmp_path}/weights", f"ipc://{tmp_path}/ema")
    publisher.publish()
    with (
        StreamServer(endpoint, stream, max_outstanding=1) as server,
        StreamClient(endpoint, "actor-0", 0, stream) as actor,
    ):
        source = StreamSource(server, publisher, learner.policy, pacing, {}, learner.draw_replayed)
        assert actor.wait_for_credit(WAIT_S) == 0
        tensors = {"states": torch.zeros(rows, 6, 2), "times": uniform_grid(5), "log_reward": torch.zeros(rows)}
        actor.send("trajectories", tensors, policy_version=0, counters={"energy_evaluations": 4})
        batch = source.fresh(WAIT_S, step=0, progress=0.0)
        assert (batch is None) == (rows == 0)
        learner.step = 5
        if batch is not None:
            source.consumed(batch)
        if pacing == "ahead":
            # It is begun now, with what this batch led to; the replayed steps that follow age it.
            assert actor.wait_for_credit(WAIT_S) == (5 if rows else 0)
            learner.step = 6
        else:
            assert actor.wait_for_credit(0.2) is None
            learner.step = 6
            assert source.fresh(0.0, step=6, progress=0.0) is None
            assert actor.wait_for_credit(WAIT_S) == 6
        assert source.spent() == 4
    publisher.close()
