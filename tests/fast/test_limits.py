"""Capacity on one rank: its arithmetic, who keeps a place, gradients of the dropped, fixed shapes, the flags."""

from decimal import ROUND_CEILING, Decimal

import capacity_parity as slow
import pytest
import torch

from ep_launcher import launcher as ep


def limit_load(routing: ep.Routing, layer_config: ep.MoEConfig, batch: ep.Communicator) -> ep.Routing:
    return layer_config.option(ep.CapacityOptions).after_routing(routing, layer_config, batch)


def config(factor: float | None = 1.0, dispatcher: str = "all_gather", **changes) -> ep.MoEConfig:
    """A small layer with a capacity; keyword arguments go to the options or the config, wherever they belong."""
    known = {f.name for f in ep.fields(ep.CapacityOptions)}
    options = {name: changes.pop(name) for name in list(changes) if name in known}
    sizes = {"num_experts": 8, "top_k": 2, "hidden_dim": 16, "ffn_dim": 32, "dtype": "float64"}
    sizes |= {"max_num_tokens": 128} | changes
    return ep.MoEConfig(
        **sizes, dispatcher=dispatcher, extras=(ep.CapacityOptions(factor, **options),)
    )  # fmt: skip


def routed(num_tokens: int, num_experts: int, top_k: int, levels: int, seed: int) -> ep.Routing:
    """Random probabilities of few levels, so that many are equal; choices as topk makes them."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randint(1, levels + 1, (num_tokens, num_experts), generator=generator).double()
    probs[:, 0] += levels // 2  # a favourite
    probs = probs / probs.sum(1, keepdim=True)
    ids = probs.topk(top_k).indices
    return ep.Routing(ids, probs.gather(1, ids), probs)


@pytest.mark.parametrize("tokens, top_k, experts, factor, expected", [
    (100, 1, 1, 1.1, 110), (32, 2, 16, 1.0, 4), (33, 2, 16, 1.0, 5), (0, 2, 16, 1.5, 0), (10, 1, 3, 0.3, 1),
    (30, 1, 10, 0.1, 1), (1000, 3, 10, 0.7, 210), (7, 2, 16, 1e-9, 1), (128, 8, 256, 1.25, 5),
])  # fmt: skip
def test_capacity_is_exact(tokens, top_k, experts, factor, expected):
    layer = config(num_experts=experts, top_k=top_k)
    assert ep.expert_capacity(tokens, layer, factor) == expected


def test_capacity_of_tokens_counted_on_the_device():
    tokens, layer = torch.tensor([0, 32, 33]), config(num_experts=16)
    assert ep.expert_capacity(tokens, layer, 1.0).tolist() == [0, 4, 5]
    assert ep.expert_capacity(tokens, layer, 1e-7).tolist() == [0, 1, 1]


def test_capacity_is_the_decimal_formula():
    layer = config(num_experts=10, top_k=3)  # a divisor that decimals can divide by
    for tokens in (1, 32, 100, 999):
        for factor in ("0.1", "0.55", "1.1", "1.25", "2.3", "7"):
            exact = (Decimal(tokens * 3) * Decimal(factor) / 10).to_integral_value(ROUND_CEILING)
            assert ep.expert_capacity(tokens, layer, float(factor)) == exact


def test_places_are_a_queue():
    wanted = torch.tensor([2, 0, 2, -1, 2, 0])
    assert ep.claim_places(wanted, None, 3)[wanted >= 0].tolist() == [0, 0, 1, 2, 1]
    priority = torch.tensor([0.1, 0.2, 0.5, 0.9, 0.5, 0.3])
    assert ep.claim_places(wanted, priority, 3)[wanted >= 0].tolist() == [2, 1, 0, 1, 0]


def test_equal_probabilities_go_by_token():
    probs = torch.full((5, 4), 0.25)
    ids = torch.tensor([[0, 1]] * 5)
    for order in ("probs", "position"):
        kept = ep.drop_overflow(ids, probs, 2, order)
        assert kept.tolist() == [[0, 1]] * 2 + [[-1, -1]] * 3
        moved = ep.reroute_overflow(ids, probs, 2, order)
        assert moved.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [-1, -1]]


@pytest.mark.parametrize("order", ["probs", "position"])
@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_choices_are_those_of_a_slow_reference(overflow, order):
    """Token by token in plain Python, with many equal probabilities."""
    num_moved = num_lost = 0
    for seed in range(60):
        experts, top_k = [(4, 1), (6, 2), (8, 3), (5, 5)][seed % 4]
        routing = routed(1 + seed % 23, experts, top_k, levels=3 + seed % 5, seed=seed)
        for capacity in (1, 3, 6):
            ours = ep.REGISTRIES["overflow"][overflow](routing.topk_ids, routing.probs, capacity, order)
            expected = slow.slow_overflow(
                routing.topk_ids.tolist(), routing.probs.tolist(), capacity, overflow, order
            )
            assert ours.tolist() == expected, (seed, capacity)
            num_lost += int((ours < 0).sum())
            num_moved += int(((ours != routing.topk_ids) & (ours >= 0)).sum())
    assert num_lost > 100 and (num_moved > 100) == (overflow == "reroute")


@pytest.mark.parametrize("order", ["probs", "position"])
def test_reroute_loses_only_what_no_other_expert_can_take(order):
    for seed in range(40):
        routing = routed(20, 8, 3, levels=5, seed=seed)
        capacity = 3 + seed % 6
        dropped = ep.drop_overflow(routing.topk_ids, routing.probs, capacity, order)
        ids = ep.reroute_overflow(routing.topk_ids, routing.probs, capacity, order)
        assert torch.equal(ids[dropped >= 0], dropped[dropped >= 0])  # who has a place keeps it
        load = ep.count_choices(ids, 8)
        assert load.max() <= capacity
        for t, line in enumerate(ids.tolist()):
            held = [e for e in line if e >= 0]
            assert len(set(held)) == len(held)
            if len(held) < 3:
                wanted = set(range(8)) - set(held)
                assert all(load[e] == capacity for e in wanted), (seed, t)


def test_a_moved_choice_of_score_0_is_no_nan():
    """A bias may choose an expert whose softmax is 0 to the last digit."""
    layer = ep.EPMoE(config(1.0, top_k=1, overflow="reroute", balance="bias"), seed=0)
    with torch.no_grad():
        layer.router.gate.bias[0], layer.balance.bias[0] = -2000, 2
    x = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (1000 * y).sum().backward()
    assert (layer.topk_ids == 0).any() and (moved := layer.topk_ids[:, 0] > 0).any()
    assert (y[moved].norm(dim=1) > 0).all()
    assert x.grad.isfinite().all() and layer.router.gate.weight.grad.isfinite().all()


def test_a_choice_that_was_not_sent_stays_so():
    routing = routed(6, 4, 2, levels=4, seed=1)
    routing.topk_ids[2, 1] = routing.topk_ids[4, 0] = -1
    for policy in ep.REGISTRIES["overflow"].values():
        ids = policy(routing.topk_ids, routing.probs, 100, "probs")
        assert torch.equal(ids, routing.topk_ids)
        assert policy(routing.topk_ids, routing.probs, 1, "probs")[2, 1] == -1


@pytest.mark.parametrize("is_scaled", [False, True], ids=["scores", "renormalised"])
@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_dropped_gradients_are_zero_and_the_others_right(overflow, is_scaled):
    """Weights are scores, or scores divided by their sum; a moved choice's weight follows its router's rule."""
    routing = routed(30, 8, 2, levels=50, seed=3)
    probs = routing.probs.requires_grad_()
    scores = probs.gather(1, routing.topk_ids)
    total = scores.sum(1, keepdim=True) if is_scaled else torch.ones(30, 1)
    routing = ep.replace(routing, topk_weights=scores / total)
    limited = limit_load(routing, config(0.6, overflow=overflow), ep.Communicator())
    lost, kept = limited.topk_ids < 0, limited.topk_ids == routing.topk_ids
    moved = ~lost & ~kept
    assert lost.any() and kept.any() and moved.any() == (overflow == "reroute")
    assert (limited.topk_weights[lost] == 0).all()
    assert torch.equal(limited.topk_weights[kept], routing.topk_weights[kept])
    expected = probs.gather(1, limited.topk_ids.clamp(min=0)) / total * ~lost
    assert torch.allclose(limited.topk_weights, expected, rtol=1e-13)
    upstream = torch.rand(30, 2).double() + 1
    ours, right = (torch.autograd.grad((w * upstream).sum(), probs, retain_graph=True)[0]
                   for w in (limited.topk_weights, expected))  # fmt: skip
    assert torch.allclose(ours, right, rtol=1e-12, atol=1e-14)


def test_a_dropped_choice_gets_no_gradient_at_all():
    routing = routed(30, 8, 2, levels=50, seed=3)
    weights = routing.topk_weights.requires_grad_()
    limited = limit_load(routing, config(0.6), ep.Communicator())
    upstream = torch.rand(30, 2).double() + 1
    (limited.topk_weights * upstream).sum().backward()
    lost = limited.topk_ids < 0
    assert lost.any() and (weights.grad[lost] == 0).all()
    assert torch.equal(weights.grad[~lost], upstream[~lost])


def test_a_token_without_a_place_returns_zero():
    layer = ep.EPMoE(config(0.05, "capacity"), seed=0)
    x = torch.randn(32, 16, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    gone = (layer.topk_ids < 0).all(dim=1)
    assert 0 < gone.sum() < 32
    assert (y[gone] == 0).all() and (y[~gone].abs().sum(1) > 0).all()
    assert (x.grad[gone] == 0).all()


@pytest.mark.parametrize("dispatcher", ["all_gather", "capacity"])
def test_a_large_factor_changes_nothing(dispatcher):
    x = torch.randn(20, 16, dtype=torch.float64)
    dropless = ep.EPMoE(ep.replace(config(), extras=()), seed=0)
    roomy = ep.EPMoE(config(1000.0, dispatcher), seed=0)
    assert torch.allclose(dropless(x), roomy(x), rtol=0, atol=1e-14)
    assert torch.equal(dropless.topk_ids, roomy.topk_ids)


def test_auto_does_not_take_the_fixed_buffers(monkeypatch):
    """They are for whoever asks for them: without a capacity they cannot be. Whatever came first in the registry."""
    first_come = dict(sorted(ep.REGISTRIES["dispatcher"].items(), key=lambda item: item[0] != "capacity"))
    monkeypatch.setitem(ep.REGISTRIES, "dispatcher", first_come)
    for device in ("cpu", "cuda"):
        for size in (1, 2, 8):
            auto = ep.replace(config(), dispatcher="auto")
            name = ep.pick("dispatcher", auto, device, size)
            assert not ep.REGISTRIES["dispatcher"][name].needs_capacity


def test_fixed_buffers_want_a_capacity_on_each_rank():
    for options in ({"factor": None}, {"capacity_scope": "global"}):
        with pytest.raises(ValueError, match="need a limit on each rank; set --capacity-factor"):
            config(dispatcher="capacity", **options)
    bare = ep.MoEConfig(num_experts=8, top_k=2, dispatcher="capacity")
    with pytest.raises(ValueError, match="need a limit on each rank"):
        ep.EPMoE(bare, seed=0)
    with pytest.raises(ValueError, match="set max_num_tokens"):
        config(dispatcher="capacity", max_num_tokens=None)


def test_auto_likes_what_wants_a_capacity_least():
    device, kinds = torch.device("cpu"), ep.REGISTRIES["dispatcher"]
    liking = {name: kind.preference(ep.MoEConfig(), device, 2) for name, kind in kinds.items()}
    assert (
        0
        < liking["capacity"]
        < min(likes for name, likes in liking.items() if name not in ("capacity", "local"))
    )
    assert max(liking, key=liking.get) == "all_to_all" and liking["local"] == 0


def test_a_layer_alone_keeps_buffers_for_its_largest_batch():
    for factor, share, block in ((1.0, None, 32), (1.0, 10, 3), (1.0, 0, 1), (1000.0, None, 128)):
        limited = config(factor, "capacity", max_num_tokens=128, capacity_share=share)
        dispatcher = ep.CapacityDispatcher.for_layer(limited, ep.Communicator())
        assert dispatcher.capacity == block  # with a large factor 128: a token comes once at most


def test_a_library_layer_without_a_largest_batch_has_a_capacity_too():
    x = torch.randn(40, 16, dtype=torch.float64)
    limited, unlimited = (ep.EPMoE(config(0.5, max_num_tokens=n), seed=0) for n in (128, None))
    assert torch.equal(limited(x), unlimited(x)) and (unlimited.topk_ids < 0).any()


def test_buffers_have_one_size_whatever_the_routing():
    layer = ep.EPMoE(config(1.0, "capacity", capacity_share=40), seed=0)
    for seed, tokens in ((0, 40), (1, 40), (2, 3), (3, 0)):
        torch.manual_seed(seed)
        x = torch.randn(tokens, 16, dtype=torch.float64)
        routing = limit_load(layer.router(x), layer.config, layer.mesh.batch)
        arrived = layer.dispatcher.dispatch(x, routing.topk_ids, routing.topk_weights)
        assert arrived.x.shape == (8 * 10, 16) and arrived.counts_on_host == [10] * 8
        assert arrived.rows_per_expert == 10
        assert int((arrived.x.abs().sum(1) > 0).sum()) == int((routing.topk_ids >= 0).sum())
        assert layer.dispatcher.combine(arrived.x, arrived.handle).shape == x.shape


def test_a_choice_beyond_the_block_is_not_sent():
    """The dispatcher by itself, with a routing that nobody limited: nothing lands in another expert's block."""
    dispatcher = ep.CapacityDispatcher(8, ep.Communicator(), capacity=2)
    x = torch.randn(8, 16, dtype=torch.float64)
    arrived = dispatcher.dispatch(x, torch.tensor([[3, 4]] * 8), torch.ones(8, 2, dtype=torch.float64))
    assert torch.equal(arrived.x[6:8], x[:2]) and torch.equal(arrived.x[8:10], x[:2])
    assert arrived.x[:6].abs().max() == 0 and arrived.x[10:].abs().max() == 0
    assert arrived.topk_weights[6:10].tolist() == [[1.0]] * 4 and not arrived.topk_weights[:6].any()
    y = dispatcher.combine(arrived.x, arrived.handle)
    assert torch.equal(y[:2], 2 * x[:2]) and y[2:].abs().max() == 0


