"""`driftstream sample`, `eval` and `list`."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from driftstream.envs.targets import make_target, target_names
from driftstream.eval.evaluation import draw
from driftstream.eval.evaluator import Evaluator
from driftstream.eval.monitor import json_safe
from driftstream.launch.config import RunConfig, from_toml
from driftstream.launch.flags import CommandError, EvalFlags, ListFlags, SampleFlags, UsageError
from driftstream.launch.methods import load_method, method_names
from driftstream.launch.progress import results_table
from driftstream.launch.roles import build_evaluator
from driftstream.launch.run_directory import RunDirectory
from driftstream.learner.checkpoint import CheckpointError


def sample(flags: SampleFlags) -> int:
    """Draw from a checkpoint's averaged policy into an .npz file: samples, log_reward, log_weight."""
    if flags.n < 1 or flags.batch_size < 1:
        raise UsageError("-n and --batch-size must be at least 1")
    if flags.output.suffix != ".npz":
        raise UsageError(f"-o {flags.output}: expected a name that ends in .npz")
    if not flags.output.absolute().parent.is_dir():
        raise UsageError(f"-o {flags.output}: the directory does not exist")
    evaluator, _ = _load(flags.run, checkpoint=flags.checkpoint)
    policy, process, times = evaluator.policy, evaluator.process, evaluator.times
    generator = torch.Generator(evaluator.device).manual_seed(flags.seed)
    drawn = draw(policy, process, evaluator.target, times, flags.n, generator, flags.batch_size)
    names = ("samples", "log_reward", "log_weight")
    _write_npz(flags.output, {name: part.cpu().numpy() for name, part in zip(names, drawn, strict=True)})
    print(f"{flags.n} samples: {flags.output}")
    return 0


def evaluate(flags: EvalFlags) -> int:
    """Evaluate the last checkpoint, on as many samples as asked for."""
    evaluator, position = _load(flags.run, samples=flags.samples, seed=flags.seed)
    metrics = evaluator.evaluate().metrics
    metrics["eval/energy_evaluations"] = position["energy_evaluations"]
    if flags.json:
        results = {**position, **metrics}
        print(json.dumps(json_safe(results), allow_nan=False))
    else:
        Console().print(results_table(f"{flags.run}, step {position['step']:,}", metrics))
    return 0


def show_list(flags: ListFlags) -> int:
    """List the targets or the methods."""
    table = Table(box=None, pad_edge=False)
    if flags.what == "targets":
        for heading in ("target", "dim", "log Z", "exact samples"):
            table.add_column(heading)
        for name in target_names():
            target = make_target(name)
            log_z = "unknown" if target.log_z is None else f"{target.log_z:.4f}"
            exact = "no" if target.sample(1) is None else "yes"
            table.add_row(name, str(target.dim), log_z, exact)
    else:
        for heading in ("method", "summary", "source"):
            table.add_column(heading)
        for name in method_names():
            method = load_method(name)
            table.add_row(name, method.summary, method.source)
    Console().print(table)
    return 0


def _load(
    root: Path, samples: int | None = None, seed: int | None = None, checkpoint: Path | None = None
) -> tuple[Evaluator, dict[str, float]]:
    """An evaluator with a checkpoint's policy, and the position in training that it is from."""
    run = RunDirectory.open(root)
    config: RunConfig = from_toml(run.config)
    evaluator = build_evaluator(config, seed)
    if samples is not None:
        evaluator.config = replace(config.eval, samples=samples)
    try:
        return evaluator, evaluator.load_checkpoint(run.root, checkpoint)
    except CheckpointError as error:
        raise CommandError(str(error)) from error


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """All of the file or none of it."""
    draft = path.with_name(f".{path.name}.partial")
    try:
        with draft.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
