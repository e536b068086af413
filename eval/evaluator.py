"""The evaluator: scores published weights during training, and the last checkpoint at the end."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.weights import PolicySubscriber
from driftstream.buffers.control import RoleContext
from driftstream.envs.grids import GridConfig, make_grid
from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets import CountedTarget
from driftstream.eval.distances import wasserstein2_floor
from driftstream.eval.evaluation import EvalConfig, Evaluation, evaluate_sampler
from driftstream.eval.monitor import METRICS_FILE, json_safe
from driftstream.learner.checkpoint import (
    BEST,
    CheckpointError,
    CheckpointState,
    clean_up,
    find_checkpoint,
    keep_only,
    load_checkpoint,
    load_latest,
)

if TYPE_CHECKING:
    from driftstream.eval.plots import DensityCache

# Plots are imported where they are drawn: matplotlib takes a tenth of the time in which a run starts.

RESULTS_FILE, CHECKPOINTS, PLOTS = "results.json", "checkpoints", "plots"
"""Where a run directory holds them."""

POLL_S = 0.2
CRITERION = "eval/log_z_lower_bound"
"""What the best weights are best by."""
DUTY = 0.1
"""Largest share of the time that the evaluator works during training, so that it leaves the cores to the others."""

_LOG = logging.getLogger(__name__)


class Evaluator:
    """A policy of its own with what its evaluation needs: target, process and grid."""

    def __init__(
        self,
        target: CountedTarget,
        process: DiffusionProcess,
        grid: GridConfig,
        policy: PolicyConfig,
        config: EvalConfig,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.target = target
        self.process = process
        self.config = config
        self.policy = DiffusionPolicy(target.dim, policy).to(device)
        self.device = torch.device(device)
        self._seed = seed
        if grid.kind == "given" and config.sampling_steps is None:
            self.times = make_grid(grid, device=device)
        else:
            # Random grids are for training; one sampler is evaluated on one grid.
            self.times = self._uniform(config.sampling_steps or grid.sampling_steps)
        self._floor: float | None = None
        self._densities: DensityCache = {}
        self._best: float | None = None

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of a policy."""
        self.policy.load_state_dict(tensors)

    def evaluate(self, sampling_steps: int | None = None) -> Evaluation:
        """Evaluate the policy as it is; every call draws the same random numbers.

        `sampling_steps` takes a uniform grid of that many steps in place of the configured one.
        """
        times = self.times if sampling_steps is None else self._uniform(sampling_steps)
        generator = torch.Generator(self.device).manual_seed(self._seed)
        if self._floor is None and self.config.distance_samples:
            self._floor = wasserstein2_floor(self.target, self.config.distance_samples, generator)
        generator.manual_seed(self._seed + 1)
        return evaluate_sampler(self.policy, self.process, self.target, times, self.config, generator, self._floor)

    def evaluate_checkpoint(self, run_dir: Path, checkpoint: str = "last") -> tuple[Evaluation, dict]:
        """Evaluate the averaged weights of a checkpoint (see `load_checkpoint`).

        Returns the evaluation and the position in training: step, wall_s, energy_evaluations.
        """
        position = self.load_checkpoint(run_dir, checkpoint)
        return self.evaluate(), position

    def load_checkpoint(self, run_dir: Path, checkpoint: str = "last") -> dict[str, float]:
        """Load the averaged weights of a checkpoint; returns the position in training.

        `checkpoint` is `last` (the newest whole one), `best`, `step-N`, or a path. For `last`, newer checkpoints that
        are damaged are passed over with a warning for each.
        """
        path = find_checkpoint(run_dir / CHECKPOINTS, checkpoint)
        if path is None:
            state, damaged = load_latest(run_dir / CHECKPOINTS, groups=("ema",))
            for error in damaged:
                _LOG.warning("checkpoint skipped: %s", error)
        else:
            state = load_checkpoint(path, groups=("ema",))
        self.load(state.groups["ema"])
        numbers = state.numbers
        return {
            "step": state.step,
            "wall_s": numbers.get("elapsed_s", numbers.get("wall_s", 0.0)),
            "energy_evaluations": numbers["energy_evaluations"],
        }

    def keep_best(self, run_dir: Path, evaluation: Evaluation, position: Mapping[str, float]) -> None:
        """Keep the weights just evaluated as the run's `best` checkpoint, if none before scored as high.

        It holds the averaged weights alone: enough to sample and evaluate, not to go on training. A write that fails
        is a warning.
        """
        directory, score = run_dir / CHECKPOINTS / BEST, evaluation.metrics[CRITERION]
        try:
            if self._best is None:
                self._best = _best_so_far(directory)
            if not score > self._best:
                return
            numbers = {name: position[name] for name in ("wall_s", "energy_evaluations")} | {CRITERION: score}
            keep_only(directory, CheckpointState(int(position["step"]), {"ema": self.policy.state_dict()}, numbers), 1)
            self._best = score
        except OSError as error:
            _LOG.warning("the best checkpoint is not kept (%s)", error)

    def plot(self, samples: Tensor, run_dir: Path) -> dict[str, str]:
        """Plot samples [N,D] over the target's contours into the run directory; returns the image by its name.

        Where that fails, as it may in a target's own code, it returns {} with a warning.
        """
        from driftstream.eval.plots import plot_samples

        path = run_dir / PLOTS / "samples.png"
        return _image("plots/samples", lambda: plot_samples(self.target, samples, path, self._densities))

    def plot_flow(self, run_dir: Path) -> dict[str, str]:
        """Plot the learned state flow beside the true one, where that is known; returns the image by its name."""
        from driftstream.eval.flow_plots import plot_flow

        path = run_dir / PLOTS / "flow.png"
        return _image("plots/flow", lambda: plot_flow(self.policy, self.process, self.target, self.times, path))

    def _uniform(self, sampling_steps: int | None) -> Tensor:
        return make_grid(GridConfig("uniform", sampling_steps), device=self.device)


