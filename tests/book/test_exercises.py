"""The exercises: every one has a check, a solution and wrong answers; and the checks with ranks say what is wrong.

That each check accepts its solution and refuses its wrong answers is tried where the notebooks run: test_book.py.
"""

import json

import pytest
import torch
from support import ROOT
from wrong_answers import WRONG, cells_tagged, source_of, split_solution

from ep_launcher import launcher
from tools.exercises import check_dispatcher, check_experts, play_ranks
from tools.exercises.dispatcher import trace
from tools.ranks.cells import run_cell_on_ranks

NOTEBOOKS = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
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
            f"{cell['id']}: tests/book/wrong_answers.py changes a text that is not there"
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
    return made_of(source)


def made_of(source: str) -> tuple[type, dict]:
    """A class's source -> (the class, a namespace as the kernel that executed it would have it)."""
    scope = {key: value for key, value in vars(launcher).items() if not key.startswith("_")}
    exec(compile(source, "a cell", "exec", dont_inherit=True), scope)
    (made,) = (value for key, value in scope.items() if key.startswith("Solved"))
    return made, {"In": [source]}


def test_an_exercise_before_the_cells_that_it_needs_says_so():
    source = source_of(next(c for c in NOTEBOOKS["05_launch"]["cells"] if c["id"] == "exercise-culprit"))
    scope: dict = {}
    exec(source, scope)
    line = scope["check_culprit"](lambda before, after: (0, "late"))
    why = "NameError: name 'describe_positions' is not defined"
    assert line == f"not yet: {why}; run the cells above first, or mend the name"


