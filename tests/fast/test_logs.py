"""What a run writes: a disk that is full, a folder that goes, a summary that cannot be, folders of one's own."""

import json
import resource
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch

from ep_launcher import launcher as ep
from tools.ranks.output import read_notes


def write_much(log: ep.RunLog, before_line_50=lambda: None) -> None:
    for step in range(100):
        if step == 50:
            before_line_50()
        log.write(f"[step {step:05d}]")
        log.show("histogram", step, {"load": torch.arange(100.0)})
        if log.writer:
            log.writer.file_writer.event_writer._async_writer._byte_queue.join()  # its thread has tried to write


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("what", ["full", "deleted"])
@pytest.mark.parametrize("is_launched", [False, True])
def test_the_log_is_lost_and_the_run_goes_on(what, is_launched, tmp_path, capfd, monkeypatch):
    notes = tmp_path / "notes"
    notes.write_bytes(bytes(2**13))
    if is_launched:
        monkeypatch.setenv("EP_STEPS", str(notes))
    before, usual = resource.getrlimit(resource.RLIMIT_FSIZE), threading.excepthook
    log = ep.RunLog(tmp_path / "log", 100, 0, ep.StepNotes(1, 100))
    try:
        if what == "full":  # as a disk with room for 8 KB
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
            write_much(log)
        else:
            write_much(log, lambda: shutil.rmtree(tmp_path / "log"))
        log.advance(99)
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    why = {"full": "File too large", "deleted": "No such file or directory"}[what]
    disk = next(path for path in tmp_path.parents if path.is_mount())
    line = f"warning: cannot write to {tmp_path}/log, on the disk of {disk} ({why}); the training goes on"
    out, err = capfd.readouterr()
    noted = notes.read_bytes()[:512].rstrip(b"\0").decode()
    assert (noted, err) == ((line, "") if is_launched else ("", line + "\n"))
    assert out.count("\n") == 100 and threading.excepthook is usual
    assert read_notes(notes)[1:] == ((100, [100, *[0] * 958]) if is_launched else (0, [0] * 959))


