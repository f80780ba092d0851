"""Chapter 07's exact all-to-all on several ranks: what tests/ranks/exchange_trials.py tries.

Outputs and gradients against the dense reference are tests/ranks/test_parity.py's: the dispatcher registers itself.
"""

import pytest
from support import outcome, play
from trials import trials_of

TRIALS = trials_of("exchange_trials")
ALONE = [pair for pair in TRIALS if pair[0].startswith("corrupt")]  # their processes end in them


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    return play(build / "exchange", "exchange_trials", 4, *{name for name, _ in set(TRIALS) - set(ALONE)})


@pytest.mark.parametrize("name, world_size", [pair for pair in TRIALS if pair not in ALONE])
def test_on_ranks(played, name, world_size):
    outcome(played, name, world_size)


@pytest.mark.parametrize("name, world_size", ALONE)
def test_corrupt_counts_end_all_ranks(build, name, world_size):
    """Every rank ends, by what happened and not by a time-out; one says which count it was."""
    said = outcome(play(build / "corrupt", "exchange_trials", world_size, name), name, world_size)
    assert "noticed nothing" not in said and not any("imed out" in text for text in said), said
    named = [text for text in said if "rank 1 expects" in text]
    assert len(named) == 1 and "from rank 0, which announced" in named[0] and "corrupt" in named[0], said
