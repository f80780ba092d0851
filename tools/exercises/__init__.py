"""Checks for the exercises that ask for a piece of the system: real ranks, the parity suite, and what is wrong.

    print(check_dispatcher(MyDispatcher))     "right", or "not yet: rank 0: a row of token 3 came back to token 5"
    print(check_experts(MyExperts))
    print(check_overflow(my_policy))          once chapter 08 has registered policies
    print(check_overlap(MyOrder))             once chapter 12 has cut exchanges in two

An answer is first tried alone, in the caller's process. Then its source travels to fresh ranks, as `%%ranks --with`
sends it. There it is traced (dispatcher.py, experts.py, overflow.py, overlap.py), and whatever does not fit is said by
token, expert and rank. Last it runs every case of tools/parity.py (on_ranks.py).

    @plain_verdict(Tensor)
    def check_mine(answer): ...               a check of a chapter's own: one line for whatever an answer does

    play_ranks(4, lambda comm: ...)           ranks that are threads (played.py), for a check that wants many sizes

    play_kernel(my_kernel, grid, ...)         a Triton kernel's programs in PyTorch (programs.py), on any machine
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.exercises.experts import Operations
from tools.exercises.on_ranks import check
from tools.exercises.played import check_ep_forward, play_ranks
from tools.exercises.programs import play_kernel
from tools.exercises.verdict import NotYet, plain_verdict

__all__ = ["NotYet", "Operations", "check_dispatcher", "check_ep_forward", "check_experts", "check_overflow",
           "check_overlap", "plain_verdict", "play_kernel", "play_ranks"]  # fmt: skip


def check_dispatcher(answer: type, ranks: int = 4, namespace: dict[str, Any] | None = None) -> str:
    """Runs a Dispatcher class on one rank and on `ranks` -> "right", or "not yet: ..." in one line.

    answer(num_experts, comm) makes one, and nothing but its interface is used: any number J of local experts per row,
    rows in any order. namespace: where the class was defined, {"In": [its source]}; the notebook's kernel by default.
    Costs about 6 s.
    """
    return check("dispatcher", answer, ranks, namespace)


def check_experts(answer: type, ranks: int = 4, namespace: dict[str, Any] | None = None) -> str:
    """The same for a class of experts: experts(arrived) -> y, without a product for an expert that has no rows."""
    return check("experts", answer, ranks, namespace)


def check_overflow(answer: Callable, ranks: int = 4, namespace: dict[str, Any] | None = None) -> str:
    """The same for a capacity policy of chapter 08: (topk_ids, probs, capacity, drop_order) -> topk_ids."""
    return check("overflow", answer, ranks, namespace)


def check_overlap(answer: type, ranks: int = 2, namespace: dict[str, Any] | None = None) -> str:
    """The same for an order of chapter 12, a class that inherits from InOrder: equal results, and at least half of the
    exchanges, forward and backward, with experts at work between their beginning and their end."""
    return check("overlap", answer, ranks, namespace)
