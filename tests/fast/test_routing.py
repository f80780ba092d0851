"""Chapter 09 on one rank: routers, balances, the clusters task, what the study claims."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from balance_trials import choose
from support import ROOT
from torch.utils.checkpoint import checkpoint

from ep_launcher import launcher as ep
from measure import balance as study

SIZES = {"num_experts": 8, "top_k": 2, "hidden_dim": 16, "ffn_dim": 32}


def config(options: dict | None = None, clusters: dict | None = None, **changes) -> ep.MoEConfig:
    groups = ep.RoutingOptions(**options or {}), ep.ClusterOptions(**clusters or {})
    return ep.MoEConfig(**SIZES | changes, extras=groups)


def pretend(rank: int, size: int) -> ep.Communicator:
    comm = ep.Communicator.alone()
    comm.rank, comm.size = rank, size
    return comm


def layer_of(*args, **changes) -> ep.EPMoE:
    """A layer of config(*args, **changes)."""
    return ep.EPMoE(config(*args, **changes), seed=0)


# ------------------------------------------------------------------------------------------- routers


def test_sigmoid_scores_and_weights_without_the_bias():
    router, x = ep.SigmoidRouter(config(router="sigmoid"), seed=0), torch.randn(20, 16)
    plain, bias = router(x), torch.tensor([0.0] * 6 + [10.0, 10.0])
    pushed = router(x, bias)
    scores = (x @ router.gate.weight.t() + router.gate.bias).sigmoid()
    assert torch.allclose(plain.topk_weights, scores.topk(2).values)
    assert (pushed.topk_ids.sort(1).values == torch.tensor([6, 7])).all()
    assert torch.allclose(pushed.topk_weights, scores.gather(1, pushed.topk_ids))
    assert torch.allclose(pushed.probs, scores / scores.sum(1, keepdim=True))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_normalised_weights_sum_to_one_in_their_old_proportions(router):
    x = torch.randn(9, 16)
    plain, divided = (layer_of({"normalize_topk": flag}, router=router).router(x) for flag in (False, True))
    assert torch.equal(plain.topk_ids, divided.topk_ids)
    assert torch.allclose(divided.topk_weights.sum(1), torch.ones(9))
    ratios = plain.topk_weights[:, 0] / plain.topk_weights[:, 1]
    assert torch.allclose(divided.topk_weights[:, 0] / divided.topk_weights[:, 1], ratios)
    assert not torch.allclose(plain.topk_weights.sum(1), torch.ones(9), atol=1e-3)


def test_weights_of_zero_are_not_nan():
    weights = torch.zeros(3, 2, requires_grad=True)
    divided = ep.RoutingOptions(normalize_topk=True).scale_weights(weights)
    divided.sum().backward()
    assert torch.equal(divided, torch.zeros(3, 2)) and weights.grad.isfinite().all()


@pytest.mark.parametrize(
    "experts, groups, kept, top_k",
    [(8, 4, 2, 2), (8, 4, 2, 4), (16, 4, 2, 6), (8, 8, 3, 2), (12, 3, 1, 2), (12, 3, 2, 3)],
)
def test_a_group_is_worth_its_best_top_k_over_topk_groups(experts, groups, kept, top_k):
    keys = torch.randn(50, experts)
    limited = ep.limit_to_groups(keys, groups, kept, top_k)
    reachable = kept * experts // groups
    assert ((limited == -math.inf).sum(1) == experts - reachable).all()
    ours = limited.topk(top_k).indices.sort(1).values
    assert torch.equal(ours, choose(keys, top_k, groups, kept).sort(1).values)


def test_groups_take_their_number_of_keys_from_the_config():
    keys = torch.tensor([[9.0, 0.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    options = ep.RoutingOptions(num_groups=4, topk_groups=1)
    for top_k, best in ((1, 0), (2, 1)):  # one key: 9 beats 5; two keys: 10 beats 9
        kept = options.limit_choice(keys, config(top_k=top_k)).isfinite()
        assert kept.tolist()[0] == [e // 2 == best for e in range(8)]


def test_the_scaling_factor_multiplies_the_weights_last():
    scaled = config({"normalize_topk": True, "routed_scaling_factor": 2.5})
    weights = ep.Router(scaled, seed=0)(torch.randn(9, 16)).topk_weights
    assert torch.allclose(weights.sum(1), torch.full((9,), 2.5))


# ------------------------------------------------------------------------------------------- losses and bias


def routing_of(logits: torch.Tensor, top_k: int = 2) -> ep.Routing:
    probs = logits.softmax(-1)
    weights, ids = probs.topk(top_k)
    return ep.Routing(ids, weights, probs, logits)


def test_z_loss_and_its_gradient():
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    options = ep.RoutingOptions(z_alpha=0.5)
    options.added_loss(routing_of(logits), config(), ep.Communicator.alone()).backward()
    lse = logits.exp().sum(1).log()
    by_hand = 0.5 * 2 * lse[:, None] * logits.softmax(1) / 6
    assert torch.allclose(logits.grad, by_hand.detach(), atol=1e-14)


@pytest.mark.parametrize("tokens, length", [(12, 4), (10, 4), (3, 4), (5, 1)])
def test_sequence_loss_by_loops(tokens, length):
    routing = routing_of(torch.randn(tokens, 8, dtype=torch.float64))
    expected = 0.0
    for start in range(0, tokens, length):
        p, ids = routing.probs[start : start + length], routing.topk_ids[start : start + length]
        f = [(ids == e).sum().item() / ids.numel() for e in range(8)]
        expected += len(p) * 8 * sum(f[e] * p[:, e].mean().item() for e in range(8))
    assert ep.sequence_loss_sum(routing, 2, length).item() == pytest.approx(expected, rel=1e-12)


def test_bias_moves_by_its_speed_against_the_load():
    balance = ep.BiasBalance(config({"bias_speed": 0.25}, num_experts=4), ep.Communicator.alone())
    for ids in ([[0, 1], [0, 2]], [[0, 1], [0, 2]]):  # two micro-batches: 4, 2, 2, 0 choices, mean 2
        routing = ep.Routing(torch.tensor(ids), torch.ones(2, 2), torch.full((2, 4), 0.25))
        assert balance(routing).item() == 0
        balance.load += ep.count_choices(routing.topk_ids, 4)
    balance.after_step()
    assert balance.bias.tolist() == [-0.25, 0, 0, 0.25] and balance.load.tolist() == [0] * 4
    balance.after_step()  # a step without tokens
    assert balance.bias.tolist() == [-0.25, 0, 0, 0.25]


def test_evaluation_does_not_move_the_bias():
    layer = layer_of(balance="bias", router="sigmoid")
    layer.eval()(torch.randn(16, 16))
    layer.balance.after_step()
    assert not layer.balance.bias.any()
    layer.train()(torch.randn(16, 16))
    ep.after_step(layer)
    assert layer.balance.bias.any()


def test_recomputation_counts_every_choice_once():
    layer, runs = layer_of(balance="bias", router="sigmoid"), []
    layer.router.register_forward_hook(lambda *_: runs.append(1))
    for num_batches in (1, 2):  # micro-batches
        x = torch.randn(64, 16, requires_grad=True)
        (checkpoint(layer, x, use_reentrant=False).sum() + ep.aux_loss(layer)).backward()
        assert len(runs) == 2 * num_batches and layer.balance.load.sum() == 128 * num_batches
        assert not layer.aux_shares


def test_counts_go_on_beyond_what_float32_can_count():
    layer = layer_of(balance="bias", router="sigmoid")
    balance = layer.balance
    balance.load[:] = 2**24
    layer(torch.randn(1, 16))
    assert balance.load.sub(2**24).tolist() == ep.count_choices(layer.topk_ids, 8).tolist()
    balance.load[:] = 2**24
    balance.load[0] += 1  # the mean is just above 2^24: a difference of one choice moves the bias
    balance.after_step()
    assert balance.bias.sign().tolist() == [-1] + [1] * 7


@pytest.mark.parametrize("convert", ["bfloat16", "half", "float", "double", "to"])
def test_the_bias_never_gets_narrower_than_float32(convert):
    layer = layer_of({"bias_speed": 0.001}, balance="bias", router="sigmoid")
    layer.balance.bias.fill_(0.5)
    layer.balance.load[0] = 300  # 256 in bfloat16's eight bits would be another number
    layer = layer.to(torch.bfloat16) if convert == "to" else getattr(layer, convert)()
    bias = layer.balance.bias
    assert bias.dtype == (torch.float64 if convert == "double" else torch.float32)
    assert layer.balance.load.dtype == torch.int64 and layer.balance.load[0] == 300
    ep.after_step(layer)
    assert bias is layer.balance.bias and bias.tolist() == pytest.approx([0.499] + [0.501] * 7, abs=1e-6)


def test_capacity_and_z_loss_meet():
    """The losses see what tokens wanted; the capacity comes after."""
    x, aux = torch.randn(40, 16), {}
    for factor in (None, 0.5):
        extras = (ep.CapacityOptions(factor), ep.RoutingOptions(z_alpha=0.5, sequence_alpha=0.5))
        layer = ep.EPMoE(ep.MoEConfig(**SIZES, extras=extras), seed=0)
        y = layer(x)
        aux[factor] = ep.aux_loss(layer)
        (y.square().mean() + aux[factor]).backward()
        assert (layer.topk_ids < 0).any() == (factor is not None)
        assert layer.router.gate.weight.grad.isfinite().all()
        assert layer.route(x).logits.shape == (40, 8)
    assert torch.equal(aux[None], aux[0.5]) and aux[None] > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_bias_is_float32_saved_and_not_trained(dtype):
    layer = layer_of(balance="bias", router="sigmoid", dtype=dtype)
    assert layer.state_dict()["balance.bias"].dtype == torch.float32
    assert "balance.load" not in layer.state_dict()
    assert not any(name.startswith("balance") for name, _ in layer.named_parameters())


def test_no_host_synchronisation():
    """Meta tensors hold no numbers: whoever asks for one fails."""
    meta = config(
        {"num_groups": 4, "topk_groups": 2, "z_alpha": 1.0, "sequence_alpha": 1.0, "normalize_topk": True},
        balance="bias", router="sigmoid",
    )  # fmt: skip
    router, balance = ep.SigmoidRouter(meta, 0, "meta"), ep.BiasBalance(meta, ep.Communicator.alone(), "meta")
    routing = router(torch.empty(10, 16, device="meta"), balance.bias)
    loss = balance(routing) + meta.option(ep.RoutingOptions).added_loss(routing, meta, balance.batch)
    loss.backward()
    bias = balance.bias
    balance.load += ep.count_choices(routing.topk_ids, meta.num_experts)
    balance.after_step()
    assert balance.bias is bias and balance.load.device.type == "meta"  # in place
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


@pytest.mark.parametrize("tokens, experts", [(0, 8), (4, 1), (0, 1), (1, 8)])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balance", ["none", "aux", "aux_local", "bias"])
def test_no_nan_without_tokens_or_with_one_expert(tokens, experts, router, balance):
    options = {"z_alpha": 0.5, "sequence_alpha": 0.5}
    layer = layer_of(options, num_experts=experts, top_k=1, router=router, balance=balance)
    y = layer(torch.randn(tokens, 16, requires_grad=True))
    aux = ep.aux_loss(layer)
    (y.sum() + aux).backward()
    ep.after_step(layer)
    assert aux.isfinite() and (tokens > 0 or aux == 0)
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert math.isfinite(shown_entropy(layer))


def shown_entropy(layer) -> float:
    """What the log gets."""
    shown = {}
    log = SimpleNamespace(show=lambda kind, step, values: shown.update(values))
    ep.RoutingOptions().show(log, 0, layer)
    return shown["routing/entropy"]


def test_entropy_is_one_for_no_opinion_and_zero_for_certainty():
    half = torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]])
    layer = layer_of()
    for probs, wanted in ((torch.full((5, 8), 1 / 8), 1), (torch.eye(8), 0), (half, 0.25), (half[:0], 0)):
        layer.probs = probs
        assert shown_entropy(layer) == pytest.approx(wanted)


def test_all_choices_are_documented_flags_and_bad_ones_one_line():
    text = ep.make_parser().format_help()
    for flag in ("--normalize-topk", "--routed-scaling-factor", "--num-groups", "--topk-groups", "--bias-speed",
                 "--z-alpha", "--sequence-alpha", "--sequence-length", "--num-clusters", "--zipf", "--sort-tokens",
                 ):  # fmt: skip
        assert flag in text


@pytest.mark.parametrize("argv, words", [
    (["--num-groups", "3"], "16 experts do not make 3 equal groups"), (["--num-groups", "0"], "num_groups is 0"),
    (["--topk-groups", "2"], "topk_groups is 2, above the 1 group"),
    (["--num-groups", "4", "--capacity-factor", "1", "--overflow", "reroute"], "out of its token's groups; take"),
    (["--num-groups", "8", "--top-k", "3"], "top_k is 3, and 1 group"),
    (["--normalize-topk", "--top-k", "1"], "teaches the router nothing"), (["--z-alpha", "-1"], "z_alpha is -1"),
    (["--routed-scaling-factor", "0"], "routed_scaling_factor is 0"),
    (["--bias-speed", "nan"], "bias_speed is nan"), (["--sequence-alpha", "inf"], "sequence_alpha is inf"),
    (["--sequence-length", "0"], "sequence_length is 0"), (["--num-clusters", "0"], "num_clusters is 0"),
    (["--zipf", "-0.5"], "zipf is -0.5"), (["--router", "tanh"], "router"), (["--balance", "luck"], "balance"),
    (["--task", "clowns"], "task"),
])  # fmt: skip
def test_bad_flags_are_one_line(argv, words):
    with pytest.raises(ValueError, match=words) as refused:
        ep.parse_flags(argv)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------- the task, the study


@pytest.mark.parametrize("num_tokens, is_sorted", [(9, False), (64, True), (1, False), (0, True)])
def test_cluster_shares_are_one_global_batch(num_tokens, is_sorted):
    layer = config(clusters={"sort_tokens": is_sorted, "num_clusters": 4}, dtype="float64")
    whole = ep.ClusterStream(layer, 5, num_tokens, pretend(0, 1))
    parts = [ep.ClusterStream(layer, 5, num_tokens, pretend(rank, 4)) for rank in range(4)]
    for _ in range(2):
        x, target, _ = whole.next()
        shares = [part.next() for part in parts]
        assert [len(share[0]) for share in shares] == [len(part) for part in x.tensor_split(4)]
        assert torch.equal(torch.cat([share[0] for share in shares]), x)
        assert torch.allclose(torch.cat([share[1] for share in shares]), target, atol=1e-14)


def test_clusters_follow_zipf_and_have_teachers_of_their_own():
    layer = config(clusters={"num_clusters": 4, "zipf": 1.0}, dtype="float64")
    stream = ep.ClusterStream(layer, 0, 20000, ep.Communicator.alone())
    x, target, clusters = stream.next()
    shares = torch.bincount(clusters, minlength=4) / 20000
    assert torch.allclose(shares.double(), torch.tensor([12, 6, 4, 3]).double() / 25, atol=0.015)
    assert x.var().item() == pytest.approx(1, abs=0.05)
    for c in range(4):
        own = x[clusters == c] @ stream.teachers[c].t()
        assert torch.allclose(own, target[clusters == c], atol=1e-12)
    assert (stream.teachers[0] - stream.teachers[1]).abs().max() > 0.1
    assert target.square().mean().item() == pytest.approx(1 / 3, abs=0.08)


def test_sorted_tokens_keep_a_rank_to_few_clusters():
    distinct = {}
    for is_sorted in (False, True):
        layer = config(clusters={"sort_tokens": is_sorted, "num_clusters": 16, "zipf": 0.0})
        stream = ep.ClusterStream(layer, 0, 256, pretend(1, 4))
        distinct[is_sorted] = len(stream.next()[2].unique())
    assert distinct[True] <= 6 < 12 <= distinct[False]


@pytest.fixture(scope="module")
def short_study(build) -> dict[str, dict]:
    """What the study measures, after 500 steps of three methods."""
    torch.set_num_threads(1)
    return {name: study.train(study.METHODS[name], 1, 500, 4e-3) for name in ("none", "aux", "bias")}


def test_the_router_collapses_without_balance_and_not_with_it(short_study):
    assert short_study["none"]["max_over_mean"] > 3
    for name in ("aux", "bias"):
        assert short_study[name]["max_over_mean_tail"] < 1.2
        assert short_study[name]["dropped_fraction"] < 0.3 * short_study["none"]["dropped_fraction"]
        assert short_study["none"]["task_loss"] < short_study[name]["task_loss"]


def test_the_recorded_study_holds_what_the_chapter_reads():
    found = json.loads((ROOT / "results/cpu_balance.json").read_text())
    assert found["settings"] == json.loads(json.dumps(study.METHODS))  # not older than the methods
    assert {"device", "torch", "command", "steps"} <= set(found) and set(found["runs"]) == set(study.METHODS)
    for runs in found["runs"].values():
        assert {"load_over_time", "task_loss_over_time", "max_over_mean", "z_loss"} <= set(runs[0])


def test_the_study_drops_for_its_last_column_and_only_there():
    torch.set_num_threads(1)
    assert study.capacity() == 40  # ceil(256 * 2 * 1.25 / 16)
    config, _ = study.make_config(study.METHODS["none"])
    model = ep.EPMoE(config, seed=0)
    with torch.no_grad():
        model.router.gate.bias[0] += 4  # everybody wants expert 0
    stream = ep.ClusterStream(config, 0, study.NUM_TOKENS, model.mesh.batch)
    x, target, _ = stream.next()
    whole = (model(x) - target).square().mean().item()
    assert abs(study.loss_with_capacity(model, stream) - whole) > 1e-3
    assert (model.topk_ids < 0).sum() > 200 and not model.config.hooks("after_routing")
    assert (model(x) - target).square().mean().item() == pytest.approx(whole)
