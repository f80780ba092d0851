"""Shared by the tests: the repository's root, and a way to run a script on real ranks."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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


def copy_of_the_code(folder: Path, right: str, wrong: str) -> Path:
    """A copy of the programs (no notebooks) in folder, whose launcher has `wrong` where ours has `right`."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tools", "measure", "tests/ranks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = (ROOT / "ep_launcher/launcher.py").read_text()
    assert source.count(right) == 1, f"stands {source.count(right)} times in the launcher: {right}"
    (folder / "ep_launcher").mkdir()
    (folder / "ep_launcher/launcher.py").write_text(source.replace(right, wrong))
    return folder
