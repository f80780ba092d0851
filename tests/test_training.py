"""The launcher as a program: world-size invariance, learning, summary, bytes, TensorBoard, NaN."""

import json
import os

import pytest
import torch
from conftest import ROOT, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LAUNCHER = str(ROOT / "ep_launcher" / "launcher.py")


def run(world_size: int, folder, *flags: str) -> dict:
    """A run of the launcher -> its summary."""
    summary = folder / f"summary-{world_size}.json"
    done = torchrun(world_size, LAUNCHER, "--summary", str(summary), "--log-dir", str(folder / f"runs{world_size}"),
                    *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-1000:]
    return json.loads(summary.read_text()) | {"stdout": done.stdout, "stderr": done.stderr}


@pytest.mark.parametrize("tokens", ["64", "9"], ids=["even", "uneven"])
def test_world_size_does_not_matter(tmp_path, tokens):
    flags = ["--dtype", "float64", "--steps", "200", "--log-interval", "1", "--tokens", tokens,
             "--hidden-dim", "64", "--ffn-dim", "128", "--lr", "3e-3"]  # fmt: skip
    curves = {w: run(w, tmp_path, *flags)["task_loss"] for w in (1, 2, 4)}
    assert len(curves[1]) == 200 and curves[1][-1] < 0.5 * curves[1][0]
    for w in (2, 4):
        worst = max(abs(a - b) / abs(a) for a, b in zip(curves[1], curves[w], strict=True))
        assert worst < 1e-10, f"world size {w} differs by {worst:.1e}"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    """One short run of the seed's model on two ranks, float32."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--steps", "210", "--log-interval", "50", "--num-experts", "8", "--hidden-dim", "64",
             "--ffn-dim", "128", "--lr", "3e-3", "--aux-alpha", "0.02"]  # fmt: skip
    return run(2, folder, *flags) | {"folder": folder}


def test_it_learns_and_says_so(two_ranks):
    first = two_ranks["task_loss"][0]
    assert 0.25 < first < 0.45  # the variance of a linear layer's output is 1/3
    assert two_ranks["final_task_loss"] < 0.35 * first  # private targets would stop at half of it
    assert "[step 00000] task=" in two_ranks["stdout"] and "logs in" in two_ranks["stdout"]
    assert "Warning" not in two_ranks["stderr"], two_ranks["stderr"]


def test_summary_holds_the_contract(two_ranks):
    keys = {"world_size", "steps", "task_loss", "final_task_loss", "aux_loss", "ms_per_step", "bytes_sent_per_step",
            "dropped_fraction", "max_load_over_mean", "config", "device", "torch", "launcher_sha256"}  # fmt: skip
    assert keys <= set(two_ranks)
    assert len(two_ranks["task_loss"]) == 5 and two_ranks["world_size"] == 2
    sent = two_ranks["bytes_sent_per_step"]
    assert sent["predicted"] == sent["counted"] > 0
    assert two_ranks["ms_per_step"] > 0 and two_ranks["dropped_fraction"] == 0
    assert 1 <= two_ranks["max_load_over_mean"] < 8 and 0.9 < two_ranks["aux_loss"] < 8
    assert two_ranks["config"]["aux_alpha"] == 0.02 and two_ranks["config"]["top_k"] == 2
    assert two_ranks["torch"] == torch.__version__


def test_tensorboard_shows_loss_time_and_load(two_ranks):
    events = EventAccumulator(
        str(two_ranks["folder"] / "runs2"), size_guidance={"images": 0, "histograms": 0}
    )
    events.Reload()
    tags = events.Tags()
    assert {"loss/task", "loss/aux", "loss/total", "time/interval_s"} <= set(tags["scalars"])
    assert "load/per_expert" in tags["histograms"] and "load/over_time" in tags["images"]
    points = [(e.step, e.value) for e in events.Scalars("loss/task")]
    assert [step for step, _ in points] == [0, 50, 100, 150, 200]
    assert [value for _, value in points] == pytest.approx(two_ranks["task_loss"])
    task, aux, total = (events.Scalars(f"loss/{name}")[1].value for name in ("task", "aux", "total"))
    assert total == pytest.approx(task + 0.02 * aux)
    assert "[step 00200]" in (two_ranks["folder"] / "runs2" / "train.log").read_text()


def test_a_nan_stops_every_rank_with_one_line(tmp_path):
    done = torchrun(2, LAUNCHER, "--steps", "50", "--lr", "1e30", "--log-dir", str(tmp_path), timeout=60)
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "lower --lr" in lines[0], lines
    assert 'launcher.py", line' not in done.stderr


def test_a_rank_without_tokens_trains_along(tmp_path):
    summary = run(2, tmp_path, "--tokens", "1", "--steps", "5", "--hidden-dim", "32", "--ffn-dim", "32")
    assert summary["task_loss"][0] > 0 and summary["steps"] == 5


POLICIES = r"""
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from ep_launcher import launcher as ep
ep.init_distributed(torch.device("cpu"), 30)
gloo = [t for t in Path("/proc/self/task").iterdir() if "gloo" in (t / "comm").read_text()]
policies = sorted({{os.sched_getscheduler(int(t.name)) for t in gloo}})
sys.stdout.write(f"policies {{policies}} {{os.sched_getscheduler(0)}}\n")  # whole lines: the ranks share this stream
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux has this policy")
def test_the_threads_of_gloo_wait_for_their_turn(tmp_path):
    script = tmp_path / "policies.py"
    script.write_text(POLICIES.format(root=str(ROOT)))
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.count(f"policies [{os.SCHED_BATCH}] {os.SCHED_BATCH}") == 2, done.stdout
