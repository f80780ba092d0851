"""%%ranks: run a cell's body on several ranks and bring their tensors back. `%load_ext tools.launch` registers it.

    %%ranks 4 --collect rows --with SeedAllToAll --timeout 20
    rows = ...        in scope: the launcher's names, rank, world_size, device, ep_group, comm

Every call runs on fresh processes, and none of them is left when it returns. torchrun forks them in a process that has
imported torch (agent.py), and which waits for the next cell; each runs body.py.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from tools.ranks.failures import CELL_FILE, HERE, Interrupted, OneMessage, last_stack, signal_name
from tools.ranks.flags import torchrun_environment
from tools.ranks.output import kernel
from tools.ranks.processes import ROOT, start_agent
from tools.stitch.fresh import assert_fresh, check_kernel_definitions
from tools.stitch.reading import find_bindings, parse_leniently, read_book

STARTUP_S = 120.0  # importing torch, on a busy machine
LONGEST_S = 604_800.0
BODY = Path(__file__).with_name("body.py")


class RanksError(OneMessage, RuntimeError):
    """A %%ranks cell that could not start, failed on some rank, or did not end in time; a line per problem."""


def brief(value: Any, width: int = 90) -> str:
    """A value on one line: a small tensor's numbers, a large one's type and shape; what lies too deep is `...`."""
    torch, inner = sys.modules.get("torch"), min(40, width - 2)
    if torch is not None and isinstance(value, torch.Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return f"{kind} {value.tolist()}" if value.numel() <= 8 and len(str(value.tolist())) <= 60 else kind
    if width < 10:
        return "..."
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key!r}: {brief(item, inner)}" for key, item in value.items()) + "}"
    elif type(value) in (list, tuple):
        text = "[" + ", ".join(brief(item, inner) for item in value) + "]"
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


def find_definitions(
    names: Sequence[str], namespace: dict[str, Any], provided: set[str]
) -> dict[str, tuple[str, list[int]]]:
    """{file name for tracebacks: (source, first lines of the statements to run)} of functions and classes, and of
    what they use.

    Found in the kernel's executed cells, newest first, then in seed cells; what a definition uses comes from its own
    cell, and definitions from any, unless they are `provided`. RanksError where a name is defined nowhere.
    """
    sources = {cell.label: cell.text for cell in read_book(ROOT) if "seed" in cell.tags}
    for number, source in enumerate(namespace.get("In", ())):
        is_plain = isinstance(source, str) and not source.lstrip().startswith("%%")  # those run elsewhere
        sources |= {f"kernel cell {number}": source} if is_plain else {}
    bound: dict[str, list[tuple[str, ast.stmt]]] = {}
    defined: dict[str, tuple[str, ast.stmt]] = {}  # the newest wins
    for label, source in sources.items():
        bound[label] = [(found.name, found.statement) for found in find_bindings(parse_leniently(source))]
        defined |= {name: (label, part) for name, part in bound[label] if getattr(part, "name", "") == name}
    if unknown := [name for name in names if name not in defined]:
        raise RanksError([f"%%ranks: --with {unknown[0]}: {why_not_sent(unknown[0], namespace)}"])
    sent: dict[str, set[int]] = {}
    wanted = [defined[name] for name in names]
    while wanted:
        label, statement = wanted.pop()
        if statement.lineno in sent.setdefault(label, set()):
            continue
        sent[label].add(statement.lineno)
        loaded = [
            node
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        ]
        used = {node.id for node in loaded} | {"annotations"}  # of a `from __future__`
        here = [(name, part) for name, part in bound[label] if name in used]
        wanted += [(label, part) for _, part in here]
        wanted += [defined[name] for name in used & (defined.keys() - provided) - {name for name, _ in here}]
    # In this order: a class may inherit from one of an earlier cell.
    return {label: (source, sorted(sent[label])) for label, source in sources.items() if label in sent}


def why_not_sent(name: str, namespace: dict[str, Any]) -> str:
    value = namespace.get(name)
    if name not in namespace or isinstance(value, (type, FunctionType)):
        spaces = "; names are separated by spaces" * ("," in name)
        return f"no cell that you have executed defines it, and none of the original tutorial's{spaces}"
    return f"it is a variable, of type {type(value).__name__}; functions and classes are sent: make it in the cell"


# ------------------------------------------------------------------------------------------- what went wrong


def left_at(folder: Path, rank: int) -> str:
    """Where a rank was when torchrun ended it, of what it wrote then (agent.py)."""
    logs = [log.read_text(errors="replace") for log in folder.glob(f"logs/*/*/{rank}/stderr.log")]
    stack = "\n".join(last_stack("".join(logs).splitlines()))
    found = re.search(rf'File "{CELL_FILE}", line (\d+)', stack)
    return f"was at line {found[1]}" if found else "was outside the cell"


def problems(spec: dict[str, Any], folder: Path, is_over: bool) -> list[str]:
    """One line per problem, for the reader; empty where all is well. Ranks that failed alike share a line.

    is_over: torchrun did not come to its end by itself.
    """
    timeout_s, report = spec["timeout_s"], folder / "report.json"
    found = {"ranks": [], "error": "ended by SIGTERM"}  # so early that it could not say it
    found |= json.loads(report.read_text()) if report.exists() else {}
    known = {one["rank"]: one for one in found["ranks"]}
    alike: dict[tuple, list[int]] = {}
    others = []
    for rank in range(spec["nproc"]):
        said, one, failure = folder / f"rank{rank}.json", known.get(rank), None
        if said.exists():
            failure = json.loads(said.read_text())
            others += [f"rank {rank} ended the cell"] * (failure is None)
        elif is_over and (one is None or one["exitcode"] is None):
            where = "was stopped by SIGSTOP" if one and one["is_stopped"] else left_at(folder, rank)
            others.append(f"rank {rank} {where}")
        else:
            code = one["exitcode"] if one else 0
            how = f"ended by {signal_name(-code)}" if code < 0 else f"exited with code {code}"
            failure = {"line": None, "what": how, "where": ""}
        if failure:
            alike.setdefault(tuple(failure.values()), []).append(rank)
    if is_over and not alike:
        if found["error"] != "ended by SIGTERM":
            return [f"%%ranks: the ranks could not start: {found['error']}"]
        return [
            f"the time limit of {timeout_s:g} s is over: {'; '.join(others)}; raise --timeout, or mend the wait"
        ]
    lines = []
    for (line, what, where), ranks in alike.items():
        who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        place = f", line {line} of the cell" if line else ""
        lines.append(f"{who}{place}: {what}" + f" ({where})" * bool(where))
        if re.search(r"CollectiveError|[Tt]imed? ?out|DistBackendError|DistNetworkError", what):
            lines[-1] = "; ".join([lines[-1], *others])
        half = f"; a collective waits for half of --timeout, {timeout_s / 2:g} s"
        lines[-1] += half * ("Timed out waiting" in what)
    return sorted(lines, key=lambda line: ": CollectiveError" in line)  # who waited in vain is not the cause


# ------------------------------------------------------------------------------------------- the call


class Server:
    """The process that has imported torch and the launcher, and runs every cell (agent.py); it ends with the kernel.
    Where the kernel's environment has changed since, the next cell starts another one."""

    running: Server | None = None

    def __init__(self) -> None:
        self.environment, self.log = dict(os.environ), tempfile.TemporaryFile()
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.family = start_agent("cells", environment=torchrun_environment(), **streams)
        Server.running = self

    def run(self, limit_s: float, arguments: list[str]) -> int:
        """torchrun, for limit_s at most -> its exit code. An interrupt ends this process, and the ranks with it.
        RanksError where this process ends."""
        process, code = self.family.process, b""
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and its log says why
                process.stdin.write(json.dumps([limit_s, arguments]).encode() + b"\n")
                process.stdin.flush()
            if select.select([process.stdout], [], [], STARTUP_S + limit_s)[0]:
                code = process.stdout.readline()
        except KeyboardInterrupt:
            raise Interrupted(["every rank has ended"]) from None
        finally:
            if not code:
                self.family.end(patience_s=1.0)
        if code:
            return int(code)
        raise RanksError([f"%%ranks: the ranks could not start: {self.last_line()}"])

    def last_line(self) -> str:
        """What it has said last."""
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        return said[-1].replace(*HERE) if said else "it was ended before it could say why"


