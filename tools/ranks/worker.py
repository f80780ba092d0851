"""The processes behind tools/launch.py; nobody starts this file by hand.

    python tools/ranks/worker.py torchrun PARENT ARG...    torchrun, which ends when the process PARENT does
    python tools/ranks/worker.py ranks PARENT FOLDER       the ranks of one %%ranks cell, described in FOLDER

torchrun gives every rank a session of its own, and a killed notebook kernel cannot say goodbye: so each process
here watches its parent. `ranks` imports torch and the launcher once and forks the ranks from there, before any
thread or GPU is in use; that takes the time of one import, not of one per rank.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
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
import runpy
import signal
import struct
import sys
import threading
import time
import traceback
import types
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CELL_FILE = "%%ranks cell"  # the file name in tracebacks of a cell's body
CELL_MODULE = "ranks_cell"  # where a cell's classes live
GRACE_S = 1.0  # what the other ranks get, to fail or end by themselves, once one rank has failed


# ----------------------------------------------------------------------------------------------------------
# torchrun
# ----------------------------------------------------------------------------------------------------------


def end_with_parent(parent: int) -> None:
    """The thread in torchrun's process: once the parent is gone, ends torchrun and all ranks within 3 s."""
    while os.getppid() == parent:
        time.sleep(0.3)
    children = []
    with contextlib.suppress(Exception):
        import psutil

        children = psutil.Process().children(recursive=True)
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun's own way to end its ranks
    time.sleep(2)
    for child in children:
        with contextlib.suppress(Exception):
            child.kill()
    os._exit(1)


def run_torchrun(parent: int, arguments: list[str]) -> None:
    """torchrun with these arguments, in this process."""
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    sys.argv = ["torchrun", *arguments]
    sys.path.pop(0)  # tools/ranks/, which running this file put there
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


# ----------------------------------------------------------------------------------------------------------
# The ranks of a cell
# ----------------------------------------------------------------------------------------------------------


def to_cpu(value: Any) -> Any:
    """A copy of value with every tensor in it detached and on the CPU: through dicts, lists, tuples, dataclasses."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(to_cpu, value))
    if type(value) in (list, tuple):
        return type(value)(map(to_cpu, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        import copy

        twin = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(twin, field.name, to_cpu(getattr(value, field.name)))
        return twin
    return value


def clean_message(text: str) -> str:
    """An error's text on one line, without source paths of the library, addresses and ports."""
    text = " ".join(text.split())
    text = re.sub(r"\[[^\[\]\s]*\.(?:cc|cpp|h|hpp|cu):\d+\] ?", "", text)
    text = re.sub(r"\[[0-9a-fA-F:.]*\]:\d+|\b\d+\.\d+\.\d+\.\d+:\d+", "another rank", text)
    return text if len(text) <= 400 else text[:400] + " ..."


def describe_failure(error: BaseException, launcher_file: str, sent: dict[str, str]) -> dict[str, Any]:
    """{"line": of the cell or None, "what": type and message, "where": innermost cell of the launcher or ""}."""
    from tools.extract import cell_of

    line, where = None, ""
    link, seen = error, set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        for frame, number in traceback.walk_tb(link.__traceback__):
            name, function = frame.f_code.co_filename, frame.f_code.co_qualname
            if name == CELL_FILE:
                line = number if link is error else (line or number)
            # A collective's own frames say nothing that its message does not.
            if link is error and name == launcher_file and not function.startswith("Communicator."):
                where = f"{cell_of(name, number) or 'launcher.py'}, in {function}"
            elif link is error and name in sent:
                where = f"{name}, line {number}, in {function}"
        link = link.__cause__ or link.__context__
    if isinstance(error, SyntaxError) and error.filename == CELL_FILE:
        line = error.lineno
        return {"line": line, "what": f"{type(error).__name__}: {error.msg}", "where": ""}
    message = clean_message(str(error))
    return {"line": line, "what": type(error).__name__ + (f": {message}" if message else ""), "where": where}


class Progress:
    """Memory that the ranks share: how many collectives each has entered, and how it stands."""

    RUNNING, DONE, FAILED = range(3)

    def __init__(self, world_size: int) -> None:
        self.map = mmap.mmap(-1, 16 * world_size)

    def get(self, rank: int) -> tuple[int, int]:
        """(state, collectives entered) of a rank."""
        return struct.unpack_from("qq", self.map, 16 * rank)

    def set_state(self, rank: int, state: int) -> None:
        struct.pack_into("q", self.map, 16 * rank, state)

    def count(self, rank: int) -> None:
        struct.pack_into("q", self.map, 16 * rank + 8, self.get(rank)[1] + 1)


