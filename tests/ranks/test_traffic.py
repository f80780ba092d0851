"""Chapter 10 on several ranks: gather_tokens, dedup and two_stage, all from tests/ranks/traffic_trials.py.

Outputs and gradients against the dense reference are in tests/ranks/test_parity.py, with capacity in test_capacity.py,
with every router in test_balance.py: the dispatchers register themselves. Here two_stage runs on machines.
"""

import pytest
from support import copy_of_the_code, outcome, play
from traffic_trials import BROKEN, BROKEN_ON, FEW, MACHINES

from tools.parity import over_the_limit


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    for number, change in enumerate(BROKEN.values()):
        copy_of_the_code(build / "broken_traffic" / str(number), *change)
    return play(build / "traffic", "traffic_trials", 8)


@pytest.mark.parametrize("world_size", MACHINES)
def test_two_stage_on_machines(played, world_size):
    by_machines = outcome(played, "machines", world_size)[0]
    assert list(by_machines) == [str(number) for number in MACHINES[world_size]]
    for results in by_machines.values():
        assert {r["case"] for r in results} >= set(FEW) and not over_the_limit(results)
        assert all(r["bytes"][0] == r["bytes"][1] for r in results)


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=list(BROKEN))
def test_parity_refuses(played, number):
    for code, printed in outcome(played, f"broken_copy_{number}", BROKEN_ON[number]):
        assert code == 1, printed


def test_ranks_without_tokens_or_rows_enter_everything(played):
    outcome(played, "nothing", 2)


@pytest.mark.parametrize("world_size", MACHINES)
def test_one_copy_a_rank_and_one_a_machine(played, world_size):
    outcome(played, "one_copy", world_size)


def test_machines_that_ranks_do_not_fill_are_refused(played):
    for said in outcome(played, "refused", 4):
        assert said == (
            "4 ranks, 3 on a machine, do not fill their machines evenly; give --ranks-per-host a divisor of 4"
        )
