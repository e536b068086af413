"""The supervisor with real processes and tiny roles: deaths, silence, failures, interruption; no orphans."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import wandb
from rich.console import Console

from driftstream.eval.monitor import MonitorConfig, WandbMode
from driftstream.launch.config import RunConfig, resolve, to_toml
from driftstream.launch.plan import RunPlan, SupervisorConfig
from driftstream.launch.processes import fork_server
from driftstream.launch.progress import Progress
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.supervisor import Supervisor

pytestmark = pytest.mark.timeout(60)
ROLES = Path(__file__).parent / "launch_roles.py"
NAMES = {"learner", "actor-0", "refiner-0", "evaluator"}
PATIENCE_S = 30.0
T = TypeVar("T")


def wait_for(condition: Callable[[], T]) -> T:
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def processes(root: Path) -> dict[str, int]:
    """Process id of every role of a run that is alive, by name, as their titles have it."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or []).split()
        if len(words) == 3 and words[0] == "driftstream" and words[2] == str(root):
            found[words[1]] = process.pid
    return found


class Run:
    """A run of tiny roles, supervised in this process while a script plays in a thread."""

    def __init__(self, root: Path, context: ForkServerContext) -> None:
        self.directory = RunDirectory.create(root / "run")
        self.root = self.directory.root
        self.events: list[str] = []
        self._context = context

    def supervise(
        self,
        role: str = "obey",
        script: Callable[[], None] | None = None,
        settings: SupervisorConfig | None = None,
        wandb_mode: WandbMode = "disabled",
    ) -> tuple[int, str]:
        """(exit code, cause) of the run."""
        plan = write_plan(self.directory, settings or SupervisorConfig(), wandb_mode)
        progress = Progress("test", Console(file=io.StringIO()))
        failures: list[BaseException] = []

        def play() -> None:
            try:
                (script or self.finish)()
            except BaseException as error:
                failures.append(error)
                os.kill(os.getpid(), signal.SIGTERM)

        progress.event = lambda text, style="": self.events.append(text)  # type: ignore[method-assign]
        with self.directory.hold() as launch:
            supervisor = Supervisor(plan, self.directory, launch, self._context, progress, f"{ROLES}:{role}")
            thread = threading.Thread(target=play)
            thread.start()
            code = supervisor.run()
            thread.join()
        assert not failures, self.events
        assert not processes(self.root)
        return code, supervisor.cause

    def pid(self, name: str, other_than: int | None = None) -> int:
        """The role's process, once it runs."""
        pids = wait_for(lambda: {processes(self.root).get(name)} - {None, other_than})
        return pids.pop() or 0

    def replaced(self, name: str, number: signal.Signals) -> None:
        """Send a role's process a signal, and wait for its successor."""
        self.event(name, "runs")
        pid = self.pid(name)
        os.kill(pid, number)
        self.pid(name, other_than=pid)

    def finish(self) -> None:
        """Let the learner meet its limit, once every role has started."""
        self.all_run()
        (self.root / "enough").touch()

    def all_run(self) -> None:
        """Wait until every role is in its loop."""
        for name in NAMES:
            self.event(name, "runs")

    def event(self, *words: str) -> str:
        """The first event that holds all the words, once it is there."""
        found = wait_for(lambda: [text for text in self.events if all(word in text for word in words)])
        return found[0]


def write_plan(directory: RunDirectory, settings: SupervisorConfig, wandb_mode: WandbMode = "disabled") -> RunPlan:
    config = resolve(RunConfig(monitor=MonitorConfig(wandb=wandb_mode)))
    directory.write_config(to_toml(replace(config, supervisor=settings)))
    return RunPlan.from_toml(directory.config.read_text())


@pytest.fixture(scope="module")
def context() -> Iterator[ForkServerContext]:
    with fork_server(["driftstream.launch.config"]) as context:
        yield context


@pytest.fixture
def run(tmp_path: Path, context: ForkServerContext) -> Run:
    return Run(tmp_path, context)


def test_a_run_ends_when_the_learner_has_met_its_limit(run: Run) -> None:
    assert run.supervise() == (0, "")
    assert {path.stem for path in run.directory.logs.iterdir()} == NAMES
    lines = run.directory.metrics.read_text().splitlines()
    assert any('"eval/ess": 0.25' in line and '"step": 7' in line for line in lines)
    assert not run.directory.sockets.exists()


