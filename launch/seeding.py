"""One seed a run, one independent random stream a role."""

import hashlib
import random


def derive_seed(seed: int, role: str, index: int = 0, restart: int = 0) -> int:
    """Seed in [0, 2^63) of one start of one role.

    The first 63 bits of SHA-256 over "seed/role/index/restart": equal on every platform and in every version,
    and a restarted role never repeats the draws of the process that it replaces.
    """
    digest = hashlib.sha256(f"{seed}/{role}/{index}/{restart}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Reseed Python's, NumPy's and torch's global generators; children of a fork server share their state."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
