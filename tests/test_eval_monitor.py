"""The JSONL always, and the real wandb: offline, unreachable, raising and hanging."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import wandb

from driftstream.envs.errors import ConfigError
from driftstream.envs.targets import make_target
from driftstream.eval.monitor import Monitor, MonitorConfig, resolve_mode
from driftstream.eval.plots import plot_samples

WandbRun = tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], Any]
KEY = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = MonitorConfig(wandb="offline", project="tests", name="a-run", tags=("one", "two"))

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def services() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "wandb-core" in child.name() and child.status() != psutil.STATUS_ZOMBIE]


def json_rows(run_dir: Path) -> list[dict[str, Any]]:
    def no_constant(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant) for line in lines]


def test_offline_run_holds_metrics_images_and_configuration(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, read_wandb: Callable[[Path], WandbRun]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monitor = Monitor(run_dir, OFFLINE, {"target": {"name": "gmm9"}, "seed": 7})
    # Roles report out of order: neither row may be lost.
    for step in (10, 30, 20):
        monitor.log({"train/loss": 1.5 * step, "eval/khat": float("nan")}, step, step / 10, 300 * step)
    image = plot_samples(make_target("gmm9"), torch.zeros(10, 2), run_dir / "plots" / "samples.png")
    monitor.log_images({"plots/samples": image})
    monitor.summary({"eval/w2": 1.25})
    monitor.close(timeout_s=60)
    assert services() == []

    history, config, summary, run = read_wandb(run_dir)
    assert [(row["step"], row["train/loss"]) for row in history if "train/loss" in row] == [
        (10, 15.0),
        (30, 45.0),
        (20, 30.0),
    ]
    assert all("eval/khat" not in row for row in history)
    assert history[0]["energy_evaluations"] == 3000
    (image_row,) = [row for row in history if any(key.startswith("plots/samples") for key in row)]
    assert image_row["step"] == 20
    assert list(run_dir.glob("wandb/offline-run-*/files/media/images/plots/*.png"))
    assert config["target"] == {"name": "gmm9"}
    assert config["seed"] == 7
    assert summary["eval/w2"] == 1.25
    assert (run.project, run.display_name, list(run.tags)) == ("tests", "a-run", ["one", "two"])
    assert not [path for path in run_dir.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_jsonl_rows_are_flat_json_and_there_at_once(run_dir: Path) -> None:
    monitor = Monitor(run_dir, MonitorConfig(wandb="disabled"), {})
    values = {"a/nan": float("nan"), "a/inf": float("-inf"), "a/tensor": torch.tensor(0.5), "a/int": 3}
    monitor.log(values, step=1, wall_s=0.5, energy_evaluations=300)  # type: ignore[arg-type]
    expected = {"step": 1, "wall_s": 0.5, "energy_evaluations": 300}
    expected |= {"a/nan": None, "a/inf": None, "a/tensor": 0.5, "a/int": 3}
    assert json_rows(run_dir) == [expected]
    monitor.log_images({"plots/samples": run_dir / "missing.png"})
    monitor.summary({"eval/w2": 1.0})
    monitor.close()
    monitor.close()
    assert not (run_dir / "wandb").exists()


def test_a_resumed_run_goes_on_in_the_same_files(run_dir: Path) -> None:
    for step in (1, 2):
        monitor = Monitor(run_dir, OFFLINE, {})
        monitor.log({"train/loss": 1.0}, step, 0.0, 0)
        monitor.close(timeout_s=60)
    assert [row["step"] for row in json_rows(run_dir)] == [1, 2]
    assert len({path.name for path in run_dir.glob("wandb/offline-run-*/*.wandb")}) == 1


def check_run_goes_on(run_dir: Path, config: MonitorConfig, rows: int = 50, timeout_s: float = 5.0) -> None:
    monitor = Monitor(run_dir, config, {})
    for step in range(rows):
        monitor.log({"train/loss": 1.0}, step, 0.0, 0)
    monitor.log_images({"plots/samples": run_dir / "missing.png"})
    monitor.close(timeout_s)
    assert [row["step"] for row in json_rows(run_dir)] == list(range(rows))


def test_online_without_a_key_is_one_warning_and_no_question(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_run_goes_on(run_dir, MonitorConfig(wandb="online"))
    assert "run `wandb login`" in caplog.text
    assert services() == []


def broken_init(**options: Any) -> None:
    raise RuntimeError("no W&B today")


def test_wandb_that_raises_is_one_warning(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb, "init", broken_init)
    check_run_goes_on(run_dir, OFFLINE)
    (record,) = [record for record in caplog.records if record.name.startswith("driftstream")]
    assert record.levelno == logging.WARNING
    assert "RuntimeError: no W&B today" in record.message
    assert services() == []


def test_a_missing_image_is_left_out_and_a_broken_one_is_one_warning(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_run_goes_on(run_dir, OFFLINE, timeout_s=60)
    assert not [record for record in caplog.records if record.name.startswith("driftstream")]
    monitor = Monitor(run_dir, OFFLINE, {})
    (run_dir / "broken.png").write_bytes(b"not a picture")
    monitor.log_images({"plots/samples": run_dir / "broken.png"})
    monitor.close(timeout_s=60)
    assert [record.levelno for record in caplog.records if record.name.startswith("driftstream")] == [30]
    assert services() == []


def hang(release: threading.Event) -> Callable[..., None]:
    def init(**options: Any) -> None:
        release.wait()
        raise RuntimeError("released")

    return init


def test_wandb_that_hangs_blocks_nothing_and_drops_are_counted(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    monkeypatch.setattr(wandb, "init", hang(release))
    # The end of the test is bounded by close(), not by the hanging call.
    check_run_goes_on(run_dir, OFFLINE, rows=3_000, timeout_s=2.0)
    assert services() == []
    assert json_rows(run_dir)[-1]["monitor/dropped"] == 1_999
    assert "did not finish" in caplog.text
    release.set()


def test_a_row_that_wandb_takes_slowly_holds_nobody(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B starts as it should, and then is slow."""
    taken, release = threading.Event(), threading.Event()

    def log(run: wandb.Run, row: dict[str, Any]) -> None:
        taken.set()
        release.wait(3.0)

    monkeypatch.setattr(wandb.Run, "log", log)
    monitor = Monitor(run_dir, OFFLINE, {})
    monitor.log({"train/loss": 1.0}, 0, 0.0, 0)
    assert taken.wait(60)
    start = time.monotonic()
    for step in range(1, 6):
        monitor.log({"train/loss": 1.0}, step, 0.0, 0)
    assert time.monotonic() - start < 1.0
    assert [row["step"] for row in json_rows(run_dir)] == list(range(6))
    release.set()
    monitor.close(timeout_s=60)


def test_auto_looks_for_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolve_mode("auto") == "offline"
    assert resolve_mode("disabled") == "disabled"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n login user\n password {KEY}\n")
    assert resolve_mode("auto") == "online"
    assert resolve_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine\n")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode("auto") == "offline"


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^monitor\.wandb = 'cloud'"):
        MonitorConfig(wandb="cloud")  # type: ignore[arg-type]
