"""Checks for the exercises that ask for a piece of the system: real ranks, the parity suite, and what is wrong.

    print(check_dispatcher(MyDispatcher))     "right", or "not yet: rank 0: a row of token 3 came back to token 5"
    print(check_experts(MyExperts))
    print(check_overflow(my_policy))          once chapter 08 has registered policies

An answer is first tried alone, in the caller's process. Then its source travels to fresh ranks, as `%%ranks --with`
sends it. There it is traced: tokens that wear their own number are sent, computed, brought home and differentiated,
and whatever does not fit is said by token, expert and rank. Last it runs every case of tools/parity.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ep_launcher.launcher import (
    PASSES,
    REGISTRIES,
    Arrived,
    CollectiveError,
    Communicator,
    LoopExperts,
    Mesh,
    MoEConfig,
    dense_moe,
)
from tools.ranks import RanksError, run_cell_on_ranks
from tools.ranks.output import kernel

TOP_K = 3
PATIENCE_S = 8.0  # what a rank waits for the others between two phases, before it says who is missing
LIMIT = 1e-9


class NotYet(Exception):
    """What is wrong with an answer, in one line."""


def check_dispatcher(answer: type, ranks: int = 4, namespace: dict[str, Any] | None = None) -> str:
    """Runs a Dispatcher class on one rank and on `ranks` -> "right", or "not yet: ..." in one line.

    answer(num_experts, comm) makes one, and nothing but its interface is used: any number J of local experts a row,
    rows in any order. namespace: where the class was defined, {"In": [its source]}; the notebook's kernel by default.
    Costs about 6 s.
    """
    return check(trace_dispatcher, answer, "dispatcher", ranks, namespace)


def check_experts(answer: type, ranks: int = 4, namespace: dict[str, Any] | None = None) -> str:
    """The same for a class of experts: experts(arrived) -> y, without a product for an expert that has no rows."""
    return check(trace_experts, answer, "experts", ranks, namespace)


def check_overflow(
    answer: Callable[..., Tensor], ranks: int = 4, namespace: dict[str, Any] | None = None
) -> str:
    """The same for a capacity policy of chapter 08: (topk_ids, probs, capacity, drop_order) -> topk_ids."""
    return check(trace_overflow, answer, "overflow", ranks, namespace)


def check(trace: Any, answer: Any, kind: str, ranks: int, namespace: dict[str, Any] | None) -> str:
    """Alone, then on ranks -> the verdict."""
    try:
        trace(answer, Communicator.alone(), Meeting(Communicator.alone()))
    except NotYet as wrong:
        return f"not yet: {wrong}"
    except Exception as error:  # of the reader's own code
        return f"not yet: {describe_error(error, answer)}"
    if namespace is None:
        namespace = kernel().user_ns if kernel() is not None else {}
    folder = Path(tempfile.mkdtemp(prefix="ep-exercise-"))
    body = (
        "from tools.exercises import run_on_ranks\n"
        f"run_on_ranks({kind!r}, {answer.__name__}, comm, {str(folder / 'store')!r})"
    )
    try:
        name = [answer.__name__]
        run_cell_on_ranks(body, ranks, sent=name, timeout_s=60, device="cpu", namespace=namespace)
        return "right"
    except RanksError as error:
        return f"not yet: {first_cause(error.lines)}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def describe_error(error: Exception, answer: Any) -> str:
    """An error of the answer's own code: what, and in which line of its cell."""
    files = {
        value.__code__.co_filename for value in [answer, *vars(answer).values()] if hasattr(value, "__code__")
    }
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    where = f" (line {frames[-1].lineno} of the cell, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}{where}"


def first_cause(lines: list[str]) -> str:
    """The line of a RanksError that names the fault: our own finding, if there is one; else the reader's error."""
    for line in lines:
        if found := re.search(r"NotYet: (.*)", line):
            return found[1]
    own = [line for line in lines if "CollectiveError" not in line]
    return re.sub(r", line \d+ of the cell", "", (own or lines)[0])


def run_on_ranks(kind: str, answer: type, comm: Communicator, store: str) -> None:
    """What each rank does: the trace, then the parity suite. NotYet, or the answer's own error."""
    trace = {"dispatcher": trace_dispatcher, "experts": trace_experts, "overflow": trace_overflow}[kind]
    # One store for both meetings: a FileStore takes its file away when all have ended, perhaps under a new one's feet.
    file = dist.FileStore(store, comm.size)
    trace(answer, comm, Meeting(comm, dist.PrefixStore("trace", file)))
    run_parity(kind, answer, comm, Meeting(comm, dist.PrefixStore("parity", file)))


