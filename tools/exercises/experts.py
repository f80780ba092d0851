"""Experts, traced: rows for six experts, some without any, compared row by row with chapter 03's loop."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ep_launcher.launcher import Arrived, Communicator, LoopExperts, MoEConfig
from tools.exercises.on_ranks import try_on_ranks
from tools.exercises.verdict import NotYet, plain_verdict, shape_of

LIMIT = 1e-9
SOME, NONE = [5, -1, -1], [-1, -1, -1]
CASES = {  # {what: the local experts of each row}, of six
    "one expert per row": [[2], [0], [0], [5], [3], [2], [0], [5], [5], [5]],
    "all rows for one expert": [[2]] * 5,
    "up to three experts per row": [[1, 3, -1], [0, -1, 2], [3, 5, 1], NONE, SOME, [-1, 2, 0], [-1, -1, 1], NONE],
    "no rows": [],
}  # fmt: skip


@plain_verdict(type)
def check_experts(answer: type, ranks: int = 4, namespace: dict[str, Any] | None = None) -> str:
    """check_dispatcher for experts: experts(arrived) -> y, without a product for an expert that has no rows."""
    for activation in ("gelu", "swiglu"):
        config = MoEConfig(num_experts=6, hidden_dim=8, ffn_dim=16, dtype="float64", activation=activation)
        for what, ids in CASES.items():
            yours, ours = (kind(config, Communicator.alone(), 1) for kind in (answer, LoopExperts))
            try:
                compare_with_loop(yours, ours, make_arrived(ids, 8), make_arrived(ids, 8))
            except NotYet as wrong:
                raise NotYet(f"{what}{', with swiglu' * (activation == 'swiglu')}: {wrong}") from None
    return try_on_ranks("experts", answer, ranks, namespace)


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


def compare_with_loop(yours: torch.nn.Module, ours: LoopExperts, mine: Arrived, other: Arrived) -> None:
    """NotYet where, for the same rows, a result or a gradient is not the loop's, or a product has no rows."""
    with Operations() as done:
        y = yours(mine)
    if shape_of(y) != shape_of(mine.x):
        raise NotYet(f"{shape_of(y)} came back, expected {shape_of(mine.x)}")
    wanted, is_used = ours(other), (mine.topk_ids >= 0).any(dim=1, keepdim=True)  # others may hold anything
    for row in (~((y - wanted).abs() * is_used <= LIMIT)).any(dim=1).nonzero().flatten().tolist():
        off, chosen = (y - wanted)[row].abs().max(), [e for e in other.topk_ids[row].tolist() if e >= 0]
        raise NotYet(f"row {row}, of experts {chosen}, is off by {off:.2g}")
    if not y.requires_grad:
        raise NotYet("the result is not part of the graph; over ranks, the others then wait in backward")
    empty = sum(name in ("mm", "addmm") and shape[0] == 0 for name, shape in done.calls)
    if empty > (0 if is_used.any() else 2 + ours.activation.is_gated):
        raise NotYet(f"{empty} matrix products had no rows; skip the experts that got none")
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * is_used
    (y * pull).sum().backward()
    (wanted * pull).sum().backward()
    found = dict(yours.named_parameters()) | {"the rows": mine.x, "topk_weights": mine.topk_weights}
    right = dict(ours.named_parameters()) | {"the rows": other.x, "topk_weights": other.topk_weights}
    for name, tensor in right.items():
        grad = getattr(found.get(name), "grad", None)
        if tensor.grad is not None and grad is None:
            raise NotYet(f"the gradient of {name} is missing; where there are no rows, it is zeros")
        if tensor.grad is not None and not torch.allclose(grad, tensor.grad):
            raise NotYet(f"the gradient of {name} is wrong")
