"""Two hosts on one machine: a run of the launcher over two network namespaces, one rank or more in each.

    from tools.hosts import run_on_two_hosts              run_program: of any program, and with a slow cable

A network namespace has its own interfaces, addresses and ports. Two of them, joined by a virtual cable (veth), see
of one another what two machines see: an address at the end of a wire. The rendezvous and every collective have to
go through it, at the speed that the cable is given (`tc`, a token bucket). Needs Linux, root, and the programs
`unshare`, `nsenter` and `ip`; otherwise HostsUnavailable says, in one line, what is missing.
Addresses are private and exist inside the two namespaces alone; the machine's own network is not touched.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.launch import LAUNCHER, flag_arguments, torchrun_flags
from tools.ranks.failures import Interrupted, LaunchError, how_ended, last_lines
from tools.ranks.processes import Agent

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29400
INTERFACE = "ep0"  # each end of the cable, inside its namespace


class HostsUnavailable(RuntimeError):
    """This machine does not allow two hosts; the message says why, in one line."""


@dataclass(frozen=True)
class TwoHosts:
    """What a run over two hosts gave.

    commands: each host's torchrun line; summary: as `launch` returns it; wire_bytes: what each host sent through the
    cable from start to end, headers and rendezvous included.
    """

    commands: list[str]
    summary: dict[str, Any]
    wire_bytes: list[int]


def hold_namespace() -> subprocess.Popen:
    """A process in a new namespace, which lives as long as it, and it as long as this one. HostsUnavailable where
    that is forbidden."""
    # It reads from this process, and so ends with it. The last word is its name in a list of processes.
    command = ["unshare", "--net", "sh", "-c", "echo here; read -r end", "ep-hosts-namespace"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    try:
        holder = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
    except FileNotFoundError:
        raise HostsUnavailable("the program `unshare` is not installed (Linux, package util-linux)") from None
    if not holder.stdout.readline():
        said = " ".join(holder.communicate()[1].split())
        raise HostsUnavailable(f"the system refuses `unshare --net`: {said}")
    return holder


def inside(namespace: int) -> tuple[str, ...]:
    """What stands before a command that is to run in the namespace of the process of this number."""
    return "nsenter", f"--net=/proc/{namespace}/ns/net"


def run_inside(namespace: int, *command: str) -> str:
    """Runs `ip` or `tc` in a namespace -> its output. HostsUnavailable where it fails."""
    done = subprocess.run([*inside(namespace), *command], capture_output=True, text=True, timeout=20)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise HostsUnavailable(f"the system refuses `{' '.join(command[:3])}` (package iproute2): {said}")
    return done.stdout


@contextlib.contextmanager
def two_namespaces(mbit_per_s: float | None = None) -> Iterator[list[int]]:
    """Two namespaces joined by a cable -> the processes that hold them. HostsUnavailable where forbidden.

    mbit_per_s: what the cable carries, each way, by a token bucket (tbf); None: as much as the machine can.
    """
    with contextlib.ExitStack() as holders:
        held = [holders.enter_context(hold_namespace()).pid for _ in ADDRESSES]
        # Both ends inside: the machine never sees the cable.
        cable = ["type", "veth", "peer", "name", INTERFACE, "netns", str(held[1])]
        run_inside(held[0], "ip", "link", "add", INTERFACE, *cable)
        for namespace, address in zip(held, ADDRESSES, strict=True):
            run_inside(namespace, "ip", "addr", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                run_inside(namespace, "ip", "link", "set", interface, "up")
            if mbit_per_s is not None:
                burst = f"{max(64, int(mbit_per_s) // 4)}kb"
                bucket = ["tbf", "rate", f"{mbit_per_s:g}mbit", "burst", burst, "latency", "400ms"]
                run_inside(namespace, "tc", "qdisc", "add", "dev", INTERFACE, "root", *bucket)
        yield held


def bytes_sent(namespace: int) -> int:
    """What has left a namespace through its end of the cable so far."""
    (counts,) = re.findall(rf"{INTERFACE}:(.+)", Path(f"/proc/{namespace}/net/dev").read_text())
    return int(counts.split()[8])


def host_flags(number: int, nproc: int = 1) -> list[str]:
    """torchrun's flags on host 1 or 2: nproc ranks each, meeting at host 1.

    `--local-addr` because both hosts have this machine's name, which says nothing inside a namespace; `is_host`
    because torchrun guesses by that name which host is to open the meeting point.
    """
    flags = torchrun_flags(nproc, nnodes=2, rdzv_endpoint=f"{ADDRESSES[0]}:{PORT}")
    return [*flags, f"--rdzv-conf=is_host={int(number == 1)}", f"--local-addr={ADDRESSES[number - 1]}"]


def start_host(namespace: int, number: int, program: list[str], log: Path, nproc: int = 1) -> Agent:
    """torchrun inside a namespace. It ends when this process does (tools/ranks/agent.py)."""
    words = [log.with_suffix(".json"), *host_flags(number, nproc), *program]
    environment = {"GLOO_SOCKET_IFNAME": INTERFACE, "TP_SOCKET_IFNAME": INTERFACE}
    with open(log, "wb") as file:
        return Agent(*words, stdout=file, environment=environment, before=inside(namespace))


def wait_for(hosts: list[Agent], limit_s: float) -> None:
    """Waits until both torchruns have ended, or limit_s are over."""
    deadline = time.monotonic() + limit_s
    while any(host.returncode is None for host in hosts) and time.monotonic() < deadline:
        for host in hosts:
            host.note()
        time.sleep(0.05)


def describe_hosts(ended: list[tuple[int | None, str]], limit_s: float) -> LaunchError:
    """What to tell of a run that failed. ended: each torchrun's exit code, None if it had to be ended, and output."""
    for _, text in ended:
        if said := re.search(r"^(?:\[rank\d+\]: ?)?error: (.+)$", text, re.MULTILINE):
            return LaunchError(said[1])
    is_late = any(code is None for code, _ in ended)
    lines = [f"the two hosts did not end within {limit_s:g} s and were stopped"] * is_late
    for number, (code, text) in enumerate(ended, 1):
        how = "had to be stopped" if code is None else how_ended(code)
        lines += [f"host {number} {how}", *last_lines(text.splitlines(), 4)]
    return LaunchError(*lines)