def run_parity(kind: str, answer: type, comm: Communicator, meeting: Meeting) -> None:
    """Every case in float64 against the dense reference: outputs, all gradients, bytes. NotYet where one is off."""
    from tools import parity  # takes the launcher of the cell's process

    REGISTRIES[kind]["yours"] = answer
    mesh = Mesh(comm, comm, Communicator.alone(comm.meter))
    names, reference = {"dispatcher": "all_gather", "experts": "loop"}, ()
    if kind == "overflow":  # an option of chapter 08: the reference takes the choices that the policy left
        from ep_launcher.launcher import CapacityOptions

        names["extras"] = (CapacityOptions(capacity_factor=1.0, overflow="yours"),)
        reference = (lambda layer, x, parameters: with_choices_of(layer, x, parameters, parity),)
    else:
        names[kind] = "yours"
    for name, case in parity.cases(comm.size).items():
        if kind == "overflow" and case["micro_batches"] > 1:
            continue  # the reference takes the choices of a layer's last forward
        config = MoEConfig(
            **parity.BASE | {k: case[k] for k in parity.BASE if k in case}, **names, dtype="float64"
        )
        with meeting.phase(f"the parity suite's case {name}"):
            facts = parity.run_case(case, config, mesh, torch.device("cpu"), *reference)
        for quantity, error in facts["errors"].items():
            if not error <= parity.LIMITS["float64"]:
                raise NotYet(
                    f"rank {comm.rank}: the parity suite's case {name}: {quantity} is off by {error:.1e}"
                )
        predicted, counted = facts["bytes"]
        if predicted != counted or not facts["bytes_agree"]:
            raise NotYet(f"the parity suite's case {name}: {predicted} bytes predicted, {counted} counted")


def with_choices_of(
    layer: Any, x: Tensor, parameters: dict[str, Tensor], parity: ModuleType
) -> tuple[Tensor, Tensor]:
    """The dense reference with the choices of all ranks as the policy left them; the aux loss sees the router's own."""
    top_k = layer.config.top_k
    left = parity.gather_uneven(layer.topk_ids, layer.mesh.batch)
    return dense_moe(x, parameters, top_k, left)[0], dense_moe(x, parameters, top_k)[1]


# ----------------------------------------------------------------------------------------------------------
# Ranks that talk past the collectives under test
# ----------------------------------------------------------------------------------------------------------


class Meeting:
    """Where ranks meet between two phases, through a file: a rank that hangs in a collective cannot hold it up."""

    def __init__(self, comm: Communicator, store: dist.Store | None = None) -> None:
        self.comm, self.store, self.number = comm, store, 0

    def exchange(self, said: Any, what: str) -> list[Any]:
        """Everybody's `said`, by rank. NotYet, which names the missing ranks, where one does not come."""
        if self.store is None:
            return [said]
        self.number += 1
        keys = [f"{self.number}/{rank}" for rank in range(self.comm.size)]
        self.store.set(keys[self.comm.rank], json.dumps(said))
        try:
            self.store.wait(keys, timedelta(seconds=PATIENCE_S))
        except RuntimeError:
            late = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            names = f"rank {late[0]}" if len(late) == 1 else f"ranks {', '.join(map(str, late))}"
            verb = "waits" if len(late) == 1 else "wait"
            raise NotYet(
                f"{what}: rank {self.comm.rank} is through, and {names} still {verb} in a collective that rank "
                f"{self.comm.rank} did not enter; every rank enters every collective"
            ) from None
        return [json.loads(self.store.get(key)) for key in keys]

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Runs a phase; then all ranks must have entered equally many collectives in it."""
        before = self.comm.meter.num_collectives
        try:
            yield
        except CollectiveError as error:
            raise NotYet(f"{what}: {error}; did every rank enter, with sizes that fit?") from None
        counts = self.exchange(self.comm.meter.num_collectives - before, what)
        if len(set(counts)) > 1:
            shown = ", ".join(f"rank {rank} {count}" for rank, count in enumerate(counts))
            raise NotYet(f"{what}: ranks entered different numbers of collectives: {shown}")

    def agree(self, found: str | None, what: str) -> None:
        """NotYet on all ranks, with the first rank's finding, where any found something."""
        for finding in self.exchange(found, what):
            if finding:
                raise NotYet(finding)


