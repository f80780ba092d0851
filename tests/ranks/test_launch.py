"""tools/launch.py: one line for bad input, the culprit first, no process left behind, errors that name their cell."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
from support import ROOT, gone, processes, wait_until

from tools import launch as launching
from tools.launch import LaunchError, flag_arguments, launch, torchrun_flags
from tools.ranks.agent import torchrun_options
from tools.ranks.failures import describe_failure
from tools.ranks.processes import Agent

SMALL = {"hidden_dim": 16, "ffn_dim": 16, "device": "cpu"}
SMALL_FLAGS = ["--hidden-dim", "16", "--ffn-dim", "16", "--device", "cpu"]


# ------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "Agent", lambda *_, **__: pytest.fail("started"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--nproc", "0"], "nproc is 0; take a whole number, 1 or more"),
        (["--max-restarts", "-1"], "max_restarts is -1; take a whole number, 0 or more"),
        (["--nproc", "x"], "invalid int value: 'x'"),
        (["--nnodes", "2"], "--rdzv-endpoint"),
        (["--nnodes", "2", "--rdzv-endpoint", "no.invalid:1"], "no address is known for no.invalid"),
    ],
)
def test_refused_before_anything_starts(flags, says, nothing_starts, capfd):
    assert launching.main(flags) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and says in err


def test_keywords_become_flags(nothing_starts):
    given = {"top_k": 2, "normalize": True, "fuse": False, "log_dir": None, "lr": -0.5}
    assert flag_arguments(given) == ["--top-k", "2", "--normalize", "--no-fuse", "--lr=-0.5"]
    for number in ("two", True):
        with pytest.raises(LaunchError, match=f"nproc is {number!r}; take a whole number, 1 or more"):
            launch(number)


def test_a_stale_launcher_is_refused(nothing_starts, monkeypatch, capfd):
    def is_stale() -> None:
        raise RuntimeError("launcher.py is older than X: save, run `make launcher`")

    monkeypatch.setattr(launching, "assert_fresh", is_stale)
    with pytest.raises(LaunchError, match="run `make launcher`"):
        launch()
    assert launching.main([]) == 2
    assert capfd.readouterr().err == "error: launcher.py is older than X: save, run `make launcher`\n"


def test_one_host_meets_on_the_loopback_and_reads_no_pickles(monkeypatch):
    """--standalone's c10d rendezvous unpickles what lies in its store; PET_NNODES=2 waits for a second host."""
    from torch.distributed.run import config_from_args

    monkeypatch.setenv("PET_NNODES", "2")
    with Agent() as agent:
        assert not [name for name in psutil.Process(agent.process.pid).environ() if name.startswith("PET_")]
    monkeypatch.delenv("PET_NNODES")
    options = torchrun_options([*torchrun_flags(2), "x.py"])
    config = config_from_args(options)[0]
    assert (config.rdzv_backend, config.max_nodes, config.nproc_per_node) == ("static", 1, 2)
    assert config.rdzv_endpoint == f"127.0.0.1:{options.master_port}" and options.master_port != 29500


NO_FLAG = """
from dataclasses import dataclass
from pathlib import Path
from ep_launcher.launcher import Options, option_group

@option_group
@dataclass(frozen=True)
class Mine(Options):
    '''Mine.

    place: where.
    '''
    place: Path = Path("/x")
"""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-experts", "15"], "15 experts cannot be shared evenly by 2 ranks; take a multiple of 2"),
        (["--num-experts", "15", "--max-restarts", "2"], "15 experts cannot be shared evenly by 2 ranks"),
        (["--log-dir", "{file}/below/it"], "cannot write logs to"),
        (["--topk", "2"], "--topk 2; did you mean --top-k?"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--dispatcher", "pigeon"], "invalid choice: 'pigeon'"),
        (["--plugin", "{file}"], "Mine.place: a flag needs a default that is a number, bool, str or None"),
    ],
)
def test_refused_by_the_ranks_in_one_line(flags, says, tmp_path, capfd):
    (tmp_path / "file").write_text(NO_FLAG)
    more = [] if "--log-dir" in flags else ["--log-dir", str(tmp_path / "a" / "run")]
    assert launching.main([flag.format(file=tmp_path / "file") for flag in flags] + more + SMALL_FLAGS) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and says in err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]  # a refusal leaves no log folder
    assert gone(str(tmp_path))


TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "l.py", line 9, in f (notebooks/01_a.ipynb #b:2)',
    "    1/0",
]
LATE = "rank 1 stayed behind at step 2"


@pytest.mark.parametrize(
    ("codes", "errors", "rank", "first"),
    [
        ([1, -9], {0: [f"error: {LATE}"]}, 1, "rank 1 was ended by SIGKILL; the other ranks"),
        ([None, 130], {}, 1, "rank 1 was ended by SIGTERM; the other ranks were stopped"),
        ([-15, None], {}, 0, "rank 0 was ended by SIGTERM; the other ranks were stopped"),
        ([1, None], {0: [f"error: {LATE}"]}, 1, LATE),
        ([None, None, 1], {2: [*TRACEBACK, "error: rank 2: E (x)"]}, 2, "rank 2: E (x)"),
        ([2, None], {0: ["error: no good"]}, 0, "no good"),
        ([], {0: ["error: no good"]}, 0, "no good"),  # which has ended torchrun, too
        ([1, None], {0: ["error: the world stands still"]}, 0, "the world stands still"),  # no rank named
        ([None, None, 7], {2: ["bye"]}, 2, "rank 2 exited with code 7"),
        ([], {}, None, "torchrun failed"),
    ],
)  # fmt: skip
def test_the_culprit_stands_first(codes, errors, rank, first):
    """codes: each rank's exit code, None for those that torchrun had to end."""
    ranks = list(enumerate(codes))
    said = [
        (r, line.removeprefix("error: "))
        for r, lines in errors.items()
        for line in lines
        if "error: " in line
    ]
    found, lines = describe_failure(
        {"ranks": ranks, "error": "no agent"}, *(said or [(None, "")])[:1], errors
    )
    assert found == rank and lines[0].startswith(first)
    assert (len(lines) == 1) == (first == "no good")  # a refusal is one line, all else says what to do
    assert ("  notebooks/01_a.ipynb #b:2, in f: 1/0" in lines) == (rank == 2 and codes[2] == 1)


@pytest.mark.parametrize(
    ("through", "place"),
    [
        (["cell", "plugin"], "mine.py, line 7"),
        (["plugin", "cell"], "mine.py, line 7"),  # whose call it was
        (["cell"], "notebooks/01_a.ipynb #b:2"),
        (["plugin", *["cell"] * 10], "mine.py, line 7"),  # also where its frame is cut off
    ],
)
def test_what_to_mend_is_the_readers_own(through, place):
    frames = {
        "cell": TRACEBACK[1:],
        "plugin": ['  File "mine.py", line 7, in g (mine.py, line 7)', "    h()"],
    }
    lines = [TRACEBACK[0], *(line for kind in through for line in frames[kind])]
    report = {"ranks": [(3, 1)], "error": ""}
    found = describe_failure(report, (3, "rank 3: E (x)"), {3: lines})[1]
    assert found[-1].startswith(f"to do: look at {place} first; mend it") and len(found) <= 10


# ------------------------------------------------------------------------------------------- runs


