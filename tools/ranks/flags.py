"""From keywords and command lines to torchrun's and the launcher's flags, checked before anything starts."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tools.ranks.failures import LaunchError, shown_path
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


def load_launcher(script: Path) -> ModuleType | None:
    """The module of a stitched launcher, to read its flags; None for a script that has none to read."""
    if script == LAUNCHER:
        import ep_launcher.launcher

        return ep_launcher.launcher
    if not re.search(r"^def parse_flags\(", script.read_text("utf-8"), re.MULTILINE):
        return None
    spec = importlib.util.spec_from_file_location("another_launcher", script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def check_flags(arguments: list[str], script: Path = LAUNCHER) -> dict[str, Any]:
    """{flag's field: value} as the launcher itself reads them. LaunchError, one line, where it refuses them."""
    module = load_launcher(script)
    if module is None:
        return {}
    try:
        with contextlib.chdir(ROOT):  # where torchrun starts, and --plugin is looked for
            module.parse_flags(arguments)
        return vars(module.make_parser().parse_args(arguments))
    except ValueError as error:
        raise LaunchError(str(error), returncode=2) from None


def place_paths(arguments: list[str]) -> list[str]:
    """Paths given relative to the current folder, or to ~, as seen from the root, where torchrun starts."""
    placed, is_path = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if is_path and argument:
            argument = shown_path(os.path.expanduser(argument))
        is_flag = flag in ("--log-dir", "--summary", "--plugin", "--checkpoint-dir")
        if is_flag and value:
            argument = f"{flag}={shown_path(os.path.expanduser(value))}"
        placed.append(argument)
        is_path = is_flag and not equals
    return placed


def torchrun_flags(
    nproc: int,
    nnodes: int = 1,
    master_port: int | None = None,
    rdzv_endpoint: str | None = None,
    rdzv_id: str = "ep",
    rdzv_conf: str | None = None,
    max_restarts: int = 0,
) -> list[str]:
    """torchrun's own flags. LaunchError where they do not fit together, or the port is taken."""
    if max_restarts < 0:
        raise LaunchError(f"max_restarts is {max_restarts}; take 0 or more", returncode=2)
    restarts = [f"--max-restarts={max_restarts}"] * bool(max_restarts)
    if nproc < 1 or nnodes < 1:
        raise LaunchError(
            f"{nproc} processes on {nnodes} hosts make no run; take 1 or more of each", returncode=2
        )
    if nnodes == 1:
        port = [] if master_port is None else [f"--master-port={find_port(master_port)}"]
        return [f"--nproc_per_node={nproc}", *port, *restarts]
    if not rdzv_endpoint:
        message = f"{nnodes} hosts must find one another; give each the same --rdzv-endpoint HOST:PORT"
        raise LaunchError(message, returncode=2)
    host = rdzv_endpoint.rpartition(":")[0].strip("[]") or rdzv_endpoint
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        message = f"no address is known for {host}; give an --rdzv-endpoint that every host can reach"
        raise LaunchError(message, returncode=2) from None
    return [
        f"--nnodes={nnodes}", f"--nproc_per_node={nproc}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={rdzv_endpoint}", f"--rdzv-id={rdzv_id}", *[f"--rdzv-conf={rdzv_conf}"] * bool(rdzv_conf),
        *restarts,
    ]  # fmt: skip


def start_environment() -> dict[str, str]:
    """The environment for torchrun's own process; PET_ variables, which change its flags unseen, are left out."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    environment.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
    # Whether there is a GPU is asked without using it: the ranks are forked later.
    return environment | {"PYTHONUNBUFFERED": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def torchrun_environment(flags: list[str]) -> dict[str, str]:
    """The environment for torchrun with these flags.

    On one host the ranks meet on the loopback, in a static rendezvous: it asks no name server, waits for nobody, and
    reads no pickles, as the c10d rendezvous of several hosts (and of --standalone) does.
    """
    environment = start_environment()
    if not any(flag.startswith("--nnodes") for flag in flags):
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if not any(flag.startswith("--master-port") for flag in flags):
            environment["PET_MASTER_PORT"] = str(find_port(0))
    return environment


def find_port(port: int) -> int:
    """The port, or a free one for 0. LaunchError where it cannot be listened on."""
    if not 0 <= port <= 65535:
        raise LaunchError(f"there is no port {port}; take one from 1024 to 65535", returncode=2)
    with socket.socket() as probe:
        # As torchrun does: a port of a run that has just ended is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except PermissionError:
            raise LaunchError(f"port {port} needs root; take one above 1023", returncode=2) from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            message = (
                f"port {port} is in use by another program; name another one, or leave --master-port out"
            )
            raise LaunchError(message, returncode=2) from None
        return probe.getsockname()[1]
