"""Chapter 01's expert-parallel forward pass, tried on played ranks: every token, and the bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.exercises.played import PlayedCommunicator, play_ranks
from tools.exercises.verdict import plain_verdict

NUM_EXPERTS, TOP_K, HIDDEN_DIM, FFN_DIM, ITEMSIZE = 8, 3, 16, 8, 8


def uncut_layer(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x [T, D] through all experts in one place -> y [T, D]."""
    every = torch.einsum("tef,efd->ted", F.gelu(torch.einsum("td,edf->tef", x, w1)), w2)
    return torch.einsum("tk,tkd->td", weights, every[torch.arange(len(x))[:, None], ids])


@plain_verdict(Tensor)
def check_ep_forward(answer: Callable[..., Tensor]) -> str:
    """answer(x, ids, weights, w1, w2, comm) -> y, against the uncut layer on 1, 2 and 4 ranks; and no byte too many.

    Ranks have different numbers of tokens, one has none. On four ranks nobody wants the last one's experts.
    """
    for sizes, choosable in (([6], 8), ([5, 3], 8), ([4, 0, 7, 2], 6)):
        generator, total = torch.Generator().manual_seed(1), sum(sizes)
        shapes = ((total, HIDDEN_DIM), (NUM_EXPERTS, HIDDEN_DIM, FFN_DIM), (NUM_EXPERTS, FFN_DIM, HIDDEN_DIM))
        x, *experts = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        weights, ids = torch.rand(total, choosable, generator=generator, dtype=torch.float64).topk(TOP_K)
        num_local = NUM_EXPERTS // len(sizes)

        def play(comm: PlayedCommunicator, sizes=sizes, wholes=(x, ids, weights), experts=experts) -> tuple:
            mine = [whole.split(sizes)[comm.rank].clone() for whole in wholes]
            y = answer(*mine, *(whole.chunk(comm.size)[comm.rank] for whole in experts), comm)
            return y, sum(map(sum, comm.meter.sent.values()))

        brought = play_ranks(len(sizes), play)
        for rank, whole in enumerate(uncut_layer(x, ids, weights, *experts).split(sizes)):
            y = brought[rank][0]
            if y.shape != whole.shape:
                return (
                    f"not yet: {sizes} tokens: rank {rank} returns {list(y.shape)}, not {list(whole.shape)}"
                )
            for token, off in enumerate((y - whole).abs().amax(dim=1).tolist()):
                if not off < 1e-9:
                    return f"not yet: {sizes} tokens: token {token} of rank {rank} is off by {off:.3f}"
        home = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        away = (ids // num_local != home[:, None]).sum().item()
        # A row there and one back with up to four numbers beside them, and four numbers for each other rank.
        enough = ITEMSIZE * ((2 * HIDDEN_DIM + 4) * away + 4 * len(sizes) * (len(sizes) - 1))
        if (sent := sum(held[1] for held in brought)) > enough:
            return f"not yet: {sizes} tokens: right, but {sent:,} bytes were sent where {enough:,} are plenty"
    return "right"
