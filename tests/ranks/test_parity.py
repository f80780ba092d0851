"""Every dispatcher and experts kind against the dense reference (tools/parity.py), on 1, 2, 4 and 8 ranks."""

import json

import pytest
import torch
from support import copy_of_the_code, torchrun

from tools.parity import LIMITS, cases, cases_of, variants

WORLD_SIZES = {1: [], 2: [], 4: [], 8: ["even"]}


@pytest.fixture(scope="module", params=list(WORLD_SIZES), ids=lambda size: f"{size}ranks")
def results(request, build) -> list[dict]:
    """What the suite measured at one world size."""
    output = build / f"parity-{request.param}.json"
    output.unlink(missing_ok=True)
    only = ["--cases", *WORLD_SIZES[request.param]] if WORLD_SIZES[request.param] else []
    done = torchrun(request.param, "tools/parity.py", "--output", str(output), *only, timeout=300)
    assert output.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(output.read_text())


def test_everything_ran(results):
    world_size = results[0]["world_size"]
    names = WORLD_SIZES[world_size] or list(cases(world_size))
    ran = {(r["dispatcher"], r["experts"], r["activation"], r["dtype"], r["case"]) for r in results}
    kinds = variants(torch.device("cpu"), world_size, list(LIMITS))
    known = cases(world_size)
    expected = {
        (*kind, name)
        for parts in {case["ep"] for case in known.values()}
        for kind in variants(torch.device("cpu"), world_size // parts, list(LIMITS))
        for name in cases_of(kind[2], kind[3], names)
        if known[name]["ep"] == parts
    }
    assert ran == expected
    assert {kind[3] for kind in kinds} == set(LIMITS)


def test_outputs_and_every_gradient(results):
    over = [
        f"{r['case']} {r['dtype']} {r['dispatcher']} {r['experts']} {r['activation']}: {quantity} {error:.1e}"
        for r in results for quantity, error in r["errors"].items() if not error <= LIMITS[r["dtype"]]
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
        assert counted == predicted and r["bytes_agree"], r
        is_empty = r["case"] in ("no_tokens_at_all", "checkpoint") or r["dispatcher"] == "local"
        is_empty |= r["case"] == "replicas" and r["world_size"] == 2  # each rank has all experts
        if r["world_size"] > 1 and not is_empty:
            assert counted > 0, r
        if r["world_size"] == 1:
            assert counted == 0, r


def test_the_cases_are_what_they_say(results):
    for r in results:
        if r["case"] == "all_to_one_expert":
            assert r["rows_received"][0] > 0 and sum(r["rows_received"][1:]) == 0
        if r["experts_without_rows"]:
            assert r["rows_received"][-1] == 0


BROKEN = {
    "gradient": (
        "blocks.view(grad.shape).sum(0)",
        "blocks.view(grad.shape)[0]",
        "over the limit: even float64",
    ),
    "byte": (
        "there * (row + rider), back * row,",
        "there * (row + rider + 1), back * row,",
        "bytes predicted",
    ),
    "destination": ("bytes_by_pass(rows, rows.t(),", "bytes_by_pass(rows, rows,", "by pass and destination"),
    "crash": (
        "home[:, 0], order",
        "home[:, 1], order",
        "crashed: rank 0, even float64 all_to_all blocks gelu",
    ),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_parity_refuses(build, what):
    """The suite can fail: on a gradient, a byte, a byte to the wrong rank; and it names what crashed, and the cell."""
    right, wrong, said = BROKEN[what]
    broken = copy_of_the_code(build / "broken", right, wrong)
    done = torchrun(2, str(broken / "tools/parity.py"), "--dtypes", "float64", "--cases", "even", "uneven")
    assert done.returncode != 0 and said in done.stdout + done.stderr, done.stdout + done.stderr
    assert what != "crash" or "07_exact_all_to_all.ipynb #send-rows" in done.stderr


def test_one_dispatcher_alone_from_a_plugin(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from ep_launcher.launcher import AllGatherDispatcher, register\n\n\n"
        '@register("dispatcher", "mine")\nclass Mine(AllGatherDispatcher):\n    pass\n'
    )
    flags = ["--dtypes", "float64", "--cases", "even", "--dispatcher", "mine", "--plugin", str(plugin)]
    done = torchrun(2, "tools/parity.py", *flags)
    assert done.returncode == 0 and "within limits" in done.stdout, done.stderr
    done = torchrun(1, "tools/parity.py", "--dispatcher", "nobody")
    assert done.returncode != 0 and "no dispatcher 'nobody'" in done.stderr
