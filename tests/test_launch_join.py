"""Hosts that join a run: what they bring, how they end, and what becomes of those that were not invited."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

import driftstream.launch.join as joining
from driftstream.buffers.channels import StreamConfig
from driftstream.buffers.control import LINK, ControlClient, Report
from driftstream.buffers.keys import make_keys, read_client_keys, write_client_keys, write_private
from driftstream.envs.errors import ConfigError
from driftstream.eval.monitor import MonitorConfig
from driftstream.launch.config import RunConfig, as_dict, resolve
from driftstream.launch.flags import CommandError, JoinFlags, UsageError
from driftstream.launch.hosts import JoinedHosts, RoleKinds, joined_name
from driftstream.launch.invitation import Invitation, read_invitation
from driftstream.launch.join import _configure as configure_host
from driftstream.launch.join import choose_kinds, host_name
from driftstream.launch.plan import SupervisorConfig

pytestmark = pytest.mark.timeout(180)
DRIFTSTREAM = str(Path(sys.executable).with_name("driftstream"))
SCRIPT = Path(__file__).parent / "join_roles.py"
PATIENCE_S = 60.0


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


class Process:
    """A command with its output."""

    def __init__(self, output: Path, *command: str) -> None:
        self.output = output
        with output.open("wb") as file:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def text(self) -> str:
        return self.output.read_text()

    def says(self, *words: str, seconds: float = PATIENCE_S) -> str:
        """The first line that holds all the words, once it is there."""
        end = time.monotonic() + seconds
        while True:
            for line in self.text().splitlines():
                if all(word in line for word in words):
                    return line
            assert time.monotonic() < end, f"no {words} in:\n{self.text()}"
            time.sleep(0.02)

    def end(self, seconds: float = PATIENCE_S) -> int:
        return self.process.wait(seconds)

    def family(self) -> list[psutil.Process]:
        return [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]


class Cluster:
    """A run of tiny roles, and hosts that join it."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.root = folder, folder / "run"
        self.started: list[Process] = []
        (folder / "config.toml").write_text(tomli_w.dumps(config))
        self.run = self._start("run", "run", str(self.root), str(folder / "config.toml"))
        for name in ("learner", "actor-0", "refiner-0", "evaluator"):
            self.run.says(f"{name} runs")
        self.invitation = self.root / "keys" / "join.toml"

    def join(self, file: Path | None = None, role: str = "obey", actors: int = 1) -> Process:
        name = f"host{len(self.started)}"
        return self._start(name, "join", str(file or self.invitation), str(self.folder / name), role, str(actors))

    def _start(self, name: str, *arguments: str) -> Process:
        process = Process(self.folder / f"{name}.txt", sys.executable, str(SCRIPT), *arguments)
        self.started.append(process)
        return process

    def finish(self) -> None:
        (self.root / "enough").touch()
        assert self.run.end() == 0, self.run.text()

    def close(self) -> None:
        for process in self.started:
            if process.process.poll() is None:
                for member in process.family():
                    member.kill()
                process.process.wait(10)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """A run's configuration that lets others join."""
    settings = SupervisorConfig(heartbeat_s=0.2, heartbeat_timeout_s=3.0, max_restarts=2, restart_delay_s=0.05)
    stream = StreamConfig(transport="tcp", encrypted=True)
    config = RunConfig(monitor=MonitorConfig(wandb="disabled"), supervisor=settings, stream=stream)
    return as_dict(resolve(config))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Iterator[Cluster]:
    """A run that outlives the hosts of several tests."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), config)
    try:
        yield made
        assert made.run.process.poll() is None, made.run.text()
        made.finish()
    finally:
        made.close()


@pytest.fixture
def short_cluster(tmp_path: Path, config: dict[str, Any]) -> Iterator[Cluster]:
    """A run that a test may end."""
    made = Cluster(tmp_path, config)
    yield made
    made.close()


def host_of(process: Process) -> str:
    """The host's name in the run, once its actor is in its loop."""
    return process.says("actor-explore-0@", "runs").partition("@")[2].split()[0]


def seeds(*directories: Path) -> list[str]:
    logs = [log.read_text() for directory in directories for log in (directory / "logs").iterdir()]
    return [seed for text in logs for seed in re.findall(r"seed (\d+)", text)]


