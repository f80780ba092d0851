"""Every dispatcher and experts kind against the dense reference (tools/parity.py), on 1, 2, 4 and 8 ranks."""

import pytest
import torch
from parity_trials import BROKEN, WORLD_SIZES, wanted
from support import copy_of_the_code, outcome, play

from tools import parity
from tools.parity import LIMITS, cases, cases_of, variants


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    for what, change in BROKEN.items():
        copy_of_the_code(build / "broken" / what, *change)
    return play(build / "parity", "parity_trials", 8)


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda size: f"{size}ranks")
def results(request, played) -> list[dict]:
    """What the suite measured at one world size."""
    return outcome(played, "parity", request.param)[0]


def test_everything_ran(results):
    world_size = results[0]["world_size"]
    ran = {(r["dispatcher"], r["experts"], r["activation"], r["dtype"], r["case"]) for r in results}
    kinds = variants(torch.device("cpu"), world_size, list(LIMITS))
    known = cases(world_size)
    expected = {
        (*kind, name)
        for parts in {case["ep"] for case in known.values()}
        for kind in variants(torch.device("cpu"), world_size // parts, list(LIMITS))
        for name, case in cases_of(*kind[2:], known).items()
        if case["ep"] == parts and name in wanted(world_size, *kind)
    }
    assert ran == expected
    assert {kind[3] for kind in kinds} == set(LIMITS)
    assert all({run[n] for run in ran} >= {kind[n] for kind in kinds} for n in range(4))


def test_outputs_and_every_gradient(results):
    over = [
        f"{r['case']} {r['dtype']} {r['dispatcher']} {r['experts']} {r['activation']}: {quantity} {error:.1e}"
        for r in results for quantity, error in r["errors"].items() if not error <= r["limit"]
    ]  # fmt: skip
    assert not over, "\n".join(over)
    quantities = set(results[0]["errors"])
    assert {
        "y",
        "aux",
        "x.grad",
        "router.gate.weight.grad",
        "experts.w1.grad",
        "experts.b2.grad",
    } <= quantities


def test_bytes_are_what_topk_ids_predict(results):
    for r in results:
        predicted, counted = r["bytes"]
        assert counted == predicted and not r["bytes_differ"], r
        is_empty = (
            r["case"] in ("no_tokens_at_all", "checkpoint", "two_halves_checkpoint")
            or r["dispatcher"] == "local"
        )
        # On two ranks each has all experts, or one has all there is to do.
        is_empty |= r["case"] in ("replicas", "idle_rank") and r["world_size"] == 2
        if r["world_size"] > 1 and not is_empty:
            assert counted > 0, r
        if r["world_size"] == 1:
            assert counted == 0, r


def test_the_cases_are_what_they_say(results):
    for r in results:
        if r["case"] == "all_to_one_expert":
            assert r["rows_received"][0] > 0 and sum(r["rows_received"][1:]) == 0
        if r["case"] in ("rank_without_rows", "idle_rank") and r["world_size"] > 1:
            assert r["rows_received"][-1] == 0


def test_nan_is_over_every_limit():
    nan, good = torch.tensor([1.0, float("nan")]), torch.ones(2)
    for pair in ((nan, good), (good, nan), (nan, torch.zeros(2))):
        assert parity.relative_error(*pair) == float("inf")
    assert parity.relative_error(torch.ones(4), torch.zeros(4)) == 2


SAYS = {
    "gradient": "over the limit: even float64",
    "byte": "bytes predicted for dispatch from rank 0 to rank 1, and",
    "destination": "bytes predicted for combine from rank 0 to rank 1, and",
    "crash": "crashed: rank 0, even float64 all_to_all blocks ",
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_parity_refuses(played, what):
    """The suite can fail: on a gradient, a byte, a byte to the wrong rank; and it names what crashed, and the cell."""
    (code, printed), (other, _) = outcome(played, f"broken_{what}", 2)
    assert code == other == 1 and SAYS[what] in printed, printed
    assert what != "crash" or "07_exact_all_to_all.ipynb #send-rows" in printed


def test_a_dispatcher_that_nobody_registered_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["parity.py", "--dispatcher", "nobody"])
    with pytest.raises(SystemExit):
        parity.begin()
    assert "argument --dispatcher: invalid choice: 'nobody' (choose from " in capsys.readouterr().err
