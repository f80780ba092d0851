"""Experts, traced: rows for six experts, some without any, compared row by row with chapter 03's loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ep_launcher.launcher import Arrived, Communicator, LoopExperts, MoEConfig
from tools.exercises.on_ranks import Meeting
from tools.exercises.verdict import NotYet, shape_of

LIMIT = 1e-9
SOME, NONE = [5, -1, -1], [-1, -1, -1]
CASES = {  # {what: the local experts of each row}, of six
    "one expert per row": [[2], [0], [0], [5], [3], [2], [0], [5], [5], [5]],
    "all rows for one expert": [[2]] * 5,
    "up to three experts per row": [[1, 3, -1], [0, -1, 2], [3, 5, 1], NONE, SOME, [-1, 2, 0], [-1, -1, 1], NONE],
    "no rows": [],
}  # fmt: skip


class Operations(TorchDispatchMode):
    """calls: [(operation, shape of its first tensor)]. The mode is private by its module's name, and documented."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [value for value in args[name == "addmm" :] if isinstance(value, Tensor)]
        self.calls.append((name, list(tensors[0].shape) if tensors else []))
        return func(*args, **kwargs or {})


def make_arrived(ids: list[list[int]], hidden_dim: int) -> Arrived:
    """The rows of a case, always the same."""
    generator = torch.Generator().manual_seed(1)
    topk_ids = torch.tensor(ids, dtype=torch.int64).view(len(ids), -1 if ids else 1)
    x = torch.randn(len(ids), hidden_dim, generator=generator, dtype=torch.float64)
    weights = 0.1 + torch.rand(topk_ids.shape, generator=generator, dtype=torch.float64)
    return Arrived(x.requires_grad_(), topk_ids, weights.requires_grad_())


def trace(answer: type, comm: Communicator, meeting: Meeting) -> None:
    """NotYet where a result or a gradient is not the loop's, or a product has no rows."""
    if comm.size > 1:
        return  # the experts of one rank send nothing; over ranks the parity suite says it all
    for activation in ("gelu", "swiglu"):
        config = MoEConfig(num_experts=6, hidden_dim=8, ffn_dim=16, dtype="float64", activation=activation)
        for what, ids in CASES.items():
            yours, ours = answer(config, comm, 1), LoopExperts(config, comm, 1)
            try:
                compare_with_loop(yours, ours, make_arrived(ids, 8), make_arrived(ids, 8))
            except NotYet as wrong:
                raise NotYet(f"{what}{', with swiglu' * (activation == 'swiglu')}: {wrong}") from None


def compare_with_loop(yours: torch.nn.Module, ours: LoopExperts, mine: Arrived, other: Arrived) -> None:
    """NotYet where, for the same rows, a result or a gradient is not the loop's, or a product has no rows."""
    with Operations() as done:
        y = yours(mine)
    if shape_of(y) != shape_of(mine.x):
        raise NotYet(f"{shape_of(y)} came back, expected {shape_of(mine.x)}")
    wanted, is_used = ours(other), (mine.topk_ids >= 0).any(dim=1, keepdim=True)  # others may hold anything
    off = ((y.detach() - wanted.detach()).abs() * is_used).amax(dim=1) if len(y) else y.new_zeros(0)
    for row in (~(off <= LIMIT)).nonzero().flatten().tolist():
        raise NotYet(name_fault(row, y.detach(), wanted.detach(), other, ours))
    if not y.requires_grad:
        raise NotYet("the result is not part of the graph; over ranks, the others then wait in backward")
    empty = sum(name in ("mm", "addmm") and shape[0] == 0 for name, shape in done.calls)
    if empty > (0 if is_used.any() else 2 + ours.activation.is_gated):
        raise NotYet(f"{empty} matrix products had no rows; skip the experts that got none")
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * is_used
    (y * pull).sum().backward()
    (wanted * pull).sum().backward()
    look_at_gradients(mine, other, yours, ours)


@torch.no_grad()
def name_fault(row: int, y: Tensor, wanted: Tensor, arrived: Arrived, ours: LoopExperts) -> str:
    """Whose result stands in this row of y instead, or which part of its own."""
    ids, weights = arrived.topk_ids[row], arrived.topk_weights[row]
    chosen, every = ids[ids >= 0], torch.arange(ours.num_local)

    def results(experts: Tensor, weights: Tensor) -> Tensor:
        """This row's weighted results, expert by expert."""
        return ours(Arrived(arrived.x[row].expand(len(experts), -1), experts[:, None], weights[:, None]))

    bare = results(chosen, torch.ones(len(chosen), dtype=y.dtype)).sum(0)
    known = {f"the result of row {row} is not weighted; the experts apply topk_weights": bare}
    for e, share in zip(chosen.tolist(), results(chosen, weights[ids >= 0]), strict=True):
        known[f"row {row} came out without the result of expert {e}"] = wanted[row] - share
    if len(ids) == 1:
        for e, result in enumerate(results(every, weights.expand(len(every)))):
            known[f"row {row} is of expert {chosen[0]}, and expert {e} computed it"] = result
    for n, other in enumerate(wanted):
        known[f"the result of row {n} came back in the place of row {row}"] = other
    for said, result in known.items():
        if (result - y[row]).abs().max() <= LIMIT:
            return said
    whose = f"expert {chosen[0]}" if len(chosen) == 1 else f"experts {chosen.tolist()}"
    return f"the result of row {row}, of {whose}, is off by {(y[row] - wanted[row]).abs().max():.2g}"


def look_at_gradients(mine: Arrived, other: Arrived, yours: torch.nn.Module, ours: LoopExperts) -> None:
    """Which parameter's gradient is missing or wrong, and for which expert; then the rows' and the weights'."""
    parameters = dict(yours.named_parameters())
    for name, right in ours.named_parameters():
        if name not in parameters:
            raise NotYet(f"the parameter {name} is missing; it has {', '.join(parameters) or 'none'}")
        if (grad := parameters[name].grad) is None:
            raise NotYet(f"{name} has no gradient; an expert without rows has a gradient of zeros")
        off = (grad - right.grad).abs().flatten(1).amax(dim=1)
        if off.max() > LIMIT:
            raise NotYet(f"the gradient of {name} is wrong for expert {off.argmax().item()}")
    for name, field in (("the rows", "x"), ("topk_weights", "topk_weights")):
        found, right = getattr(mine, field).grad, getattr(other, field).grad
        if right is not None and (found is None or not torch.allclose(found, right)):
            raise NotYet(f"the gradient of {name} is {'missing' if found is None else 'wrong'}")
