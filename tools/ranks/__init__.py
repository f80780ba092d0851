"""%%ranks: run a cell's body on several ranks and bring their tensors back. `%load_ext tools.launch` registers it.

    %%ranks 4 --collect rows --with SeedAllToAll --timeout 20
    rows = ...        in scope: the launcher's names, rank, world_size, device, ep_group, comm

Every call starts fresh processes (tools/ranks/worker.py), and none is left when it returns.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.extract import assert_fresh, book_notebooks, check_kernel_definitions
from tools.launch import (
    LOCAL_PATHS,
    MOST_LINES,
    ROOT,
    WORKER,
    Family,
    Interrupted,
    OneMessage,
    kernel,
    signal_name,
)
from tools.stitch.reading import read_notebook

STARTUP_S = 120.0  # importing torch, on a busy machine


class RanksError(OneMessage, RuntimeError):
    """A %%ranks cell that could not start, failed on some rank, or did not end in time; a line per problem."""


def brief(value: Any, width: int = 90) -> str:
    """A value on one line: a small tensor's numbers, a large one's type and shape."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return f"{kind} {value.tolist()}" if value.numel() <= 8 and len(str(value.tolist())) <= 60 else kind
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key!r}: {brief(item, 40)}" for key, item in value.items()) + "}"
    elif type(value) in (list, tuple):
        text = "[" + ", ".join(brief(item, 40) for item in value) + "]"
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
            f"{name}, {line}" for name, values in self.items() for line in repr(values).splitlines()
        )


class _RanksParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise RanksError([f"%%ranks: {message}; usage: {' '.join(self.format_usage().split()[1:])}"])


def ranks_parser() -> argparse.ArgumentParser:
    parser = _RanksParser(prog="%%ranks", add_help=False, allow_abbrev=False)
    parser.add_argument("nproc", nargs="?", type=int, default=2, metavar="N")
    parser.add_argument("--collect", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--with", nargs="+", default=[], metavar="NAME", dest="sent")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--expect-failure", action="store_true")
    return parser


