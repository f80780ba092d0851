"""Chapter 13 without processes: what is refused, the planner, the cache. Its kernels are in test_kernels.py."""

import json
import re

import pytest
import torch

from ep_launcher import launcher as ep

ALONE = ep.Mesh(*[ep.Communicator.alone()] * 3)


def layer_of(**changes) -> ep.EPMoE:
    return ep.EPMoE(ep.MoEConfig(8, 2, 16, 24, **changes), ALONE, seed=0).eval()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tokens 0", "tokens and rounds must be at least 1"),
        ("--rounds -1", "tokens and rounds must be at least 1"),
        ("--rounds x", "argument --rounds: invalid int value: 'x'"),
        ("--round 3", "unrecognized arguments: --round 3; did you mean --rounds?"),
        ("--top-k 20", "top_k"),
        ("--hidden-dim 4194304 --ffn-dim 4194304", "a rank would hold"),
        ("--output /proc/nowhere", "error:"),
    ],
)
def test_a_bad_size_is_refused_before_anything_is_allocated(flags, said, capsys, monkeypatch):
    monkeypatch.setattr(ep, "EPMoE", None)  # nobody gets that far
    assert ep.bench_inference(["--device", "cpu", *flags.split()]) == 2
    assert said in capsys.readouterr().err


def test_bench_inference_writes_what_it_prints(tmp_path, capsys):
    flags = f"--device cpu --hidden-dim 16 --ffn-dim 16 --tokens 1 4 --rounds 5 --output {tmp_path}"
    assert ep.bench_inference(flags.split()) == 0
    found = json.loads((tmp_path / "cpu_bench_inference.json").read_text())
    assert [line["tokens"] for line in found["lines"]] == [1, 4] and found["lines"][0]["experts"] == 2
    assert found["lines"][0]["inference_us"] <= found["lines"][0]["inference_p99_us"]
    assert "4 tokens" in capsys.readouterr().out


def test_a_file_that_can_no_longer_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    line = ep.bench_line

    def and_a_folder_in_its_place(*measured):
        (tmp_path / "cpu_bench_inference.json").mkdir()
        return line(*measured)

    monkeypatch.setattr(ep, "bench_line", and_a_folder_in_its_place)
    flags = f"--device cpu --hidden-dim 16 --ffn-dim 16 --tokens 1 --rounds 5 --output {tmp_path}"
    assert ep.bench_inference(flags.split()) == 2
    assert re.fullmatch(r"error: cannot write \S+ \(.*\); .*\n", capsys.readouterr().err)


