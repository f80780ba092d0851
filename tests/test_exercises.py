"""The exercises: every one has a check, a solution and wrong answers; and the checks with ranks say what is wrong.

That each check accepts its solution and refuses its wrong answers is tried where the notebooks run: test_book.py.
"""

import inspect
import json

import pytest
import torch
from conftest import ROOT
from wrong_answers import WRONG, cells_tagged, source_of, split_solution

from ep_launcher import launcher
from tools import exercises
from tools.exercises import check_dispatcher, check_experts, check_overflow

NOTEBOOKS = {
    path.stem: json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_exercise_has_a_check_a_solution_and_wrong_answers(name):
    tasks, solutions = (cells_tagged(NOTEBOOKS[name], tag) for tag in ("exercise", "solution"))
    assert len(solutions) >= len(tasks)
    for cell in solutions:
        definitions, check = split_solution(source_of(cell))
        assert check.startswith("check_")
        wrong = [definitions.replace(old, new) for old, new in WRONG[cell["id"]]]
        assert definitions not in wrong, (
            f"{cell['id']}: tests/wrong_answers.py changes a text that is not there"
        )
        assert len(set(wrong)) >= 2, cell["id"]


def test_every_list_of_wrong_answers_is_of_a_solution():
    known = {cell["id"] for notebook in NOTEBOOKS.values() for cell in cells_tagged(notebook, "solution")}
    assert set(WRONG) <= known


def answer(name: str, cell_id: str, *changes: tuple[str, str]) -> tuple[type, dict]:
    """A notebook's solution, changed -> (the class, a namespace as the notebook's kernel would have it)."""
    source = split_solution(source_of(next(c for c in NOTEBOOKS[name]["cells"] if c["id"] == cell_id)))[0]
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    scope = {key: value for key, value in vars(launcher).items() if not key.startswith("_")}
    exec(compile(source, "a cell", "exec"), scope)
    (made,) = (value for key, value in scope.items() if key.startswith("Solved"))
    return made, {"In": [source]}


NO_TOKENS = """x, routing):
        if len(x) == 0:
            none = torch.zeros(0, 5, dtype=torch.int64)
            return x, none.new_zeros(self.num_local_experts), AllGatherHandle(none, routing.topk_weights)
"""
WEIGHTS = "metadata[mine], routing.topk_weights"
PADDED = "F.pad(x, (0, 0, 0, longest - num_tokens))"
HOME = "        return rows, counts"
DISPATCHERS = {  # {the fault: (what stands in the solution, what stands there now, what the verdict must say)}
    "padding": (
        "(is_mine & (metadata[:, IS_PADDING] == 0))",
        "is_mine",
        "rows of nobody",
        "padding passed for data",
    ),
    "order": (
        "mine = mine[local_expert[mine].argsort(stable=True)]",
        "pass",
        "not sorted by expert",
        "rank 0",
    ),
    "counts": ("self.num_local_experts)\n        rows", "9)\n        rows", "counts must be int64 [4]"),
    "another rank's rows": (
        "- self.comm.rank * self",
        "- (self.comm.size - 1 - self.comm.rank) * self",
        "expert 0 got a row of token",
        "which chose experts [1, ",
    ),
    "lost on the way home": (
        HOME,
        "        metadata[:, SOURCE_TOKEN] = metadata[:, SOURCE_TOKEN].roll(3)\n" + HOME,
        "a row of token 1 came back to token 0",
    ),
    "another weight": (WEIGHTS, WEIGHTS + ".flip(1)", "with the weight of expert"),
    "no gradient for the router": (WEIGHTS, WEIGHTS + ".detach()", "topk_weights got no gradient"),
    "no backward": (
        f"AllGather.apply({PADDED}, self.comm)",
        f'self.comm.all_gather({PADDED}, "rows")',
        "have no gradient to pass on",
    ),
    "W times": (
        HOME,
        "        rows.register_hook(lambda grad: grad * self.comm.size)\n" + HOME,
        "the gradient of x is 2 times too large, the number of ranks",
    ),
    "a wrong prediction": ("* (size - 1) * longest,", "* size * longest,", "rows_sent says", "counted 0"),
    "a rank without tokens skips": (
        "x, routing):\n",
        NO_TOKENS,
        "uneven, dispatch",
        "ranks 0, 1 still wait in a collective that rank 2 did not enter",
    ),
}


@pytest.mark.parametrize("fault", DISPATCHERS)
def test_a_wrong_dispatcher_is_told_what_is_wrong(fault):
    old, new, *says = DISPATCHERS[fault]
    made, scope = answer("02_all_to_all", "solution-once", (old, new))
    verdict = check_dispatcher(made, 3 if "skips" in fault else 2, scope)
    assert verdict.startswith("not yet: ") and "\n" not in verdict
    for text in says:
        assert text in verdict, verdict


LAST = "return torch.cat([affine(h, w2[e], b2[e]) for h, e in zip(hidden, busy, strict=True)])"
EXPERTS = {
    "forgets the empty rank": (" or [0]", "", "ValueError: ", "in forward"),
    "runs the empty ones": (
        " or [0]\n",
        "\n        busy = range(len(counts))\n",
        "4 matrix products had no rows",
    ),
    "another expert's weights": ("w1[e], b1[e])) for", "w1[0], b1[0])) for", "row 3, of expert 2, is off by"),
    "order": ("busy, strict=True)])", "busy, strict=True)][::-1])", "came back in the place of row"),
    "no graph": (LAST, LAST + " if sum(counts) else torch.zeros_like(rows)", "is not part of the graph"),
}


@pytest.mark.parametrize("fault", EXPERTS)
def test_wrong_experts_are_told_what_is_wrong(fault):
    old, new, *says = EXPERTS[fault]
    made, scope = answer("03_experts", "solution-sparing", (old, new))
    verdict = check_experts(made, 2, scope)
    assert verdict.startswith("not yet: ") and all(text in verdict for text in says), verdict


@pytest.mark.parametrize("ranks", [2, 4])
def test_solutions_are_right(ranks):
    made, scope = answer("02_all_to_all", "solution-once")
    assert check_dispatcher(made, ranks, scope) == "right"
    made, scope = answer("03_experts", "solution-sparing")
    assert check_experts(made, ranks, scope) == "right"


def test_the_books_own_dispatchers_are_right():
    for kind in launcher.REGISTRIES["dispatcher"].values():
        if kind.preference(launcher.MoEConfig(), torch.device("cpu"), 1) > 0 and not hasattr(
            kind, "needs_capacity"
        ):
            exercises.trace_dispatcher(
                kind, launcher.Communicator(), exercises.Meeting(launcher.Communicator())
            )


def drop_by_position(topk_ids, probs, capacity, drop_order):
    """A policy, token by token: whoever comes first has a place."""
    left, room = topk_ids.clone(), [capacity] * probs.shape[1]
    for token, row in enumerate(topk_ids.tolist()):
        for k, expert in enumerate(row):
            if room[expert] > 0:
                room[expert] -= 1
            else:
                left[token, k] = -1
    return left


POLICIES = {
    "keeps too many": ("room[expert] > 0", "room[expert] >= 0", "has room for"),
    "drops too many": ("room[expert] > 0", "room[expert] > 1", "which has room for 1 more"),
    "the same twice": ("left[token, k] = -1", "left[token, k] = row[1 - k]", "twice"),
    "a float": ("return left", "return left.float()", "must return topk_ids, int64"),
}


@pytest.mark.parametrize("fault", POLICIES)
def test_a_wrong_capacity_policy_is_told_what_is_wrong(fault):
    old, new, says = POLICIES[fault]
    scope: dict = {}
    exec(inspect.getsource(drop_by_position).replace(old, new), scope)
    verdict = check_overflow(scope["drop_by_position"])
    assert verdict.startswith("not yet: ") and says in verdict, verdict


@pytest.mark.skipif(not launcher.REGISTRIES.get("overflow"), reason="chapter 08 registers capacity policies")
def test_a_right_capacity_policy_is_right():
    assert check_overflow(drop_by_position, 2, {"In": [inspect.getsource(drop_by_position)]}) == "right"