def parse_quietly(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def bound_names(statement: ast.stmt) -> set[str]:
    """The names that a top-level statement binds."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return set()


def used_names(statement: ast.stmt) -> set[str]:
    """The names that a statement reads, at any depth."""
    return {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


class Definitions:
    """Where the source of a name to send along is found: the kernel's executed cells, newest first, then seed cells."""

    def __init__(self, namespace: dict[str, Any], provided: set[str]) -> None:
        self.provided = provided | set(dir(builtins))
        history = [source for source in namespace.get("In", ()) if isinstance(source, str)]
        executed = [(f"kernel cell {number}", source) for number, source in enumerate(history)]
        kept = []
        for path in book_notebooks(ROOT):
            notebook = read_notebook(path, f"notebooks/{path.name}")
            kept += [(cell.label, cell.text) for cell in notebook.cells if "seed" in cell.tags]
        self.order = [
            label for label, _ in kept + executed
        ]  # a class may inherit from one of an earlier cell
        cells = executed[::-1] + kept
        self.cells = [(label, source, tree) for label, source in cells if (tree := parse_quietly(source))]

    def statement(self, name: str) -> tuple[str, str, ast.Module, ast.stmt] | None:
        """The def or class of this name, and the cell that holds it."""
        for label, source, tree in self.cells:
            for statement in reversed(tree.body):
                if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and statement.name == name:
                    return label, source, tree, statement
        return None

    def collect(self, names: Sequence[str]) -> dict[str, str]:
        """{file name for tracebacks: source}: the definitions, and what they use from their cells and from seed cells.

        Lines keep their numbers: what is not sent is blank. RanksError where a name is defined nowhere.
        """
        chosen: dict[str, tuple[str, set[int]]] = {}
        wanted, seen = list(names), set()
        while wanted:
            name = wanted.pop()
            if name in seen:
                continue
            seen.add(name)
            found = self.statement(name)
            if found is None:
                if name not in names:
                    continue  # the body may define it, or nothing needs it after all
                raise RanksError([f"%%ranks: --with {name}: no executed cell and no seed cell defines it"])
            label, source, tree, statement = found
            lines = chosen.setdefault(label, (source, set()))[1]
            future = [
                part for part in tree.body if isinstance(part, ast.ImportFrom) and part.module == "__future__"
            ]
            pending = [statement, *future]
            while pending:
                part = pending.pop()
                first = min([part.lineno, *(d.lineno for d in getattr(part, "decorator_list", ()))])
                if first in lines:
                    continue
                lines |= set(range(first, part.end_lineno + 1))
                used = used_names(part)
                here = [other for other in tree.body if bound_names(other) & used]
                pending += here
                local = set().union(*(bound_names(other) for other in here))
                wanted += sorted(used - local - self.provided)
        sent = {}
        for label in sorted(chosen, key=self.order.index):
            source, lines = chosen[label]
            kept = [text if number in lines else "" for number, text in enumerate(source.split("\n"), 1)]
            sent[label] = "\n".join(kept) + "\n"
        return sent


def choose_device(wanted: str, nproc: int) -> str:
    """auto, cpu, cuda -> cpu or cuda, for this many ranks on this host. RanksError where GPUs lack."""
    if wanted == "cpu":
        return "cpu"
    import torch

    num_gpus = torch.cuda.device_count()
    if wanted == "cuda" and num_gpus < nproc:
        message = (
            f"%%ranks: {nproc} ranks want a GPU each, and this machine has {num_gpus}; take --device cpu"
        )
        raise RanksError([message])
    return "cuda" if num_gpus >= nproc else "cpu"


def run_worker(folder: Path, limit_s: float) -> None:
    """Runs the worker process until it has reported. An interrupt ends it, and its ranks with it."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with open(folder / "worker.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), "ranks", str(os.getpid()), str(folder)],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    family, deadline = Family(process), time.monotonic() + STARTUP_S + limit_s
    try:
        while process.poll() is None and time.monotonic() < deadline:
            family.note(every_s=1.0)
            time.sleep(0.01)
    except KeyboardInterrupt:
        family.end(patience_s=1.0)
        raise Interrupted(["every rank has ended"]) from None
    finally:
        if process.poll() is None:
            family.end(patience_s=1.0)


def list_ranks(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def place_of(failure: dict[str, Any]) -> str:
    return f", line {failure['line']} of the cell" if failure["line"] else ""


def other_ranks(report: dict[str, Any], failed: set[int]) -> str:
    """What the ranks did that neither failed nor were ended: where each one was, after how many collectives."""
    said = []
    for rank, state in enumerate(report["states"]):
        count = report["collectives"][rank]
        after = f" after {count} collective{'s' * (count != 1)}" if any(report["collectives"]) else ""
        if rank in failed:
            continue
        if state == 1:
            said.append(f"rank {rank} ended the cell{after}")
        elif str(rank) in report["inside"]:
            line = report["inside"][str(rank)]
            said.append(f"rank {rank} was {f'at line {line}' if line else 'outside the cell'}{after}")
    return "; ".join(said)


def describe_report(report: dict[str, Any], spec: dict[str, Any]) -> list[str]:
    """One line per problem of a %%ranks cell; empty where all is well."""
    lines = [
        f"rank {rank}: ended by {signal_name(number)}"
        if number > 0
        else f"rank {rank}: exited with code {-number}"
        for rank, number in sorted((int(rank), number) for rank, number in report["signals"].items())
    ]
    alike: dict[tuple, list[dict]] = {}
    for failure in sorted(report["failures"], key=lambda failure: failure["rank"]):
        alike.setdefault((failure["line"], failure["what"], failure["where"]), []).append(failure)
    failed = {failure["rank"] for failure in report["failures"]} | {int(rank) for rank in report["signals"]}
    for (_, what, where), failures in alike.items():
        ranks = list_ranks(failure["rank"] for failure in failures)
        lines.append(f"{ranks}{place_of(failures[0])}: {what}" + (f" ({where})" if where else ""))
        waited = re.search(r"CollectiveError|[Tt]imed? ?out|DistBackendError|DistNetworkError", what)
        others = other_ranks(report, failed)
        if waited and others:
            lines[-1] += f"; {others}"
    if report["out_of_time"] and not lines:
        where = other_ranks(report, failed)
        lines.append(
            f"the time limit of {spec['timeout_s']:g} s is over: {where}; raise --timeout, or mend the wait"
        )
    return lines


def read_report(folder: Path) -> dict[str, Any]:
    """What the worker reported. RanksError where it could not."""
    path = folder / "report.json"
    if path.exists():
        return json.loads(path.read_text())
    said = (folder / "worker.log").read_text(errors="replace").strip().splitlines()
    last = said[-1].replace(*LOCAL_PATHS) if said else "it was ended before it could say why"
    raise RanksError([f"%%ranks: the ranks could not start: {last}"])


def show_prints(folder: Path, nproc: int) -> None:
    """Every rank's prints, grouped by rank, in rank order."""
    for rank in range(nproc):
        path = folder / f"rank{rank}.out"
        if path.exists():
            for line in path.read_text("utf-8", errors="replace").splitlines():
                print(f"rank {rank}: {line}")


def load_collected(folder: Path, names: Sequence[str], nproc: int) -> Collected:
    import torch

    # weights_only=False: the files come from our own ranks, and may hold the launcher's dataclasses.
    per_rank = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(nproc)]
    return Collected({name: ByRank(collected[name] for collected in per_rank) for name in names})


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
    is still inside after timeout_s; a collective gives up after half of that. Costs about 4 s to start.
    """
    if nproc < 1 or not timeout_s > 0:
        raise RanksError([f"%%ranks: {nproc} ranks for {timeout_s:g} s cannot run; take 1 or more of each"])
    namespace = namespace or {}
    try:
        assert_fresh()
        check_kernel_definitions({k: v for k, v in namespace.items() if k not in sent})
    except RuntimeError as error:
        raise RanksError([str(error)]) from None
    from ep_launcher import launcher

    provided = {name for name in vars(launcher) if not name.startswith("_")}
    folder = Path(tempfile.mkdtemp(prefix="ep-cell-"))
    try:
        spec = {
            "body": body,
            "nproc": nproc,
            "collect": list(collect),
            "sent": Definitions(namespace, provided).collect(sent) if sent else {},
            "timeout_s": timeout_s,
            "group_timeout_s": timeout_s / 2,
            "device": choose_device(device, nproc),
            "cwd": os.getcwd(),
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        run_worker(folder, timeout_s)
        report = read_report(folder)
        show_prints(folder, nproc)
        problems = describe_report(report, spec)
        if problems:
            raise RanksError(problems[:MOST_LINES])
        return load_collected(folder, collect, nproc)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ranks_magic(line: str, cell: str) -> Any:
    """%%ranks N --collect NAME... --with NAME... --timeout SECONDS --device auto|cpu|cuda --expect-failure

    Runs the cell's body on N fresh ranks: gloo on the CPU, NCCL where there are N GPUs. In scope are the launcher's
    public names and rank, world_size, device, ep_group, comm; the seed is 0 on every rank; the kernel's variables
    are not there. --collect brings names back, as CPU copies in a list by rank, and binds them in the kernel.
    --with sends the source of a function or class along. --expect-failure shows the failure in place of raising it.
    """
    shell = kernel()
    namespace = shell.user_ns if shell is not None else {}
    options = ranks_parser().parse_args(shlex.split(line))
    try:
        collected = run_cell_on_ranks(
            cell, options.nproc, collect=options.collect, sent=options.sent, timeout_s=options.timeout,
            device=options.device, namespace=namespace,
        )  # fmt: skip
    except RanksError as error:
        if not options.expect_failure:
            raise
        print("\n".join(error.lines))
        return None
    if options.expect_failure:
        raise RanksError(["%%ranks: every rank ended well, and --expect-failure says that one fails"])
    namespace.update(collected)
    if len(options.collect) == 1:
        return collected[options.collect[0]]
    return collected or None
