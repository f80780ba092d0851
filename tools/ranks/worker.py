"""The process behind a run or a %%ranks cell; nobody starts this file by hand.

    python tools/ranks/worker.py torchrun PARENT REPORT [SCRIPT FLAG...]   torchrun, which ends when PARENT does
    python tools/ranks/worker.py ranks PARENT FOLDER                       the ranks of one %%ranks cell (FOLDER)

Both import torch once and fork the ranks from there, before any GPU is in use; that takes the time of one import, not
of one per rank. torchrun's arguments and environment come on stdin.
"""

from __future__ import annotations

import ast
import asyncio
import copy
import ctypes
import dataclasses
import faulthandler
import inspect
import io
import json
import linecache
import mmap
import os
import re
import shutil
import signal
import sys
import time
import traceback
import types
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in the place of tools/ranks/

from tools.ranks.agent import run_torchrun  # noqa: E402
from tools.ranks.failures import clean_message  # noqa: E402

CELL_FILE = "%%ranks cell"  # the file name in tracebacks of a cell's body
CELL_MODULE = "ranks_cell"  # where a cell's classes live
GRACE_S = 1.0  # what the other ranks get, to fail or end by themselves, once one rank has failed
RUNNING, DONE, FAILED = range(3)  # how a rank stands


# ------------------------------------------------------------------------------------------- one rank of a cell


def to_cpu(value: Any) -> Any:
    """A copy of value with every tensor in it detached and on the CPU: through dicts, lists, tuples, dataclasses."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        make = getattr(type(value), "_make", type(value))  # of a named tuple
        return make(map(to_cpu, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(twin, field.name, to_cpu(getattr(value, field.name)))
        return twin
    return value


COLLECTIVES = ("Communicator.", "Pending.", "as_collective_error")  # whose frames are a collective's own


def describe_error(error: BaseException, launcher_file: str, sent: dict[str, str]) -> dict[str, Any]:
    """{"line": of the cell or None, "what": type and message, "where": innermost cell of the launcher or ""}."""
    from tools.extract import cell_of

    if isinstance(error, SyntaxError) and error.filename == CELL_FILE:
        return {"line": error.lineno, "what": f"{type(error).__name__}: {error.msg}", "where": ""}
    line, where, link, seen = None, "", error, set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        for frame, number in traceback.walk_tb(link.__traceback__):
            name, function = frame.f_code.co_filename, frame.f_code.co_qualname
            if name == CELL_FILE:
                line = number if link is error else (line or number)
            # A collective's own frames say nothing that its message does not.
            if link is error and name == launcher_file and not function.startswith(COLLECTIVES):
                where = f"{cell_of(name, number) or 'launcher.py'}, in {function}"
            elif link is error and name in sent:
                where = f"{name}, line {number}, in {function}"
        link = link.__cause__ or link.__context__
    message = clean_message(str(error))
    return {"line": line, "what": type(error).__name__ + (f": {message}" if message else ""), "where": where}


def redirect_output(folder: Path, rank: int) -> None:
    """Python's prints, and what child processes print, go to one file; what libraries log goes to another."""
    out, log = (
        os.open(folder / f"rank{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for kind in ("out", "log")
    )
    os.dup2(out, 1)
    os.dup2(log, 2)
    raw = os.fdopen(out, "wb", buffering=0)
    sys.stdout = sys.stderr = io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)
    sys.stdin = open(os.devnull, encoding="utf-8")
    # A warning as one line without paths: outputs are the same on every machine.
    warnings.showwarning = lambda message, category, *_, **__: print(f"{category.__name__}: {message}")


def start_group(spec: dict[str, Any], rank: int, folder: Path, launcher: Any) -> tuple[Any, Any]:
    """(this rank's device, the process group or None at world size 1)."""
    import torch
    import torch.distributed as dist

    device = launcher.choose_device(spec["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if spec["nproc"] == 1:
        return device, None
    if device.type == "cpu":
        launcher.schedule_in_batches()
    store = dist.FileStore(str(folder / "store"), spec["nproc"])
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=spec["nproc"],
        timeout=timedelta(seconds=spec["timeout_s"] / 2),
    )
    # A rank is through when its own connections stand. One that then dies at once, as a cell may want, would break
    # what its peers still do: nobody starts the cell before everybody is through.
    store.set(f"connected/{rank}", "")
    store.wait([f"connected/{other}" for other in range(spec["nproc"])])
    return device, dist.group.WORLD


def run_source(source: str, filename: str, scope: dict[str, Any]) -> None:
    """Runs a cell's source, an await outside a function included; its lines show up in tracebacks."""
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    # dont_inherit: this file's own `from __future__ import annotations` is none of the cell's.
    code = compile(source, filename, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, scope))
    else:
        exec(code, scope)


