"""Capacity on 1, 2 and 4 ranks: parity, global scope, runs of the launcher, all from tests/ranks/capacity_trials.py."""

import capacity_parity as slow
import pytest
from support import outcome, play

from tools.parity import LIMITS


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    return play(build / "capacity", "capacity_trials", 4)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda size: f"{size}ranks")
def parity(request, played) -> dict:
    """What tests/ranks/capacity_parity.py measured at one world size."""
    return outcome(played, "parity", request.param)[0]


def test_outputs_and_every_gradient(parity):
    over = [
        f"{r['case']} {r['dtype']} {r['dispatcher']} {r['experts']} {r['overflow']} {r['drop_order']} "
        f"{r['capacity_scope']}: {quantity} {error:.1e}"
        for r in parity["results"]
        for quantity, error in r["errors"].items()
        if not error <= r["limit"]
    ]
    assert not over, "\n".join(over)
    assert all(r["same_choices"] for r in parity["results"])


def test_every_policy_ran_and_had_something_to_do(parity):
    for policy in slow.policies():
        ran = [r for r in parity["results"] if policy.items() <= r.items()]
        assert {r["dtype"] for r in ran} == set(LIMITS)
        assert len({r["case"] for r in ran}) == 11
        assert {r["dispatcher"] for r in ran} >= {"all_gather"}
        assert ("capacity" in {r["dispatcher"] for r in ran}) == (policy["capacity_scope"] == "local")
        assert sum(r["lost" if policy["overflow"] == "drop" else "moved"] for r in ran) > 40


def test_bytes_are_predicted(parity):
    for r in parity["results"]:
        assert r["bytes"][0] == r["bytes"][1], r
        if r["world_size"] > 1 and r["dispatcher"] == "capacity":
            assert r["bytes"][1] > 0


KEPT: list[dict] = []


def test_global_scope_drops_the_same_at_every_world_size(parity):
    """One batch with every token twice, on 1, 2 and 4 ranks: the same choices are left, ties included."""
    KEPT.append(parity["kept"])
    assert set(parity["kept"]) == {f"{a} {b}" for a in ("drop", "reroute") for b in ("probs", "position")}
    assert all(kept == KEPT[0] for kept in KEPT)
    assert sum(e < 0 for line in parity["kept"]["drop probs"] for e in line) > 5


def test_the_suite_takes_one_dispatcher_alone(played):
    for ran in outcome(played, "one_dispatcher_alone", 2):
        assert len(ran) == len(list(slow.policies())) and set(ran) == {"all_to_all"}


@pytest.mark.parametrize("overflow, steps, sizes", [("drop", 100, (1, 2, 4)), ("reroute", 50, (1, 4))],
                         ids=["drop", "reroute"])  # fmt: skip
def test_world_size_does_not_matter_in_global_scope(played, overflow, steps, sizes):
    runs = {w: outcome(played, overflow, w)[0] for w in sizes}
    curve = runs[1]["task_loss"]
    assert len(curve) == steps and curve[-1] < 0.97 * curve[0]
    assert runs[1]["dropped_fraction"] > 0.05
    for w in sizes[1:]:
        worst = max(abs(a - b) / abs(a) for a, b in zip(curve, runs[w]["task_loss"], strict=True))
        assert worst < 1e-10, f"world size {w} differs by {worst:.1e}"
        assert runs[w]["dropped_fraction"] == runs[1]["dropped_fraction"]
        assert runs[w]["metadata_bytes_per_step"] > 0


def test_the_launcher_counts_bytes_and_losses_of_fixed_buffers(played):
    found = outcome(played, "fixed_buffers", 2)[0]
    fixed = found["capacity"]
    # 33 tokens on 2 ranks: a share of 17, and 17 * 2 * 0.5 / 8 = 2.125 rows an expert.
    rows = 2 * 1 * 4 * 3
    assert fixed["bytes_sent_per_step"] == dict.fromkeys(
        ("predicted", "counted"),
        rows * (3 * 32 * 8 + 16 + 8),  # each row's weight there, its gradient home
    )
    assert fixed["task_loss"] == pytest.approx(found["all_gather"]["task_loss"], rel=1e-10)
    assert fixed["dropped_fraction"] == found["all_gather"]["dropped_fraction"]
    assert 1 - 2 * 8 * 3 / 66 <= fixed["dropped_fraction"] < 0.5
    assert fixed["metadata_bytes_per_step"] == 0
