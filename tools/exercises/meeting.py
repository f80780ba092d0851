"""Ranks that talk past the collectives under test."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ep_launcher.launcher import CollectiveError, Communicator
from tools.exercises.verdict import NotYet

PATIENCE_S = 8.0  # what a rank waits for the others between two phases, before it says who is missing


class Meeting:
    """Where ranks meet between two phases, through a file: a rank that hangs in a collective cannot hold it up."""

    def __init__(self, comm: Communicator, store: dist.Store | None = None) -> None:
        self.comm, self.store, self.number = comm, store, 0

    def exchange(self, said: Any, what: str) -> list[Any]:
        """Everybody's `said`, by rank. NotYet, which names the missing ranks, where one does not come."""
        if self.store is None:
            return [said]
        self.number += 1
        keys = [f"{self.number}/{rank}" for rank in range(self.comm.size)]
        self.store.set(keys[self.comm.rank], json.dumps(said))
        try:
            self.store.wait(keys, timedelta(seconds=PATIENCE_S))
        except RuntimeError:
            late = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            names = f"rank {late[0]} still waits" if len(late) == 1 else f"ranks {str(late)[1:-1]} still wait"
            raise NotYet(
                f"{what}: rank {self.comm.rank} is through, and {names} in a collective that rank "
                f"{self.comm.rank} did not enter; every rank enters every collective"
            ) from None
        return [json.loads(self.store.get(key)) for key in keys]

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Runs a phase; then all ranks must have entered equally many collectives in it."""
        before = self.comm.meter.num_collectives
        try:
            yield
        except CollectiveError as error:
            raise NotYet(f"{what}: {error}; did every rank enter, with sizes that fit?") from None
        counts = self.exchange(self.comm.meter.num_collectives - before, what)
        if len(set(counts)) > 1:
            shown = ", ".join(f"rank {rank} {count}" for rank, count in enumerate(counts))
            raise NotYet(f"{what}: ranks entered different numbers of collectives: {shown}")

    @contextlib.contextmanager
    def agreement(self, what: str) -> Iterator[None]:
        """Looks at a result; NotYet on all ranks, with the first rank's finding, where any found something."""
        found = None
        try:
            yield
        except NotYet as wrong:
            found = str(wrong)
        for finding in self.exchange(found, what):
            if finding:
                raise NotYet(finding)
