"""What the user sees of a run: a live panel on a terminal, plain lines elsewhere, the results at the end."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 10.0
LIVE_EVERY_S = 0.25


class Progress:
    """Shows the state of a run. A terminal that goes away silences it; it never stops the run."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._title = title
        self._metrics: dict[str, float] = {}
        self._evaluation = ""
        self._step, self._fraction, self._phase = 0, 0.0, "starting"
        self._pace: tuple[float, float] | None = None
        self._due = 0.0
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def event(self, text: str, style: str = "") -> None:
        """A line that stays on the screen."""
        with self._guarded():
            line = Text(f"{datetime.now():%H:%M:%S} ", style="dim").append(text, style or "none")
            self.console.print(line, soft_wrap=True)

    def update(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take in metrics, under the names that metrics.jsonl has; `step` is that of an evaluation."""
        self._metrics.update(metrics)
        if any(name.startswith("eval/") for name in metrics):
            evaluated = self._step if step is None else step
            self._evaluation = f"evaluation at step {evaluated:,}: {describe_evaluation(metrics)}"
            if self._live is None:
                self.event(self._evaluation)

    def status(self, phase: str, step: int, fraction: float) -> None:
        """Take in how far the run is: `fraction` in [0, 1] of the limit that will be met first."""
        self._phase, self._step, self._fraction = phase, step, fraction
        if self._pace is None and phase == "training":
            self._pace = (time.monotonic(), fraction)

    def tick(self) -> None:
        """Show the present state, if it is time to."""
        now = time.monotonic()
        if now < self._due:
            return
        first, self._due = self._due == 0.0, now + (PLAIN_EVERY_S if self._live is None else LIVE_EVERY_S)
        with self._guarded():
            if self._live is not None:
                self._live.update(self._panel(), refresh=True)
            elif not first:
                self.event(f"{self._position()} · {self._stream()}")

    def close(self) -> None:
        """Take the panel away; later events are printed as lines."""
        if self._live is not None:
            with self._guarded():
                self._live.stop()
            self._live = None
            self._due = math.inf

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, SystemExit):
            # The terminal was closed, or a pipe's reader has left (rich would end the process).
            self._live, self._due = None, math.inf
            self.console.quiet = True

    def _left_s(self) -> float | None:
        if self._pace is None or self._fraction <= self._pace[1]:
            return None
        elapsed, done = time.monotonic() - self._pace[0], self._fraction - self._pace[1]
        return elapsed * (1.0 - self._fraction) / done

    def _position(self) -> str:
        left = self._left_s()
        time_left = f", {format_duration(left)} left" if left is not None else ""
        phase = "" if self._phase == "training" else f"{self._phase}: "
        return f"{phase}step {self._step:,} ({self._fraction:.0%}{time_left})"

    def _stream(self) -> str:
        metrics = self._metrics
        trajectories = [rate for name, rate in metrics.items() if name.endswith("/trajectories_per_s")]
        parts = [
            _part(metrics, "learner/updates_per_s", "{:.1f} updates/s"),
            f"{sum(trajectories):,.0f} trajectories/s" if trajectories else "",
            _part(metrics, "stream/staleness_mean", "staleness {:.1f}"),
            _part(metrics, "stream/queue_depth", "queue {:.0f}"),
            _part(metrics, "train/log_z", "log Z {:.3f}"),
            _part(metrics, "train/loss", "loss {:.3g}"),
        ]
        return " · ".join(part for part in parts if part)

    def _panel(self) -> Panel:
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        bar.add_row(ProgressBar(total=1.0, completed=self._fraction), self._position())
        rows: list[RenderableType] = [bar, Text(self._stream() or "waiting for the first update")]
        if self._evaluation:
            rows.append(Text(self._evaluation))
        return Panel(Group(*rows), title=self._title, title_align="left", border_style="dim")


def describe_evaluation(metrics: Mapping[str, float]) -> str:
    """The figures of an evaluation that tell how good the sampler is, in one line."""
    return " · ".join(f"{name} {value}" for name, value, _ in evaluation_rows(metrics, brief=True))


def evaluation_rows(metrics: Mapping[str, float], brief: bool = False) -> list[tuple[str, str, str]]:
    """(name, value, how to read it) of each figure of an evaluation that is there."""
    floor, modes = metrics.get("eval/w2_floor"), metrics.get("eval/modes")
    share = metrics.get("eval/mode_coverage_true")
    w2 = "{:.3f}" if floor is None else f"{{:.3f}} (floor {floor:.3f})"
    coverage = "{:.3f}" if share is None else f"{{:.3f}} (true {share:.3f})"
    if modes is not None:
        coverage = f"{{:.0f}} of {modes:.0f}"
    rows = [
        ("Δlog Z", "eval/delta_log_z", "{:.3f}", "true − lower bound", True),
        ("Δlog Z RW", "eval/delta_log_z_rw", "{:+.3f}", "true − importance estimate", True),
        ("log Z lower bound", "eval/log_z_lower_bound", "{:.3f}", "", "eval/delta_log_z" not in metrics),
        ("log Z importance", "eval/log_z_importance", "{:.3f}", "", "eval/delta_log_z" not in metrics),
        ("ELBO-EUBO gap", "eval/elbo_eubo_gap", "{:.3f}", "a missed mode widens it", False),
        ("W2", "eval/w2", w2, "floor: of two exact sample sets", True),
        ("ESS", "eval/ess", "{:.3f}", "fraction of the samples", True),
        ("k-hat", "eval/khat", "{:.2f}", "above 0.7: do not trust RW", False),
        ("mode coverage", "eval/mode_coverage", coverage, "", True),
        ("flow error", "eval/flow_error", "{:.3f}", "nats, RMS on the true marginals", False),
        ("energy calls", "eval/energy_evaluations", "{:,.0f}", "in training, all roles", False),
    ]
    return [
        (name, _part(metrics, key, form), note)
        for name, key, form, note, in_brief in rows
        if key in metrics and (in_brief or not brief)
    ]


def results_table(title: str, metrics: Mapping[str, float]) -> Table:
    """The final figures as a table."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in evaluation_rows(metrics):
        table.add_row(*row)
    return table


def format_duration(seconds: float) -> str:
    """ "1:05" or "2:01:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _part(metrics: Mapping[str, float], name: str, form: str) -> str:
    value = metrics.get(name)
    return "" if value is None else form.format(value)
