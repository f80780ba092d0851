"""Chapter 11 on several ranks: the twins of `peer` from tests/ranks/peer_trials.py, and its kernels on real processes.

Outputs and gradients of the twins against the dense reference are in tests/ranks/test_parity.py: peer registers itself.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from peer_trials import BROKEN
from support import ROOT, copy_of_the_code, outcome, play, torchrun

TRITON = ROOT / "build" / "triton"  # `make test-kernels` puts it there


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    for number, change in enumerate(BROKEN.values()):
        copy_of_the_code(build / "broken_peer" / str(number), *change)
    return play(build / "peer", "peer_trials", 4)


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=list(BROKEN))
def test_parity_refuses(played, number):
    for code, printed in outcome(played, f"broken_copy_{number}", 2):
        assert code == 1, printed


def test_ranks_without_tokens_or_rows_enter_everything(played):
    outcome(played, "nothing", 2)


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_by_hand(played, world_size):
    outcome(played, "by_hand", world_size)


def test_one_slot_is_a_race_and_two_are_none(played):
    _, found = outcome(played, "turns", 2)
    assert found == {"1": [2.0] * 4, "2": [1.0] * 4}


def test_memory_grows_and_leaves_nothing_behind(played):
    outcome(played, "grows", 2)


def test_a_rank_that_never_comes_is_an_error(played):
    said, _ = outcome(played, "never_comes", 2)
    assert said.startswith("rank 0, collective"), said


@pytest.mark.skipif(not (TRITON / "triton").is_dir(), reason="wants build/triton: make test-kernels")
@pytest.mark.parametrize("world_size", [1, 2])
def test_kernels_on_real_ranks(monkeypatch, world_size):
    """Under the interpreter, through a mapped file: values, gradients, bytes, flags."""
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(TRITON))
    flags = "--dispatcher peer --dtypes float32 --cases uneven rank_without_tokens micro_batches".split()
    done = torchrun(world_size, str(Path("tools/parity.py")), *flags)
    assert done.returncode == 0 and "within limits" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_kernel_that_has_given_up_ends_a_process_that_waits():
    """In a recorded step the host waits for the graph, and nobody else looks."""
    code = (
        "import threading, time, torch\n"
        "from ep_launcher import launcher as ep\n"
        "memory = ep.PeerMemory(0, [torch.zeros(4096, dtype=torch.uint8)] * 2, limit_s=7)\n"
        "threading.Thread(target=memory.watch, args=(0,), daemon=True).start()\n"
        "memory.missing[1] = 1\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    said = "error: rank 0 gave up on rank 1, which did not write to it within about 7 s\n"
    assert done.returncode == 1 and done.stderr == said, done.stderr
