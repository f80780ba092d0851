"""A whole MoE layer, forward and backward, beside others, at the sizes of three known models. Here on one GPU.

    python measure/layer.py                     all sizes, into results/<device>_layer.json
    python measure/layer.py --sizes qwen --rounds 20 --no-compile
    python measure/layer.py --before build/before.py   beside another commit's launcher.py (measure/before.py)
    python measure/layer.py --device cpu --small       whether it runs, anywhere

Every variant gets the same tokens and weights in bfloat16, random. From routing to unpermute, x and all parameters
with gradients. A sample is several passes between CUDA events, back to back, as the layers of a model follow one
another. Before anything is timed, every variant is held against a float32 reference that makes the same choices.
Memory is what a forward pass keeps for its backward, and the peak of both. measure/gpus.py does it on several GPUs.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import record  # noqa: E402

SIZES = {  # tokens, then the layer
    "mixtral": (8192, {"hidden_dim": 4096, "ffn_dim": 14336, "num_experts": 8, "top_k": 2}),
    "qwen": (16384, {"hidden_dim": 2048, "ffn_dim": 768, "num_experts": 128, "top_k": 8}),
    "deepseek": (8192, {"hidden_dim": 7168, "ffn_dim": 2048, "num_experts": 32, "top_k": 8}),
}
SMALL_SIZES = {
    "mixtral": (64, {"hidden_dim": 64, "ffn_dim": 96, "num_experts": 8, "top_k": 2}),
    "qwen": (64, {"hidden_dim": 32, "ffn_dim": 16, "num_experts": 32, "top_k": 8}),
}


@dataclass(frozen=True)
class Variant:
    """A layer's forward, x [T, D] -> y [T, D], and the parameters whose gradients it makes.

    check: the same with our router's choices, where its own makes others. is_copy: its experts' weights are copies of
    ours. divides: a token's weights by their sum, as transformers' Mixtral does. hooks: saved tensors can be counted.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    check: Callable[[Tensor], Tensor] | None = None
    is_copy: bool = False
    divides: bool = False
    hooks: bool = True


def fill(parameter: Tensor, fan_in: int, *seeds: Any) -> None:
    """Random numbers made on the device: the launcher's own are drawn on the CPU, too slowly for these sizes."""
    with torch.no_grad():
        parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5)


def make_layer(recorder: record.Recorder, size: str) -> ep.EPMoE:
    """A layer of ours in bfloat16 for max_num_tokens on each rank, the gate alike on all ranks, its experts not.

    The gate has no bias, and weights that bfloat16 holds: the others' gates have no more.
    """
    num_tokens, shape = (SMALL_SIZES if recorder.args.small else SIZES)[size]
    config = ep.MoEConfig(
        **shape, max_num_tokens=num_tokens, activation="swiglu", dtype="bfloat16", balance="none",
        router_bias=False, dispatcher="all_to_all" if recorder.comm.size > 1 else "local", experts="grouped",
    )  # fmt: skip
    torch.manual_seed(0)
    layer = recorder.launchers[""].layer(config, recorder.device, fill)
    with torch.no_grad():
        layer.router.gate.weight.copy_(layer.router.gate.weight.bfloat16())
    torch.manual_seed(1 + recorder.comm.rank)
    for parameter in layer.experts.parameters():
        fill(parameter, parameter.shape[1])
    return layer


def our_variants(
    recorder: record.Recorder, layer: ep.EPMoE, label: str = ""
) -> dict[str, Callable[[], Variant]]:
    """{name: what makes it}: each launcher's layer with grouped and with blocks, on the weights of `layer`."""

    def make(launcher: Any, experts: str) -> Variant:
        other = launcher.sharing(layer, experts=experts)
        return Variant(lambda x: launcher.forward(other, x)[0], list(other.parameters()))

    return {
        f"{prefix or 'ours, '}{label}{experts}": lambda launcher=launcher, experts=experts: make(
            launcher, experts
        )
        for prefix, launcher in recorder.launchers.items()
        for experts in ("grouped", "blocks")
    }


