"""Chapter 16 without processes: what is refused, the split, the schedule, and the count of operations."""

import argparse
import bz2
import hashlib
import json
import lzma
from dataclasses import replace

import pytest
import torch

from ep_launcher import launcher as ep
from measure import corpus, language

TEXT = "--model lm --task text"
TINY = f"{TEXT} --hidden-dim 16 --ffn-dim 16 --num-heads 2 --num-experts 4 --activation swiglu"


def refusal(flags: str) -> str:
    with pytest.raises(ValueError) as error:
        ep.check_run(*ep.parse_flags(f"{flags} --device cpu".split()))
    assert "\n" not in str(error.value)
    return str(error.value)


def model_of(flags: str = "", device: str = "cpu") -> ep.Decoder:
    config, _ = ep.parse_flags(f"{TINY} {flags}".split())
    return ep.Decoder(config, ep.init_ep(), 0, device)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--model lm", "--task text"),
        ("--task text", "--model lm"),
        ("--num-layers 8", "does nothing without the decoder"),
        ("--context 64", "does nothing without a text"),
        (f"{TEXT} --num-layers 0", "num_layers"),
        (f"{TEXT} --hidden-dim 30", "no multiple of 4 heads"),
        (f"{TEXT} --num-kv-heads 3", "must divide num_heads"),
        (f"{TEXT} --head-dim 15", "must be even"),
        (f"{TEXT} --qk-norm some", "none, head or all"),
        (f"{TEXT} --dense-layers 4", "--num-experts 1"),
        (f"{TEXT} --dense-layers 5", "dense_layers"),
        (f"{TEXT} --rope-theta nan", "rope_theta"),
        (f"{TEXT} --tokens 100", "no whole sequences of 32"),
        (f"{TEXT} --tokens 256", "--max-num-tokens"),
        (f"{TEXT} --context 500000 --tokens 500000 --max-num-tokens 500000", "take a longer text"),
        (f"{TEXT} --warmup-steps -1", "warmup_steps"),
        ("--warmup-steps 21 --steps 20", "warmup_steps is 21, and the run has 20 steps"),
        (f"{TEXT} --final-lr 2", "final_lr"),
        (f"{TEXT} --text-file /no/such/file.txt", "cannot read"),
        (f"{TEXT} --text-file /dev/zero", "no regular file"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(flags, words):
    assert words in refusal(flags)


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("empty.txt", b"", "leaves 0 bytes"),
        ("short.txt", b"x" * 33, "a context is 32"),
        ("latin.txt", "Zo\xeb".encode("latin-1") * 99, "not UTF-8, at byte 2"),
        ("cut.bz2", bz2.compress(b"text " * 999)[:-9], "cannot read"),
        ("no.bz2", b"text " * 999, "cannot read"),
    ],
)
def test_a_bad_text_is_refused_in_one_line(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    assert words in refusal(f"{TEXT} --text-file {tmp_path / name}")


def test_documents_are_held_out_whole():
    data = b"\f".join(bytes([65 + n]) * 10 for n in range(15))
    training, held_out = ep.split_documents(data)
    assert set(held_out) == set(b"GN") and len(training) == 130 and not set(training) & set(held_out)
    training, held_out = ep.split_documents(bytes(range(100)))
    assert training + held_out == bytes(range(100)) and len(held_out) == 10


def test_the_books_text_is_the_one_that_is_pinned(tmp_path, monkeypatch):
    assert len(ep.read_text(ep.BOOK_TEXT)) == 1_846_488
    (tmp_path / "plays.txt").write_bytes(ep.read_text(ep.BOOK_TEXT) + b"!")
    monkeypatch.setattr(ep, "BOOK_TEXT", tmp_path / "plays.txt")
    with pytest.raises(ValueError, match="not the book's text"):
        ep.read_text(tmp_path / "plays.txt")


def test_a_position_sees_what_is_before_it_alone():
    model = model_of("--dtype float64 --qk-norm all --num-kv-heads 1").eval()
    ids = torch.randint(256, (2, 12))
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % 256
    moved = (model(ids) - model(changed)).abs().amax((0, 2))
    assert (moved[:7] < 1e-12).all() and (moved[7:] > 1e-9).all()  # up to rounding


def test_no_sequences_are_no_trouble():
    model = model_of()
    loss = ep.cross_entropy_sum(
        model(torch.zeros(0, 8, dtype=torch.long)), torch.zeros(0, 8, dtype=torch.long)
    )
    loss.backward()
    assert loss == 0


def test_bfloat16_computes_and_float32_keeps():
    model = model_of("--dtype bfloat16")
    logits = model(torch.randint(256, (2, 8)))
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert (
        {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    )
    exact = model_of()(torch.randint(256, (1, 8)))
    assert exact.dtype == torch.float32


def test_recomputation_changes_no_number():
    ids, found = torch.randint(256, (2, 8)), []
    for flags in ("", "--recompute"):
        model = model_of(f"--dtype float64 --dense-layers 1 {flags}")
        (model(ids).square().mean() + ep.aux_loss(model)).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_evaluation_leaves_no_trace():
    model = model_of("--balance bias --router sigmoid")
    task = ep.TextStream(model.config, 0, 64, ep.init_ep().batch)
    layer, before = ep.moe_layers(model)[0], [t.clone() for t in model.state_dict().values()]
    counted, meter = [], layer.mesh.meter  # as by kernels, which count on the device until somebody reads
    layer.register_forward_hook(lambda *_: counted.append(1))

    def read() -> None:
        meter.sent["dispatch"] = [sum(meter.sent.get("dispatch", [0])) + len(counted)]
        counted.clear()

    meter.readers.append(read)
    model(task.next()[0])
    ids, load, shares = layer.topk_ids, layer.balance.load.clone(), len(layer.aux_shares)
    ep.held_out_loss(model, task, 256)
    assert meter.total("dispatch") == 1
    assert layer.topk_ids is ids and torch.equal(layer.balance.load, load) and len(layer.aux_shares) == shares
    assert model.training and all(
        torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True)
    )


def test_a_run_may_be_all_warm_up():
    ep.check_run(*ep.parse_flags("--warmup-steps 20 --steps 20 --device cpu".split()))


def test_the_learning_rate_rises_and_falls():
    _, options = ep.parse_flags("--steps 100 --lr 0.5".split())
    schedule = ep.ScheduleOptions(warmup_steps=10, final_lr=0.1)
    rates = [ep.scheduled_lr(schedule, options, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)]) and max(rates) == 0.5
    assert rates[-1] == pytest.approx(0.05) and rates[10:] == sorted(rates[10:], reverse=True)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.5)
    ep.set_lr(optimizer, ep.ScheduleOptions(), options, 50)
    assert optimizer.param_groups[0]["lr"] == 0.5
    ep.set_lr(optimizer, schedule, options, 0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_operations_are_those_that_torch_counts():
    """FlopCounterMode sees every product; it counts all of attention's scores, of which the mask leaves half."""
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = (
        model_of("--num-layers 2 --dense-layers 1 --experts loop --qk-norm head"),
        torch.randint(256, (2, 64)),
    )
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(ids)
    masked = 2 * 2 * 16 * 64  # of a token's scores and sums, in two layers, what the mask leaves out
    ours = 128 * (ep.training_flops(model, 64) / 3 + masked)
    assert counter.get_total_flops() == pytest.approx(
        ours, rel=0.03
    )  # norms and biases are numbers, not products


def test_published_settings_that_the_decoder_lacks_are_named(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        ep.from_pretrained(tmp_path, ep.init_ep())
    settings = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    settings |= {"rms_norm_eps": 1e-6, "vocab_size": 9, "num_experts": 4, "num_experts_per_tok": 2}
    assert ep.config_from_hf(settings, {}).num_experts == 4
    for name, value in {"attention_bias": True, "clip_qkv": 8.0, "sliding_window": 4, "n_group": 2}.items():
        with pytest.raises(ValueError, match=name):
            ep.config_from_hf(settings | {name: value}, {})
    with pytest.raises(ValueError, match="yarn"):
        ep.config_from_hf(settings | {"rope_parameters": {"rope_type": "yarn"}}, {})
    with pytest.raises(ValueError, match="dense layers come first"):
        ep.config_from_hf(settings | {"mlp_only_layers": [1]}, {})
    with pytest.raises(ValueError, match="experts.3.w9.weight"):
        ep.layer_from_hf({"experts.3.w9.weight": torch.zeros(1)})
    assert json.dumps(settings)


def test_the_clamped_activation_is_right_in_every_kind_of_experts():
    """Against the dense reference, with inputs that reach the clamps."""
    torch.manual_seed(0)
    config = ep.MoEConfig(4, 2, 8, 16, dtype="float64", activation="clamped_swiglu", dispatcher="local")
    x = 12 * torch.randn(40, 8, dtype=torch.float64)
    for kind in ("loop", "bmm", "blocks"):
        layer = ep.EPMoE(replace(config, experts=kind), seed=1)
        y = layer(x)
        right, _ = ep.dense_moe(x, dict(layer.state_dict()), 2, activation="clamped_swiglu")
        assert torch.allclose(y, right, rtol=1e-10, atol=1e-12), kind


def test_the_sources_are_refused_where_they_are_other_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PACKED", tmp_path / "python.txt.xz")
    monkeypatch.setattr(corpus, "TEXT", tmp_path / "python.txt")
    with pytest.raises(ValueError, match="measure/corpus.py"):
        corpus.unpacked()
    corpus.PACKED.write_bytes(lzma.compress(b"another version"))
    with pytest.raises(ValueError, match="Python 3.11.7 and torch 2.13.0"):
        corpus.unpacked()
    assert not corpus.TEXT.exists()
    monkeypatch.setattr(corpus, "SHA256", hashlib.sha256(b"a\fb").hexdigest())
    corpus.PACKED.write_bytes(lzma.compress(b"a\fb"))
    assert corpus.unpacked().read_bytes() == b"a\fb"


def test_equal_time_is_equal_milliseconds_as_timed_alone():
    times = {"experts": {"graph": {"median_ms": 12.0}}, "dense": {"graph": {"median_ms": 8.0}}}
    job = next(job for job in language.gpu_jobs("tiny", "tiny") if job.name == "dense, equal time")
    assert language.steps_of(job, argparse.Namespace(steps=100), times) == 150
    of_job = language.with_time({"curve": [[10, 9.9, 2.0, 3.0]], "ms_per_step": 990.0}, times, job.timed_as)
    assert of_job == {"curve": [[10, 0.08, 2.0, 3.0]], "ms_per_step": 8.0, "ms_beside_others": 990.0}
