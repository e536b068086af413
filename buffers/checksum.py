"""The checksum of tensor frames: integer sums at the speed of memory, where a crc32 of every byte takes ten times that.

It guards against accidents (a sender that writes to a tensor on its way, a frame cut, swapped or from another
message), not against an attacker, who can repair any checksum; keys guard against those.
"""

import zlib
from collections.abc import Sequence

import numpy as np

_LANES = 1024
_ROW_BYTES = 8 * _LANES


def checksum(buffers: Sequence[bytes | bytearray | memoryview]) -> int:
    """32-bit checksum of `buffers`, of their lengths and of their order; the same on every machine.

    A buffer is read as rows of 1024 little-endian 64-bit words; what is left of it as bytes. The crc32 runs over the
    sums of every column, of every row (both modulo 2^64), and the rest. So each word that changes and each pair of
    words that change places alters the sums: in one row those of the columns, elsewhere those of the rows.
    """
    crc = 0
    for buffer in buffers:
        whole = len(buffer) - len(buffer) % _ROW_BYTES
        crc = zlib.crc32(len(buffer).to_bytes(8, "little"), crc)
        if whole:
            words = np.frombuffer(buffer, "<u8", whole // 8).reshape(-1, _LANES)
            crc = zlib.crc32(np.add.reduce(words, axis=0), crc)
            crc = zlib.crc32(np.add.reduce(words, axis=1), crc)
        crc = zlib.crc32(memoryview(buffer)[whole:], crc)
    return crc
