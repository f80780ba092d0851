"""Everything that went wrong once, and much that might: about an hour of trials, which `make test` runs in short.

    python tests/trouble.py                      all of them, in the order below; exit code 1 where one went wrong
    python tests/trouble.py --only ctrl_c disk   these
    python tests/trouble.py --times 0.1          a tenth of the repetitions

A trial is a function of an empty folder and of how often as usual. Its docstring has the situation and the right
behaviour. It yields a line for everything that is not right; always wrong are a process left, a traceback, 16 lines.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import ROOT, processes  # noqa: E402

from tools.launch import LaunchError, launch  # noqa: E402

SMALL = "--hidden-dim 16 --ffn-dim 16 --device cpu --log-interval 10".split()
KEYWORDS = {"steps": 30, "hidden_dim": 16, "ffn_dim": 16, "device": "cpu", "quiet": True, "limit_s": 90}
LAUNCHER = "ep_launcher/launcher.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


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


def fuzz(folder: Path, times: float) -> Iterator[str]:
    """6,000 random values of flags, 2,000 notebooks broken at random: the tests of `make test`, from other seeds.

    Right: one line, before anything is allocated or written; what is accepted trains a step, or is Python.
    """
    for seed in range(1, 1 + max(1, round(20 * times))):
        tests = "-m pytest -q tests/fast/test_flags.py tests/fast/test_extract.py -k".split()
        code, out, _ = finish(start(folder, *tests, "300_flag or a_hundred", EP_SEED=str(seed)), 600)
        if code:
            yield f"seed {seed}: {out[-1:]}"


def ctrl_c(folder: Path, times: float) -> Iterator[str]:
    """Ctrl-C at any moment from 0.3 to 8 s, 20 times each: `make train`, the launcher alone, torchrun, notebooks.py.

    Before 0.3 s Python itself is starting. Every second run saves at every fifth step; every third Ctrl-C is followed
    by another. Right: within 5 s one line, and a run that has saved goes on with --resume. Torchrun adds a traceback
    of its own (through torch/), and the ranks nothing.
    """
    flags = ["--steps", "1000000", *SMALL, "--log-dir", str(folder / "log")]
    saving = ["--checkpoint-dir", str(folder / "saved"), "--checkpoint-interval", "5"]
    commands = {
        "launch": ["tools/launch.py", "--nproc", "2", *flags],
        "alone": [LAUNCHER, *flags],
        "torchrun": [*TORCHRUN, LAUNCHER, *flags],
        "notebooks": ["tools/notebooks.py", "notebooks/04_training.ipynb"],
    }
    draw = random.Random(1)
    for name, number in itertools.product(commands, range(max(1, round(20 * times)))):
        for place in ("log", "saved"):
            shutil.rmtree(folder / place, ignore_errors=True)
        moment, saves = draw.uniform(0.3, 8), name != "notebooks" and number % 2 == 1
        process = start(folder, *commands[name], *saving * saves)
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        if number % 3 == 2:
            time.sleep(draw.uniform(0, 0.5))
            process.send_signal(signal.SIGINT)
        code, out, err = finish(process)
        took = time.monotonic() - sent
        said = [line for line in [*out, *err] if re.match(r"interrupted|stopped at step", line)]
        if name == "torchrun":
            err = [line for line in err if LAUNCHER in line and " File " in line]  # a rank's traceback
        for what in wrong_always(folder, err, most=1):
            yield f"{name} after {moment:.1f} s: {what}"
        if took > 5 or (name != "torchrun" and (code != 130 or not said)):
            yield f"{name} after {moment:.1f} s, try {number}: exit code {code}, {took:.1f} s, {said} {err[-1:]}"
        if saved := sorted(path.name for path in folder.glob("saved/*")):
            steps = max(
                (int(path.removeprefix("step-")) for path in saved if path.startswith("step-")), default=0
            )
            again = [
                LAUNCHER,
                "--steps",
                str(steps + 3),
                *SMALL,
                *saving,
                "--resume",
                "--log-dir",
                str(folder / "b"),
            ]
            code, out, err = finish(start(folder, *([] if name == "alone" else TORCHRUN), *again))
            if steps and (code or not any(f"resumed at step {steps} " in line for line in out)):
                yield f"{name} after {moment:.1f} s, try {number}: {saved} does not go on: {out[-2:]} {err[-2:]}"
            if left := [path for path in saved if ".part" in path]:
                yield f"{name} after {moment:.1f} s, try {number}: left {left}"


# ------------------------------------------------------------------------------------------- faults at ranks

FAULT = """
import ctypes, os, signal, time
from ep_launcher.launcher import TokenStream, register

