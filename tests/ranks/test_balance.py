"""Chapter 09 on several ranks, all from tests/ranks/balance_trials.py: parity, invariance, resuming, the flags."""

from itertools import product

import pytest
import torch
from balance_trials import BROKEN, FEW_CASES, PLAIN, STEPS, VARIANTS
from support import copy_of_the_code, outcome, play
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ep_launcher import launcher as ep
from tools.parity import LIMITS, plain_cases


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    for what, change in BROKEN.items():
        copy_of_the_code(build / "broken_balance" / what, *change)
    return play(build / "balance", "balance_trials", 4)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda size: f"{size}ranks")
def parity_results(request, played) -> tuple[int, list[dict]]:
    return request.param, outcome(played, "parity", request.param)[0]


def test_outputs_and_every_gradient_of_every_router_and_balance(parity_results):
    _, results = parity_results
    over = [
        f"{r['mesh']} {r['case']} {r['dtype']} {r['router']} {r['balance']} normalise {r['normalize']} "
        f"groups {r['groups']} {r['dispatcher']}: {quantity} {error:.1e}"
        for r in results for quantity, error in r["errors"].items() if not error <= LIMITS[r["dtype"]]
    ]  # fmt: skip
    assert not over, "\n".join(over[:20])
    names = {"topk_ids", "y", "aux", "x.grad", "bytes", "router.gate.weight.grad", "experts.w1.grad"}
    assert all(names <= set(r["errors"]) for r in results)
    assert all("counted" in r["errors"] for r in results if r["balance"] == "bias")


def test_parity_left_nothing_out(parity_results):
    world_size, results = parity_results

    def ran(mesh: str) -> set[tuple]:
        kinds = ("router", "balance", "normalize", "groups", "dtype", "case")
        return {tuple(r[kind] for kind in kinds) for r in results if r["mesh"] == mesh}

    cases = FEW_CASES if world_size == 4 else ["uneven"]
    every = {(*v, "float64", case) for v, case in product(VARIANTS, cases)}
    rounded = {(*v, dtype, "uneven") for v, dtype in product(VARIANTS, LIMITS) if v[2:] in PLAIN}
    assert every | rounded <= ran(f"1 x {world_size}")
    assert ran("2 x 2") == {kinds for kinds in every if "uneven" in kinds and world_size == 4}
    results = [r for r in results if r["mesh"] != "2 x 2"]
    few = set(plain_cases(world_size)) - {*FEW_CASES, "rank_without_rows"}
    assert len(few) == 7
    for case in few:
        found = {(r["router"], r["balance"]) for r in results if r["case"] == case}
        assert len(found) == 8, case
    dispatchers = {r["dispatcher"] for r in results if (r["case"], r["dtype"]) == ("uneven", "float64")}
    assert dispatchers - {"auto"} == {
        name
        for name, kind in ep.REGISTRIES["dispatcher"].items()
        if kind.preference(ep.MoEConfig(), torch.device("cpu"), world_size) > 0
    }
    for r in results:
        if r["case"] == "rank_without_rows" and world_size > 1 and r["groups"] == 1:
            assert r["rows_received"][-1] == 0
        if r["case"] == "all_to_one_expert" and world_size > 1:
            assert sum(r["rows_received"][1:]) == 0


def test_parity_refuses_a_loss_that_sees_one_rank_only_and_a_bias_in_the_weights(played):
    for over in outcome(played, "broken", 2):
        assert set(over) == set(BROKEN) and all(over.values()), over


@pytest.fixture(scope="module")
def curves(played) -> dict[tuple, dict[str, dict]]:
    """{(tokens, method): {number of ranks, or the mesh: what it found}}."""
    found: dict[tuple, dict[str, dict]] = {}
    for r in outcome(played, "curves", 4)[0]:
        found.setdefault((r["tokens"], r["method"]), {})[r["size"]] = r
    return found


def distance(ours: list, others: list, which: int = 0) -> float:
    """The largest relative difference of two curves' task (0) or aux (1) losses."""
    return max(abs(a[which] - b[which]) / (abs(a[which]) or 1) for a, b in zip(ours, others, strict=True))


