"""A capacity policy of chapter 08, traced: what it leaves of the choices, at awkward sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ep_launcher.launcher import Communicator
from tools.exercises.on_ranks import Meeting
from tools.exercises.verdict import NotYet


def trace(answer: Callable[..., Tensor], comm: Communicator, meeting: Meeting) -> None:
    """NotYet where an expert keeps too many choices, or one is lost beside a free place."""
    if comm.size > 1:
        return  # a policy sends nothing
    generator = torch.Generator().manual_seed(2)
    for num_tokens, capacity in ((12, 5), (12, 2), (12, 1), (0, 1)):
        probs = (torch.randn(num_tokens, 6, generator=generator) + torch.arange(6) / 4).softmax(dim=1)
        wanted = probs.topk(2).indices
        for order in ("probs", "position"):
            left = answer(wanted.clone(), probs.clone(), capacity, order)
            for fault in faults(left, wanted, probs.shape[1], capacity):
                raise NotYet(f"{num_tokens} tokens, capacity {capacity}, {order}: {fault}")


def faults(left: Any, wanted: Tensor, num_experts: int, capacity: int) -> list[str]:
    """What is wrong with the choices that a policy left."""
    if not isinstance(left, Tensor) or left.shape != wanted.shape or left.dtype != torch.int64:
        return [f"it must return topk_ids, int64 {list(wanted.shape)}"]
    if left.numel() and not -1 <= left.min() <= left.max() < num_experts:
        return [f"choices must be -1 or experts 0 to {num_experts - 1}"]
    rows, load = left.tolist(), left[left >= 0].bincount(minlength=num_experts).tolist()
    found = [
        f"token {t} visits expert {e} more than once"
        for t, row in enumerate(rows) for e in row if e >= 0 and row.count(e) > 1
    ]  # fmt: skip
    for e, kept in enumerate(load):
        found += [f"expert {e} keeps {kept} choices, and has room for {capacity}"] * (kept > capacity)
    for t, (row, before) in enumerate(zip(rows, wanted.tolist(), strict=True)):
        for e in (e for e in before if e not in row and load[e] < capacity):
            found.append(f"token {t} lost expert {e}, which has room for {capacity - load[e]} more")
    return found
