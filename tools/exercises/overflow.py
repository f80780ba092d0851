"""A capacity policy of chapter 08, traced: what it leaves of the choices, at awkward sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ep_launcher.launcher import Communicator
from tools.exercises.meeting import Meeting
from tools.exercises.verdict import NotYet


def trace_overflow(answer: Callable[..., Tensor], comm: Communicator, meeting: Meeting) -> None:
    """NotYet where an expert keeps too many choices, or one is lost beside a free place."""
    if comm.size > 1:
        return  # a policy sends nothing
    generator = torch.Generator().manual_seed(2)
    for num_tokens, capacity in ((12, 5), (12, 2), (12, 1), (0, 1)):
        probs = (torch.randn(num_tokens, 6, generator=generator) + torch.arange(6) / 4).softmax(dim=1)
        wanted = probs.topk(2).indices
        for order in ("probs", "position"):
            left = answer(wanted.clone(), probs.clone(), capacity, order)
            try:
                look_at_choices(left, wanted, probs.shape[1], capacity)
            except NotYet as wrong:
                raise NotYet(f"{num_tokens} tokens, capacity {capacity}, {order}: {wrong}") from None


def look_at_choices(left: Any, wanted: Tensor, num_experts: int, capacity: int) -> None:
    """The choices that a policy left."""
    if not isinstance(left, Tensor) or left.shape != wanted.shape or left.dtype != torch.int64:
        raise NotYet(f"it must return topk_ids, int64 {list(wanted.shape)}")
    if left.numel() and not -1 <= left.min() <= left.max() < num_experts:
        raise NotYet(f"choices must be -1 or experts 0 to {num_experts - 1}")
    for token, row in enumerate(left.tolist()):
        for expert in row:
            if expert >= 0 and row.count(expert) > 1:
                raise NotYet(f"token {token} visits expert {expert} more than once")
    load = left[left >= 0].bincount(minlength=num_experts).tolist()
    for expert, kept in enumerate(load):
        if kept > capacity:
            raise NotYet(f"expert {expert} keeps {kept} choices, and has room for {capacity}")
    for token, (row, before) in enumerate(zip(left.tolist(), wanted.tolist(), strict=True)):
        for expert in before:
            if expert not in row and load[expert] < capacity:
                room = capacity - load[expert]
                raise NotYet(f"token {token} lost expert {expert}, which has room for {room} more")
