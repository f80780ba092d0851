"""%%ranks: run a cell's body on several ranks and bring their tensors back. `%load_ext tools.launch` registers it.

    %%ranks 4 --collect rows --with SeedAllToAll --timeout 20
    rows = ...        in scope: the launcher's names, rank, world_size, device, ep_group, comm

Every call runs on fresh processes, and none of them is left when it returns. They are forked from one that has imported
torch (worker.py), and which waits for the next cell.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import pickle
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

from tools.ranks.failures import HERE, Interrupted, OneMessage, signal_name
from tools.ranks.flags import LAUNCHER
from tools.ranks.output import kernel
from tools.ranks.processes import ROOT, start_worker
from tools.stitch.fresh import assert_fresh, check_kernel_definitions
from tools.stitch.reading import read_book

STARTUP_S = 120.0  # importing torch, on a busy machine
LONGEST_S = 604_800.0
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class RanksError(OneMessage, RuntimeError):
    """A %%ranks cell that could not start, failed on some rank, or did not end in time; a line per problem."""


def brief(value: Any, width: int = 90, inside: tuple[Any, ...] = ()) -> str:
    """A value on one line: a small tensor's numbers, a large one's type and shape. inside: what it is part of."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return f"{kind} {value.tolist()}" if value.numel() <= 8 and len(str(value.tolist())) <= 60 else kind
    if len(inside) > 20 or any(value is one for one in inside):  # 20 brackets fill the line
        return "..."
    inside += (value,)
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key!r}: {brief(item, 40, inside)}" for key, item in value.items()) + "}"
    elif type(value) in (list, tuple):
        text = "[" + ", ".join(brief(item, 40, inside) for item in value) + "]"
    else:
        text = " ".join(repr(value).split())
    return text if len(text) <= width else text[: width - 4] + " ..."


class ByRank(list):
    """What every rank collected under one name, by rank. Shown as one line a rank."""

    def __repr__(self) -> str:
        return "\n".join(f"rank {rank}: {brief(value)}" for rank, value in enumerate(self))


class Collected(dict):
    """{name: ByRank} of a %%ranks cell that collects several names. Shown as one line a name and rank."""

    def __repr__(self) -> str:
        return "\n".join(
            f"{name}, {line}" for name, ranks in self.items() for line in repr(ranks).splitlines()
        )


# ------------------------------------------------------------------------------------------- --with


