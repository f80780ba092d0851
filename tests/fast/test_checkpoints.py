"""Chapter 15's checkpoints on one rank: what is resumed, refused, kept and forgiven."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from ep_launcher import launcher as ep

SMALL = (
    "--hidden-dim 8 --ffn-dim 8 --num-experts 4 --tokens 8 --dtype float64 --balance bias --log-interval 3"
)


class Lines(ep.RunLog):
    """A log that is a list."""

    def __init__(self) -> None:
        super().__init__(Path("."), 1, rank=1)
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line)


def run(folder: Path, flags: str = "", steps: int = 20) -> tuple[dict, list[str]]:
    """A run with checkpoints in folder -> (what it measured, its lines)."""
    argv = f"{SMALL} --steps {steps} --checkpoint-dir {folder} --device cpu {flags}".split()
    config, options = ep.parse_flags(argv)
    log = Lines()
    made = ep.Run(config, options, ep.init_ep(), ep.check_run(config, options), log)
    return ep.train(made), log.lines


def alike(measured: dict) -> dict:
    """What two runs have in common: all but times."""
    return {name: value for name, value in measured.items() if name != "ms_per_step"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, Path]:
    """What an undisturbed run of 20 steps measured, and its folder, with checkpoints of steps 5, 10, 15, 20."""
    folder = tmp_path_factory.mktemp("whole")
    measured, lines = run(folder, "--checkpoint-interval 5 --keep-checkpoints 9")
    assert sum("checkpoint of" in line for line in lines) == 4
    return alike(measured), folder


def copy_of(folder: Path, tmp_path: Path, *steps: int) -> Path:
    """A folder with the checkpoints of these steps alone."""
    for step in steps:
        shutil.copytree(folder / f"step-{step:08d}", tmp_path / "copy" / f"step-{step:08d}")
    return tmp_path / "copy"


@pytest.mark.parametrize("step", [5, 10, 15])
@pytest.mark.parametrize(
    "flags", ["", "--async-checkpoints --checkpoint-interval 2", "--experts loop --log-dir x"]
)
def test_a_resumed_run_is_the_run_that_never_stopped(whole, tmp_path, step, flags):
    measured, lines = run(copy_of(whole[1], tmp_path, step), f"--resume {flags}")
    assert any(line.startswith(f"resumed at step {step} from step-{step:08d}") for line in lines)
    if "loop" in flags:
        assert measured["task_loss"] == pytest.approx(whole[0]["task_loss"], rel=1e-12)
    else:
        assert alike(measured) == whole[0]


def test_every_optimiser_goes_on(tmp_path, monkeypatch):
    """The state is made from the checkpoint's metadata, whatever its names are."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, **_: torch.optim.SGD(p, lr=1e-2, momentum=0.9))
    measured, _ = run(tmp_path / "a", "--checkpoint-interval 10 --keep-checkpoints 9")
    assert alike(run(copy_of(tmp_path / "a", tmp_path, 10), "--resume")[0]) == alike(measured)


def test_a_checkpoint_with_other_names_is_refused(tmp_path, monkeypatch):
    """As where an older program named the parameters."""
    usual = ep.named_tensors
    with monkeypatch.context() as patched:
        older = {"model/router.gate.weight": "model/gate.weight"}
        patched.setattr(ep, "named_tensors", lambda *a: {older.get(n, n): t for n, t in usual(*a).items()})
        run(tmp_path, "--checkpoint-interval 10", steps=10)
    with pytest.raises(ep.CannotRun, match=r"an older program's: model/gate.weight is not in both"):
        run(tmp_path, "--resume")


def test_more_steps_mean_another_tail(whole, tmp_path):
    longer, _ = run(tmp_path / "longer", steps=40)
    measured, _ = run(copy_of(whole[1], tmp_path, 20), "--resume", steps=40)
    assert alike(measured) == alike(longer)


def test_the_newest_stay_and_the_pointer_names_the_last(tmp_path):
    run(tmp_path, "--checkpoint-interval 3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000018", "step-00000020"]
    assert (tmp_path / "latest").read_text() == "step-00000020\n"


