"""Chapter 15's faults, in a short form: each kind once, two ranks, and the end is the undisturbed run's, bit by bit.

measure/faults.py has the long form: also a rank that SIGSTOP holds, for which torchrun waits 30 s; eight random
SIGKILLs over 600 steps; a long run. On a machine with GPUs, `pytest tests/ranks/test_faults.py -k cuda` kills a
recorded run over NCCL.
"""

import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import torchrun

from tools.faults import BrokenRun, attempts, recoveries

FLAGS = {
    "steps": 60, "checkpoint_interval": 10, "log_interval": 1, "hidden_dim": 16, "ffn_dim": 16, "tokens": 32,
    "dtype": "float64", "balance": "bias", "bias_speed": 0.01, "timeout_s": 4,
}  # fmt: skip
PLANS = {  # what is broken: where and when, an attempt each
    "deaths": [("raise", 1, 11, 0), ("exit", 0, 21, 1), ("SIGSEGV", 1, 34, 2), ("SIGTERM", 1, 43, 3)],
    "saves": [("killed while it writes", 1, 15, 0), ("killed before the rename", 0, 25, 1), ("full disk", 1, 33, 2),
              ("space again", 1, 44, 2)],
    "hang": [("hang", 0, 12, 0)],
}  # fmt: skip


def alike(summary: dict) -> dict:
    return {name: value for name, value in summary.items() if name not in ("ms_per_step", "config", "took")}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{plan: (the summary, the run)}, all beside one another: most of the time they wait."""
    folder = tmp_path_factory.mktemp("faults")

    def play(name: str) -> tuple[dict, BrokenRun]:
        with BrokenRun(folder / name, faults=PLANS.get(name, ()), **FLAGS) as run:
            if name == "SIGKILL":
                run.wait_for_step(25)
                run.send(0, signal.SIGKILL)
            return run.finish(), run

    names = ["hang", "calm", "deaths", "saves", "SIGKILL"]
    with ThreadPoolExecutor(3) as pool:
        return dict(zip(names, pool.map(play, names), strict=True))


@pytest.mark.parametrize("name", [*PLANS, "SIGKILL"])
def test_it_comes_back_and_ends_as_if_nothing_had_happened(ended, name):
    summary, run = ended[name]
    assert run.returncode == 0, run.last_lines()
    assert alike(summary) == alike(ended["calm"][0]) and len(summary["task_loss"]) == FLAGS["steps"]
    assert not run.left()
    faults = [fault for fault in PLANS.get(name, ["SIGKILL"]) if fault[0] not in ("full disk", "space again")]
    costs = recoveries(attempts(run.folder / "log"))
    assert len(costs) == len(faults)
    assert max(cost["lost_steps"] for cost in costs) <= FLAGS["checkpoint_interval"]
    if name == "deaths":
        assert costs[-1]["lost_steps"] == 0  # SIGTERM saved first


def run_on_cuda(folder, killed: int | None = None, **flags) -> tuple[dict, BrokenRun]:
    """A recorded run on one GPU, or two over NCCL; one rank gets SIGKILL a third of the way -> what is left of it."""
    nproc = min(2, torch.cuda.device_count())
    own = {"steps": 1500, "checkpoint_interval": 200, "device": "cuda", "step": "graph", "timeout_s": 20}
    own |= {"dispatcher": "gather_tokens"}  # which can be recorded in float64, too
    with BrokenRun(folder, nproc, **FLAGS | own | flags) as run:
        if killed is not None:
            run.wait_for_step(500)
            run.send(min(killed, nproc - 1), signal.SIGKILL)
        return run.finish(), run


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_recorded_run_on_cuda_is_killed_and_ends_the_same(tmp_path):
    """Brought back by torchrun; and by hand, with saves in the background."""
    by_hand = {"max_restarts": 0, "async_checkpoints": True}
    with ThreadPoolExecutor(3) as pool:
        calm = pool.submit(run_on_cuda, tmp_path / "calm")
        restarted = pool.submit(run_on_cuda, tmp_path / "restarted", 1)
        lost, first = pool.submit(run_on_cuda, tmp_path / "killed", 0, **by_hand).result()
        again = {"checkpoint_dir": first.checkpoints, "resume": True}
        resumed, second = run_on_cuda(tmp_path / "again", **by_hand | again)
    assert lost == {} and first.returncode != 0
    assert any(line.startswith("resumed at step ") for line in second.log())
    (cost,) = recoveries(attempts(tmp_path / "restarted" / "log"))
    print("killed on cuda:", cost)
    assert cost["lost_steps"] <= 200
    for summary, run in (calm.result(), restarted.result(), (resumed, second)):
        assert run.returncode == 0 and not run.left(), run.last_lines()
        assert alike(summary) == alike(calm.result()[0]) and len(summary["task_loss"]) == 1500


def test_a_full_disk_is_one_warning(ended):
    warnings = [line for line in ended["saves"][1].log() if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith(
        "warning: step-00000040 was not saved (File too large, "
    )


def test_torchrun_is_asked_to_stop_and_the_run_is_saved(tmp_path):
    """As a scheduler does, which sends SIGTERM to torchrun: all ranks save; `--resume` goes on from there."""
    with BrokenRun(tmp_path / "run", **FLAGS | {"steps": 10**6, "checkpoint_interval": None}) as run:
        run.wait_for_step(20)
        run.process.terminate()
        assert run.finish() == {} and not run.left()
    (saved,) = run.checkpoints.glob("step-*")
    stopped_at = int(saved.name.removeprefix("step-"))
    assert stopped_at >= 20 and any(
        line.startswith(f"stopped at step {stopped_at - 1}") for line in run.log()
    )


def test_a_refusal_is_one_line(tmp_path):
    flags = ["--checkpoint-dir", str(tmp_path), "--resume", "--steps", "2", "--device", "cpu"]
    done = torchrun(2, "ep_launcher/launcher.py", *flags, "--log-dir", str(tmp_path / "log"))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert said == [f"error: nothing to resume in {tmp_path}: there is no checkpoint"]


def test_a_refusal_is_not_tried_again(tmp_path):
    """A restart takes up what it finds, or begins anew: so it must not come after a refusal, which says neither."""
    small = FLAGS | {"steps": 2, "checkpoint_interval": None, "max_restarts": 3}
    with BrokenRun(tmp_path / "nothing", resume=True, **small) as run:
        assert run.finish() == {} and run.returncode != 0 and not run.left()
    said = (run.folder / "output").read_text().splitlines()
    assert [line for line in said if line.startswith("error: ")] == [
        f"error: nothing to resume in {run.checkpoints}: there is no checkpoint"
    ]
    assert not list(run.checkpoints.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True
        ).returncode
    ):
        pytest.skip("no right to mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)])


def test_a_disk_that_is_too_small(tmp_path, small_disk):
    """Not one checkpoint fits; the run ends well, with a warning for each."""
    flags = FLAGS | {"steps": 20, "hidden_dim": 32, "ffn_dim": 64, "max_restarts": 0}
    with BrokenRun(tmp_path / "run", checkpoint_dir=small_disk, **flags) as run:
        assert run.finish() and run.returncode == 0, run.last_lines()
    warnings = [line for line in run.log() if line.startswith("warning")]
    assert len(warnings) == 2 and all("not saved (" in line and " MB free" in line for line in warnings), (
        warnings
    )
    assert not list(small_disk.iterdir())
