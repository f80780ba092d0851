"""tools/launch.py: one line for bad input, no process left behind, errors that name their cell, %%ranks."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from support import ROOT, torchrun

from tools import launch as launching
from tools.launch import LaunchError, launch
from tools.ranks import ByRank, RanksError

WORKER = str(ROOT / "tools" / "ranks" / "worker.py")  # of this checkout: others may run beside it
SMALL = {"hidden_dim": 16, "ffn_dim": 16, "device": "cpu"}
SMALL_FLAGS = ["--hidden-dim", "16", "--ffn-dim", "16", "--device", "cpu"]


def processes(marker: str) -> list[psutil.Process]:
    """The running processes with this text in their command line, this one left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                if any(marker in part for part in process.cmdline()):
                    found.append(process)
    return found


def wait_until(condition, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def assert_gone(marker: str, within_s: float = 5) -> None:
    deadline = time.monotonic() + within_s
    while (left := processes(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"still running: {[process.cmdline() for process in left]}"


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


# ------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: object, **_: object) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(launching.subprocess, "Popen", start)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--top-k", "20"], "top_k is 20, above the 16 experts; lower --top-k"),
        (["--topk", "2"], "launcher.py has no flag --topk; did you mean --top-k?"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--dispatcher", "pigeon"], "invalid choice: 'pigeon'"),
        (["--plugin", "nowhere.py"], "cannot read the plugin nowhere.py"),
        (["--nproc", "0"], "0 processes"),
        (["--nproc", "x"], "invalid int value: 'x'"),
        (["--nnodes", "2"], "--rdzv-endpoint"),
        (["--master-port", "99999"], "no port 99999"),
    ],
)
def test_refused_before_anything_starts(flags, says, nothing_starts, capfd):
    assert launching.main(flags) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and says in err


def test_a_taken_port(nothing_starts, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert launching.main(["--master-port", str(port)]) == 2
        with pytest.raises(LaunchError, match=f"^port {port} is in use by another program; name another one"):
            launch(master_port=port)
    assert error_lines(capfd.readouterr().err) == [
        f"error: port {port} is in use by another program; name another one, or leave --master-port out"
    ]


def test_keywords_become_flags_and_unknown_ones_are_refused(nothing_starts):
    flags = {"top_k": 2, "normalize": True, "fuse": False, "log_dir": None, "lr": -0.5}
    assert launching.flag_arguments(flags) == ["--top-k", "2", "--normalize", "--no-fuse", "--lr=-0.5"]
    with pytest.raises(LaunchError, match="^launcher.py has no flag --top-q; did you mean --top-k"):
        launch(top_q=3)


def test_a_stale_launcher_is_refused(nothing_starts, monkeypatch, capfd):
    def is_stale() -> None:
        raise RuntimeError("launcher.py is older than X: save, run `make launcher`")

    monkeypatch.setattr(launching, "assert_fresh", is_stale)
    with pytest.raises(LaunchError, match="run `make launcher`"):
        launch()
    assert launching.main([]) == 2
    assert error_lines(capfd.readouterr().err) == [
        "error: launcher.py is older than X: save, run `make launcher`"
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-experts", "15"], "15 experts cannot be shared evenly by 2 ranks; take a multiple of 2"),
        (["--device", "cuda", "--nproc", str(torch.cuda.device_count() + 1)], "want a GPU each"),
        (["--log-dir", "{file}/below"], "cannot write logs to"),
    ],
)
def test_refused_by_the_ranks_in_one_line(flags, says, tmp_path, capfd):
    file = tmp_path / "file"
    file.touch()
    marker = ["--log-dir", str(tmp_path / "run")] if "--log-dir" not in flags else []
    start = time.monotonic()
    assert launching.main([flag.format(file=file) for flag in flags] + marker) != 0
    assert time.monotonic() - start < 30
    out, err = capfd.readouterr()
    assert out.startswith("torchrun --standalone") and out.count("\n") == 1
    assert err.count("\n") == 1 and err.startswith("error: ") and says in err
    assert list(tmp_path.iterdir()) == [file]  # a refusal leaves no log folder
    assert_gone(str(tmp_path), within_s=0)


def test_torchrun_itself_shows_one_error_line(tmp_path):
    result = torchrun(
        2, "ep_launcher/launcher.py", "--tokens", "999", "--log-dir", str(tmp_path / "run"), timeout=30
    )
    assert result.returncode != 0
    lines = error_lines(result.stdout + result.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: 999 tokens over 2 ranks are up to 500 a rank")
    assert_gone(str(tmp_path), within_s=0)


# ------------------------------------------------------------------------------------------- runs


def test_launch_streams_and_returns_the_summary(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are relative to the caller's folder
    summary = launch(2, steps=21, log_interval=10, log_dir="run", **SMALL)
    out, err = capfd.readouterr()
    first, *lines = out.splitlines()
    flags = "--steps 21 --log-interval 10"
    assert first.startswith(
        f"torchrun --standalone --nproc_per_node=2 ep_launcher/launcher.py {flags} --log-dir"
    )
    took = ", ".join(f"{kind} {name}" for kind, name in summary["took"].items())
    assert lines[0] == f"{took}, world size 2"  # what auto took
    assert [line[:12] for line in lines[1:4]] == ["[step 00000]", "[step 00010]", "[step 00020]"]
    assert "task loss" in lines[4] and "logs in" in lines[5]
    assert err == ""  # no bar off a terminal, nothing of torchrun's own
    assert summary["world_size"] == 2 and summary["steps"] == 21 and len(summary["task_loss"]) == 3
    assert summary["config"]["summary"] is None
    assert "[step 00020]" in (tmp_path / "run" / "ranks" / "rank0.out").read_text()
    assert_gone(str(tmp_path), within_s=0)


def test_a_terminal_shows_a_bar_that_reaches_its_end(tmp_path):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    command = [
        sys.executable,
        "tools/launch.py",
        "--nproc",
        "2",
        "--steps",
        "25",
        "--log-interval",
        "10",
        *SMALL_FLAGS,
    ]
    process = subprocess.Popen(
        [*command, "--log-dir", str(tmp_path / "run")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    out, shown = process.communicate(timeout=90)[0], b""
    with contextlib.suppress(OSError):  # that is how the other side of a terminal ends
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.returncode == 0 and "task loss" in out
    assert re.findall(r"(\d+)/25 ", shown.decode(errors="replace"))[-1] == "25", shown[-500:]


def broken_launcher(folder: Path) -> Path:
    """The launcher with a rank that raises in a cell of chapter 04."""
    text = (ROOT / "ep_launcher" / "launcher.py").read_text()
    line = "        record.begin_step()\n"
    assert text.count(line) == 1
    path = folder / "broken_launcher.py"
    path.write_text(text.replace(line, f"{line.rstrip()}; mesh.batch.rank == 1 and step == 3 and [][step]\n"))
    return path


def test_an_error_in_a_rank_names_its_cell(tmp_path, capfd):
    with pytest.raises(LaunchError) as caught:
        launch(2, script=broken_launcher(tmp_path), steps=50, log_dir=str(tmp_path / "run"), **SMALL)
    error = caught.value
    at = r"notebooks/04_training\.ipynb #train:\d+"
    assert re.match(rf"rank 1: IndexError: list index out of range \({at}, in train\)$", error.lines[0])
    assert any(re.search(rf"{at}, in train: .*\[\]\[step\]", line) for line in error.lines[1:])
    assert error.lines[-1] == f"whole output: {tmp_path / 'run' / 'ranks'}" and len(error.lines) <= 15
    assert error.lines[-2].startswith("to do: mend the last of these cells, save, `make launcher`")
    assert error.rank == 1
    assert "Traceback" in (error.log_dir / "rank1.err").read_text()
    assert "Traceback" not in capfd.readouterr().err
    assert error._render_traceback_()[0] == f"LaunchError: {error.lines[0]}"


def test_interrupting_the_kernel_ends_every_rank(tmp_path):
    marker = str(tmp_path)

    def interrupt() -> None:
        wait_until(lambda: (tmp_path / "run" / "train.log").exists())
        wait_until(lambda: "[step 00010]" in (tmp_path / "run" / "train.log").read_text())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="every rank has ended; logs in .*run/ranks"):
        launch(2, steps=10**6, log_interval=10, log_dir=str(tmp_path / "run"), **SMALL)
    assert_gone(marker, within_s=0)
    thread.join()
    assert "stopped at step" in (tmp_path / "run" / "train.log").read_text()


class Shell:
    """A run of tools/launch.py, as `make train` starts it."""

    def __init__(self, log_dir: Path, *flags: str) -> None:
        self.log_dir = log_dir
        command = [sys.executable, "tools/launch.py", "--nproc", "2", "--steps", "1000000", *SMALL_FLAGS]
        self.process = subprocess.Popen(
            [*command, "--log-interval", "10", "--log-dir", str(log_dir), *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def wait_for_steps(self) -> None:
        log = self.log_dir / "train.log"
        wait_until(lambda: log.exists() and "[step 00010]" in log.read_text())

    def rank(self, number: int) -> psutil.Process:
        ranks = [p for p in processes(str(self.log_dir)) if "launcher.py" in " ".join(p.cmdline()[:3])]
        return next(process for process in ranks if process.environ()["RANK"] == str(number))

    def finish(self, timeout: float = 60) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


def test_signals(tmp_path):
    """Four runs beside one another: SIGINT, SIGKILL of a rank, of the launching process, SIGSTOP of a rank."""
    names = ("interrupted", "rank_killed", "launch_killed", "rank_stopped")
    runs = {
        name: Shell(tmp_path / name, *(["--timeout-s", "5"] if "stopped" in name else [])) for name in names
    }
    try:
        for run in runs.values():
            run.wait_for_steps()
        runs["rank_stopped"].rank(1).suspend()
        runs["rank_killed"].rank(1).kill()
        runs["launch_killed"].process.kill()
        runs["interrupted"].process.send_signal(signal.SIGINT)
        assert_gone(str(runs["interrupted"].log_dir))
        assert_gone(str(runs["launch_killed"].log_dir))

        code, out, err = runs["interrupted"].finish()
        assert code == 130 and "Traceback" not in err
        assert err == f"interrupted: every rank has ended; logs in {tmp_path / 'interrupted' / 'ranks'}\n"
        assert (
            "stopped at step" in out
            and "[step 00010]" in (tmp_path / "interrupted/ranks/rank0.out").read_text()
        )

        code, _, err = runs["rank_killed"].finish()
        assert code != 0 and error_lines(err) == err.splitlines()[:1] and err.count("\n") <= 15
        assert err.startswith("error: rank 1 was ended by SIGKILL; the other ranks were stopped")
        assert "Traceback" not in err and str(tmp_path / "rank_killed" / "ranks") in err
        assert_gone(str(tmp_path / "rank_killed"), within_s=0)

        code, _, err = runs["rank_stopped"].finish()
        assert code != 0 and len(error_lines(err)) == 1 and "Traceback" not in err
        assert re.search(r"rank 1 stayed behind at step \d+, after \d+ collectives", err)
        cell = r"rank 0, collective \d+: .+ \(notebooks/\d\d_\w+\.ipynb #[a-z-]+:\d+\) \(rank 1 stayed"
        assert re.search(cell, err), "the collective that failed does not name its cell"
        assert_gone(str(tmp_path / "rank_stopped"), within_s=0)
    finally:
        for run in runs.values():
            run.process.kill()
        for process in processes(str(tmp_path)):
            process.kill()


# ------------------------------------------------------------------------------------------- %%ranks


@pytest.fixture(scope="module")
def shell():
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "tools.launch")
    yield shell
    InteractiveShell.clear_instance()


def run_cell(shell: InteractiveShell, text: str):
    """Runs a cell -> its result; what it raises is raised here."""
    result = shell.run_cell(text, store_history=True)
    if result.error_in_exec is not None:
        raise result.error_in_exec
    return result.result


def test_ranks_collects_by_rank_and_prints_in_order(shell, capsys):
    shell.user_ns |= {"n": 3, "secret": 1}
    result = run_cell(
        shell,
        """%%ranks $n --collect rows parts
def scaled(x):  # a function of the cell sees the cell's names and the launcher's
    return x * world_size

x = torch.randn(4)  # the same on every rank
comm.all_reduce(x)
rows = scaled(torch.full((2, 2), float(rank), requires_grad=True))
parts = {"routing": Routing(x.long(), x, rows), "more": [x, (rank, "a")], "secret": "secret" in globals()}
print("rank", dist.get_rank(ep_group), device.type, end="!\\n")
print("to stderr", file=__import__("sys").stderr)
""",
    )
    kind = "cuda" if torch.cuda.device_count() >= 3 else "cpu"
    printed = [
        line for line in capsys.readouterr().out.splitlines() if not line.startswith(("rows", "parts", "Out"))
    ]
    each = [(f"rank {rank}: rank {rank} {kind}!", f"rank {rank}: to stderr") for rank in range(3)]
    assert printed[:6] == [line for pair in each for line in pair]
    rows, parts = shell.user_ns["rows"], shell.user_ns["parts"]
    assert result["rows"] is rows and isinstance(rows, ByRank) and len(rows) == len(parts) == 3
    assert [float(row[0, 0]) for row in rows] == [0, 3, 6] and not rows[1].requires_grad
    torch.manual_seed(0)
    torch.testing.assert_close(parts[2]["routing"].topk_weights, 3 * torch.randn(4))
    assert parts[1]["more"][1] == (1, "a") and parts[0]["secret"] is False
    assert repr(rows).splitlines()[1] == "rank 1: float32 [2, 2] [[3.0, 3.0], [3.0, 3.0]]"
    assert [line[:14] for line in repr(result).splitlines()[2:4]] == ["rows, rank 2: ", "parts, rank 0:"]


def test_ranks_sends_definitions_along(shell, capsys):
    run_cell(shell, "def double(x):\n    return base * x\n\n\nbase = 2\nsecret = 1\n")
    body = "out = double(rank + 4), SeedEPMoE.__mro__[1].__name__, ep_group, 'secret' in globals()"
    run_cell(shell, f"%%ranks 1 --with double SeedEPMoE --collect out\n{body}")
    assert shell.user_ns["out"][0] == (8, "Module", None, False)
    with pytest.raises(RanksError, match="--with nowhere: no executed cell and no seed cell defines it"):
        run_cell(shell, "%%ranks 1 --with nowhere\npass")


LATE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch.distributed as dist
from ep_launcher import launcher
from tools.ranks import worker as rank_worker
rank, honest = int(os.environ["RANK"]), dist.init_process_group
def late(*args, **kwargs):
    honest(*args, **kwargs)
    if rank == 0:
        time.sleep(1)
        (folder / "connected").touch()
folder, dist.init_process_group = Path({folder!r}), late
rank_worker.start_group({{"device": "cpu", "nproc": 2, "group_timeout_s": 30}}, rank, folder, launcher)
sys.stdout.write(f"rank {{rank}} starts: {{(folder / 'connected').exists()}}\\n")
"""


def test_no_rank_starts_the_cell_before_all_are_connected(tmp_path):
    """One that dies at once would break what the others still do, and they would report it as theirs."""
    script = tmp_path / "late.py"
    script.write_text(LATE.format(root=str(ROOT), folder=str(tmp_path)))
    done = torchrun(2, str(script))
    assert done.stdout.count("starts: True") == 2, done.stdout + done.stderr[-1000:]


@pytest.mark.parametrize(
    ("line", "body", "says"),
    [
        ("2", "x = 1\nif rank:\n    raise ValueError('no good')\ncomm.all_reduce(torch.ones(1))",
         r"rank 1, line 4 of the cell: ValueError: no good"),
        ("2", "def f():\n    MoEConfig(top_k=99)\nf()",
         r"ranks 0, 1, line 3 of the cell: ValueError: top_k is 99, above the 16 experts; lower --top-k "
         r"\(notebooks/01_parallelism\.ipynb #config:\d+, in LayerSizes\.__post_init__\)"),
        ("2", "x = = 1", r"ranks 0, 1, line 2 of the cell: SyntaxError: invalid syntax"),
        ("2 --collect y", "if rank == 0:\n    y = 1", r"rank 1: NameError: the cell does not define `y`.*"),
        ("2", "import os, signal\nif rank:\n    os.kill(os.getpid(), signal.SIGKILL)", r"rank 1: ended by SIGKILL"),
        ("2 --timeout 4", "if rank:\n    comm.all_reduce(torch.ones(1))",
         r"rank 1, line 3 of the cell: CollectiveError: rank 1, collective 1: Timed out waiting 2000ms.*; "
         r"rank 0 ended the cell after 0 collectives"),
        ("2 --timeout 1", "import time\nwhile rank:\n    time.sleep(0.01)",
         r"the time limit of 1 s is over: rank 0 ended the cell; rank 1 was at line [34]; raise --timeout.*"),
    ],
)  # fmt: skip
def test_ranks_names_what_failed(shell, line, body, says, capsys):
    with pytest.raises(RanksError) as caught:
        run_cell(shell, f"%%ranks {line} --device cpu\n{body}")
    assert len(caught.value.lines) == 1 and re.fullmatch(says, caught.value.lines[0])
    assert "Traceback" not in capsys.readouterr().out
    assert_gone(WORKER, within_s=0)


def test_ranks_refuses_and_expects(shell, capsys):
    with pytest.raises(RanksError, match="unrecognized arguments: --colect"):
        run_cell(shell, "%%ranks 2 --colect rows\nrows = 1")
    with pytest.raises(RanksError, match="take 1 or more"):
        run_cell(shell, "%%ranks 0\npass")
    with pytest.raises(RanksError, match="every rank ended well, and --expect-failure"):
        run_cell(shell, "%%ranks 1 --expect-failure\npass")
    capsys.readouterr()
    run_cell(shell, "%%ranks 1 --expect-failure\n1 / 0")
    assert capsys.readouterr().out == "rank 0, line 2 of the cell: ZeroDivisionError: division by zero\n"


def test_kernel_definitions_must_be_the_launchers(shell):
    run_cell(shell, "def tp_bytes():\n    return 0")
    try:
        with pytest.raises(RanksError, match="`tp_bytes`"):
            run_cell(shell, "%%ranks 1\ntp_bytes")
        with pytest.raises(LaunchError, match="`tp_bytes`"):
            run_cell(shell, "from tools.launch import launch\nlaunch(steps=1)")
        run_cell(shell, "%%ranks 1 --with tp_bytes --collect zero\nzero = tp_bytes()")
        assert shell.user_ns["zero"] == [0]
    finally:
        del shell.user_ns["tp_bytes"]


def test_interrupting_ranks_ends_them(shell, tmp_path):
    def interrupt() -> None:
        wait_until((tmp_path / "started").exists)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="every rank has ended"):
        run_cell(
            shell, f"%%ranks 2\nPath({str(tmp_path / 'started')!r}).touch()\nimport time; time.sleep(60)"
        )
    assert_gone(WORKER, within_s=5)
    thread.join()


@pytest.mark.parametrize("killed", ["kernel", "worker too"])
def test_no_rank_outlives_a_killed_kernel(killed, tmp_path):
    started = tmp_path / "started"
    body = f"Path({str(started)!r}).touch()\nimport time; time.sleep(60)"
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.ranks import run_cell_on_ranks as run; "
    )
    kernel = subprocess.Popen([sys.executable, "-c", script + f"run({body!r}, 2)"])
    wait_until(started.exists)
    workers = psutil.Process(kernel.pid).children()
    for process in [psutil.Process(kernel.pid), *workers[: len(killed) > 6]]:
        process.kill()
    kernel.wait()
    assert_gone(WORKER, within_s=5)
