"""torchrun in one process with what it starts: torch is imported once, and the ranks are forked from there.

    python tools/ranks/agent.py PARENT REPORT ARGUMENT...   one run
    python tools/ranks/agent.py PARENT                      the runs of a kernel's %%ranks cells (cells.py)

Nobody starts this file by hand. Importing torch is most of a start: `torchrun ep_launcher/launcher.py` starts each rank
as a new Python, and takes longer. A fork has to come before anything uses a GPU.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import importlib.machinery
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in the place of tools/ranks/

from tools.commands import replace_file  # noqa: E402
from tools.ranks.failures import clean_message, how_ended  # noqa: E402
from tools.ranks.processes import end_with_parent, kill  # noqa: E402

FORK = multiprocessing.get_context("fork")
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36  # Linux, prctl
FAILED_S = 6  # what ranks get once one has failed; torchrun would wait 30 s for one that is stuck

# torchrun's own settings depend on the GPUs it sees, but no fork can use what a process has opened of a GPU.
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def prctl(option: int, value: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


# ------------------------------------------------------------------------------------------- ranks


class ForkedRank(FORK.Process):
    """What torchrun has in the place of a subprocess.Popen: a process, in a group of its own, that runs a script as if
    it had been started anew. Its name, in `ps -o comm`, is `rank N`.

    None goes on before all are forked: who meets the others has torch's store, in a thread of this process, look up a
    name, and a process that is forked meanwhile would wait for the lock of that for ever.
    """

    gate: tuple[int, int] = (-1, -1)  # a pipe, closed once all are there

    def __init__(self, handler: Any, command: tuple[str, ...], environment: dict[str, str]) -> None:
        super().__init__()
        self.handler, self.command, self.environment = handler, command[2:], environment  # after python -u
        self.rank, local = int(environment["RANK"]), int(environment["LOCAL_RANK"])
        if local == 0:
            ForkedRank.gate = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # until torchrun's handlers are gone
        self.start()
        os.setpgid(self.pid, self.pid)  # torchrun ends ranks by their groups
        if local + 1 == int(environment["LOCAL_WORLD_SIZE"]):
            for end in self.gate:
                os.close(end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in enumerate((self.handler._stdout, self.handler._stderr), 1):
            if file:
                os.dup2(file.fileno(), number)
        faulthandler.register(signal.SIGUSR1, all_threads=False)  # writes where it is; also while C code runs
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        atexit._clear()  # temporary folders, say, are torchrun's to remove
        os.environ.update(self.environment)
        prctl(PR_SET_NAME, f"rank {self.rank}".encode())
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # where torchrun is killed, nobody else would end it
        if os.getppid() != multiprocessing.parent_process().pid:
            return
        os.close(self.gate[1])
        os.read(self.gate[0], 1)
        os.close(self.gate[0])
        try:
            run_script(*self.command)
        finally:
            atexit._run_exitfuncs()

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it lives."""
        return self.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit code; subprocess.TimeoutExpired after so many seconds."""
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout)
        return self.exitcode


def run_script(script: str, *arguments: str) -> None:
    """`python script argument...` in this process."""
    # A loader keeps the compiled code, as an import does.
    loader = importlib.machinery.SourceFileLoader("__main__", script)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(__file__=script, __loader__=loader, __spec__=None)
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
    try:
        exec(loader.get_code("__main__"), vars(main))
    except SystemExit:
        raise
    except BaseException as error:
        sys.excepthook(type(error), error.with_traceback(error.__traceback__.tb_next), error.__traceback__)
        sys.exit(1)


# ------------------------------------------------------------------------------------------- torchrun


def torchrun_options(arguments: Sequence[str]) -> Any:
    """torchrun's options. auto is one rank a GPU where there are two or more, else two.

    On one host the ranks meet on the loopback, at a free port, in a static rendezvous: it asks no name server, waits
    for nobody, and reads no pickles, as the c10d rendezvous of several hosts (and of --standalone) does.
    """
    import torch
    from torch.distributed.run import parse_args

    options = parse_args(arguments)
    if options.rdzv_backend == "static":
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with socket.socket() as probe:
            probe.bind(("", 0))
            options.master_port = probe.getsockname()[1]
    if options.nproc_per_node == "auto":
        with ProcessPoolExecutor(1, FORK) as pool:  # counting may open a GPU
            options.nproc_per_node = str(max(2, pool.submit(torch.cuda.device_count).result()))
    return options


def fork_ranks(failed_s: float, ended_s: float) -> dict[Any, list[tuple[int, int | None]]]:
    """torchrun forks its ranks from now on, and has them say where they are before it ends them.

    failed_s: what the others get to end by themselves once a rank has failed; ended_s: what all get at a signal.
    Returns how every attempt's ranks had ended by then: {attempt: [(rank, exit code, None for one that lived)]}.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    # torch's public way to fork ranks, a function in the place of a script, records one failed rank alone, and waits
    # for ever for a rank that leaves by os._exit(0).
    close, attempts = SubprocessContext._close, {}

    def close_ranks(context: SubprocessContext, death_sig: signal.Signals, timeout: float = 30) -> None:
        ranks = [handler.proc for handler in context.subprocess_handlers.values()]
        attempts.setdefault(context, [(rank.rank, rank.poll()) for rank in ranks])
        living = [rank for rank in ranks if rank.poll() is None]
        for rank in living:
            os.kill(rank.pid, signal.SIGUSR1)
        time.sleep(0.1 * bool(living))  # they write where they are
        close(context, death_sig, min(timeout, failed_s if context._failures else ended_s))

    SubprocessHandler._popen = lambda handler, command, env: ForkedRank(handler, command, env)
    SubprocessContext._close = close_ranks
    return attempts


