"""Chapter 12 on several ranks: what tests/ranks/overlap_trials.py tries.

Against the dense reference, with every dispatcher, kind of experts and checkpoint: tests/ranks/test_parity.py.
"""

import pytest
from overlap_trials import FORGOTTEN, RUNS, STEPS
from support import copy_of_the_code, outcome, play
from trials import trials_of

TRIALS = {name for name, _ in trials_of("overlap_trials")} - {"dies_under_way"}


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    for what, change in FORGOTTEN.items():
        copy_of_the_code(build / "broken_overlap" / what, *change)
    return play(build / "overlap", "overlap_trials", 4, *TRIALS)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bits(played, world_size):
    for found in outcome(played, "equal", world_size):
        assert len(found) >= 4 * (1 if world_size == 1 else 4)
        assert all(shared and halves for shared, halves in found.values()), found


def test_backward_is_forward_from_its_end(played):
    swapped = {"begin": "end", "end": "begin", "experts": "experts"}
    for found in outcome(played, "orders", 2):
        for order, (events, num_hidden) in found.items():
            cut = len(events) // 2
            mirror = [[swapped[what], name.replace("forward", "") + " backward", part]
                      for what, name, part in reversed(events[:cut])]  # fmt: skip
            assert [[w, n.strip(), p] for w, n, p in mirror] == events[cut:], order
            assert num_hidden == {"none": 0, "in turn": 0, "tbo": 4}[order]


@pytest.mark.parametrize("name", list(RUNS))
def test_world_size_does_not_matter(played, name):
    by_size = {size: outcome(played, "curves", size)[0][name] for size in (1, 2, 4)}
    first = by_size[1][0]
    assert len(first) == STEPS and first[-1] < first[0]
    for size, (losses, sent) in by_size.items():
        assert max(abs(a - b) / a for a, b in zip(first, losses, strict=True)) < 1e-10, size
        assert sent["predicted"] == sent["counted"] and (sent["counted"] > 0) == (size > 1)


def test_an_exchange_that_nobody_ends_is_named_with_its_cell(played):
    for rank, said in enumerate(outcome(played, "forgotten", 2)):
        assert (
            f"rank {rank}: the exchange of 'combine', its collective " in said and "was never ended" in said
        )
        begun = said.partition("It was begun by")[2]
        assert "(notebooks/12_overlap.ipynb #two-batches:" in begun, said


def test_an_exchange_ends_once(played):
    for said in outcome(played, "ended_twice", 2):
        assert [text.split(";")[0] for text in said] == [
            f"the {what} has ended already" for what in ("dispatch", "combine")
        ]


def test_a_rank_dies_with_an_exchange_under_way(build):
    said, _ = outcome(play(build / "dies", "overlap_trials", 2, "dies_under_way"), "dies_under_way", 2)[0]
    assert said.startswith("rank 0, collective ") and "under way 0" in said and "imed out" not in said, said


def test_what_cannot_overlap_is_refused(played):
    for said in outcome(played, "refused", 2):
        assert [text.split(", it needs ")[1][:24] for text in said] == [
            "shared experts to comput", "a dispatcher whose buffe",
        ]  # fmt: skip
