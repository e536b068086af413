"""Grids that begin coarse and end fine."""

import re

import pytest
import torch

from driftstream.envs.errors import ConfigError
from driftstream.envs.grids import GridConfig, make_grid


def test_the_number_of_steps_grows_geometrically_between_two_fractions_of_training() -> None:
    config = GridConfig("random", 40, coarse_steps=10, coarse_until=0.2, fine_from=0.6)
    assert [config.steps_at(progress) for progress in (0.0, 0.2, 0.4, 0.6, 1.0)] == [10, 10, 20, 40, 40]
    assert len(make_grid(config, torch.Generator().manual_seed(0), progress=0.1)) == 11
    assert len(make_grid(config)) == 41
    assert GridConfig("uniform", 40).steps_at(0.0) == 40


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coarse_steps": 0}, "grid.coarse_steps = 0: expected at least 1"),
        ({"coarse_steps": 41}, "grid.coarse_steps = 41: expected at least 1, and at most grid.sampling_steps"),
        ({"coarse_until": 0.8}, "grid.coarse_until = 0.8: expected a fraction in [0, 1], below grid.fine_from"),
        ({"fine_from": 1.1}, "grid.coarse_until = 0.3: expected"),
    ],
)
def test_bad_configuration_is_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        GridConfig(**({"sampling_steps": 40} | values))  # type: ignore[arg-type]


def test_a_given_grid_stays_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"grid\.coarse_steps = 1: expected nothing, as the grid is given"):
        GridConfig("given", times=(0.0, 0.5, 1.0), coarse_steps=1)
