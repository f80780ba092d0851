"""A dispatcher, traced: tokens that wear their own number are sent, computed, brought home and differentiated."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ep_launcher.launcher import PASSES, Communicator
from tools.exercises.on_ranks import try_on_ranks
from tools.exercises.played import play_ranks
from tools.exercises.verdict import NotYet, plain_verdict, shape_of

TOP_K = 3
KNOWN = (*PASSES, "metadata")  # as what bytes go out
LIMIT = 1e-9
IDLE = "the last rank has no tokens, and nobody wants it"
CASES = ("even", "uneven", "nobody wants the last rank", IDLE, "choices of -1", "tokens without gradient")


@plain_verdict(type)
def check_dispatcher(answer: type, ranks: int = 4, namespace: dict[str, Any] | None = None) -> str:
    """Runs a Dispatcher class on one rank and on `ranks` -> "right", or "not yet: ..." in one line.

    answer(num_experts, comm) makes one, and nothing but its interface is used: any number J of local experts per row,
    rows in any order. namespace: where the class was defined, {"In": [its source]}; the notebook's kernel by default.
    Costs about 6 s.
    """
    trace(answer, Communicator.alone())
    # By name, since chapter 11 has it in a cell: its memory is mapped by processes.
    if "PeerDispatcher" not in [kind.__name__ for kind in answer.__mro__]:
        play_ranks(ranks, lambda comm: trace(answer, comm, comm.meet))  # here one sees who skips a collective
    first = f"from tools.exercises.dispatcher import trace\ntrace({answer.__name__}, comm)"
    return try_on_ranks("dispatcher", answer, ranks, namespace, first)


class Traced:
    """One case: tokens that wear their own number, and what must come of them.

    A token is [N + E] numbers: a 1 at its own place among all N tokens. Expert e puts a 1 at place N + e. So from
    the numbers alone one reads whose row it is, and who computed it.
    """

    def __init__(self, name: str, comm: Communicator) -> None:
        self.name, self.rank, self.size = name, comm.rank, comm.size
        cut = {"uneven": [3, 6, 0, 2], "tokens without gradient": [3, 0, 2], "even": [3]}.get(name, [4])
        self.sizes = (cut * comm.size)[: comm.size]
        if name == IDLE:
            self.sizes[-1] = 0
        self.total, self.num_experts = sum(self.sizes), 2 * max(comm.size, 2)
        self.num_local, self.width = self.num_experts // comm.size, self.total + self.num_experts
        self.x_needs_grad = name != "tokens without gradient"
        generator = torch.Generator().manual_seed(5)
        scores = torch.rand(self.total, self.num_experts, generator=generator)
        if name in ("nobody wants the last rank", IDLE) and comm.size > 1:
            scores[:, -2:] = -1
        self.ids = scores.topk(TOP_K).indices
        if name == "choices of -1":  # the first, a later one, or all of a token's
            self.ids[0::4, 0], self.ids[1::4, 1], self.ids[2::4] = -1, -1, -1
        # A choice that is not sent has a weight all the same, and it counts for nothing.
        self.weights = 0.1 + torch.rand(self.total, TOP_K, generator=generator, dtype=torch.float64)
        self.pull = torch.rand(self.total, self.width, generator=generator).double()  # d loss / d y
        self.first = sum(self.sizes[: self.rank])
        self.mine = slice(self.first, self.first + self.sizes[self.rank])
        self.sent, self.at = (self.ids >= 0).double(), self.ids.clamp(min=0)
        # [N, E]: what every token gives every expert.
        self.gives = torch.zeros(self.total, self.num_experts, dtype=torch.float64)
        self.gives.scatter_add_(1, self.at, self.weights * self.sent)

    def want(self, is_so: Any, what: str) -> None:
        """NotYet with `what`, where it is not so."""
        if not is_so:
            raise NotYet(f"rank {self.rank}, {self.name}: {what}")

    def who(self, token: int) -> str:
        """A token's name, as its rank would say it, or another."""
        home = next(r for r in range(self.size) if token < sum(self.sizes[: r + 1]))
        return f"token {token - sum(self.sizes[:home])}" + f" of rank {home}" * (home != self.rank)

    def compare_weights(self, found: Tensor, tokens: slice, experts: slice) -> None:
        """NotYet where these tokens count these experts' results with other weights than they gave them."""
        right = self.gives[tokens, experts]
        for t, e in (~((found - right).abs() <= LIMIT)).nonzero().tolist():
            whose = f"{self.who(t + (tokens.start or 0))} counts expert {e + (experts.start or 0)}'s result"
            self.want(False, f"{whose} {found[t, e] / right[t, e]:.3g} times what its weight says")


