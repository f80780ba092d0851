"""Waiting, ports and processes: what the browser tests share."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest

TOKEN = "a-token-for-the-tests"


def wait_until(is_so: Callable[[], object], timeout_s: float, what: str) -> float:
    """Waits; returns how long it took. Fails the test after timeout_s."""
    start = time.monotonic()
    while not is_so():
        if time.monotonic() - start > timeout_s:
            pytest.fail(f"after {timeout_s:g} s still not so: {what}")
        time.sleep(0.1)
    return time.monotonic() - start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_tree(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        for member in psutil.wait_procs(family, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()
