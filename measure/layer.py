"""A whole MoE layer on one GPU, forward and backward, beside others, at the sizes of three known models.

    python measure/layer.py                     all sizes, into results/<device>_layer.json
    python measure/layer.py --sizes qwen --rounds 20 --no-compile
    python measure/layer.py --before build/before.py   beside another commit's launcher.py (measure/before.py)

Every variant gets the same tokens and weights in bfloat16, random. From routing to unpermute, x and all parameters
with gradients. Variants alternate within each round; a sample is several passes between CUDA events, back to back, as
the layers of a model follow one another. Before anything is timed, every variant is held against a float32 reference
that makes the same choices. Memory is what a forward pass keeps for its backward, and the peak of both.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import before  # noqa: E402

SIZES = {  # tokens, then the layer
    "mixtral": (8192, {"hidden_dim": 4096, "ffn_dim": 14336, "num_experts": 8, "top_k": 2}),
    "qwen": (16384, {"hidden_dim": 2048, "ffn_dim": 768, "num_experts": 128, "top_k": 8}),
    "deepseek": (8192, {"hidden_dim": 7168, "ffn_dim": 2048, "num_experts": 32, "top_k": 8}),
}


def fill(parameter: Tensor, fan_in: int, *seeds: Any) -> None:
    """Random numbers made on the device: the launcher's own are drawn on the CPU, too slowly for these sizes."""
    with torch.no_grad():
        parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5)


def make_layer(
    launcher: before.Launcher, num_tokens: int, shape: dict, dispatcher: str, device: torch.device
) -> ep.EPMoE:
    """A layer of ours in bfloat16, the gate's numbers after torch's seed, which so has to be the same on all ranks.

    The gate has no bias, and weights that bfloat16 holds: the others' gates have no more.
    """
    config = ep.MoEConfig(
        **shape, max_num_tokens=num_tokens, activation="swiglu", dtype="bfloat16", balance="none",
        router_bias=False, dispatcher=dispatcher, experts="grouped",
    )  # fmt: skip
    layer = launcher.layer(config, device, fill)
    with torch.no_grad():
        layer.router.gate.weight.copy_(layer.router.gate.weight.bfloat16())
    return layer


def our_forwards(
    launchers: dict[str, before.Launcher], layer: ep.EPMoE, label: str = ""
) -> dict[str, tuple[Callable, list]]:
    """{name: (x -> y, parameters)}: each launcher's layer with grouped and with blocks, on the weights of `layer`."""
    found = {}
    for prefix, launcher in launchers.items():
        for experts in ("grouped", "blocks"):
            other = launcher.sharing(layer, experts=experts)
            forward = lambda x, launcher=launcher, other=other: launcher.forward(other, x)[0]  # noqa: E731
            found[f"{prefix or 'ours, '}{label}{experts}"] = forward, list(other.parameters())
    return found


def plain_glue(layer: ep.EPMoE, compiled: bool) -> Callable[[Tensor], Tensor]:
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

    return torch.compile(forward) if compiled else forward


def transformers_block(layer: ep.EPMoE, compiled: bool) -> tuple[Callable[[Tensor], Tensor], list]:
    """transformers' Mixtral block with its grouped_mm experts, on copies of the layer's weights -> see our_forwards."""
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
    return lambda x: run(x.unsqueeze(0)).squeeze(0), list(block.parameters())


def products_alone(layer: ep.EPMoE, x: Tensor, products: type) -> Callable[[], None]:
    """The nine matrix products of a forward and backward pass, and nothing else."""
    with torch.no_grad():
        order = ep.order_rows(layer.router(x).topk_ids, layer.config.num_experts)
        rows = ep.copy_to_rows(x, order)
        plan = products(order.counts, len(rows))
        w1, w2, w3 = (getattr(layer.experts, name).detach() for name in ("w1", "w2", "w3"))
        up, third, y = plan.times(rows, w1), plan.times(rows, w3), torch.randn_like(rows)

    def run() -> None:
        with torch.no_grad():
            plan.times(rows, w1), plan.times(rows, w3), plan.times(up, w2)
            plan.times(y, w2.transpose(1, 2)), plan.weight_gradient(up, y)
            plan.weight_gradient(rows, up), plan.weight_gradient(rows, third)
            first = plan.times(up, w1.transpose(1, 2))
            plan.add_times(first, third, w3.transpose(1, 2))

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


def recorded(run: Callable[[], Tensor]) -> Callable[[], None]:
    """The pass as a CUDA graph: legal where nothing in it asks the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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


def time_all(variants: dict[str, Callable], rounds: int, passes: int = 4) -> dict[str, list[float]]:
    """{name: samples in ms a pass}, alternating; two rounds warm up."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, run in variants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(passes):
                run()
            end.record()
            end.synchronize()
            if turn > 1:
                samples[name].append(start.elapsed_time(end) / passes)
    return samples


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


def memory_gb(
    forward: Callable, run: Callable, x: Tensor, parameters: list[Tensor], hooks: bool
) -> dict[str, float]:
    """What a forward pass keeps for its backward: kept_gb by the allocator, y and x left out, saved_gb by the saved
    tensors (where hooks). peak_gb: the most that forward and backward take above what was there before."""
    found = {"saved_gb": saved_bytes(forward, x, parameters) / 1e9} if hooks else {}
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_run = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        found["peak_gb"] = (torch.cuda.max_memory_allocated() - before_run) / 1e9
        before_run = torch.cuda.memory_allocated()
        y = forward(x)
        found["kept_gb"] = (torch.cuda.memory_allocated() - before_run - y.nbytes) / 1e9
    return found


