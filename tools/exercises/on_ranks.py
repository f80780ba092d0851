"""Takes an answer to real ranks: its own trace first, then every case of tools/parity.py."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from IPython import get_ipython
from torch import Tensor

from ep_launcher import launcher as ep
from tools.exercises.verdict import WITHOUT_ASSERTIONS, NotYet, describe_error
from tools.ranks.cells import RanksError, run_cell_on_ranks

PATIENCE_S = 8.0  # what a rank waits for the others between two phases, before it says who is missing


class Meeting:
    """Where ranks meet between two phases, through a file: a rank that hangs in a collective cannot hold it up."""

    def __init__(self, comm: ep.Communicator, store: dist.Store | None = None) -> None:
        self.comm, self.store, self.number = comm, store, 0

    def exchange(self, said: Any, what: str) -> list[Any]:
        """Everybody's `said`, by rank. NotYet, which names the missing ranks, where one does not come."""
        if self.store is None:
            return [said]
        self.number += 1
        own, keys = self.comm.rank, [f"{self.number}/{rank}" for rank in range(self.comm.size)]
        self.store.set(keys[own], json.dumps(said))
        try:
            self.store.wait(keys, timedelta(seconds=PATIENCE_S))
        except RuntimeError:
            late = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            names = f"rank {late[0]} still waits" if len(late) == 1 else f"ranks {str(late)[1:-1]} still wait"
            where = f"in a collective that rank {own} did not enter; every rank enters every collective"
            raise NotYet(f"{what}: rank {own} is through, and {names} {where}") from None
        return [json.loads(self.store.get(key)) for key in keys]

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Runs a phase and looks at what came of it. NotYet on all ranks, where they entered different numbers of
        collectives; else with the first rank's finding, where any found something."""
        before, finding = self.comm.meter.num_collectives, None
        try:
            yield
        except NotYet as wrong:
            finding = str(wrong)
        except ep.CollectiveError as error:
            raise NotYet(f"{what}: {error}; did every rank enter, with sizes that fit?") from None
        told = self.exchange([self.comm.meter.num_collectives - before, finding], what)
        counts, findings = zip(*told, strict=True)
        if len(set(counts)) > 1:
            shown = ", ".join(f"rank {rank} {count}" for rank, count in enumerate(counts))
            raise NotYet(f"{what}: ranks entered different numbers of collectives: {shown}")
        for found in filter(None, findings):
            raise NotYet(found)


def trace(kind: str, answer: Any, comm: ep.Communicator, store: dist.Store | None = None) -> None:
    """The trace of an answer of this kind, in dispatcher.py, experts.py, overflow.py or overlap.py."""
    from tools.exercises import dispatcher, experts, overflow, overlap

    traces = {"dispatcher": dispatcher, "experts": experts, "overflow": overflow, "overlap": overlap}
    traces[kind].trace(answer, comm, Meeting(comm, store))


def check(kind: str, answer: Any, ranks: int, namespace: dict[str, Any] | None) -> str:
    """Alone, in this process, then on ranks -> the verdict. namespace: the kernel's, {"In": [sources]}."""
    if sys.flags.optimize:
        return f"not yet: {WITHOUT_ASSERTIONS}"
    if kind != "overflow" and not isinstance(answer, type):
        return f"not yet: this wants a class, and got {type(answer).__name__}"
    try:
        trace(kind, answer, ep.Communicator.alone())
    except NotYet as wrong:
        return f"not yet: {wrong}"
    except (Exception, SystemExit) as error:  # of the reader's own code
        return f"not yet: {describe_error(error, answer)}"
    if namespace is None:
        namespace = get_ipython().user_ns if get_ipython() else {}
    name = answer.__name__
    with tempfile.TemporaryDirectory(prefix="ep-exercise-") as folder:
        arguments = f"{kind!r}, {name}, comm, {str(Path(folder) / 'store')!r}"
        body = f"from tools.exercises.on_ranks import run_on_ranks\nrun_on_ranks({arguments})"
        try:
            run_cell_on_ranks(body, ranks, sent=[name], timeout_s=60, device="cpu", namespace=namespace)
        except RanksError as error:  # our own finding, if there is one; else the reader's error
            if found := re.search(r"NotYet: (.*)", "\n".join(error.lines)):
                return f"not yet: {found[1]}"
            own = [line for line in error.lines if "CollectiveError" not in line]
            return "not yet: " + re.sub(r", line \d+ of the cell", "", (own or error.lines)[0])
    return "right"


def run_on_ranks(kind: str, answer: Any, comm: ep.Communicator, store: str) -> None:
    """What each rank does. NotYet, or the answer's own error."""
    # One store for both meetings: a FileStore takes its file away when all have ended, perhaps under a new one's feet.
    file = dist.FileStore(store, comm.size)
    trace(kind, answer, comm, dist.PrefixStore("trace", file))
    run_parity(kind, answer, comm, Meeting(comm, dist.PrefixStore("parity", file)))


def run_parity(kind: str, answer: Any, comm: ep.Communicator, meeting: Meeting) -> None:
    """Every case in float64 against the dense reference: outputs, all gradients, bytes. NotYet where one is off."""
    from tools import parity  # takes the launcher of the cell's process

    def with_choices_of(layer: Any, x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The reference with all ranks' choices as the policy left them; the aux loss sees the router's own."""
        left = parity.gather_uneven(layer.topk_ids, layer.mesh.batch)
        return [ep.dense_moe(x, parameters, layer.config.top_k, ids)[n] for n, ids in enumerate((left, None))]

    ep.REGISTRIES[kind]["yours"] = answer
    mesh, known = ep.Mesh(comm, comm, ep.Communicator.alone(comm.meter)), parity.cases(comm.size)
    dispatcher, reference = "all_to_all" if kind == "overlap" else "all_gather", parity.dense_reference
    names = {"dispatcher": dispatcher, "experts": "loop"} | {kind: "yours"}
    if kind == "overflow":  # an option of chapter 08
        names["extras"] = (ep.CapacityOptions(capacity_factor=1.0, overflow=names.pop(kind)),)
        # The reference takes the choices of a layer's last forward.
        known = {name: case for name, case in known.items() if case["micro_batches"] == 1}
        reference = with_choices_of
    for name, case in known.items():
        sizes = parity.BASE | {key: case[key] for key in parity.BASE if key in case}
        config, what = ep.MoEConfig(**sizes, **names, dtype="float64"), f"the parity suite's case {name}"
        with meeting.phase(what):
            facts = parity.run_case(case, config, mesh, torch.device("cpu"), reference)
        for quantity, error in facts["errors"].items():
            if not error <= parity.LIMITS["float64"]:
                raise NotYet(f"rank {comm.rank}: {what}: {quantity} is off by {error:.1e}")
        if not facts["bytes_agree"]:
            predicted, counted = facts["bytes"]
            raise NotYet(f"{what}: {predicted} bytes predicted, {counted} counted")
