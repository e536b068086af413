"""Fixtures shared by the whole suite."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The suite shares its cores with the role processes that it starts.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Mapping[str, np.ndarray]]:
    """Loader of the float64 reference values: `golden("targets")["gmm25_x"]`."""

    def load(name: str) -> Mapping[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return dict(arrays)

    return load
