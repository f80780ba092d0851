"""Everything that went wrong once, and much that might: about an hour of trials, which `make test` runs in short.

    python tests/trouble.py                      all of them, in the order below; exit code 1 where one went wrong
    python tests/trouble.py --only ctrl_c disk   these
    python tests/trouble.py --times 0.1          a tenth of the repetitions

A trial is a function with the situation in its docstring and the right behaviour after "Right:". It yields a line for
everything that was not right. Whatever the situation, three things are wrong: a process that is left, a Python
traceback of ours, and more than 15 lines.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import ROOT, processes  # noqa: E402

from tools.launch import LaunchError, launch  # noqa: E402

SMALL = "--hidden-dim 16 --ffn-dim 16 --device cpu --log-interval 10".split()
KEYWORDS = {"hidden_dim": 16, "ffn_dim": 16, "device": "cpu", "quiet": True}
LAUNCHER = "ep_launcher/launcher.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TRIALS: dict[str, Callable[[Path, float], Iterator[str]]] = {}


def trial(function: Callable[[Path, float], Iterator[str]]) -> Callable:
    """Decorator: function(an empty folder, how often as usual) is a trial."""
    TRIALS[function.__name__] = function
    return function


def start(folder: Path, *command: str, **environment: str) -> subprocess.Popen:
    """Python with a command, in a session of its own; its temporary files, and so its children's names, in folder."""
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": str(folder)} | environment,
    )  # fmt: skip


def finish(process: subprocess.Popen, limit_s: float = 120) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, of stderr); a hang is ended, and its code is 124."""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return 124, [], process.communicate()[1].splitlines()
    return process.returncode, out.splitlines(), err.splitlines()


def wrong_always(folder: Path, lines: Sequence[str], most: int = 15) -> Iterator[str]:
    """What is wrong in any trial. Ends what is left."""
    deadline = time.monotonic() + 5
    while (left := processes(str(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        with contextlib.suppress(Exception):
            yield f"left: {' '.join(process.cmdline())[:150]}"
            process.kill()
    if len(lines) > most:
        yield f"{len(lines)} lines: {lines[0][:150]} ..."
    if any("Traceback" in line for line in lines):
        yield f"a traceback: {lines[-1][:200]}"


# ------------------------------------------------------------------------------------------- in one process


@trial
def fuzz(folder: Path, times: float) -> Iterator[str]:
    """6,000 random values of flags, 2,000 notebooks broken at random: the tests of `make test`, from other seeds.

    Right: one line, before anything is allocated or written; what is accepted trains a step, or is Python.
    """
    for seed in range(1, 1 + max(1, round(20 * times))):
        tests = [
            "tests/fast/test_flags.py",
            "tests/fast/test_extract.py",
            "-k",
            "300_flag_values or a_hundred",
        ]
        code, out, _ = finish(start(folder, "-m", "pytest", "-q", *tests, EP_SEED=str(seed)), 600)
        if code:
            yield f"seed {seed}: {out[-2] if len(out) > 1 else out}"


# ------------------------------------------------------------------------------------------- interrupts


def commands(folder: Path) -> dict[str, list[str]]:
    """{what a user may have started: its arguments}, each for a long time."""
    flags = ["--steps", "1000000", *SMALL, "--log-dir", str(folder / "log")]
    return {
        "launch": ["tools/launch.py", "--nproc", "2", *flags],
        "alone": [LAUNCHER, *flags],
        "torchrun": [*TORCHRUN, LAUNCHER, *flags],
        "notebooks": [
            "tools/notebooks.py",
            "notebooks/04_training.ipynb",
            "--output-dir",
            str(folder / "out"),
        ],
    }


@trial
def ctrl_c(folder: Path, times: float) -> Iterator[str]:
    """Ctrl-C at any moment from 0.1 to 8 s, 20 times each: `make train`, the launcher alone, torchrun, notebooks.py.

    Right: within 5 s one line. Torchrun adds a traceback of its own (through torch/), and the ranks nothing.
    """
    draw = random.Random(1)
    for name, number in itertools.product(commands(folder), range(max(1, round(20 * times)))):
        shutil.rmtree(folder / "log", ignore_errors=True)
        moment = draw.uniform(0.1, 8)
        process = start(folder, *commands(folder)[name])
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        code, out, err = finish(process)
        took = time.monotonic() - sent
        said = [line for line in [*out, *err] if re.match(r"interrupted|stopped at step", line)]
        ours = [line for line in err if LAUNCHER in line and " File " in line]
        if name == "torchrun":
            err = ours  # a traceback of a rank
        for what in wrong_always(folder, err, most=1):
            yield f"{name} after {moment:.1f} s: {what}"
        if took > 5 or (name != "torchrun" and (code != 130 or not said)):
            yield f"{name} after {moment:.1f} s, try {number}: exit code {code}, {took:.1f} s, {said} {err[-1:]}"


# ------------------------------------------------------------------------------------------- faults at ranks

FAULT = """
import ctypes, os, signal, sys, time
from ep_launcher.launcher import TokenStream, register

