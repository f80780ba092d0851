"""Ranks that are threads of this process: quick enough to try an answer at several sizes, as chapter 01 does."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_launcher.launcher import Communicator, Pending, TrafficMeter
from tools.exercises.verdict import NotYet, plain_verdict

PATIENCE_S = 5.0  # what a rank waits for the others in a collective


class StayedAway(NotYet):
    """A rank waits in a collective that another one never enters."""


class PlayedCommunicator(Communicator):
    """One of several ranks that are threads: chapter 01's three collectives and its meter, without a process group."""

    def __init__(self, rank: int, barrier: threading.Barrier, places: list[Any]) -> None:
        self.rank, self.size, self.ranks, self.group = rank, len(places), list(range(len(places))), None
        self.meter = TrafficMeter(rank, len(places))
        self.barrier, self.places, self.num_all_reduces = barrier, places, 0

    def swap(self, brought: Any) -> list[Any]:
        """What every rank brings, by rank. StayedAway where one does not come."""
        self.meter.num_collectives += 1
        self.places[self.rank] = brought
        try:
            self.barrier.wait()
            everybody = list(self.places)
            self.barrier.wait()
        except threading.BrokenBarrierError:
            where = f"rank {self.rank} of {self.size} waits in collective {self.meter.num_collectives}"
            raise StayedAway(f"{where}, which another rank never enters") from None
        return everybody

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        """See Communicator."""
        self.meter.record(purpose, [x.numel() * x.element_size()] * self.size)
        everybody = self.swap(x.detach().clone())
        for rank, brought in enumerate(everybody):
            if brought.shape != x.shape:
                said = f"rank {self.rank} of {self.size} brings {list(x.shape)} to an all_gather, and rank {rank}"
                why = "the shape differs, or one of them has left a collective out"
                raise NotYet(f"{said} {list(brought.shape)}; {why}")
        return torch.stack(everybody)

    def begin_all_to_all(
        self, x: Tensor, input_splits: list[int], output_splits: list[int], purpose: str, wait: bool = False
    ) -> Pending:
        """See Communicator; ended at once. NotYet where other rows come than output_splits says."""
        row_bytes = x.element_size() * math.prod(x.shape[1:])
        self.meter.record(purpose, [rows * row_bytes for rows in input_splits])
        came = [pieces[self.rank] for pieces in self.swap(x.detach().clone().split(input_splits))]
        if (rows := [len(piece) for piece in came]) != list(output_splits):
            expects = f"rank {self.rank} of {self.size} expects {list(output_splits)} rows"
            raise NotYet(f"{expects}, and {rows} come")
        return Pending(torch.cat(came), self.meter)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Communicator."""
        self.num_all_reduces += 1
        total = sum(self.swap(x.detach().clone()))
        with torch.no_grad():
            return x.copy_(total)


def play_ranks(size: int, function: Callable[[PlayedCommunicator], Any]) -> list[Any]:
    """function(comm) on `size` threads -> their results, by rank; the first rank's own error, where one fails."""
    barrier, places = threading.Barrier(size, timeout=PATIENCE_S), [None] * size

    def play(rank: int) -> Any:
        try:
            return function(PlayedCommunicator(rank, barrier, places))
        except BaseException:
            barrier.abort()  # nobody need wait for this rank
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(play, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, StayedAway)):
        raise error
    return [future.result() for future in futures]


@plain_verdict(Tensor)
def check_ep_forward(answer: Callable[..., Tensor]) -> str:
    """answer(x, ids, weights, w1, w2, comm) -> y, against the uncut layer on 1, 2 and 4 ranks; and no byte too many.

    Ranks have different numbers of tokens, one has none. On four ranks nobody wants the last one's experts.
    """
    for sizes, choosable in (([6], 8), ([5, 3], 8), ([4, 0, 7, 2], 6)):
        generator, total, num_ranks = torch.Generator().manual_seed(1), sum(sizes), len(sizes)
        shapes = ((total, 16), (8, 16, 8), (8, 8, 16))  # tokens of 16 numbers; 8 experts, 8 wide
        x, w1, w2 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        weights, ids = torch.rand(total, choosable, generator=generator, dtype=torch.float64).topk(3)
        every = torch.einsum("tef,efd->ted", F.gelu(torch.einsum("td,edf->tef", x, w1)), w2)
        uncut = torch.einsum("tk,tkd->td", weights, every[torch.arange(total)[:, None], ids])
        cut = [t.split(sizes) for t in (x, ids, weights)] + [w.chunk(num_ranks) for w in (w1, w2)]
        given = [[part.clone() for part in parts] for parts in zip(*cut, strict=True)]

        def play(comm: PlayedCommunicator, given: list = given) -> tuple[Tensor, int]:
            return answer(*given[comm.rank], comm), sum(map(sum, comm.meter.sent.values()))

        ys, sent = zip(*play_ranks(num_ranks, play), strict=True)
        for rank, (y, whole) in enumerate(zip(ys, uncut.split(sizes), strict=True)):
            if y.shape != whole.shape:
                said = f"rank {rank} returns {list(y.shape)}, not {list(whole.shape)}"
                raise NotYet(f"{sizes} tokens: {said}")
            for token, off in enumerate((y - whole).abs().amax(dim=1).tolist()):
                if not off < 1e-9:
                    raise NotYet(f"{sizes} tokens: token {token} of rank {rank} is off by {off:.3f}")
        home = torch.arange(num_ranks).repeat_interleave(torch.tensor(sizes))
        away = (ids // (8 // num_ranks) != home[:, None]).sum().item()
        # A row there and one back with up to four numbers beside them, and four numbers for each other rank.
        enough = x.itemsize * ((2 * 16 + 4) * away + 4 * num_ranks * (num_ranks - 1))
        if sum(sent) > enough:
            plenty = f"{sum(sent):,} bytes were sent where {enough:,} are plenty"
            raise NotYet(f"{sizes} tokens: right, but {plenty}")
    return "right"
