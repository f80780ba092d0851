"""Takes an answer to real ranks: its own trace first, then every case of tools/parity.py."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from IPython import get_ipython
from torch import Tensor

from ep_launcher.launcher import REGISTRIES, Communicator, Mesh, MoEConfig, dense_moe
from tools.exercises.dispatcher import trace_dispatcher
from tools.exercises.experts import trace_experts
from tools.exercises.meeting import Meeting
from tools.exercises.overflow import trace_overflow
from tools.exercises.overlap import trace_overlap
from tools.exercises.verdict import WITHOUT_ASSERTIONS, NotYet, describe_error
from tools.ranks import RanksError, run_cell_on_ranks

TRACES = {
    "dispatcher": trace_dispatcher, "experts": trace_experts, "overflow": trace_overflow, "overlap": trace_overlap,
}  # fmt: skip


def check(kind: str, answer: Any, ranks: int, namespace: dict[str, Any] | None) -> str:
    """Alone, in this process, then on ranks -> the verdict. namespace: the kernel's, {"In": [sources]}."""
    if sys.flags.optimize:
        return f"not yet: {WITHOUT_ASSERTIONS}"
    if kind != "overflow" and not isinstance(answer, type):
        return f"not yet: this wants a class, and got {type(answer).__name__}"
    try:
        TRACES[kind](answer, Communicator.alone(), Meeting(Communicator.alone()))
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
        except RanksError as error:
            return f"not yet: {first_cause(error.lines)}"
    return "right"


def first_cause(lines: list[str]) -> str:
    """The line of a RanksError that names the fault: our own finding, if there is one; else the reader's error."""
    for line in lines:
        if found := re.search(r"NotYet: (.*)", line):
            return found[1]
    own = [line for line in lines if "CollectiveError" not in line]
    return re.sub(r", line \d+ of the cell", "", (own or lines)[0])


def run_on_ranks(kind: str, answer: Any, comm: Communicator, store: str) -> None:
    """What each rank does. NotYet, or the answer's own error."""
    # One store for both meetings: a FileStore takes its file away when all have ended, perhaps under a new one's feet.
    file = dist.FileStore(store, comm.size)
    TRACES[kind](answer, comm, Meeting(comm, dist.PrefixStore("trace", file)))
    run_parity(kind, answer, comm, Meeting(comm, dist.PrefixStore("parity", file)))


def run_parity(kind: str, answer: Any, comm: Communicator, meeting: Meeting) -> None:
    """Every case in float64 against the dense reference: outputs, all gradients, bytes. NotYet where one is off."""
    from tools import parity  # takes the launcher of the cell's process

    def with_choices_of(layer: Any, x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The reference with all ranks' choices as the policy left them; the aux loss sees the router's own."""
        left = parity.gather_uneven(layer.topk_ids, layer.mesh.batch)
        return [dense_moe(x, parameters, layer.config.top_k, ids)[n] for n, ids in enumerate((left, None))]

    REGISTRIES[kind]["yours"] = answer
    mesh, reference = Mesh(comm, comm, Communicator.alone(comm.meter)), ()
    dispatcher = "all_to_all" if kind == "overlap" else "all_gather"
    names = {"dispatcher": dispatcher, "experts": "loop"} | {kind: "yours"}
    if kind == "overflow":  # an option of chapter 08
        from ep_launcher.launcher import CapacityOptions

        reference = (with_choices_of,)
        names["extras"] = (CapacityOptions(capacity_factor=1.0, overflow=names.pop(kind)),)
    for name, case in parity.cases(comm.size).items():
        if kind == "overflow" and case["micro_batches"] > 1:
            continue  # the reference takes the choices of a layer's last forward
        sizes = parity.BASE | {key: case[key] for key in parity.BASE if key in case}
        config, what = MoEConfig(**sizes, **names, dtype="float64"), f"the parity suite's case {name}"
        with meeting.phase(what):
            facts = parity.run_case(case, config, mesh, torch.device("cpu"), *reference)
        for quantity, error in facts["errors"].items():
            if not error <= parity.LIMITS["float64"]:
                raise NotYet(f"rank {comm.rank}: {what}: {quantity} is off by {error:.1e}")
        predicted, counted = facts["bytes"]
        if predicted != counted or not facts["bytes_agree"]:
            raise NotYet(f"{what}: {predicted} bytes predicted, {counted} counted")