def trace(answer: type, comm: Communicator, meet: Callable[[str], Any] = lambda where: None) -> None:
    """Every case, by halves, as a layer does; NotYet where a row, weight or gradient is not as it must be, or no bytes
    are predicted; whether as many are sent, tools/parity.py finds out.

    meet: called at the end of every part, where ranks can say that another one is elsewhere.
    """
    for name in CASES:
        case = Traced(name, comm)
        dispatcher = answer(case.num_experts, comm)
        x = torch.eye(case.total, case.width, dtype=torch.float64)[case.mine]
        x.requires_grad_(case.x_needs_grad)
        weights = case.weights[case.mine].clone().requires_grad_()
        scale = torch.ones(case.num_local, dtype=torch.float64, requires_grad=True)  # the experts' parameters
        arrived = dispatcher.end_dispatch(dispatcher.begin_dispatch(x, case.ids[case.mine], weights))
        meet(f"the end of dispatch, {name}")
        look_at_form(case, arrived)
        row, place = (arrived.topk_ids >= 0).nonzero(as_tuple=True)
        local = arrived.topk_ids[row, place]
        look_at_rows(case, arrived, local, arrived.x.detach()[row], arrived.topk_weights.detach()[row, place])
        # Each expert puts its mark on a row; y [R, D] is a row's weighted sum over its experts.
        marks = torch.eye(case.num_experts, dtype=torch.float64)[case.rank * case.num_local + local]
        results = arrived.x[row] * scale[local, None] + F.pad(marks, (case.total, 0))
        results = results * arrived.topk_weights[row, place, None]
        results = results.new_zeros(arrived.x.shape).index_add(0, row, results)
        y = dispatcher.end_combine(dispatcher.begin_combine(results, arrived.handle))
        meet(f"the end of combine, {name}")
        look_at_tokens(case, y)
        hang = "have no gradient to pass on; then the other ranks wait in backward"
        case.want(arrived.x.requires_grad or not case.x_needs_grad, f"dispatch's rows {hang}")
        case.want(y.requires_grad, f"combine's tokens {hang}")
        (y * case.pull[case.mine]).sum().backward()
        meet(f"the end of backward, {name}")
        look_at_gradients(case, x.grad, weights.grad, scale.grad)
        tables = dispatcher.predict_bytes(list(case.ids.split(case.sizes)), case.width, torch.float64)
        said = sorted(tables) if isinstance(tables, dict) else type(tables).__name__
        wanted = f"expected a table for each of {', '.join(PASSES)}"
        case.want(said == sorted(PASSES), f"predict_bytes returned {said}, {wanted}")
    for purpose in comm.meter.sent:
        case.want(purpose in KNOWN, f"bytes went out as {purpose!r}; take one of {', '.join(KNOWN)}")
    look_at_sums(answer(2 * comm.size, comm))


def look_at_form(case: Traced, arrived: Any) -> None:
    """The form of dispatch's result. By names: a notebook may have an Arrived of its own."""
    x, ids, weights = arrived.x, arrived.topk_ids, arrived.topk_weights
    for name, found, wanted in (
        ("x", shape_of(x)[1:], [case.width]),
        ("topk_ids", f"{ids.dtype} [{len(ids)}, J]", f"{torch.int64} [{len(x)}, J]"),
        ("topk_weights", f"{weights.dtype} {shape_of(weights)}", f"{torch.float64} {shape_of(ids)}"),
    ):
        case.want(found == wanted, f"Arrived.{name} is {found}, expected {wanted}")
    for row in ((ids < -1) | (ids >= case.num_local)).any(dim=1).nonzero().flatten().tolist():
        local = f"local experts are 0 to {case.num_local - 1}, and -1 is none"
        case.want(False, f"Arrived.topk_ids has {ids[row].tolist()} in row {row}; {local}")


