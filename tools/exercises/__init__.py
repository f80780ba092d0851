"""Checks for the exercises that ask for a piece of the system: what is wrong, then the parity suite on real ranks.

    print(check_dispatcher(MyDispatcher))     "right", or "not yet: rank 0: a row of token 3 came back to token 5"
    print(check_experts(MyExperts))
    print(check_overlap(MyOrder))             an order of chapter 12

An answer is first traced in the caller's process, ranks being threads, and whatever does not fit is said by token,
expert and rank. Then its source travels to fresh ranks, as `%%ranks --with` sends it, and runs every case of
tools/parity.py.

    @plain_verdict(Tensor)
    def check_mine(answer): ...               a check of a chapter's own: one line for whatever an answer does

    play_ranks(4, lambda comm: ...)           ranks that are threads (played.py), for a check that wants many sizes

    play_kernel(my_kernel, grid, ...)         a Triton kernel's programs in PyTorch (programs.py), on any machine
"""

from tools.exercises.dispatcher import check_dispatcher
from tools.exercises.experts import Operations, check_experts
from tools.exercises.overlap import check_overlap
from tools.exercises.played import play_ranks
from tools.exercises.programs import play_kernel
from tools.exercises.verdict import NotYet, plain_verdict

__all__ = ["NotYet", "Operations", "check_dispatcher", "check_experts", "check_overlap", "plain_verdict",
           "play_kernel", "play_ranks"]  # fmt: skip