# ----------------------------------------------------------------------------------------------------------
# A dispatcher, traced
# ----------------------------------------------------------------------------------------------------------


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
        self.num_local = self.num_experts // comm.size
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

    @property
    def width(self) -> int:
        return self.total + self.num_experts

    def who(self, token: int) -> str:
        """A token's name, as its rank would say it, or another."""
        home = next(r for r in range(len(self.sizes)) if token < sum(self.sizes[: r + 1]))
        own = token - sum(self.sizes[:home])
        return f"token {own}" if home == self.rank else f"token {own} of rank {home}"

    def weight(self, token: int, expert: int) -> float:
        """The weight that a token gives to an expert that it chose."""
        return self.weights[token, self.ids[token].tolist().index(expert)].item()

    def at(self, what: str) -> str:
        """The start of a finding."""
        return f"rank {self.rank}, {self.name}: {what}"


def times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def shape_of(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def find_in_shapes(case: Traced, arrived: Any) -> str | None:
    """What is wrong with the form of dispatch's result. By names: a notebook may have an Arrived of its own."""
    if not all(hasattr(arrived, name) for name in ("x", "topk_ids", "topk_weights", "handle")):
        return case.at(f"end_dispatch returned {type(arrived).__name__}, expected Arrived")
    x, ids, weights = arrived.x, arrived.topk_ids, arrived.topk_weights
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != case.width:
        return case.at(f"Arrived.x is {shape_of(x)}, expected [R, {case.width}]")
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 2 or len(ids) != len(x):
        return case.at(
            f"Arrived.topk_ids is {shape_of(ids)}, expected int64 [{len(x)}, J], a line for each row"
        )
    if not isinstance(weights, Tensor) or weights.shape != ids.shape or weights.dtype != torch.float64:
        kind = f"{weights.dtype} " if isinstance(weights, Tensor) else ""
        wanted = f"float64 {shape_of(ids)}, as topk_ids and as wide as it was"
        return case.at(f"Arrived.topk_weights is {kind}{shape_of(weights)}, expected {wanted}")
    for row in ((ids < -1) | (ids >= case.num_local)).any(dim=1).nonzero().flatten().tolist():
        local = f"local experts are 0 to {case.num_local - 1}, and -1 is none"
        return case.at(f"Arrived.topk_ids has {ids[row].tolist()} in row {row}; {local}")
    return None


def find_in_arrived(case: Traced, arrived: Any) -> str | None:
    """What is wrong with dispatch's result on this rank."""
    if wrong := find_in_shapes(case, arrived):
        return wrong
    row, place = (arrived.topk_ids >= 0).nonzero(as_tuple=True)  # the (row, expert) pairs
    expert = arrived.topk_ids[row, place] + case.rank * case.num_local
    worn = arrived.x.detach()[row][:, : case.total]  # rows without experts are nobody's business
    for e, count in Counter(expert[worn.sum(dim=1) == 0].tolist()).items():
        return case.at(f"expert {e} got {count} rows of nobody, all zeros: padding passed for data")
    token = worn.argmax(dim=1).tolist() if case.total else []
    came = Counter(token)
    sought = Counter((case.ids // case.num_local == case.rank).nonzero()[:, 0].tolist())
    for e in range(case.rank * case.num_local, (case.rank + 1) * case.num_local):
        got = Counter(t for t, owner in zip(token, expert.tolist(), strict=True) if owner == e)
        wanted = Counter((case.ids == e).any(dim=1).nonzero().flatten().tolist())
        if got != wanted and came == sought:
            return case.at(
                "the right rows came, and topk_ids names other experts for them than their tokens chose"
            )
        for t, count in sorted((got - wanted).items()):
            if t not in wanted:
                return case.at(
                    f"expert {e} got a row of {case.who(t)}, which chose experts {case.ids[t].tolist()}"
                )
            return case.at(f"expert {e} got the row of {case.who(t)} {times(count + 1)}")
        for t in sorted(wanted - got):
            return case.at(f"expert {e} misses the row of {case.who(t)}")
    weight = arrived.topk_weights.detach()[row, place].tolist()
    for t, e, found in zip(token, expert.tolist(), weight, strict=True):
        if wrong := wrong_weight(case, case.who(t), t, e, found):
            return case.at(wrong)
    return find_in_counts(case, arrived, expert)


def find_in_counts(case: Traced, arrived: Any, expert: Tensor) -> str | None:
    """What is wrong with what Arrived says besides; expert [pairs]: those that were reached."""
    true = (expert - case.rank * case.num_local).bincount(minlength=case.num_local).tolist()
    counts, most = getattr(arrived, "counts_on_host", None), getattr(arrived, "max_pairs", None)
    if counts is not None and list(counts) != true:
        return case.at(f"counts_on_host is {counts}, and the rows of the local experts are {true}")
    if most is not None and most < sum(true):
        return case.at(f"max_pairs is {most}, and there are {sum(true)} pairs of a row and an expert")
    return None


def wrong_weight(case: Traced, name: str, token: int, expert: int, found: float) -> str | None:
    """A weight that is not the one its token gave to the expert: whose it is, or how far it is off."""
    wanted = case.weight(token, expert)
    if abs(found - wanted) <= LIMIT:
        return None
    for other, its_weight in zip(case.ids[token].tolist(), case.weights[token].tolist(), strict=True):
        if abs(found - its_weight) <= LIMIT:
            whose = f"expert {other}" if other >= 0 else "a choice that is not sent"
            return f"{name} weighs expert {expert}'s result with the weight of {whose}"
    return f"{name} counts expert {expert}'s result {found / wanted:.3g} times what its weight says"


def apply_traced_experts(case: Traced, arrived: Any, scale: Tensor) -> Tensor:
    """What the experts of a trace make of Arrived: y [R, D], each result with its expert's mark, weighted."""
    row, place = (arrived.topk_ids >= 0).nonzero(as_tuple=True)
    local = arrived.topk_ids[row, place]
    marks = torch.eye(case.num_experts, dtype=torch.float64)[case.rank * case.num_local + local]
    results = arrived.x[row] * scale[local, None] + torch.nn.functional.pad(marks, (case.total, 0))
    weighted = results * arrived.topk_weights[row, place, None]
    return weighted.new_zeros(arrived.x.shape).index_add(0, row, weighted)


def find_in_tokens(case: Traced, y: Any) -> str | None:
    """What is wrong with combine's result on this rank."""
    own = case.sizes[case.rank]
    if not isinstance(y, Tensor) or y.shape != (own, case.width):
        return case.at(f"combine returned {shape_of(y)}, expected [{own}, {case.width}]")
    for t, line in enumerate(y.detach()):
        worn = (line[: case.total].abs() > LIMIT).nonzero().flatten().tolist()
        for stranger in (s for s in worn if s != case.first + t):
            return case.at(f"a row of {case.who(stranger)} came back to token {t}")
        for e in (e for e in case.ids[case.first + t].tolist() if e >= 0):
            counted = line[case.total + e].item()
            if abs(counted) <= LIMIT:
                return case.at(f"token {t} came home without the result of expert {e}")
            if wrong := wrong_weight(case, f"token {t}", case.first + t, e, counted):
                return case.at(wrong)
    return None


def find_in_graph(case: Traced, arrived: Any, y: Tensor) -> str | None:
    """What has no gradient to pass on."""
    parts = {"dispatch's rows": arrived.x, "combine's tokens": y}
    if not case.x_needs_grad:
        del parts["dispatch's rows"]
    for part, tensor in parts.items():
        if not tensor.requires_grad:
            return case.at(f"{part} have no gradient to pass on; then the other ranks wait in backward")
    return None


def find_in_gradient(
    case: Traced, name: str, found: Tensor | None, wanted: Tensor, hint: str, size: int
) -> str | None:
    """What is wrong with one gradient: missing, a factor, or the entries that differ."""
    if found is None:
        return case.at(f"{name} got no gradient: {hint}") if wanted.numel() else None
    if (found - wanted).abs().max() <= LIMIT if wanted.numel() else True:
        return None
    factor = ((found * wanted).sum() / wanted.square().sum()).item()
    if (found - factor * wanted).abs().max() <= LIMIT and factor > 0:
        is_size = size > 1 and abs(max(factor, 1 / factor) - size) < LIMIT
        how = f"{max(factor, 1 / factor):.3g} times too {'large' if factor > 1 else 'small'}"
        return case.at(f"the gradient of {name} is {how}{', the number of ranks' * is_size}")
    line = (found - wanted).abs().flatten(1).amax(dim=1).argmax().item() if wanted.dim() > 1 else 0
    where = f" at token {line}" if wanted.dim() > 1 else ""
    return case.at(f"the gradient of {name} is wrong{where}")


def trace_dispatcher(answer: type, comm: Communicator, meeting: Meeting) -> None:
    """Sends tokens that wear their number; NotYet where a row, a weight, a gradient or a byte is not as it must be."""
    for name in traced_cases(comm.size):
        case = Traced(name, comm)
        dispatcher = answer(case.num_experts, comm)
        x = torch.eye(case.total, case.width, dtype=torch.float64)[case.mine].requires_grad_(
            case.x_needs_grad
        )
        weights = case.weights[case.mine].clone().requires_grad_()
        before = {purpose: list(sent) for purpose, sent in comm.meter.sent.items()}

        with meeting.phase(f"{name}, dispatch"):  # by halves, as a layer does
            arrived = dispatcher.end_dispatch(dispatcher.begin_dispatch(x, case.ids[case.mine], weights))
        meeting.agree(find_in_arrived(case, arrived), name)
        scale = torch.ones(case.num_local, dtype=torch.float64, requires_grad=True)
        results = apply_traced_experts(case, arrived, scale)

        with meeting.phase(f"{name}, combine"):
            y = dispatcher.end_combine(dispatcher.begin_combine(results, arrived.handle))
        meeting.agree(find_in_tokens(case, y) or find_in_graph(case, arrived, y), name)

        with meeting.phase(f"{name}, backward"):
            (y * case.pull[case.mine]).sum().backward()
        meeting.agree(find_in_gradients(case, x, weights, scale), name)
        meeting.agree(find_in_bytes(dispatcher, case, comm, before), name)


def find_in_gradients(case: Traced, x: Tensor, weights: Tensor, scale: Tensor) -> str | None:
    """The three gradients of a traced case, each worked out from the case alone."""
    is_sent = (case.ids >= 0).double()
    own = case.pull.diagonal()[:, None]  # of token n's loss in its own number
    of_x = ((case.weights * is_sent).sum(dim=1, keepdim=True) * case.pull)[case.mine]
    of_weights = ((own + case.pull.gather(1, case.total + case.ids.clamp(min=0))) * is_sent)[case.mine]
    per_choice = (case.weights * is_sent * own).flatten()
    of_experts = scale.new_zeros(case.num_experts).index_add(0, case.ids.clamp(min=0).flatten(), per_choice)
    of_experts = of_experts.split(len(scale))[case.rank]
    no_backward = "an exchange on the way there has no backward"
    return (
        (find_in_gradient(case, "x", x.grad, of_x, no_backward, case.size) if case.x_needs_grad else None)
        or find_in_gradient(
            case, "topk_weights", weights.grad, of_weights, "then the router cannot learn", case.size
        )
        or find_in_gradient(case, "the experts", scale.grad, of_experts, "combine has no backward", case.size)
    )


def find_in_bytes(
    dispatcher: Any, case: Traced, comm: Communicator, before: dict[str, list[int]]
) -> str | None:
    """Where predict_bytes does not say what this rank's meter counted since `before`."""
    sent = {
        purpose: [now - then for now, then in zip(total, before.get(purpose, [0] * len(total)), strict=True)]
        for purpose, total in comm.meter.sent.items()
    }
    for purpose in sent:
        if purpose not in (*PASSES, "metadata") and sum(sent[purpose]):
            return case.at(f"bytes went out as {purpose!r}; take one of {', '.join(PASSES)}, or metadata")
    ids = list(case.ids.split(case.sizes))
    predicted = dispatcher.predict_bytes(ids, case.width, torch.float64, case.x_needs_grad)
    if not isinstance(predicted, dict) or set(predicted) != set(PASSES):
        said = sorted(predicted) if isinstance(predicted, dict) else type(predicted).__name__
        return case.at(f"predict_bytes returned {said}, expected a table for each of {', '.join(PASSES)}")
    for name in PASSES:
        if shape_of(predicted[name]) != [case.size, case.size]:
            return case.at(f"predict_bytes' {name} is {shape_of(predicted[name])}, expected [W, W]")
        for j, says in enumerate(predicted[name][case.rank].tolist()):
            counted = sent.get(name, [0] * (max(comm.ranks) + 1))[comm.ranks[j]]
            if says != counted:
                what = f"{says} bytes for {name} from rank {case.rank} to rank {j}"
                return f"{case.name}: predict_bytes says {what}, and the meter counted {counted}"
    return None


# ----------------------------------------------------------------------------------------------------------
# Experts, traced
# ----------------------------------------------------------------------------------------------------------


class EmptyProducts(TorchDispatchMode):
    """Counts the matrix products of no rows. Private in PyTorch by its module's name, and documented for this use."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.count += args[func.overloadpacket == torch.ops.aten.addmm].shape[0] == 0
        return func(*args, **kwargs or {})


def traced_arrivals(config: MoEConfig, scores: Tensor) -> dict[str, Arrived]:
    """{what: Arrived} for six experts: one choice a row, several, some experts and some rows without any."""

    def make(ids: list[list[int]]) -> Arrived:
        generator = torch.Generator().manual_seed(1)
        topk_ids = torch.tensor(ids, dtype=torch.int64).view(len(ids), -1 if ids else 1)
        x = torch.randn(len(ids), config.hidden_dim, generator=generator, dtype=torch.float64)
        weights = 0.1 + torch.rand(topk_ids.shape, generator=generator, dtype=torch.float64)
        return Arrived(x.requires_grad_(), topk_ids, weights.requires_grad_())

    mixed = torch.where(scores > 0.5, scores.argsort(dim=1), -1)[:, :3]
    mixed[mixed == 4] = -1
    return {
        "one expert a row": make([[2], [0], [0], [5], [3], [2], [0], [5], [5], [5]]),
        "all rows for one expert": make([[2]] * 5),
        "up to three experts a row": make([*mixed.tolist(), [-1, -1, -1]]),
        "no rows": make([]),
    }


def trace_experts(answer: type, comm: Communicator, meeting: Meeting) -> None:
    """Rows for six experts, some without; NotYet where a result or a gradient is not the loop's."""
    if comm.size > 1:
        return  # the experts of one rank send nothing; over ranks the parity suite says it all
    config = MoEConfig(num_experts=6, hidden_dim=8, ffn_dim=16, dtype="float64")
    scores = torch.rand(8, 6, generator=torch.Generator().manual_seed(3))
    arrivals = zip(
        traced_arrivals(config, scores).items(), traced_arrivals(config, scores).values(), strict=True
    )
    for (what, mine), other in arrivals:
        yours, ours = answer(config, comm, 1), LoopExperts(config, comm, 1)
        with EmptyProducts() as empty:
            y = yours(mine)
        wanted, is_used = ours(other), (mine.topk_ids >= 0).any(dim=1, keepdim=True)
        found = find_in_results(y, wanted.detach(), mine, ours)
        if not found and not y.requires_grad:
            found = "the result is not part of the graph; over ranks, the others then wait in backward"
        if not found and empty.count > (0 if is_used.any() else 2):
            found = f"{empty.count} matrix products had no rows; skip the experts that got none"
        if not found:
            pull = (
                torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
                * is_used
            )
            (y * pull).sum().backward()
            (wanted * pull).sum().backward()
            found = find_in_parameters(yours, ours) or find_in_inputs(mine, other)
        if found:
            raise NotYet(f"{what}: {found}")


def find_in_results(y: Any, wanted: Tensor, arrived: Arrived, ours: LoopExperts) -> str | None:
    """Which row is wrong, and whose result it is instead. Rows without experts may hold anything."""
    if not isinstance(y, Tensor) or y.shape != arrived.x.shape:
        return f"{shape_of(y)} came back, expected {shape_of(arrived.x)}"
    is_used = (arrived.topk_ids >= 0).any(dim=1)
    x, ids, weights = arrived.x.detach(), arrived.topk_ids, arrived.topk_weights.detach()
    y = y.detach()
    for row in (((y - wanted).abs() > LIMIT).any(dim=1) & is_used).nonzero().flatten().tolist():
        is_chosen = ids[row] >= 0
        chosen, of_chosen, one = ids[row][is_chosen].tolist(), weights[row][is_chosen], slice(row, row + 1)
        with torch.no_grad():
            plain = ours(Arrived(x[one], ids[one], torch.ones_like(weights[one])))
            every = torch.arange(ours.num_local)[:, None]
            alone = ours(
                Arrived(x[row].expand(len(every), -1), every, weights[row, :1].expand(len(every), 1))
            )
            shares = ours(
                Arrived(x[row].expand(len(chosen), -1), ids[row][is_chosen, None], of_chosen[:, None])
            )
        if (plain[0] - y[row]).abs().max() <= LIMIT:
            return f"the result of row {row} is not weighted; the experts apply topk_weights"
        for expert, share in zip(chosen, shares, strict=True):
            if (wanted[row] - share - y[row]).abs().max() <= LIMIT:
                return f"row {row} came out without the result of expert {expert}"
        for expert in range(len(every)) if ids.shape[1] == 1 else ():
            if (alone[expert] - y[row]).abs().max() <= LIMIT:
                return f"row {row} is of expert {chosen[0]}, and expert {expert} computed it"
        for other in is_used.nonzero().flatten().tolist():
            if (wanted[other] - y[row]).abs().max() <= LIMIT:
                return f"the result of row {other} came back in the place of row {row}"
        whose = f"expert {chosen[0]}" if len(chosen) == 1 else f"experts {chosen}"
        return f"the result of row {row}, of {whose}, is off by {(y[row] - wanted[row]).abs().max():.2g}"
    return None


def find_in_inputs(mine: Arrived, other: Arrived) -> str | None:
    """What is wrong with the gradients of the rows and of the weights."""
    for name, grad, right in (
        ("the rows", mine.x.grad, other.x.grad),
        ("topk_weights", mine.topk_weights.grad, other.topk_weights.grad),
    ):
        if right is not None and (grad is None or not torch.allclose(grad, right)):
            return f"the gradient of {name} is {'missing' if grad is None else 'wrong'}"
    return None


def find_in_parameters(yours: torch.nn.Module, ours: LoopExperts) -> str | None:
    """Which parameter's gradient is missing, or wrong, and for which expert."""
    for name, right in ours.named_parameters():
        grad = dict(yours.named_parameters())[name].grad
        if grad is None:
            return f"{name} has no gradient; an expert without rows has a gradient of zeros"
        off = (grad - right.grad).abs().flatten(1).amax(dim=1)
        if off.max() > LIMIT:
            return f"the gradient of {name} is wrong for expert {off.argmax().item()}"
    return None


# ----------------------------------------------------------------------------------------------------------
# A capacity policy, traced
# ----------------------------------------------------------------------------------------------------------


def trace_overflow(answer: Callable[..., Tensor], comm: Communicator, meeting: Meeting) -> None:
    """Lets a policy place choices; NotYet where an expert keeps too many, or one is lost beside a free place."""
    if comm.size > 1:
        return  # a policy sends nothing
    generator = torch.Generator().manual_seed(2)
    for num_tokens, capacity in ((12, 5), (12, 2), (12, 1), (0, 1)):
        probs = (torch.randn(num_tokens, 6, generator=generator) + torch.arange(6) / 4).softmax(dim=1)
        wanted = probs.topk(2).indices
        for order in ("probs", "position"):
            left = answer(wanted.clone(), probs, capacity, order)
            if found := find_in_choices(left, wanted, probs, capacity):
                raise NotYet(f"{num_tokens} tokens, capacity {capacity}, {order}: {found}")


def find_in_choices(left: Any, wanted: Tensor, probs: Tensor, capacity: int) -> str | None:
    """What is wrong with the choices that a policy left."""
    num_experts = probs.shape[1]
    if not isinstance(left, Tensor) or left.shape != wanted.shape or left.dtype != torch.int64:
        return f"it must return topk_ids, int64 {list(wanted.shape)}"
    if left.numel() and not -1 <= left.min() <= left.max() < num_experts:
        return f"choices must be -1 or experts 0 to {num_experts - 1}"
    for token, row in enumerate(left.tolist()):
        for expert in (e for e in set(row) if e >= 0 and row.count(e) > 1):
            return f"token {token} visits expert {expert} {times(row.count(expert))}"
    load = left[left >= 0].bincount(minlength=num_experts).tolist()
    for expert, kept in enumerate(load):
        if kept > capacity:
            return f"expert {expert} keeps {kept} choices, and has room for {capacity}"
    for token, (row, before) in enumerate(zip(left.tolist(), wanted.tolist(), strict=True)):
        for expert in before:
            if expert not in row and load[expert] < capacity:
                return (
                    f"token {token} lost expert {expert}, which has room for {capacity - load[expert]} more"
                )
    return None