NO_TOKENS = """topk_weights):
        if len(x) == 0:
            none = torch.zeros(0, 4, dtype=torch.int64)
            return Arrived(x, topk_ids, topk_weights, AllGatherHandle(none, 0))
"""
NARROW = """    def begin_combine(self, y, handle):
        lines, rows = gather_padded(handle.metadata, self.comm, "combine", y)
        mine = (lines[:, SOURCE_RANK] == self.comm.rank) & (lines[:, IS_PADDING] == 0)
        return y.new_zeros(handle.num_tokens, y.shape[1]).index_add(0, lines[mine, SOURCE_TOKEN], rows[mine])

"""
WEIGHTS = "mine], local[mine], weights[mine], "
HOME = "        return Arrived"
DISPATCHERS = {  # {the fault: (what stands in the solution, what stands there now, what the verdict must say)}
    "padding": (
        "is_real = everyones[:, IS_PADDING, None] == 0",
        "is_real = True",
        "rows of nobody",
        "padding passed for data",
    ),
    "the wrong experts": (
        "local[mine], w",
        "local[mine].roll(1, 0), w",
        "rank 0, even: expert 0 misses the row of token 0",
    ),
    "global ids": (
        "local[mine], w",
        "ids[mine], w",
        "topk_ids has [",
        "local experts are 0 to 1, and -1 is none",
    ),
    "no line for each row": (
        "local[mine], w",
        "local, w",
        "Arrived.topk_ids is torch.int64 [",
        ", expected ",
    ),
    "a count that is not true": (
        "AllGatherHandle(everyones[mine], len(x)))",
        "AllGatherHandle(everyones[mine], len(x)), [1] * self.num_local_experts)",
        "counts_on_host is [1, 1, 1, 1]",
    ),
    "another rank's rows": (
        "ids - self.comm.rank * self",
        "ids - (self.comm.size - 1 - self.comm.rank) * self",
        "expert 0 got a row of token",
        "which chose experts [1, ",
    ),
    "a choice of -1": (
        "        lines[:, IS_PADDING] = 0\n",
        "",
        "choices of -1: expert",
        "misses the row of token",
    ),
    "lost on the way home": (
        HOME,
        "        everyones[:, SOURCE_TOKEN] = everyones[:, SOURCE_TOKEN].roll(1)\n" + HOME,
        "a row of token 1 came back to token 0",
    ),
    "another weight": (
        WEIGHTS,
        "mine], local[mine], weights[mine].flip(1), ",
        "counts expert",
        " times what its weight says",
    ),
    "weighed twice": (
        "    def predict_bytes",
        "    def begin_combine(self, y, handle):\n"
        "        return super().begin_combine(y / 2, handle)\n\n    def predict_bytes",
        "token 0 counts expert",
        "0.5 times what its weight says",
    ),
    "narrow weights": (
        WEIGHTS,
        "mine], local[mine], weights[mine].float(), ",
        "topk_weights is torch.float32",
    ),
    "no gradient for the router": (
        WEIGHTS,
        "mine], local[mine], weights[mine].detach(), ",
        "topk_weights got no gradient",
    ),
    "no backward": (
        HOME,
        "        tokens = tokens.detach()\n" + HOME,
        "have no gradient to pass on",
    ),
    "W times": (
        HOME,
        "        if tokens.requires_grad:\n"
        "            tokens.register_hook(lambda grad: grad * self.comm.size)\n" + HOME,
        "the gradient of x is 2 times what it must be, the number of ranks",
    ),
    "a wrong prediction": (
        "row * x_needs_grad + weights)",
        "row + weights)",
        "case tokens_without_gradient: ",
        " bytes predicted for dispatch backward from rank 0 to rank 1, and ",
    ),
    "a purpose of its own": ('self.comm, "metadata", t', 'self.comm, "ids", t', "bytes went out as 'ids'"),
    "narrow sums": (
        "    def predict_bytes",
        NARROW + "    def predict_bytes",
        "combine adds up in bfloat16; add up in float32 or wider",
    ),
    "a rank without tokens skips": (
        "topk_weights):\n",
        NO_TOKENS,
        "rank 0 of 3 comes to collective",
        "and rank 2 to the end of dispatch, uneven",
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


DEDUP = """
@dataclass(frozen=True)
class DedupHandle:
    token: Tensor
    splits: "tuple[list[int], list[int]]"
    num_tokens: int


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, splits, comm, purpose):
        ctx.rest = splits[::-1], comm, purpose + " backward"
        return comm.all_to_all(x, *splits, purpose)

    @staticmethod
    def backward(ctx, grad):
        splits, comm, purpose = ctx.rest
        return comm.all_to_all(grad, *splits, purpose), None, None, None


class SolvedDedup(Dispatcher):
    def wanted(self, topk_ids):
        owner = topk_ids // self.num_local_experts
        return torch.stack([(owner == rank).any(dim=1) for rank in range(self.comm.size)])

    def begin_dispatch(self, x, topk_ids, topk_weights):
        wants = self.wanted(topk_ids)
        token, counts, ones = wants.nonzero()[:, 1], wants.sum(dim=1), [1] * self.comm.size
        splits = counts.tolist(), self.comm.all_to_all(counts, ones, ones, "metadata").tolist()
        rows, weights = (Exchange.apply(t[token], splits, self.comm, "dispatch") for t in (x, topk_weights))
        ids = self.comm.all_to_all(topk_ids[token], *splits, "metadata") - self.comm.rank * self.num_local_experts
        ids = ids.masked_fill((ids < 0) | (ids >= self.num_local_experts), -1)
        return Arrived(rows, ids, weights, DedupHandle(token, splits, len(x)))

    def begin_combine(self, y, handle):
        home = Exchange.apply(y, handle.splits[::-1], self.comm, "combine")
        wide = home.to(torch.promote_types(y.dtype, torch.float32))
        return wide.new_zeros(handle.num_tokens, y.shape[1]).index_add(0, handle.token, wide).to(y.dtype)

    def predict_bytes(self, topk_ids, hidden_dim, dtype, x_needs_grad=True):
        rows = torch.stack([self.wanted(ids).sum(dim=1) for ids in topk_ids])
        row, weights = hidden_dim * dtype.itemsize, topk_ids[0].shape[1] * max(4, dtype.itemsize)
        return bytes_by_pass(rows, rows.t(), row, weights, row * x_needs_grad + weights)
"""


def test_a_dispatcher_of_another_kind_is_right():
    """One row for each rank, several experts a row, a frozen dataclass for a handle."""
    made, scope = made_of(DEDUP)
    assert check_dispatcher(made, 4, scope) == "right"


def test_rows_without_experts_may_arrive():
    everything = (
        ("mine = is_mine.any(dim=1)", "mine = is_real[:, 0]"),
        ("received = max(", "received = len(owners)  # ("),
    )
    made, scope = answer("02_all_to_all", "solution-once", *everything)
    assert check_dispatcher(made, 2, scope) == "right"


BUSY = "ids[ids >= 0].unique().tolist() or [0]"
EXPERTS = {
    "forgets the empty rank": (" or [0]", "", "no rows: ", "is not part of the graph"),
    "runs the empty ones": (BUSY, "range(self.num_local)", "4 matrix products had no rows"),
    "another expert's weights": ("w1[e].t(), b1[e]", "w1[0].t(), b1[0]", "row 0, of experts [2], is off by"),
    "another expert's rows": ("(ids == e)", "(ids == 5 - e)", "row 0, of experts [2], is off by"),
    "not weighted": (" * weights[row, j, None]", "", "row 0, of experts [2], is off by"),
    "order": (
        "(0, row, F.linear",
        "(0, row.flip(0), F.linear",
        "one expert per row: row 0, of experts [2], is",
    ),
    "two choices only": (
        "(ids == e)",
        "(ids[:, :2] == e)",
        "three experts per row: row 1, of experts [0, 2]",
    ),
    "no number": ("weights[row, j, None]", "(weights[row, j, None] / 0 * 0)", "is off by nan"),
    "no gradient for the router": (
        "weights[row, j, None]",
        "weights[row, j, None].detach()",
        "topk_weights is missing",
    ),
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


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_books_own_dispatchers_are_right(ranks):
    for kind in launcher.REGISTRIES["dispatcher"].values():
        is_able = (
            kind.preference(launcher.MoEConfig(), torch.device("cpu"), ranks) > 0 and not kind.needs_capacity
        )
        if is_able and (ranks == 1 or not issubclass(kind, launcher.PeerDispatcher)):
            play_ranks(ranks, lambda comm, kind=kind: trace(kind, comm, comm.meet))


CELL = """
import asyncio


@dataclass(frozen=True)
class Handle(Sent):
    rows: Tensor
    splits: "list[int] | None" = None


async def later():
    await asyncio.sleep(0)
    return Handle(torch.ones(2), [rank])


made = await later()
got = made.splits, made.name, Handle.__module__
"""
SENT = ("@dataclass(frozen=True)\nclass Base:\n    pass\n", "class Sent(Base):\n    name = 'sent along'\n")


def test_a_cell_on_ranks_may_hold_dataclasses_and_await():
    collected = run_cell_on_ranks(
        CELL, 2, collect=["got"], sent=["Sent"], device="cpu", namespace={"In": list(SENT)}
    )
    assert collected["got"] == [([rank], "sent along", "ranks_cell") for rank in range(2)]