def server() -> Server:
    """The one that runs, or a new one."""
    if (running := Server.running) and running.family.process.poll() is None:
        if running.environment == dict(os.environ):
            return running
        running.family.end()
    return Server()


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
    with tempfile.TemporaryDirectory(prefix="ep-cell-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps(spec))
        flags = [f"--nproc_per_node={nproc}", "--redirects=3", f"--log-dir={folder / 'logs'}"]
        running, report = server(), folder / "report.json"
        code = running.run(timeout_s, [str(report), *flags, str(BODY), name])
        for rank in range(nproc):
            for path in folder.glob(f"logs/*/*/{rank}/stdout.log"):
                for line in path.read_text("utf-8", errors="replace").splitlines():
                    print(f"rank {rank}: {line}")
        if code not in (0, -signal.SIGTERM) and not report.exists():
            how = f"was ended by {signal_name(-code)}" if code < 0 else f"failed: {running.last_line()}"
            raise RanksError([f"%%ranks: while the ranks ran, the process that started them {how}"])
        if wrong := problems(spec, folder, is_over=code != 0):
            raise RanksError(wrong)
        found = [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(nproc)]
        return Collected(zip(collect, map(ByRank, zip(*found, strict=True)), strict=True))


@magic_arguments("%%ranks")
@argument("nproc", nargs="?", type=int, default=2, metavar="N", help="ranks")
@argument("--collect", nargs="+", action="extend", default=[], metavar="NAME", help="names to bring back")
@argument(
    "--with", nargs="+", action="extend", default=[], metavar="NAME", dest="sent", help="definitions to send"
)
@argument(
    "--timeout", type=float, default=60.0, metavar="SECONDS", dest="timeout_s", help="a rank that waits fails"
)
@argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="gloo or NCCL")
@argument("--expect-failure", action="store_true", help="show the failure in place of raising it")
def ranks_magic(line: str, cell: str) -> Any:
    """Runs the cell's body on N fresh ranks: gloo on the CPU, NCCL where there are N GPUs.

    In scope are the launcher's public names and rank, world_size, device, ep_group, comm; the seed is 0 on every rank;
    the kernel's variables are not there. What comes back are CPU copies in a list by rank, bound in the kernel.
    """
    options = vars(parse_argstring(ranks_magic, line))
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