def test_a_capacity_that_cannot_overflow_costs_nothing(monkeypatch):
    """A token comes to an expert once: with room for every token there is nothing to sort."""
    routing = routed(20, 8, 2, levels=3, seed=0)
    monkeypatch.setitem(ep.REGISTRIES["overflow"], "drop", None)
    assert limit_load(routing, config(4.0, capacity_share=20), ep.Communicator()) is routing


def test_logits_are_kept():
    routing = ep.replace(routed(20, 8, 2, levels=3, seed=0), logits=torch.randn(20, 8))
    assert limit_load(routing, config(0.5), ep.Communicator()).logits is routing.logits


@pytest.mark.parametrize("order", ["probs", "position"])
@pytest.mark.parametrize("overflow", ["drop", "reroute"])
@pytest.mark.parametrize("experts", ["blocks", "bmm"])
def test_no_value_is_needed_on_the_host(overflow, order, experts):
    """Forward and backward on the meta device, where tensors have shapes and no values."""
    settings = {"experts": experts, "overflow": overflow, "drop_order": order}
    layer = ep.EPMoE(config(0.8, "capacity", **settings), seed=0, device="meta")
    x = torch.randn(20, 16, dtype=torch.float64, device="meta", requires_grad=True)
    (layer(x).sum() + ep.aux_loss(layer)).backward()
    assert x.grad.shape == (20, 16) and layer.experts.w1.grad.shape == (8, 16, 32)


