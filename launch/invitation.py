"""What a host needs to join a run: one private file with addresses, keys and the configuration."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from driftstream.buffers.keys import GUEST, ClientKeys, client_keys, read_client_keys, read_private, write_private
from driftstream.buffers.sockets import check_endpoint, split_keys, with_keys
from driftstream.envs.errors import ConfigError, require
from driftstream.launch.run_directory import SOCKET_NAMES, RunDirectory


@dataclass(frozen=True)
class Invitation:
    """A run as a host that joins it sees it."""

    run: str
    addresses: dict[str, str]
    keys: ClientKeys
    config: dict[str, Any]
    """The run's resolved configuration, as a table."""

    def endpoints(self, directory: Path) -> dict[str, str]:
        """Endpoint of each socket of the run, by name, for one who has put the keys into `directory`."""
        return {name: with_keys(address, directory) for name, address in self.addresses.items()}


def write_invitation(run: RunDirectory, toml: str) -> None:
    """Write a held run's invitation, readable by its owner only; one of an earlier launch is replaced."""
    addresses = {name: split_keys(endpoint)[0] for name, endpoint in run.addresses().items()}
    keys = read_client_keys(run.keys, GUEST).as_table()
    table = {"run": str(run.root), "addresses": addresses, "keys": keys, "config": tomllib.loads(toml)}
    draft = run.invitation.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    write_private(draft, "# Whoever holds this file can feed the run. Mode 0600.\n" + tomli_w.dumps(table))
    os.replace(draft, run.invitation)


def read_invitation(path: Path) -> Invitation:
    """Read a copy of a run's invitation.

    Raises:
        ConfigError: a file that others can read, or that is no invitation.
    """
    table = tomllib.loads(read_private(path))
    addresses, config = table.get("addresses"), table.get("config")
    if not isinstance(addresses, dict) or not isinstance(config, dict) or not isinstance(table.get("keys"), dict):
        raise ConfigError("join", str(path), "a run's keys/join.toml")
    keys = client_keys(table["keys"], path)
    for name in SOCKET_NAMES:
        address = str(addresses.get(name))
        fits = address.startswith("tcp://") and split_keys(address)[1] is None
        require(fits, f"join: addresses.{name}", address, "tcp://HOST:PORT")
        check_endpoint(with_keys(address, path), f"join: addresses.{name}")
    return Invitation(str(table.get("run", "")), {name: addresses[name] for name in SOCKET_NAMES}, keys, config)
