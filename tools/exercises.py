"""Checks for the exercises that ask for a piece of the system: real ranks, the parity suite, and what is wrong.

    print(check_dispatcher(MyDispatcher))     "right", or "not yet: rank 0: a row of token 3 came back to token 5"
    print(check_experts(MyExperts))
    print(check_overflow(my_policy))          once chapter 08 has registered policies

An answer is first tried alone, in the caller's process. Then its source travels to fresh ranks, as `%%ranks --with`
sends it. There it is traced: tokens that wear their own number are sent, computed, brought home and differentiated,
and whatever does not fit is said by token, expert and rank. Last it runs every case of tests/parity.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
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
    REGISTRIES,
    CollectiveError,
    Communicator,
    LoopExperts,
    MoEConfig,
    Routing,
    dense_moe,
)
from tools.launch import ROOT, kernel
from tools.ranks import RanksError, run_cell_on_ranks

TOP_K = 3
PATIENCE_S = 8.0  # what a rank waits for the others between two phases, before it says who is missing
LIMIT = 1e-9


class NotYet(Exception):
    """What is wrong with an answer, in one line."""


def check_dispatcher(answer: type, ranks: int = 4, namespace: dict[str, Any] | None = None) -> str:
    """Runs a Dispatcher class of the reader's on one rank and on `ranks` -> "right", or "not yet: ..." in one line.

    namespace: where the class was defined; the notebook's kernel by default. Costs about 6 s.
    """
    return check(trace_dispatcher, answer, "dispatcher", ranks, namespace)


def check_experts(answer: type, ranks: int = 4, namespace: dict[str, Any] | None = None) -> str:
    """The same for a class of experts, which must run no product for an expert without rows (chapter 03)."""
    return check(trace_experts, answer, "experts", ranks, namespace)


def check_overflow(
    answer: Callable[..., Tensor], ranks: int = 4, namespace: dict[str, Any] | None = None
) -> str:
    """The same for a capacity policy of chapter 08: (topk_ids, probs, capacity, drop_order) -> topk_ids."""
    return check(trace_overflow, answer, "overflow", ranks, namespace)


def check(trace: Any, answer: Any, kind: str, ranks: int, namespace: dict[str, Any] | None) -> str:
    """Alone, then on ranks -> the verdict."""
    try:
        trace(answer, Communicator(), Meeting(Communicator()))
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


def load_parity() -> ModuleType:
    """tests/parity.py, the suite that every implementation of the book passes."""
    spec = importlib.util.spec_from_file_location("ep_parity", ROOT / "tests" / "parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_parity(kind: str, answer: type, comm: Communicator, meeting: Meeting) -> None:
    """Every case in float64 against the dense reference: outputs, all gradients, bytes. NotYet where one is off."""
    parity = load_parity()
    REGISTRIES[kind]["yours"] = answer
    names, reference = {"dispatcher": "all_gather", "experts": "loop"}, ()
    if kind == "overflow":  # an option of chapter 08: the reference takes the choices that the policy left
        from ep_launcher.launcher import CapacityOptions

        names["extras"] = (CapacityOptions(capacity_factor=1.0, overflow="yours"),)
        reference = (lambda layer, x, parameters: with_choices_of(layer, x, parameters, parity),)
    else:
        names[kind] = "yours"
    for name, case in parity.cases(comm.size).items():
        config = MoEConfig(
            **parity.BASE | {k: case[k] for k in parity.BASE if k in case}, **names, dtype="float64"
        )
        with meeting.phase(f"the parity suite's case {name}"):
            facts = parity.run_case(case, config, comm, torch.device("cpu"), *reference)
        for quantity, error in facts["errors"].items():
            if not error <= parity.LIMITS["float64"]:
                raise NotYet(
                    f"rank {comm.rank}: the parity suite's case {name}: {quantity} is off by {error:.1e}"
                )
        predicted, counted = facts["bytes"]
        if predicted != counted:
            raise NotYet(f"the parity suite's case {name}: {predicted} bytes predicted, {counted} counted")


def with_choices_of(
    layer: Any, x: Tensor, parameters: dict[str, Tensor], parity: ModuleType
) -> tuple[Tensor, Tensor]:
    """The dense reference with the choices of all ranks as the policy left them; the aux loss sees the router's own."""
    top_k = layer.config.top_k
    left = parity.gather_uneven(layer.topk_ids, layer.comm)
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
        before = self.comm.num_collectives
        try:
            yield
        except CollectiveError as error:
            raise NotYet(f"{what}: {error}; did every rank enter, with sizes that fit?") from None
        counts = self.exchange(self.comm.num_collectives - before, what)
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
    """{name: (tokens per rank, experts that may be chosen)}; the last ones leave ranks without rows or tokens."""
    num_experts = 2 * max(size, 2)
    return {
        "even": ([3] * size, num_experts),
        "uneven": (([3, 6, 0, 2] * size)[:size], num_experts),
        "nobody wants the last rank": ([4] * size, num_experts - 2 * (size > 1)),
    }