def fault(moment):
    kind = os.environ["FAULT"]
    if (os.environ.get("RANK"), moment) != (os.environ["FAULT_RANK"], os.environ["FAULT_MOMENT"]):
        return 1
    if kind.startswith("SIG"):
        return os.kill(os.getpid(), getattr(signal, kind)) or 1
    return {"raises": lambda: [][0], "exits": lambda: os._exit(3), "sleeps": lambda: time.sleep(600),
            "locks": lambda: ctypes.PyDLL(None).sleep(600), "nan": lambda: float("nan")}[kind]()

fault("modules")

@register("task", "fault")
class Fault(TokenStream):
    num_batches = 0
    def __init__(self, *args):
        fault("joined")
        super().__init__(*args)
    def next(self):
        self.num_batches += 1
        x, target = super().next()
        return x * fault(f"step-{self.num_batches}"), target
"""
KINDS = "SIGKILL SIGTERM SIGSEGV SIGABRT SIGSTOP raises exits sleeps locks nan".split()
MOMENTS = "modules joined step-1 step-20 step-30".split()  # 30 is the last


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
            launch(2, task="fault", timeout_s=6, log_dir=folder / "log", **KEYWORDS | {"plugin": plugin})
        except LaunchError as error:
            lines = error.lines
            if kind != "nan" and error.rank != rank:
                yield f"{case}: rank {error.rank} is blamed: {lines[0]}"
        if ("task loss nan" if kind == "nan" else f"rank {rank}") not in lines[0]:
            yield f"{case}: {lines[0]}"
        for what in wrong_always(folder, lines):
            yield f"{case}: {what}"


def read_if_there(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def disk(folder: Path, times: float) -> Iterator[str]:
    """The log's disk fills up in mid-run, or is full from the start; its folder goes, or cannot be written.

    Right: in mid-run one warning that names the disk, exit code 0 and a summary; else one line, before step 0.
    """
    if os.geteuid() or not sys.platform.startswith("linux"):
        yield "not tried: only root may make a disk"
        return
    summary, place = folder / "summary.json", folder / "disk"
    place.mkdir()
    flags = ["--steps", "400", *SMALL, "--log-interval", "1", "--summary", str(summary)]
    starters = {"alone": [LAUNCHER], "launch": ["tools/launch.py"], "torchrun": [*TORCHRUN, LAUNCHER]}
    for (name, command), case in itertools.product(starters.items(), ("fills", "full", "goes", "read-only")):
        size = f"size={4 if case == 'full' else 300}k" + ",ro" * (case == "read-only")
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], check=True)
        if case == "full":
            (place / "all").write_bytes(bytes(4096))
        summary.unlink(missing_ok=True)
        process = start(folder, *command, *flags, "--log-dir", str(place / "log"))
        while (
            case == "goes"
            and process.poll() is None
            and "[step " not in read_if_there(place / "log" / "train.log")
        ):
            time.sleep(0.05)
        if case == "goes":
            shutil.rmtree(place / "log", ignore_errors=True)
        code, out, err = finish(process)
        subprocess.run(["umount", "-l", str(place)], check=True)
        is_late = case in ("fills", "goes")
        said = [line for line in err if line.startswith("warning: " if is_late else "error: ")]
        is_right = len(said) == 1 and str(place) in said[0]
        if not (is_right and is_late == (code == 0) == summary.exists()):
            yield f"{name}, {case}: exit code {code}, {err[-3:]}"
        yield from wrong_always(folder, said, most=1)


def starting(folder: Path, times: float) -> Iterator[str]:
    """What surrounds a start: PET_ variables, a name that leads nowhere, a PYTHONPATH with other modules.

    Right: one host starts as one host, with the book's own modules; what cannot be is one line, within a minute.
    """
    (folder / "other" / "tools").mkdir(parents=True)
    (folder / "other" / "tools" / "__init__.py").write_text("raise RuntimeError('another tools')\n")
    nowhere = "--nnodes 2 --nproc 1 --rdzv-endpoint nowhere.invalid:29400".split()
    pet = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "nowhere.invalid:1", "PET_MAX_RESTARTS": "3"}
    stale = {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1", "RANK": "7", "WORLD_SIZE": "9"}
    cases = [
        (pet, [], 0, "task loss"),
        (stale, [], 0, "task loss"),
        ({"PYTHONPATH": str(folder / "other")}, [], 0, "task loss"),
        ({}, nowhere, 2, "nowhere.invalid"),
    ]
    for environment, more, right, says in cases:
        flags = ["--steps", "3", *SMALL, "--log-dir", str(folder / "log"), *more]
        begin = time.monotonic()
        code, out, err = finish(start(folder, "tools/launch.py", *flags, **environment), 200)
        took, said = time.monotonic() - begin, "\n".join([*out, *err])
        if code != right or says not in said or took > 60:
            yield f"{environment} {more}: exit code {code} after {took:.0f} s: {err[-2:]}"
        yield from wrong_always(folder, err)


TRIALS = {trial.__name__: trial for trial in (fuzz, ctrl_c, faults, disk, starting)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Trials of trouble, about an hour.")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="the trials to make")
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