def turn_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "SHA-256": turn_a_bit,
    "100 bytes long": lambda c: os.truncate(c / "__0_0.distcp", 100),
    "missing": lambda c: (c / ".metadata").unlink(),
    "no manifest.json": lambda c: (c / "manifest.json").unlink(),
    "manifest.json is damaged": lambda c: (c / "manifest.json").write_text("{}"),
    "manifest.json is damaged: it lacks settings, files": lambda c: (c / "manifest.json").write_text(
        ep.sealed({key: ep.read_manifest(c)[key] for key in ("format", "step", "world_size", "ep_size")})
    ),
    "its format is 2": lambda c: (c / "manifest.json").write_text(
        ep.sealed(ep.read_manifest(c) | {"format": 2})
    ),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_taken(whole, tmp_path, says):
    folder = copy_of(whole[1], tmp_path, 5, 10)
    DAMAGES[says](folder / "step-00000010")
    measured, lines = run(folder, "--resume")
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 1 and says in warnings[0] and "\n" not in warnings[0]
    assert alike(measured) == whole[0] and any("resumed at step 5 " in line for line in lines)


def test_the_pointer_is_believed(whole, tmp_path):
    folder = copy_of(whole[1], tmp_path, 5, 10)
    (folder / "latest").write_text("step-00000005\n")
    assert any("resumed at step 5 " in line for line in run(folder, "--resume")[1])


@pytest.mark.parametrize("keep, stays", [(1, [18]), (2, [15, 18]), (4, [10, 15, 18, 20])])
def test_newer_ones_of_another_branch_do_not_push_out_what_was_just_saved(whole, tmp_path, keep, stays):
    folder = copy_of(whole[1], tmp_path, 10, 15, 20)
    turn_a_bit(folder / "step-00000020")
    run(folder, f"--resume --keep-checkpoints {keep}", 18)
    assert sorted(path.name for path in folder.glob("step-*")) == [f"step-{step:08d}" for step in stays]
    assert (folder / "latest").read_text() == "step-00000018\n"


@pytest.mark.parametrize("flags, steps, says", [
    ("--resume --top-k 1", 20, "top_k was 2 and is 1"),
    ("--resume --tokens 9 --seed 3", 20, "seed was 0 and is 3, tokens was 8 and is 9; give --tokens 8 and the same"),
    ("--resume --balance aux", 20, "balance was bias and is aux"),
    ("--resume", 10, "has 10 steps already; raise --steps"),
    ("", 20, "has checkpoints, the newest step-00000010; add --resume"),
])  # fmt: skip
def test_what_cannot_go_on_is_refused(whole, tmp_path, flags, steps, says):
    with pytest.raises(ep.CannotRun) as refused:
        run(copy_of(whole[1], tmp_path, 5, 10), flags, steps)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_another_text_of_the_same_name_is_refused(tmp_path):
    flags = f"--model lm --task text --text-file {tmp_path / 'a.txt'} --tokens 32 --num-heads 2"
    (tmp_path / "a.txt").write_text("What's in a name? " * 40)
    run(tmp_path / "kept", flags, 1)
    assert any("resumed at step 1 " in line for line in run(tmp_path / "kept", f"{flags} --resume", 2)[1])
    (tmp_path / "a.txt").write_text("What's in a rose? " * 40)
    ep.read_text.cache_clear()  # as another process would begin
    with pytest.raises(
        ep.CannotRun, match="another run: checksum of the text was .* and is .*; give the same flags"
    ):
        run(tmp_path / "kept", f"{flags} --resume", 3)


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_nothing_to_resume(whole, tmp_path, checkpoints):
    folder = copy_of(whole[1], tmp_path, *[5] * checkpoints)
    if checkpoints:
        turn_a_bit(folder / "step-00000005")
    with pytest.raises(ep.CannotRun, match="nothing to resume"):
        run(folder, "--resume")


def test_a_restart_needs_no_flag_and_may_find_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert alike(run(copy_of(whole[1], tmp_path, 10))[0]) == whole[0]
    assert alike(run(tmp_path / "empty")[0]) == whole[0]


def test_another_learning_rate_is_shown(whole, tmp_path):
    _, lines = run(copy_of(whole[1], tmp_path, 10), "--resume --lr 1e-3")
    assert any(line.endswith("; lr was 0.0005 and is 0.001") for line in lines)


@pytest.mark.parametrize("name", ["publish", "digest_of"])
def test_a_save_that_fails_is_one_warning(whole, tmp_path, monkeypatch, name):
    kept, calls = getattr(ep, name), []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return kept(*arguments)

    monkeypatch.setattr(ep, name, full)
    measured, lines = run(tmp_path, "--checkpoint-interval 5")
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 1 and alike(measured) == whole[0]
    assert warnings[0].startswith("warning: step-00000005 was not saved (No space left on device, ")
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_goes_away_is_a_warning(whole, tmp_path, monkeypatch):
    folder, kept = tmp_path / "lost" / "run", ep.write_aside

    def write_aside(*arguments):
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.touch()  # no folder can be made there any more
        return kept(*arguments)

    monkeypatch.setattr(ep, "write_aside", write_aside)
    measured, lines = run(folder, "--checkpoint-interval 10")
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 2 and alike(measured) == whole[0]