def test_the_number_of_ranks_does_not_matter(curves):
    """Ranks with topics of their own, all losses, the bias, groups, a 2 x 2 mesh; also three tokens on four ranks."""
    checked = 0
    for (num_tokens, method), by_size in curves.items():
        assert set(by_size) == {"1", "2", "4", "2 x 2"}
        assert len(by_size["1"]["curve"]) == (STEPS if num_tokens == 64 else STEPS // 4)
        if method != "aux_local":
            for size, which in product(("2", "4", "2 x 2"), (0, 1)):
                worst = distance(by_size["1"]["curve"], by_size[size]["curve"], which)
                assert worst < 1e-10, f"{method}, {num_tokens} tokens, {size} ranks: {worst:.1e}"
            checked += 1
    assert checked == 7


def test_recomputation_changes_neither_losses_nor_bias(curves):
    for size, plain in curves[64, "bias and all losses"].items():
        again = curves[64, "bias and all losses, recomputed"][size]
        for which in (0, 1):
            assert distance(plain["curve"], again["curve"], which) < 1e-10
        assert plain["biases"] == again["biases"]


def test_the_local_loss_does_depend_on_the_number_of_ranks(curves):
    local, whole = curves[64, "aux_local"], curves[64, "aux"]
    assert distance(local["1"]["curve"], whole["1"]["curve"]) < 1e-12  # one rank sees it all
    assert distance(local["1"]["curve"], local["2"]["curve"]) > 1e-2
    assert distance(local["2"]["curve"], local["4"]["curve"]) > 1e-2
    # what counts is how many ranks share the batch, and not how many share the experts
    assert distance(local["4"]["curve"], local["2 x 2"]["curve"]) < 1e-10


def test_the_local_loss_on_four_ranks_is_the_sequence_loss_of_a_fourth_on_one(curves):
    """What measure/balance.py rests on."""
    ours, theirs = curves[64, "aux_local"]["4"]["curve"], curves[64, "sequences of a fourth"]["1"]["curve"]
    assert distance(ours, theirs) < 1e-10 and distance(ours, theirs, 1) < 1e-10


def test_the_bias_is_the_same_on_every_rank_and_any_number_of_them(curves):
    by_size = curves[64, "bias and all losses"]
    for size, found in by_size.items():
        assert len(found["biases"]) == {"1": 1, "2": 2, "4": 4, "2 x 2": 4}[size]
        assert all(bias == by_size["1"]["biases"][0] for bias in found["biases"])
    assert max(map(abs, by_size["4"]["biases"][0])) > 0.01


def test_a_run_resumes_bitwise_and_the_bias_matters(played):
    ranks = outcome(played, "resume", 2)
    for rank in ranks:
        assert rank["same_curve"] and rank["same_state"] and not rank["same_without_bias"]
        assert "balance.bias" in rank["names"] and "balance.load" not in rank["names"]
        assert rank["bias"] == ranks[0]["bias"] and any(rank["bias"])


def test_the_launcher_takes_all_flags_and_shows_bias_and_entropy(played):
    curves = [outcome(played, "every_flag", size)[0]["task_loss"] for size in (1, 2)]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-10
    found = []
    for size in (1, 2):
        events = EventAccumulator(str(played / f"runs{size}"), size_guidance={"histograms": 0}).Reload()
        assert [event.step for event in events.Histograms("routing/bias")] == [0, 10, 20, 30]
        assert events.Histograms("routing/bias")[-1].histogram_value.max > 0.02
        found.append([event.value for event in events.Scalars("routing/entropy")])
    assert found[0] == pytest.approx(found[1], abs=1e-6) and 0.5 < found[0][0] <= 1  # over all ranks' tokens


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_and_a_cuda_graph_on_a_gpu(played):
    found = outcome(played, "graph", 1)[0]
    assert found["same_bias"] and found["same_loss"] and any(found["bias"]), found
