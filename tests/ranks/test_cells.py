"""%%ranks: whatever Python a cell holds, on fresh ranks; what failed, at which line; no process left behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from support import ROOT, processes, torchrun, wait_until

from tools.launch import LaunchError
from tools.ranks import cells
from tools.ranks.agent import ForkedRank
from tools.ranks.cells import ByRank, RanksError

AGENT = str(ROOT / "tools" / "ranks" / "agent.py")  # of this checkout: others may run beside it


def ranks_left() -> list[psutil.Process]:
    """All but the process that waits for the next cell."""
    return [process for process in processes(AGENT) if process.ppid() != os.getpid()]


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
    run_cell(shell, "def double(x):\n    return base * x\n\n\nbase = 2\nsecret = 1\nx_kernel = len\n")
    run_cell(
        shell,
        "from dataclasses import dataclass\n@dataclass\nclass Pair:\n    a: 'int' = 3\n"
        "    def both(self):\n        return double(self.a)\n\nasync def late():\n    return 5",
    )
    body = "out = double(rank + 4), SeedEPMoE.__mro__[1].__name__, 'secret' in globals(), Pair().both(), await late()"
    run_cell(shell, f"%%ranks 1 --with double SeedEPMoE --with Pair late --collect out\n{body}")
    assert shell.user_ns["out"][0] == (8, "Module", False, 6, 5)
    for names, first in (("nowhere", "nowhere"), ("Pair,late", "Pair,late"), ("Pair x_kernel", "x_kernel")):
        with pytest.raises(
            RanksError, match=f"--with {first}: no such definition; .* spaces between$"
        ) as caught:
            run_cell(shell, f"%%ranks 1 --with {names}\npass")
        assert len(caught.value.lines) == 1


ANY_PYTHON = """
import asyncio, enum, pickle, typing
from dataclasses import dataclass, field, replace
@dataclass(frozen=True)
class Point:
    x: int
    more: list = field(default_factory=list)
class Color(enum.Enum):
    RED = enum.auto()
class Pair(typing.NamedTuple):
    a: Point
    b: str = "b"
async def later(n):
    await asyncio.sleep(0)
    return n + rank
def outer():
    base = world_size
    def inner(n):
        return base * n
    return inner
things = [replace(Point(1), x=2), Color.RED, Pair(Point(3))]
found = {
    "awaited": [await later(n) for n in range(2)],
    "nested": outer()(5),
    "pickled": pickle.loads(pickle.dumps(things)) == things,
    "types": Point.__annotations__["x"] is int and typing.get_type_hints(Pair)["a"] is Point,
    "module": Point.__module__ == __name__,
}
"""


def test_a_cell_may_hold_any_python(shell):
    run_cell(shell, f"%%ranks 2 --collect found\n{ANY_PYTHON}")
    for rank, found in enumerate(shell.user_ns["found"]):
        right = {"awaited": [rank, rank + 1], "nested": 10, "pickled": True, "types": True, "module": True}
        assert found == right


def test_cells_share_an_import_until_something_changes(shell, monkeypatch):
    """All are forked from one process; another one takes its place for another environment, or where it is gone."""

    def cell() -> tuple[int, str | None]:
        body = "import os, psutil\nforks = psutil.Process(os.getppid()).ppid()"
        run_cell(shell, f"%%ranks 1 --collect seen\n{body}\nseen = forks, os.environ.get('EP_ANY')")
        return shell.user_ns["seen"][0]

    first = cell()
    assert cell() == first and first[1] is None
    monkeypatch.setenv("EP_ANY", "thing")
    second = cell()
    assert second[1] == "thing" and second[0] != first[0] and not psutil.pid_exists(first[0])
    psutil.Process(second[0]).kill()
    wait_until(lambda: not ranks_left() and cell()[0] != second[0])


def test_no_rank_goes_on_before_all_are_forked(tmp_path):
    """A rank that joins has the forking process look up a name; a fork in that moment would wait for its lock."""
    script, ranks = tmp_path / "script.py", []
    script.write_text("import pathlib, sys\npathlib.Path(sys.argv[1]).touch()\n")
    for rank in range(3):
        time.sleep(0.5)
        assert list(tmp_path.iterdir()) == [script]
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
        command = (sys.executable, "-u", str(script), str(tmp_path / f"rank{rank}"))
        ranks.append(ForkedRank(SimpleNamespace(_stdout=None, _stderr=None), command, places))
    assert [rank.wait(30) for rank in ranks] == [0, 0, 0] and len(list(tmp_path.iterdir())) == 4


MEETING = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch.distributed as dist
import torch
from tools.ranks import body
rank, honest = int(os.environ["RANK"]), dist.init_process_group
def late(*args, **kwargs):
    honest(*args, **kwargs)
    if rank == 0:
        time.sleep(1)
        (folder / "connected").touch()
folder, dist.init_process_group = Path({folder!r}), late
body.start_group(torch.device("cpu"), 60)
sys.stdout.write(f"rank {{rank}} starts: {{(folder / 'connected').exists()}}\\n")
"""


