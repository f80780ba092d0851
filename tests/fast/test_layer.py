"""Functions of the launcher, one rank, no processes: formulas, router, aux loss, options, refusals."""

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from support import ROOT
from training_trials import PLUGIN

from ep_launcher import launcher as ep


def config(**changes) -> ep.MoEConfig:
    return ep.MoEConfig(**{"num_experts": 8, "top_k": 2, "hidden_dim": 16, "ffn_dim": 32} | changes)


EXPERTS = [
    n for n, e in sorted(ep.REGISTRIES["experts"].items()) if e.preference(config(), torch.device("cpu"), 1)
]


@pytest.mark.parametrize("experts, top_k, ranks", [(8, 3, 4), (6, 2, 3), (8, 8, 2), (4, 1, 4)])
def test_expected_distinct_ranks_counts_every_choice(experts, top_k, ranks):
    per_rank = experts // ranks
    choices = list(itertools.combinations(range(experts), top_k))
    counted = sum(len({e // per_rank for e in choice}) for choice in choices) / len(choices)
    assert ep.expected_distinct_ranks(experts, top_k, ranks) == pytest.approx(counted, rel=1e-12)


def test_meter_leaves_the_rank_itself_out():
    meter = ep.TrafficMeter(rank=1, size=3)
    meter.record("dispatch", [10, 20, 30])
    meter.record("dispatch", [1, 2, 3])
    assert meter.sent["dispatch"] == [11, 0, 33]
    assert meter.total("dispatch") == 44 and meter.total("metadata") == 0


def test_meter_counts_by_the_number_in_the_whole_job():
    meter = ep.TrafficMeter(rank=2, size=4)
    meter.record("combine", [5, 7], ranks=[0, 2])
    meter.record("combine", [5, 7], ranks=[2, 3])
    assert meter.sent["combine"] == [5, 0, 0, 7]


@pytest.mark.parametrize("changes, words", [
    ({"top_k": 9}, "top_k is 9"), ({"num_experts": 0}, "num_experts is 0"), ({"dtype": "int8"}, "dtype"),
    ({"hidden_dim": -1}, "hidden_dim is -1"), ({"num_experts": 4.0}, "num_experts is 4.0, and must be a whole number"),
    ({"num_experts": "4"}, "num_experts is '4'"), ({"hidden_dim": None}, "hidden_dim is None"),
    ({"extras": (ep.CapacityOptions(1.0), ep.RoutingOptions(), ep.CapacityOptions(2.0))}, "two CapacityOptions"),
])  # fmt: skip
def test_config_refuses(changes, words):
    with pytest.raises(ValueError, match=words):
        config(**changes)


@pytest.mark.parametrize(
    "kind", ["router", "balance", "activation", "dispatcher", "experts", "choice", "overlap"]
)
def test_a_layer_names_what_there_is_where_a_name_is_unknown(kind):
    with pytest.raises(ValueError, match=f"^{kind} is 'x'; take one of .*{min(ep.REGISTRIES[kind])}"):
        ep.EPMoE(config(**{kind: "x"}), seed=0)


def test_config_refuses_uneven_experts():
    with pytest.raises(ValueError, match="8 experts cannot be shared evenly by 3 ranks"):
        config().num_local_experts(3)


def test_a_name_belongs_to_one_implementation():
    with pytest.raises(ValueError, match="registered already, as AllGatherDispatcher"):
        ep.register("dispatcher", "all_gather")(object)


def test_a_class_that_would_stop_every_run_is_refused():
    """`auto` asks all that are registered, also in a run that names another one."""
    with pytest.raises(ValueError, match=r"experts 'bare': \S*Bare has no preference; inherit from Experts"):

        @ep.register("experts", "bare")
        class Bare: ...

    with pytest.raises(
        ValueError, match=r"'half': \S*Half has no begin_combine, begin_dispatch, predict_bytes$"
    ):

        @ep.register("dispatcher", "half")
        class Half(ep.Dispatcher): ...

    assert "bare" not in ep.REGISTRIES["experts"] and "half" not in ep.REGISTRIES["dispatcher"]
    for kind, base in ep.BASES.items():
        for implementation in (getattr(ep, base), *ep.REGISTRIES[kind].values()):
            assert implementation.preference


def test_a_cell_with_register_may_be_run_again(monkeypatch):
    for kind in ep.REGISTRIES:
        monkeypatch.setitem(ep.REGISTRIES, kind, dict(ep.REGISTRIES[kind]))
    monkeypatch.setattr(ep, "OPTION_GROUPS", list(ep.OPTION_GROUPS))
    names = vars(ep) | {"__name__": "__main__"}
    for _ in range(3):
        exec(compile(PLUGIN, "<cell>", "exec", dont_inherit=True), names)
    assert ep.REGISTRIES["experts"]["mine"] is names["MyExperts"]
    assert [group for group in ep.OPTION_GROUPS if group.__name__ == "MyOptions"] == [names["MyOptions"]]


def test_an_unknown_kind_is_refused_where_it_is_registered():
    with pytest.raises(
        ValueError, match="there is no kind 'dispatchers'; take one of router, choice, dispatcher"
    ):
        ep.register("dispatchers", "pigeon")


def test_a_misspelt_hook_is_refused():
    with pytest.raises(TypeError, match="Mine.after_rooting is no hook; take one of check, .*after_routing"):

        class Mine(ep.Options):
            def after_rooting(self, routing, config, batch):
                return routing


def test_every_hook_of_options_is_called_by_somebody():
    """A hook that nobody asks for would be as silent as a misspelt one."""
    text = (ROOT / "ep_launcher" / "launcher.py").read_text()
    for hook in ep.Options.hooks:
        assert ("e.for_run(self)" if hook == "for_run" else f'hooks("{hook}")') in text, hook


def test_router_picks_the_largest_and_does_not_renormalise():
    routing = ep.Router(config(), seed=0)(torch.randn(5, 16))
    top = routing.probs.sort(dim=1, descending=True)
    assert torch.equal(routing.topk_ids, top.indices[:, :2])
    assert torch.equal(routing.topk_weights, top.values[:, :2])
    assert torch.allclose(routing.probs.sum(1), torch.ones(5)) and (routing.topk_weights.sum(1) < 1).all()


def test_switch_loss_is_one_under_even_load_and_e_under_collapse():
    balance = ep.SwitchAuxLoss(config(), ep.Communicator())
    ids = torch.arange(8).view(4, 2)
    even = ep.Routing(ids, torch.ones(4, 2), torch.full((4, 8), 1 / 8))
    assert balance(even).item() == pytest.approx(1)
    one = torch.zeros(4, 8).index_fill(1, torch.tensor([3]), 1.0)
    assert balance(ep.Routing(torch.full((4, 1), 3), torch.ones(4, 1), one)).item() == pytest.approx(8)


@pytest.mark.parametrize("tokens, experts", [(0, 8), (4, 1), (0, 1)])
def test_means_over_nothing_are_zero(tokens, experts):
    layer = ep.EPMoE(config(num_experts=experts, top_k=1), seed=0)
    x = torch.randn(tokens, 16, requires_grad=True)
    y = layer(x)
    aux = ep.aux_loss(layer)
    (y.sum() + aux).backward()
    assert aux.item() == 0 and y.shape == (tokens, 16)
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_aux_is_zero_in_eval_mode():
    layer = ep.EPMoE(config(), seed=0)
    x = torch.randn(4, 16)
    layer(x)
    assert ep.aux_loss(layer).item() > 0
    layer.eval()(x)
    assert ep.aux_loss(layer).item() == 0


def test_layer_refuses_what_it_was_not_made_for():
    layer = ep.EPMoE(config(max_num_tokens=4), seed=0)
    with pytest.raises(ValueError, match="5 tokens on one rank, above max_num_tokens 4"):
        layer(torch.randn(5, 16))
    with pytest.raises(ValueError, match="8 tokens on one rank, above max_num_tokens 4"):
        layer(torch.randn(2, 4, 16))  # a batch and a sequence are tokens too
    for x in (torch.randn(4, 8), torch.randn(16), torch.ones(4, 16, dtype=torch.int64)):
        with pytest.raises(
            ValueError,
            match=rf"shape {re.escape(str(list(x.shape)))}, dtype {x.dtype}; the layer wants \[\.\.\., 16\]",
        ):
            layer(x)


def test_the_dense_reference_is_a_sum_over_chosen_experts():
    """dense_moe against experts written out token by token, with nn.functional alone."""
    layer = ep.EPMoE(config(dtype="float64"), seed=0)
    p = dict(layer.named_parameters())
    x = torch.randn(3, 16, dtype=torch.float64)
    y, _ = ep.dense_moe(x, p, 2)
    for t in range(3):
        probs = (p["router.gate.weight"] @ x[t] + p["router.gate.bias"]).softmax(0)
        expected = 0
        for e in probs.topk(2).indices.tolist():
            up = x[t] @ p["experts.w1"][e] + p["experts.b1"][e]
            hidden = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
            expected = expected + probs[e] * (hidden @ p["experts.w2"][e] + p["experts.b2"][e])
        assert torch.allclose(y[t], expected, rtol=1e-12, atol=1e-14)


def test_an_experts_numbers_depend_on_its_global_id_alone():
    whole = ep.EPMoE(config(), seed=5).experts
    comm = ep.Communicator.alone()
    comm.rank, comm.size = 3, 4
    part = ep.LoopExperts(config(), comm, seed=5)
    assert torch.equal(part.w1, whole.w1[6:8]) and torch.equal(part.b2, whole.b2[6:8])
    assert not torch.equal(whole.w1[0], whole.w1[1])
    other = ep.EPMoE(config(), seed=6).experts
    assert not torch.equal(whole.w1, other.w1)


@pytest.mark.parametrize("experts", EXPERTS)
def test_state_dicts_are_interchangeable(experts):
    torch.manual_seed(0)
    one, other = ep.EPMoE(config(experts=experts), seed=1), ep.EPMoE(config(experts="loop"), seed=2)
    other.load_state_dict(one.state_dict())
    x = torch.randn(6, 16)
    assert torch.allclose(one(x), other(x), atol=1e-6)


def test_pick_refuses_what_nobody_registered_and_what_cannot_run(monkeypatch):
    """Only auto chooses something else than what was named."""
    with pytest.raises(ValueError, match="experts is 'fastest'; take one of auto, blocks, bmm"):
        ep.pick("experts", config(experts="fastest"), "cpu")

    class Nowhere(ep.LoopExperts):
        @staticmethod
        def preference(config, device, ep_size):
            return 0

    monkeypatch.setitem(ep.REGISTRIES["experts"], "nowhere", Nowhere)
    with pytest.raises(ep.CannotRun, match=r"experts nowhere cannot run in float32 on 1 cpu rank; take auto"):
        ep.pick("experts", config(experts="nowhere"), "cpu")
    best = ep.pick("experts", config(), "cpu")
    assert best in ep.REGISTRIES["experts"] and best != "nowhere"
    with pytest.raises(ep.CannotRun, match=f"experts nowhere .*here: {best}"):
        ep.EPMoE(config(experts="nowhere"), seed=0)


@pytest.mark.parametrize("kind, changes, ranks", [
    ("experts", {"experts": "grouped", "dtype": "float64"}, 1),
    ("experts", {"experts": "grouped", "hidden_dim": 18}, 1),
    ("experts", {"experts": "grouped_fp8"}, 1),
    ("experts", {"experts": "quack", "dtype": "bfloat16", "activation": "swiglu"}, 1),
    ("dispatcher", {"dispatcher": "local"}, 2),
    ("choice", {"choice": "one_launch"}, 1),
])  # fmt: skip
def test_a_named_kind_that_cannot_run_is_an_error(kind, changes, ranks):
    with pytest.raises(ep.CannotRun, match=f"{kind} {changes[kind]} cannot run in .* on {ranks} cpu rank"):
        ep.pick(kind, config(**changes), "cpu", ranks)
    assert ep.pick(kind, config(**changes | {kind: "auto"}), "cpu", ranks) != changes[kind]


def test_choices_of_minus_one_are_not_sent():
    layer, x = ep.EPMoE(config(), seed=0), torch.randn(4, 16)
    routing = layer.router(x)
    topk_ids = routing.topk_ids.clone()
    topk_ids[1] = -1
    for name, kind in ep.REGISTRIES["dispatcher"].items():
        if kind.needs_capacity:
            continue  # chapter 08's, whose rows are padded
        dispatcher = kind.for_layer(layer.config, layer.mesh.ep)
        arrived = dispatcher.dispatch(x, topk_ids, routing.topk_weights)
        assert (arrived.topk_ids >= 0).sum() == 6, name
        spoilt = (arrived.topk_ids < 0).all(1)  # rows without experts: nobody reads them
        spoilt = replace(arrived, x=arrived.x.masked_fill(spoilt[:, None], float("nan")))
        for experts in ("loop", "blocks", "grouped"):
            y = dispatcher.combine(ep.EPMoE(config(experts=experts), seed=0).experts(spoilt), arrived.handle)
            assert y[1].abs().max() == 0 and y[0].abs().max() > 0 and y.isfinite().all(), (name, experts)


@pytest.mark.parametrize("experts", EXPERTS)
def test_rows_that_nobody_may_read_reach_no_token_and_no_gradient(experts):
    """A row that travelled, and has no expert here, may hold anything; combine leaves it out."""
    made = ep.EPMoE(config(experts=experts), seed=0).experts
    x, ids = torch.randn(5, 16), torch.tensor([[0, 3], [-1, -1], [2, -1], [7, 1], [-1, -1]])
    read = ids.amax(1) >= 0
    found = []
    for filler in (0.0, float("nan")):
        rows = x.masked_fill(~read[:, None], filler).requires_grad_()
        weights = torch.linspace(0.1, 1, 10).view(5, 2).requires_grad_()
        y = made(ep.Arrived(rows, ids, weights, handle="a dispatcher's"))[read]
        made.zero_grad()
        y.square().sum().backward()
        grads = [rows.grad[read], weights.grad[ids >= 0], *(p.grad for p in made.parameters())]
        found.append([y.detach(), *grads])
    for plain, beside_nan in zip(*found, strict=True):
        assert torch.equal(plain, beside_nan)


def test_every_option_is_a_flag_with_help():
    text = ep.make_parser().format_help()
    for flag in ("--num-experts", "--top-k", "--hidden-dim", "--ffn-dim", "--max-num-tokens", "--dispatcher",
                 "--experts", "--balance", "--aux-alpha", "--activation", "--steps", "--lr", "--log-interval", "--seed",
                 "--tokens", "--dtype", "--device", "--log-dir", "--summary", "--timeout-s"):  # fmt: skip
        assert flag in text
    for action in ep.make_parser()._actions:
        assert re.match(r"\w", action.help), f"{action.option_strings} has no help"


def test_flags_reach_their_fields():
    found, options = ep.parse_flags(
        ["--num-experts", "4", "--lr", "0.1", "--tokens", "7", "--balance", "none"]
    )
    assert (found.num_experts, options.lr, options.tokens, found.balance) == (4, 0.1, 7, "none")
    assert found.hidden_dim == 256 and options.steps == 2000


@pytest.mark.parametrize("argv, words", [
    (["--no-such-flag", "1"], "no-such-flag"), (["--steps", "many"], "steps"), (["--steps", "0"], "steps is 0"),
    (["--lr", "nan"], "lr"), (["--step", "5"], "--step"), (["--device", "tpu"], "device"),
    (["--dispatcher", "pigeon"], "dispatcher"), (["--timeout-s", "0"], "timeout_s"),
    (["--topk", "4"], "--topk 4; did you mean --top-k"), (["--max-num-tokens", "0"], "max_num_tokens is 0"),
])  # fmt: skip
def test_bad_flags_are_one_line(argv, words):
    with pytest.raises(ValueError, match=words) as refused:
        ep.parse_flags(argv)
    assert "\n" not in str(refused.value)


def test_no_balance_means_no_gradient_towards_even_load():
    layer = ep.EPMoE(config(balance="none"), seed=0)
    layer(torch.randn(4, 16))
    assert ep.aux_loss(layer).item() == 0


def test_load_history_sums_the_newest_intervals():
    history = ep.LoadHistory(1, 2)
    comm = ep.Communicator()
    for ids in ([[0], [0], [0], [0]], [[0], [1], [1], [1]], [[1], [-1], [1], [1]]):
        history.add(0, torch.tensor(ids))
        history.end_interval(comm)
    assert history.newest(4) == (pytest.approx(2.0), pytest.approx(0.25))
    assert history.newest(8) == (pytest.approx(6 / 3.5), pytest.approx(1 / 8))
    assert history.image().shape == (1, 2, 3) and history.image()[0, 1, 2] == 0  # the largest load is black


def test_load_history_keeps_layers_apart():
    """The largest load over the mean is of the worst layer, not of all layers' sum, which may be even."""
    history = ep.LoadHistory(2, 2)
    history.add(0, torch.zeros(6, 1, dtype=torch.int64))
    history.add(1, torch.ones(6, 1, dtype=torch.int64))
    history.end_interval(ep.Communicator())
    assert history.newest() == (pytest.approx(2.0), 0.0)
    assert history.image().shape == (1, 4, 1)