def run_torchrun(report: str, *arguments: str, ended_s: float = 30) -> None:
    """torchrun with these arguments, in this process. What is known of the run goes to the file `report`: its nproc
    before anything starts, its ranks and its error where it fails."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args

    options = torchrun_options(arguments)
    known = {"nproc": options.nproc_per_node, "ranks": [], "error": "it was killed"}
    replace_file(Path(report), json.dumps(known).encode())
    attempts = fork_ranks(30 if options.max_restarts else FAILED_S, ended_s)
    try:
        with mock.patch.dict(os.environ, NO_GPU):
            config, program, words = config_from_args(options)
        elastic_launch(config, program)(*words)
        return
    except ChildFailedError:
        known["error"] = "a rank has failed"
    except SignalException as ended:
        known["error"] = how_ended(-ended.sigval)
    except Exception as failed:
        known["error"] = clean_message(f"{type(failed).__name__}: {failed}")
    known["ranks"] = list(attempts.values())[-1] if attempts else []
    replace_file(Path(report), json.dumps(known).encode())
    for rank in multiprocessing.active_children():  # or the end of this process would wait for them
        rank.kill()
    sys.exit(1)


# ------------------------------------------------------------------------------------------- cells


def run_cell(limit_s: float, arguments: list[str]) -> None:
    """torchrun for one cell; SIGTERM ends it after limit_s."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(2, 1)  # the kernel reads what `serve_cells` says there
    timer = threading.Timer(limit_s, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    run_torchrun(*arguments, ended_s=1)


def serve_cells() -> None:
    """Runs what stdin asks for, [limit_s, [report, argument...]] a line, and says of each its exit code on stdout, once
    nothing that it started is left; ends when the kernel does, which closes stdin."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or nobody would end the children (end_with_parent)
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a rank started stays below this process when the rank ends
    import torch.distributed.run  # noqa: F401

    import ep_launcher.launcher  # noqa: F401  # which the ranks then have

    for line in sys.stdin:
        run = FORK.Process(target=run_cell, args=json.loads(line))
        run.start()
        run.join()
        family = psutil.Process().children(recursive=True)
        kill(family)
        psutil.wait_procs(family, timeout=1)
        print(run.exitcode, flush=True)


if __name__ == "__main__":
    parent, *arguments = sys.argv[1:]
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)  # as Python 3.12 puts it
    threading.Thread(target=end_with_parent, args=(int(parent),), daemon=True).start()
    if arguments:
        prctl(PR_SET_NAME, b"torchrun")
        run_torchrun(*arguments)
    else:
        serve_cells()
