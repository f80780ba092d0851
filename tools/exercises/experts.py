"""Experts, traced: rows for six experts, some without any, compared row by row with chapter 03's loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ep_launcher.launcher import Arrived, Communicator, LoopExperts, MoEConfig
from tools.exercises.meeting import Meeting
from tools.exercises.verdict import NotYet, shape_of

LIMIT = 1e-9


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


def traced_arrivals(hidden_dim: int) -> dict[str, Arrived]:
    """{what: Arrived} for six experts: one choice per row, several, some experts and some rows without any."""
    scores = torch.rand(8, 6, generator=torch.Generator().manual_seed(3))
    mixed = torch.where(scores > 0.5, scores.argsort(dim=1), -1)[:, :3]
    mixed[mixed == 4] = -1
    cases = {
        "one expert per row": [[2], [0], [0], [5], [3], [2], [0], [5], [5], [5]],
        "all rows for one expert": [[2]] * 5,
        "up to three experts per row": [*mixed.tolist(), [-1, -1, -1]],
        "no rows": [],
    }
    made = {}
    for what, ids in cases.items():
        generator = torch.Generator().manual_seed(1)
        topk_ids = torch.tensor(ids, dtype=torch.int64).view(len(ids), -1 if ids else 1)
        x = torch.randn(len(ids), hidden_dim, generator=generator, dtype=torch.float64)
        weights = 0.1 + torch.rand(topk_ids.shape, generator=generator, dtype=torch.float64)
        made[what] = Arrived(x.requires_grad_(), topk_ids, weights.requires_grad_())
    return made


def trace_experts(answer: type, comm: Communicator, meeting: Meeting) -> None:
    """NotYet where a result or a gradient is not the loop's, or a product has no rows."""
    if comm.size > 1:
        return  # the experts of one rank send nothing; over ranks the parity suite says it all
    for activation in ("gelu", "swiglu"):
        config = MoEConfig(num_experts=6, hidden_dim=8, ffn_dim=16, dtype="float64", activation=activation)
        arrivals = zip(traced_arrivals(8).items(), traced_arrivals(8).values(), strict=True)
        for (what, mine), other in arrivals:
            try:
                compare_with_loop(answer(config, comm, 1), LoopExperts(config, comm, 1), mine, other)
            except NotYet as wrong:
                raise NotYet(f"{what}{', with swiglu' * (activation == 'swiglu')}: {wrong}") from None


def compare_with_loop(yours: torch.nn.Module, ours: LoopExperts, mine: Arrived, other: Arrived) -> None:
    """NotYet where, for the same rows, a result or a gradient is not the loop's, or a product has no rows."""
    with Operations() as done:
        y = yours(mine)
    wanted, is_used = ours(other), (mine.topk_ids >= 0).any(dim=1, keepdim=True)
    look_at_results(y, wanted.detach(), mine, ours)
    if not y.requires_grad:
        raise NotYet("the result is not part of the graph; over ranks, the others then wait in backward")
    empty = sum(name in ("mm", "addmm") and shape[0] == 0 for name, shape in done.calls)
    if empty > (0 if is_used.any() else 2 + ours.activation.is_gated):
        raise NotYet(f"{empty} matrix products had no rows; skip the experts that got none")
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * is_used
    (y * pull).sum().backward()
    (wanted * pull).sum().backward()
    look_at_gradients(mine, other, yours, ours)


def look_at_results(y: Any, wanted: Tensor, arrived: Arrived, ours: LoopExperts) -> None:
    """Which row is wrong, and whose result it is instead. Rows without experts may hold anything."""
    if not isinstance(y, Tensor) or y.shape != arrived.x.shape:
        raise NotYet(f"{shape_of(y)} came back, expected {shape_of(arrived.x)}")
    x, ids, weights, y = arrived.x.detach(), arrived.topk_ids, arrived.topk_weights.detach(), y.detach()
    is_used = (ids >= 0).any(dim=1)

    def loop(row: int, ids: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            return ours(Arrived(x[row].expand(len(ids), -1), ids, weights))

    def same(one: Tensor, other: Tensor) -> bool:
        return bool((one - other).abs().max() <= LIMIT)

    for row in (((y - wanted).abs() > LIMIT).any(dim=1) & is_used).nonzero().flatten().tolist():
        mine = ids[row][ids[row] >= 0]
        chosen, every = mine.tolist(), torch.arange(ours.num_local)[:, None]
        if same(loop(row, ids[row : row + 1], torch.ones_like(weights[row : row + 1]))[0], y[row]):
            raise NotYet(f"the result of row {row} is not weighted; the experts apply topk_weights")
        shares = loop(row, mine[:, None], weights[row][ids[row] >= 0][:, None])
        for expert, share in zip(chosen, shares, strict=True):
            if same(wanted[row] - share, y[row]):
                raise NotYet(f"row {row} came out without the result of expert {expert}")
        alone = loop(row, every, weights[row, :1].expand(len(every), 1)) if ids.shape[1] == 1 else ()
        for expert, result in enumerate(alone):
            if same(result, y[row]):
                raise NotYet(f"row {row} is of expert {chosen[0]}, and expert {expert} computed it")
        for other in is_used.nonzero().flatten().tolist():
            if same(wanted[other], y[row]):
                raise NotYet(f"the result of row {other} came back in the place of row {row}")
        whose = f"expert {chosen[0]}" if len(chosen) == 1 else f"experts {chosen}"
        raise NotYet(
            f"the result of row {row}, of {whose}, is off by {(y[row] - wanted[row]).abs().max():.2g}"
        )


def look_at_gradients(mine: Arrived, other: Arrived, yours: torch.nn.Module, ours: LoopExperts) -> None:
    """Which parameter's gradient is missing or wrong, and for which expert; then the rows' and the weights'."""
    parameters = dict(yours.named_parameters())
    for name, right in ours.named_parameters():
        if name not in parameters:
            raise NotYet(f"the parameter {name} is missing; it has {', '.join(parameters) or 'none'}")
        grad = parameters[name].grad
        if grad is None:
            raise NotYet(f"{name} has no gradient; an expert without rows has a gradient of zeros")
        off = (grad - right.grad).abs().flatten(1).amax(dim=1)
        if off.max() > LIMIT:
            raise NotYet(f"the gradient of {name} is wrong for expert {off.argmax().item()}")
    for name, given, right in (
        ("the rows", mine.x, other.x),
        ("topk_weights", mine.topk_weights, other.topk_weights),
    ):
        if right.grad is not None and (given.grad is None or not torch.allclose(given.grad, right.grad)):
            raise NotYet(f"the gradient of {name} is {'missing' if given.grad is None else 'wrong'}")