def test_no_rank_starts_the_cell_before_all_are_connected(tmp_path):
    """One that dies at once would break what the others still do, and they would report it as theirs."""
    script = tmp_path / "late.py"
    script.write_text(MEETING.format(root=str(ROOT), folder=str(tmp_path)))
    done = torchrun(2, str(script))
    assert done.stdout.count("starts: True") == 2, done.stdout + done.stderr[-1000:]


@pytest.mark.parametrize(
    ("line", "body", "says"),
    [
        ("2", "x = 1\nif rank:\n    raise ValueError('no good')\ncomm.all_reduce(torch.ones(1))",
         r"rank 1, line 4 of the cell: ValueError: no good"),
        ("2", "def f():\n    MoEConfig(top_k=99)\nf()",
         r"ranks 0, 1, line 3 of the cell: ValueError: top_k is 99, above the 16 experts; lower --top-k "
         r"\(notebooks/02_all_to_all\.ipynb #moe-config:\d+, in MoEConfig\.__post_init__\)"),
        ("2", "x = = 1", r"ranks 0, 1, line 2 of the cell: SyntaxError: invalid syntax"),
        ("2 --collect y", "if rank == 0:\n    y = 1", r"rank 1: NameError: the cell does not define `y`.*"),
        ("2", "import os, signal\nif rank:\n    os.kill(os.getpid(), signal.SIGKILL)", r"rank 1: ended by SIGKILL"),
        ("2", "import os, multiprocessing, time\nmultiprocessing.Process(target=time.sleep, args=(60,)).start()\n"
         "os._exit(3)", r"(rank 0|rank 1|ranks 0, 1): exited with code 3"),
        ("2", "import os\nif rank:\n    os._exit(0)", r"rank 1: exited with code 0"),
        ("2 --timeout 4", "if rank:\n    comm.all_reduce(torch.ones(1))",
         r"rank 1, line 3 of the cell: CollectiveError: rank 1, collective 1: Timed out waiting 2000ms.*; "
         r"rank 0 ended the cell; a collective waits for half of --timeout, 2 s"),
        ("2 --timeout 1e-9", "pass",
         r"the time limit of 1e-09 s is over: rank 0 (was outside the cell|did not answer); rank 1 .*"),
        ("2 --timeout 3", "import os, signal, time\nif rank:\n    os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)",
         r"the time limit of 3 s is over: rank 0 was at line 5; rank 1 did not answer; .*"),
        ("2 --timeout 1", "import time\nwhile rank:\n    time.sleep(0.01)",
         r"the time limit of 1 s is over: rank 0 ended the cell; rank 1 was at line [34]; raise --timeout.*"),
    ],
)  # fmt: skip
def test_ranks_names_what_failed(shell, line, body, says, capsys):
    with pytest.raises(RanksError) as caught:
        run_cell(shell, f"%%ranks {line} --device cpu\n{body}")
    assert len(caught.value.lines) == 1 and re.fullmatch(says, caught.value.lines[0])
    assert "Traceback" not in capsys.readouterr().out
    wait_until(lambda: not ranks_left(), 10)


def test_a_rank_may_leave_its_cell_by_exit(shell, capsys):
    run_cell(
        shell, "%%ranks 2 --device cpu\nprint('so far')\nif rank:\n    raise SystemExit(0)\nprint('and on')"
    )
    assert capsys.readouterr().out.splitlines() == ["rank 0: so far", "rank 0: and on", "rank 1: so far"]