def look_at_rows(case: Traced, arrived: Any, local: Tensor, rows: Tensor, weights: Tensor) -> None:
    """Which rows came to which local experts of this rank, with which weights, and what Arrived says besides."""
    own = slice(case.rank * case.num_local, (case.rank + 1) * case.num_local)
    worn = rows[:, : case.total].T  # [N, pairs]; rows without experts are nobody's business
    for e in local[worn.sum(dim=0) == 0].tolist():
        case.want(False, f"expert {own.start + e} got rows of nobody, all zeros: padding passed for data")
    by_expert = F.one_hot(local, case.num_local).double()
    got, right = worn @ by_expert, case.gives[:, own] > 0
    for e, t in (got != right).T.nonzero().tolist():
        expert, chosen = f"expert {own.start + e}", case.ids[t].tolist()
        said = f"{expert} got a row of {case.who(t)}, which chose experts {chosen}"
        said = f"{expert} got the row of {case.who(t)} {got[t, e]:g} times" if right[t, e] else said
        case.want(False, f"{expert} misses the row of {case.who(t)}" if got[t, e] == 0 else said)
    case.compare_weights((worn * weights) @ by_expert, slice(None), own)
    counts, most = getattr(arrived, "counts_on_host", None), getattr(arrived, "max_pairs", None)
    true = local.bincount(minlength=case.num_local).tolist()
    is_true = counts is None or list(counts) == true
    case.want(is_true, f"counts_on_host is {counts}, and the rows of the local experts are {true}")
    is_true = most is None or most >= sum(true)
    case.want(is_true, f"max_pairs is {most}, and there are {sum(true)} pairs of a row and an expert")


def look_at_tokens(case: Traced, y: Any) -> None:
    """What came home to this rank."""
    wanted = [case.sizes[case.rank], case.width]
    case.want(shape_of(y) == wanted, f"combine returned {shape_of(y)}, expected {wanted}")
    whose, counted = y.detach().split([case.total, case.num_experts], dim=1)
    for t, stranger in (~(whose.abs() <= LIMIT)).nonzero().tolist():
        token = case.first + t
        case.want(stranger == token, f"a row of {case.who(stranger)} came back to {case.who(token)}")
    case.compare_weights(counted, case.mine, slice(None))


def look_at_gradients(case: Traced, of_x: Tensor, of_weights: Tensor, of_experts: Tensor) -> None:
    """The three gradients, each worked out from the case alone: missing, so many times too large, or wrong."""
    own = case.pull.diagonal()[:, None]  # of token n's loss in its own number
    x = case.gives.sum(dim=1, keepdim=True) * case.pull
    weights = (own + case.pull.gather(1, case.total + case.at)) * case.sent
    experts = (case.gives * own).sum(dim=0).split(case.num_local)
    for name, found, wanted, hint in (
        ("x", of_x, x[case.mine], "an exchange on the way there has no backward"),
        ("topk_weights", of_weights, weights[case.mine], "then the router cannot learn"),
        ("the experts", of_experts, experts[case.rank], "combine has no backward"),
    ):
        if wanted.numel() == 0 or (name == "x" and not case.x_needs_grad):
            continue
        case.want(found is not None, f"{name} got no gradient: {hint}")
        if (found - wanted).abs().max() <= LIMIT:
            continue
        times = ((found * wanted).sum() / wanted.square().sum()).item()
        is_factor = (found - times * wanted).abs().max() <= LIMIT
        size = ", the number of ranks" * (abs(times - case.size) < LIMIT)
        wrong = f"{times:.3g} times what it must be{size}" if is_factor else "wrong"
        case.want(False, f"the gradient of {name} is {wrong}")


class WideSums(TorchDispatchMode):
    """Refuses what adds up in bfloat16: by name, since a CPU often hides it, and a GPU does not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, name = func(*args, **kwargs or {}), func.overloadpacket.__name__.removesuffix("_")
        is_sum = name in ("add", "index_add", "scatter_add") or (name == "index_put" and True in args[3:])
        if is_sum and made.dtype == torch.bfloat16:
            raise NotYet("combine adds up in bfloat16; add up in float32 or wider, and convert the sum")
        return made


def look_at_sums(dispatcher: Any) -> None:
    """Where rows are bfloat16: weights arrive as they were, and combine adds up in float32."""
    x, ids = torch.ones(3, 8, dtype=torch.bfloat16), torch.arange(dispatcher.num_experts).repeat(3, 1)
    arrived = dispatcher.end_dispatch(dispatcher.begin_dispatch(x, ids, torch.ones(ids.shape)))
    if arrived.topk_weights.dtype != torch.float32:
        raise NotYet(f"float32 weights of bfloat16 tokens arrived in {arrived.topk_weights.dtype}")
    with WideSums():
        dispatcher.end_combine(dispatcher.begin_combine(arrived.x, arrived.handle))
