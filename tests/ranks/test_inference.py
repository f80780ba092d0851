"""Chapter 13 on 1, 2 and 4 ranks, all from tests/ranks/inference_trials.py."""

import pytest
from support import outcome, play


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    return play(build / "inference", "inference_trials", 4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["the_largest_is_known", "copies_change_nothing", "an_update_is_seen"])
def test_same_numbers(played, name, world_size):
    assert max(outcome(played, name, world_size)) < 1e-12


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_router_capacity_and_shared_expert(played, world_size):
    by_rank = outcome(played, "same_as_the_layer", world_size)
    assert len(by_rank[0]) == 24 * (3 if world_size > 1 else 1)
    assert max(max(found.values()) for found in by_rank) < 1e-12
