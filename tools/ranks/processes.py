"""Starting, watching and ending a process with all that it starts.

torchrun gives every rank a session of its own, and a killed notebook kernel cannot say goodbye. So whoever starts an
agent keeps a list of what it has started, and every process that agent.py runs ends once its parent is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

AGENT = Path(__file__).with_name("agent.py")


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to each that still lives."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


class Agent:
    """tools/ranks/agent.py in a session of its own, and all its descendants, also those that others have adopted. It
    ends where its `with` block does, or this process.

    words: a file for its report and torchrun's arguments, or nothing for a server of cells; environment: variables
    besides this process's; before: `nsenter --net=...`; streams: Popen's stdin, stdout and stderr.
    """

    def __init__(
        self,
        *words: Any,
        environment: dict[str, Any] | None = None,
        before: Sequence[str] = (),
        **streams: Any,
    ) -> None:
        # torchrun's PET_ variables change its flags unseen; OMP_NUM_THREADS is read when torch is imported.
        usual = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
        usual = {"OMP_NUM_THREADS": "1"} | usual | {"PYTHONUNBUFFERED": "1"} | (environment or {})
        self.process = subprocess.Popen(
            [*before, sys.executable, *map(str, (AGENT, os.getpid(), *words))],
            env={name: str(value) for name, value in usual.items()},
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT} | streams,
        )
        self.members, self.checked = set(), 0.0

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(patience_s=0)

    @property
    def returncode(self) -> int | None:
        """torchrun's, once it has ended."""
        return self.process.poll()

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
        """Command lines of the descendants that still live limit_s later, as a killed one takes a moment to go; empty
        if all is well."""
        deadline = time.monotonic() + limit_s
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [" ".join(process.as_dict(["cmdline"], "")["cmdline"][:3]) for process in alive]

    def end(self, patience_s: float = 3.0) -> None:
        """SIGTERM to the process, which ends its ranks; after patience_s SIGKILL to all that is left."""
        self.note(every_s=0)
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
        try:  # a second Ctrl-C changes nothing
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
            kill(self.alive())
            self.process.kill()
            self.process.wait()
            self.left()  # a killed rank takes a moment to go, too
        finally:
            if is_main:
                signal.signal(signal.SIGINT, before)


def end_with_parent(parent: int) -> None:
    """A thread's work: once the process `parent` is gone, ends this process and all below it within 3 s."""
    while os.getppid() == parent:
        time.sleep(0.3)
    children = psutil.Process().children(recursive=True)
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun's own way to end its ranks
    time.sleep(2)
    kill(children)
    os._exit(1)