def test_launch_streams_returns_the_summary_and_keeps_your_files(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are relative to the caller's folder
    (tmp_path / "run" / "ranks").mkdir(parents=True)
    (tmp_path / "run" / "ranks" / "rank0.out").write_text("mine")
    summary = launch(2, steps=21, log_interval=10, log_dir="run", **SMALL)
    out, err = capfd.readouterr()
    first, *lines = out.splitlines()
    flags = "--steps 21 --log-interval 10"
    assert first.startswith(f"torchrun --nproc_per_node=2 ep_launcher/launcher.py {flags} --log-dir")
    took = ", ".join(f"{kind} {name}" for kind, name in summary["took"].items())
    assert lines[0] == f"{took}, world size 2"  # what auto took
    assert [line[:12] for line in lines[1:4]] == ["[step 00000]", "[step 00010]", "[step 00020]"]
    assert "task loss" in lines[4] and "logs in" in lines[5]
    assert (
        err.replace("after 20 s no first step yet: 2 ranks have started\n", "") == ""
    )  # as on a busy machine
    assert summary["world_size"] == 2 and summary["steps"] == 21 and len(summary["task_loss"]) == 3
    assert summary["config"]["summary"] is None
    assert (tmp_path / "run" / "ranks" / "rank0.out").read_text() == "mine"
    assert "[step 00020]" in (tmp_path / "run" / "ranks-2" / "rank0.out").read_text()
    assert gone(str(tmp_path))


def test_a_terminal_shows_a_bar_that_moves_every_step(tmp_path):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    plugin = tmp_path / "slow.py"  # steps that are slower than the bar
    plugin.write_text(
        "import time\nfrom ep_launcher.launcher import *\n@register('task', 'slow')\nclass Slow(TokenStream):\n"
        "    def next(self):\n        time.sleep(0.3)\n        return super().next()\n"
    )
    flags = ["--steps", "12", "--log-interval", "10", "--plugin", str(plugin), "--task", "slow", *SMALL_FLAGS]
    process = subprocess.Popen(
        [sys.executable, "tools/launch.py", "--nproc", "1", "--log-dir", str(tmp_path / "run"), *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True,
    )  # fmt: skip
    os.close(theirs)
    out, shown = process.communicate()[0], b""
    with contextlib.suppress(OSError):  # that is how the other side of a terminal ends
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.returncode == 0 and "task loss" in out
    reached = [int(step) for step in re.findall(r"(\d+)/12 ", shown.decode(errors="replace"))]
    assert reached[-1] == 12 and len(set(reached)) > 6, reached


FAILS_ONCE = """
import os, sys
from ep_launcher.launcher import TokenStream, register

@register("task", "fails once")
class FailsOnce(TokenStream):
    num_batches = 0
    def next(self):
        self.num_batches += 1
        assert "torch._dynamo" not in sys.modules, "a rank has imported torch's compiler"
        if (self.num_batches, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (3, "1", "0"):
            raise RuntimeError("on purpose")
        return super().next()
"""


def test_a_run_starts_again_without_torchs_compiler(tmp_path, capfd):
    (tmp_path / "once.py").write_text(FAILS_ONCE)
    flags = {"plugin": tmp_path / "once.py", "task": "fails once", "steps": 8, "log_dir": tmp_path / "run"}
    assert launch(2, max_restarts=1, **flags, **SMALL)["config"]["steps"] == 8
    out, err = capfd.readouterr()
    assert "restart 1, after this: rank 1: RuntimeError: on purpose" in err and "Traceback" not in err
    assert "RuntimeError: on purpose" in (tmp_path / "run" / "ranks" / "rank1.err").read_text()
    assert "task loss" in (tmp_path / "run" / "ranks" / "rank0-restart1.out").read_text()


def test_an_error_in_a_rank_names_its_cell(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launching, "SILENT_S", 0.0)
    text = (ROOT / "ep_launcher" / "launcher.py").read_text()
    line = "record.end_step(step, training.advance())\n"
    assert text.count(line) == 1
    broken = tmp_path / "broken_launcher.py"
    broken.write_text(text.replace(line, f"mesh.batch.rank == 1 and step == 3 and [][step]; {line}"))
    with pytest.raises(LaunchError) as caught:
        launch(2, script=broken, steps=50, log_dir=str(tmp_path / "run"), **SMALL)
    error = caught.value
    at = r"notebooks/04_training\.ipynb #train:\d+"
    assert re.match(rf"rank 1: IndexError: list index out of range \({at}, in train\)$", error.lines[0])
    assert any(re.search(rf"{at}, in train: .*\[\]\[step\]", line) for line in error.lines[1:])
    assert error.lines[-1] == f"whole output: {tmp_path / 'run' / 'ranks'}" and len(error.lines) <= 15
    assert re.match(rf"to do: look at {at} first; mend it \(a cell: save, `make launcher`\)", error.lines[-2])
    assert error.rank == 1 and "Traceback" in (tmp_path / "run" / "ranks" / "rank1.err").read_text()
    assert re.fullmatch(r"after 0 s no first step yet: \d ranks have started\n", capfd.readouterr().err)
    assert error._render_traceback_()[0] == f"LaunchError: {error.lines[0]}"


# On rank 1, a dispatcher that fails, and a task that does not come back.
MISTAKES = """
from ep_launcher.launcher import REGISTRIES, TokenStream, register
@register("dispatcher", "fails")
class Fails(REGISTRIES["dispatcher"]["all_to_all"]):
    def end_dispatch(self, pending):
        return 1 / (1 - self.comm.rank) and super().end_dispatch(pending)
@register("task", "stuck")
class Stuck(TokenStream):
    num_batches = 0
    def next(self):
        self.num_batches += 1
        while self.num_batches == 4 and self.batch.rank == 1: pass
        return super().next()
"""


def test_a_plugins_mistake_is_shown_where_it_is(tmp_path, capfd):
    (plugin := tmp_path / "mine.py").write_text(MISTAKES)
    flags = {"plugin": plugin, "steps": 50, "timeout_s": 4, **SMALL}
    with pytest.raises(LaunchError) as caught:
        launch(2, dispatcher="fails", log_dir=tmp_path / "fails", **flags)
    lines = caught.value.lines
    assert (
        lines[0] == f"rank 1: ZeroDivisionError: division by zero ({plugin}, line 6, in Fails.end_dispatch)"
    )
    assert lines[-3].startswith(f"  {plugin}, line 6, in end_dispatch: return 1 / ")
    assert lines[-2].startswith(f"to do: look at {plugin}, line 6 first; mend it")
    with pytest.raises(LaunchError) as caught:
        launch(2, task="stuck", log_dir=tmp_path / "stuck", **flags)
    lines = caught.value.lines
    assert caught.value.rank == 1 and lines[0].startswith("rank 1 stayed behind at step 3")
    assert lines[1:3] == ["rank 1 was here, the innermost line first:", f"  {plugin}, line 12, in next"]
    assert re.fullmatch(r"  notebooks/04_training.ipynb #eager-step:\d+, in __call__", lines[3])
    assert "rank1.err has its whole stack" in lines[-2]
    assert "most recent call first" in (tmp_path / "stuck" / "ranks" / "rank1.err").read_text()
    assert "most recent call first" not in capfd.readouterr().err


@pytest.mark.parametrize("leave", ["import os; os._exit(0)", "raise SystemExit(0)"])
def test_ranks_that_leave_early_have_not_trained(tmp_path, leave):
    (plugin := tmp_path / "mine.py").write_text(leave)
    with pytest.raises(LaunchError, match=r"exit code 0 before the end of the run"):
        launch(2, plugin=plugin, log_dir=tmp_path / "run", quiet=True, **SMALL)
    (old := tmp_path / "old.json").write_text('{"steps": 1}')
    with pytest.raises(LaunchError, match=r"exit code 0 before the end of the run"):
        launch(2, plugin=plugin, log_dir=tmp_path / "run", summary=old, quiet=True, **SMALL)


# A rank that keeps Python's lock for ever, as native code may; it sleeps in C, through a library that does not let go.
LOCKED = """
import ctypes
from ep_launcher.launcher import TokenStream, register
@register("task", "locked")
class Locked(TokenStream):
    num_batches = 0
    def next(self):
        self.num_batches += 1
        if self.num_batches == 16 and self.batch.rank == 1:
            ctypes.PyDLL(None).sleep(600)
        return super().next()
"""


class Shell:
    """A run of tools/launch.py, as `make train` starts it."""

    def __init__(self, log_dir: Path, *flags: str) -> None:
        self.log_dir = log_dir
        scratch = log_dir.with_name(
            f"{log_dir.name}-tmp"
        )  # so that torchrun's command line holds the folder's name
        scratch.mkdir()
        command = [sys.executable, "tools/launch.py", "--nproc", "2", "--steps", "1000000", *SMALL_FLAGS]
        self.process = subprocess.Popen(
            [*command, "--log-interval", "10", "--log-dir", str(log_dir), *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"TMPDIR": str(scratch)},
        )  # fmt: skip

    def wait_for_steps(self) -> None:
        log = self.log_dir / "train.log"
        wait_until(lambda: log.exists() and "[step 00010]" in log.read_text())

    def rank(self, number: int) -> psutil.Process:
        return next(p for p in processes(str(self.log_dir)) if p.name() == f"rank {number}")

    def finish(self) -> tuple[int, str, list[str]]:
        """(exit code, output, lines of the message), once no process is left."""
        out, err = self.process.communicate(timeout=120)
        assert gone(str(self.log_dir)) and "Traceback" not in err
        lines = [line for line in err.splitlines() if "no first step yet" not in line]
        assert len(lines) <= 15
        return self.process.returncode, out, lines


def test_signals(tmp_path):
    """Runs beside one another: SIGINT at the start and later, SIGKILL of a rank, SIGSTOP of one, one that keeps the
    interpreter's lock, a log folder that goes, and then SIGKILL of launch.py."""
    names = ("interrupted", "rank_killed", "launch_killed", "rank_stopped", "rank_locked")
    plugin, short = tmp_path / "locked.py", ["--timeout-s", "8"]
    plugin.write_text(LOCKED)
    flags = {"rank_stopped": short, "rank_locked": [*short, "--plugin", str(plugin), "--task", "locked"]}
    runs = {name: Shell(tmp_path / name, *flags.get(name, [])) for name in names}
    starting = Shell(tmp_path / "starting")
    try:
        wait_until(lambda: any(p.name().startswith("rank ") for p in processes(str(starting.log_dir))))
        starting.process.send_signal(signal.SIGINT)
        code, _, lines = starting.finish()
        assert code == 130 and len(lines) == 1 and lines[0].startswith("interrupted: every rank has ended")
        for run in runs.values():
            run.wait_for_steps()
        runs["rank_stopped"].rank(1).suspend()
        runs["rank_killed"].rank(1).kill()
        runs["interrupted"].process.send_signal(signal.SIGINT)
        killed, said = runs["launch_killed"], ""
        shutil.rmtree(killed.log_dir)
        while "warning: " not in said:  # it trains on, and its output still comes
            said = killed.process.stderr.readline()
        assert f"cannot write to {killed.log_dir}, on the disk of" in said and "No such file" in said
        steps = [killed.process.stdout.readline() for _ in range(200)]
        assert "[step " in steps[-1]
        killed.process.kill()
        wait_until(lambda: not processes(str(runs["launch_killed"].log_dir)))

        code, out, lines = runs["interrupted"].finish()
        assert code == 130 and "stopped at step" in out
        assert lines == [f"interrupted: every rank has ended; logs in {tmp_path / 'interrupted' / 'ranks'}"]
        assert "[step 00010]" in (tmp_path / "interrupted/ranks/rank0.out").read_text()

        code, _, lines = runs["rank_killed"].finish()
        assert code == 1 and lines[-1] == f"whole output: {tmp_path / 'rank_killed' / 'ranks'}"
        assert lines[0].startswith("error: rank 1 was ended by SIGKILL; the other ranks were stopped")

        code, _, lines = runs["rank_stopped"].finish()
        assert code == 1 and re.match(r"error: rank 1 stands still, last heard of at step [1-9]\d+", lines[0])
        cell = r"rank 0, collective \d+: .+ \(notebooks/\d\d_\w+\.ipynb #[a-z-]+:\d+\)"
        assert re.search(cell, lines[0]), "the collective that failed does not name its cell"

        code, _, lines = runs["rank_locked"].finish()
        assert code == 1 and lines[0].startswith(
            "error: rank 1 stands still, last heard of at step 15: stopped, gone, or"
        )
    finally:
        for run in (starting, *runs.values()):
            run.process.kill()
        for process in processes(str(tmp_path)):
            process.kill()


def test_no_rank_outlives_a_killed_torchrun(tmp_path):
    (plugin := tmp_path / "locked.py").write_text(LOCKED)
    run = Shell(tmp_path / "killed", "--plugin", str(plugin), "--task", "locked")
    run.wait_for_steps()
    time.sleep(1)  # rank 1 holds the interpreter's lock, and can notice nothing
    torchrun = psutil.Process(run.process.pid).children()[0]
    run.process.kill()
    torchrun.kill()
    wait_until(lambda: not processes(str(run.log_dir)))
    run.process.wait()


@pytest.mark.parametrize("moment", ["modules", "steps"])
def test_ctrl_c_of_the_launcher_itself_is_one_line(moment, tmp_path):
    """Without torchrun: while torch is imported, and later."""
    command = [sys.executable, "-u", "ep_launcher/launcher.py", "--steps", "1000000", "--log-interval", "10"]
    process = subprocess.Popen(
        [*command, *SMALL_FLAGS, "--log-dir", str(tmp_path / "log")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    maps, log = Path(f"/proc/{process.pid}/maps"), tmp_path / "log" / "train.log"
    if moment == "modules":
        wait_until(lambda: "torch" in maps.read_text())
    else:
        wait_until(lambda: log.exists() and "[step 00010]" in log.read_text())
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 130
    assert said == ["interrupted"] if moment == "modules" else said[-1].startswith("stopped at step ")
