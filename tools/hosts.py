"""Two hosts on one machine: a run of the launcher over two network namespaces, one rank or more in each.

    python tools/hosts.py [--steps N] [FLAG...]           any flag of launcher.py
    from tools.hosts import run_on_two_hosts              in a notebook; with a slow cable: mbit_per_s=100

A network namespace has its own interfaces, addresses and ports. Two of them, joined by a virtual cable (veth), see
of one another what two machines see: an address at the end of a wire. The rendezvous and every collective have to
go through it, at the speed that the cable is given (`tc`, a token bucket). Needs Linux, root, and the program `ip`;
otherwise HostsUnavailable says, in one line, what is missing.
Addresses are private and exist inside the two namespaces alone; the machine's own network is not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works uninstalled, from any folder

from tools.ranks.failures import LIBRARY_LOG, Interrupted, LaunchError  # noqa: E402
from tools.ranks.flags import LAUNCHER, check_flags, flag_arguments, torchrun_environment, torchrun_flags  # noqa: E402
from tools.ranks.processes import Family, interrupt, start_worker, uninterrupted  # noqa: E402

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29400
INTERFACE = "ep0"  # each end of the cable, inside its namespace
NAME = re.compile(r"^ep-host-(\d+)-[12]$")
OTHER_HOST_S = 6.0  # what one host gets to end by itself, once the other has


class HostsUnavailable(RuntimeError):
    """This machine does not allow two hosts; the message says why, in one line."""


@dataclass(frozen=True)
class TwoHosts:
    """What a run over two hosts gave.

    commands: each host's torchrun line; output: the log lines of rank 0; summary: as `launch` returns it;
    wire_bytes: what each host sent through the cable from start to end, headers and rendezvous included.
    """

    commands: list[str]
    output: list[str]
    summary: dict[str, Any]
    wire_bytes: list[int]


def ip(*arguments: str, program: str = "ip") -> str:
    """Runs `ip` -> its output. HostsUnavailable where it fails: the system forbids what root usually may do."""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        raise HostsUnavailable(
            f"the program `{program}` is not installed (Linux, package iproute2)"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise HostsUnavailable(f"the system refuses `{program} {' '.join(arguments[:2])}`: {said}")
    return done.stdout


def limit_rate(namespace: str, mbit_per_s: float) -> None:
    """What leaves a namespace through its end of the cable is held to this rate from now on: a token bucket (tbf)."""
    bucket = [
        "rate",
        f"{mbit_per_s:g}mbit",
        "burst",
        f"{max(64, int(mbit_per_s) // 4)}kb",
        "latency",
        "400ms",
    ]
    ip("-n", namespace, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *bucket, program="tc")


def list_namespaces() -> list[str]:
    """The named network namespaces of this machine."""
    return [line.split()[0] for line in ip("netns", "list").splitlines() if line.strip()]


def is_left_over(name: str) -> bool:
    """Whether a namespace is one of ours whose process was killed before it could remove it."""
    return bool(match := NAME.match(name)) and not Path(f"/proc/{match[1]}").exists()


def remove_namespaces(names: Sequence[str]) -> None:
    """Removes those of the names that exist. The cable goes with them."""
    with uninterrupted():
        for name in set(names) & set(list_namespaces()):
            ip("netns", "del", name)


@contextlib.contextmanager
def two_namespaces(mbit_per_s: float | None = None) -> Iterator[list[str]]:
    """Two namespaces joined by a cable, removed on every way out -> their names. HostsUnavailable where forbidden.

    mbit_per_s: what the cable carries, each way; None: as much as the machine can.
    """
    names = [f"ep-host-{os.getpid()}-{number}" for number in (1, 2)]
    remove_namespaces([name for name in list_namespaces() if is_left_over(name)])
    try:
        for name in names:
            ip("netns", "add", name)
        first, second = names
        # Both ends inside: the machine never sees the cable.
        ip("-n", first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                ip("-n", name, "link", "set", interface, "up")
            if mbit_per_s is not None:
                limit_rate(name, mbit_per_s)
        yield names
    finally:
        remove_namespaces(names)


def bytes_sent(namespace: str) -> int:
    """What has left a namespace through its end of the cable so far."""
    (link,) = json.loads(ip("-n", namespace, "-s", "-j", "link", "show", INTERFACE))
    return int(link["stats64"]["tx"]["bytes"])


def host_flags(number: int, rdzv_id: str = "book", nproc: int = 1) -> list[str]:
    """torchrun's flags on host 1 or 2: nproc ranks each, meeting at host 1.

    `--local-addr` because both hosts have this machine's name, which says nothing inside a namespace; `is_host`
    because torchrun guesses by that name which host is to open the meeting point.
    """
    flags = torchrun_flags(nproc, 2, None, f"{ADDRESSES[0]}:{PORT}", rdzv_id, f"is_host={int(number == 1)}")
    return [*flags, f"--local-addr={ADDRESSES[number - 1]}"]


def start_host(name: str, number: int, program: list[str], log: Path, nproc: int = 1) -> Family:
    """torchrun inside a namespace. It ends when this process does (tools/ranks/worker.py)."""
    flags = host_flags(number, nproc=nproc)
    environment = torchrun_environment(flags)
    environment |= {"GLOO_SOCKET_IFNAME": INTERFACE, "TP_SOCKET_IFNAME": INTERFACE}
    environment.pop("TB_LOGDIR", None)  # it would win over --log-dir
    command, inside = ("torchrun", log.with_suffix(".json")), ("ip", "netns", "exec", name)
    with open(log, "wb") as file:
        host = start_worker(*command, output=file, environment=environment, before=inside)
    host.tell([*flags, *program], environment)
    return host


def wait_for(hosts: list[Family], limit_s: float, other_s: float = OTHER_HOST_S) -> bool:
    """Waits until both torchruns have ended -> whether they did in time.

    A host whose partner has gone gets other_s: on a dead link torchrun can wait for minutes.
    """
    end = deadline = time.monotonic() + limit_s
    while running := [host for host in hosts if host.process.poll() is None]:
        if time.monotonic() > end:
            return time.monotonic() <= deadline
        if len(running) == 1:
            end = min(end, time.monotonic() + other_s)
        for host in running:
            host.note()
        time.sleep(0.05)
    return True


def describe_hosts(codes: list[int | None], texts: list[str], limit_s: float, in_time: bool) -> LaunchError:
    """What to tell of a run that failed. codes: of the torchruns, None where it had to be ended."""
    for text in texts:
        if said := re.search(r"^(?:\[rank\d+\]: ?)?error: (.+)$", text, re.MULTILINE):
            return LaunchError(said[1])
    lines = [] if in_time else [f"the two hosts did not end within {limit_s:g} s and were stopped"]
    for number, (code, text) in enumerate(zip(codes, texts, strict=True), 1):
        lines.append(
            f"host {number} " + ("had to be stopped" if code is None else f"ended with exit code {code}")
        )
        said = [line for line in text.splitlines() if line.strip() and not LIBRARY_LOG.match(line)]
        lines += [f"  {line}" for line in said[-4:]]
    return LaunchError(*lines)


def run_program(
    program: list[str], *, nproc: int = 1, mbit_per_s: float | None = None, limit_s: float = 60.0
) -> tuple[list[str], list[int]]:
    """Runs a program with its arguments on nproc ranks of each of two hosts -> what each host printed, and sent
    through the cable in bytes. See run_on_two_hosts."""
    with tempfile.TemporaryDirectory(prefix="ep-hosts-") as folder, two_namespaces(mbit_per_s) as names:
        logs = [Path(folder) / f"host{number}.log" for number in (1, 2)]
        hosts: list[Family] = []
        try:
            for number, (name, log) in enumerate(zip(names, logs, strict=True), 1):
                hosts.append(start_host(name, number, program, log, nproc))
            in_time = wait_for(hosts, limit_s)
            codes = [host.process.poll() for host in hosts]
            wire = [bytes_sent(name) for name in names]
        except KeyboardInterrupt:
            raise Interrupted(["both hosts have ended"]) from None
        finally:
            with uninterrupted():
                for host in hosts:  # asked both at once, then each made sure of
                    host.process.terminate()
                for host in hosts:
                    host.end()
        texts = [log.read_text("utf-8", errors="replace") for log in logs]
        if any(codes) or None in codes:
            raise describe_hosts(codes, texts, limit_s, in_time)
        return texts, wire


def run_on_two_hosts(
    *, limit_s: float = 60.0, nproc: int = 1, mbit_per_s: float | None = None, **flags: Any
) -> TwoHosts:
    """Trains with nproc ranks on each of two hosts, namespaces of this machine, over gloo on the CPU.

    mbit_per_s: what the cable between them carries, each way; None sets no limit. flags: launcher.py's, as for
    `launch`; `device`, `log_dir` and `summary` are chosen here, and logs are not kept. Raises HostsUnavailable where
    the machine does not allow it, LaunchError for flags that the launcher refuses, a run that fails, or one that takes
    longer than limit_s seconds. Whatever happens, an interrupt included, no namespace and no process is left. Costs
    about 5 s more than the steps.
    """
    if taken := {"device", "log_dir", "summary"} & set(flags):
        raise LaunchError(f"{', '.join(sorted(taken))}: two hosts choose that themselves", returncode=2)
    shown = [*flag_arguments(flags), "--device", "cpu"]
    check_flags(shown)
    with tempfile.TemporaryDirectory(prefix="ep-hosts-run-") as folder:
        summary = Path(folder) / "summary.json"
        program = [str(LAUNCHER), *shown, "--log-dir", folder, "--summary", str(summary)]
        texts, wire = run_program(program, nproc=nproc, mbit_per_s=mbit_per_s, limit_s=limit_s)
        lines = [line for text in texts for line in text.splitlines()]
        found = json.loads(summary.read_text("utf-8"))
        commands = [
            ["torchrun", *host_flags(n, nproc=nproc), "ep_launcher/launcher.py", *shown] for n in (1, 2)
        ]
        found["config"] |= {"log_dir": None, "summary": None}  # both are gone
        lines = [line for line in lines if line.startswith(("[step ", "task loss "))]
        return TwoHosts([shlex.join(command) for command in commands], lines, found, wire)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> exit code: 0, 1 for a failed run, 2 for a refusal, 3 where two hosts cannot be, 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, interrupt)
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    try:
        values, defaults = check_flags(arguments), check_flags([])
        named = {name: value for name, value in values.items() if value != defaults[name]}
        two = run_on_two_hosts(**named)
    except HostsUnavailable as reason:
        print(f"no two hosts here: {reason}", file=sys.stderr)
        return 3
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.returncode
    except KeyboardInterrupt:
        print("interrupted: both hosts have ended", file=sys.stderr)
        return 130
    for number, command in enumerate(two.commands, 1):
        print(f"host {number}, {ADDRESSES[number - 1]}: {command}")
    print(*two.output, sep="\n")
    for number, count in enumerate(two.wire_bytes, 1):
        print(f"host {number} sent {count} bytes through the cable")
    return 0


if __name__ == "__main__":
    sys.exit(main())
