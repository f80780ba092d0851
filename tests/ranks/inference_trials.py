"""Chapter 13's inference path on real ranks, against the layer that it is made of."""

from pathlib import Path

import torch
from trials import trial

from ep_launcher import launcher as ep

TOKENS = [5, 0, 7, 3]  # of each rank; one has none
KINDS = {
    "softmax": {},
    "sigmoid, bias": {"router": "sigmoid", "balance": "bias"},
    "swiglu, shared expert": {"activation": "swiglu", "num_shared_experts": 1},
}
ROUTING = {
    "plain": {},
    "normalised": {"normalize_topk": True, "routed_scaling_factor": 2.0},
    "groups": {"num_groups": 4, "topk_groups": 2},
}
LIMITS = {
    "dropless": {},
    "drop": {"capacity_factor": 1.0},
    "reroute, global": {"capacity_factor": 1.0, "overflow": "reroute", "capacity_scope": "global"},
}


def make(
    mesh: ep.Mesh, dispatcher: str, kind: dict, routing: dict, limit: dict
) -> tuple[ep.EPMoE, torch.Tensor]:
    """A layer in eval mode with a bias of its own, and this rank's tokens."""
    extras = ep.RoutingOptions(**routing), ep.CapacityOptions(**limit)
    config = ep.MoEConfig(
        8, 2, 16, 24, max_num_tokens=8, dtype="float64", dispatcher=dispatcher, extras=extras, **kind
    )
    layer = ep.EPMoE(config, mesh, seed=3).eval()
    if layer.balance.bias is not None:
        layer.balance.bias.copy_(torch.linspace(-0.2, 0.2, 8))
    torch.manual_seed(mesh.batch.rank)
    return layer, torch.randn(TOKENS[mesh.batch.rank], 16, dtype=torch.float64)


def error(fast: ep.InferenceMoE, layer: ep.EPMoE, x: torch.Tensor, **named) -> float:
    """The largest difference, over two calls."""
    with torch.no_grad():
        y = layer(x)
    found = [fast(x, **named) for _ in range(2)]
    assert torch.equal(*found) and not found[0].requires_grad
    return max((found[0] - y).abs().flatten().tolist(), default=0.0)


@trial(1, 2, 4)
def same_as_the_layer(mesh: ep.Mesh, folder: Path) -> dict[str, float]:
    """Every kind, routing and limit, with the largest difference of plain and padded batches."""
    worst = {}
    for dispatcher in ("auto", "gather_tokens", "peer") if mesh.batch.size > 1 else ("auto",):
        for kind_name, kind in KINDS.items():
            for routing_name, routing in ROUTING.items():
                for limit_name, limit in LIMITS.items():
                    if "groups" in routing_name and "reroute" in limit_name:
                        continue  # which the options refuse
                    layer, x = make(mesh, dispatcher, kind, routing, limit)
                    fast = [ep.for_inference(layer, 8)]
                    if not limit:
                        fast.append(ep.for_inference(layer, 8, sizes=(4, 8)))
                    name = f"{dispatcher}, {kind_name}, {routing_name}, {limit_name}"
                    worst[name] = max(error(f, layer, x) for f in fast)
    return worst


@trial(1, 2, 4)
def the_largest_is_known(mesh: ep.Mesh, folder: Path) -> float:
    """A scheduler says that no rank has more than 4 tokens: the batch of 4 is taken, on all."""
    layer, x = make(mesh, "auto", {}, {}, {})
    fast = ep.for_inference(layer, 8, sizes=(4, 8))
    before = fast.batches[8].x.clone()
    found = error(fast, layer, x[:3], largest=4)
    assert torch.equal(fast.batches[8].x, before)
    return found


@trial(1, 2, 4)
def copies_change_nothing(mesh: ep.Mesh, folder: Path) -> tuple[float, float]:
    """Redundant experts: the same outputs, by a plan from counted load; then a weight changes."""
    layer, x = make(mesh, "auto", {"activation": "swiglu"}, {}, {})
    size = mesh.ep.size
    plan = ep.plan_copies(torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1]), 8 + 4 * max(1, size // 2), size)
    fast = [
        ep.for_inference(layer, 8, placement=plan),
        ep.for_inference(layer, 8, sizes=(8,), placement=plan),
    ]
    found = max(error(f, layer, x) for f in fast)
    with torch.no_grad():
        layer.experts.w2.mul_(2.0)
    try:
        fast[0](x)
    except RuntimeError as refusal:
        assert "call for_inference again" in str(refusal)
        return found
    raise AssertionError("copies of old weights were used")


@trial(1, 2, 4)
def an_update_is_seen(mesh: ep.Mesh, folder: Path) -> float:
    """Weights changed in place; then one that is replaced."""
    layer, x = make(mesh, "auto", {}, {}, {})
    fast = ep.for_inference(layer, 8, sizes=(8,))
    before = fast(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    found, after = error(fast, layer, x), fast(x)
    assert not len(x) or not torch.allclose(after, before)
    layer.experts.w1 = torch.nn.Parameter(layer.experts.w1.detach().clone())
    try:
        fast(x)
    except RuntimeError:
        return found
    raise AssertionError("a weight moved, and nobody noticed")