def test_what_for_inference_refuses():
    layer, x = layer_of(), torch.randn(3, 16)
    for wrong, said in (
        ({"max_num_tokens": 0}, "max_num_tokens"),
        ({"max_num_tokens": 4.0}, "max_num_tokens is 4.0"),
        ({"max_num_tokens": 4, "sizes": (8,)}, "sizes has 8"),
        ({"max_num_tokens": 4, "sizes": (2.0,)}, "sizes has 2.0"),
        ({"max_num_tokens": 4, "placement": torch.arange(9)}, "placement has expert 8"),
        ({"max_num_tokens": 4, "placement": torch.arange(8) - 1}, "placement has expert -1"),
        ({"max_num_tokens": 4, "placement": torch.arange(8.0)}, "must be int64"),
        ({"max_num_tokens": 4, "placement": torch.arange(7)}, "num_physical is 7"),
        ({"max_num_tokens": 4, "placement": torch.zeros(8, dtype=torch.int64)}, "placement has no expert 1"),
    ):
        with pytest.raises(ValueError, match=said):
            ep.for_inference(layer, **wrong)
    fast = ep.for_inference(layer, 4)
    for call, said in (
        (lambda: fast(torch.randn(5, 16)), "above max_num_tokens 4"),
        (lambda: fast(x, largest=2), "largest is 2"),
        (lambda: fast(x, largest=5), "largest is 5"),
        (lambda: fast(x.double()), "convert one of them"),
        (lambda: fast(x.requires_grad_()), "x asks for a gradient"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_no_tokens_and_other_shapes():
    layer, x = layer_of(), torch.randn(3, 16)
    for sizes in (None, (8,)):
        fast = ep.for_inference(layer, 8, sizes)
        assert fast(x[:0]).shape == (0, 16) and torch.equal(fast(x.view(3, 1, 16)).flatten(0, 1), fast(x))


def test_a_layer_of_a_run_is_not_bound_to_its_batches():
    """A run had told the dispatcher of 2 tokens; the answers come in batches of 6."""
    layer = layer_of(dispatcher="gather_tokens", extras=(ep.TrafficOptions(slot_tokens=2),))
    x, plan = torch.randn(6, 16), ep.plan_copies(torch.arange(8.0), 10, 1)
    expected = ep.EPMoE(ep.MoEConfig(8, 2, 16, 24), ALONE, seed=0).eval()(x)
    for fast in (
        ep.for_inference(layer, 6),
        ep.for_inference(layer, 6, (6,)),
        ep.for_inference(layer, 6, placement=plan),
    ):
        assert torch.allclose(fast(x), expected, atol=1e-6)


def test_a_layer_with_a_capacity_has_no_padding():
    layer = layer_of(extras=(ep.CapacityOptions(capacity_factor=1.0),))
    with pytest.raises(ep.CannotRun, match="would count padding"):
        ep.for_inference(layer, 8, sizes=(8,))
    x = torch.randn(5, 16)
    assert torch.equal(ep.for_inference(layer, 8)(x), layer(x))


def test_the_planner_spreads_one_hot_expert():
    loads = torch.tensor([70, 1, 1, 1, 1, 1, 1, 1])
    plan = ep.plan_copies(loads, 12, 4)
    assert (plan == 0).sum() == 5 and set(plan.tolist()) == set(range(8))
    copies = ep.copies_of(plan, 8)
    ids = torch.zeros(100, 1, dtype=torch.int64)
    by_rank = ep.count_choices(ep.choose_copies(ids, copies), 12).view(4, 3).sum(1)
    assert by_rank.sum() == 100 and by_rank.max() <= 40
    assert ep.choose_copies(torch.tensor([[-1, 3]]), copies).tolist() == [[-1, (plan == 3).nonzero().item()]]
    for wrong in (loads[None], -loads, loads * float("nan")):
        with pytest.raises(ValueError, match="loads have shape"):
            ep.plan_copies(wrong, 12, 4)
    for wrong in ((12, 0), (7, 1), (13, 4), (12, 4, 3), (12, 4, 4, 3), (12, 4, 8, 3)):
        with pytest.raises(ValueError):
            ep.plan_copies(loads, *wrong)


def test_each_policy_lets_go_of_another_one():
    """Expert 0 was needed often and long ago, 1 rarely and just now: who leaves for 2?"""
    left = {}
    for policy in ep.REGISTRIES["cache_policy"]:
        cache = ep.ExpertCache({"w1": torch.arange(3.0)[:, None]}, 2, policy, None, torch.device("cpu"))
        for experts in [[0]] * 3 + [[1]] * 2 + [[2]]:
            cache.fetch(experts)
            cache.policy.use(experts)
        assert cache.slots["w1"][cache.slot_of[2]] == 2 and cache.misses == 3 and cache.hits == 3
        left[policy] = ({0, 1} - set(cache.slot_of)).pop()
    assert left == {"lru": 0, "lfu": 1, "decayed": 1}
    ep_policy = ep.DecayedFrequency(2)
    for _ in range(40000):
        ep_policy.use([0])
    assert 0 < ep_policy.worth(0) < float("inf") and ep_policy.worth(1) == 0
    with pytest.raises(ValueError, match="num_slots is 4"):
        ep.ExpertCache({"w1": torch.zeros(3, 1)}, 4, "lru", None, torch.device("cpu"))
    with pytest.raises(ValueError, match="take one of lru, lfu, decayed"):
        ep.ExpertCache({"w1": torch.zeros(3, 1)}, 1, "mru", None, torch.device("cpu"))


def test_what_a_cached_layer_takes():
    layer = layer_of(activation="swiglu")
    host, cpu = {name: p.detach() for name, p in layer.experts.named_parameters()}, torch.device("cpu")
    cache = ep.ExpertCache(host, 3, "lru", ep.SwiGLU, cpu)
    cached = ep.CachedMoE(layer.router, cache)
    assert cached(torch.randn(0, 16)).shape == (0, 16)
    for x in (torch.randn(2, 15), torch.randn(1, 2, 16), torch.randn(16)):
        with pytest.raises(ValueError, match="wants \\[T, 16\\]"):
            cached(x)
    with pytest.raises(ValueError, match="ahead is -1"):
        ep.CachedMoE(layer.router, cache, ahead=-1)
    with pytest.raises(ValueError, match="w2 has 4 experts"):
        ep.ExpertCache(host | {"w2": host["w2"][:4]}, 3, "lru", ep.SwiGLU, cpu)
    with pytest.raises(ValueError, match="num_slots is 2.5"):
        ep.ExpertCache(host, 2.5, "lru", ep.SwiGLU, cpu)


def test_expected_hits_at_the_ends():
    even = torch.full((10,), 0.3)
    for policy in ep.REGISTRIES["cache_policy"]:
        assert ep.expected_hits(even, 10, policy) == (1.0, 1.0)
        low, high = ep.expected_hits(even, 5, policy)
        assert (
            low <= 0.5 + 1e-6 and abs(high - 0.5) < 1e-6
        )  # nobody can do better than half, where all are alike