def _best_so_far(directory: Path) -> float:
    """The score of the checkpoint in `best/`; minus infinity where there is none that is whole."""
    if not directory.is_dir():
        return -math.inf
    clean_up(directory)
    try:
        state, _ = load_latest(directory, groups=())
        return float(state.numbers[CRITERION])
    except (CheckpointError, KeyError):
        return -math.inf


def final_evaluation(evaluator: Evaluator, run_dir: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Evaluate the last checkpoint, write results.json and the plots; returns metrics and images by name."""
    evaluation, position = evaluator.evaluate_checkpoint(run_dir)
    evaluator.keep_best(run_dir, evaluation, position)
    metrics = {**evaluation.metrics, "eval/energy_evaluations": position["energy_evaluations"]}
    results = {**position, **metrics}
    figures = json_safe(results)
    partial = run_dir / f"{RESULTS_FILE}.partial"
    partial.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    partial.rename(run_dir / RESULTS_FILE)
    images = evaluator.plot(evaluation.samples, run_dir) | evaluator.plot_flow(run_dir)
    metrics_path = run_dir / METRICS_FILE
    if metrics_path.exists():
        from driftstream.eval.plots import plot_training_curves

        path = run_dir / PLOTS / "training.png"
        images |= _image("plots/training", lambda: plot_training_curves(metrics_path, path, last=figures))
    return results, images


def _image(name: str, draw: Callable[[], Path | None]) -> dict[str, str]:
    """The image by its name; {} where there is nothing to draw, or where drawing failed, which is a warning."""
    try:
        path = draw()
    except Exception as error:
        _LOG.warning("%s is not drawn (%s: %s)", name, type(error).__name__, error)
        return {}
    return {} if path is None else {name: str(path)}


def run_evaluator(context: RoleContext, evaluator: Evaluator) -> None:
    """Evaluate the newest averaged weights now and then; at the end of training the last checkpoint.

    Between two evaluations lie at least `every_s` seconds, and enough that evaluating takes at most a tenth of
    the time.
    """
    weights = PolicySubscriber(context.endpoints.ema_weights, evaluator.policy)
    every_s = evaluator.config.every_s
    due = time.monotonic() + every_s
    evaluated = -1
    try:
        while not context.should_stop and not context.control.finish.is_set():
            if time.monotonic() < due:
                context.control.finish.wait(POLL_S)
                continue
            weights.update(POLL_S, min_version=evaluated + 1)
            if weights.version <= evaluated:
                continue
            evaluated = weights.version
            start = time.monotonic()
            evaluation = evaluator.evaluate()
            calls = weights.energy_evaluations
            position = {"step": weights.version, "wall_s": weights.wall_s, "energy_evaluations": calls}
            context.report_metrics({**evaluation.metrics, "eval/energy_evaluations": calls}, **position)
            evaluator.keep_best(context.run_dir, evaluation, position)
            context.control.report("images", evaluator.plot(evaluation.samples, context.run_dir))
            end = time.monotonic()
            due = max(start + every_s, end + (end - start) * (1.0 / DUTY - 1.0))
    finally:
        weights.close()
    if context.control.finish.is_set() and not context.should_stop:
        results, images = final_evaluation(evaluator, context.run_dir)
        context.control.report("images", images)
        context.control.report("final", {"metrics": results})
