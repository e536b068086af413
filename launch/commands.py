"""`driftstream sample`, `eval` and `list`."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from driftstream.eval.evaluation import draw
from driftstream.eval.evaluator import Evaluator
from driftstream.eval.monitor import json_safe
from driftstream.eval.sampling_steps import plot_sampling_steps, sweep_sampling_steps
from driftstream.launch.config import RunConfig, from_toml
from driftstream.launch.flags import CommandError, EvalFlags, ListFlags, SampleFlags, UsageError
from driftstream.launch.listing import list_table
from driftstream.launch.progress import evaluation_rows, results_table
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
    evaluator, _ = _load(flags.run, flags.checkpoint)
    policy, process, times = evaluator.policy, evaluator.process, evaluator.times
    generator = torch.Generator(evaluator.device).manual_seed(flags.seed)
    drawn = draw(policy, process, evaluator.target, times, flags.n, generator, flags.batch_size)
    names = ("samples", "log_reward", "log_weight")
    _write_npz(flags.output, {name: part.cpu().numpy() for name, part in zip(names, drawn, strict=True)})
    print(f"{flags.n} samples: {flags.output}")
    return 0


def evaluate(flags: EvalFlags) -> int:
    """Evaluate a checkpoint of each run, by default the last, on as many samples as asked for."""
    runs, counts = flags.runs, flags.step_counts
    loaded = {run: _load(run, flags.checkpoint, flags.samples, flags.seed) for run in runs}
    if counts is not None:
        return _sweep(loaded, counts, flags.json)
    every = []
    for run, (evaluator, position) in loaded.items():
        metrics = evaluator.evaluate().metrics
        metrics["eval/energy_evaluations"] = position["energy_evaluations"]
        if flags.json:
            every.append(json_safe({**position, **metrics}))
        else:
            Console().print(results_table(_title(run, position), metrics))
    if flags.json:
        named = [{"run": str(run), **results} for run, results in zip(runs, every, strict=True)]
        print(json.dumps(every[0] if len(runs) == 1 else {"runs": named}, allow_nan=False))
    return 0


def _sweep(loaded: dict[Path, tuple[Evaluator, dict[str, float]]], counts: Sequence[int], as_json: bool) -> int:
    """Print each run's figures by number of steps, and plot them into the first run's directory."""
    names = [run.resolve().name for run in loaded]
    sweeps, results = [], []
    for name, (run, (evaluator, position)) in zip(names, loaded.items(), strict=True):
        learned = evaluator.policy.learned_variance
        variance = f"{'learned' if learned else 'fixed'} variance"
        sweep = sweep_sampling_steps(evaluator, counts, f"{name if names.count(name) == 1 else run}, {variance}")
        sweeps.append(sweep)
        if as_json:
            rows = [{"sampling_steps": count, **json_safe(metrics)} for count, metrics in sweep.metrics.items()]
            results.append({"run": str(run), "learned_variance": learned, **position, "by_sampling_steps": rows})
        else:
            Console().print(sweep_table(f"{_title(run, position)}, {variance}", sweep.metrics))
    if as_json:
        print(json.dumps({"runs": results}, allow_nan=False))
    path = plot_sampling_steps(sweeps, RunDirectory.open(next(iter(loaded))).plots / "sampling_steps.png")
    if path is not None and not as_json:
        print(f"plot: {path}")
    return 0


def sweep_table(title: str, metrics: Mapping[int, Mapping[str, float]]) -> Table:
    """A run's figures, one row for each number of steps."""
    rows = {
        count: {name: value for name, value, _ in evaluation_rows(row, brief=True)} for count, row in metrics.items()
    }
    headings = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table(title=title, title_justify="left")
    for heading in ("steps", *headings):
        table.add_column(heading, justify="right")
    for count, row in rows.items():
        table.add_row(str(count), *(row.get(heading, "") for heading in headings))
    return table


def _title(run: Path, position: dict[str, float]) -> str:
    return f"{run}, step {position['step']:,}"


def show_list(flags: ListFlags) -> int:
    """List the targets, methods, actors, refiners or objectives."""
    console = Console()
    # A pipe has no width of its own, and five columns need more than the 80 that it would get.
    (console if console.is_terminal else Console(width=120)).print(list_table(flags.what))
    return 0


def _load(
    root: Path, checkpoint: str, samples: int | None = None, seed: int | None = None
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