def test_a_rank_that_cannot_write_is_named(tmp_path):
    for rank, said in enumerate(('""', "")):  # an empty file is what a full disk leaves
        (tmp_path / f"rank{rank}.json").write_text(said)
    (line,) = cells.problems({"nproc": 2, "timeout_s": 60}, tmp_path, 1)
    assert line.startswith(
        f"rank 1: it could not write to {tmp_path.parent}; where that disk is full, set TMPDIR"
    )


def test_nothing_that_a_rank_started_outlives_its_cell(shell):
    start = "import os, subprocess\npid = subprocess.Popen(['sleep', '600']).pid\n"
    run_cell(shell, "%%ranks 2 --collect pid\n" + start)
    assert not any(psutil.pid_exists(pid) for pid in shell.user_ns["pid"])
    orphan = "os.system('sleep 600 & echo $! > pid')\npid = int(Path('pid').read_text())\n"
    run_cell(shell, f"%%ranks 1 --collect pid\nimport os, tempfile\nos.chdir(tempfile.mkdtemp())\n{orphan}")
    assert not psutil.pid_exists(shell.user_ns["pid"][0])


def test_a_killed_worker_is_told_from_one_that_could_not_start(shell):
    with pytest.raises(RanksError) as caught:
        run_cell(shell, "%%ranks 2\nimport os, time\nos.kill(os.getppid(), 9)\ntime.sleep(60)")
    assert caught.value.lines == ["%%ranks: torchrun failed: it was killed"]
    wait_until(lambda: not ranks_left())


def test_what_holds_itself_is_shown_to_some_depth():
    (loop := [1]).append(loop)
    named = {}
    named["me"] = (named, 2)
    deep = 0
    for _ in range(400):
        deep = [deep]
    for value, begin in ((loop, "[1, [1, "), (named, "{'me': [{'me': "), (deep, "[[[[")):
        assert cells.brief(value).startswith(begin) and len(cells.brief(value)) <= 90


def test_ranks_refuses_and_expects(shell, capsys):
    with pytest.raises(UsageError, match="unrecognized arguments: --colect"):
        run_cell(shell, "%%ranks 2 --colect rows\nrows = 1")
    with pytest.raises(RanksError, match="take 1 or more ranks"):
        run_cell(shell, "%%ranks 0\npass")
    for time_limit in ("nan", "inf", "1e20"):
        with pytest.raises(RanksError, match="a time limit of at most a week"):
            run_cell(shell, f"%%ranks 1 --timeout {time_limit}\npass")
    with pytest.raises(RanksError, match="every rank ended well, and --expect-failure"):
        run_cell(shell, "%%ranks 1 --expect-failure\npass")
    capsys.readouterr()
    run_cell(shell, "%%ranks 1 --expect-failure\n1 / 0")
    assert capsys.readouterr().out == "rank 0, line 2 of the cell: ZeroDivisionError: division by zero\n"


def test_kernel_definitions_must_be_the_launchers(shell):
    run_cell(shell, "def expected_distinct_ranks():\n    return 0")
    try:
        with pytest.raises(RanksError, match="`expected_distinct_ranks`"):
            run_cell(shell, "%%ranks 1\nexpected_distinct_ranks")
        with pytest.raises(LaunchError, match="`expected_distinct_ranks`"):
            run_cell(shell, "from tools.launch import launch\nlaunch(steps=1)")
        run_cell(
            shell, "%%ranks 1 --with expected_distinct_ranks --collect zero\nzero = expected_distinct_ranks()"
        )
        assert shell.user_ns["zero"] == [0]
    finally:
        del shell.user_ns["expected_distinct_ranks"]


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
    wait_until(lambda: not ranks_left())
    thread.join()


@pytest.mark.parametrize("killed", ["kernel", "worker too"])
def test_no_rank_outlives_a_killed_kernel(killed, tmp_path):
    started = tmp_path / "started"
    body = f"Path({str(started)!r}).touch()\nimport time; time.sleep(60)"
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.ranks.cells import run_cell_on_ranks as run; "
    kernel = subprocess.Popen([sys.executable, "-c", script + f"run({body!r}, 2)"])
    wait_until(started.exists)
    workers = psutil.Process(kernel.pid).children()
    for process in [psutil.Process(kernel.pid), *workers[: killed == "worker too"]]:
        process.kill()
    kernel.wait()
    wait_until(lambda: not ranks_left())
