"""torchrun in one process with what it starts: torch is imported once, and the ranks are forked from there.

Importing torch is most of a start. %%ranks forks its ranks for the same reason (worker.py). By hand, `torchrun
ep_launcher/launcher.py` starts each rank as a new Python, and takes longer.
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
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any

from tools.commands import replace_file
from tools.ranks.failures import LaunchError, clean_message
from tools.ranks.flags import check_flags
from tools.ranks.processes import end_with_parent

Forked = multiprocessing.get_context("fork").Process
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36  # Linux, prctl

# torchrun's own settings depend on the GPUs it sees, but no fork can use what a process has opened of a GPU.
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def replace_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def prctl(option: int, value: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


# ------------------------------------------------------------------------------------------- flags


def check_arguments(arguments: list[str]) -> dict[str, Any]:
    """{"values": of the launcher's flags, "num_gpus"}, or {"error": lines}. A plugin runs here."""
    import torch

    try:
        return {"values": check_flags(arguments), "num_gpus": torch.cuda.device_count()}
    except LaunchError as error:
        return {"error": error.lines}
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = f"the flags cannot be checked: {clean_message(f'{type(error).__name__}: {error}')}"
        return {"error": [said, f"  {frame.filename}, line {frame.lineno}: {frame.line}"]}


def check_in_child(arguments: list[str]) -> dict[str, Any]:
    """check_arguments in a process of its own: a plugin may touch a GPU, or end it."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def check() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        theirs.send(check_arguments(arguments))

    child = Forked(target=check)
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        child.join()
        return {
            "error": [f"the flags cannot be checked: the plugin has ended that process ({child.exitcode})"]
        }
    finally:
        child.kill()  # a plugin's thread would keep it, and torchrun would wait for it at its end


# ------------------------------------------------------------------------------------------- ranks


class ForkedRank(Forked):
    """What torchrun has in the place of a subprocess.Popen: a process, in a group of its own, that runs a script as if
    it had been started anew. Its name, in `ps -o comm`, is `rank N`.
    """

    def __init__(self, command: list[str], environment: dict[str, str], outputs: list[Any]) -> None:
        super().__init__()
        self.command, self.environment, self.outputs = command, environment, outputs
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # until torchrun's handlers are gone
        self.start()
        os.setpgid(self.pid, self.pid)  # torchrun ends ranks by their groups
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in enumerate(self.outputs, 1):
            if file:
                os.dup2(file.fileno(), number)
        faulthandler.register(signal.SIGUSR1, all_threads=False)  # writes where it is; also while C code runs
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        atexit._clear()  # temporary folders, say, are torchrun's to remove
        replace_environment(self.environment)
        prctl(PR_SET_NAME, f"rank {os.environ['RANK']}".encode())
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # where torchrun is killed, nobody else would end it
        if os.getppid() != multiprocessing.parent_process().pid:
            return
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

    returncode = property(poll)


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


def run_torchrun(parent: int, report: str, *arguments: str) -> None:
    """torchrun with these arguments, in this process; what it records of failures goes to the file `report`.

    "--check" before them: the script is a launcher. Its flags are checked first, and what comes of it stands in
    `report` with the ending .flags; torchrun's --nproc_per_node=auto is one rank a GPU, or two.
    """
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    checks = arguments[0] == "--check"
    options = parse_args(list(arguments[checks:]))
    if checks:
        found = check_in_child(options.training_script_args)
        if options.nproc_per_node == "auto":
            options.nproc_per_node = str(max(2, found.get("num_gpus", 0)))
        told = json.dumps(found | {"nproc": options.nproc_per_node})
        replace_file(Path(report).with_suffix(".flags"), told.encode())
        if "error" in found:
            return

    # torch's public way to fork ranks, a function in the place of a script, records one failed rank alone, and waits
    # for ever for a rank that leaves by os._exit(0). A command of another program (numactl) is started as it is.
    start = SubprocessHandler._popen

    def start_rank(handler: SubprocessHandler, command: tuple[str, ...], env: dict[str, str]) -> Any:
        if command[:2] == (sys.executable, "-u"):
            return ForkedRank(list(command[2:]), env, [handler._stdout, handler._stderr])
        return start(handler, command, env)

    end = SubprocessHandler.close

    def end_rank(handler: SubprocessHandler, death_sig: signal.Signals | None = None) -> None:
        if isinstance(handler.proc, ForkedRank) and death_sig != signal.SIGKILL:
            os.kill(handler.proc.pid, signal.SIGUSR1)
            time.sleep(0.02)  # it writes where it is, before it ends
        end(handler, death_sig)

    SubprocessHandler._popen, SubprocessHandler.close = start_rank, end_rank
    failures, error = [], ""
    try:
        usual = dict(os.environ)
        os.environ.update(NO_GPU)
        config, program, words = config_from_args(options)
        replace_environment(usual)
        elastic_launch(config, program)(*words)
        return
    except ChildFailedError as failed:
        for rank, one in failed.failures.items():
            failures.append({"rank": rank, "exitcode": one.exitcode, "time": one.timestamp})
    except SignalException as stopped:
        error = f"ended by {signal.Signals(stopped.sigval).name}"
    except Exception as failed:
        error = clean_message(f"{type(failed).__name__}: {failed}")
    replace_file(Path(report), json.dumps({"failures": failures, "error": error}).encode())
    for rank in multiprocessing.active_children():  # or the end of this process would wait for them
        rank.kill()
    sys.exit(1)