def plain_glue(layer: ep.EPMoE, compiled: bool) -> Variant:
    """grouped_mm with PyTorch's own operations around it: what the kernels of chapter 06 replace."""

    def forward(x: Tensor) -> Tensor:
        routing, top_k = layer.router(x), layer.config.top_k
        expert, choice = routing.topk_ids.reshape(-1).sort(stable=True)
        counts = torch.zeros(layer.config.num_experts, dtype=torch.int32, device=x.device)
        offsets = counts.scatter_add(0, expert, torch.ones_like(expert, dtype=torch.int32)).cumsum(0).int()
        w1, w2, w3 = layer.experts.w1, layer.experts.w2, layer.experts.w3
        rows = x[choice // top_k]
        up, third = F.grouped_mm(rows, w1, offs=offsets), F.grouped_mm(rows, w3, offs=offsets)
        y = F.grouped_mm(F.silu(up) * third, w2, offs=offsets)
        weighted = (y.float() * routing.topk_weights.reshape(-1)[choice].unsqueeze(1)).to(x.dtype)
        back = torch.empty_like(choice).scatter(0, choice, torch.arange(len(choice), device=x.device))
        return weighted[back].view(len(x), top_k, -1).sum(1)

    run = torch.compile(forward) if compiled else forward
    return Variant(run, list(layer.parameters()), hooks=not compiled)


def transformers_block(layer: ep.EPMoE, compiled: bool) -> Variant:
    """transformers' Mixtral block with its grouped_mm experts, on copies of the layer's weights."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    c = layer.config
    config = MixtralConfig(
        hidden_size=c.hidden_dim, intermediate_size=c.ffn_dim, num_local_experts=c.num_experts,
        num_experts_per_tok=c.top_k,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with layer.experts.w1.device:
        block = MixtralSparseMoeBlock(config).to(torch.bfloat16)
    with torch.no_grad():
        e = layer.experts
        block.experts.gate_up_proj.copy_(torch.cat([e.w1, e.w3], dim=2).transpose(1, 2))
        block.experts.down_proj.copy_(e.w2.transpose(1, 2))
        block.gate.weight.copy_(layer.router.gate.weight)
    run = torch.compile(block) if compiled else block
    return Variant(
        lambda x: run(x.unsqueeze(0)).squeeze(0), list(block.parameters()), None, True, True, not compiled
    )


def sonicmoe_layer(layer: ep.EPMoE) -> Variant:
    """SonicMoE's functional layer on copies of the layer's weights: its router, then two autograd functions over
    quack-kernels' products, gate and up in one. Softmax before top-k, as ours. check: with our choices."""
    import sonicmoe.functional as sonic

    c, e = layer.config, layer.experts
    gate_up = torch.cat([e.w1.detach(), e.w3.detach()], dim=2).transpose(1, 2).contiguous().requires_grad_()
    down, gate = e.w2.detach().transpose(1, 2).contiguous().requires_grad_(), layer.router.gate.weight
    swiglu = sonic.ActivationType.SWIGLU

    def experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        num_choices = topk_ids.numel()
        to_rows, to_choices, token = (torch.empty_like(topk_ids.view(-1)) for _ in range(3))
        counts, starts = topk_ids.new_empty(c.num_experts), topk_ids.new_empty(c.num_experts + 1)
        sonic.TC_topk_router_metadata_triton(
            topk_ids, c.num_experts, counts, starts, token, to_rows, to_choices
        )
        hidden, kept = sonic._UpProjection.apply(
            x, gate_up.permute(1, 2, 0), None, starts, num_choices, c.top_k, token, to_rows, to_choices, None,
            False, swiglu, False, True,
        )  # fmt: skip
        return sonic._DownProjection.apply(
            hidden, kept, down.permute(1, 2, 0), None, topk_weights, starts, len(x), c.top_k, token, to_rows,
            to_choices, None, False, swiglu,
        )  # fmt: skip

    def forward(x: Tensor) -> Tensor:
        logits = F.linear(x, gate.to(x.dtype))
        return experts(
            x, *sonic.TC_Softmax_Topk_Router_Function.apply(logits, c.num_experts, c.top_k, False, False)
        )

    def check(x: Tensor) -> Tensor:
        routing = layer.router(x)
        return experts(x, routing.topk_weights, routing.topk_ids.int())

    return Variant(forward, [gate_up, down, gate], check, is_copy=True)


def local_counts(layer: ep.EPMoE, topk_ids: Tensor) -> Tensor:
    """Every rank's choices [T, K] -> int64 [L]: the rows of each of this rank's experts. Collective."""
    comm = layer.mesh.ep
    counts = comm.all_reduce(ep.count_choices(topk_ids, layer.config.num_experts))
    return counts.long().view(comm.size, -1)[comm.rank]


def products_alone(layer: ep.EPMoE, counts: Tensor, products: type) -> Callable[[], None]:
    """The matrix products of a forward and backward pass over counts [L] rows of the experts, and nothing else."""
    num_rows, w2, w3 = int(counts.sum()), layer.experts.w2.detach(), getattr(layer.experts, "w3", None)
    first = [layer.experts.w1.detach(), *([] if w3 is None else [w3.detach()])]
    hidden, rows = (torch.randn(num_rows, n, device=w2.device).to(w2.dtype) for n in w2.shape[1:])
    plan = products(counts, num_rows)

    def run() -> None:
        for w in first:
            plan.times(rows, w), plan.weight_gradient(rows, hidden)
        plan.times(hidden, w2), plan.times(rows, w2.transpose(1, 2)), plan.weight_gradient(hidden, rows)
        if w3 is None:
            plan.times(hidden, first[0].transpose(1, 2))
        else:
            plan.x_gradient(hidden, hidden, *first)

    return run


def train_pass(forward: Callable, x: Tensor, grad: Tensor, parameters: list[Tensor]) -> Callable[[], Tensor]:
    """forward and backward, gradients made anew -> y."""

    def run() -> Tensor:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        y = forward(x)
        y.backward(grad)
        return y

    return run


def reference(layer: ep.EPMoE, x: Tensor, grad: Tensor, divides: bool) -> dict[str, Tensor]:
    """float32 y and gradients of x, w1, w2, w3, one expert at a time, with the bfloat16 run's own choices.

    Over several ranks, each with as many tokens, every rank computes its own experts for all tokens, and the sums
    are added up: no dispatcher takes part. Collective.

    divides: whether a token's weights are divided by their sum, as transformers' Mixtral does.
    """
    comm = layer.mesh.ep

    def from_all(t: Tensor) -> Tensor:
        return comm.all_gather(t.detach().contiguous(), "reference").flatten(0, 1)

    with torch.no_grad():
        own_ids = layer.router(x).topk_ids
    wide = x.detach().float().requires_grad_()
    own_weights = F.linear(wide, layer.router.gate.weight.detach().float()).softmax(-1).gather(1, own_ids)
    own_weights = own_weights / own_weights.sum(1, keepdim=True) if divides else own_weights
    tokens, ids, weights, grad = (from_all(t) for t in (wide, own_ids, own_weights, grad))
    total, total_weights, y = (torch.zeros_like(t) for t in (tokens, weights, tokens))
    grads = {n: torch.empty_like(getattr(layer.experts, n)) for n in ("w1", "w2", "w3")}
    for e in range(len(layer.experts.w1)):
        token, choice = (ids == layer.experts.first_expert + e).nonzero(as_tuple=True)
        w1, w2, w3 = (
            getattr(layer.experts, n)[e].detach().float().requires_grad_() for n in ("w1", "w2", "w3")
        )
        rows, weight = tokens[token].requires_grad_(), weights[token, choice].requires_grad_()
        out = ((F.silu(rows @ w1) * (rows @ w3)) @ w2) * weight.unsqueeze(1)
        found = torch.autograd.grad(out, (rows, weight, w1, w2, w3), grad[token].float())
        y.index_add_(0, token, out.detach())
        total.index_add_(0, token, found[0])
        total_weights[token, choice] = found[1]
        for name, value in zip(("w1", "w2", "w3"), found[2:], strict=True):
            grads[name][e] = value
    mine = slice(comm.rank * len(x), (comm.rank + 1) * len(x))
    y, total, total_weights = (comm.all_reduce(t)[mine] for t in (y, total, total_weights))
    total = total + torch.autograd.grad(own_weights, wide, total_weights)[0]
    return {"y": y, "x": total} | grads


def errors(
    run: Callable, x: Tensor, named: dict[str, Tensor], expected: dict[str, Tensor]
) -> dict[str, float]:
    """Relative errors (Frobenius) of y and the gradients."""
    y = run()
    found = {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in named.items() if n in expected}
    return {
        n: float((found[n].float() - expected[n].float()).norm() / expected[n].float().norm()) for n in found
    }


def saved_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> int:
    """Bytes of the tensors that a forward pass saves for its backward, each storage once; x and parameters do not
    count, nor does what a function keeps beside save_for_backward."""
    others = {t.untyped_storage().data_ptr() for t in (x, *parameters)}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in others:
            saved[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # keeps the storage, so that no other gets its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(x)
    return sum(saved.values())


def kernel_times(run: Callable, repeats: int = 5) -> dict[str, float]:
    """{kernel: ms a pass}, the largest first, by torch's profiler; matrix products under one name a library."""
    families = {"quack": "quack", "cutlass": "grouped_mm", "nvjet": "cuBLAS"}  # the first that fits
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        if event.self_device_time_total:
            name = next((family for part, family in families.items() if part in event.key), event.key[:80])
            found[name] = found.get(name, 0.0) + event.self_device_time_total / 1e3 / repeats
    return {"all": sum(found.values())} | dict(sorted(found.items(), key=lambda item: -item[1])[:24])


def memory_gb(variant: Variant, run: Callable, x: Tensor) -> dict[str, float]:
    """What a forward pass keeps for its backward: kept_gb by the allocator, y and x left out, saved_gb by the saved
    tensors. peak_gb: the most that forward and backward take above what was there before."""
    found = {"saved_gb": saved_bytes(variant.forward, x, variant.parameters) / 1e9} if variant.hooks else {}
    if x.is_cuda:
        found["peak_gb"] = record.peak_bytes(run) / 1e9
        held = torch.cuda.memory_allocated()
        y = variant.forward(x)
        found["kept_gb"] = (torch.cuda.memory_allocated() - held - y.nbytes) / 1e9
    return found


def tokens(layer: ep.EPMoE, count: int) -> tuple[Tensor, Tensor]:
    """Random x [T, D], and a gradient for y."""
    shape, device = (count, layer.config.hidden_dim), layer.experts.w1.device
    x, grad = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(2))
    return x.requires_grad_(), grad


def prepare(
    recorder: record.Recorder, size: str, layer: ep.EPMoE, makers: dict[str, Callable[[], Variant]],
    batch: tuple[Tensor, Tensor], checked: tuple[Tensor, Tensor],
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, dict]]:  # fmt: skip
    """Makes each variant, holds it against the reference on the tokens `checked`, takes its memory on those of `batch`.

    -> {name: a pass over the batch}, {"errors", "memory"}, by name the largest of any rank. One of others that cannot
    run is left out, with a line; ours may not fail, and more than 2e-2 off is a failure. Collective.
    """
    passes, expected, result = {}, {}, {"errors": {}, "memory": {}}
    for name, make in makers.items():
        is_ours = name.startswith("ours")
        try:
            variant = make()
            if variant.divides not in expected:
                expected[variant.divides] = reference(layer, *checked, variant.divides)
            named = {} if variant.is_copy else dict(layer.experts.named_parameters())
            run = train_pass(variant.check or variant.forward, *checked, variant.parameters)
            found = {"errors": errors(run, checked[0], named, expected[variant.divides])}
            passes[name] = train_pass(variant.forward, *batch, variant.parameters)
            passes[name]()
            found["memory"] = memory_gb(variant, passes[name], batch[0])
        except Exception as error:
            if is_ours:
                raise
            passes.pop(name, None)
            recorder.say(f"  {size}: {name} left out: {type(error).__name__}: {str(error)[:300]}")
            continue
        by_rank = recorder.gather(found)
        for what, values in found.items():
            result[what][name] = {n: max(f[what][n] for f in by_rank) for n in values}
        worst = max(result["errors"][name].values())
        if is_ours and not worst <= 2e-2:
            recorder.failures.append(f"{size}: {name} is {worst:.1e} off the reference")
    return passes, result


