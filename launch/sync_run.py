"""`--sync`: the same components in one process, in a fixed order, bitwise reproducible from the seed."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from driftstream.actors.refiner import Refiner
from driftstream.eval.evaluator import final_evaluation
from driftstream.eval.monitor import Monitor
from driftstream.launch.config import RunConfig
from driftstream.launch.heap import keep_heap
from driftstream.launch.roles import (
    build_evaluator,
    build_learner,
    build_local_actors,
    build_on_policy_actors,
    build_refiner,
)
from driftstream.launch.seeding import derive_seed
from driftstream.learner.checkpoint import Checkpointer, checkpoint_paths, load_latest
from driftstream.learner.limits import Budget
from driftstream.learner.loop import TrainingLoop
from driftstream.learner.sources import LocalSource

Report = Callable[[dict[str, float]], None]


def train_sync(
    config: RunConfig,
    run_dir: Path,
    monitor: Monitor,
    show: Callable[[dict[str, float]], None],
    event: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Train in this process; returns the final evaluation, or None if the run was stopped before its end.

    Goes on from the run's newest whole checkpoint, if any. Wall-clock time enters the run only through a limit
    of minutes, so that two runs limited by steps or energy calls write the same checkpoints, bit for bit.
    """
    keep_heap()
    torch.set_num_threads(config.learner.threads)
    learner = build_learner(config, derive_seed(config.seed, "learner"))
    refiners: list[Refiner] = []
    if config.data == "on_policy":
        actors = build_on_policy_actors(config, learner, derive_seed(config.seed, "actor", 0))
    else:
        actor_seeds = [derive_seed(config.seed, "actor", index) for index in range(config.actor.count)]
        actors = build_local_actors(config, learner, actor_seeds)
        refiner_seeds = [derive_seed(config.seed, "refiner", index) for index in range(config.refiner.count)]
        refiners = [build_refiner(config, seed, index) for index, seed in enumerate(refiner_seeds)]
    budget = Budget(config.limits)
    checkpointer = Checkpointer(run_dir / "checkpoints", config.checkpoint)
    evaluator = build_evaluator(config)
    evaluated_at = time.monotonic()

    def report(metrics: dict[str, float], step: int, wall_s: float, energy_evaluations: int, progress: float) -> None:
        nonlocal evaluated_at
        metrics["checkpoint/failures"] = checkpointer.failures
        if error := checkpointer.news():
            event(f"checkpoint not written, {error}")
        monitor.log(metrics, step, wall_s, energy_evaluations)
        show({**metrics, "step": step, "progress": progress})
        now = time.monotonic()
        if now - evaluated_at >= config.eval.every_s:
            evaluator.load(learner.average.tensors)
            results = evaluator.evaluate().metrics
            results["eval/energy_evaluations"] = energy_evaluations
            monitor.log(results, step, wall_s, energy_evaluations)
            show(results)
            evaluated_at = time.monotonic()

    loop = TrainingLoop(
        learner,
        LocalSource(actors, refiners),
        budget,
        checkpointer,
        report,
        should_stop,
        refine_every=config.refiner.every,
        record_clock=config.limits.minutes is not None,
    )
    if checkpoint_paths(checkpointer.directory):
        state, damaged = load_latest(checkpointer.directory)
        for error in damaged:
            event(f"checkpoint skipped: {error}")
        loop.load_state(state)
        event(f"resumed at step {learner.step}")
    reason = loop.run()
    if checkpointer.error:
        raise OSError(f"the last checkpoint was not written: {checkpointer.error}")
    if reason == "stopped":
        return None
    results, images = final_evaluation(evaluator, run_dir)
    figures = {name: value for name, value in results.items() if "/" in name}
    monitor.log(figures, learner.step, budget.elapsed_s, learner.energy_evaluations)
    monitor.log_images({name: Path(path) for name, path in images.items()})
    monitor.summary(figures)
    return results
