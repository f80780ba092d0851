"""From keywords and command lines to torchrun's and the launcher's flags."""

from __future__ import annotations

import os
import socket
from numbers import Integral
from typing import Any

from tools.ranks.failures import LaunchError
from tools.ranks.processes import ROOT

LAUNCHER = ROOT / "ep_launcher" / "launcher.py"


def flag_arguments(flags: dict[str, Any]) -> list[str]:
    """{"top_k": 2, "normalize_topk": True, "log_dir": None} -> ["--top-k", "2", "--normalize-topk"]."""
    arguments = []
    for name, value in flags.items():
        flag, text = name.replace("_", "-"), str(value)
        if value is True or value is False:
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            # A value that starts with a dash would pass for a flag, were it not tied to its own.
            arguments += [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]
    return arguments


def torchrun_flags(
    nproc: int | None, nnodes: int = 1, rdzv_endpoint: str | None = None, max_restarts: int = 0
) -> list[str]:
    """torchrun's own flags; nproc None: auto. LaunchError where they do not fit together."""
    for name, value, least in (("nproc", nproc, 1), ("nnodes", nnodes, 1), ("max_restarts", max_restarts, 0)):
        if value is not None and not (isinstance(value, Integral) and value >= least):
            raise LaunchError(f"{name} is {value!r}; take a whole number, {least} or more", returncode=2)
    flags = [f"--nproc_per_node={nproc or 'auto'}"] + [f"--max-restarts={max_restarts}"] * bool(max_restarts)
    if nnodes == 1:
        return flags
    if not rdzv_endpoint:
        message = f"{nnodes} hosts must find one another; give each the same --rdzv-endpoint HOST:PORT"
        raise LaunchError(message, returncode=2)
    host = rdzv_endpoint.rpartition(":")[0].strip("[]") or rdzv_endpoint
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        message = f"no address is known for {host}; give an --rdzv-endpoint that every host can reach"
        raise LaunchError(message, returncode=2) from None
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={rdzv_endpoint}", "--rdzv-id=ep"]
    return [f"--nnodes={nnodes}", *flags, *meeting]


def torchrun_environment(**more: Any) -> dict[str, str]:
    """The environment for an agent; torchrun's PET_ variables, which change its flags unseen, are left out."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    environment.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
    return environment | {"PYTHONUNBUFFERED": "1"} | {name: str(value) for name, value in more.items()}
