"""Shared by the tests: the repository's root, and a way to run a script on real ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in `make test &`; the tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)


def torchrun(world_size: int, *command: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs a script on world_size CPU ranks; on time-out ends all of them and fails the test."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
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


@pytest.fixture(scope="session")
def build() -> Path:
    """build/, where generated files go."""
    path = ROOT / "build"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session")
def seed_module(build: Path):
    """build/seed.py, freshly extracted: the seed's algorithm with its defects."""
    from tools import bench

    bench.extract_seed()
    return bench.load_seed()
