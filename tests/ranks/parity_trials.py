"""tools/parity.py on real ranks, and on copies of the code that are broken: tests/ranks/test_parity.py reads it."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path

import torch
from trials import copied_code, trial

from ep_launcher import launcher as ep
from tools.parity import LIMITS, run_suite

CASES = {1: [], 2: [], 4: [], 8: ["even"]}  # by world size; none named: all


@trial(*CASES, limit_s=300)
def parity(mesh: ep.Mesh, folder: Path) -> list[dict] | None:
    """Everything against the reference -> the results, of rank 0."""
    found = run_suite(torch.device("cpu"), list(LIMITS), mesh, CASES[mesh.batch.size])
    return found if mesh.batch.rank == 0 else None


BROKEN = {  # {what: (what stands in the launcher, what stands in its copy)}
    "gradient": ("blocks.view(grad.shape).sum(0)", "blocks.view(grad.shape)[0]"),
    "byte": ("there * (row + rider), back * row,", "there * (row + rider + 1), back * row,"),
    "destination": ("bytes_by_pass(rows, rows.t(),", "bytes_by_pass(rows, rows,"),
    "crash": ("home[:, 0], order", "home[:, 1], order"),
}


def run_broken(copy: Path) -> tuple[int, str]:
    """The suite of a copy, as the command line would run it -> its exit code, and what it prints."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    printed, kept = io.StringIO(), (sys.argv, os._exit)
    with copied_code(copy), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        sys.argv, os._exit = ["parity.py", "--dtypes", "float64", "--cases", "even", "uneven"], leave
        try:
            code = importlib.import_module("tools.parity").main()
        except SystemExit as left:
            code = left.code
        finally:
            sys.argv, os._exit = kept
    return code, printed.getvalue()


def add_broken(what: str) -> None:
    """The trial `broken_WHAT`."""

    def run(mesh: ep.Mesh, folder: Path) -> tuple[int, str]:
        return run_broken(folder.parent / "broken" / what)

    run.__name__ = f"broken_{what}"
    trial(2)(run)


for what in BROKEN:
    add_broken(what)
