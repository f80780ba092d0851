"""Capacity on real ranks: its parity suite, and runs of the launcher; tests/ranks/test_capacity.py reads it."""

from pathlib import Path

import torch
from capacity_parity import kept_choices, run_all
from trials import train, trial

from ep_launcher import launcher as ep
from tools.parity import LIMITS

SMALL = ["--dtype", "float64", "--hidden-dim", "32", "--ffn-dim", "64", "--num-experts", "8", "--lr", "3e-3",
         "--log-interval", "1"]  # fmt: skip
GLOBAL = ["--tokens", "61", "--capacity-scope", "global", "--capacity-factor", "0.9", *SMALL]


@trial(1, 2, 4, limit_s=900)
def parity(mesh: ep.Mesh, folder: Path) -> dict | None:
    """capacity_parity's results, and what global scope leaves of one batch; of rank 0."""
    results = run_all(list(LIMITS), None, mesh, torch.device("cpu"))
    kept = kept_choices(mesh, torch.device("cpu"))
    return {"results": results, "kept": kept} if mesh.batch.rank == 0 else None


@trial(2)
def one_dispatcher_alone(mesh: ep.Mesh, folder: Path) -> list[str]:
    """Which dispatchers ran where one was named."""
    found = run_all(["float64"], ["even"], mesh, torch.device("cpu"), "all_to_all")
    return [r["dispatcher"] for r in found]


@trial(1, 2, 4)
def drop(mesh: ep.Mesh, folder: Path) -> dict:
    return train(["--steps", "100", "--overflow", "drop", *GLOBAL])


@trial(1, 4)
def reroute(mesh: ep.Mesh, folder: Path) -> dict:
    return train(["--steps", "50", "--overflow", "reroute", *GLOBAL])


@trial(2)
def fixed_buffers(mesh: ep.Mesh, folder: Path) -> dict:
    """{dispatcher: a run at half of what even load needs}."""
    flags = ["--steps", "60", "--tokens", "33", "--capacity-factor", "0.5", *SMALL]
    return {d: train(["--dispatcher", d, *flags]) for d in ("all_gather", "capacity")}
