"""What the user sees: figures in one line, a panel on a terminal, and nothing that can stop a run."""

import io
from pathlib import Path

from rich.console import Console

from driftstream.launch.progress import Progress, describe_evaluation, format_duration, results_table

EVALUATION = {
    "eval/delta_log_z": 0.13,
    "eval/delta_log_z_rw": -0.002,
    "eval/w2": 1.06,
    "eval/w2_floor": 1.14,
    "eval/ess": 0.85,
    "eval/mode_coverage": 25.0,
    "eval/modes": 25.0,
    "eval/energy_evaluations": 2_800_000,
}


def test_an_evaluation_in_one_line() -> None:
    text = describe_evaluation(EVALUATION)
    assert text == "Δlog Z 0.130 · Δlog Z RW -0.002 · W2 1.060 (floor 1.140) · ESS 0.850 · mode coverage 25 of 25"


def test_a_target_without_a_known_log_z_shows_its_estimates() -> None:
    text = describe_evaluation({"eval/log_z_lower_bound": 1.0, "eval/log_z_importance": 1.5})
    assert text == "log Z lower bound 1.000 · log Z importance 1.500"


def test_results_are_a_table() -> None:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(results_table("gmm25", EVALUATION))
    text = console.export_text()
    assert "2,800,000" in text
    assert "25 of 25" in text


def test_plain_lines_where_there_is_no_terminal() -> None:
    output = io.StringIO()
    progress = Progress("run", Console(file=output))
    progress.event("started")
    progress.status("training", 10, 0.25)
    progress.update({"learner/updates_per_s": 20.0, "actor/0/trajectories_per_s": 3000.0})
    progress.update({"actor/1/trajectories_per_s": 1000.0})
    progress.update(EVALUATION, step=8)
    progress.close()
    lines = output.getvalue().splitlines()
    assert lines[0].endswith("started")
    assert "evaluation at step 8: Δlog Z 0.130" in lines[1]


def test_a_panel_on_a_terminal() -> None:
    output = io.StringIO()
    progress = Progress("gmm25 run", Console(file=output, force_terminal=True, width=120))
    progress.status("training", 10, 0.25)
    progress.update({"learner/updates_per_s": 20.0, "actor/0/trajectories_per_s": 3000.0})
    progress.tick()
    progress.close()
    text = output.getvalue()
    for part in ("gmm25 run", "step 10 (25%)", "20.0 updates/s", "3,000 trajectories/s"):
        assert part in text


def test_a_terminal_that_goes_away_stops_nothing(tmp_path: Path) -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        progress = Progress("run", Console(file=full))
        progress.event("lost")
        progress.status("training", 1, 0.5)
        progress.tick()
        progress.close()
        full.close = lambda: None  # type: ignore[method-assign]


def test_durations() -> None:
    assert [format_duration(s) for s in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]