def run_program(
    program: list[str], *, nproc: int = 1, mbit_per_s: float | None = None, limit_s: float = 60.0
) -> tuple[list[str], list[int]]:
    """Runs a program with its arguments on nproc ranks of each of two hosts -> what each host printed, and sent
    through the cable in bytes. mbit_per_s: see two_namespaces. Raises and leaves what run_on_two_hosts does."""
    with contextlib.ExitStack() as at_end:
        folder = at_end.enter_context(tempfile.TemporaryDirectory(prefix="ep-hosts-"))
        held = at_end.enter_context(two_namespaces(mbit_per_s))
        hosts, logs = [], [Path(folder) / f"host{number}.log" for number in (1, 2)]
        try:
            for number, (namespace, log) in enumerate(zip(held, logs, strict=True), 1):
                hosts.append(at_end.enter_context(start_host(namespace, number, program, log, nproc)))
            wait_for(hosts, limit_s)
        except KeyboardInterrupt:
            at_end.close()
            raise Interrupted(["both hosts have ended"]) from None
        codes = [host.returncode for host in hosts]
        texts = [log.read_text("utf-8", "replace") for log in logs]
        if codes != [0, 0]:
            raise describe_hosts([*zip(codes, texts, strict=True)], limit_s)
        return texts, [bytes_sent(namespace) for namespace in held]


def run_on_two_hosts(*, limit_s: float = 60.0, **flags: Any) -> TwoHosts:
    """Trains with a rank on each of two hosts, namespaces of this machine, over gloo on the CPU.

    flags: launcher.py's, as for `launch`; `device`, `log_dir` and `summary` are chosen here, and logs are not kept.
    Raises HostsUnavailable where the machine does not allow it, LaunchError for flags that the launcher refuses, a run
    that fails, or one that takes longer than limit_s seconds. Whatever happens, an interrupt included, no namespace
    and no process is left. Costs about 5 s more than the steps.
    """
    if taken := {"device", "log_dir", "summary"} & set(flags):
        raise LaunchError(f"{', '.join(sorted(taken))}: two hosts choose that themselves")
    shown = [*flag_arguments(flags), "--device", "cpu"]
    with tempfile.TemporaryDirectory(prefix="ep-hosts-run-") as folder:
        summary = Path(folder) / "summary.json"
        program = [str(LAUNCHER), *shown, "--log-dir", folder, "--summary", str(summary)]
        _, wire = run_program(program, limit_s=limit_s)
        found = json.loads(summary.read_text("utf-8"))
    found["config"] |= {"log_dir": None, "summary": None}  # both are gone
    commands = [["torchrun", *host_flags(n), "ep_launcher/launcher.py", *shown] for n in (1, 2)]
    return TwoHosts([shlex.join(command) for command in commands], found, wire)
