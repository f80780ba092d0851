"""Flags that make no sense, in the launcher's own parser and checks: one line each, before anything is allocated."""

import argparse
import os
import random
import runpy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ep_launcher import launcher as ep

SEED = int(os.environ.get("EP_SEED", 0))  # another one: tests/trouble.py

WORDS = [
    "", " ", "0", "-0", "1", "-1", "2", "7", "0.5", "-0.5", "1e-320", "1e9", "1e20", "1e308", "1e400", "nan", "-nan",
    "inf", "-inf", "99999999999", "9" * 20, "9" * 400, "9" * 5000, "1_000", "0x10", "1e", "true", "None", "auto",
    "local", "capacity", "graph", "float64", "global", "bias", "clusters", "é", "—", "\n", "a b", "--", "-", "/", ".",
]  # fmt: skip


class NothingIsMade(TorchDispatchMode):
    """Inside, an operation on tensors is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran while flags were checked")


def check(argv: list[str]) -> str:
    """What the program would say before it starts: "" where the flags are accepted."""
    try:
        with NothingIsMade():
            ep.check_run(*ep.parse_flags([*argv, "--device", "cpu"]))
    except ValueError as error:  # CannotRun is one
        return str(error)
    return ""


LM = "--model lm --task text"
SMALL = "--hidden-dim 8 --ffn-dim 8 --num-experts 4".split()


def run_a_step(argv: list[str], folder: Path) -> torch.Tensor:
    """One step with these flags, on one rank -> the task loss."""
    config, options = ep.parse_flags([*SMALL, *argv, "--device", "cpu"])
    device = ep.check_run(config, options)
    options = ep.replace(options, steps=1)
    run = ep.Run(config, options, ep.init_ep(), device, ep.RunLog(folder, 1, rank=1))
    return torch.tensor(ep.train(run)["task_loss"])


def test_300_flag_values_are_refused_in_one_line_or_train(tmp_path, monkeypatch):
    """A refusal comes before any tensor is made; what is accepted runs a step, however odd it is."""
    monkeypatch.chdir(tmp_path)
    flags = [a for a in ep.make_parser()._actions if not isinstance(a, argparse._HelpAction)]
    draw, refused = random.Random(12 + SEED), 0
    for _ in range(300):
        argv = []
        for action in draw.sample(flags, draw.choice((1, 1, 2, 3))):
            argv += [draw.choice(action.option_strings)]
            if action.nargs != 0:
                inside = "x" if action.dest == "checkpoint_dir" else ""  # no folder of this machine's
                argv += [inside + draw.choice(WORDS)]
        said = check([*SMALL, *argv])
        assert said.count("\n") == 0 and len(said) < 12000, (argv, said)
        refused += bool(said)
        if not said:
            try:
                run_a_step(argv, tmp_path)
            except (ep.CannotRun, ep.NonFiniteLoss) as error:
                assert "\n" not in str(error), (argv, error)
    assert 150 < refused < 290, refused


@pytest.mark.parametrize("flags, says", [
    ("--num-experts 99999999999", "GB at least, and has"), ("--ffn-dim 99999999999", "experts (--num-experts, "),
    ("--hidden-dim 4000000 --num-experts 1 --top-k 1 --ffn-dim 1", "most of it: teacher (--hidden-dim)"),
    ("--tokens 99999999999 --max-num-tokens 99999999999", "most of it: rows (--tokens, --top-k, --ffn-dim)"),
    ("--num-clusters 99999999 --task clusters", "most of it: teachers (--num-clusters"),
    ("--tokens 0", "tokens is 0, and must be at least 1"), (f"--seed {2**63}", "must be below 2**63"),
    ("--timeout-s 1e20", "at most 604800, a week"), ("--capacity-factor 1e20", "no expert runs full"),
    ("--zipf 2", "zipf 2.0 does nothing without clusters; take --task clusters"),
    ("--sort-tokens", "does nothing without clusters"), ("--num-clusters 7", "does nothing without clusters"),
    ("--bias-speed 0.1", "bias_speed 0.1 does nothing without a bias; take --balance bias"),
    ("--z-alpha 0.1 --aux-alpha 0", "z_alpha 0.1 does nothing with aux_alpha 0; raise --aux-alpha"),
    ("--ranks-per-host 2", "ranks_per_host 2 does nothing with dispatcher auto; take --dispatcher two_stage"),
    ("--aux-alpha 0.1 --balance none", "aux_alpha 0.1 does nothing with balance none; take --balance aux"),
    ("--aux-alpha 0.1 --balance bias", "aux_alpha 0.1 does nothing with balance bias"),
    ("--sequence-length 8", "does nothing without its loss; set --sequence-alpha"),
    ("--num-shared-experts -1", "num_shared_experts is -1"), ("--aux-alpha -1", "aux_alpha is -1.0"),
    (f"--log-interval {2**63}", "must be below 2**63"), (f"--warmup-steps {'9' * 400}", "must be below 2**63"),
    (f"{LM} --num-layers 99999999", "most of it: experts (--num-layers, --num-experts)"),
    (f"{LM} --head-dim 999999998", "most of it: attention (--num-layers, --num-heads)"),
    (f"{LM} --dense-layers 1 --dense-ffn-dim 9999999999", "most of it: dense layers (--dense-layers, "),
    ("--tokens 129", "129 tokens over 1 ranks are up to 129 per rank, above max_num_tokens 128"),
])  # fmt: skip
def test_what_would_fail_late_or_do_nothing_is_refused(flags, says):
    said = check(flags.split())
    assert says in said and "\n" not in said, said


@pytest.mark.parametrize("word, code, says", [
    ("--help", 0, "bench-inference [FLAG...]"), ("bench", 2, "takes bench-inference"),
])  # fmt: skip
def test_the_package_by_itself_says_what_it_takes(word, code, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ep_launcher", word])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        runpy.run_module("ep_launcher", run_name="__main__")
    assert left.value.code == code and says in "".join(capsys.readouterr())


@pytest.mark.parametrize("said", [
    "RANK=1", "RANK=-1", "WORLD_SIZE=abc", "WORLD_SIZE=0", "WORLD_SIZE=2", "RANK=2, WORLD_SIZE=2", "LOCAL_RANK=x",
    "LOCAL_RANK=-1", "LOCAL_WORLD_SIZE=0",
])  # fmt: skip
def test_an_environment_of_no_rank_is_one_line(said, monkeypatch, capsys):
    for name, value in (part.split("=") for part in said.split(", ")):
        monkeypatch.setenv(name, value)
    line = f"the environment has {said}, which no rank has; unset them, or start with torchrun"
    assert check([]) == line
    assert ep.refuse(line) == 2 and capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("flags, says", [
    ("--step 5", "did you mean --steps?"), ("--stepz 3", "did you mean --step or --steps?"),
    ("--topk 3", "did you mean --top-k?"),
    ("--dispatcher dedupe", "did you mean dedup?"), ("--dtype x --colour 3", "--help lists the flags"),
])  # fmt: skip
def test_what_was_meant_is_named(flags, says):
    assert check(flags.split()).endswith(f"; {says}")


@pytest.mark.parametrize("flags", [
    "", "--zipf 1e20 --task clusters --num-clusters 3 --sort-tokens", f"--seed {2**63 - 1}", "--timeout-s 604800",
    "--capacity-factor 1e6 --dispatcher capacity", "--capacity-factor 1e-9", "--bias-speed 0.1 --balance bias",
    "--aux-alpha 0.1 --balance bias --z-alpha 0.1", "--aux-alpha 0 --balance none",
    f"--sequence-alpha 0.1 --sequence-length {10**18}", f"--log-interval {10**18}", "--max-num-tokens 99999999999",
])  # fmt: skip
def test_what_is_accepted_at_the_edge_trains(flags, tmp_path):
    assert run_a_step(flags.split(), tmp_path).isfinite().all()


def test_the_time_limit_reaches_the_groups_of_the_mesh(tmp_path, monkeypatch):
    class Made(Exception):
        pass

    def init_ep(ep_size, **more):
        raise Made(ep_size, more)

    monkeypatch.setattr(ep, "init_ep", init_ep)
    config, options = ep.parse_flags(["--timeout-s", "7", "--ep-size", "1", "--log-dir", str(tmp_path)])
    with pytest.raises(Made) as made:
        ep.run_training(config, options, torch.device("cpu"))
    assert made.value.args == (1, {"timeout_s": 7})
