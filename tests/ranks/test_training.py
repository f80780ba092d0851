"""The launcher on several ranks: world-size invariance, learning, summary, bytes, TensorBoard, NaN, a plugin."""

import json
import math
import os

import pytest
import torch
from support import ROOT, outcome, play, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ep_launcher import launcher as ep

LAUNCHER = str(ROOT / "ep_launcher" / "launcher.py")


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found in tests/ranks/training_trials.py."""
    return play(build / "training", "training_trials", 4)


@pytest.mark.parametrize("name", ["even", "uneven_clipped_with_a_bias"])
def test_world_size_does_not_matter(played, name):
    runs = {w: outcome(played, name, w)[0] for w in (1, 2, 4)}
    curves = {w: measured["task_loss"] for w, measured in runs.items()}
    assert len(curves[1]) == 200 and curves[1][-1] < (0.5 if name == "even" else 0.95) * curves[1][0]
    last = runs[1]["final_task_loss"]
    assert last == pytest.approx(sum(curves[1][-10:]) / 10, rel=1e-12)  # the mean of the last twentieth
    for w in (2, 4):
        worst = max(abs(a - b) / abs(a) for a, b in zip(curves[1], curves[w], strict=True))
        assert worst < 1e-10, f"world size {w} differs by {worst:.1e}"


def test_a_rank_without_tokens_trains_along(played):
    for measured in outcome(played, "a_rank_without_tokens", 2):
        assert measured["task_loss"][0] > 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_plugin_brings_experts_a_task_a_model_and_flags(world_size, played):
    measured = outcome(played, "plugin", world_size)[0]
    assert measured["took"]["experts"] == "mine"
    assert 0 < measured["task_loss"][0] < 1e-2  # of tokens a thousandth as large; of whole ones, 1/3
    sent = measured["bytes_sent_per_step"]  # of both layers
    assert sent["predicted"] == sent["counted"] and (sent["counted"] > 0) == (world_size > 1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    """The summary of one short run of the program on two ranks, float32."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--steps", "210", "--log-interval", "50", "--num-experts", "8", "--hidden-dim", "64",
             "--ffn-dim", "128", "--lr", "3e-3", "--aux-alpha", "0.02",
             "--summary", str(folder / "summary.json"), "--log-dir", str(folder / "runs2")]  # fmt: skip
    done = torchrun(2, LAUNCHER, *flags)
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-1000:]
    printed = {"stdout": done.stdout, "stderr": done.stderr, "folder": folder}
    return json.loads((folder / "summary.json").read_text()) | printed


def test_it_learns_and_says_so(two_ranks):
    first = two_ranks["task_loss"][0]
    assert 0.25 < first < 0.45  # the variance of a linear layer's output is 1/3
    assert two_ranks["final_task_loss"] < 0.35 * first  # private targets would stop at half of it
    assert "[step 00000] task=" in two_ranks["stdout"] and "logs in" in two_ranks["stdout"]
    assert "Warning" not in two_ranks["stderr"], two_ranks["stderr"]


def test_summary_holds_the_contract(two_ranks):
    keys = {"world_size", "steps", "task_loss", "final_task_loss", "aux_loss", "ms_per_step", "bytes_sent_per_step",
            "dropped_fraction", "max_load_over_mean", "config", "took", "device", "torch",
            "launcher_sha256"}  # fmt: skip
    assert keys <= set(two_ranks)
    assert len(two_ranks["task_loss"]) == 5 and two_ranks["world_size"] == 2
    sent = two_ranks["bytes_sent_per_step"]
    assert sent["predicted"] == sent["counted"] > 0
    assert two_ranks["ms_per_step"] > 0 and two_ranks["dropped_fraction"] == 0
    assert 1 <= two_ranks["max_load_over_mean"] < 8 and 0.9 < two_ranks["aux_loss"] < 8
    assert two_ranks["config"]["aux_alpha"] == 0.02 and two_ranks["config"]["top_k"] == 2
    assert two_ranks["torch"] == torch.__version__


def test_log_and_summary_say_what_auto_took(two_ranks):
    took = two_ranks["took"]
    assert set(took) == {"dispatcher", "experts", "step"} and "auto" not in took.values()
    assert all(name in ep.REGISTRIES[kind] for kind, name in took.items())
    line = f"dispatcher {took['dispatcher']}, experts {took['experts']}, step {took['step']}, world size 2"
    assert two_ranks["stdout"].count(line) == 1
    assert two_ranks["config"]["experts"] == "auto"


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
    done = torchrun(2, LAUNCHER, "--steps", "50", "--lr", "1e30", "--log-dir", str(tmp_path))
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "lower --lr" in lines[0], lines
    assert 'launcher.py", line' not in done.stderr


POLICIES = r"""
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from ep_launcher import launcher as ep


def name(thread):
    try:
        return (thread / "comm").read_text()
    except OSError:  # it has ended meanwhile
        return ""


def policy(thread):
    try:
        return {{os.sched_getscheduler(int(thread.name))}}
    except ProcessLookupError:  # likewise
        return set()


def look(run):
    run.mesh.batch.all_reduce(torch.zeros(1))  # none leaves while another still connects
    gloo = [t for t in Path("/proc/self/task").iterdir() if "gloo" in name(t)]
    policies = sorted(set().union(*map(policy, gloo)))
    # whole lines: the ranks share this stream
    sys.stdout.write(f"policies {{policies}} {{os.sched_getscheduler(0)}}\n")
    return {{"final_task_loss": 0.0, "ms_per_step": 0.0}}


ep.train = look
sys.exit(ep.main(["--log-dir", {folder!r}, "--device", "cpu"]))
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux has this policy")
def test_the_threads_of_gloo_wait_for_their_turn(tmp_path):
    script = tmp_path / "policies.py"
    script.write_text(POLICIES.format(root=str(ROOT), folder=str(tmp_path / "logs")))
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.count(f"policies [{os.SCHED_BATCH}] {os.SCHED_BATCH}") == 2, done.stdout


def test_local_at_two_ranks_is_one_line(tmp_path):
    done = torchrun(2, LAUNCHER, "--dispatcher", "local", "--log-dir", str(tmp_path / "logs"))
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1
    assert "dispatcher local cannot run in float32 on 2 cpu ranks; take auto (here: all_to_all)" in lines[0]
    assert 'launcher.py", line' not in done.stderr  # no traceback of a rank
    assert not (tmp_path / "logs").exists()


def test_seed_aux_loss_has_the_faults_that_the_book_names(seed_module):
    torch.manual_seed(0)
    small, large = torch.randn(32, 8).softmax(1), torch.randn(3200, 8).softmax(1)
    values = [seed_module.seed_aux_loss(p, p.topk(2).indices).item() for p in (small, large)]
    assert values[1] > values[0] + 0.05  # the same distribution, a larger batch
    assert math.isnan(
        seed_module.seed_aux_loss(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int64)).item()
    )
