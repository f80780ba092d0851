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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from tools.ranks.failures import CELL_FILE, Interrupted, OneMessage, how_ended, last_stack, read_report
from tools.ranks.output import kernel
from tools.ranks.processes import Agent
from tools.stitch.fresh import assert_fresh, check_kernel_definitions
from tools.stitch.reading import ROOT, find_bindings, parse_leniently, read_book

LONGEST_S = 604_800.0
BODY = Path(__file__).with_name("body.py")


class RanksError(OneMessage, RuntimeError):
    """A %%ranks cell that could not start, failed on some rank, or did not end in time; a line per problem."""


def brief(value: Any, width: int = 90) -> str:
    """A value on one line: a small tensor's numbers, a large one's type and shape; a tuple looks like a list; what
    lies too deep is `...`."""
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
        return "\n".join(f"{name}, {line}" for name in self for line in repr(self[name]).splitlines())


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
        which = "functions and classes of cells that you have executed, and the original tutorial's, are sent"
        raise RanksError([f"%%ranks: --with {unknown[0]}: no such definition; {which}, with spaces between"])
    sent: dict[str, set[int]] = {}
    wanted = [defined[name] for name in names]
    while wanted:
        label, statement = wanted.pop()
        if statement.lineno in sent.setdefault(label, set()):
            continue
        sent[label].add(statement.lineno)
        nodes = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        used = {node.id for node in nodes if isinstance(node.ctx, ast.Load)}
        used.add("annotations")  # of a `from __future__`
        here = [(name, part) for name, part in bound[label] if name in used]
        wanted += [(label, part) for _, part in here]
        wanted += [defined[name] for name in used & (defined.keys() - provided) - {name for name, _ in here}]
    # In this order: a class may inherit from one of an earlier cell.
    return {label: (source, sorted(sent[label])) for label, source in sources.items() if label in sent}


# ------------------------------------------------------------------------------------------- what went wrong


def problems(spec: dict[str, Any], folder: Path, code: int) -> list[str]:
    """One line per problem, for the reader; empty where all is well. Ranks that failed alike share a line.

    code: torchrun's exit code; not 0 where it did not come to its end by itself.
    """
    found, timeout_s = read_report(folder / "report.json"), spec["timeout_s"]
    exitcodes = dict(found["ranks"])
    alike: dict[str, list[str]] = {}
    others = []
    for rank in range(spec["nproc"]):
        said, exitcode = folder / f"rank{rank}.json", exitcodes.get(rank, None if code else 0)
        if said.exists():
            try:
                failure = json.loads(said.read_text())
            except ValueError:
                failure = f": it could not write to {folder.parent}; where that disk is full, set TMPDIR"
            others += [f"rank {rank} ended the cell"] * (not failure)
        elif exitcode is not None:
            failure = f": {how_ended(exitcode)}"
        else:
            failure = ""
            logs = [log.read_text(errors="replace") for log in folder.glob(f"logs/*/*/{rank}/stderr.log")]
            stack = last_stack("".join(logs).splitlines())
            at = [f"was at line {line}" for file, line, _ in stack if file == CELL_FILE]
            others.append(f"rank {rank} {[*at, 'was outside the cell' if stack else 'did not answer'][0]}")
        if failure:
            alike.setdefault(failure, []).append(str(rank))
    if code and not alike:
        if "ended by SIGTERM" not in (found["error"], how_ended(code)):
            return [f"%%ranks: torchrun failed: {found['error']}"]
        mend = "raise --timeout, or mend the wait"
        return [f"the time limit of {timeout_s:g} s is over: {'; '.join(others)}; {mend}"]
    lines = []
    for failure, ranks in alike.items():
        lines.append(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}{failure}")
        if re.search(r"CollectiveError|[Tt]imed? ?out|DistBackendError|DistNetworkError", failure):
            lines[-1] = "; ".join([lines[-1], *others])
        half = f"; a collective waits for half of --timeout, {timeout_s / 2:g} s"
        lines[-1] += half * ("Timed out waiting" in failure)
    return sorted(lines, key=lambda line: ": CollectiveError" in line)  # who waited in vain is not the cause


# ------------------------------------------------------------------------------------------- the call


