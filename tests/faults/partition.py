"""A learner's stream and an actor on two hosts (network namespaces) whose link goes down for a while.

`unshare --user --map-root-user --net python partition.py DIRECTORY SECONDS` prints what became of it, as JSON. The
actor is this script again, in a namespace of its own: `python partition.py DIRECTORY SECONDS actor`.
"""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from driftstream.buffers.channels import StreamClient, StreamConfig, StreamServer
from driftstream.buffers.keys import make_keys
from driftstream.buffers.sockets import with_keys

LEARNER, ACTOR, PORT = "10.113.7.1", "10.113.7.2", 7117
CONFIG = StreamConfig(transport="tcp", host=LEARNER)
PATIENCE_S = 60.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def endpoint(directory: Path) -> str:
    return with_keys(f"tcp://{LEARNER}:{PORT}", directory / "keys")


def batch(value: int) -> dict[str, torch.Tensor]:
    log_reward = torch.full((50,), float(value))
    return {"states": torch.zeros(50, 11, 2), "times": torch.linspace(0, 1, 11), "log_reward": log_reward}


def act(directory: Path) -> None:
    """Send numbered batches until the learner has had enough; say which of them were acknowledged."""
    while "actor0" not in [name for _, name in socket.if_nameindex()]:
        time.sleep(0.02)
    ip("addr", "add", f"{ACTOR}/24", "dev", "actor0")
    ip("link", "set", "actor0", "up")
    made = 0
    with StreamClient(endpoint(directory), "actor-0", 0, CONFIG) as client:
        while not (directory / "enough").exists():
            if client.wait_for_credit(0.2) is not None:
                client.send("trajectories", batch(made), 0)
                made += 1
        client.flush(10.0)
        print(made - client.unacknowledged)


def learn(directory: Path, seconds: float) -> dict[str, float]:
    """Take batches, let the link go down and up again, and take some more."""
    make_keys(directory / "keys")
    command = [sys.executable, __file__, str(directory), str(seconds), "actor"]
    with subprocess.Popen(["unshare", "--net", *command], stdout=subprocess.PIPE, text=True) as actor:
        try:
            while Path(f"/proc/{actor.pid}/ns/net").stat().st_ino == Path("/proc/self/ns/net").stat().st_ino:
                time.sleep(0.02)
            ip("link", "add", "learner0", "type", "veth", "peer", "name", "actor0", "netns", str(actor.pid))
            ip("addr", "add", f"{LEARNER}/24", "dev", "learner0")
            ip("link", "set", "learner0", "up")
            taken: list[int] = []
            with StreamServer(endpoint(directory), CONFIG) as server:

                def take(seconds: float) -> bool:
                    message = server.take(seconds)
                    if message is not None:
                        taken.append(int(message.tensors["log_reward"][0]))
                        server.release(message, 0)
                    return message is not None

                def take_for(seconds: float) -> None:
                    end = time.monotonic() + seconds
                    while time.monotonic() < end:
                        take(0.01)

                assert take(PATIENCE_S), "never connected"
                take_for(0.5)
                ip("link", "set", "learner0", "down")
                take_for(seconds)
                before = len(taken)
                ip("link", "set", "learner0", "up")
                healed = time.monotonic()
                assert take(PATIENCE_S), "never connected again"
                reconnected_s = time.monotonic() - healed
                take_for(2.0)
                (directory / "enough").touch()
                take_for(1.0)
                rejected = server.counters()["rejected"]
            acknowledged = int(actor.communicate(timeout=PATIENCE_S)[0])
        finally:
            actor.kill()
    return {
        "before": before,
        "taken": len(taken),
        "in_order": taken == list(range(len(taken))),
        "acknowledged": acknowledged,
        "rejected": rejected,
        "reconnected_s": reconnected_s,
    }


if __name__ == "__main__":
    if len(sys.argv) > 3:
        act(Path(sys.argv[1]))
    else:
        print(json.dumps(learn(Path(sys.argv[1]), float(sys.argv[2]))))
