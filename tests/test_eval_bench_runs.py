"""The benchmarks of whole runs: what they read off a run, that nothing of it is left, and one real run of each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from driftstream.eval import bench_end_to_end, bench_energies, bench_start
from driftstream.eval.bench_end_to_end import FromMemory, MemorySource, Round
from driftstream.eval.bench_energies import Computing, Sleeping
from driftstream.eval.bench_run import (
    Pace,
    RunBenchError,
    bench_run,
    cpu_s,
    descendants,
    learner_reports,
    pace,
    pss_bytes,
    runs,
)
from driftstream.eval.bench_scale import ActorsRow, bench_dimension, bytes_per_actor, efficiency
from driftstream.launch import bench_runs, start_up
from driftstream.launch.cli import main
from driftstream.launch.config import RunConfig, resolve
from driftstream.launch.flags import BenchFlags
from driftstream.launch.methods import load_method
from driftstream.launch.roles import build_learner, build_local_actors, build_refiner
from driftstream.launch.start_up import STAGES, StartUp

pytestmark = pytest.mark.timeout(180)


def small() -> RunConfig:
    """The default method with networks and chains that take no time."""
    config = load_method("default").config
    mala = replace(config.refiner.mala, chains=8, mcmc_steps=6, burn_in=2)
    config = replace(
        config,
        target="gmm9",
        device="cpu",
        grid=replace(config.grid, sampling_steps=3, coarse_steps=None),
        policy=replace(config.policy, hidden=8, harmonics=4),
        learner=replace(config.learner, batch_size=6, report_every_s=1e-3),
        replay=replace(config.replay, capacity=100, minimum=1),
        refiner=replace(config.refiner, mala=mala, every=3),
    )
    return resolve(config)


def report(step: int, wall_s: float, wait_fraction: float) -> dict[str, float]:
    return {"step": step, "wall_s": wall_s, "learner/updates_per_s": 1.0, "learner/wait_fraction": wait_fraction}


def test_the_pace_is_that_between_the_first_report_and_the_last() -> None:
    # Windows of 2 s and 1 s, of which 0.5 s and 1 s went by in waiting; other roles report in between.
    rows = [report(0, 1.0, 0.9), report(4, 3.0, 0.7), report(10, 5.0, 0.25), {"step": 10, "wall_s": 5.5}]
    rows += [report(13, 6.0, 1.0)]
    found = pace(rows)
    assert len(learner_reports(rows)) == 3
    assert found.updates_per_s == pytest.approx((13 - 4) / 3.0)
    assert found.wait_fraction == pytest.approx((0.5 + 1.0) / 3.0)
    assert found.busy_s == pytest.approx(1.5 / 9)
    for few in ([], rows[:2]):
        with pytest.raises(RunBenchError, match="twice"):
            pace(few)


def test_the_pace_of_several_turns_leaves_out_what_is_between() -> None:
    turns = [report(1, 0.0, 0.9), report(3, 1.0, 0.5)], [report(90, 50.0, 0.9), report(97, 53.0, 0.0)]
    found = pace(*turns)
    assert found.updates_per_s == pytest.approx((2 + 7) / 4.0)
    assert found.wait_fraction == pytest.approx(0.5 / 4.0)
    with pytest.raises(RunBenchError, match="twice"):
        pace(*turns, [report(98, 60.0, 0.0)])


def test_a_start_tells_its_stages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([12.0, 13.5, 20.0])
    monkeypatch.setattr(start_up, "_process_start", lambda: 10.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    started = StartUp()
    started.reached("configured")
    started.reached("launched")
    told = started.first_step(4.0)
    assert told == {
        "start/configured_s": 2.0,
        "start/launched_s": 3.5,
        "start/training_s": 6.0,
        "start/first_step_s": 10.0,
    }
    assert [f"start/{stage}_s" for stage in STAGES] == list(dict(sorted(told.items(), key=lambda item: item[1])))
    assert started.first_step(5.0) == {}


def test_a_resumed_run_does_not_say_when_it_trains() -> None:
    started = StartUp()
    started.reached("launched")
    assert set(started.first_step(1e6)) == {"start/launched_s", "start/first_step_s"}


def test_a_process_began_before_it_asks() -> None:
    code = "import time; from driftstream.launch.start_up import _process_start as s; print(time.monotonic() - s())"
    age_s = float(subprocess.check_output([sys.executable, "-c", code], timeout=60))
    assert 0.0 <= age_s < 60.0


@pytest.fixture
def child() -> Iterator[int]:
    command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_processes_are_measured_from_outside(child: int) -> None:
    assert {os.getpid(), child} <= set(descendants(os.getpid()))
    assert descendants(child) == [child]
    assert 1e6 < pss_bytes(child) < 1e9
    assert cpu_s(os.getpid()) == pytest.approx(time.process_time(), abs=0.1)
    assert (cpu_s(2**22), pss_bytes(2**22), descendants(2**22)) == (0.0, 0, [2**22])


FAMILY = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
root = pathlib.Path(sys.argv[1])
(root / "logs").mkdir(parents=True)
starts = f"now actor-0: process 7, epoch 0\\nnow actor-0: process {child.pid}, epoch 1\\n"
(root / "logs" / "actor-0.log").write_text(starts)
(root / "metrics.jsonl").write_text('{"step": 3}\\n{"step"')
try:
    time.sleep(60)
except KeyboardInterrupt:
    child.kill()
"""


