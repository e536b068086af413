"""The learner as a process: it serves the stream, publishes weights and trains until its limits are reached."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from driftstream.actors.actor import Actor
from driftstream.buffers.channels import StreamConfig, StreamServer
from driftstream.buffers.control import RoleContext
from driftstream.buffers.stream_config import Pacing
from driftstream.learner.checkpoint import CheckpointConfig, Checkpointer, checkpoint_paths, load_latest
from driftstream.learner.learner import Learner
from driftstream.learner.limits import Budget, LimitsConfig
from driftstream.learner.loop import TrainingLoop
from driftstream.learner.publisher import Publisher
from driftstream.learner.sources import DataSource, LocalSource, StreamSource


def run_learner(
    context: RoleContext,
    learner: Learner,
    limits: LimitsConfig,
    checkpoint: CheckpointConfig,
    stream: StreamConfig,
    refine_every: int,
    kinds: Mapping[str, str],
    on_policy_actors: list[Actor] | None = None,
) -> None:
    """Train until a limit is reached or the run stops; goes on from the run's newest whole checkpoint, if any.

    `kinds` says of which kind every actor is, by its role's name. With `on_policy_actors` (which share the learner's
    policy; none where the learner differentiates through its own simulation) nothing is streamed: this process makes
    the data itself.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    control, endpoints = context.control, context.endpoints
    budget = Budget(limits)
    checkpointer = Checkpointer(context.run_dir / "checkpoints", checkpoint)
    state = None
    if checkpoint_paths(checkpointer.directory):
        state, damaged = load_latest(checkpointer.directory)
        for error in damaged:
            control.report("event", {"text": f"learner: checkpoint skipped, {error}"})

    dropped: Callable[[], dict[str, str]] = dict

    def report(metrics: dict[str, float], step: int, wall_s: float, energy_evaluations: int, progress: float) -> None:
        metrics["checkpoint/failures"] = checkpointer.failures
        context.report_metrics(metrics, step=step, wall_s=wall_s, energy_evaluations=energy_evaluations)
        control.report("status", {"phase": "training", "step": step, "progress": progress})
        if error := checkpointer.news():
            control.report("event", {"text": f"learner: checkpoint not written, {error}"})
        for sender, reason in dropped().items():
            control.report("dropped", {"sender": sender, "reason": reason})

    with ExitStack() as stack:
        publisher = Publisher(learner, budget, endpoints.weights, endpoints.ema_weights)
        stack.callback(publisher.close)
        source: DataSource
        pacing: Pacing = "window"
        if on_policy_actors is not None:
            source = LocalSource(on_policy_actors, [])
        else:
            steps_per_batch = 1 + math.ceil(learner.limiter.ratio)
            window = stream.max_outstanding(steps_per_batch, learner.config.publish_every)
            version = state.step if state else 0
            server = StreamServer(endpoints.stream, stream, max_outstanding=max(1, window), version=version)
            stack.callback(server.close)
            dropped = server.dropped
            pacing = stream.pacing(steps_per_batch, learner.config.publish_every)
            source = StreamSource(server, publisher, learner.policy, pacing, kinds, learner.draw_replayed)
        loop = TrainingLoop(
            learner,
            source,
            budget,
            checkpointer,
            report,
            should_stop=lambda: context.should_stop,
            refine_every=refine_every,
            publisher=publisher,
            publish_every=learner.config.publish_every if pacing == "window" else None,
        )
        if state is not None:
            loop.load_state(state)
            control.report("event", {"text": f"learner: resumed at step {learner.step}"})
        reason = loop.run()
        if checkpointer.error:
            raise OSError(f"the last checkpoint was not written: {checkpointer.error}")
        status = {"phase": "finished", "step": learner.step, "progress": loop.progress, "reason": reason}
        control.report("status", status)
