"""Starting, watching and ending a process with all that it starts.

torchrun gives every rank a session of its own, and a killed notebook kernel cannot say goodbye. So whoever starts a
family keeps a list of it, and every process that tools/ranks/worker.py runs ends once its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
STOP_S = 3.0  # what a run gets to stop by itself before it is killed


class Family:
    """A process with all its descendants, also those that others have adopted since."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process, self.members, self.checked = process, set(), 0.0

    def tell(self, arguments: list[str], environment: dict[str, str]) -> None:
        """What a torchrun that was started ahead is to do. One that is gone already has reported why."""
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(json.dumps([arguments, environment]).encode())

    def checked_flags(self, report: Path) -> dict[str, Any]:
        """What was found of the flags that the process was started with (agent.py): {"values", "num_gpus"} or
        {"error": lines}. Waits for it.
        """
        found = report.with_suffix(".flags")
        while not found.exists():
            if self.process.poll() is not None:
                return {"error": [f"torchrun ended with exit code {self.process.returncode} at its start"]}
            time.sleep(0.005)
        return json.loads(found.read_text())

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

    def stopped_ranks(self) -> list[int]:
        """The ranks that SIGSTOP holds."""
        found = []
        for member in self.alive():
            with contextlib.suppress(psutil.Error):
                if member.status() == psutil.STATUS_STOPPED and member.name().startswith("rank "):
                    found.append(int(member.name().removeprefix("rank ")))
        return sorted(found)

    def end(self, patience_s: float = STOP_S) -> None:
        """SIGTERM to the process, which ends its ranks; after patience_s SIGKILL to all that is left."""
        self.note(every_s=0)
        with uninterrupted():
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
            for member in self.alive():
                with contextlib.suppress(psutil.Error):
                    member.kill()
            self.process.kill()
            self.process.wait()


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


def interrupt(*_: Any) -> None:
    """Signal handler: SIGTERM ends this process as Ctrl-C does."""
    raise KeyboardInterrupt


def start_worker(
    *arguments: Any, output: Any, environment: dict[str, str], before: tuple[str, ...] = ()
) -> Family:
    """tools/ranks/worker.py in a session of its own; it ends when this process does. before: `ip netns exec NAME`.

    torchrun reads its modules, checks flags where it is given some, and waits for Family.tell.
    """
    mode, *rest = map(str, arguments)
    return Family(
        subprocess.Popen(
            [*before, sys.executable, str(WORKER), mode, str(os.getpid()), *rest],
            env=environment,
            stdin=subprocess.PIPE if mode == "torchrun" else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )  # fmt: skip
    )


def end_with_parent(parent: int) -> None:
    """A thread's work: once the process `parent` is gone, ends this process and all below it within 3 s."""
    while os.getppid() == parent:
        time.sleep(0.3)
    children = psutil.Process().children(recursive=True)
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun's own way to end its ranks
    time.sleep(2)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(1)
