"""Parts of a training run by themselves, on one rank: teacher, timer, a task's loss, refusals of the command line."""

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
])  # fmt: skip
def test_a_setting_that_cannot_be_is_one_line(flags, says, tmp_path, monkeypatch, capsys):
    assert says in refusal(monkeypatch, capsys, *flags, "--log-dir", str(tmp_path / "logs"))
