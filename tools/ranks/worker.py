"""The process behind a run or a %%ranks cell; nobody starts this file by hand.

    python tools/ranks/worker.py torchrun PARENT REPORT ARGUMENT...   torchrun, which ends when PARENT does: agent.py
    python tools/ranks/worker.py ranks PARENT                         the ranks of all %%ranks cells of a kernel

Both import torch once and fork the ranks from there, before any GPU is in use; that takes the time of one import, not
of one per rank.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import faulthandler
import inspect
import io
import json
import linecache
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in the place of tools/ranks/

from tools.commands import replace_file  # noqa: E402
from tools.ranks.agent import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, Forked, prctl, run_torchrun  # noqa: E402
from tools.ranks.failures import clean_message, signal_name  # noqa: E402

CELL_FILE = "%%ranks cell"  # the file name in tracebacks of a cell's body
CELL_MODULE = "ranks_cell"  # where a cell's classes live
GRACE_S = 1.0  # what the other ranks get, to fail or end by themselves, once one rank has failed


# ------------------------------------------------------------------------------------------- one rank of a cell


COLLECTIVES = ("Communicator.", "Pending.", "TrafficMeter.")  # whose frames are a collective's own


def describe_error(error: BaseException, sent: dict[str, Any]) -> dict[str, Any]:
    """{"line": of the cell or None, "what": type and message, "where": innermost cell of the launcher or ""}."""
    from ep_launcher import launcher
    from tools.extract import cell_of

    if isinstance(error, SyntaxError) and error.filename == CELL_FILE:
        return {"line": error.lineno, "what": f"{type(error).__name__}: {error.msg}", "where": ""}
    line, where = None, ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        name, function = frame.f_code.co_filename, frame.f_code.co_qualname
        if name == CELL_FILE:
            line = number
        elif name in sent:
            where = f"{name}, line {number}, in {function}"
        elif name == launcher.__file__ and not function.startswith(COLLECTIVES):
            where = f"{cell_of(name, number) or 'launcher.py'}, in {function}"
    message = clean_message(str(error))
    return {"line": line, "what": type(error).__name__ + (f": {message}" if message else ""), "where": where}


class CpuPickler(pickle.Pickler):
    """Pickles every tensor, wherever it is, as a detached copy on the CPU."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if not isinstance(value, torch.Tensor):
            return NotImplemented
        return value.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def redirect_output(folder: Path, rank: int) -> None:
    """Python's prints, and what child processes print, go to one file; what libraries log goes to another."""
    out, log = (open(folder / f"rank{rank}.{kind}", "ab", buffering=0) for kind in ("out", "log"))
    os.dup2(out.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = io.TextIOWrapper(out, "utf-8", "backslashreplace", write_through=True)
    # A warning as one line without paths: outputs are the same on every machine.
    warnings.showwarning = lambda message, category, *_, **__: print(f"{category.__name__}: {message}")


def start_group(spec: dict[str, Any], rank: int, folder: Path) -> tuple[Any, Any]:
    """(this rank's device, the process group or None at world size 1)."""
    import torch
    import torch.distributed as dist

    from ep_launcher import launcher

    device = launcher.choose_device(spec["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if spec["nproc"] == 1:
        return device, None
    if device.type == "cpu":
        launcher.schedule_in_batches()
    store = dist.FileStore(str(folder / "store"), spec["nproc"])
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=spec["timeout_s"] / 2)
    dist.init_process_group(backend, store=store, rank=rank, world_size=spec["nproc"], timeout=timeout)
    # A rank is through when its own connections stand. One that then dies at once, as a cell may want, would break
    # what its peers still do: nobody starts the cell before everybody is through.
    store.set(f"connected/{rank}", "")
    store.wait([f"connected/{other}" for other in range(spec["nproc"])])
    return device, dist.group.WORLD


def run_source(source: str, filename: str, scope: dict[str, Any], only: Sequence[int] = ()) -> None:
    """Runs a cell's source, an await outside a function included; its lines show up in tracebacks.

    only: the first lines of the statements to run; none: all of them.
    """
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    tree = ast.parse(source, filename)
    tree.body = [part for part in tree.body if not only or part.lineno in only]
    # dont_inherit: this file's own `from __future__ import annotations` is none of the cell's.
    code = compile(tree, filename, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, scope))
    else:
        exec(code, scope)


def execute_cell(spec: dict[str, Any], rank: int, folder: Path) -> None:
    """Runs the definitions sent along, then the body; saves CPU copies of the names to collect."""
    import torch

    from ep_launcher import launcher

    device, group = start_group(spec, rank, folder)
    torch.manual_seed(0)
    module = sys.modules[CELL_MODULE] = types.ModuleType(CELL_MODULE)  # dataclasses and pickle look there
    scope = vars(module)
    scope |= {name: value for name, value in vars(launcher).items() if not name.startswith("_")}
    scope |= {"rank": rank, "world_size": spec["nproc"], "device": device, "ep_group": group}
    scope["comm"] = launcher.Communicator(group)
    for filename, (source, lines) in spec["sent"].items():
        run_source(source, filename, scope, lines)
    run_source("\n" + spec["body"], CELL_FILE, scope)  # the magic's own line is line 1 of the cell
    missing = [name for name in spec["collect"] if name not in scope]
    if missing:
        raise NameError(f"the cell does not define `{missing[0]}`, which --collect names")
    del sys.modules[CELL_MODULE]  # the kernel has no such module: what needs it cannot be sent there
    try:
        with open(folder / f"rank{rank}.pickle", "wb") as file:
            CpuPickler(file).dump([scope[name] for name in spec["collect"]])
    except Exception as error:
        raise TypeError(
            f"what --collect names cannot be sent to the kernel ({clean_message(str(error))}); "
            "collect tensors, numbers, strings, and lists, tuples or dicts of them"
        ) from None


def run_rank(spec: dict[str, Any], rank: int, folder: Path, ended: Connection) -> None:
    """One rank, from the fork on. Stays alive, its connections open, until the worker ends it."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the worker
    if os.getppid() != multiprocessing.parent_process().pid:
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    size = str(spec["nproc"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    redirect_output(folder, rank)
    faulthandler.register(signal.SIGUSR1, file=open(folder / f"rank{rank}.where", "w"), all_threads=True)
    failure = None
    try:
        execute_cell(spec, rank, folder)
    except BaseException as error:
        is_over = isinstance(error, SystemExit) and error.code in (None, 0) and not spec["collect"]
        if not is_over:
            failure = describe_error(error, spec["sent"])
    ended.send(failure)
    while True:
        signal.pause()


# ------------------------------------------------------------------------------------------- all ranks of a cell


class Ranks:
    """The worker's view of its ranks. ended: {rank: failure or None}, of those that have left the cell."""

    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        self.folder, self.processes, self.pipes, self.ended = folder, [], [], {}
        for rank in range(spec["nproc"]):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            arguments = spec, rank, folder, theirs
            self.pipes.append(ours)
            self.processes.append(Forked(target=run_rank, args=arguments))
            self.processes[-1].start()
            theirs.close()

    def inside(self) -> list[int]:
        """The ranks that are still in the cell. Notes how the others left."""
        for rank, (pipe, process) in enumerate(zip(self.pipes, self.processes, strict=True)):
            if rank in self.ended:
                continue
            code = process.exitcode  # before the pipe, which a process that the rank started may keep open
            with contextlib.suppress(EOFError):
                if pipe.poll():
                    self.ended[rank] = pipe.recv()
                    continue
            if code is not None:
                how = f"ended by {signal_name(-code)}" if code < 0 else f"exited with code {code}"
                self.ended[rank] = {"line": None, "what": how, "where": ""}
        return [rank for rank in range(len(self.pipes)) if rank not in self.ended]

    def wait(self, deadline: float, is_over: Callable[[], bool]) -> None:
        """Until no rank is inside, or the time is over, or a failure's grace is."""
        while self.inside() and time.monotonic() < deadline and not is_over():
            if any(self.ended.values()):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(0.01)

    def others(self) -> str:
        """What the ranks did that have not failed. Those inside say themselves where they are, within 0.2 s."""
        for rank in (inside := self.inside()):
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2 if inside else 0)
        said = [(rank, "ended the cell") for rank, failure in self.ended.items() if failure is None]
        for rank in inside:
            where = self.folder / f"rank{rank}.where"
            text = where.read_text(errors="replace") if where.exists() else ""
            match = re.search(rf'File "{re.escape(CELL_FILE)}", line (\d+)', text)
            said.append((rank, f"was at line {match[1]}" if match else "was outside the cell"))
        return "; ".join(f"rank {rank} {what}" for rank, what in sorted(said))

    def problems(self, timeout_s: float) -> list[str]:
        """One line per problem, for the reader; empty where all is well. Ranks that failed alike share a line."""
        alike: dict[tuple, list[int]] = {}
        for rank, failure in sorted(self.ended.items()):
            if failure:
                alike.setdefault(tuple(failure.values()), []).append(rank)
        if not alike and not self.inside():
            return []
        others = self.others()
        lines = []
        for (line, what, where), ranks in alike.items():
            who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            place = f", line {line} of the cell" if line else ""
            has_waited = re.search(r"CollectiveError|[Tt]imed? ?out|DistBackendError|DistNetworkError", what)
            lines.append(f"{who}{place}: {what}" + f" ({where})" * bool(where))
            lines[-1] += f"; {others}" * bool(has_waited and others)
            half = f"; a collective waits for half of --timeout, {timeout_s / 2:g} s"
            lines[-1] += half * ("Timed out waiting" in what)
        if not lines:
            return [f"the time limit of {timeout_s:g} s is over: {others}; raise --timeout, or mend the wait"]
        return sorted(
            lines, key=lambda line: ": CollectiveError" in line
        )  # who waited in vain is not the cause

    def end(self) -> None:
        """Ends all ranks, and what they have started."""
        family = psutil.Process().children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.kill()
        for process in self.processes:
            process.join()
        psutil.wait_procs(family, timeout=1)


