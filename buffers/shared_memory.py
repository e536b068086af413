"""Tensors of a batch in memory that sender and learner share, where both run on one machine as one user.

Through a socket the kernel copies every byte twice, into memory that is new each time. Here the sender copies a batch
once, into one of its *slots*, and sends a *locator* with the header in place of the tensors. It has as many slots as it
may have unacknowledged batches, so that a batch keeps its slot until the learner has released it.

The memory is an anonymous file (memfd) that the learner opens by its sender's process and descriptor. It has no name
that anybody would have to clean up, and is gone with the last process that has it, however that ends. It is sealed
against changes of its size, so that no access behind a new end can kill the learner. Slots are as large as the largest
message, which costs addresses only: pages that are never written take no memory.

Linux has this; elsewhere, and where the learner cannot open the memory (another host, another container), tensors
travel through the socket.
"""

import fcntl
import logging
import mmap
import os
import secrets
import struct
from collections.abc import Mapping, Sequence

from driftstream.buffers.checks import MAX_INTEGER, is_integer
from driftstream.buffers.wire import Buffer, WireError, byte_view

logger = logging.getLogger(__name__)

MAGIC = b"DSTS"
SHARED_FROM_BYTES = 2**16
"""Payloads below this size travel through the socket, which copies them as fast."""
MAX_TENSORS = 16
MAX_MEMORY_BYTES = 2**46
_ALIGNMENT = 64
_PLACE = struct.Struct("<QQ")  # offset and length of one tensor's bytes

Payload = Sequence[bytes | memoryview]


class SlotMemory:
    """The sender's side: `slots` places of `slot_bytes` each; OSError where the system has no such memory."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no anonymous files")
        self.slots = slots
        self._stride = slot_bytes + MAX_TENSORS * _ALIGNMENT
        self._stride += -self._stride % mmap.PAGESIZE
        if slots * self._stride > MAX_MEMORY_BYTES:
            raise OSError(f"{slots} slots of {slot_bytes} bytes: too large to map")
        self._token = secrets.randbelow(MAX_INTEGER)
        self._descriptor = os.memfd_create(_name(self._token), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, slots * self._stride)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
            self._view = memoryview(mmap.mmap(self._descriptor, slots * self._stride))
        except OSError:
            os.close(self._descriptor)
            raise

    def address(self) -> dict[str, int]:
        """Where the learner finds the memory, as counters of a hello."""
        return {"memory_pid": os.getpid(), "memory_fd": self._descriptor, "memory_token": self._token}

    def put(self, slot: int, payload: Payload) -> list[memoryview]:
        """Copy a payload into a slot, over what was there; returns its bytes in the slot."""
        copies = []
        for (offset, length), data in zip(self._places(slot, payload), payload, strict=True):
            copy = self._view[offset : offset + length]
            copy[:] = data
            copies.append(copy)
        return copies

    def locator(self, slot: int, payload: Payload) -> bytes:
        """What tells the learner where in the memory a payload is that was put into a slot."""
        return MAGIC + b"".join(_PLACE.pack(*place) for place in self._places(slot, payload))

    def close(self) -> None:
        """Let go of the memory; what the learner has mapped stays there for it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._view = memoryview(b"")

    def _places(self, slot: int, payload: Payload) -> list[tuple[int, int]]:
        places, offset = [], slot * self._stride
        for data in payload:
            places.append((offset, len(data)))
            offset += len(data) + -len(data) % _ALIGNMENT
        return places


class MappedMemory:
    """The learner's side of one sender's memory.

    Raises OSError where there is none to be opened at the address, or one that is not what it should be.
    """

    def __init__(self, address: Mapping[str, int | float]) -> None:
        self.address = dict(address)
        pid, descriptor, token = (address.get(f"memory_{name}") for name in ("pid", "fd", "token"))
        if not (is_integer(pid) and is_integer(descriptor) and is_integer(token)):
            raise OSError("no address of a shared memory")
        path = f"/proc/{pid}/fd/{descriptor}"
        if os.readlink(path) != f"/memfd:{_name(token)} (deleted)":
            raise OSError(f"{path} is not the memory that was announced")
        own = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            # In this order: what is sealed keeps at least the size that is read then.
            sealed = fcntl.fcntl(own, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            self._size = os.fstat(own).st_size
            if not sealed or not 0 < self._size <= MAX_MEMORY_BYTES:
                raise OSError(f"{path} may shrink, or has {self._size} bytes: expected 1 to {MAX_MEMORY_BYTES}")
            self._view = memoryview(mmap.mmap(own, self._size))
        finally:
            os.close(own)

    def payload(self, locator: Buffer) -> list[memoryview]:
        """The bytes that a locator tells of, in the memory itself; raises `WireError` for one that cannot be."""
        body = byte_view(locator)[len(MAGIC) :]
        if len(body) % _PLACE.size or len(body) > MAX_TENSORS * _PLACE.size:
            raise WireError(f"locator of {len(body)} bytes: expected up to {MAX_TENSORS} places of {_PLACE.size}")
        payload = []
        for offset, length in _PLACE.iter_unpack(body):
            if offset % _ALIGNMENT or offset + length > self._size:
                raise WireError(f"{length} bytes at {offset} are not in the {self._size} of the shared memory")
            payload.append(self._view[offset : offset + length])
        return payload


class MappedMemories:
    """The learner's side of every sender's memory, by the sender's connection."""

    def __init__(self) -> None:
        self._memories: dict[bytes, MappedMemory] = {}

    def __contains__(self, connection: bytes | None) -> bool:
        return connection in self._memories

    def share(self, connection: bytes, counters: Mapping[str, int | float]) -> None:
        """Map the memory that the counters of a hello offer; without one, batches come through the socket."""
        address = {name: value for name, value in counters.items() if name.startswith("memory_")}
        known = self._memories.get(connection)
        if not address or (known is not None and known.address == address):
            return
        self.forget(connection)
        try:
            self._memories[connection] = MappedMemory(address)
        except (OSError, ValueError) as error:
            logger.debug("no shared memory: %s", error)

    def forget(self, connection: bytes) -> None:
        """Let go of a connection's memory; tensors in it keep it mapped."""
        self._memories.pop(connection, None)

    def locate(self, connection: bytes, frames: Sequence[Buffer]) -> Sequence[Buffer] | None:
        """Header and tensors of a message; None where they are in a memory that is not known (any more)."""
        if not frames or bytes(byte_view(frames[0])[: len(MAGIC)]) != MAGIC:
            return frames  # a header begins with a brace
        memory = self._memories.get(connection)
        if memory is None:
            return None
        locator, *header = frames
        return [*header, *memory.payload(locator)]


def _name(token: int) -> str:
    return f"driftstream-{token}"
