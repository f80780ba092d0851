"""Ranks that are threads of this process: quick enough to try an answer at several sizes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ep_launcher.launcher import Communicator, Pending, TrafficMeter
from tools.exercises.verdict import NotYet

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
        if other := [rank for rank, brought in enumerate(everybody) if brought.shape != x.shape]:
            mine, theirs = list(x.shape), list(everybody[other[0]].shape)
            said = f"rank {self.rank} of {self.size} brings {mine} to an all_gather, and rank {other[0]} {theirs}"
            raise NotYet(f"{said}; the shape differs, or one of them has left a collective out")
        return torch.stack(everybody)

    def begin_all_to_all(
        self, x: Tensor, input_splits: list[int], output_splits: list[int], purpose: str, wait: bool = False
    ) -> Pending:
        """See Communicator; ended at once. NotYet where other rows come than output_splits says."""
        row_bytes = x.element_size() * math.prod(x.shape[1:])
        self.meter.record(purpose, [rows * row_bytes for rows in input_splits])
        came = [pieces[self.rank] for pieces in self.swap(x.detach().clone().split(input_splits))]
        if (rows := [len(piece) for piece in came]) != list(output_splits):
            raise NotYet(
                f"rank {self.rank} of {self.size} expects {list(output_splits)} rows, and {rows} come"
            )
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