def run_ranks(parent: int, folder: Path) -> None:
    """One %%ranks cell: forks, waits, ends all ranks, and then reports."""
    spec = json.loads((folder / "spec.json").read_text())
    os.chdir(spec["cwd"])
    ranks = Ranks(spec, folder)
    try:
        ranks.wait(time.monotonic() + spec["timeout_s"], lambda: os.getppid() != parent)
        problems = ranks.problems(spec["timeout_s"])
    finally:
        ranks.end()
    replace_file(folder / "problems.json", json.dumps(problems).encode())
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)  # the kernel that made it is gone


def leave(*_: Any) -> None:
    for rank in multiprocessing.active_children():
        rank.kill()
    os._exit(1)


def serve_cells(parent: int) -> None:
    """Runs one cell after the other, whose folders come on stdin; ends when the kernel does, which closes that."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)  # as Python 3.12 puts it
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a rank started stays below this process when the rank ends
    import ep_launcher.launcher  # noqa: F401  # which the ranks then have

    for line in sys.stdin:
        run_ranks(parent, Path(line.rstrip("\n")))


if __name__ == "__main__":
    mode, parent, *arguments = sys.argv[1:]
    if mode == "torchrun":
        run_torchrun(int(parent), *arguments)
    else:
        serve_cells(int(parent))
