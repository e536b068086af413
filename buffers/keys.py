"""CURVE keys of one run: made for it, kept in files that only their owner can read, refused where others could.

A key directory holds the server's pair with the public keys of all clients that it lets in (`server.key`), the pair
of the run's own roles (`client.key`), and that of invited hosts (`guest.key`).
"""

import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from driftstream.envs.errors import ConfigError, require

SERVER, CLIENT, GUEST = "server.key", "client.key", "guest.key"
MAX_FILE_BYTES = 2**20
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}", re.ASCII)


@dataclass(frozen=True)
class ServerKeys:
    """The pair that every listening socket of a run has, and the public keys of those who may connect."""

    public: str
    secret: str = field(repr=False)
    clients: frozenset[str]


@dataclass(frozen=True)
class ClientKeys:
    """The pair of one who connects, and the public key by which it knows the server."""

    server: str
    public: str
    secret: str = field(repr=False)

    def as_table(self) -> dict[str, str]:
        """What its file holds."""
        return {"server": self.server, "public": self.public, "secret": self.secret}


def make_keys(directory: Path) -> None:
    """Make a run's keys in `directory`, all of them or none; those that it holds already are checked and stay.

    Raises:
        ConfigError: the directory or a file in it is a link, somebody else's, or open to others.
    """
    require(zmq.has("curve"), "keys", str(directory), "a pyzmq with CURVE (this one was built without)")
    if directory.exists() or directory.is_symlink():
        server = read_server_keys(directory)
        for name in (CLIENT, GUEST):
            client = read_client_keys(directory, name)
            known = client.server == server.public and client.public in server.clients
            require(known, "keys", str(directory / name), f"a key that {SERVER} beside it lists")
        return
    draft = Path(tempfile.mkdtemp(prefix=".keys-", dir=directory.parent))  # mode 0700
    (server_public, server_secret), *clients = (_pair() for _ in range(3))
    table: dict[str, Any] = {"public": server_public, "secret": server_secret}
    write_private(draft / SERVER, _toml(table | {"clients": [public for public, _ in clients]}))
    for name, (public, secret) in zip((CLIENT, GUEST), clients, strict=True):
        write_private(draft / name, _toml(ClientKeys(server_public, public, secret).as_table()))
    draft.rename(directory)


def read_server_keys(directory: Path) -> ServerKeys:
    """The keys to listen with; ConfigError where others could have read or changed them."""
    table = tomllib.loads(read_private(directory / SERVER, guarded=True))
    public, secret = _checked_pair(table, directory / SERVER)
    clients = table.get("clients")
    valid = isinstance(clients, list) and all(_is_key(client) for client in clients)
    require(valid, "keys", str(directory / SERVER), "clients, a list of public keys")
    return ServerKeys(public, secret, frozenset(table["clients"]))


def read_client_keys(directory: Path, name: str = CLIENT) -> ClientKeys:
    """The keys to connect with; ConfigError where others could have read or changed them."""
    return client_keys(tomllib.loads(read_private(directory / name, guarded=True)), directory / name)


def client_keys(table: Mapping[str, Any], path: Path) -> ClientKeys:
    """The keys in a table that was read from `path`; ConfigError where one is missing or none."""
    require(_is_key(table.get("server")), "keys", str(path), "server, a public key")
    return ClientKeys(table["server"], *_checked_pair(table, path))


def write_client_keys(directory: Path, keys: ClientKeys) -> None:
    """Make a key directory that holds nothing but the keys to connect with."""
    directory.mkdir(mode=0o700)
    write_private(directory / CLIENT, _toml(keys.as_table()))


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner can read; FileExistsError where there is something."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def read_private(path: Path, guarded: bool = False) -> str:
    """The text of a file that only its owner, this process's user, can read or change.

    A `guarded` file must lie in a directory of mode 0700 or stricter. Raises ConfigError where any of this is not so,
    or where the file or its directory is a link.
    """
    folder = None
    try:
        if guarded:
            folder = _open(path.parent, os.O_DIRECTORY)
            _check_private(folder, path.parent, stat.S_ISDIR, "directory", 0o700)
        # What is checked is what is read, whatever becomes of the path meanwhile.
        descriptor = _open(path, os.O_NONBLOCK, folder)
    finally:
        if folder is not None:
            os.close(folder)
    with os.fdopen(descriptor, "rb") as file:
        _check_private(descriptor, path, stat.S_ISREG, "file", 0o600)
        data = file.read(MAX_FILE_BYTES + 1)
    require(len(data) <= MAX_FILE_BYTES, "keys", str(path), f"a file of at most {MAX_FILE_BYTES} bytes")
    try:
        text = data.decode()
        tomllib.loads(text)
    except ValueError as error:
        # The cause would quote the file.
        raise ConfigError("keys", str(path), f"a TOML file ({type(error).__name__})") from None
    return text


def _open(path: Path, flags: int, folder: int | None = None) -> int:
    try:
        return os.open(path if folder is None else path.name, os.O_RDONLY | os.O_NOFOLLOW | flags, dir_fd=folder)
    except OSError as error:
        reason = "not a link" if path.is_symlink() else error.strerror
        what = "directory" if flags & os.O_DIRECTORY else "file"
        raise ConfigError("keys", str(path), f"a {what} that can be read ({reason})") from None


def _check_private(descriptor: int, path: Path, is_kind: Any, what: str, mode: int) -> None:
    status = os.fstat(descriptor)
    require(is_kind(status.st_mode), "keys", str(path), f"a {what}")
    owner = f"a {what} of user {os.geteuid()} (it is user {status.st_uid}'s)"
    require(status.st_uid == os.geteuid(), "keys", str(path), owner)
    found = stat.S_IMODE(status.st_mode)
    allowed = f"a {what} that only its owner can use: mode {mode:04o}, not {found:04o} (chmod {mode:o} {path})"
    require(not found & 0o077, "keys", str(path), allowed)


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _is_key(value: object) -> bool:
    return isinstance(value, str) and _Z85.fullmatch(value) is not None


def _checked_pair(table: Mapping[str, Any], path: Path) -> tuple[str, str]:
    public, secret = table.get("public"), table.get("secret")
    fits = isinstance(secret, str) and _is_key(secret) and zmq.curve_public(secret.encode()).decode() == public
    require(fits, "keys", str(path), "public and secret, a pair of keys")
    return str(public), str(secret)


def _toml(table: Mapping[str, Any]) -> str:
    # No key holds a quotation mark or a backslash.
    def value(entry: Any) -> str:
        return f'"{entry}"' if isinstance(entry, str) else "[" + ", ".join(map(value, entry)) + "]"

    return "".join(f"{name} = {value(entry)}\n" for name, entry in table.items())