class Traced:
    """One case: tokens that wear their own number, and what must come of them.

    A token is [N + E] numbers: a 1 at its own place among all N tokens. Expert e puts a 1 at place N + e. So from
    the numbers alone one reads whose row it is, and who computed it.
    """

    def __init__(self, name: str, comm: Communicator) -> None:
        self.name, self.rank = name, comm.rank
        self.sizes, choosable = traced_cases(comm.size)[name]
        self.total, self.num_experts = sum(self.sizes), 2 * max(comm.size, 2)
        generator = torch.Generator().manual_seed(5)
        scores = torch.rand(self.total, self.num_experts, generator=generator)
        scores[:, choosable:] = -1
        self.ids = scores.topk(TOP_K).indices
        self.weights = 0.1 + torch.rand(self.total, TOP_K, generator=generator, dtype=torch.float64)
        self.pull = torch.rand(
            self.total, self.width, generator=generator, dtype=torch.float64
        )  # d loss / d y
        self.first = sum(self.sizes[: self.rank])
        self.mine = slice(self.first, self.first + self.sizes[self.rank])
        self.config = MoEConfig(
            num_experts=self.num_experts, top_k=TOP_K, hidden_dim=self.width, dtype="float64"
        )

    @property
    def width(self) -> int:
        return self.total + self.num_experts

    def who(self, token: int) -> str:
        """A token's name, as its rank would say it, or another."""
        home = next(r for r in range(len(self.sizes)) if token < sum(self.sizes[: r + 1]))
        own = token - sum(self.sizes[:home])
        return f"token {own}" if home == self.rank else f"token {own} of rank {home}"

    def at(self, what: str) -> str:
        """The start of a finding."""
        return f"rank {self.rank}, {self.name}: {what}"


