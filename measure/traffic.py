"""The dispatchers of chapters 10 and 11 on several GPUs, beside chapter 07's: exchanges, layers, the default step.

    torchrun --standalone --nproc_per_node=2 measure/traffic.py            into results/<device>_x<N>_traffic.json
    torchrun --standalone --nproc_per_node=2 measure/traffic.py --device cpu --parts step
    torchrun --standalone --nproc_per_node=2 measure/traffic.py --device cpu --small      whether it runs, anywhere

Exchange: dispatch and combine, forward, of 4,096 tokens a rank, hidden 7,168, top-8 of 256 experts, bfloat16, beside
the all-to-all of as many bytes and nothing else. Small: the same with 128 tokens. Kernels: those of chapter 11 by
their number of programs, and the copy engine. Step: the launcher's, with its defaults, and what its kernels take;
sums of a few numbers. Layers: forward and backward at the sizes of measure/layer.py with the experts that `auto`
takes, each held against its reference first. What records is timed recorded too.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import before, layer, record  # noqa: E402
from measure.record import Recorder  # noqa: E402

NAMES = ("all_to_all", "dedup", "gather_tokens", "peer")
LIBRARY = "peer, recorded, the library's sums"
PROGRAMS = (8, 16, 32, 64, 132, 264, 528, 1056, 2112)


def exchange_config(recorder: Recorder) -> ep.MoEConfig:
    """The exchange's sizes: DeepSeek-V3's, 4,096 tokens a rank."""
    num_tokens, d, num_experts = (64, 64, 16) if recorder.args.small else (4096, 7168, 256)
    return ep.MoEConfig(num_experts, 8, d, 2048, max_num_tokens=num_tokens, dtype="bfloat16")


def recorded(
    recorder: Recorder, variants: dict[str, Callable], kinds: dict[str, ep.Dispatcher]
) -> dict[str, Callable]:
    """{name: a replay} of what there_and_back runs, by the dispatchers that record: each way, and both in one graph."""
    found = {}
    for name in (name for name, kind in kinds.items() if kind.records and recorder.on_gpu):
        ways = [variants[f"{name}, {way}"] for way in ("dispatch", "combine")]
        found[f"{name}, dispatch, recorded"], found[f"{name}, combine, recorded"] = map(record.captured, ways)
        found[f"{name}, there and back, recorded"] = record.captured(
            lambda ways=ways: [run() for run in ways]
        )
    return found


def there_and_back(
    recorder: Recorder, config: ep.MoEConfig, kinds: dict[str, ep.Dispatcher], unmetered: tuple[str, ...] = ()
) -> tuple[dict, dict, dict]:
    """Each dispatcher's dispatch and combine: {name, way: what runs it}, {name, way: mean bytes that leave a rank} and
    {name: how far off tokens came home}. Bytes must be those that the meter counts; unmetered: whose exchange has none.
    """
    comm, device, variants, sent, errors = recorder.comm, recorder.device, {}, {}, {}
    torch.manual_seed(comm.rank)
    num_tokens, d = config.max_num_tokens, config.hidden_dim
    weights, ids = torch.rand(num_tokens, config.num_experts, device=device).topk(config.top_k)
    weights = weights / config.top_k
    x = torch.randn(num_tokens, d, device=device).to(torch.bfloat16)
    expected = x.float() * weights.sum(1, keepdim=True)
    every_ids = [torch.tensor(i) for i in recorder.gather(ids.tolist())]
    for name, kind in kinds.items():
        before = {way: comm.meter.total(way) for way in ("dispatch", "combine")}
        arrived = kind.dispatch(x, ids, weights)
        weight = torch.where(arrived.topk_ids < 0, 0, arrived.topk_weights).sum(1, keepdim=True)
        echo, handle = torch.where(weight > 0, arrived.x, 0) * weight.to(x.dtype), arrived.handle
        y = kind.combine(echo, handle)
        predicted = kind.predict_bytes(every_ids, d, x.dtype)
        for way, earlier in before.items():
            own, counted = int(predicted[way][comm.rank].sum()), comm.meter.total(way) - earlier
            sent[f"{name}, {way}"] = statistics.mean(recorder.gather(own))
            if name not in unmetered and counted != own:
                recorder.failures.append(f"{name}, {way} sent {counted} bytes, not {own}")
        errors[name] = max(recorder.gather(float((y.float() - expected).norm() / expected.norm())))
        if not errors[name] <= 2e-2:
            recorder.failures.append(f"{name}: tokens came back {errors[name]:.1e} off")
        variants[f"{name}, dispatch"] = lambda kind=kind: kind.dispatch(x, ids, weights)
        variants[f"{name}, combine"] = lambda kind=kind, y=echo, handle=handle: kind.combine(y, handle)
    return variants, sent, errors


def exchange(recorder: Recorder) -> dict:
    """Each dispatcher's way there and back, its bytes against the meter's, and the wire alone with as many rows."""
    comm, config = recorder.comm, exchange_config(recorder)
    num_tokens, d = config.max_num_tokens, config.hidden_dim
    kinds = {name: ep.REGISTRIES["dispatcher"][name].for_layer(config, comm) for name in NAMES}
    variants, sent, errors = there_and_back(recorder, config, kinds)
    variants |= recorded(recorder, variants, kinds)
    for name in kinds:
        rows = int(sent[f"{name}, combine"] / (d * 2) / max(1, comm.size - 1))  # to each other rank
        outgoing = torch.zeros(comm.size * rows, d, dtype=torch.bfloat16, device=recorder.device)
        incoming = torch.empty_like(outgoing)
        variants[f"{name}, wire alone"] = lambda i=incoming, o=outgoing: dist.all_to_all_single(i, o)
    variants |= wires(recorder, num_tokens, d)
    samples = recorder.alternate(variants, 2 if recorder.args.small else 5)
    ms = record.medians(samples)
    for name, value in ms.items():
        recorder.say(f"  {name:48} {value:8.3f} ms  {sent.get(name, 0) / 1e6:8.1f} MB leave")
    return {"tokens": num_tokens, "hidden_dim": d, "num_experts": config.num_experts, "top_k": 8, "errors": errors,
            "mean_bytes_that_leave": sent, "median_ms": ms, "samples_ms": samples}  # fmt: skip


def small(recorder: Recorder) -> dict:
    """128 tokens a rank, as when a model writes: there and back, by the wall of several in a row."""
    config = replace(exchange_config(recorder), max_num_tokens=128)
    kinds = {name: ep.REGISTRIES["dispatcher"][name].for_layer(config, recorder.comm) for name in NAMES}
    ways, sent, errors = there_and_back(recorder, config, kinds)
    both = {n: [ways[f"{n}, {way}"] for way in ("dispatch", "combine")] for n in kinds}
    variants = {f"{n}, there and back": lambda pair=pair: [run() for run in pair] for n, pair in both.items()}
    variants |= recorded(recorder, ways, kinds)
    samples = recorder.alternate(variants, 2 if recorder.args.small else 50)
    ms = record.medians(samples)
    for name, value in ms.items():
        recorder.say(f"  {name:48} {value * 1e3:8.1f} us")
    return {
        "tokens": 128,
        "errors": errors,
        "mean_bytes_that_leave": sent,
        "median_ms": ms,
        "samples_ms": samples,
    }


def kernels(recorder: Recorder) -> dict:
    """Chapter 11's kernels at the exchange's sizes by their number of programs; a copy of as many bytes each way."""
    if not recorder.on_gpu or recorder.comm.size == 1:
        return {}
    comm, config = recorder.comm, exchange_config(recorder)
    kinds = {"peer": ep.REGISTRIES["dispatcher"]["peer"].for_layer(config, comm)}
    ways, sent, _ = there_and_back(recorder, config, kinds)
    found: dict[str, dict[int, float]] = {}
    for programs in PROGRAMS:
        with mock.patch.object(ep, "NUM_PROGRAMS", programs):
            [run() for run in ways.values()]
            comm.all_reduce(torch.zeros(1, device=recorder.device))
            times = layer.kernel_times(lambda: [run() for run in ways.values()])
        for name in ("push_tokens", "take_rows", "push_home", "sum_home"):
            ms = next((ms for key, ms in times.items() if key.startswith(name)), 0.0)
            found.setdefault(name, {})[programs] = min(recorder.gather(ms))  # who waits for the other is slow
    num_bytes = int(sent["peer, combine"])
    memory = next(iter(ep.memories_of(comm).values()))[-1]
    there = memory.blocks[(comm.rank + 1) % comm.size][memory.flag_bytes :][:num_bytes]
    here = torch.zeros_like(memory.blocks[comm.rank][:num_bytes])
    samples = recorder.alternate({"copy engine": lambda: there.copy_(here)}, 10, recorder.event_ms)
    found["copy engine"] = record.medians(samples)["copy engine"]
    for name, times in found.items():
        recorder.say(f"  {name:14} {times}")
    return {"bytes": num_bytes, "median_ms": found}


def wires(recorder: Recorder, num_tokens: int, d: int) -> dict:
    """Ways to move gather_tokens' slots, a block of [num_tokens, d] for every rank, and nothing else."""
    size, rank = recorder.comm.size, recorder.comm.rank
    blocks = torch.zeros(size * num_tokens, d, dtype=torch.bfloat16, device=recorder.device)
    others = blocks[: (size - 1) * num_tokens]
    own, into, away = (
        torch.zeros_like(blocks[:num_tokens]),
        torch.empty_like(blocks),
        torch.empty_like(others),
    )
    splits = [num_tokens * (r != rank) for r in range(size)]
    ways = {
        "all_to_all": lambda: dist.all_to_all_single(into, blocks),
        "all_to_all without the own block": lambda: dist.all_to_all_single(away, others, splits, splits),
        "all_gather": lambda: dist.all_gather_into_tensor(into, own),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(own, blocks),
        "sum": lambda: ep.sum_rows(into, order),
    }
    row = torch.arange(size * num_tokens, device=recorder.device)
    order = ep.RowOrder(row.view(size, num_tokens).t().contiguous(), row, row[:0])
    return {f"slots by {name}": run for name, run in ways.items() if recorder.on_gpu}


def alone() -> before.Launcher:
    """Our launcher, on this rank alone."""
    one = before.Launcher()
    one.batch = ep.Communicator.alone()
    one.mesh = ep.Mesh(one.batch, one.batch, one.batch)
    return one


def without_exchange(recorder: Recorder, ours: ep.EPMoE, batch: tuple) -> dict[str, Callable]:
    """A pass of a layer on one rank alone with this rank's share of the experts: as many rows, and no exchange."""
    config, one = ours.config, alone()
    num_local = config.num_experts // recorder.comm.size
    if num_local < config.top_k or not recorder.on_gpu:
        return {}
    other = one.layer(
        replace(config, num_experts=num_local, dispatcher="local", experts="auto"),
        recorder.device,
        layer.fill,
    )
    run = layer.train_pass(lambda x: one.forward(other, x)[0], *batch, list(other.parameters()))
    return {"one rank alone, recorded": record.captured(run)}


def layers(recorder: Recorder) -> dict:
    """{size: errors, memory and times of a layer with each dispatcher}."""
    found = {}
    for size in layer.SMALL_SIZES if recorder.args.small else layer.SIZES:
        ours, taken = layer.make_layer(recorder, size), {}

        def make(name: str, ours: ep.EPMoE = ours, taken: dict = taken) -> layer.Variant:
            launcher = recorder.launchers[""]
            other = launcher.sharing(ours, dispatcher=name, experts="auto")
            taken[name] = ep.pick("experts", other.config, recorder.device, recorder.comm.size)
            return layer.Variant(lambda x: launcher.forward(other, x)[0], list(other.parameters()))

        makers = {f"ours, {name}": lambda name=name, make=make: make(name) for name in NAMES}
        few = layer.tokens(ours, 32 if recorder.args.small else 256)
        batch = layer.tokens(ours, ours.config.max_num_tokens)
        passes, result = layer.prepare(recorder, size, ours, makers, batch, checked=few)
        if recorder.on_gpu:
            for name in ("ours, gather_tokens", "ours, peer"):
                passes[f"{name}, recorded"] = record.captured(passes[name])
        passes |= without_exchange(recorder, ours, batch)
        samples = recorder.alternate(passes, 1 if recorder.args.small else 3)
        found[size] = layer.finish(recorder, size, ours, samples, result) | {"experts": taken}
        del passes, makers, ours
        recorder.free_memory()
    return found


def sums(recorder: Recorder) -> dict[str, float]:
    """us of a sum over the ranks, one behind another in a graph: chapter 11's way and the library's; beside them what
    fills the numbers, which is in both."""
    if not recorder.on_gpu or recorder.comm.size == 1:
        return {}
    add_up, count, runs = ep.SmallSums(recorder.comm, torch.zeros(1, device=recorder.device)), 20, {}
    for numbers in (1, 4130):
        x = torch.zeros(numbers, device=recorder.device)
        ways = {"own": add_up, "library": add_up.library, "filling alone": lambda x: x}
        for name, way in ways.items():
            run = record.captured(lambda way=way, x=x: [way(x.zero_()) for _ in range(count)])
            runs[f"{name}, {numbers}"] = run
    samples = recorder.alternate(runs, 5, recorder.event_ms, warm_up=3)
    return {name: 1e3 * ms / count for name, ms in record.medians(samples).items()}


def one_replay(run: Callable[[], object], passes: int = 4) -> list[list]:
    """The kernels of one call of run, the third of some: [name, start, length] in us, from the first one's start."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(passes):
            run()
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    count = len(spans) // passes
    spans = spans[2 * count : 3 * count]
    first = spans[0][0]
    return [[name[:100], round(start - first, 2), round(end - start, 2)] for start, end, name in spans]


def step(recorder: Recorder) -> dict:
    """The launcher's training step with its defaults, with what `auto` takes, and as many tokens on one rank alone.

    recorded_equals_eager: whether 100 recorded steps of `peer` have the losses of 100 eager ones, to the last bit.
    kernels: those of one recorded step, {variant: one_replay of rank 0}. sums_us: see sums.
    """
    flags = {name: ["--dispatcher", name, "--step", "eager"] for name in NAMES} | {"auto": []}
    if recorder.on_gpu:
        flags |= {f"{n}, recorded": ["--dispatcher", n, "--step", "graph"] for n in ("gather_tokens", "peer")}
    make = recorder.launchers[""].step
    others = before.Launcher().step  # whose sums are the library's: peer changes those of its own group
    variants = {
        name: (make if name.startswith(("peer", "auto")) else others)(own, recorder.device)
        for name, own in flags.items()
    }
    if recorder.on_gpu:
        with mock.patch.object(ep, "SMALL_SUM", 0):  # nothing is small
            variants[LIBRARY] = make(flags["peer, recorded"], recorder.device)
            variants[LIBRARY]()
    one = alone()
    tokens = str(32 * recorder.comm.size)
    variants["one rank alone"] = one.step(["--tokens", tokens, "--max-num-tokens", tokens], recorder.device)
    curves = [make(flags[n], recorder.device) for n in ("peer", "peer, recorded") if n in flags]
    first, *rest = [
        torch.stack([advance() for _ in range(100 if recorder.on_gpu else 2)]) for advance in curves
    ]
    is_equal = all(recorder.gather(all(torch.equal(first, other) for other in rest)))
    if not is_equal:
        recorder.failures.append("recorded steps of peer are not the eager ones")
    samples = recorder.alternate(variants, 2 if recorder.args.small else 8)
    ms = record.medians(samples)
    recorder.say_speeds(ms, "all_to_all")
    seen = ("peer, recorded", LIBRARY, "gather_tokens, recorded", "one rank alone") if recorder.on_gpu else ()
    kernels = {name: one_replay(variants[name]) for name in seen}
    for name, own in kernels.items():
        busy = sum(length for _, _, length in own)
        recorder.say(f"  {name:40} {len(own)} kernels, busy {busy:.0f} us of {own[-1][1] + own[-1][2]:.0f}")
    sums_us = sums(recorder)
    recorder.say(f"  a sum, us: {sums_us}")
    taken = ep.pick("dispatcher", ep.parse_flags([])[0], recorder.device, recorder.comm.size)
    return {"auto": taken, "recorded_equals_eager": is_equal, "median_ms": ms, "samples_ms": samples,
            "kernels": kernels, "sums_us": sums_us}  # fmt: skip


PARTS = {"exchange": exchange, "small": small, "kernels": kernels, "step": step, "layers": layers}


def measure(recorder: Recorder) -> None:
    """The parts, one after the other, into the file."""
    parts = {}
    for name in recorder.args.parts:
        parts[name] = PARTS[name](recorder)
        recorder.free_memory()
        recorder.write(f"x{recorder.comm.size}_traffic", parts)
    for failure in recorder.failures:
        recorder.say(f"  {failure}")


if __name__ == "__main__":
    flags = record.parser(__doc__, device="auto", small=False, rounds=20)
    flags.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    record.main(measure, flags, needs_group=True)
