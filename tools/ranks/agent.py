"""torchrun in one process with what it starts: torch is imported once, and the ranks are forked from there.

Importing torch is most of a start. %%ranks forks its ranks for the same reason (worker.py). By hand, `torchrun
ep_launcher/launcher.py` starts each rank as a new Python, and takes longer.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.machinery
import json
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

from tools.ranks.failures import LaunchError, clean_message
from tools.ranks.processes import end_with_parent

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # Linux, prctl


def prctl(option: int, value: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


# ------------------------------------------------------------------------------------------- flags


def check_script(script: str, arguments: list[str]) -> dict[str, Any]:
    """What a run's parent has to know of its flags: {"values", "num_gpus"}, or {"error": lines}. A plugin runs here."""
    import torch

    from tools.ranks.flags import check_flags

    try:
        return {"values": check_flags(arguments, Path(script)), "num_gpus": torch.cuda.device_count()}
    except LaunchError as error:
        return {"error": error.lines}
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = f"the plugin failed: {clean_message(f'{type(error).__name__}: {error}')}"
        return {"error": [said, f"  {frame.filename}, line {frame.lineno}: {frame.line}"]}


def check_in_child(script: list[str], path: Path) -> None:
    """Writes what check_script finds to path, from a process of its own: a plugin may touch a GPU, or end it."""
    child = os.fork()
    if child == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            path.with_suffix(".part").write_text(json.dumps(check_script(script[0], script[1:])))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    aside = path.with_suffix(".part")
    if not aside.exists():
        code = os.waitstatus_to_exitcode(status)
        aside.write_text(json.dumps({"error": [f"the plugin ended its process while it was read ({code})"]}))
    aside.replace(path)


# ------------------------------------------------------------------------------------------- ranks


def run_script(script: str, arguments: list[str]) -> int:
    """`python script argument...` in this process -> the exit code that it would have."""
    loader = importlib.machinery.SourceFileLoader(
        "__main__", script
    )  # keeps compiled code, as an import does
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(__file__=script, __loader__=loader, __spec__=None)
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
    code: Any = 0
    try:
        exec(loader.get_code("__main__"), vars(main))
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        sys.excepthook(type(error), error.with_traceback(error.__traceback__.tb_next), error.__traceback__)
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    return (code or 0) & 255


class ForkedRank:
    """What torchrun has in the place of a subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it lives."""
        if self.returncode is None:
            gone, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if gone else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit code; subprocess.TimeoutExpired after so many seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return self.returncode


def become_rank(command: list[str], environment: dict[str, str], outputs: list[Any]) -> int:
    """The child's part of fork_rank: leaves everything of torchrun's behind, and runs the script -> exit code."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(outputs, 1):
        if file:
            os.dup2(file.fileno(), number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # and fork_rank knows that the session is there
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    atexit._clear()  # as multiprocessing does: temporary folders, say, are torchrun's to remove
    os.environ.clear()
    os.environ.update(environment)
    prctl(PR_SET_NAME, f"rank {environment['RANK']}".encode())
    script, *arguments = command
    code = run_script(script, arguments)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def fork_rank(command: list[str], environment: dict[str, str], outputs: list[Any]) -> ForkedRank:
    """A process that runs a script as if it had been started anew; its name, in `ps -o comm`, is `rank N`.

    outputs: the files for stdout and stderr. No signal reaches it before torchrun's handlers are gone.
    """
    read_end, write_end = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = become_rank(command, environment, outputs)
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    os.close(write_end)
    os.read(read_end, 1)  # torchrun ends ranks by their sessions
    os.close(read_end)
    return ForkedRank(pid)


# ------------------------------------------------------------------------------------------- torchrun


def run_torchrun(parent: int, report: str, script: list[str]) -> None:
    """torchrun, in this process, once it is told what to do; what it records of failures goes to the file `report`.

    script: a script with its flags, which are checked ahead (`report` with the ending .flags); empty for none.
    """
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    from torch.distributed.run import parse_args, run

    if script:
        check_in_child(script, Path(report).with_suffix(".flags"))
    if not (told := sys.stdin.read()):  # the flags were refused, or the parent is gone
        return
    arguments, environment = json.loads(told)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the ranks inherit

    # torch's public way to fork ranks, a function in the place of a script, records one failed rank alone, and waits
    # for ever for a rank that leaves by os._exit(0). A command of another program (numactl) is started as it is.
    start = SubprocessHandler._popen

    def start_rank(handler: SubprocessHandler, command: tuple[str, ...], env: dict[str, str]) -> Any:
        if command[:2] == (sys.executable, "-u"):
            return fork_rank(list(command[2:]), env, [handler._stdout, handler._stderr])
        return start(handler, command, env)

    SubprocessHandler._popen = start_rank
    failures, error = [], ""
    try:
        run(parse_args(arguments))
        return
    except ChildFailedError as failed:
        failures = [
            {"rank": rank, "exitcode": failure.exitcode, "time": failure.timestamp}
            for rank, failure in failed.failures.items()
        ]
    except SignalException as stopped:
        error = f"ended by {signal.Signals(stopped.sigval).name}"
    except Exception as failed:
        error = clean_message(f"{type(failed).__name__}: {failed}")
    Path(report).write_text(json.dumps({"failures": failures, "error": error}))
    sys.exit(1)