def test_dropless_needs_values_on_the_host():
    """The test above can fail: the all-gather's shapes depend on the routing."""
    layer = ep.EPMoE(config(0.8, "all_gather"), seed=0, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        layer(torch.randn(20, 16, dtype=torch.float64, device="meta"))


def test_a_layer_alone_finds_its_share_without_the_host():
    """Two ranks with 3 and 6 tokens: a share of 5, so 5 * 2 / 8 = 1.25 rows, rounded up. And without values."""
    comm = ep.Communicator()
    comm.size, comm.all_reduce = 2, lambda tokens: tokens + 6
    assert ep.local_capacity(3, config(1.0), comm, torch.device("cpu")).tolist() == 2
    assert ep.local_capacity(3, config(0.8), comm, torch.device("cpu")).tolist() == 1
    assert ep.local_capacity(3, config(1.0), comm, torch.device("meta")).shape == ()
    assert ep.local_capacity(3, config(1.0, capacity_share=32), comm, torch.device("cpu")) == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_the_host_does_not_wait_for_the_gpu(overflow):
    layer = ep.EPMoE(config(0.8, "capacity", overflow=overflow, dtype="float32"), seed=0, device="cuda")
    x = torch.randn(20, 16, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (layer(x).sum() + ep.aux_loss(layer)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_tells_the_share_of_its_tokens():
    mesh = ep.init_ep()
    mesh.batch.size = 4
    options = ep.CapacityOptions(1.0)
    for tokens, share in ((9, 3), (8, 2), (1, 1), (None, 32)):
        training = ep.TrainingOptions(tokens=tokens)
        run = ep.Run(ep.MoEConfig(extras=(options,)), training, mesh, torch.device("cpu"), None)
        assert run.config.option(ep.CapacityOptions).capacity_share == share
    run = ep.Run(ep.MoEConfig(extras=(ep.CapacityOptions(),)), training, mesh, torch.device("cpu"), None)
    assert run.config.option(ep.CapacityOptions) == ep.CapacityOptions()


@pytest.mark.parametrize("argv, words", [
    (["--capacity-factor", "0"], "capacity_factor is 0.0"), (["--capacity-factor", "-1"], "capacity_factor is -1.0"),
    (["--capacity-factor", "nan"], "capacity_factor is nan"), (["--capacity-factor", "inf"], "capacity_factor is inf"),
    (["--capacity-factor", "much"], "capacity-factor"), (["--overflow", "teleport"], "overflow"),
    (["--overflow", "reroute"], "does nothing without a limit"),
    (["--capacity-scope", "global"], "does nothing without a limit"),
    (["--capacity-factor", "1", "--capacity-scope", "village"], "capacity_scope is 'village'"),
    (["--capacity-factor", "1", "--drop-order", "random"], "drop_order is 'random'"),
    (["--dispatcher", "capacity"], "set --capacity-factor"),
    (["--dispatcher", "capacity", "--capacity-factor", "1", "--capacity-scope", "global"], "need a limit on each rank"),
])  # fmt: skip
def test_bad_flags_are_one_line(argv, words):
    with pytest.raises(ValueError, match=words) as refused:
        ep.parse_flags(argv)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("factor, lost", [(0.5, 0.5), (0.75, 0.25), (1.25, 0.0)])
def test_reroute_loses_what_all_experts_together_cannot_take(tmp_path, factor, lost):
    """Counted by the summary, where a choice of -1 is a dropped one."""
    mesh = ep.init_ep()
    log = ep.RunLog(tmp_path, 40, rank=1)
    training = ep.TrainingOptions(steps=40, tokens=64)
    layer = config(factor, "capacity", overflow="reroute")
    run = ep.Run(layer, training, mesh, torch.device("cpu"), log)
    measured = ep.train(run)
    assert measured["dropped_fraction"] == pytest.approx(lost, abs=1e-6)
    assert measured["max_load_over_mean"] <= factor / (1 - lost) + 1e-6
