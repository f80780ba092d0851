"""Takes an answer to real ranks: every case of tools/parity.py, with the answer in the place of a registered kind."""

import re
from typing import Any

import torch

from ep_launcher import launcher as ep
from tools.exercises.verdict import NotYet
from tools.ranks.cells import RanksError, run_cell_on_ranks

LIMIT_S = 300.0  # a busy machine is slow; who waits in vain is told by half of it


def try_on_ranks(
    kind: str, answer: type, ranks: int, namespace: dict[str, Any] | None, first: str = ""
) -> str:
    """-> "right", or NotYet. namespace: {"In": [sources]}, by default the kernel's; first: a line to run before."""
    name = answer.__name__
    body = f"{first}\nfrom tools.exercises.on_ranks import run_parity\nrun_parity({kind!r}, {name}, comm)"
    try:
        run_cell_on_ranks(body, ranks, sent=[name], timeout_s=LIMIT_S, device="cpu", namespace=namespace)
    except RanksError as error:  # our own finding, if there is one; else the reader's error
        if found := re.search(r"NotYet: (.*)", "\n".join(error.lines)):
            raise NotYet(found[1]) from None
        own = [line for line in error.lines if "CollectiveError" not in line]
        raise NotYet(re.sub(r", line \d+ of the cell", "", (own or error.lines)[0])) from None
    return "right"


def run_parity(kind: str, answer: type, comm: ep.Communicator) -> None:
    """Every case in float64 against the dense reference: outputs, all gradients, bytes. NotYet where one is off."""
    from tools import parity  # takes the launcher of the cell's process

    ep.REGISTRIES[kind]["yours"] = answer
    mesh = ep.Mesh(comm, comm, ep.Communicator.alone(comm.meter))
    dispatcher = "all_to_all" if kind == "overlap" else "all_gather"
    names = {"dispatcher": dispatcher, "experts": "loop", "dtype": "float64"} | {kind: "yours"}
    for name, case in parity.cases(comm.size).items():
        sizes = parity.BASE | {key: case[key] for key in (*parity.BASE, "extras") if key in case}
        facts = parity.run_case(case, ep.MoEConfig(**sizes, **names), mesh, torch.device("cpu"))
        if fault := parity.fault_of(facts | {"limit": parity.LIMITS["float64"]}):
            raise NotYet(f"rank {comm.rank}: the parity suite's case {name}: {fault}")