def test_a_signal_saves_and_stops(whole, tmp_path, monkeypatch):
    """SIGTERM in the middle of a step: that step ends, is saved, and the run goes on from it."""
    draw, count = ep.TokenStream.next, []

    def interrupted(self):
        count.append(1)
        if len(count) == 8:
            signal.raise_signal(signal.SIGTERM)
        return draw(self)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ep.TokenStream, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(count) == 8 and signal.getsignal(signal.SIGTERM) == before and signal.alarm(0) == 0
    measured, lines = run(tmp_path, "--resume")
    assert any("resumed at step 8 " in line for line in lines) and alike(measured) == whole[0]


@pytest.mark.parametrize("flags, says", [
    ("--checkpoint-interval 5", "checkpoint_interval does nothing without a folder; set --checkpoint-dir"),
    ("--resume", "resume does nothing without a folder"), ("--keep-checkpoints 3", "keep_checkpoints does nothing"),
    ("--async-checkpoints", "async_checkpoints does nothing"), ("--ep-size 2", "ep_size is 2, and must divide the 1"),
    ("--checkpoint-dir x --checkpoint-interval 0", "checkpoint_interval is 0, and must be at least 1"),
    ("--checkpoint-dir x --keep-checkpoints 0", "keep_checkpoints is 0"), ("--ep-size 0", "ep_size is 0"),
    ("--checkpoint-dir=", "checkpoint_dir is empty"),
    ("--checkpoint-dir /dev/null/x", "cannot write checkpoints to /dev/null/x; set --checkpoint-dir"),
])  # fmt: skip
def test_flags_that_do_nothing_or_make_no_sense(flags, says):
    with pytest.raises(ValueError) as refused:
        ep.check_run(*ep.parse_flags([*flags.split(), "--device", "cpu"]))
    assert says in str(refused.value)


def test_a_manifest_says_whose_it_is(whole):
    body = ep.read_manifest(whole[1] / "step-00000010")
    assert (
        body["step"] == 10 and body["world_size"] == body["ep_size"] == 1 and body["settings"]["tokens"] == 8
    )
    assert json.loads((whole[1] / "step-00000010/manifest.json").read_text())["body"] == body


def test_a_folder_where_the_pointer_belongs(whole, tmp_path):
    folder = copy_of(whole[1], tmp_path, 5)
    (folder / "latest").mkdir()
    with pytest.raises(ep.CannotRun, match="its `latest` is a folder, and must be a file"):
        run(folder, "--resume")


def test_a_lost_newest_is_named(whole, tmp_path):
    """The pointer names one that somebody has removed: the one before is taken, and not silently."""
    folder = copy_of(whole[1], tmp_path, 5)
    (folder / "latest").write_text("step-00000010\n")
    _, lines = run(folder, "--resume")
    assert "warning: step-00000010 is left out: it is not there, and `latest` names it" in lines
    assert any("resumed at step 5 " in line for line in lines)


def test_what_is_not_a_checkpoint_stays(whole, tmp_path):
    """Copies made by hand are neither counted nor removed; what a killed save has left goes; of a link the link."""
    folder = copy_of(whole[1], tmp_path, 5, 10)
    shutil.copytree(folder / "step-00000010", folder / "step-00000010-mine")
    (folder / "step-00000009.tar").write_text("mine")
    shutil.copytree(folder / "step-00000005", folder / "step-00000007.old.part")
    shutil.move(folder / "step-00000005", tmp_path / "elsewhere")
    (folder / "step-00000005").symlink_to(tmp_path / "elsewhere")
    _, lines = run(folder, "--resume --checkpoint-interval 3")
    assert not any(line.startswith("warning") for line in lines)
    left = ["latest", "step-00000009.tar", "step-00000010-mine", "step-00000018", "step-00000020"]
    assert sorted(path.name for path in folder.iterdir()) == left
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()


def test_two_runs_do_not_save_into_one_folder(tmp_path, monkeypatch):
    begun = []

    def another_begins(self, draw=ep.TokenStream.next):
        if not begun:
            begun.append(1)
            with pytest.raises(ep.CannotRun, match="another run is saving there"):
                run(tmp_path)
        return draw(self)

    monkeypatch.setattr(ep.TokenStream, "next", another_begins)
    run(tmp_path)
    assert begun and any("resumed" in line for line in run(tmp_path, "--resume", 30)[1])  # it is free again