def finish(recorder: record.Recorder, size: str, layer: ep.EPMoE, samples: dict, result: dict) -> dict:
    """The entry of one size: what prepare found, and times; a line for each variant, the fastest first."""
    c, num_tokens = layer.config, layer.config.max_num_tokens
    operations = 6 * num_tokens * c.top_k * 3 * c.hidden_dim * c.ffn_dim
    ms = record.medians(samples)
    rates = {name: operations / value / 1e9 for name, value in ms.items()}  # of one rank's tokens
    for name in sorted(ms, key=ms.get):
        worst = max(result["errors"].get(name, {"": 0.0}).values())
        memory = "".join(f" {what[:-3]} {gb:5.2f}" for what, gb in result["memory"].get(name, {}).items())
        times = f"{ms[name]:8.3f} ms {rates[name]:6.1f} TFLOP/s a rank"
        recorder.say(f"  {size:9} {name:30} {times}  error {worst:.1e} {memory}")
    shape = {
        name: getattr(c, name) for name in ("hidden_dim", "ffn_dim", "num_experts", "top_k", "dispatcher")
    }
    times = {"samples_ms": samples, "median_ms": ms, "tflop_per_s": rates}
    return {"tokens": num_tokens} | shape | result | times


def one_size(recorder: record.Recorder, size: str) -> dict:
    """Check, memory, time, kernels, on one rank."""
    layer = make_layer(recorder, size)
    makers = our_variants(recorder, layer) | {
        "plain glue": lambda: plain_glue(layer, compiled=False),
        "transformers": lambda: transformers_block(layer, compiled=False),
    }
    if recorder.args.compile:
        makers["compiled glue"] = lambda: plain_glue(layer, compiled=True)
        makers["transformers, compiled"] = lambda: transformers_block(layer, compiled=True)
    batch = tokens(layer, layer.config.max_num_tokens)
    passes, result = prepare(recorder, size, layer, makers, batch, checked=batch)
    timed = dict(passes)
    if recorder.on_gpu:
        timed |= {
            f"{n}, recorded": record.captured(run) for n, run in passes.items() if n.endswith(", grouped")
        }
    with torch.no_grad():
        counts = local_counts(layer, layer.router(batch[0]).topk_ids)
    for kind, products in {"grouped": ep.GroupedProducts, "blocks": ep.BlockProducts}.items():
        timed[f"products alone, {kind}"] = products_alone(layer, counts, products)
    samples = recorder.alternate(timed, 4, recorder.event_ms, warm_up=2)
    if recorder.on_gpu:
        ours = [name for name in passes if name.startswith(("ours, ", "before, "))]
        result["kernels_ms"] = {name: kernel_times(passes[name]) for name in ours}
    return finish(recorder, size, layer, samples, result)