def statements_of(source: str) -> list[ast.stmt]:
    """Its top-level statements; none where it is not Python."""
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def bound_by(statement: ast.stmt) -> set[str]:
    """The names that a top-level definition, import or assignment binds."""
    if isinstance(statement, DEFINITIONS):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    names = ast.walk(statement) if isinstance(statement, (ast.Assign, ast.AnnAssign)) else ()
    return {node.id for node in names if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def find_definitions(
    names: Sequence[str], namespace: dict[str, Any], provided: set[str]
) -> dict[str, tuple[str, list[int]]]:
    """{file name for tracebacks: (source, first lines of the statements to run)} of functions and classes, and of
    what they use.

    Found in the kernel's executed cells, newest first, then in seed cells; what a definition uses comes from its own
    cell, and definitions from any, unless they are `provided`. RanksError where a name is defined nowhere.
    """
    history = [source for source in namespace.get("In", ()) if isinstance(source, str)]
    sources = {cell.label: cell.text for cell in read_book(ROOT) if "seed" in cell.tags}
    sources |= {f"kernel cell {number}": source for number, source in enumerate(history)}
    parts = {label: statements_of(source) for label, source in sources.items()}
    defined = {  # the newest wins
        part.name: (label, part) for label in parts for part in parts[label] if isinstance(part, DEFINITIONS)
    }
    if unknown := [name for name in names if name not in defined]:
        raise RanksError([f"%%ranks: --with {unknown[0]}: {why_not_sent(unknown[0], namespace)}"])
    sent: dict[str, set[int]] = {}
    wanted = [defined[name] for name in names]
    while wanted:
        label, statement = wanted.pop()
        if statement.lineno in sent.setdefault(label, set()):
            continue
        sent[label].add(statement.lineno)
        wanted += [(label, part) for part in parts[label] if getattr(part, "module", "") == "__future__"]
        names_in = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        for name in {node.id for node in names_in if isinstance(node.ctx, ast.Load)}:
            here = [(label, part) for part in parts[label] if name in bound_by(part)]
            wanted += here or [defined[one] for one in {name} & (defined.keys() - provided)]
    # In this order: a class may inherit from one of an earlier cell.
    return {label: (source, sorted(sent[label])) for label, source in sources.items() if label in sent}


def why_not_sent(name: str, namespace: dict[str, Any]) -> str:
    value = namespace.get(name)
    if name not in namespace or isinstance(value, (type, FunctionType)):
        spaces = "; names are separated by spaces" * ("," in name)
        return f"no cell that you have executed defines it, and none of the original tutorial's{spaces}"
    return f"it is a variable, of type {type(value).__name__}; functions and classes are sent: make it in the cell"


# ------------------------------------------------------------------------------------------- the call


class Server:
    """The process that has imported torch and the launcher, and forks every cell's ranks (worker.py); it ends with the
    kernel. like: what it was started with; where that has changed, the next cell starts another one."""

    running: Server | None = None

    def __init__(self, like: Any) -> None:
        self.like, self.log = like, tempfile.TemporaryFile()
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"}
        self.family = start_worker("ranks", output=self.log, environment=environment, stdin=subprocess.PIPE)
        Server.running = self

    def run(self, folder: Path, limit_s: float) -> list[str]:
        """Runs a cell, described in folder -> the problems. An interrupt ends this process, and the ranks with it."""
        report, deadline = folder / "problems.json", time.monotonic() + STARTUP_S + limit_s
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and its log says why
                self.family.process.stdin.write(f"{folder}\n".encode())
                self.family.process.stdin.flush()
            while not report.exists() and self.family.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
        except KeyboardInterrupt:
            raise Interrupted(["every rank has ended"]) from None
        finally:
            if not report.exists():
                self.family.end(patience_s=1.0)
        if report.exists():
            return json.loads(report.read_text())
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        last = said[-1].replace(*HERE) if said else ""
        if (folder / "rank0.out").exists():
            code = self.family.process.returncode
            how = f"was ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
            how += f": {last}" * bool(last)
            return [f"%%ranks: while the ranks ran, the process that started them {how}"]
        return [f"%%ranks: the ranks could not start: {last or 'it was ended before it could say why'}"]


def inherited() -> tuple[Any, ...]:
    """What a process takes over from the one that starts it, but for the folder it is in, which every cell sends."""
    os.umask(umask := os.umask(0o77))
    kinds = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    limits = [resource.getrlimit(kind) for kind in kinds]
    return dict(os.environ), umask, limits, getattr(os, "sched_getaffinity", lambda _: None)(0)


def server() -> Server:
    """The one that runs, or a new one."""
    like, running = (inherited(), LAUNCHER.stat().st_mtime_ns), Server.running
    if running and running.like == like and running.family.process.poll() is None:
        return running
    if running:
        running.family.end()
    return Server(like)


def run_cell_on_ranks(
    body: str,
    nproc: int = 2,
    *,
    collect: Sequence[str] = (),
    sent: Sequence[str] = (),
    timeout_s: float = 60.0,
    device: str = "auto",
    namespace: dict[str, Any] | None = None,
) -> Collected:
    """Runs Python source on nproc fresh ranks; what `%%ranks` does. namespace: the kernel's, for `sent`.

    Prints each rank's output, grouped by rank. Returns {name: list by rank}. RanksError where a rank fails, or one
    is still inside after timeout_s; a collective gives up after half of that. The first call waits for an import.
    """
    if nproc < 1 or not 0 < timeout_s <= LONGEST_S:
        most = f"take 1 or more of each, at most {LONGEST_S:g} s, a week"
        raise RanksError([f"%%ranks: {nproc} ranks for {timeout_s:g} s cannot run; {most}"])
    try:
        cwd = os.getcwd()
    except FileNotFoundError:
        raise RanksError(["%%ranks: the kernel's folder is gone; os.chdir to one that exists"]) from None
    namespace = namespace or {}
    try:
        assert_fresh()
        check_kernel_definitions({name: value for name, value in namespace.items() if name not in sent})
    except RuntimeError as error:
        raise RanksError([str(error)]) from None
    from ep_launcher import launcher

    provided = {name for name in vars(launcher) if not name.startswith("_")}
    spec = {"body": body, "nproc": nproc, "collect": list(collect), "timeout_s": timeout_s, "device": device,
            "cwd": cwd, "sent": find_definitions(sent, namespace, provided) if sent else {}}  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="ep-cell-"))
    try:
        (folder / "spec.json").write_text(json.dumps(spec))
        problems = server().run(folder, timeout_s)
        for rank in range(nproc):
            path = folder / f"rank{rank}.out"
            for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else ():
                print(f"rank {rank}: {line}")
        if problems:
            raise RanksError(problems)
        found = [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(nproc)]
        return Collected(zip(collect, map(ByRank, zip(*found, strict=True)), strict=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _RanksParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise RanksError([f"%%ranks: {message}; usage: {' '.join(self.format_usage().split()[1:])}"])


def ranks_magic(line: str, cell: str) -> Any:
    """%%ranks N --collect NAME... --with NAME... --timeout SECONDS --device auto|cpu|cuda --expect-failure

    Runs the cell's body on N fresh ranks: gloo on the CPU, NCCL where there are N GPUs. In scope are the launcher's
    public names and rank, world_size, device, ep_group, comm; the seed is 0 on every rank; the kernel's variables
    are not there. --collect brings names back, as CPU copies in a list by rank, and binds them in the kernel.
    --with sends the source of a function or class along. --expect-failure shows the failure in place of raising it.
    """
    parser = _RanksParser(prog="%%ranks", add_help=False, allow_abbrev=False)
    parser.add_argument("nproc", nargs="?", type=int, default=2, metavar="N")
    parser.add_argument("--collect", nargs="+", action="extend", default=[], metavar="NAME")
    parser.add_argument("--with", nargs="+", action="extend", default=[], metavar="NAME", dest="sent")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", dest="timeout_s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--expect-failure", action="store_true")
    options = vars(parser.parse_args(shlex.split(line)))
    expects_failure = options.pop("expect_failure")
    namespace = kernel().user_ns if kernel() is not None else {}
    try:
        collected = run_cell_on_ranks(cell, namespace=namespace, **options)
    except RanksError as error:
        if not expects_failure:
            raise
        print("\n".join(error.lines))
        return None
    if expects_failure:
        raise RanksError(["%%ranks: every rank ended well, and --expect-failure says that one fails"])
    namespace.update(collected)
    return next(iter(collected.values())) if len(collected) == 1 else collected or None
