"""A layer in somebody's model, on several ranks: what tests/ranks/model_trials.py tries."""

import pytest
from support import outcome, play
from trials import trials_of


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    return play(build / "model", "model_trials", 4)


@pytest.mark.parametrize("name, world_size", trials_of("model_trials"))
def test_on_ranks(played, name, world_size):
    outcome(played, name, world_size)