class Server(Agent):
    """The process that has imported torch and the launcher, and runs every cell (agent.py); it ends with the kernel.
    Where the kernel's environment has changed since, the next cell starts another one."""

    running: Server | None = None

    @classmethod
    def find(cls) -> Server:
        """The one that runs, or a new one."""
        if (running := cls.running) and running.returncode is None:
            if running.variables == dict(os.environ):
                return running
            running.end(patience_s=0)
        cls.running = cls()
        return cls.running

    def __init__(self) -> None:
        self.variables, self.log = dict(os.environ), tempfile.TemporaryFile()
        super().__init__(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)

    def run(self, limit_s: float, arguments: list[str]) -> int:
        """torchrun, which agent.py ends after limit_s -> its exit code. An interrupt ends this process, and the ranks
        with it. RanksError where this process ends."""
        code = b""
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and its log says why
                self.process.stdin.write(json.dumps([limit_s, arguments]).encode() + b"\n")
                self.process.stdin.flush()
            code = self.process.stdout.readline()
        except KeyboardInterrupt:
            raise Interrupted(["every rank has ended"]) from None
        finally:
            if not code:
                self.end(patience_s=0)
        if code:
            return int(code)
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines() or [how_ended(self.returncode)]
        raise RanksError([f"%%ranks: the ranks could not start: {said[-1]}"])


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
    """Runs Python source on nproc fresh ranks; what `%%ranks` does. namespace: for `sent`, by default the kernel's.

    Prints each rank's output, grouped by rank. Returns {name: list by rank}. RanksError where a rank fails, or one
    is still inside after timeout_s; a collective gives up after half of that. The first call waits for an import.
    """
    if nproc < 1 or not 0 < timeout_s <= LONGEST_S:
        raise RanksError(["%%ranks: take 1 or more ranks, and a time limit of at most a week"])
    if namespace is None:
        namespace = kernel().user_ns if kernel() is not None else {}
    try:
        assert_fresh()
        check_kernel_definitions({name: value for name, value in namespace.items() if name not in sent})
    except RuntimeError as error:
        raise RanksError([str(error)]) from None
    from ep_launcher import launcher

    provided = {name for name in vars(launcher) if not name.startswith("_")}
    spec = {"body": body, "nproc": nproc, "collect": list(collect), "timeout_s": timeout_s, "device": device,
            "cwd": os.getcwd(), "sent": find_definitions(sent, namespace, provided) if sent else {}}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ep-cell-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps(spec))
        flags = [f"--nproc_per_node={nproc}", "--redirects=3", f"--log-dir={folder / 'logs'}"]
        code = Server.find().run(timeout_s, [str(folder / "report.json"), *flags, str(BODY), name])
        for rank in range(nproc):
            for path in folder.glob(f"logs/*/*/{rank}/stdout.log"):
                for line in path.read_text("utf-8", errors="replace").splitlines():
                    print(f"rank {rank}: {line}")
        if wrong := problems(spec, folder, code):
            raise RanksError(wrong)
        # Where nothing is collected, a rank that left by `exit()` has ended well, and written nothing.
        ranks = range(nproc) if collect else ()
        found = [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in ranks]
        return Collected(zip(collect, map(ByRank, zip(*found, strict=True)), strict=True))


@magic_arguments("%%ranks")
@argument("nproc", nargs="?", type=int, default=2, metavar="N", help="ranks")
@argument("--collect", nargs="+", action="extend", default=[], metavar="NAME", help="names to bring back")
@argument("--with", nargs="+", action="extend", default=[], metavar="NAME", dest="sent", help="what to send")
@argument("--timeout", type=float, default=60.0, metavar="SECONDS", dest="timeout_s", help="for the cell")
@argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="gloo or NCCL")
@argument("--expect-failure", action="store_true", help="show the failure in place of raising it")
def ranks_magic(line: str, cell: str) -> Any:
    """Runs the cell's body on N fresh ranks: gloo on the CPU, NCCL where there are N GPUs.

    In scope are the launcher's public names and rank, world_size, device, ep_group, comm; the seed is 0 on every rank;
    the kernel's variables are not there. What comes back are CPU copies in a list by rank, bound in the kernel.
    """
    options = vars(parse_argstring(ranks_magic, line))
    expects_failure = options.pop("expect_failure")
    try:
        collected = run_cell_on_ranks(cell, **options)
    except RanksError as error:
        if not expects_failure:
            raise
        print("\n".join(error.lines))
        return None
    if expects_failure:
        raise RanksError(["%%ranks: every rank ended well, and --expect-failure says that one fails"])
    kernel().user_ns.update(collected)
    return next(iter(collected.values())) if len(collected) == 1 else collected or None
