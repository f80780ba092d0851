"""Ranks that are threads of this process: quick enough to try an answer at several sizes."""

import contextlib
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ep_launcher.launcher import Communicator, Pending, TrafficMeter
from tools.exercises.verdict import NotYet

PATIENCE_S = 60.0  # what a rank waits for one that neither comes nor ends


class Elsewhere(NotYet):
    """Ranks have come to different places."""


class PlayedCommunicator(Communicator):
    """One of several ranks that are threads: chapter 01's three collectives and its meter, without a process group."""

    def __init__(self, rank: int, barrier: threading.Barrier, places: list[Any]) -> None:
        self.rank, self.size, self.ranks, self.group = rank, len(places), list(range(len(places))), None
        self.meter = TrafficMeter(rank, len(places))
        self.barrier, self.places, self.num_all_reduces = barrier, places, 0

    def meet(self, where: str, brought: Any = None) -> list[Any]:
        """What every rank brings there, by rank. Elsewhere, where a rank comes to another place instead."""
        self.places[self.rank] = where, brought
        self.barrier.wait()
        everybody = list(self.places)
        self.barrier.wait()
        for rank, (other, _) in enumerate(everybody):
            if other != where:
                said = f"rank {self.rank} of {self.size} comes to {where}, and rank {rank} to {other}"
                raise Elsewhere(f"{said}; every rank enters every collective")
        return [theirs for _, theirs in everybody]

    def enter(self, collective: str, brought: Any) -> list[Any]:
        """What every rank brings to this collective, by rank."""
        self.meter.num_collectives += 1
        return self.meet(f"collective {self.meter.num_collectives}, {collective}", brought)

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        """See Communicator. NotYet where another rank brings another shape."""
        self.meter.record(purpose, [x.numel() * x.element_size()] * self.size)
        everybody = self.enter(f"an all_gather of {purpose}", x.detach().clone())
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
        pieces = x.detach().clone().split(input_splits)
        came = [theirs[self.rank] for theirs in self.enter(f"an all_to_all of {purpose}", pieces)]
        if (rows := [len(piece) for piece in came]) != list(output_splits):
            expects = f"rank {self.rank} of {self.size} expects {list(output_splits)} rows"
            raise NotYet(f"{expects} of {purpose}, and {rows} come")
        return Pending(torch.cat(came), self.meter)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Communicator."""
        self.num_all_reduces += 1
        total = sum(self.enter("an all_reduce", x.detach().clone()))
        with torch.no_grad():
            return x.copy_(total)


def play_ranks(size: int, function: Callable[[PlayedCommunicator], Any]) -> list[Any]:
    """function(comm) on `size` threads -> their results, by rank; the first rank's own error, where one fails."""
    barrier, places = threading.Barrier(size, timeout=PATIENCE_S), [None] * size

    def play(rank: int) -> Any:
        comm = PlayedCommunicator(rank, barrier, places)
        try:
            result = function(comm)
        except Elsewhere:
            raise
        except BaseException:
            with contextlib.suppress(Elsewhere):
                comm.meet("an error")  # whoever waits for this rank goes on
            raise
        comm.meet("the end")
        return result

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(play, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Elsewhere)):
        raise error
    return [future.result() for future in futures]
