"""Starting, watching and ending a process with all that it starts.

torchrun gives every rank a session of its own, and a killed notebook kernel cannot say goodbye. So whoever starts a
family keeps a list of it, and every process that agent.py runs ends once its parent is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
AGENT = Path(__file__).with_name("agent.py")
STOP_S = 3.0  # what a run gets to stop by itself before it is killed


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to each that still lives."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


class Family:
    """A process with all its descendants, also those that others have adopted since."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process, self.members, self.checked = process, set(), 0.0

    def note(self, every_s: float = 0.5) -> None:
        """Remembers the descendants; looking through all processes is dear, so not at each call."""
        if time.monotonic() - self.checked >= every_s:
            self.checked = time.monotonic()
            with contextlib.suppress(psutil.Error):
                self.members.update(psutil.Process(self.process.pid).children(recursive=True))

    def alive(self) -> list[psutil.Process]:
        """The descendants that still live."""
        found = []
        for member in self.members:
            with contextlib.suppress(psutil.Error):
                if member.is_running() and member.status() != psutil.STATUS_ZOMBIE:
                    found.append(member)
        return found

    def left(self, limit_s: float = 5.0) -> list[str]:
        """Command lines of the descendants that still live limit_s later; a killed one takes a moment to go."""
        deadline = time.monotonic() + limit_s
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [" ".join(process.as_dict(["cmdline"], "")["cmdline"][:3]) for process in alive]

    def end(self, patience_s: float = STOP_S) -> None:
        """SIGTERM to the process, which ends its ranks; after patience_s SIGKILL to all that is left."""
        self.note(every_s=0)
        with uninterrupted():
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
            kill(self.alive())
            self.process.kill()
            self.process.wait()
            self.left()  # a killed rank takes a moment to go, too


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """While processes are being ended, a second Ctrl-C changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_agent(
    *arguments: Any, environment: dict[str, str], before: Sequence[str] = (), **streams: Any
) -> Family:
    """tools/ranks/agent.py in a session of its own; it ends when this process does. streams: Popen's stdin, stdout and
    stderr. before: `nsenter --net=...`."""
    mode, *rest = map(str, arguments)
    command = [*before, sys.executable, str(AGENT), mode, str(os.getpid()), *rest]
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT} | streams
    return Family(subprocess.Popen(command, env=environment, start_new_session=True, **streams))


def end_with_parent(parent: int) -> None:
    """A thread's work: once the process `parent` is gone, ends this process and all below it within 3 s."""
    while os.getppid() == parent:
        time.sleep(0.3)
    children = psutil.Process().children(recursive=True)
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun's own way to end its ranks
    time.sleep(2)
    kill(children)
    os._exit(1)
