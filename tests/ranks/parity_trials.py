"""tools/parity.py on real ranks, and on copies of the code that are broken: tests/ranks/test_parity.py reads it."""

import contextlib
import importlib
import io
import os
import sys
from functools import partial
from pathlib import Path

import torch
from trials import copied_code, leave_group, trial

from ep_launcher import launcher as ep
from tools.parity import LIMITS, cases, run_suite

WORLD_SIZES = (1, 2, 4, 8)
ROUNDED = ["uneven", "rank_without_tokens", "all_to_one_expert", "top_k_is_num_experts", "one_expert_a_rank",
           "micro_batches"]  # fmt: skip
PAIRS = ["rank_without_rows", "top_k_is_num_experts", "two_halves_checkpoint"]


def wanted(world_size: int, dispatcher: str, experts: str, activation: str, dtype: str) -> list[str]:
    """Each dispatcher with auto's experts, and all experts and activations with auto's dispatcher, run everything in
    float64, and in low precision what rounds differently. The others meet on four ranks, in float64, where experts
    may stumble over rows: without experts, with many, in parts that are empty. On eight ranks one case runs."""
    autos = "local" if world_size == 1 else "all_to_all", "blocks"
    if dispatcher != autos[0] and (experts, activation) != (autos[1], "gelu"):
        return PAIRS if (world_size, dtype) == (4, "float64") else []
    return ["even"] if world_size == 8 else list(cases(world_size)) if dtype == "float64" else ROUNDED


@trial(*WORLD_SIZES, limit_s=900)
def parity(mesh: ep.Mesh, folder: Path) -> list[dict] | None:
    """Everything against the reference -> the results, of rank 0."""
    found = run_suite(torch.device("cpu"), list(LIMITS), mesh, wanted=partial(wanted, mesh.batch.size))
    return found if mesh.batch.rank == 0 else None


BROKEN = {  # {what: (what stands in the launcher, what stands in its copy)}
    "gradient": ("blocks.view(grad.shape).sum(0)", "blocks.view(grad.shape)[0]"),
    "byte": ("there * (row + rider), back * row,", "there * (row + rider + 1), back * row,"),
    "destination": ("bytes_by_pass(rows, rows.t(),", "bytes_by_pass(rows, rows,"),
    "crash": ("home[:, 0], order", "home[:, 1], order"),
}


FLAGS = "--dtypes float64 --cases even uneven".split()


def run_broken(copy: Path, flags: list[str] = FLAGS) -> tuple[int, str]:
    """The suite of a copy, as the command line would run it -> its exit code, and what it prints."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    printed, kept = io.StringIO(), (sys.argv, os._exit)
    with copied_code(copy), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        sys.argv, os._exit = ["parity.py", *flags], leave
        try:
            code = importlib.import_module("tools.parity").main()
        except SystemExit as left:
            code = left.code
        finally:
            sys.argv, os._exit = kept
    leave_group()  # after a crash the others wait
    return code, printed.getvalue()


def add_broken(what: str) -> None:
    """The trial `broken_WHAT`."""

    def run(mesh: ep.Mesh, folder: Path) -> tuple[int, str]:
        return run_broken(folder.parent / "broken" / what)

    run.__name__ = f"broken_{what}"
    trial(2)(run)


for what in BROKEN:
    add_broken(what)
