"""A plugin of the launcher whose step breaks a rank on purpose: chapter 15's faults from the inside.

    EP_FAULTS='[["exit", 1, 37, 0]]' torchrun ... ep_launcher/launcher.py --plugin tools/faulty.py --step faulty

Each fault is [what, rank, step, attempt]: what happens on this rank before this step, in the attempt of this number
(torchrun restarts count). What there is: FAULTS.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
from typing import Any

ep = sys.modules["ep_launcher.launcher"]  # the program that runs


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_error() -> None:
    raise RuntimeError("a fault, on purpose")


def limit_files(num_bytes: int | None) -> None:
    """From now on no file of this process grows over num_bytes; None: as far as before."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if num_bytes is None else num_bytes, hard))


FAULTS = {
    "raise": raise_error,
    "exit": lambda: sys.exit(3),
    "SIGKILL": die,
    "SIGSEGV": lambda: ctypes.string_at(0),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(10**6),
    "killed while it writes": lambda: setattr(os, "fsync", die),  # the next save finds it
    "killed before the rename": lambda: setattr(ep, "remove", die),  # the manifest is there, the name is not
    "full disk": lambda: limit_files(1000),
    "space again": lambda: limit_files(None),
}


@ep.register("step", "faulty")
class FaultyStep(ep.EagerStep):
    """The eager step, and before it whatever EP_FAULTS has for it."""

    def __call__(self) -> ep.Tensor:
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        here = [self.run.mesh.batch.rank, self.run.step, attempt]
        for what, *where in json.loads(os.environ.get("EP_FAULTS", "[]")):
            if where == here:
                FAULTS[what]()
        return super().__call__()
