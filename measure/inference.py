"""A layer's forward pass for few tokens and many: the inference path beside the training path and others. On one GPU.

    python measure/inference.py                  decode, prefill and parts, into results/<device>_inference.json
    python measure/inference.py --cache          besides, a layer of 16 GB in host memory behind caches of 2 to 16 GB
    python measure/inference.py --no-compile     without transformers' compiled block
    torchrun --standalone --nproc_per_node=2 measure/inference.py --two     decode over two, <device>_x2_inference.json
    python measure/inference.py --device cpu --small                       whether it runs, anywhere

One layer of Qwen3-30B-A3B (hidden 2048, 128 experts of 768, top-8) in bfloat16, random. Decode: what is timed is a
recorded graph of passes over different tokens, one after the other, as the layers of a model follow one another, so
that no weight waits in a cache; a sample is the time of a pass. The 99th percentile is of 200 single passes with their
launch. Everything is held against the layer first. Prefill is timed as calls, with the copies around a recorded batch.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import layer as layers  # noqa: E402
from measure import record  # noqa: E402

DECODE, PREFILL, CHAIN = (1, 8, 64, 256), (512, 1024, 2048, 4096, 8192, 16384), 8
SIZES = {"num_experts": 128, "top_k": 8, "hidden_dim": 2048, "ffn_dim": 768}
SMALL = {"num_experts": 8, "top_k": 2, "hidden_dim": 64, "ffn_dim": 48}


def make_layer(recorder: record.Recorder, mesh: ep.Mesh, dispatcher: str = "auto", **sizes: int) -> ep.EPMoE:
    """A random layer in eval mode, drawn on the device, where that takes no time."""
    options = (ep.RoutingOptions(normalize_topk=True),)
    sizes = sizes or (SMALL if recorder.args.small else SIZES)
    dtype = "bfloat16" if recorder.on_gpu else "float32"
    config = ep.MoEConfig(
        **sizes, activation="swiglu", dtype=dtype, dispatcher=dispatcher, max_num_tokens=16384, extras=options
    )
    with torch.device("meta"):
        layer = ep.EPMoE(config, mesh, seed=0)
    layer = layer.to_empty(device=recorder.device).eval().requires_grad_(False)
    torch.manual_seed(0)  # the router is the same on every rank
    for parameter in layer.router.parameters():
        parameter.normal_(std=0.02)
    for parameter in layer.experts.parameters():
        parameter.normal_(std=0.02)
    return layer


def draw(layer: ep.EPMoE, num_tokens: int) -> Tensor:
    """Random x [T, D]."""
    w1 = layer.experts.w1
    return torch.randn(num_tokens, layer.config.hidden_dim, device=w1.device).to(w1.dtype)


def in_parts(layer: ep.EPMoE, decode: ep.DecodeKernels, x: Tensor) -> Tensor:
    """The decode kernels behind the layer's own router: a rung of the ladder."""
    routing, e = layer.router(x), layer.experts
    decode.put_on_lists(routing.topk_ids)
    decode.compute(x, routing.topk_weights, e.w1, e.w2, e.w3)
    return decode.sum_up(routing.topk_ids)


def decode_variants(
    recorder: record.Recorder, layer: ep.EPMoE, num_tokens: int
) -> dict[str, Callable[[Tensor], Tensor]]:
    """{name: forward}, each legal in a graph."""
    step = ep.ForwardStep(layer, ep.replace(layer.config, max_num_tokens=num_tokens), layer.experts)
    count = torch.tensor([num_tokens], device=recorder.device)
    variants = {"layer, recorded": layer, "inference, recorded": lambda x: step(x, count)}
    if recorder.on_gpu:
        decode = ep.DecodeKernels(num_tokens, layer.config.top_k, layer.experts.w1)
        variants["decode kernels, own router"] = functools.partial(in_parts, layer, decode)
        for name, compiled in (("transformers", False), ("transformers, compiled", True)):
            if compiled and (not recorder.args.compile or num_tokens == 64):  # a compilation takes its time
                continue
            try:
                torch.compiler.reset()
                forward = layers.transformers_block(layer, compiled).forward
                forward(draw(layer, num_tokens))
                variants[name + ", recorded"] = forward
            except Exception as error:
                recorder.say(f"  {name} left out: {type(error).__name__}: {str(error)[:200]}")
    return variants


