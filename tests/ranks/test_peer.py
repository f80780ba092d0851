"""Chapter 11 on several ranks: the twins of `peer` from tests/ranks/peer_trials.py, and its kernels on real processes.

Outputs and gradients of the twins against the dense reference are in tests/ranks/test_parity.py: peer registers itself.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from peer_trials import AGAIN, BROKEN
from support import ROOT, copy_of_the_code, outcome, play, torchrun

from ep_launcher import launcher as ep

TRITON = ROOT / "build" / "triton"  # `make test-kernels` puts it there


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    for number, change in enumerate(BROKEN.values()):
        copy_of_the_code(build / "broken_peer" / str(number), *change)
    for number, change in enumerate(AGAIN.values()):
        copy_of_the_code(build / "broken_again" / str(number), *change)
    return play(build / "peer", "peer_trials", 4)


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=list(BROKEN))
def test_parity_refuses(played, number):
    for code, printed in outcome(played, f"broken_copy_{number}", 2):
        assert code == 1, printed


def test_memory_that_cannot_be_mapped_leaves_no_file(monkeypatch, tmp_path):
    """Rank 0 of two, whose partner is not needed: it fails before it waits for it."""
    made = []
    monkeypatch.setattr(os.path, "isdir", lambda path: False)  # no /dev/shm
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ep.dist, "broadcast_object_list", lambda path, *_: made.extend(map(Path, path)))
    comm = SimpleNamespace(rank=0, size=2, ranks=[0, 1], group=None)
    with pytest.raises(RuntimeError):
        ep.share_memory(comm, -1, torch.device("cpu"))
    assert [path.parent for path in made] == [tmp_path] and not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("world_size", [2, 4])
def test_small_sums(played, world_size):
    assert outcome(played, "small_sums", world_size) == ["twin"] * world_size


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


@pytest.mark.skipif(not (TRITON / "triton").is_dir(), reason="wants build/triton: make test-kernels")
def test_kernel_of_small_sums_on_real_ranks(build, monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(TRITON))
    played = play(build / "peer_sums", "peer_trials", 2, "small_sums")
    assert outcome(played, "small_sums", 2) == ["kernel"] * 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_without_room_is_taken_again(played, world_size):
    for roomy, tight in outcome(played, "crowded", world_size):
        assert tight["task_loss"] == roomy["task_loss"]
        assert 0 < (times := tight["steps_taken_again"]) <= 12
        sent = tight["bytes_sent_per_step"]
        assert sent == roomy["bytes_sent_per_step"] and sent["predicted"] == sent["counted"] > 0
        said = [line for line in tight["log"] if "--arrival-factor" in line]
        assert said[0].endswith("it is taken again, with room for all"), said
        assert said[1:] == [f"steps taken again: {times}; more came than --arrival-factor 1.02 has room for"]
        assert not any("--arrival-factor" in line for line in roomy["log"])


@pytest.mark.parametrize("number", range(len(AGAIN)), ids=list(AGAIN))
def test_losses_show(played, number):
    assert outcome(played, f"broken_again_{number}", 2) == ["others", "others"]


def test_too_little_room_in_the_library_is_an_error(played):
    first, second = outcome(played, "library", 2)
    assert second == ["nothing", "nothing"]
    for line in first:
        assert line.startswith("rank 0: 24 choices more came than arrival_factor has room for"), line


def test_a_factor_that_does_nothing_is_refused():
    for flags in ("--arrival-factor 1.5", "--arrival-factor 0 --dispatcher peer"):
        with pytest.raises(ValueError, match="arrival_factor"):
            ep.parse_flags(flags.split())


def says(code: str, timeout: float = 50) -> tuple[int, str]:
    """(exit code, standard error) of a small program."""
    code = "import time, torch\nfrom ep_launcher import launcher as ep\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stderr


def test_a_kernel_that_has_given_up_ends_a_process_that_waits():
    """In a recorded step the host waits for the graph, and nobody else looks."""
    code = (
        "memory = ep.PeerMemory(0, [torch.zeros(4096, dtype=torch.uint8)] * 2, limit_s=7)\n"
        "memory.missing[1] = 1\n"
        "ep.watch_over(ep.weakref.WeakMethod(memory.check), None, 0)\n"
    )
    said = "error: rank 0 gave up on rank 1, which did not write to it within about 7 s\n"
    assert says(code) == (1, said)


@pytest.mark.parametrize("size", [1, 2])
def test_a_recorded_step_of_several_ranks_is_watched(size):
    """Its recording ends with the count. One rank waits for nobody."""
    step = object.__new__(ep.GraphStep)
    step.at_end = []
    mesh = SimpleNamespace(batch=SimpleNamespace(size=size))
    options = SimpleNamespace(timeout_s=1e9)  # what is watched here never begins, and would end these tests
    run = SimpleNamespace(mesh=mesh, options=options, fail=None, device="cpu")
    training = SimpleNamespace(advance=step, run=run)
    ep.ArrivalOptions().begin(training)
    for record in step.at_end:
        record()
    assert (training.advance is step, len(step.at_end)) == (size == 1, size - 1)
    assert size == 1 or int(training.advance.ended) == 1


def test_a_replay_that_does_not_end_ends_the_process():
    """One that ends in time does not, however long the next one takes to begin."""
    ends = "replays = ep.Replays(lambda: None, 1)\nfor _ in range(3):\n    replays()\n    time.sleep(0.6)\n"
    ends += "    replays.record_end()\n"
    assert says(ends + "time.sleep(2)\n") == (0, "")
    said = "error: replay 4 of the recorded step has not ended in 1 s\n"
    assert says(ends + "replays()\ntime.sleep(60)\n") == (1, said)


STOPPED = """
import os, signal, time
from ep_launcher.launcher import REGISTRIES, Replays, register

