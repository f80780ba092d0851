"""Shared by the tests: the repository's root, and ways to run a script, or trials, on real ranks."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]


def torchrun(
    world_size: int, *command: str, timeout: float = 600, **variables: str
) -> subprocess.CompletedProcess:
    """Runs a script on world_size ranks, with these environment variables; what hangs is ended at the time-out, which
    no slow machine comes near."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | variables
    process = subprocess.Popen(
        [*argv, *command], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun ends its ranks, which have sessions of their own
        process.wait(timeout=40)
        pytest.fail(f"{' '.join(command)} on {world_size} ranks did not end in {timeout} s")
    return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)


def play(
    folder: Path, module: str, world_size: int, *names: str, timeout: float = 1200, device: str = "cpu"
) -> Path:
    """Plays a module's trials (tests/ranks) on at most world_size ranks -> the folder of what they found."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "tests/ranks/trials.py", str(world_size), str(folder), module, *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRIALS_DEVICE": device}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder


def outcome(folder: Path, name: str, world_size: int) -> list:
    """What a trial returned, by rank; fails where it did not run to its end."""
    found = []
    for rank in range(world_size):
        path = folder / f"{name}-{world_size}-{rank}.json"
        assert path.exists(), f"{name} did not run on rank {rank} of {world_size}"
        told = json.loads(path.read_text())
        assert not told["error"], f"rank {rank} of {world_size}: {told['error']}"
        found.append(told["result"])
    return found


def copy_of_the_code(folder: Path, right: str, wrong: str) -> Path:
    """A copy of the programs (no notebooks) in folder, whose launcher has `wrong` where ours has `right`."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tools", "measure", "tests/ranks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = (ROOT / "ep_launcher/launcher.py").read_text()
    assert source.count(right) == 1, f"stands {source.count(right)} times in the launcher: {right}"
    (folder / "ep_launcher").mkdir()
    shutil.copy(ROOT / "ep_launcher/__init__.py", folder / "ep_launcher")
    (folder / "ep_launcher/launcher.py").write_text(source.replace(right, wrong))
    return folder


def processes(marker: str) -> list[psutil.Process]:
    """The running processes with this text in their command line, this one left out, and what tests beside these
    have started: pytest-xdist names its workers in the environment."""
    found, own = [], os.environ.get("PYTEST_XDIST_WORKER")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                is_ours = process.environ().get("PYTEST_XDIST_WORKER") == own
                if is_ours and any(marker in part for part in process.cmdline()):
                    found.append(process)
    return found


def gone(marker: str, limit_s: float = 5) -> bool:
    """Whether no such process is left; one that was killed takes a moment to go."""
    deadline = time.monotonic() + limit_s
    while (left := processes(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


def wait_until(condition, timeout: float = 120) -> None:
    """Until it holds: a busy machine may take its time, a hang may not."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
