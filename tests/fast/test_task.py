"""Parts of a training run by themselves, on one rank: teacher, timer, a task's loss, refusals of the command line."""

from pathlib import Path

import pytest
import torch

from ep_launcher import launcher as ep


def test_the_teacher_is_the_seeds():
    config = ep.MoEConfig(num_experts=2, hidden_dim=8, ffn_dim=8)
    comm = ep.Communicator()
    first, again, other = (ep.TokenStream(config, seed, 4, comm).teacher for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.05


def test_step_timer_leaves_the_first_tenth_out():
    timer = ep.StepTimer(torch.device("cpu"))
    timer.marks.append(0.0)
    for interval_ms in range(20, 0, -1):
        timer.marks.append(timer.marks[-1] + interval_ms / 1e3)
    assert timer.median_ms() == pytest.approx(9.5)  # of 18 to 1; of all twenty it is 10.5
    assert timer.median_ms(skip_fraction=0) == pytest.approx(10.5)
    for _ in range(9_000):
        timer.mark()
    assert timer.num_marks == 9_000 and len(timer.marks) == 4_000  # a run of weeks does not grow


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


def refusal(monkeypatch, capsys, *flags: str) -> str:
    """What the program says on one rank before it ends with 2; nothing has been trained."""
    small = ["--hidden-dim", "16", "--ffn-dim", "16", "--num-experts", "4", "--steps", "3"]

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(ep.os, "_exit", leave)
    monkeypatch.setattr(ep.signal, "signal", lambda *_: None)
    try:
        code = ep.main([*small, *flags])
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr()
    assert code == 2 and "[step" not in printed.out, printed
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.mark.parametrize("flags, says", [
    (["--experts", "grouped", "--dtype", "float64"],
     "experts grouped cannot run in float64 on 1 cpu rank; take auto (here: blocks)"),
    (["--step", "graph", "--device", "cpu"], "step graph cannot run here (1 cpu rank(s), dispatcher local"),
    (["--topk", "4"], "unrecognized arguments: --topk 4; did you mean --top-k?"),
    (["--plugin", "nowhere.py"], "cannot read the plugin 'nowhere.py'"),
    (["--plugin", "/dev/zero"], "no regular file"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_one_line(flags, says, tmp_path, monkeypatch, capsys):
    assert says in refusal(monkeypatch, capsys, *flags, "--log-dir", str(tmp_path / "logs"))


def step_taken(flags: str) -> str:
    """The kind of step that a run with these flags would take on one GPU; nothing is trained, and none is needed."""
    small = "--hidden-dim 8 --ffn-dim 8 --num-experts 4 --experts bmm"
    config, options = ep.parse_flags(f"{small} {flags}".split())
    mesh = ep.init_ep()
    run = ep.Run(config, options, mesh, torch.device("cuda"), ep.RunLog(Path("."), 1, rank=1))
    return ep.pick_step(run, ep.EPMoE(run.config, mesh, seed=0, device="cpu"))


@pytest.mark.parametrize("flags", [
    "", "--capacity-factor 1 --overflow reroute", "--capacity-factor 1 --dispatcher capacity",
    "--balance bias --router sigmoid --num-groups 2 --topk-groups 1 --z-alpha 0.1 --sequence-alpha 0.1",
])  # fmt: skip
def test_a_step_without_a_synchronisation_is_recorded(flags):
    assert step_taken(flags) == "graph" == step_taken(f"{flags} --step graph")
    assert step_taken(f"{flags} --step compiled") == "compiled"


@pytest.mark.parametrize("named", ["graph", "compiled"])
def test_global_scope_is_never_recorded(named):
    """It waits for the other ranks' numbers of tokens, on one rank as well."""
    flags = "--capacity-factor 1 --capacity-scope global"
    assert step_taken(flags) == "eager"
    with pytest.raises(ep.CannotRun) as refused:
        step_taken(f"{flags} --step {named}")
    assert str(refused.value) == (
        f"step {named} cannot run here (1 cuda rank(s), dispatcher local, experts bmm; "
        "capacity_scope global waits for the device, local does not); take auto (here: eager)"
    )


def test_a_share_of_a_mean_can_be_recorded(monkeypatch):
    """A number copied from the host is refused while a CUDA graph is captured; one that a kernel fills in is not."""
    monkeypatch.setattr(torch, "tensor", None)
    share = ep.share_of_mean(torch.ones((), requires_grad=True), 3, ep.init_ep())
    assert share.item() == 1
