"""Chapter 12 without processes: names, refusals, slots, and every order on one rank."""

import pytest
import torch

from ep_launcher import launcher as ep
from measure.overlap import lanes

SIZES = {"num_experts": 4, "top_k": 2, "hidden_dim": 8, "ffn_dim": 16}


def test_names_and_the_default():
    assert ep.MoEConfig().overlap == "none" and ep.EPMoE(ep.MoEConfig(**SIZES), seed=0).overlap is ep.InOrder
    assert ep.EPMoE(ep.MoEConfig(**SIZES, overlap="auto", num_shared_experts=1), seed=0).overlap is ep.InOrder
    with pytest.raises(ValueError, match="overlap is 'both'; take one of auto, none, shared, tbo"):
        ep.EPMoE(ep.MoEConfig(**SIZES, overlap="both"), seed=0)


def test_refusals():
    with pytest.raises(ep.CannotRun, match="needs shared experts .*set --num-shared-experts"):
        ep.EPMoE(ep.MoEConfig(**SIZES, overlap="shared"), seed=0)
    fixed = {
        "dispatcher": "capacity",
        "max_num_tokens": 8,
        "extras": (ep.CapacityOptions(capacity_factor=1.0),),
    }
    with pytest.raises(
        ep.CannotRun,
        match="overlap tbo cannot run .* needs a dispatcher whose buffers half the tokens do not fill",
    ):
        ep.EPMoE(ep.MoEConfig(**SIZES, overlap="tbo", **fixed), seed=0)


@pytest.mark.parametrize(
    "most, overlap, slots", [(9, "none", 9), (9, "tbo", 5), (None, "tbo", None), (8, "auto", 8)]
)
def test_slots_of_a_half(most, overlap, slots):
    assert ep.known_slots(ep.MoEConfig(**SIZES, max_num_tokens=most, overlap=overlap)) == slots


@pytest.mark.parametrize("dispatcher", ["local", "all_to_all", "dedup"])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_every_order_on_one_rank(dispatcher, num_tokens):
    x = torch.randn(num_tokens, 8, dtype=torch.float64, requires_grad=True)
    found = {}
    for order in ("none", "shared", "tbo"):
        config = ep.MoEConfig(
            **SIZES, num_shared_experts=1, dispatcher=dispatcher, overlap=order, dtype="float64"
        )
        layer, x.grad = ep.EPMoE(config, seed=0), None
        y = layer(x)
        y.square().sum().backward()
        found[order] = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(found["none"], found["shared"], strict=True))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found["none"], found["tbo"], strict=True))


def test_an_exchange_under_way_is_known_until_it_ends():
    class Work:
        def wait(self) -> None:
            pass

    meter = ep.TrafficMeter(3, 4)

    def begin_something() -> ep.Pending:
        return ep.Pending(torch.ones(1), meter, Work(), "combine")

    pending = begin_something()
    with pytest.raises(
        RuntimeError, match="rank 3: the exchange of 'combine', its collective 0, was never ended"
    ):
        ep.check_ended(meter)
    assert pending.wait() is pending.wait()
    ep.check_ended(meter)


def test_lanes_of_a_trace():
    """Two operations with little between are one piece; what is inside the experts' node is theirs."""

    def event(name: str, start: float, length: float, tid: int = 1, cat: str = "cpu_op") -> dict:
        return {"name": name, "ts": 1000 + start, "dur": length, "tid": tid, "cat": cat}

    events = [event("aten::mm", 0, 1000), event("aten::add", 1020, 500), event("aten::mm", 3000, 1000),
              event("ExpertsOnTokensBackward", 2900, 2000), event("aten::copy_", 0, 100, tid=2),
              event("gloo:all_to_all", 1200, 2000, tid=3, cat="user_annotation")]  # fmt: skip
    found = lanes(events)
    assert found == {"flights": [[1.2, 2.0]], "work": [["other", 0.0, 1.52], ["experts", 3.0, 1.0]]}
