"""Run directories and seeds."""

import shutil
from datetime import datetime
from pathlib import Path

import pytest

from driftstream.buffers.channels import StreamConfig
from driftstream.buffers.keys import read_server_keys
from driftstream.envs.errors import ConfigError
from driftstream.launch.run_directory import RunDirectory, default_root
from driftstream.launch.seeding import derive_seed


def test_seeds_are_distinct_and_stay_what_they_are() -> None:
    coordinates = [
        (seed, role, index, restart)
        for seed in range(3)
        for role in ("learner", "actor", "refiner")
        for index in range(3)
        for restart in range(3)
    ]
    seeds = [derive_seed(*each) for each in coordinates]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "actor", 1, 2) == 5391610135222188906


def test_a_new_run_is_private(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "deep" / "run")
    assert run.root.stat().st_mode & 0o777 == 0o700


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--resume.*--out"):
        RunDirectory.create(tmp_path / "run")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="a directory that can be written"):
        RunDirectory.create(tmp_path / "run")


def test_opening_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml"):
        RunDirectory.open(tmp_path)


def test_one_process_holds_a_run_and_launches_are_counted(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    with run.hold() as launch:
        assert launch == 0
        with pytest.raises(ConfigError, match="held"), RunDirectory(run.root).hold():
            pass
        assert set(run.addresses()) == {"stream", "weights", "ema_weights", "control"}
    with run.hold() as launch:
        assert launch == 1


def test_sockets_of_a_long_path_move_elsewhere(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / ("long" * 30))
    with run.hold():
        address = run.addresses()["ema_weights"].removeprefix("ipc://")
        assert len(address) <= 107
        assert Path(address).parent.stat().st_mode & 0o777 == 0o700
    assert not Path(address).parent.exists()


def test_tcp_addresses_are_free_ports_and_control_stays_local(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    with run.hold(StreamConfig(transport="tcp")):
        addresses = run.addresses()
    assert not run.keys.exists()
    assert addresses.pop("control").startswith("ipc://")
    assert all(address.startswith("tcp://127.0.0.1:") for address in addresses.values())
    assert len(set(addresses.values())) == 3


def test_encrypted_addresses_name_the_runs_keys_which_stay_with_it(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    stream = StreamConfig(transport="tcp", encrypted=True)
    with run.hold(stream):
        addresses = run.addresses()
        keys = read_server_keys(run.keys)
        assert keys.secret not in (run.sockets / "addresses.json").read_text()
    assert len(set(addresses.values())) == 4
    for address in addresses.values():
        assert address.startswith("tcp://127.0.0.1:")
        assert address.endswith(f"?keys={run.keys}")
    with run.hold(stream):
        assert read_server_keys(run.keys) == keys
    run.keys.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0700, not 0755"), run.hold(stream):
        pass


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    with (
        pytest.raises(ConfigError, match=r"stream\.host = '203\.0\.113\.1': expected an address of this machine"),
        run.hold(StreamConfig(transport="tcp", host="203.0.113.1")),
    ):
        pass


def test_default_directories_name_target_method_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    now = datetime(2026, 1, 2, 3, 4, 5)
    first = default_root("gmm25", "tb+expl", now)
    assert first == Path("runs/gmm25-tb+expl-20260102-030405")
    first.mkdir(parents=True)
    assert default_root("gmm25", "tb+expl", now) == Path("runs/gmm25-tb+expl-20260102-030405-2")
    assert default_root("./my dir/mine.py:Ring", "./own.toml", now).name.startswith("Ring-own-")


def test_a_removed_directory_is_held_again_with_its_count(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    with run.hold() as before:
        shutil.rmtree(run.root)
        run.root.mkdir()
        run.lock_again()
        run.lock_again()
        with pytest.raises(ConfigError, match="held"), RunDirectory(run.root).hold():
            pass
    with RunDirectory(run.root).hold() as after:
        assert (before, after) == (0, 1)