def chained(recorder: record.Recorder, forward: Callable, xs: list[Tensor]) -> Callable[[], object]:
    """The passes over all xs, as one graph where there is a GPU."""

    def run() -> list[Tensor]:
        return [forward(x) for x in xs]

    return record.captured(run, warm_up=2) if recorder.on_gpu else run


def check(recorder: record.Recorder, name: str, found: Tensor, expected: Tensor) -> float:
    """How far off the layer; ours by more than 2e-2 is a failure. (Others route in bfloat16, and choose otherwise.)"""
    error = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < 2e-2 and "transformers" not in name:
        recorder.failures.append(f"{name} is {error:.1e} off the layer")
    return error


def decode(recorder: record.Recorder, layer: ep.EPMoE, num_tokens: int) -> dict:
    """One batch size."""
    xs = [draw(layer, num_tokens) for _ in range(CHAIN)]
    needed = sum(len(layer.router(x).topk_ids.unique()) for x in xs) / CHAIN
    variants = decode_variants(recorder, layer, num_tokens)
    expected, errors = layer(xs[0]), {}
    for name, forward in variants.items():
        errors[name] = check(recorder, f"{num_tokens} tokens, {name}", forward(xs[0]), expected)
    timed = {name: chained(recorder, forward, xs) for name, forward in variants.items()}
    if recorder.on_gpu:
        timed["layer"] = lambda: [layer(x) for x in xs]
    samples = recorder.alternate(timed, 1, recorder.event_ms, warm_up=2)
    samples = {name: [ms * 1e3 / CHAIN for ms in values] for name, values in samples.items()}
    steps = 8 if recorder.args.small else 200
    single = {name: [chained(recorder, forward, [x]) for x in xs] for name, forward in variants.items()}
    times = {
        name: [recorder.event_ms(runs[n % CHAIN], 1) * 1e3 for n in range(-5, steps)][5:]
        for name, runs in single.items()
    }
    per_expert = sum(p[0].nbytes for p in layer.experts.parameters())
    result = {
        "experts": needed,
        "weights_gb": needed * per_expert / 1e9,
        "errors": errors,
        "median_us": record.medians(samples),
        "single_us": record.medians(times),
        "p99_us": {name: ep.quantile(values, 0.99) for name, values in times.items()},
        "samples_us": samples,
    }
    if recorder.on_gpu:
        kernels = layers.kernel_times(lambda: variants["inference, recorded"](xs[0]))
        result["kernels_us"] = {name: ms * 1e3 for name, ms in kernels.items()}
    return result


def prefill(recorder: record.Recorder, layer: ep.EPMoE, num_tokens: int) -> dict:
    """One large batch: a call of the layer as it is, and of the inference path, with and without a recorded batch."""
    x = draw(layer, num_tokens)
    plain, fixed = (ep.for_inference(layer, num_tokens, sizes) for sizes in ((), (num_tokens,)))
    check(recorder, f"{num_tokens} tokens", fixed(x), layer(x))
    timed = {
        "layer": lambda: layer(x),
        "inference": lambda: plain(x),
        "inference, recorded": lambda: fixed(x),
    }
    samples = recorder.alternate(timed, 2, recorder.event_ms, warm_up=2)
    steps = [
        recorder.event_ms(timed["inference, recorded"], 1) for _ in range(8 if recorder.args.small else 200)
    ]
    medians = {name: ms * 1e3 for name, ms in record.medians(samples).items()}
    return {"median_us": medians, "p99_us": {"inference, recorded": ep.quantile(steps, 0.99) * 1e3}}


def ceilings(recorder: record.Recorder) -> dict[str, float]:
    """The rate at which memory is read, and that of one large bfloat16 product."""
    size = 1 << (20 if recorder.args.small else 29)
    block = torch.randn(size, device=recorder.device).to(torch.bfloat16)
    ms = record.medians(recorder.alternate({"read": lambda: block.sum()}, 4, recorder.event_ms, warm_up=2))[
        "read"
    ]
    n = 256 if recorder.args.small else 8192
    return {
        "read_gb_per_s": block.nbytes / ms / 1e6,
        "cublas_tflop_per_s": layers.product_tflop_per_s(recorder, n),
    }


def zipf_router(config: ep.MoEConfig, device: torch.device) -> ep.Router:
    """A router whose experts are popular in about 1 / rank: a bias of that logarithm, and noise from the tokens."""
    router = ep.Router(config, 0, device).requires_grad_(False)
    router.gate.weight.normal_(std=1.28 / config.hidden_dim**0.5)
    router.gate.bias.copy_(-torch.arange(1, config.num_experts + 1).log())
    return router


class FirstColumns(torch.nn.Module):
    """A router [T, width] before a wider layer: it looks at the first columns alone."""

    def __init__(self, router: ep.Router, width: int) -> None:
        super().__init__()
        self.router, self.width = router, width

    def forward(self, x: Tensor, choice_bias: Tensor | None = None) -> ep.Routing:
        """x [T, D], D at least width."""
        return self.router(x[:, : self.width].float(), choice_bias)


@torch.enable_grad()
def trained_router(config: ep.MoEConfig, width: int, device: torch.device) -> tuple[FirstColumns, Callable]:
    """Of a small layer with as many experts, trained on chapter 09's clusters without balance; and a function
    that draws four tokens [4, width] of those clusters."""
    mesh = ep.Mesh(*[ep.Communicator.alone()] * 3)
    small = ep.MoEConfig(
        config.num_experts, config.top_k, width, 32, balance="none", extras=(ep.ClusterOptions(),)
    )
    layer = ep.EPMoE(small, mesh, seed=0, device=device)
    stream = ep.ClusterStream(small, 0, 256, mesh.batch, device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=4e-3, fused=True)
    for _ in range(100):
        optimizer.zero_grad()
        ep.train_step(layer, mesh, stream, [stream.next()], ep.TrainingOptions())
        optimizer.step()
    stream.num_tokens = 4
    return FirstColumns(layer.router.requires_grad_(False), width), lambda: stream.next()[0]


def cached(recorder: record.Recorder, read_gb_per_s: float) -> dict:
    """A layer of 16 GB in pinned host memory, caches of 2 to 16 GB on the device."""
    d, f, num_experts = (64, 64, 16) if recorder.args.small else (5120, 4096, 128)
    dtype, device = (torch.bfloat16, "cuda") if recorder.on_gpu else (torch.float32, "cpu")
    config = ep.MoEConfig(
        num_experts, 4, d, f, activation="swiglu", dtype="bfloat16" if recorder.on_gpu else "float32"
    )
    host = {}
    for name, shape in {"w1": (d, f), "w2": (f, d), "w3": (d, f)}.items():
        host[name] = torch.empty(num_experts, *shape, dtype=dtype, pin_memory=recorder.on_gpu)
        for expert in host[name]:
            expert.copy_(torch.randn(shape, device=device).mul_(0.02))
    some = torch.empty_like(host["w1"][0], device=device)
    ms = record.medians(
        recorder.alternate(
            {"copy": lambda: some.copy_(host["w1"][0], non_blocking=True)}, 4, recorder.event_ms
        )
    )["copy"]
    result = {"pcie_gb_per_s": some.nbytes / ms / 1e6, "expert_mb": 3 * some.nbytes / 1e6, "lines": []}
    result["read_gb_per_s"] = read_gb_per_s
    for load in ("zipf", "trained"):
        if load == "zipf":
            router, draw = zipf_router(config, recorder.device), lambda: torch.randn(4, d, device=device)
        else:
            router, few = trained_router(config, 64, recorder.device)
            draw = functools.partial(widened, few, d)
        tokens = [draw().to(dtype) for _ in range(2 * (6 if recorder.args.small else 40))]
        sample = [router(draw().to(dtype)).topk_ids.unique() for _ in range(400)]
        counted = [torch.bincount(ids.cpu(), minlength=num_experts) for ids in sample]
        needed = torch.stack(counted).double().mean(0)
        for gb, policy in itertools.product((2, 4, 8, 16), ep.REGISTRIES["cache_policy"]):
            slots = min(num_experts, max(1, round(num_experts * gb / 16)))
            line = {"load": load, "policy": policy, "cache_gb": gb, "slots": slots}
            line |= one_cache(router, host, slots, policy, tokens, needed, result, recorder)
            result["lines"].append(line)
            recorder.say(f"  {line}")
    return result


def widened(draw: Callable[[], Tensor], width: int) -> Tensor:
    """What is drawn, with random columns behind it, [n, width]."""
    x = draw()
    return torch.cat([x, torch.randn(len(x), width - x.shape[1], device=x.device)], dim=1)


def one_cache(
    router: torch.nn.Module, host: dict, slots: int, policy: str, tokens: list[Tensor], needed: Tensor, facts: dict,
    recorder: record.Recorder,
) -> dict:  # fmt: skip
    """Half of the steps warm it up, the other half is timed. Predicted: misses over PCIe, and all that is needed over
    the device's memory."""
    cache = ep.ExpertCache(host, slots, policy, ep.SwiGLU, recorder.device)
    model, half = ep.CachedMoE(router, cache), len(tokens) // 2
    for x in tokens[:half]:
        model(x)
    cache.hits = cache.misses = 0
    rest = iter(tokens[half:])
    ms = recorder.wall_ms(lambda: model(next(rest)), half)
    share = sum(ep.expected_hits(needed, slots, policy)) / 2
    needed_mb = needed.sum().item() * facts["expert_mb"]
    step_ms = (1 - share) * needed_mb / facts["pcie_gb_per_s"] + needed_mb / facts["read_gb_per_s"]
    return {
        "hit_rate": cache.hits / (cache.hits + cache.misses),
        "predicted_hit_rate": share,
        "tokens_per_s": 4e3 / ms,
        "predicted_tokens_per_s": 4e3 / step_ms,
    }


def two(recorder: record.Recorder) -> None:
    """Decode over several GPUs: so many tokens a rank, by every dispatcher that records; beside one GPU with all."""
    mesh, alone = ep.init_ep(), ep.Mesh(*[ep.Communicator.alone()] * 3)
    result: dict = {"tokens": {}}
    whole, shared = make_layer(recorder, alone), {}
    for name, kind in ep.REGISTRIES["dispatcher"].items():
        config = ep.MoEConfig(**SIZES, dispatcher=name)
        if (
            kind.records
            and not kind.needs_capacity
            and kind.preference(config, recorder.device, mesh.ep.size) > 0
        ):
            shared[name] = make_layer(recorder, mesh, name)
    if "peer" in shared:
        result["exchange"] = exchange(recorder, mesh)
        recorder.say(f"  exchange alone: {result['exchange']['median_us']}")
    for num_tokens in (1, 4) if recorder.args.small else (1, 2, 4, 8, 16, 32, 64, 128, 256):
        timed, xs = {}, [draw(whole, num_tokens * mesh.ep.size) for _ in range(CHAIN)]
        fast = ep.for_inference(whole, len(xs[0]), sizes=(len(xs[0]),))
        timed["one GPU, all tokens"] = functools.partial(replay, fast, itertools.cycle(xs))
        for name, layer in shared.items():
            own = [x[mesh.ep.rank * num_tokens :][:num_tokens] for x in xs]  # x is the same on all ranks
            fast = ep.for_inference(layer, num_tokens, sizes=(num_tokens,))
            check(recorder, f"{num_tokens} tokens, {name}", fast(own[0]), layer(own[0]))
            timed[name] = functools.partial(replay, fast, itertools.cycle(own))
        samples = recorder.alternate(timed, CHAIN, recorder.event_ms, warm_up=3)
        samples = {name: [ms * 1e3 for ms in values] for name, values in samples.items()}
        median = record.medians(samples)
        result["tokens"][num_tokens] = {"median_us": median, "samples_us": samples}
        recorder.say(
            f"  {num_tokens:4} tokens a rank: { ({name: round(us, 1) for name, us in median.items()}) }"
        )
        recorder.write(f"x{mesh.ep.size}_inference", result)
    for failure in recorder.failures:
        print(f"FAILED on rank {mesh.ep.rank}: {failure}", flush=True)


def exchange(recorder: record.Recorder, mesh: ep.Mesh) -> dict:
    """Dispatch, and dispatch with combine, by peer, of DeepEP's published batch: 128 tokens of hidden 7168 a rank,
    top-8 of 256 experts, here in bfloat16 both ways. Recorded, eight in a graph; nothing is computed in between."""
    num_tokens, d, num_experts = (4, 64, 8) if recorder.args.small else (128, 7168, 256)
    config = ep.MoEConfig(
        num_experts, min(8, num_experts), d, 64, max_num_tokens=num_tokens, dtype="bfloat16"
    )
    peer = ep.REGISTRIES["dispatcher"]["peer"].for_layer(config, mesh.ep)
    x = torch.randn(num_tokens, d, device=recorder.device).to(torch.bfloat16)
    choice = torch.rand(num_tokens, num_experts, device=recorder.device).topk(config.top_k)
    ids, weights = choice.indices, choice.values

    def both() -> Tensor:
        arrived = peer.dispatch(x, ids, weights)
        return peer.combine(arrived.x, arrived.handle)

    y = both()
    ranks = [(ids // (num_experts // mesh.ep.size) == rank).any(1) for rank in range(mesh.ep.size)]
    check(recorder, "exchange", y, x * torch.stack(ranks).sum(0)[:, None])
    timed = {"dispatch": lambda: peer.dispatch(x, ids, weights), "dispatch and combine": both}
    timed = {name: chained(recorder, lambda _, run=run: run(), [x] * CHAIN) for name, run in timed.items()}
    samples = recorder.alternate(timed, 1, recorder.event_ms, warm_up=3)
    samples = {name: [ms * 1e3 / CHAIN for ms in values] for name, values in samples.items()}
    rows = sum(int(there.sum()) for rank, there in enumerate(ranks) if rank != mesh.ep.rank)
    facts = {"tokens": num_tokens, "hidden_dim": d, "num_experts": num_experts, "top_k": config.top_k}
    sent = {"rows_sent": rows, "row_bytes": 2 * d}
    return facts | sent | {"median_us": record.medians(samples), "samples_us": samples}


def replay(fast: ep.InferenceMoE, tokens: Iterator[Tensor]) -> None:
    """The recorded batch, on other tokens each time, without a copy of what comes back."""
    x = next(tokens)
    (batch,) = fast.batches.values()
    if batch.graph is None:
        fast(x)
    else:
        batch.x.copy_(x), batch.num_tokens.fill_(len(x)), batch.graph.replay()


@torch.no_grad()
def measure(recorder: record.Recorder) -> None:
    """All of it, into the file part by part."""
    if recorder.args.two:
        return two(recorder)
    layer = make_layer(recorder, ep.Mesh(*[ep.Communicator.alone()] * 3))
    result: dict = ceilings(recorder) | {
        "layer": SMALL if recorder.args.small else SIZES,
        "tokens": {},
        "prefill": {},
    }
    for num_tokens in recorder.args.tokens or (DECODE[:2] if recorder.args.small else DECODE):
        line = result["tokens"][num_tokens] = decode(recorder, layer, num_tokens)
        floor = line["weights_gb"] / result["read_gb_per_s"] * 1e6
        recorder.say(f"{num_tokens} tokens, {line['experts']:.1f} experts, read once {floor:.1f} us")
        for name, us in sorted(line["median_us"].items(), key=lambda item: item[1]):
            recorder.say(
                f"  {name:34} {us:9.1f} us  {floor / us:4.0%}  p99 {line['p99_us'].get(name, float('nan')):9.1f}"
            )
        recorder.say(
            f"  kernels: { ({n[:24]: round(us, 1) for n, us in line.get('kernels_us', {}).items()}) }"
        )
        recorder.write("inference", result)
    for num_tokens in PREFILL[:1] if recorder.args.small else PREFILL:
        line = result["prefill"][num_tokens] = prefill(recorder, layer, num_tokens)
        recorder.say(
            f"{num_tokens} tokens: { ({name: round(us, 1) for name, us in line['median_us'].items()}) } us"
        )
    recorder.write("inference", result)
    if recorder.args.cache:
        del layer
        recorder.free_memory()
        result["cache"] = cached(recorder, result["read_gb_per_s"])
        recorder.write("inference", result)
    for failure in recorder.failures:
        recorder.say(f"FAILED: {failure}")


def flags() -> argparse.ArgumentParser:
    """The flags."""
    parser = record.parser(__doc__, device="auto", rounds=30, small=False)
    parser.add_argument("--tokens", type=int, nargs="+", help="decode batches, in place of 1, 8, 64, 256")
    parser.add_argument("--cache", action="store_true", help="experts in host memory, too")
    parser.add_argument(
        "--two", action="store_true", help="decode over all ranks of torchrun, and nothing else"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


if __name__ == "__main__":
    record.main(measure, flags())