def execute_cell(spec: dict[str, Any], rank: int, folder: Path, launcher: Any) -> None:
    """Runs the definitions sent along, then the body; saves CPU copies of the names to collect."""
    import torch

    device, group = start_group(spec, rank, folder, launcher)
    torch.manual_seed(0)
    module = sys.modules[CELL_MODULE] = types.ModuleType(CELL_MODULE)  # dataclasses and pickle look there
    scope = vars(module)
    scope |= {name: value for name, value in vars(launcher).items() if not name.startswith("_")}
    scope |= {"rank": rank, "world_size": spec["nproc"], "device": device, "ep_group": group}
    scope["comm"] = launcher.Communicator(group)
    for filename, source in spec["sent"].items():
        run_source(source, filename, scope)
    run_source("\n" + spec["body"], CELL_FILE, scope)  # the magic's own line is line 1 of the cell
    missing = [name for name in spec["collect"] if name not in scope]
    if missing:
        raise NameError(f"the cell does not define `{missing[0]}`, which --collect names")
    del sys.modules[CELL_MODULE]  # the kernel has no such module: what needs it cannot be sent there
    try:
        torch.save({name: to_cpu(scope[name]) for name in spec["collect"]}, folder / f"rank{rank}.pt")
    except Exception as error:
        raise TypeError(
            f"what --collect names cannot be sent to the kernel ({clean_message(str(error))}); "
            "collect tensors, numbers, strings, and lists, tuples or dicts of them"
        ) from None


def run_rank(spec: dict[str, Any], rank: int, folder: Path, launcher: Any, shared: memoryview) -> None:
    """One rank, from the fork on. Stays alive, its connections open, until the worker ends it."""
    worker = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the worker
    if os.getppid() != worker or worker == 1:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    size = str(spec["nproc"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    redirect_output(folder, rank)
    faulthandler.register(signal.SIGUSR1, file=open(folder / f"rank{rank}.where", "w"), all_threads=True)
    entering = launcher.Communicator.entering

    def counted(self: Any) -> Any:
        shared[2 * rank + 1] += 1
        return entering(self)

    launcher.Communicator.entering = counted
    state = DONE
    try:
        execute_cell(spec, rank, folder, launcher)
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):
            state = FAILED
            said = describe_error(error, launcher.__file__, spec["sent"]) | {"rank": rank}
            (folder / f"rank{rank}.failure").write_text(json.dumps(said))
    shared[2 * rank] = state
    while True:
        signal.pause()


# ------------------------------------------------------------------------------------------- all ranks of a cell


class Ranks:
    """The worker's view of its ranks. shared: two numbers a rank, how it stands and the collectives it entered."""

    def __init__(self, spec: dict[str, Any], folder: Path, launcher: Any) -> None:
        self.folder, self.size = folder, spec["nproc"]
        self.shared = memoryview(mmap.mmap(-1, 16 * self.size)).cast("q")
        self.pids: dict[int, int] = {}  # rank -> process id, of those that still run
        self.signals: dict[int, int] = {}  # rank -> signal that ended it, or minus its exit code
        for rank in range(self.size):
            pid = os.fork()
            if pid == 0:
                try:
                    run_rank(spec, rank, folder, launcher, self.shared)
                finally:
                    os._exit(70)
            self.pids[rank] = pid

    def inside(self) -> list[int]:
        """The ranks that are still in the cell. Notes which are gone."""
        for rank, pid in list(self.pids.items()):
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                del self.pids[rank]
                self.signals[rank] = (
                    os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
                )
        return [rank for rank in self.pids if self.shared[2 * rank] == RUNNING]

    def has_failure(self) -> bool:
        return bool(self.signals) or FAILED in self.shared[::2].tolist()

    def wait(self, deadline: float, is_over: Any) -> None:
        """Until no rank is inside, or the time is over, or a failure's grace is."""
        while self.inside() and time.monotonic() < deadline and not is_over():
            if self.has_failure():
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(0.01)

    def lines_inside(self) -> dict[int, int | None]:
        """{rank: the line of the cell that it is at}; asks the ranks themselves, and waits 0.2 s for the answer."""
        found = {}
        for rank in (inside := self.inside()):
            os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.2 if inside else 0)
        for rank in inside:
            text = (self.folder / f"rank{rank}.where").read_text(errors="replace")
            match = re.search(rf'File "{re.escape(CELL_FILE)}", line (\d+)', text)
            found[rank] = int(match[1]) if match else None
        return found

    def report(self, is_out_of_time: bool) -> dict[str, Any]:
        """What the kernel needs to know, for report.json."""
        lines = self.lines_inside() if is_out_of_time or self.has_failure() else {}
        return {
            "out_of_time": is_out_of_time,
            "failures": [json.loads(file.read_text()) for file in sorted(self.folder.glob("rank*.failure"))],
            "signals": self.signals,
            "inside": lines,
            "states": self.shared[::2].tolist(),
            "collectives": self.shared[1::2].tolist(),
        }

    def end(self) -> None:
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def run_ranks(parent: int, folder: Path) -> None:
    """The worker of one %%ranks cell: forks, waits, reports. Ends all ranks when it, or the kernel, is ended."""
    spec = json.loads((folder / "spec.json").read_text())
    os.chdir(spec["cwd"])
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)  # as Python 3.12 puts it
    from ep_launcher import launcher

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stopped.append(n))
    ranks, deadline = Ranks(spec, folder, launcher), time.monotonic() + spec["timeout_s"]
    try:
        ranks.wait(deadline, lambda: stopped or os.getppid() != parent)
        report = ranks.report(time.monotonic() >= deadline and bool(ranks.inside()))
        aside = folder / "report.part"
        aside.write_text(json.dumps(report))
        aside.replace(folder / "report.json")
    finally:
        ranks.end()
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)  # the kernel that made it is gone


if __name__ == "__main__":
    mode, parent, first, *script = sys.argv[1:]
    if mode == "torchrun":
        run_torchrun(int(parent), first, script)
    else:
        run_ranks(int(parent), Path(first))