def show_warning(message: Warning | str, category: type, *_: Any, **__: Any) -> None:
    """A warning as one line without paths, so that outputs are the same on every machine."""
    print(f"{category.__name__}: {message}", file=sys.stderr)


def redirect_output(folder: Path, rank: int) -> None:
    """Python's prints, and what child processes print, go to one file; what libraries log goes to another."""
    out = os.open(folder / f"rank{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(log, 2)
    raw = os.fdopen(out, "wb", buffering=0)
    sys.stdout = sys.stderr = io.TextIOWrapper(
        raw, encoding="utf-8", errors="backslashreplace", write_through=True
    )
    sys.stdin = open(os.devnull, encoding="utf-8")
    warnings.showwarning = show_warning


def start_group(spec: dict[str, Any], rank: int, folder: Path, launcher: Any) -> tuple[Any, Any]:
    """(this rank's device, the process group or None at world size 1)."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if spec["device"] == "cuda" else torch.device("cpu")
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
        timeout=timedelta(seconds=spec["group_timeout_s"]),
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


def execute_cell(spec: dict[str, Any], rank: int, folder: Path, launcher: Any) -> dict[str, Any]:
    """Runs the definitions sent along, then the body; returns CPU copies of the names to collect."""
    import torch

    device, group = start_group(spec, rank, folder, launcher)
    torch.manual_seed(0)
    module = types.ModuleType(CELL_MODULE)
    sys.modules[CELL_MODULE] = module  # dataclasses look for the module of a class
    scope = vars(module)
    scope |= {name: value for name, value in vars(launcher).items() if not name.startswith("_")}
    scope |= {
        "rank": rank,
        "world_size": spec["nproc"],
        "device": device,
        "ep_group": group,
        "comm": launcher.Communicator(group),
    }
    for filename, source in spec["sent"].items():
        run_source(source, filename, scope)
    run_source("\n" + spec["body"], CELL_FILE, scope)  # the magic's own line is line 1 of the cell
    missing = [name for name in spec["collect"] if name not in scope]
    if missing:
        raise NameError(f"the cell does not define `{missing[0]}`, which --collect names")
    return {name: to_cpu(scope[name]) for name in spec["collect"]}


def run_rank(
    spec: dict[str, Any], rank: int, folder: Path, launcher: Any, progress: Progress, release: int
) -> None:
    """One rank, from the fork to its end. Stays alive, connections open, until the worker releases it."""
    import torch

    worker = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the worker
    if os.getppid() != worker or worker == 1:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(spec["nproc"]), "LOCAL_WORLD_SIZE": str(spec["nproc"]),
    }  # fmt: skip
    redirect_output(folder, rank)
    faulthandler.register(signal.SIGUSR1, file=open(folder / f"rank{rank}.where", "w"), all_threads=True)
    entering = launcher.Communicator.entering

    def counted(self: Any) -> Any:
        progress.count(rank)
        return entering(self)

    launcher.Communicator.entering = counted
    failure = None
    try:
        collected = execute_cell(spec, rank, folder, launcher)
        sys.modules.pop(
            CELL_MODULE, None
        )  # the kernel has no such module: what needs it cannot be sent there
        try:
            torch.save(collected, folder / f"rank{rank}.pt")
        except Exception as error:
            raise TypeError(
                f"what --collect names cannot be sent to the kernel ({clean_message(str(error))}); "
                "collect tensors, numbers, strings, and lists, tuples or dicts of them"
            ) from None
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):
            failure = describe_failure(error, launcher.__file__, spec["sent"])
            with contextlib.suppress(Exception):
                os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if failure:
        failure |= {"rank": rank, "time": time.monotonic()}
        aside = folder / f"rank{rank}.part"
        aside.write_text(json.dumps(failure))
        aside.replace(folder / f"rank{rank}.failure")
    progress.set_state(rank, Progress.FAILED if failure else Progress.DONE)
    os.read(release, 1)  # returns when the worker closes its end
    os._exit(1 if failure else 0)


class Ranks:
    """The worker's view of its ranks."""

    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        self.spec, self.folder, self.size = spec, folder, spec["nproc"]
        self.progress = Progress(self.size)
        self.pids: dict[int, int] = {}  # rank -> process id, of those that still run
        self.signals: dict[int, int] = {}  # rank -> signal that ended it

    def fork(self, launcher: Any) -> None:
        """Starts every rank."""
        release, self.hold = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(self.size):
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(self.hold)
                    run_rank(self.spec, rank, self.folder, launcher, self.progress, release)
                finally:
                    os._exit(70)
            self.pids[rank] = pid
        os.close(release)

    def reap(self) -> None:
        """Notes which ranks are gone."""
        for rank, pid in list(self.pids.items()):
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                del self.pids[rank]
                if os.WIFSIGNALED(status):
                    self.signals[rank] = os.WTERMSIG(status)
                elif self.progress.get(rank)[0] == Progress.RUNNING:
                    self.signals[rank] = -os.WEXITSTATUS(status)

    def inside(self) -> list[int]:
        """The ranks that are still in the cell."""
        return [rank for rank in self.pids if self.progress.get(rank)[0] == Progress.RUNNING]

    def has_failure(self) -> bool:
        return bool(self.signals) or any(
            self.progress.get(rank)[0] == Progress.FAILED for rank in range(self.size)
        )

    def wait(self, deadline: float, is_orphan: Any) -> None:
        """Until no rank is inside, or the time is over, or a failure's grace is."""
        grace_end = None
        while time.monotonic() < deadline and not is_orphan():
            self.reap()
            if not self.inside():
                return
            if self.has_failure():
                grace_end = grace_end or time.monotonic() + GRACE_S
                if time.monotonic() > grace_end:
                    return
            time.sleep(0.01)

    def lines_inside(self, ranks: list[int]) -> dict[int, int | None]:
        """{rank: the line of the cell that it is at}; asks the ranks themselves, and waits 0.2 s for the answer."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.2 if ranks else 0)
        found = {}
        for rank in ranks:
            text = (self.folder / f"rank{rank}.where").read_text(errors="replace")
            match = re.search(rf'File "{re.escape(CELL_FILE)}", line (\d+)', text)
            found[rank] = int(match[1]) if match else None
        return found

    def end(self) -> None:
        """Ends every rank: those that are through leave by themselves, the others are killed."""
        os.close(self.hold)
        waiting = set(self.pids) - set(self.inside())
        deadline = time.monotonic() + 1.0
        while waiting & set(self.pids) and time.monotonic() < deadline:
            self.reap()
            time.sleep(0.005)
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids.values():
            os.waitpid(pid, 0)

    def report(self, out_of_time: bool) -> dict[str, Any]:
        """What the kernel needs to know, for report.json."""
        inside = self.inside()
        lines = self.lines_inside(inside) if out_of_time or self.has_failure() else {}
        files = [self.folder / f"rank{rank}.failure" for rank in range(self.size)]
        return {
            "out_of_time": out_of_time,
            "failures": [json.loads(file.read_text()) for file in files if file.exists()],
            "signals": self.signals,
            "inside": lines,
            "collectives": [self.progress.get(rank)[1] for rank in range(self.size)],
            "states": [self.progress.get(rank)[0] for rank in range(self.size)],
        }


def run_ranks(parent: int, folder: Path) -> None:
    """The worker of one %%ranks cell: forks, waits, reports. Ends all ranks when it, or the kernel, is ended."""
    spec = json.loads((folder / "spec.json").read_text())
    sys.path[0] = str(ROOT)
    os.chdir(spec["cwd"])
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)  # as Python 3.12 puts it
    from ep_launcher import launcher

    ranks = Ranks(spec, folder)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stopped.append(n))
    ranks.fork(launcher)
    deadline = time.monotonic() + spec["timeout_s"]

    def is_orphan() -> bool:
        return bool(stopped) or os.getppid() != parent

    try:
        ranks.wait(deadline, is_orphan)
        report = ranks.report(time.monotonic() >= deadline and bool(ranks.inside()))
        aside = folder / "report.part"
        aside.write_text(json.dumps(report))
        aside.replace(folder / "report.json")
    finally:
        ranks.end()
    if is_orphan() and os.getppid() != parent:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)  # the kernel that made it is gone


def main() -> None:
    mode, parent, *rest = sys.argv[1:]
    if mode == "torchrun":
        run_torchrun(int(parent), rest)
    else:
        run_ranks(int(parent), Path(rest[0]))


if __name__ == "__main__":
    main()