@register("step", "waits")
class Waits(REGISTRIES["step"]["eager"]):
    def __call__(self):
        if self.run.step == 5:
            if self.run.mesh.batch.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            replays = Replays(lambda: None, self.run.options.timeout_s, self.run.fail)
            replays()
            time.sleep(600)  # as a host does that waits for a graph
        return super().__call__()
"""


def test_a_stopped_rank_of_a_recorded_run_is_named(tmp_path):
    """Here without a GPU: a step that waits as for a graph. torchrun waits 30 s for a rank that is stopped."""
    (tmp_path / "waits.py").write_text(STOPPED)
    flags = f"--plugin {tmp_path / 'waits.py'} --step waits --timeout-s 4 --device cpu --log-dir {tmp_path / 'run'}"
    program = "torch.distributed.run --standalone --nproc_per_node=2 ep_launcher/launcher.py"
    command = [sys.executable, "-m", *program.split(), *flags.split()]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        ranks = []
        for line in run.stderr:
            if line.startswith("error:"):
                ranks = psutil.Process(run.pid).children(recursive=True)
                break
        for rank in ranks:
            rank.kill()
        run.stderr.read()
    assert run.returncode == 1
    assert re.search(
        r"error: rank 1 stands still, last heard of at step [0-5]: stopped, gone, or .*; replay 1 of the",
        line,
    ), line


LEAVES = """
import weakref
import torch.distributed as dist
from ep_launcher.launcher import REGISTRIES, register

made, destroy = [], dist.destroy_process_group

@register("step", "recorded")
class Recorded(REGISTRIES["step"]["graph"]):
    preference = classmethod(lambda *_: 1)

    def __init__(self, *given):
        self.eager, self.at_end = REGISTRIES["step"]["eager"](*given), []
        made.append(weakref.ref(self))

    def __call__(self):
        return self.eager()

def destroy_process_group():
    print("a recorded step is left:", made[0]() is not None)
    destroy()

dist.destroy_process_group = destroy_process_group
"""


def test_a_recorded_step_goes_before_its_group(tmp_path):
    """NCCL waits for graphs that hold its collectives, for ever. Here without a GPU, nor a graph in the step."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    flags = f"--plugin {tmp_path / 'leaves.py'} --step recorded --steps 3 --device cpu --log-dir {tmp_path / 'run'}"
    done = torchrun(2, "ep_launcher/launcher.py", *flags.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("a recorded step is left: False") == 2, done.stdout