def test_a_disk_that_is_full_at_the_start_is_refused(tmp_path, capfd):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
        with pytest.raises(ValueError, match="cannot write logs to .*File too large.*; set --log-dir"):
            ep.RunLog(tmp_path, 100, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr() == ("", "")


def test_the_picture_of_loads_comes_a_dozen_times_in_3000_lines():
    shown = []
    log = SimpleNamespace(write=lambda line: None, show=lambda kind, step, values: shown.append((kind, step)))
    run = ep.Run(ep.MoEConfig(num_experts=4), ep.TrainingOptions(), ep.init_ep(), torch.device("cpu"), log)
    record = ep.Record(run, torch.nn.ModuleList([ep.EPMoE(run.config, run.mesh, seed=0)]))
    for step in range(3000):
        record.history.add(0, torch.tensor([[0, 1]]))
        record.end_interval(step, torch.zeros(2))
    assert [step for kind, step in shown if kind == "image"] == [2**n - 1 for n in range(12)]
    assert sum(kind == "histogram" for kind, _ in shown) == 3000


def check_summary(path: object) -> None:
    ep.check_run(ep.MoEConfig(), ep.TrainingOptions(summary=str(path), device="cpu"))


@pytest.mark.parametrize("place, why", [
    ("folder", "something else than a file"), ("link", "something else than a file"), ("/dev/null", "something else"),
    ("file/below", "Not a directory"), ("no/folder", "No such file or directory"), ("x" * 300, "File name too long"),
    ("/", "something else than a file"),
])  # fmt: skip
def test_a_summary_that_cannot_be_is_refused_before_step_0(place, why, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"^cannot write .*{why}.*; name a file in a folder that is there$"):
        check_summary(tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


def test_a_summary_whose_disk_is_full(tmp_path, monkeypatch, capfd):
    """Before the run: refused. After it: an error, and the log has it. Never a part of a file."""
    check_summary(tmp_path / "summary.json")
    assert not list(tmp_path.iterdir())
    said = []
    log = SimpleNamespace(write=said.append)
    run = ep.Run(
        ep.MoEConfig(),
        ep.TrainingOptions(summary=str(tmp_path / "s")),
        ep.init_ep(),
        torch.device("cpu"),
        log,
    )
    monkeypatch.setattr(ep, "LAUNCHER_DIR", ep.Path(ep.__file__).parent)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
        with pytest.raises(ValueError, match="File too large"):
            check_summary(tmp_path / "s")
        code = ep.write_summary(run, {"final_task_loss": 0.25}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capfd.readouterr().err
    assert code == 1 and not list(tmp_path.iterdir())
    assert json.loads(said[0].removeprefix("summary: "))["final_task_loss"] == 0.25
    assert err.startswith(f"error: cannot write {tmp_path}/s (File too large)") and err.count("\n") == 1
    assert ep.write_summary(run, {"final_task_loss": 0.25}, tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s"] and (
        tmp_path / "s"
    ).stat().st_mode & 0o444 == 0o444


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.delenv("TB_LOGDIR", raising=False)
    monkeypatch.setattr(ep, "LAUNCHER_DIR", tmp_path)
    monkeypatch.setattr(ep.time, "strftime", lambda _: "now")
    assert [ep.make_log_dir().relative_to(tmp_path / "runs").name for _ in range(3)] == [
        "now",
        "now-2",
        "now-3",
    ]


def test_a_tilde_is_the_users_home_and_nothing_the_default(monkeypatch):
    monkeypatch.setenv("HOME", "/home/you")
    options = ep.parse_flags(["--log-dir=~/a", "--summary=~/b"])[1]
    assert (options.log_dir, options.summary) == ("/home/you/a", "/home/you/b")
    assert ep.parse_flags(["--log-dir", "", "--summary="])[1].log_dir is None


def test_a_rank_that_stands_still_is_told_from_one_that_is_late(monkeypatch):
    """Notes of three ranks in the store: rank 1 beats on, rank 2 does not, and `launch` has read its steps."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # one machine
    store = ep.dist.HashStore()
    meter = SimpleNamespace(rank=0, size=3, num_collectives=63)
    notes = SimpleNamespace(steps=[0, 0, 37])
    mesh, log = SimpleNamespace(meter=meter), SimpleNamespace(notes=notes)
    run = SimpleNamespace(step=40, mesh=mesh, log=log)
    heart = ep.Heartbeat(store, run)
    store.set("position/1", "39 60 1")
    store.set("position/2", "0 63 1")  # it stands inside the collective that the others wait in
    store.wait(["position/0"])  # its thread has begun to beat
    moved = {"position/0": "40 63 99", "position/1": "39 60 2"}
    monkeypatch.setattr(ep.time, "sleep", lambda s: s and [store.set(*note) for note in moved.items()])
    try:
        late, still = heart.stragglers().split("; ")
    finally:
        heart.stop()
    assert late == "rank 1 stayed behind at step 39, after 60 collectives (the others: step 40, 63)"
    assert still.startswith(
        "rank 2 stands still, last heard of at step 37: stopped, gone, or keeping Python's lock"
    )


def test_a_log_whose_end_is_blocked_is_left_in_time(tmp_path):
    """A Ctrl-C inside TensorBoard's queue can leave it locked, and its end would wait for ever."""
    log, ended, go = ep.RunLog(tmp_path, 1, 0), [], threading.Event()
    end = log.writer.close
    log.writer.close = lambda: (go.wait(60), ended.append(1), end())
    log.close(limit_s=0.1)
    assert not ended
    go.set()


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    """`--flag=~/x` comes to us as it is, whatever the flag."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config, options = ep.parse_flags(["--log-dir=~/a", "--summary=~/b", "--checkpoint-dir=~/c"])
    places = options.log_dir, options.summary, config.option(ep.CheckpointOptions).checkpoint_dir
    assert [str(place) for place in places] == [f"{tmp_path}/{name}" for name in "abc"]