def fault(moment):
    if os.environ.get("RANK") != os.environ["FAULT_RANK"] or moment != os.environ["FAULT_MOMENT"]:
        return
    kind = os.environ["FAULT"]
    if kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
        time.sleep(60)
    elif kind == "raises":
        raise IndexError("no such row")
    elif kind == "exits":
        os._exit(3)
    elif kind == "sleeps":
        time.sleep(600)
    elif kind == "locks":
        ctypes.PyDLL(None).sleep(600)
    elif kind == "nan":
        return float("nan")

fault("modules")

@register("task", "fault")
class Fault(TokenStream):
    num_batches = 0
    def __init__(self, *args):
        fault("joined")
        super().__init__(*args)
    def next(self):
        self.num_batches += 1
        factor = fault({1: "step 0", 20: "step 19", 30: "last"}.get(self.num_batches, "")) or 1
        x, target = super().next()
        return x * factor, target
"""
KINDS = ("SIGKILL", "SIGTERM", "SIGSEGV", "SIGABRT", "SIGSTOP", "raises", "exits", "sleeps", "locks", "nan")
MOMENTS = ("modules", "joined", "step 0", "step 19", "last")


@trial
def faults(folder: Path, times: float) -> Iterator[str]:
    """Each of two ranks dies, stops, hangs or computes NaN: while it reads modules, once joined, at three steps.

    Right: the launch ends, its message names that rank and `LaunchError.rank` is it (NaN: every rank's, and says so).
    """
    plugin = folder / "fault.py"
    plugin.write_text(FAULT)
    cases = list(itertools.product(KINDS, MOMENTS, (0, 1)))
    random.Random(2).shuffle(cases)
    for kind, moment, rank in cases[: max(1, round(len(cases) * times))]:
        if kind == "nan" and "step" not in moment:
            continue
        os.environ |= {"FAULT": kind, "FAULT_MOMENT": moment, "FAULT_RANK": str(rank), "TMPDIR": str(folder)}
        tempfile.tempdir = None
        case, lines = f"{kind} at {moment} on rank {rank}", ["it ran"]
        try:
            launch(
                2,
                steps=30,
                plugin=plugin,
                task="fault",
                timeout_s=6,
                log_dir=folder / "log",
                limit_s=90,
                **KEYWORDS,
            )
        except LaunchError as error:
            lines = error.lines
            if kind != "nan" and error.rank != rank:
                yield f"{case}: rank {error.rank} is blamed: {lines[0]}"
        if ("task loss nan" if kind == "nan" else f"rank {rank}") not in lines[0]:
            yield f"{case}: {lines[0]}"
        for what in wrong_always(folder, lines):
            yield f"{case}: {what}"


# ------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "300k") -> Iterator[Path]:
    """A disk of its own, where one may be made: root on Linux."""
    place = folder / "disk"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@trial
def disk(folder: Path, times: float) -> Iterator[str]:
    """The log's disk fills up in mid-run, or is full from the start; its folder goes, or cannot be written.

    Right: in mid-run one warning that names the disk, exit code 0 and a summary; else one line, before step 0.
    """
    if os.geteuid() or not sys.platform.startswith("linux"):
        yield "not tried: only root may make a disk"
        return
    summary = folder / "summary.json"
    flags = ["--steps", "400", *SMALL, "--log-interval", "1", "--summary", str(summary)]
    starters = {
        "alone": [LAUNCHER],
        "launch": ["tools/launch.py", "--nproc", "2"],
        "torchrun": [*TORCHRUN, LAUNCHER],
    }
    for (name, command), case in itertools.product(starters.items(), ("fills", "full", "goes", "read-only")):
        with small_disk(folder) as place:
            if case == "full":
                with contextlib.suppress(OSError):
                    (place / "all").write_bytes(bytes(2**20))
            if case == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            summary.unlink(missing_ok=True)
            process = start(folder, *command, *flags, "--log-dir", str(place / "log"))
            if case == "goes":
                while process.poll() is None and not (place / "log" / "train.log").exists():
                    time.sleep(0.05)
                shutil.rmtree(place / "log", ignore_errors=True)
            code, out, err = finish(process)
        is_late = case in ("fills", "goes")
        said = [line for line in err if line.startswith("warning: " if is_late else "error: ")]
        if (
            len(said) != 1
            or str(place) not in said[0]
            or is_late != (code == 0)
            or is_late != summary.exists()
        ):
            yield f"{name}, {case}: exit code {code}, {err[-3:]}"
        yield from wrong_always(folder, said, most=1)


# ------------------------------------------------------------------------------------------- starting


@trial
def starting(folder: Path, times: float) -> Iterator[str]:
    """What surrounds a start: PET_ variables, a name that leads nowhere, a taken port, a PYTHONPATH with other modules.

    Right: one host starts as one host, with the book's own modules; what cannot be is one line, within a minute.
    """
    (folder / "other" / "tools").mkdir(parents=True)
    (folder / "other" / "tools" / "__init__.py").write_text("raise RuntimeError('another tools')\n")
    nowhere = "--nnodes 2 --nproc 1 --rdzv-endpoint nowhere.invalid:29400".split()
    taken = socket.create_server(("127.0.0.1", 0))
    cases = [
        (
            {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "nowhere.invalid:1", "PET_MAX_RESTARTS": "3"},
            [],
            0,
            "task loss",
        ),
        ({"PYTHONPATH": str(folder / "other")}, [], 0, "task loss"),
        (
            {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1", "RANK": "7", "WORLD_SIZE": "9"},
            [],
            0,
            "task loss",
        ),
        ({}, ["--master-port", str(taken.getsockname()[1])], 2, "in use"),
        ({}, nowhere, 1, "nowhere.invalid"),
    ]
    for environment, more, right, says in cases:
        flags = ["--steps", "3", *SMALL, "--log-dir", str(folder / "log"), *more]
        begin = time.monotonic()
        code, out, err = finish(start(folder, "tools/launch.py", *flags, **environment), 200)
        took, said = time.monotonic() - begin, "\n".join([*out, *err])
        if code != right or says not in said or took > 60:
            yield f"{environment} {more}: exit code {code} after {took:.0f} s: {err[-2:]}"
        yield from wrong_always(folder, err)
    taken.close()


@trial
def under_load(folder: Path, times: float) -> Iterator[str]:
    """All tests with real ranks, while every core has something else to do.

    Right: they pass. No test, and no message to a user, depends on how fast the machine is.
    """
    busy = [start(folder, "-c", "while True: pass") for _ in range(os.cpu_count() or 1)]
    try:
        code, out, _ = finish(
            start(folder, "-m", "pytest", "-q", "-m", "ranks", *["-k", "signals"] * (times < 1)), 3000
        )
        if code:
            yield from (line for line in out if line.startswith(("FAILED", "ERROR")))
    finally:
        for process in busy:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description="Trials of trouble, about an hour.")
    parser.add_argument(
        "--only", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="NAME", help=", ".join(TRIALS)
    )
    parser.add_argument("--times", type=float, default=1.0, help="more or fewer repetitions (default: 1)")
    options, wrong = parser.parse_args(), 0
    for name in options.only:
        begin, found = time.monotonic(), 0
        with tempfile.TemporaryDirectory(prefix=f"ep-trouble-{name}-", dir="/tmp") as folder:
            for line in TRIALS[name](Path(folder), options.times):
                found += 1
                print(f"  {line}", flush=True)
        print(f"{name}: {found} wrong, {time.monotonic() - begin:.0f} s", flush=True)
        wrong += found
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