def times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def find_in_rows(case: Traced, out: Any, num_local: int) -> str | None:
    """What is wrong with dispatch's result on this rank."""
    if not isinstance(out, tuple) or len(out) != 3:
        return case.at("dispatch returned no (rows, counts, handle)")
    rows, counts, _ = out
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] != case.width:
        return case.at(f"dispatch's rows are {list(getattr(rows, 'shape', []))}, expected [R, {case.width}]")
    if not isinstance(counts, Tensor) or counts.dtype != torch.int64 or counts.shape != (num_local,):
        return case.at(f"counts must be int64 [{num_local}], one number a local expert")
    if counts.sum() > len(rows):
        return case.at(f"counts add up to {counts.sum()}, and there are {len(rows)} rows")
    tokens = rows.detach()[: counts.sum(), : case.total]  # what may stand behind is nobody's
    came = Counter(tokens.argmax(dim=1).tolist()) if (tokens.sum(dim=1) > 0).all() else None
    sought = Counter((case.ids // num_local == case.rank).nonzero()[:, 0].tolist())
    for local, block in enumerate(tokens.split(counts.tolist())):
        expert = case.rank * num_local + local
        if nobody := int((block.sum(dim=1) == 0).sum()):
            return case.at(f"expert {expert} got {nobody} rows of nobody, all zeros: padding passed for data")
        got = Counter(block.argmax(dim=1).tolist())
        wanted = Counter((case.ids == expert).any(dim=1).nonzero().flatten().tolist())
        if got != wanted and came == sought:
            return case.at("the right rows came, and they are not sorted by expert as counts says")
        for token, count in sorted((got - wanted).items()):
            if token not in wanted:
                chose = case.ids[token].tolist()
                return case.at(f"expert {expert} got a row of {case.who(token)}, which chose experts {chose}")
            return case.at(f"expert {expert} got the row of {case.who(token)} {times(count + 1)}")
        for token in sorted(wanted - got):
            return case.at(f"expert {expert} misses the row of {case.who(token)}")
    return None


def find_in_tokens(case: Traced, y: Any) -> str | None:
    """What is wrong with combine's result on this rank."""
    own = case.sizes[case.rank]
    if not isinstance(y, Tensor) or y.shape != (own, case.width):
        return case.at(f"combine returned {list(getattr(y, 'shape', []))}, expected [{own}, {case.width}]")
    for t, line in enumerate(y.detach()):
        strangers = [
            s for s in (line[: case.total].abs() > LIMIT).nonzero().flatten().tolist() if s != case.first + t
        ]
        if strangers:
            return case.at(f"a row of {case.who(strangers[0])} came back to token {t}")
        ids, weights = case.ids[case.first + t], case.weights[case.first + t]
        for e, weight in zip(ids.tolist(), weights, strict=True):
            counted = line[case.total + e]
            if (counted - weight).abs() <= LIMIT:
                continue
            if counted.abs() <= LIMIT:
                return case.at(f"token {t} came home without the result of expert {e}")
            for other, its_weight in zip(ids.tolist(), weights, strict=True):
                if (counted - its_weight).abs() <= LIMIT:
                    return case.at(f"token {t} weighs expert {e}'s result with the weight of expert {other}")
            factor = (counted / weight).item()
            return case.at(f"token {t} counts expert {e}'s result {factor:.3g} times what its weight says")
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
        num_local = case.num_experts // comm.size
        dispatcher = answer(case.config, comm)
        x = torch.eye(case.total, case.width, dtype=torch.float64)[case.mine].requires_grad_()
        weights = case.weights[case.mine].clone().requires_grad_()
        routing = Routing(case.ids[case.mine], weights, weights.new_zeros(len(x), case.num_experts))
        sent = [comm.meter.total("rows")]

        with meeting.phase(f"{name}, dispatch"):
            out = dispatcher.dispatch(x, routing)
        meeting.agree(find_in_rows(case, out, num_local), name)
        rows, counts, handle = out
        sent.append(comm.meter.total("rows"))
        scale = torch.ones(num_local, dtype=torch.float64, requires_grad=True)
        local = torch.arange(num_local).repeat_interleave(counts)
        marks = torch.eye(case.num_experts, dtype=torch.float64)[comm.rank * num_local + local]
        counted, rest = rows.split([len(local), len(rows) - len(local)])
        marked = counted * scale[local, None] + torch.nn.functional.pad(marks, (case.total, 0))
        results = torch.cat([marked, rest])

        with meeting.phase(f"{name}, combine"):
            y = dispatcher.combine(results, handle)
        found = find_in_tokens(case, y)
        if not found and not (rows.requires_grad and y.requires_grad):
            part = "dispatch's rows" if not rows.requires_grad else "combine's tokens"
            found = case.at(f"{part} have no gradient to pass on; then the other ranks wait in backward")
        meeting.agree(found, name)
        sent.append(comm.meter.total("rows"))

        with meeting.phase(f"{name}, backward"):
            (y * case.pull[case.mine]).sum().backward()
        sent.append(comm.meter.total("rows"))
        meeting.agree(find_in_gradients(case, x, weights, scale, comm.size), name)
        find_in_bytes(answer, case, meeting, sent, num_local)


def find_in_gradients(case: Traced, x: Tensor, weights: Tensor, scale: Tensor, size: int) -> str | None:
    """The three gradients of a traced case, each worked out from the case alone."""
    pull, own = case.pull, torch.arange(case.total)
    of_x = (case.weights.sum(dim=1, keepdim=True) * pull)[case.mine]
    of_weights = (pull[own, own][:, None] + pull.gather(1, case.total + case.ids))[case.mine]
    per_choice = (case.weights * pull[own, own][:, None]).flatten()
    of_experts = scale.new_zeros(case.num_experts).index_add(0, case.ids.flatten(), per_choice)
    of_experts = of_experts.split(len(scale))[case.rank]
    return (
        find_in_gradient(case, "x", x.grad, of_x, "an exchange on the way there has no backward", size)
        or find_in_gradient(
            case, "topk_weights", weights.grad, of_weights, "then the router cannot learn", size
        )
        or find_in_gradient(case, "the experts", scale.grad, of_experts, "combine has no backward", size)
    )


def find_in_bytes(answer: type, case: Traced, meeting: Meeting, sent: list[int], num_local: int) -> None:
    """NotYet where rows_sent does not predict what the meters counted."""
    counted = [(after - before) // (8 * case.width) for before, after in zip(sent, sent[1:], strict=False)]
    totals = [sum(by_rank) for by_rank in zip(*meeting.exchange(counted, case.name), strict=True)]
    dispatch, combine = answer.rows_sent(list(case.ids.split(case.sizes)), num_local)
    predicted = [int(dispatch), int(combine), int(dispatch) + int(combine)]
    for part, says, counts in zip(("dispatch", "combine", "backward"), predicted, totals, strict=True):
        if says != counts:
            raise NotYet(
                f"{case.name}: rows_sent says {says} rows for {part}, and the meters counted {counts}"
            )


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


def trace_experts(answer: type, comm: Communicator, meeting: Meeting) -> None:
    """Rows for six experts, some without; NotYet where a result or a gradient is not the loop's."""
    if comm.size > 1:
        return  # the experts of one rank send nothing; over ranks the parity suite says it all
    config = MoEConfig(num_experts=6, hidden_dim=8, ffn_dim=16, dtype="float64")
    for counts in ([3, 0, 2, 1, 0, 4], [0, 0, 5, 0, 0, 0], [0] * 6):
        yours, ours = answer(config, comm), LoopExperts(config, comm)
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(sum(counts), 8, generator=generator, dtype=torch.float64)
        pull = torch.randn(sum(counts), 8, generator=generator, dtype=torch.float64)
        inputs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
        with EmptyProducts() as empty:
            y = yours(inputs[0], torch.tensor(counts))
        wanted = ours(inputs[1], torch.tensor(counts))
        found = find_in_results(y, wanted.detach(), rows, counts, ours)
        if not found and not y.requires_grad:
            found = "the result is not part of the graph; over ranks, the others then wait in backward"
        if not found and empty.count > (0 if sum(counts) else 2):
            found = f"{empty.count} matrix products had no rows; skip the experts that got none"
        if not found:
            (y * pull).sum().backward()
            (wanted * pull).sum().backward()
            found = find_in_parameters(yours, ours) or (
                "the gradient of the rows is wrong"
                if inputs[0].grad is None or not torch.allclose(inputs[0].grad, inputs[1].grad)
                else None
            )
        if found:
            raise NotYet(f"counts {counts}: {found}")


def find_in_results(y: Any, wanted: Tensor, rows: Tensor, counts: list[int], ours: LoopExperts) -> str | None:
    """Which row is wrong, and whose result it is instead."""
    if not isinstance(y, Tensor) or y.shape != rows.shape:
        return f"{list(getattr(y, 'shape', []))} came back, expected {list(rows.shape)}"
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).tolist()
    num_experts = len(counts)
    for row in ((y - wanted).abs() > LIMIT).any(dim=1).nonzero().flatten().tolist():
        with torch.no_grad():
            every = ours(rows[row].repeat(num_experts, 1), torch.ones(num_experts, dtype=torch.int64))
        for expert in range(num_experts):
            if (every[expert] - y[row]).abs().max() <= LIMIT:
                return f"row {row} is of expert {owner[row]}, and expert {expert} computed it"
        for other in range(len(rows)):
            if (wanted[other] - y[row]).abs().max() <= LIMIT:
                return f"the result of row {other} came back in the place of row {row}"
        return f"the result of row {row}, of expert {owner[row]}, is off by {(y[row] - wanted[row]).abs().max():.2g}"
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
