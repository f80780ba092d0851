"""The launcher as a program: world-size invariance, learning, summary, bytes, TensorBoard, NaN, plugins, refusals."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support import ROOT, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ep_launcher import launcher as ep

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
    last = json.loads((tmp_path / "summary-1.json").read_text())["final_task_loss"]
    assert last == pytest.approx(sum(curves[1][-10:]) / 10, rel=1e-12)  # the mean of the last twentieth
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
from ep_launcher import launcher as ep


def look(run):
    gloo = [t for t in Path("/proc/self/task").iterdir() if "gloo" in (t / "comm").read_text()]
    policies = sorted({{os.sched_getscheduler(int(t.name)) for t in gloo}})
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


# ----------------------------------------------------------------------------------- parts of a run, by themselves


def test_the_teacher_is_the_seeds():
    config = ep.MoEConfig(num_experts=2, hidden_dim=8, ffn_dim=8)
    comm = ep.Communicator()
    first, again, other = (ep.TokenStream(config, seed, 4, comm).teacher for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.05


def test_step_timer_leaves_the_first_tenth_out():
    timer = ep.StepTimer(torch.device("cpu"))
    timer.marks = [0.0]
    for interval_ms in range(20, 0, -1):
        timer.marks.append(timer.marks[-1] + interval_ms / 1e3)
    assert timer.median_ms() == pytest.approx(9.5)  # of 18 to 1; of all twenty it is 10.5
    assert timer.median_ms(skip_fraction=0) == pytest.approx(10.5)


class Half(torch.nn.Module):
    """A task's model: what it makes of x is a half of it."""

    def forward(self, x):
        return x / 2


def test_the_loss_of_a_task_is_a_share_of_the_global_mean():
    config = ep.MoEConfig(num_experts=2, hidden_dim=8, ffn_dim=8, dtype="float64")
    shares = []
    for rank in range(3):
        comm = ep.Communicator.alone()
        comm.rank, comm.size = rank, 3
        task = ep.TokenStream(config, 0, 7, comm)
        shares.append(task.loss(Half(), task.next()))
    task = ep.TokenStream(config, 0, 7, ep.Communicator())
    assert sum(shares).item() == pytest.approx(task.loss(Half(), task.next()).item(), rel=1e-14)


# ----------------------------------------------------------------------------------- refusals and plugins


def alone(*flags: str) -> subprocess.CompletedProcess:
    """The launcher run plainly, at world size 1."""
    small = ["--hidden-dim", "16", "--ffn-dim", "16", "--num-experts", "4"]
    return subprocess.run(
        [sys.executable, LAUNCHER, *small, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("flags, says", [
    (["--experts", "grouped", "--dtype", "float64"],
     "experts grouped cannot run in float64 on 1 cpu rank; take auto (here: blocks)"),
    (["--step", "graph", "--device", "cpu"], "step graph cannot run here (1 cpu rank(s), dispatcher local"),
    (["--topk", "4"], "unrecognized arguments: --topk 4; did you mean --top-k?"),
    (["--plugin", "nowhere.py"], "cannot read the plugin nowhere.py"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_one_line(flags, says, tmp_path):
    done = alone(*flags, "--steps", "3", "--log-dir", str(tmp_path / "logs"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and says in done.stderr and done.stderr.count("\n") == 1
    assert "[step" not in done.stdout


def test_local_at_two_ranks_is_one_line(tmp_path):
    done = torchrun(2, LAUNCHER, "--dispatcher", "local", "--log-dir", str(tmp_path / "logs"), timeout=60)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1
    assert "dispatcher local cannot run in float32 on 2 cpu ranks; take auto (here: all_to_all)" in lines[0]
    assert 'launcher.py", line' not in done.stderr  # no traceback of a rank
    assert not (tmp_path / "logs").exists()


PLUGIN = """
import torch
from ep_launcher.launcher import EPMoE, LoopExperts, Options, TokenStream, dataclass, option_group, register


@register("experts", "mine")
class MyExperts(LoopExperts):
    pass


@option_group
@dataclass(frozen=True)
class MyOptions(Options):
    "scale: of the tokens"

    scale: float = 1.0


@register("task", "scaled")
class Scaled(TokenStream):
    def __init__(self, config, *rest):
        super().__init__(config, *rest)
        self.scale = config.option(MyOptions).scale

    def next(self):
        x, target = super().next()
        return self.scale * x, self.scale * target


@register("model", "two")
def two_layers(config, mesh, seed, device=None):
    return torch.nn.Sequential(*(EPMoE(config, mesh, seed=seed + n, device=device) for n in range(2)))
"""


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_plugin_brings_experts_a_task_a_model_and_flags(world_size, tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    flags = f"--plugin {path} --experts mine --task scaled --model two --scale 1e-3".split()
    summary = run(world_size, tmp_path, *flags, "--steps", "5", "--hidden-dim", "16", "--ffn-dim", "16",
                  "--log-interval", "1")  # fmt: skip
    assert summary["took"]["experts"] == "mine" and summary["config"]["scale"] == 1e-3
    assert 0 < summary["task_loss"][0] < 1
    sent = summary["bytes_sent_per_step"]  # of both layers
    assert sent["predicted"] == sent["counted"] and (sent["counted"] > 0) == (world_size > 1)