@pytest.mark.parametrize("deaf", [False, True])
def test_nothing_of_a_run_is_left(tmp_path: Path, deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("driftstream.eval.bench_run.STOP_S", 1.0 if deaf else 30.0)
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if deaf else ""
    root = tmp_path / "run"
    with bench_run([sys.executable, "-c", ignore + FAMILY, str(root)], root) as run:
        assert run.wait(bool, 30.0) == [{"step": 3}]
        (pid,) = run.roles().values()
        everyone = descendants(run._process.pid)
        assert pid in everyone
        assert set(run.cpu_s()) == {"supervisor", "actor-0"}
        assert run.pss_bytes() > 0
        with pytest.raises(RunBenchError, match="not come far enough within 1 s"):
            run.wait(lambda rows: False, 1.0)
    assert not any(runs(pid) for pid in everyone)


SLEEPER = "import time; time.sleep(120)"


def wait_for(pid: int, stopped: bool) -> None:
    """Until that process stands still, or goes on."""
    deadline = time.monotonic() + 30.0
    while (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T") != stopped:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_stands_still_and_goes_on(tmp_path: Path) -> None:
    with bench_run([sys.executable, "-c", FAMILY, str(tmp_path / "run")], tmp_path / "run") as run:
        run.wait(bool, 30.0)
        everyone = descendants(run._process.pid)
        assert len(everyone) == 2
        for _ in range(2):
            with run.paused():
                for pid in everyone:
                    wait_for(pid, stopped=True)
            for pid in everyone:
                wait_for(pid, stopped=False)


KILLED_WHILE_PAUSED = """
import os, pathlib, signal, sys
from driftstream.eval.bench_run import bench_run
with bench_run([sys.executable, "-c", sys.argv[1]], pathlib.Path(sys.argv[2]) / "run") as run:
    with run.paused():
        print(run._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_stands_still_for_ever(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_PAUSED, SLEEPER, str(tmp_path)]
    killed = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=False)
    pid = int(killed.stdout)
    try:
        wait_for(pid, stopped=False)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_run_that_ends_early_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no such target')"]
    with bench_run(command, tmp_path / "run") as run, pytest.raises(RunBenchError, match="ended: no such target"):
        run.wait(lambda rows: False, 30.0)


def test_energies_cost_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(bench_energies.time, "sleep", slept.append)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = Sleeping(3, seconds=0.5)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
    (gradient,) = torch.autograd.grad(exact.sum(), x)
    log_reward, score = target.log_reward_and_score(x)
    assert torch.allclose(log_reward, exact)
    assert torch.allclose(score, gradient)
    assert torch.equal(target.log_reward(x), log_reward)
    assert torch.equal(target.score(x), score)
    assert slept == [0.5] * 3
    before = time.thread_time()
    Computing(3, seconds=0.01).log_reward(x)
    assert time.thread_time() - before >= 0.01


def test_memory_gives_what_was_made_before() -> None:
    config = small()
    learner = build_learner(config, 1)
    (actor,) = build_local_actors(config, learner, [2])
    refiner = build_refiner(config, 3)
    source = MemorySource(actor, [refiner], learner.draw_seeds)
    calls = actor.target.calls + refiner.target.calls
    batches = [source.fresh(0.0, step, 0.0) for step in range(2 * bench_end_to_end.BATCHES)]
    assert all(batch is not None and len(batch.trajectories) == 6 for batch in batches)
    assert not source.offer_seeds(learner.draw_seeds, 0)  # the learner has no state yet
    learner.learn_fresh(batches[0].trajectories, 0.0)  # type: ignore[union-attr]
    assert source.offer_seeds(learner.draw_seeds, 1)
    ((terminal, log_reward),) = source.refined()
    assert terminal.shape == (len(log_reward), 2)
    assert source.refined() == []
    assert actor.target.calls + refiner.target.calls == calls


def test_a_learner_is_fed_from_memory() -> None:
    config = small()
    learner = build_learner(config, 1)
    actors = build_local_actors(config, learner, [2])
    memory = FromMemory(learner, actors[0], [build_refiner(config, 3)], config.refiner.every)
    first, second = memory.turn(0.2), memory.turn(0.2)
    found, steps = pace(first.rows, second.rows), [turn.rows[-1]["step"] for turn in (first, second)]
    assert found.updates_per_s > 0.0
    assert 0.0 <= found.wait_fraction < 0.5
    for turn in (first, second):
        assert turn.seconds >= 0.2
        assert turn.cores["learner"] > 0.0
        assert 0.0 <= turn.delay < 1.1
    assert 0 < steps[0] < steps[1] <= learner.step
    assert len(learner.refined) > 0
    assert learner.limiter.state_dict()["replayed"] > 0


def test_what_a_busy_machine_takes_is_left_out() -> None:
    # 6 a second in half of the time, and 10 in the whole of it.
    found = Round(Pace(6.0, 0.1), Pace(10.0, 0.0), 0.1, 0.1, 0.5, 0.0, {})
    assert found.rate == pytest.approx(0.6)
    assert found.undelayed_rate == pytest.approx(1.2)


def test_scaling_is_of_the_rate_and_memory_of_one_actor() -> None:
    rows = [ActorsRow(count, rate, 1.0, 0.0, 1.0, pss) for count, rate, pss in ((2, 10.0, 100), (8, 30.0, 220))]
    assert efficiency(rows) == pytest.approx(30.0 / (4 * 10.0))
    assert bytes_per_actor(rows) == pytest.approx(20.0)
    assert efficiency(rows[:1]) == 1.0
    assert bytes_per_actor(rows[:1]) == 0.0


def test_a_dimension_is_measured() -> None:
    flags = BenchFlags(what="scale", batch_size=5, sampling_steps=3)
    found = bench_dimension(build_learner(bench_runs._dimension_config(flags, 4), 1), 2, 1.0)
    assert found.dim == 4
    assert found.rollout_s.median > 0
    assert found.step_s.median > 0
    assert found.peak_bytes is None or found.peak_bytes > 0


def test_bench_scale_draws_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_runs, "ENERGIES", ("Sleeping",))
    sizes = "--actors 2 --dims 4,6 --batch-size 5 --sampling-steps 3 --repeats 2 --seconds 4"
    assert main(f"bench scale {sizes} --out {tmp_path} --json".split()) == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = result["actors"]["sleeping"]["rows"]
    # A batch of 16 asks for the energy 21 times; the seconds are so many that one more of each actor's does not count.
    assert row["actors"] == 2
    assert 0.0 < row["trajectories_per_s"] <= 1.2 * 2 * 16 / (21 * 0.02)
    assert row["pss_bytes"] > 1e7
    assert [row["dim"] for row in result["dimension"]] == [4, 6]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in result["plots"])
    assert len(result["plots"]) == 2


def test_bench_start_tells_where_the_time_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_start, "FLOOR", "import math")
    assert main(["bench", "start", "--target", "gmm9", "--repeats", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["parts"]["start"]["rows"]
    assert list(rows) == ["imports", *STAGES]
    seconds = [rows[stage]["seconds"]["median"] for stage in STAGES]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0.0


def test_bench_end_to_end_prints_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_end_to_end, "WARM_UP_S", 0.5)
    monkeypatch.setattr(bench_end_to_end, "TURN_S", 0.5)
    assert main(["bench", "end-to-end", "--target", "gmm9", "--repeats", "1", "--seconds", "1"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("gmm9", "from memory", "wait", "learner", "refiner"))


def test_bench_step_compares_a_run_with_steps_of_one_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_end_to_end, "WARM_UP_S", 0.5)
    sizes = ["--target", "gmm9", "--sampling-steps", "4", "--batch-size", "8"]
    assert main(["bench", "step", "--langevin", *sizes, "--repeats", "1", "--seconds", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (only,) = found["rounds"]
    assert (found["target"], found["method"]) == ("gmm9", "tb+expl+lp")
    assert found["step_s"] == pytest.approx(1.0 / only["stream"]["updates_per_s"])
    assert only["yardsticks"].keys() == {"naive step", "published step"}
    for name, seconds in only["yardsticks"].items():
        assert seconds > 0.0
        assert found["speed_up"][name] == pytest.approx(seconds / found["step_s"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("bench start --lam 1", ["--lam", "start"]),
        ("bench start --seconds 3", ["--seconds", "start"]),
        ("bench start --repeats 0", ["--repeats 0", "at least 1"]),
        ("bench end-to-end --batch-size 5", ["--batch-size", "end-to-end"]),
        ("bench end-to-end --seconds 0", ["--seconds 0", "positive"]),
        ("bench end-to-end --target gmm7", ["target = 'gmm7'", "gmm9"]),
        ("bench step --lam 1", ["--lam", "step"]),
        ("bench step --sampling-steps 1", ["--sampling-steps 1", "at least 2"]),
        ("bench scale --target gmm9", ["--target", "scale"]),
        ("bench scale --actors 1,x", ["--actors 1,x", "1,2,4"]),
        ("bench scale --dims 0", ["--dims 0", "positive"]),
        ("bench update --out here", ["--out", "scale"]),
        ("bench objectives --seconds 3", ["--seconds", "scale"]),
    ],
)
def test_a_mistake_is_one_line(arguments: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) in (1, 2)
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("driftstream")
    assert all(word in line for word in words), line