def kernel_times(run: Callable, repeats: int = 5) -> dict[str, float]:
    """{kernel: ms a pass}, the largest first, by torch's profiler; matrix products under one name a library."""
    families = {"cutlass": "grouped_mm", "nvjet": "cuBLAS"}
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


def cublas_tflop_per_s(n: int = 8192) -> float:
    """The rate of one large bfloat16 product, the machine's practical ceiling."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    samples = time_all({"product": lambda: a @ b}, 20)
    return 2 * n**3 / statistics.median(samples["product"]) / 1e9


def measure(
    size: str, args: argparse.Namespace, launchers: dict[str, before.Launcher], device: torch.device
) -> dict:
    """One size: check, time, memory, kernels."""
    num_tokens, shape = SIZES[size]
    torch.manual_seed(0)
    layer = make_layer(launchers[""], num_tokens, shape, "local", device)
    own, config = list(layer.parameters()), layer.config
    x = torch.randn(num_tokens, config.hidden_dim, device=device, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x)
    forwards = our_forwards(launchers, layer)
    others: dict[str, Callable] = {
        "plain glue": lambda: (plain_glue(layer, compiled=False), own),
        "transformers": lambda: transformers_block(layer, compiled=False),
        "compiled glue": lambda: (plain_glue(layer, compiled=True), own),
        "transformers, compiled": lambda: transformers_block(layer, compiled=True),
    }
    result: dict = {"tokens": num_tokens, **shape, "errors": {}, "memory": {}, "kernels_ms": {}}
    named = dict(layer.experts.named_parameters())
    passes = {name: train_pass(forward, x, grad, p) for name, (forward, p) in forwards.items()}
    for name, make in others.items():
        if not args.compile and "compiled" in name:
            continue
        try:
            forwards[name] = make()
            run = train_pass(forwards[name][0], x, grad, forwards[name][1])
            run()
            passes[name] = run
        except Exception as error:
            print(f"{size}: {name} left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
    expected = {divides: reference(layer, x, grad, divides) for divides in (False, True)}
    for name, run in passes.items():
        is_theirs = "transformers" in name
        result["errors"][name] = errors(run, x, {} if is_theirs else named, expected[is_theirs])
    del expected
    for name, run in passes.items():
        forward, parameters = forwards[name]
        result["memory"][name] = memory_gb(forward, run, x, parameters, hooks="compiled" not in name)
    recorded_too = [name for name in passes if name.endswith(", grouped")]
    timed = passes | {f"{name}, recorded": recorded(passes[name]) for name in recorded_too}
    for kind, products in {"grouped": ep.GroupedProducts, "blocks": ep.BlockProducts}.items():
        timed[f"products alone, {kind}"] = products_alone(layer, x, products)
    result["samples_ms"] = time_all(timed, args.rounds)
    result["median_ms"] = {name: statistics.median(values) for name, values in result["samples_ms"].items()}
    for name in [name for name in passes if name.split(", ")[0] in ("ours", "before")]:
        result["kernels_ms"][name] = kernel_times(passes[name])
    operations = 6 * num_tokens * config.top_k * 3 * config.hidden_dim * config.ffn_dim
    result["tflop_per_s"] = {name: operations / ms / 1e9 for name, ms in result["median_ms"].items()}
    for name, ms in sorted(result["median_ms"].items(), key=lambda item: item[1]):
        worst = max(result["errors"].get(name, {"": 0.0}).values())
        memory = "".join(f" {what[:-3]} {gb:5.2f}" for what, gb in result["memory"].get(name, {}).items())
        rate = result["tflop_per_s"][name]
        print(f"{size:9} {name:26} {ms:8.3f} ms {rate:6.0f} TFLOP/s  error {worst:.1e} {memory}", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument(
        "--rounds", type=int, default=30, help="samples of each variant, at least 20 for results/"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    before.add_flag(parser)
    parser.add_argument("--output", default=str(ROOT / "results"), help="folder for the result")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this measures a GPU, and there is none", file=sys.stderr)
        return 2
    model = torch.cuda.get_device_name()
    result = {
        "what": "layer", "device": model, "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": ep.triton and ep.triton.__version__, "python": sys.version.split()[0],
        "command": f"python measure/layer.py --sizes {' '.join(args.sizes)} --rounds {args.rounds}"
        + " --before FILE" * bool(args.before),
        "cublas_tflop_per_s": cublas_tflop_per_s(), "sizes": {},
    } | before.before_facts(args)  # fmt: skip
    print(
        f"{model}: {result['cublas_tflop_per_s']:.0f} TFLOP/s in one 8192-cubed bfloat16 product", flush=True
    )
    launchers, device = before.launchers(args), torch.device("cuda")
    for size in args.sizes:
        result["sizes"][size] = measure(size, args, launchers, device)
        torch.cuda.empty_cache()
        torch.compiler.reset()
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        slug = "h100" if "H100" in model else "h200" if "H200" in model else "cuda"
        (folder / f"{slug}_layer.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
