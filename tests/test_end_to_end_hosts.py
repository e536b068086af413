"""A run and a host that joins it in two network namespaces, with a wire between them that can be cut."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(240)
DRIFTSTREAM = str(Path(sys.executable).with_name("driftstream"))


@dataclass
class Wire:
    """A second host as a network namespace, and the addresses at both ends of the wire to it."""

    namespace: str
    device: str
    here: str
    there: str

    def command(self, *words: str | Path) -> list[str]:
        """A command, to be run on the other host."""
        return ["ip", "netns", "exec", self.namespace, *map(str, words)]

    def set(self, state: str) -> None:
        """Cut ("down") or mend ("up") the wire."""
        subprocess.run(["ip", "link", "set", self.device, state], check=True)


@pytest.fixture
def wire() -> Iterator[Wire]:
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command (iproute2) here")
    pid = os.getpid()
    network = f"10.213.{pid % 250}"
    wire = Wire(f"driftstream-{pid}", f"ds{pid}a", f"{network}.1", f"{network}.2")
    far = f"ds{pid}b"
    steps = [
        ["ip", "netns", "add", wire.namespace],
        ["ip", "link", "add", wire.device, "type", "veth", "peer", "name", far, "netns", wire.namespace],
        ["ip", "address", "add", f"{wire.here}/30", "dev", wire.device],
        ["ip", "link", "set", wire.device, "up"],
        wire.command("ip", "address", "add", f"{wire.there}/30", "dev", far),
        wire.command("ip", "link", "set", far, "up"),
        wire.command("ip", "link", "set", "lo", "up"),
    ]
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        yield wire
    finally:
        subprocess.run(["ip", "netns", "delete", wire.namespace], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", wire.device], capture_output=True, check=False)


STRANGER = """
import sys, time, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
socket.send(b"x")
time.sleep(1.0)
socket.close(linger=0)
"""


def test_an_encrypted_run_on_two_hosts_outlives_a_cut_wire(
    wire: Wire, train: Callable[..., Any], tmp_path: Path
) -> None:
    flags = ["--stream.transport", "tcp", "--stream.host", wire.here]
    training = train("gmm25", "--minutes", "5", *flags, "--out", "{root}")
    invitation = training.root / "keys" / "join.toml"
    training.wait_for(invitation.exists)
    copy = tmp_path / "join.toml"
    shutil.copy(invitation, copy)  # with its mode, as scp -p does
    output = tmp_path / "join.txt"
    words = wire.command(DRIFTSTREAM, "join", copy, "--actors", "langevin:1", "--out", tmp_path / "joined")
    with output.open("wb") as file:
        host = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)

    def share() -> list[float]:
        """The joined actor's share of the learner's batches, report by report."""
        return [row["kind/langevin/share"] for row in training.rows() if "kind/langevin/share" in row]

    try:
        training.wait_for(lambda: any(share()), 90)
        wire.set("down")
        cut = len(share())
        time.sleep(5.0)
        wire.set("up")
        training.wait_for(lambda: any(share()[cut + 2 :]), 60)

        log = training.root / "logs" / "learner.log"
        address = re.search(rf"tcp://{wire.here}:\d+", (invitation.read_text()))
        assert address is not None
        subprocess.run(wire.command(sys.executable, "-c", STRANGER, address[0]), check=True, timeout=60)
        refused = [log, training.output]  # the learner's sockets speak in its log, the supervisor's on the screen
        training.wait_for(lambda: any("is refused: it has no key" in path.read_text() for path in refused))

        training.process.send_signal(2)
        assert training.end(60) == 130, training.text()
        assert host.wait(30) == 0, output.read_text()
        assert "the run has ended" in output.read_text()
    finally:
        host.kill()
        host.wait()
    assert max(row.get("stream/rejected", 0) for row in training.rows()) == 0
    assert re.search(r"langevin-0@\S+", "".join(name for row in training.rows() for name in row))