def product_tflop_per_s(recorder: record.Recorder, n: int = 8192) -> float:
    """The rate of one large bfloat16 product, the machine's practical ceiling."""
    a, b = (torch.randn(n, n, device=recorder.device, dtype=torch.bfloat16) for _ in range(2))
    samples = recorder.alternate({"product": lambda: a @ b}, 4, recorder.event_ms, warm_up=2)
    return 2 * n**3 / record.medians(samples)["product"] / 1e9


def measure(recorder: record.Recorder) -> None:
    """Every size, into the file one by one."""
    ceiling = product_tflop_per_s(recorder, *([256] if recorder.args.small else []))
    recorder.say(f"{ceiling:.2f} TFLOP/s in one large bfloat16 product, this machine's ceiling")
    result: dict = {"cublas_tflop_per_s": ceiling, "sizes": {}}
    for size in recorder.args.sizes:
        if recorder.args.small and size not in SMALL_SIZES:
            continue
        result["sizes"][size] = one_size(recorder, size)
        recorder.free_memory()
        torch.compiler.reset()
        recorder.write("layer", result)
    for failure in recorder.failures:
        recorder.say(f"FAILED: {failure}")


def flags() -> argparse.ArgumentParser:
    """The flags."""
    parser = record.parser(__doc__, device="cuda", rounds=30, small=False, before=None)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


if __name__ == "__main__":
    record.main(measure, flags())