def test_joined_roles_work_until_the_run_ends(short_cluster: Cluster) -> None:
    cluster = short_cluster
    first, second = cluster.join(actors=2), cluster.join()
    names = {host_of(first), host_of(second)}
    first.says("actor-explore-1@", "runs")
    assert len(names) == 2
    lines = [line for line in cluster.run.text().splitlines() if " joined: " in line]
    assert sorted(line.count("actor-explore") for line in lines) == [1, 2]
    cluster.finish()
    assert (first.end(), second.end()) == (0, 0), first.text()
    for name in names:
        cluster.run.says(f"{name} left: as the run ended")
    directories = [cluster.root, cluster.folder / "host1", cluster.folder / "host2"]
    assert len(seeds(*directories)) == len(set(seeds(*directories))) == 4 + 3
    logs = [log.stem for directory in directories for log in (directory / "logs").iterdir()]
    assert len(logs) == len(set(logs)) == 4 + 3


def test_a_run_waits_a_while_for_the_last_words_of_a_host(short_cluster: Cluster, tmp_path: Path) -> None:
    invitation = read_invitation(short_cluster.invitation)
    write_client_keys(tmp_path / "keys", invitation.keys)
    with ControlClient(invitation.endpoints(tmp_path / "keys")["control"], f"{LINK}slow") as link:
        link.report("join", {"roles": [joined_name("actor", "explore", 0, "slow")]})
        short_cluster.run.says("slow joined: actor-explore-0")
        (short_cluster.root / "enough").touch()
        assert link.stop.wait(PATIENCE_S)
        time.sleep(2.0)  # this run's own processes have ended by then
        link.report("leave", {"text": "at last"})
        assert short_cluster.run.end() == 0
    short_cluster.run.says("slow left: at last")


def test_a_host_ends_when_its_run_is_gone(short_cluster: Cluster) -> None:
    host = short_cluster.join()
    host_of(host)
    family = host.family()
    for member in short_cluster.run.family():
        member.kill()
    assert host.end() == 1
    assert "the run has been silent for 3 s" in host.text().splitlines()[-1]
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_a_joined_role_that_dies_is_started_again_there_and_the_run_hears_of_it(cluster: Cluster) -> None:
    host = cluster.join()
    directory = cluster.folder / host.output.stem
    name = f"actor-explore-0@{host_of(host)}"
    (pid,) = (p.pid for p in host.family() if f"driftstream {name}" in " ".join(p.cmdline()))
    os.kill(pid, signal.SIGKILL)
    for side in (host, cluster.run):
        side.says(f"{name} ended: killed by SIGKILL", "restarted")
    wait_for(lambda: len(set(seeds(directory))) == 2)
    host.process.send_signal(signal.SIGTERM)
    assert host.end() == 130


def test_joined_roles_that_the_learner_drops_are_started_again_there(cluster: Cluster) -> None:
    host = cluster.join(actors=2)
    directory = cluster.folder / host.output.stem
    host_name = host_of(host)
    host.says("actor-explore-1@", "runs")
    names = [f"actor-explore-{index}@{host_name}" for index in range(2)]
    draft = cluster.root / "drop.partial"
    draft.write_text("\n".join(names))
    draft.rename(cluster.root / "drop")
    for name in names:
        cluster.run.says(f"{name} dropped by the learner: 10 messages in a row refused")
        for side in (host, cluster.run):
            side.says(f"{name} ended: dropped by the learner", "restarted")
    wait_for(lambda: len(set(seeds(directory))) == 4)
    host.process.send_signal(signal.SIGTERM)
    assert host.end() == 130


def test_a_host_beyond_its_restarts_fails_and_the_run_goes_on(cluster: Cluster) -> None:
    host = cluster.join(role="actor_fails")
    assert host.end() == 1
    assert "no luck; given up after 3 starts" in host.text().splitlines()[-1]
    cluster.run.says("left: actor-explore-0@", "no luck; given up after 3 starts")


def test_an_interrupt_ends_a_host_soon_and_the_run_goes_on(cluster: Cluster) -> None:
    host = cluster.join()
    name = host_of(host)
    family = host.family()
    host.process.send_signal(signal.SIGINT)
    assert host.end(10) == 130
    assert not psutil.wait_procs(family, timeout=5)[1]
    cluster.run.says(f"{name} left: interrupted")


def test_a_killed_host_leaves_nothing_behind_and_is_noted(cluster: Cluster) -> None:
    host = cluster.join()
    name = host_of(host)
    family = host.family()
    host.process.kill()
    cluster.run.says(f"{name}: silent for")
    assert not psutil.wait_procs(family, timeout=15)[1]


@pytest.mark.parametrize("wrong", ["client", "server"])
def test_a_host_with_a_wrong_key_is_told_so_and_so_is_the_run(cluster: Cluster, tmp_path: Path, wrong: str) -> None:
    make_keys(tmp_path / "other")
    table = tomllib.loads(cluster.invitation.read_text())
    stranger = read_client_keys(tmp_path / "other")
    changes = {"public": stranger.public, "secret": stranger.secret}
    reason = "refuses the key of this client: it is not one of the run's"
    if wrong == "server":
        changes, reason = {"server": stranger.server}, "breaks off every handshake: it is another run's"
    write_private(tmp_path / "join.toml", tomli_w.dumps(table | {"keys": table["keys"] | changes}))
    before = cluster.run.text().count(" joined: ")
    host = cluster.join(tmp_path / "join.toml")
    assert host.end() == 1
    last = host.text().splitlines()[-1]
    assert reason in last
    assert table["addresses"]["control"] in last
    if wrong == "client":
        cluster.run.says("a connection from 127.0.0.1 is refused: its key is not one of this run's")
    else:
        cluster.run.says("is refused: it has no key, or does not know this run's")
    assert cluster.run.text().count(" joined: ") == before


# Invitations, without a run


@pytest.fixture
def table(tmp_path: Path, config: dict[str, Any]) -> dict[str, Any]:
    make_keys(tmp_path / "keys")
    addresses = {name: f"tcp://10.9.9.9:{5000 + i}" for i, name in enumerate(("stream", "weights", "ema_weights"))}
    addresses["control"] = "tcp://10.9.9.9:5003"
    return {"addresses": addresses, "keys": read_client_keys(tmp_path / "keys").as_table(), "config": config}


def write(path: Path, table: dict[str, Any], mode: int = 0o600) -> Path:
    write_private(path, tomli_w.dumps(table))
    path.chmod(mode)
    return path


def test_an_invitation_that_others_can_read_is_refused(tmp_path: Path, table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"mode 0600, not 0640 \(chmod 600"):
        read_invitation(write(tmp_path / "join.toml", table, 0o640))
    invitation = read_invitation(write(tmp_path / "other.toml", table))
    assert invitation.endpoints(Path("/k"))["control"] == "tcp://10.9.9.9:5003?keys=/k"
    assert table["keys"]["secret"] not in repr(invitation)


def test_what_is_no_invitation_is_refused(tmp_path: Path, table: dict[str, Any]) -> None:
    changes: list[dict[str, Any]] = [
        {"addresses": {}},
        {"addresses": 3},
        {"config": "x"},
        {"keys": []},
        {"keys": {}},
        {"keys": table["keys"] | {"secret": "x" * 40}},
        {"addresses": table["addresses"] | {"stream": "ipc:///tmp/x"}},
        {"addresses": table["addresses"] | {"stream": "tcp://10.9.9.9:5000?keys=/x"}},
        {"addresses": table["addresses"] | {"stream": "tcp://10.9.9.9:99999"}},
    ]
    for n, change in enumerate(changes):
        with pytest.raises(ConfigError):
            read_invitation(write(tmp_path / f"join{n}.toml", table | change))


def test_code_that_is_not_on_this_host_is_named(tmp_path: Path, table: dict[str, Any]) -> None:
    config = table["config"] | {"target": "/elsewhere/mine.py:Ring"}
    file = write(tmp_path / "join.toml", table | {"config": config})
    words = [DRIFTSTREAM, "join", str(file), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "target = '/elsewhere/mine.py:Ring': expected an existing file" in done.stderr
    assert "must be on this host, at the same place" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--actors", "./mine.py:Mine:2"], r"mine\.py.*an existing file.*must be on this host"),
        (["--actors", "nonsense:1"], r"nonsense.*must be on this host"),
        (["--refiners", "nonsense:1"], r"nonsense.*must be on this host"),
        (["--actors", "teacher:1"], "no teacher, as the run has none"),
    ],
)
def test_kinds_that_this_host_cannot_run_are_named(
    table: dict[str, Any], tmp_path: Path, flags: list[str], reason: str
) -> None:
    file = write(tmp_path / "join.toml", table)
    with pytest.raises(ConfigError, match=reason):
        configure_host([str(file), *flags], "driftstream join")


def test_a_hosts_configuration_is_the_runs_with_its_own_roles(table: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path / "join.toml", table)
    made = tomllib.loads(configure_host([str(file), "--actors", "langevin:2", "--refiners", "1"], "driftstream join"))
    assert made["actor"]["kinds"] == {"langevin": 2}
    assert made["refiner"]["kinds"] == {"mala": 1}
    assert made["device"] == "cpu"
    changed = {"actor", "refiner", "device"}
    rest = {name: part for name, part in made.items() if name not in changed}
    assert rest == {name: part for name, part in tomllib.loads(tomli_w.dumps(table["config"])).items() if name in rest}
    assert table["keys"]["secret"] not in tomli_w.dumps(made)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"actor": {"explore": 1}, "refiner": {}}),
        ({"actors": "4"}, {"actor": {"explore": 4}, "refiner": {}}),
        ({"refiners": "2"}, {"actor": {}, "refiner": {"mala": 2}}),
        (
            {"actors": "langevin:2,explore", "refiners": "hmc"},
            {"actor": {"langevin": 2, "explore": 1}, "refiner": {"hmc": 1}},
        ),
    ],
)
def test_a_number_takes_the_runs_kinds(
    table: dict[str, Any], tmp_path: Path, flags: dict[str, str], expected: dict[str, dict[str, int]]
) -> None:
    invitation = read_invitation(write(tmp_path / "join.toml", table))
    assert choose_kinds(JoinFlags(Path("x"), **flags), invitation) == expected  # type: ignore[arg-type]


def test_what_cannot_join_is_refused(table: dict[str, Any], tmp_path: Path) -> None:
    invitation = read_invitation(write(tmp_path / "join.toml", table))
    with pytest.raises(UsageError, match="nothing to run"):
        choose_kinds(JoinFlags(Path("x"), actors="0"), invitation)
    several = {**invitation.config, "actor": {"kinds": {"explore": 2, "teacher": 1}}}
    with pytest.raises(ConfigError, match=r"explore:2,teacher:1"):
        choose_kinds(JoinFlags(Path("x"), actors="5"), Invitation("r", {}, invitation.keys, several))
    on_policy = {**invitation.config, "data": "on_policy"}
    with pytest.raises(ConfigError, match="whose actors stream"):
        choose_kinds(JoinFlags(Path("x")), Invitation("r", {}, invitation.keys, on_policy))


def test_a_run_that_is_not_there_is_not_waited_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "FIRST_ANSWER_S", 0.3)
    make_keys(tmp_path / "keys")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        control = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    endpoint = f"{control}?keys={tmp_path}/keys"
    with ControlClient(endpoint, "join@h") as link, pytest.raises(CommandError, match=f"no answer from {control} with"):
        joining.wait_for_run(link, endpoint)


# Names, and what hosts may say


def test_names_do_not_collide_and_tell_the_kind() -> None:
    assert len({host_name() for _ in range(50)}) == 50
    host = host_name()
    kinds = RoleKinds({"actor-0": "explore"})
    assert kinds["actor-0"] == "explore"
    assert kinds[joined_name("actor", "my-kind", 3, host)] == "my-kind"
    assert kinds.get("nobody", "nobody") == "nobody"
    with pytest.raises(ConfigError, match="a shorter kind"):
        joined_name("actor", "x" * 60, 0, host)


class Ear:
    """The hosts of a run, with what they make it say and do."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.figures: dict[str, float] = {}
        self.events: list[str] = []
        self.hosts = JoinedHosts(
            lambda name, text: self.sent.append((name, text)),
            self.figures.update,
            lambda text, style: self.events.append(text),
            silence_s=5.0,
        )

    def hear(self, kind: str, payload: dict[str, Any], now: float = 0.0, role: str = "join@h") -> None:
        self.hosts.take(Report(role, kind, payload), now)


def test_a_host_speaks_for_its_own_roles_only() -> None:
    ear = Ear()
    ear.hear("metrics", {"metrics": {"actor/explore-0@h/x": 1.0}})
    assert ear.figures == {}
    ear.hear("join", {"roles": ["actor-explore-0@h"]})
    own = {"actor/explore-0@h/trajectories_per_s": 2, "refiner/mala-1@h/step_size": 0.5}
    other = {
        "train/loss": 1.0,
        "actor/0/trajectories_per_s": 1.0,
        "actor/explore-0@g/x": 1.0,
        "actor/a@h/b/c": 1.0,
        "actor/explore-0@h/text": "x",
        "actor/explore-0@h/flag": True,
    }
    ear.hear("metrics", {"metrics": other | own})
    assert ear.figures == own


@pytest.mark.parametrize("payload", [{}, {"roles": 3}, {"roles": ["learner"]}, {"roles": [["actor-a-0@h"]]}])
def test_a_host_that_does_not_say_what_it_runs_is_ignored(payload: dict[str, Any]) -> None:
    ear = Ear()
    ear.hear("join", payload)
    for kind in ("metrics", "event", "leave", "heartbeat", "status", "final", "error"):
        ear.hear(kind, {"text": "x", "metrics": {"train/loss": 1.0}})
    assert ear.events == []
    assert ear.figures == {}


def test_what_hosts_say_cannot_write_over_the_screen() -> None:
    ear = Ear()
    ear.hear("join", {"roles": ["actor-explore-0@h"]})
    ear.hear("event", {"text": "\x1b[2J\n" + "x" * 5000})
    assert ear.events[-1].startswith("h:  [2J x")
    assert len(ear.events[-1]) < 1100


def test_silence_is_noted_once_and_pauses_are_excused() -> None:
    ear = Ear()
    ear.hear("join", {"roles": ["actor-explore-0@h"]}, now=0.0)
    ear.hosts.check(4.0)
    ear.hosts.excuse(100.0)
    ear.hosts.check(104.0)
    assert len(ear.events) == 1
    ear.hosts.check(106.0)
    ear.hosts.check(107.0)
    ear.hear("heartbeat", {}, now=108.0)
    assert ear.events[1:] == ["h: silent for 6 s", "h is back"]


def test_hosts_are_told_to_stop_those_that_join_later_too() -> None:
    ear = Ear()
    ear.hear("join", {"roles": ["actor-explore-0@h"]})
    ear.hosts.stop()
    ear.hear("join", {"roles": ["actor-explore-0@g"]}, role="join@g")
    assert ear.sent == [("join@h", "stop"), ("join@g", "stop")]
    ear.hear("leave", {"text": "as the run ended"})
    ear.hosts.check(1e9)
    assert [text for text in ear.events if text.startswith("h")] == [
        "h joined: actor-explore-0",
        "h left: as the run ended",
    ]


# The whole system


def test_real_actors_and_refiners_join_a_run(train: Callable[..., Any], tmp_path: Path) -> None:
    flags = ["--stream.transport", "tcp", "--stream.encrypted", "True", "--stream.max-staleness", "200"]
    training = train("gmm25", "--minutes", "5", *flags, "--out", "{root}", wandb="offline")
    invitation = training.root / "keys" / "join.toml"
    training.wait_for(invitation.exists)
    secrets = [tomllib.loads(path.read_text())["secret"] for path in invitation.parent.glob("*.key")]
    assert len(secrets) == 3
    words = [DRIFTSTREAM, "join", str(invitation), "--actors", "langevin:1", "--refiners", "mala:1"]
    host = Process(tmp_path / "join.txt", *words, "--out", str(tmp_path / "joined"))
    expected = (
        r"actor/langevin-0@[^/]+/trajectories_per_s",
        r"refiner/mala-0@[^/]+/acceptance_rate",
        *("kind/langevin/share", "kind/explore/share"),
    )

    def reported() -> bool:
        names = {name for row in training.rows() for name in row}
        return all(any(re.fullmatch(each, name) for name in names) for each in expected)

    try:
        training.wait_for(lambda: " joined: actor-langevin-0, refiner-mala-0" in training.text())
        training.wait_for(reported)
        training.process.send_signal(signal.SIGINT)
        assert training.end() == 130, training.text()
        assert host.end() == 0, host.text()
    finally:
        host.process.kill()
    assert not invitation.exists()
    # No secret lies anywhere but in keys/: not in the configuration, the logs, the metrics or W&B's files.
    for directory in (training.root, tmp_path / "joined"):
        files = [path for path in directory.rglob("*") if path.is_file() and path.parent != directory / "keys"]
        assert files
        for path in files:
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets), path
    assert any("wandb" in path.parts for path in training.root.rglob("*"))