@pytest.mark.parametrize("name", ["actor-0", "refiner-0", "evaluator"])
def test_a_killed_role_is_reported_and_replaced(run: Run, name: str) -> None:
    def script() -> None:
        run.replaced(name, signal.SIGKILL)
        assert run.event(name, "killed by SIGKILL", "restarted", "(1 of 5)")
        run.finish()

    assert run.supervise(script=script) == (0, "")
    starts = [line for line in run.directory.log(name).read_text().splitlines() if "seed" in line]
    assert len(starts) == 2
    assert starts[0].split("epoch")[1] != starts[1].split("epoch")[1]


def test_a_silent_role_is_killed_and_replaced(run: Run) -> None:
    def script() -> None:
        run.replaced("actor-0", signal.SIGSTOP)
        assert run.event("actor-0", "silent for", "--supervisor.heartbeat-timeout-s", "restarted")
        run.finish()

    settings = SupervisorConfig(heartbeat_s=0.2, heartbeat_timeout_s=1.5)
    assert run.supervise(script=script, settings=settings) == (0, "")


def test_a_pause_of_the_supervisor_is_no_silence_of_the_roles(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    write_plan(directory, SupervisorConfig(heartbeat_timeout_s=3.0))
    command = [sys.executable, str(ROLES), str(directory.root), f"{ROLES}:obey"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as supervisor:
        try:
            wait_for(lambda: set(processes(directory.root)) == NAMES and directory.metrics.exists())
            roles = processes(directory.root).values()
            for pid in (*roles, supervisor.pid):
                os.kill(pid, signal.SIGSTOP)
            time.sleep(4.0)
            # It goes on before them, and finds them silent.
            os.kill(supervisor.pid, signal.SIGCONT)
            time.sleep(0.5)
            for pid in roles:
                os.kill(pid, signal.SIGCONT)
            (directory.root / "enough").touch()
            assert supervisor.wait(PATIENCE_S) == 0
        finally:
            supervisor.kill()
    for log in directory.logs.iterdir():
        assert log.read_text().count("epoch") == 1, log


def test_the_last_actor_beyond_its_restarts_ends_the_run(run: Run) -> None:
    settings = SupervisorConfig(max_restarts=2, restart_delay_s=0.05)
    code, cause = run.supervise("actor_fails", lambda: None, settings)
    assert code == 1
    assert cause == "actor-0 ended: ValueError: no luck; given up after 3 starts"
    assert any("actor-0 |" in text and "ValueError: no luck" in text for text in run.events)


def test_a_refiner_beyond_its_restarts_is_given_up_with_its_last_lines_and_the_run_goes_on(run: Run) -> None:
    def script() -> None:
        assert run.event("refiner-0 ended: ValueError: no luck; given up after 2 starts")
        (run.root / "enough").touch()

    settings = SupervisorConfig(max_restarts=1, restart_delay_s=0.05)
    assert run.supervise("refiner_fails", script, settings) == (0, "")
    told = [text for text in run.events if "refiner-0 ended" in text or text == "refiner-0 | ValueError: no luck"]
    assert ["given up" in text for text in told] == [False, False, True, False]


def test_a_role_that_worked_for_a_while_has_its_budget_again(run: Run) -> None:
    settings = SupervisorConfig(max_restarts=1, restart_delay_s=0.05, restart_reset_s=0.5)

    def script() -> None:
        run.event("actor-0 runs, epoch 3")
        (run.root / "enough").touch()

    assert run.supervise("actor_dies_now_and_then", script, settings) == (0, "")
    counts = {text.rpartition("(")[2] for text in run.events if "restarted in" in text}
    assert counts == {"1 of 1)"}


def test_a_stopped_role_is_replaced_long_before_it_counts_as_silent(run: Run) -> None:
    def script() -> None:
        run.all_run()
        run.replaced("actor-0", signal.SIGSTOP)
        assert run.event("actor-0", "stopped for", "restarted")
        run.finish()

    assert run.supervise(script=script, settings=SupervisorConfig(heartbeat_timeout_s=1000.0)) == (0, "")


def test_what_the_learner_drops_is_started_again(run: Run) -> None:
    def script() -> None:
        run.pid("actor-0")
        run.event("actor-0", "dropped by the learner: 10 messages in a row refused", "restarted")
        run.event("stranger dropped by the learner: 10 messages in a row refused")
        run.finish()

    assert run.supervise("learner_drops_senders", script) == (0, "")


def test_a_failing_target_ends_the_run_at_once(run: Run) -> None:
    code, cause = run.supervise("target_fails", lambda: None)
    assert code == 1
    assert cause == "actor-0 ended: TargetError: target 'odd' raised ZeroDivisionError: division by zero"
    assert not any("restarted" in text for text in run.events)
    assert "actor-0 | ZeroDivisionError: division by zero" in run.events


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_the_learners_death_ends_the_run_and_says_how_to_resume(run: Run, how: str) -> None:
    if how == "raises":
        code, cause = run.supervise("learner_fails", lambda: None)
    else:
        code, cause = run.supervise(script=lambda: os.kill(run.pid("learner"), signal.SIGKILL))
    assert code == 1
    reason = "RuntimeError: disk full" if how == "raises" else "killed by SIGKILL"
    assert cause == f"learner ended: {reason}; resume with: driftstream train --resume {run.root}"


def test_a_failed_final_evaluation_is_tried_again(run: Run) -> None:
    assert run.supervise("evaluator_fails_once") == (0, "")
    assert run.event("evaluator ended: RuntimeError: out of memory; restarted")


def test_an_interrupt_lets_every_role_stop(run: Run) -> None:
    def script() -> None:
        run.all_run()
        wait_for(run.directory.metrics.read_text)
        os.kill(os.getpid(), signal.SIGINT)

    code, cause = run.supervise(script=script)
    assert code == 130
    assert cause.startswith("interrupted at step 7; resume with: driftstream train --resume")
    stopped = {path.name.removeprefix("stopped-") for path in run.root.glob("stopped-*")}
    assert stopped == NAMES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_every_process_at_once_lets_every_role_stop(run: Run, number: signal.Signals) -> None:
    """A Ctrl-C in a terminal and a scheduler's SIGTERM reach the roles too."""

    def script() -> None:
        run.all_run()
        for pid in (os.getpid(), *processes(run.root).values()):
            os.kill(pid, number)

    code, cause = run.supervise("takes_a_while_to_stop", script)
    assert code == 130
    assert cause.startswith("interrupted at step")
    assert {path.name.removeprefix("drained-") for path in run.root.glob("drained-*")} == NAMES
    assert not any("ended" in text for text in run.events)


def test_the_end_does_not_wait_for_wandb(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds from the interrupt, with W&B that never comes up."""
    release = threading.Event()

    def hang(**options: Any) -> None:
        release.wait(PATIENCE_S)
        raise RuntimeError("released")

    monkeypatch.setattr(wandb, "init", hang)
    interrupted: list[float] = []

    def script() -> None:
        run.all_run()
        interrupted.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    assert run.supervise(script=script, wandb_mode="offline")[0] == 130
    assert time.monotonic() - interrupted[0] < 10.5
    release.set()


def test_a_second_interrupt_kills(run: Run) -> None:
    def script() -> None:
        run.pid("learner")
        os.kill(os.getpid(), signal.SIGINT)
        run.event("interrupted")
        os.kill(os.getpid(), signal.SIGINT)

    settings = SupervisorConfig(drain_s=1000.0)
    assert run.supervise("learner_hangs", script, settings)[0] == 130


def test_a_role_that_does_not_stop_is_killed_in_time(run: Run) -> None:
    def script() -> None:
        run.pid("learner")
        os.kill(os.getpid(), signal.SIGTERM)

    settings = SupervisorConfig(drain_s=0.5)
    assert run.supervise("learner_hangs", script, settings)[0] == 130
    assert run.event("learner ended: did not stop in time; killed")


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    write_plan(directory, SupervisorConfig(drain_s=2.0))
    command = [sys.executable, str(ROLES), str(directory.root), f"{ROLES}:obey"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as supervisor:
        try:
            wait_for(lambda: set(processes(directory.root)) == NAMES)
            family = psutil.Process(supervisor.pid).children(recursive=True)
        finally:
            supervisor.kill()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive
