"""A dispatcher, traced: tokens that wear their own number are sent, computed, brought home and differentiated."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_launcher.launcher import PASSES, Communicator
from tools.exercises.meeting import Meeting
from tools.exercises.verdict import NotYet, shape_of

TOP_K = 3
LIMIT = 1e-9


def traced_cases(size: int) -> dict[str, tuple[list[int], int]]:
    """{name: (tokens per rank, experts that may be chosen)}; some leave ranks without rows or tokens."""
    num_experts = 2 * max(size, 2)
    return {
        "even": ([3] * size, num_experts),
        "uneven": (([3, 6, 0, 2] * size)[:size], num_experts),
        "nobody wants the last rank": ([4] * size, num_experts - 2 * (size > 1)),
        "choices of -1": ([4] * size, num_experts),
        "tokens without gradient": (([3, 0, 2] * size)[:size], num_experts),
    }


class Traced:
    """One case: tokens that wear their own number, and what must come of them.

    A token is [N + E] numbers: a 1 at its own place among all N tokens. Expert e puts a 1 at place N + e. So from
    the numbers alone one reads whose row it is, and who computed it.
    """

    def __init__(self, name: str, comm: Communicator) -> None:
        self.name, self.rank, self.size = name, comm.rank, comm.size
        self.sizes, choosable = traced_cases(comm.size)[name]
        self.total, self.num_experts = sum(self.sizes), 2 * max(comm.size, 2)
        self.num_local, self.width = self.num_experts // comm.size, self.total + self.num_experts
        self.x_needs_grad = name != "tokens without gradient"
        generator = torch.Generator().manual_seed(5)
        scores = torch.rand(self.total, self.num_experts, generator=generator)
        scores[:, choosable:] = -1
        self.ids = scores.topk(TOP_K).indices
        if name == "choices of -1":  # the first, a later one, or all of a token's
            self.ids[0::4, 0], self.ids[1::4, 1], self.ids[2::4] = -1, -1, -1
        # A choice that is not sent has a weight all the same, and it counts for nothing.
        self.weights = 0.1 + torch.rand(self.total, TOP_K, generator=generator, dtype=torch.float64)
        self.pull = torch.rand(
            self.total, self.width, generator=generator, dtype=torch.float64
        )  # d loss / d y
        self.first = sum(self.sizes[: self.rank])
        self.mine = slice(self.first, self.first + self.sizes[self.rank])

    def no(self, what: str) -> NotYet:
        return NotYet(f"rank {self.rank}, {self.name}: {what}")

    def who(self, token: int) -> str:
        """A token's name, as its rank would say it, or another."""
        home = next(r for r in range(self.size) if token < sum(self.sizes[: r + 1]))
        return f"token {token - sum(self.sizes[:home])}" + f" of rank {home}" * (home != self.rank)

    def compare_weight(self, name: str, token: int, expert: int, found: float) -> None:
        """NotYet where a weight is not what the token gives the expert: whose it is, or how far it is off."""
        ids, weights = self.ids[token].tolist(), self.weights[token].tolist()
        wanted = weights[ids.index(expert)]
        if abs(found - wanted) <= LIMIT:
            return
        for other, weight in zip(ids, weights, strict=True):
            if abs(found - weight) <= LIMIT:
                whose = f"expert {other}" if other >= 0 else "a choice that is not sent"
                raise self.no(f"{name} weighs expert {expert}'s result with the weight of {whose}")
        raise self.no(
            f"{name} counts expert {expert}'s result {found / wanted:.3g} times what its weight says"
        )


def trace_dispatcher(answer: type, comm: Communicator, meeting: Meeting) -> None:
    """Every case, by halves, as a layer does; NotYet where a row, weight, gradient or byte is not as it must be."""
    for name in traced_cases(comm.size):
        case = Traced(name, comm)
        dispatcher = answer(case.num_experts, comm)
        x = torch.eye(case.total, case.width, dtype=torch.float64)[case.mine]
        x.requires_grad_(case.x_needs_grad)
        weights = case.weights[case.mine].clone().requires_grad_()
        scale = torch.ones(case.num_local, dtype=torch.float64, requires_grad=True)  # the experts' parameters
        before = {purpose: list(sent) for purpose, sent in comm.meter.sent.items()}
        with meeting.phase(f"{name}, dispatch"):
            arrived = dispatcher.end_dispatch(dispatcher.begin_dispatch(x, case.ids[case.mine], weights))
        with meeting.agreement(name):
            look_at_form(case, arrived)
            look_at_rows(case, arrived)
        results = apply_traced_experts(case, arrived, scale)
        with meeting.phase(f"{name}, combine"):
            y = dispatcher.end_combine(dispatcher.begin_combine(results, arrived.handle))
        with meeting.agreement(name):
            look_at_tokens(case, y)
            for part, tensor in {"dispatch's rows": arrived.x, "combine's tokens": y}.items():
                if not tensor.requires_grad and (case.x_needs_grad or tensor is y):
                    raise case.no(
                        f"{part} have no gradient to pass on; then the other ranks wait in backward"
                    )
        with meeting.phase(f"{name}, backward"):
            (y * case.pull[case.mine]).sum().backward()
        with meeting.agreement(name):
            look_at_gradients(case, x.grad, weights.grad, scale.grad)
            look_at_bytes(case, dispatcher, comm, before)


def look_at_form(case: Traced, arrived: Any) -> None:
    """The form of dispatch's result. By names: a notebook may have an Arrived of its own."""
    if not all(hasattr(arrived, name) for name in ("x", "topk_ids", "topk_weights", "handle")):
        raise case.no(f"end_dispatch returned {type(arrived).__name__}, expected Arrived")
    x, ids, weights = arrived.x, arrived.topk_ids, arrived.topk_weights
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != case.width:
        raise case.no(f"Arrived.x is {shape_of(x)}, expected [R, {case.width}]")
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 2 or len(ids) != len(x):
        wanted = f"expected int64 [{len(x)}, J], a line for each row"
        raise case.no(f"Arrived.topk_ids is {shape_of(ids)}, {wanted}")
    if not isinstance(weights, Tensor) or weights.shape != ids.shape or weights.dtype != torch.float64:
        kind = f"{weights.dtype} " if isinstance(weights, Tensor) else ""
        wanted = f"float64 {shape_of(ids)}, as topk_ids and as wide as it was"
        raise case.no(f"Arrived.topk_weights is {kind}{shape_of(weights)}, expected {wanted}")
    for row in ((ids < -1) | (ids >= case.num_local)).any(dim=1).nonzero().flatten().tolist():
        local = f"local experts are 0 to {case.num_local - 1}, and -1 is none"
        raise case.no(f"Arrived.topk_ids has {ids[row].tolist()} in row {row}; {local}")


def look_at_rows(case: Traced, arrived: Any) -> None:
    """Which (row, expert) pairs came to this rank, with which weights, and what Arrived says besides."""
    row, place = (arrived.topk_ids >= 0).nonzero(as_tuple=True)
    local = arrived.topk_ids[row, place]
    expert = (local + case.rank * case.num_local).tolist()
    worn = arrived.x.detach()[row][:, : case.total]  # rows without experts are nobody's business
    for e, is_nobodys in zip(expert, (worn.sum(dim=1) == 0).tolist(), strict=True):
        if is_nobodys:
            raise case.no(f"expert {e} got rows of nobody, all zeros: padding passed for data")
    token = worn.argmax(dim=1).tolist() if case.total else []
    sought = (case.ids // case.num_local == case.rank).nonzero()[:, 0].tolist()
    got, wanted = Counter(zip(token, expert, strict=True)), Counter()
    wanted.update(
        (t, e) for t, ids in enumerate(case.ids.tolist()) for e in ids if e // case.num_local == case.rank
    )
    if got != wanted and Counter(token) == Counter(sought):
        raise case.no(
            "the right rows came, and topk_ids names other experts for them than their tokens chose"
        )
    for t, e in sorted(got - wanted, key=lambda pair: pair[::-1]):
        if (t, e) in wanted:
            raise case.no(f"expert {e} got the row of {case.who(t)} {got[t, e]} times")
        raise case.no(f"expert {e} got a row of {case.who(t)}, which chose experts {case.ids[t].tolist()}")
    for t, e in sorted(wanted - got, key=lambda pair: pair[::-1]):
        raise case.no(f"expert {e} misses the row of {case.who(t)}")
    weights = arrived.topk_weights.detach()[row, place].tolist()
    for t, e, found in zip(token, expert, weights, strict=True):
        case.compare_weight(case.who(t), t, e, found)
    counts, most = getattr(arrived, "counts_on_host", None), getattr(arrived, "max_pairs", None)
    true = local.bincount(minlength=case.num_local).tolist()
    if counts is not None and list(counts) != true:
        raise case.no(f"counts_on_host is {counts}, and the rows of the local experts are {true}")
    if most is not None and most < sum(true):
        raise case.no(f"max_pairs is {most}, and there are {sum(true)} pairs of a row and an expert")


def apply_traced_experts(case: Traced, arrived: Any, scale: Tensor) -> Tensor:
    """What the experts of a trace make of Arrived: y [R, D], each result with its expert's mark, weighted."""
    row, place = (arrived.topk_ids >= 0).nonzero(as_tuple=True)
    local = arrived.topk_ids[row, place]
    marks = torch.eye(case.num_experts, dtype=torch.float64)[case.rank * case.num_local + local]
    results = arrived.x[row] * scale[local, None] + F.pad(marks, (case.total, 0))
    weighted = results * arrived.topk_weights[row, place, None]
    return weighted.new_zeros(arrived.x.shape).index_add(0, row, weighted)


def look_at_tokens(case: Traced, y: Any) -> None:
    """What came home to this rank."""
    own = case.sizes[case.rank]
    if not isinstance(y, Tensor) or y.shape != (own, case.width):
        raise case.no(f"combine returned {shape_of(y)}, expected [{own}, {case.width}]")
    for t, line in enumerate(y.detach()):
        for stranger in (line[: case.total].abs() > LIMIT).nonzero().flatten().tolist():
            if stranger != case.first + t:
                raise case.no(f"a row of {case.who(stranger)} came back to token {t}")
        for e in (e for e in case.ids[case.first + t].tolist() if e >= 0):
            counted = line[case.total + e].item()
            if abs(counted) <= LIMIT:
                raise case.no(f"token {t} came home without the result of expert {e}")
            case.compare_weight(f"token {t}", case.first + t, e, counted)


def look_at_gradients(
    case: Traced, of_x: Tensor | None, of_weights: Tensor | None, of_experts: Tensor | None
) -> None:
    """The three gradients, each worked out from the case alone: missing, a factor, or the entries that differ."""
    ids, sent = case.ids.clamp(min=0), (case.ids >= 0).double()
    own = case.pull.diagonal()[:, None]  # of token n's loss in its own number
    x = (case.weights * sent).sum(dim=1, keepdim=True) * case.pull
    weights = (own + case.pull.gather(1, case.total + ids)) * sent
    experts = torch.zeros(case.num_experts, dtype=torch.float64)
    experts = experts.index_add(0, ids.flatten(), (case.weights * sent * own).flatten()).split(case.num_local)
    for name, found, wanted, hint in (
        ("x", of_x, x[case.mine], "an exchange on the way there has no backward"),
        ("topk_weights", of_weights, weights[case.mine], "then the router cannot learn"),
        ("the experts", of_experts, experts[case.rank], "combine has no backward"),
    ):
        if wanted.numel() == 0 or (name == "x" and not case.x_needs_grad):
            continue
        if found is None:
            raise case.no(f"{name} got no gradient: {hint}")
        if (found - wanted).abs().max() <= LIMIT:
            continue
        factor = ((found * wanted).sum() / wanted.square().sum()).item()
        if (found - factor * wanted).abs().max() <= LIMIT and factor > 0:
            times, how = max(factor, 1 / factor), "large" if factor > 1 else "small"
            is_size = case.size > 1 and abs(times - case.size) < LIMIT
            size = ", the number of ranks" * is_size
            raise case.no(f"the gradient of {name} is {times:.3g} times too {how}{size}")
        worst = (found - wanted).abs().flatten(1).amax(dim=1).argmax().item() if wanted.dim() > 1 else 0
        raise case.no(f"the gradient of {name} is wrong" + f" at token {worst}" * (wanted.dim() > 1))


def look_at_bytes(case: Traced, dispatcher: Any, comm: Communicator, before: dict[str, list[int]]) -> None:
    """Whether predict_bytes says what this rank's meter counted since `before`."""
    for purpose, sent in comm.meter.sent.items():
        if purpose not in (*PASSES, "metadata") and sum(sent) > sum(before.get(purpose, [])):
            raise case.no(f"bytes went out as {purpose!r}; take one of {', '.join(PASSES)}, or metadata")
    ids, none = list(case.ids.split(case.sizes)), [0] * (max(comm.ranks) + 1)
    predicted = dispatcher.predict_bytes(ids, case.width, torch.float64, case.x_needs_grad)
    if not isinstance(predicted, dict) or set(predicted) != set(PASSES):
        said = sorted(predicted) if isinstance(predicted, dict) else type(predicted).__name__
        raise case.no(f"predict_bytes returned {said}, expected a table for each of {', '.join(PASSES)}")
    for name in PASSES:
        if shape_of(predicted[name]) != [case.size, case.size]:
            raise case.no(f"predict_bytes' {name} is {shape_of(predicted[name])}, expected [W, W]")
        for rank, says in enumerate(predicted[name][case.rank].tolist()):
            now, then = (sent.get(name, none)[comm.ranks[rank]] for sent in (comm.meter.sent, before))
            if says != now - then:
                what = f"{says} bytes for {name} from rank {case.rank} to rank {rank}"
                raise NotYet(f"{case.name}: predict_bytes says {what}, and the meter counted {now - then}")
