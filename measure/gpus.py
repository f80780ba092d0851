"""Everything that several GPUs have to show, in one run under four minutes.

    torchrun --standalone --nproc_per_node=2 measure/gpus.py
    torchrun --standalone --nproc_per_node=2 measure/gpus.py --device cpu --small     in small, on gloo
    python measure/gpus.py --parts bandwidth layers                                   one rank
    torchrun --nproc_per_node=2 measure/gpus.py --before build/before.py      beside another commit (measure/before.py)

Parts, each within its own --budget-PART seconds: parity (every variant against the dense reference), invariance (the
loss curve at world sizes 1, 2, .. N), bandwidth (dispatch and combine beside a plain all-to-all), layers (forward
and backward at the sizes of three known models) and seed (the default run; then its step, recorded with fixed buffers
too, the seed's and the one --before names, alternating).
A part that fails says so, and the next one runs; the exit code then is 1. After each part rank 0 writes
<output>/<device>_x<N>_suite.json. A rank that fails alone leaves the others waiting: they end after --timeout-s.
"""

import argparse
import gc
import json
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed._functional_collectives import (  # noqa: E402
    all_to_all_single,
    all_to_all_single_autograd,
)

from ep_launcher import launcher as ep  # noqa: E402
from measure import before, peers  # noqa: E402
from measure import layer as bench_layer  # noqa: E402
from measure import step as bench  # noqa: E402
from tools import parity  # noqa: E402

BUDGETS = {"parity": 50, "invariance": 25, "bandwidth": 15, "layers": 80, "seed": 45}  # seconds
LARGEST_GATHER_GB = 20
SMALL_SIZES = {
    "mixtral": (64, {"hidden_dim": 64, "ffn_dim": 96, "num_experts": 8, "top_k": 2}),
    "qwen": (64, {"hidden_dim": 32, "ffn_dim": 16, "num_experts": 32, "top_k": 8}),
}


@dataclass
class Suite:
    """What every part needs. failures: what a part found wrong, beside its results."""

    args: argparse.Namespace
    launchers: dict[str, before.Launcher]
    device: torch.device
    end: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def comm(self) -> ep.Communicator:
        """All ranks."""
        return self.launchers[""].batch

    def say(self, line: str) -> None:
        """A line on the screen, by rank 0."""
        if self.comm.rank == 0:
            print(line, flush=True)

    def is_over(self) -> bool:
        """Whether the part's time is up, on any rank; the same answer on all. Collective."""
        verdict = torch.tensor([float(time.perf_counter() > self.end)], device=self.device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
        return verdict.item() > 0

    def gather(self, value: Any) -> list:
        """Every rank's value, by rank. Collective."""
        values: list = [None] * self.comm.size
        dist.all_gather_object(values, value)
        return values

    def slowest(self, samples: dict[str, list[float]]) -> dict[str, list[float]]:
        """Each sample of the rank that took longest. Collective."""
        by_rank = self.gather(samples)
        return {name: [max(s) for s in zip(*(r[name] for r in by_rank), strict=True)] for name in samples}

    def measure(self, variants: dict[str, Callable], steps: int) -> dict[str, list[float]]:
        """{name: samples in ms}, alternating, of the slowest rank."""
        rounds = 2 if self.args.small else self.args.rounds
        samples = bench.measure(variants, rounds, steps, self.comm, self.device, self.is_over)
        return self.slowest(samples)

    def run_by_hand(self, config: ep.MoEConfig, options: ep.TrainingOptions, mesh: ep.Mesh) -> ep.Run:
        """A run that writes no logs."""
        log = ep.RunLog(ROOT / "build", options.steps, rank=1)
        return ep.Run(config, options, mesh, self.device, log)


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """{name: median}."""
    return {name: statistics.median(values) for name, values in samples.items()}


def dispatchers(suite: Suite, config: ep.MoEConfig, comm: ep.Communicator) -> dict[str, ep.Dispatcher]:
    """Every registered dispatcher that can run with this config alone; a line for each that cannot."""
    found = {}
    for name, kind in sorted(ep.REGISTRIES["dispatcher"].items()):
        try:
            if kind.preference(config, suite.device, comm.size) <= 0:
                raise ValueError(f"it cannot run on {comm.size} {suite.device.type} ranks")
            found[name] = kind.for_layer(config, comm)
        except ValueError as error:
            suite.say(f"  dispatcher {name} left out: {error}")
    return found


def run_parity(suite: Suite) -> tuple[dict, str]:
    """Every variant in every case, float32 and bfloat16."""
    dtypes = ["float32", "bfloat16"]
    few = ["even", "uneven", "rank_without_tokens"] if suite.args.small else None
    results = parity.run_suite(suite.device, dtypes, suite.launchers[""].mesh, few, suite.is_over)
    kinds = {tuple(r[k] for k in ("dispatcher", "experts", "activation", "dtype")) for r in results}
    if missing := set(parity.variants(suite.device, suite.comm.size, dtypes)) - kinds:
        suite.failures.append(f"time was up before {len(missing)} variants")
    for r in parity.over_the_limit(results):
        quantity = max(r["errors"], key=r["errors"].get)
        suite.failures.append(
            f"{r['case']} {r['dtype']} {r['dispatcher']} {r['experts']} {r['activation']}: {quantity} "
            f"{r['errors'][quantity]:.2e}, limit {r['limit']:g}; bytes predicted and counted {r['bytes']}"
        )
    worst = {
        d: max((max(r["errors"].values()) for r in results if r["dtype"] == d), default=0.0) for d in dtypes
    }
    line = f"{len(results)} results of {len(kinds)} variants; worst " + ", ".join(
        f"{d} {e:.1e}" for d, e in worst.items()
    )
    return {"results": results, "worst": worst}, line


def run_invariance(suite: Suite) -> tuple[dict, str]:
    """The float64 loss curve at world sizes 1, 2, .. N, as groups inside this one."""
    world_size, steps = suite.comm.size, 12 if suite.args.small else 100
    config = ep.MoEConfig(
        num_experts=16, hidden_dim=64, ffn_dim=128, max_num_tokens=64, dtype="float64"
    )  # fmt: skip
    options = ep.TrainingOptions(steps=steps, lr=2e-3, log_interval=1, tokens=64, step="eager")
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0 and 16 % size == 0]
    groups = {
        size: dist.new_group(list(range(size)), timeout=timedelta(seconds=suite.args.timeout_s))
        for size in sizes
    }
    curves: dict[str, list[float]] = {}
    for size in sizes:
        is_in = suite.comm.rank < size
        comm = ep.Communicator(groups[size]) if is_in else None
        names = list(dispatchers(suite, config, comm)) if is_in else []
        for dispatcher in suite.gather(names)[0]:
            for experts in ("loop", "blocks"):
                if suite.is_over():
                    suite.failures.append(f"time was up before size {size}: {dispatcher}+{experts}")
                    continue
                if not is_in:
                    continue
                name = f"{size} ranks: {dispatcher}+{experts}"
                chosen = ep.replace(config, dispatcher=dispatcher, experts=experts)
                try:
                    mesh = ep.Mesh(comm, comm, ep.Communicator.alone(comm.meter))
                    curves[name] = ep.train(suite.run_by_hand(chosen, options, mesh))["task_loss"]
                except Exception as error:  # the ranks outside this group wait for the next question
                    suite.failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    if suite.comm.rank == 0:
        first = next(iter(curves.values()), [0.0])
        away = {n: max(abs(a - b) for a, b in zip(c, first, strict=True)) for n, c in curves.items()}
        for name, value in away.items():
            if not value <= 1e-10:
                suite.failures.append(f"{name} is {value:.1e} off the curve of one rank, above 1e-10")
        quarter = max(1, len(first) // 4)
        if not suite.args.small and not sum(first[-quarter:]) < sum(first[:quarter]):
            suite.failures.append(f"the loss did not fall: {first[0]:.4f} to {first[-1]:.4f}")
    else:
        away, first = {"": 0.0}, [0.0]
    line = (
        f"{len(curves)} curves of {steps} steps at sizes {', '.join(map(str, sizes))}, "
        f"{first[0]:.4f} to {first[-1]:.4f}; furthest apart {max(away.values()):.1e}"
    )
    return {"steps": steps, "sizes": sizes, "furthest": away, "task_loss": curves}, line


class PlainDispatcher(ep.Dispatcher):
    """An exchange of exact pieces made of PyTorch's own operations, the way others write it: weights stay at home.

    Sort, index, functional all-to-all with autograd, index again, a batched product for the weighted sum.
    """

    def begin_dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> ep.Arrived:
        """See Dispatcher; rows come sorted by expert, with weight 1. Two host synchronisations."""
        size, num_local, top_k = self.comm.size, self.num_local_experts, topk_ids.shape[1]
        group = self.comm.group or dist.group.WORLD
        expert, choice = topk_ids.reshape(-1).sort(stable=True)
        counts = torch.zeros(size * num_local, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, expert, torch.ones_like(expert))
        received = all_to_all_single(counts, None, None, group)
        received = torch.ops._c10d_functional.wait_tensor(received)
        splits = torch.stack([counts.view(size, -1).sum(1), received.view(size, -1).sum(1)]).tolist()
        rows = all_to_all_single_autograd(x[choice // top_k], splits[1], splits[0], group)
        of_block = torch.arange(num_local, device=x.device).repeat(size)
        of_row = of_block.repeat_interleave(received, output_size=sum(splits[1]))
        by_expert = of_row.argsort(stable=True)
        handle = choice, by_expert, splits, topk_weights
        ids = of_row[by_expert, None]
        return ep.Arrived(rows[by_expert], ids, torch.ones_like(ids, dtype=topk_weights.dtype), handle)

    def begin_combine(self, y: Tensor, handle: Any) -> Tensor:
        """See Dispatcher."""
        choice, by_expert, splits, weights = handle
        group = self.comm.group or dist.group.WORLD
        by_source = torch.empty_like(by_expert)
        by_source[by_expert] = torch.arange(len(by_expert), device=y.device)
        rows = all_to_all_single_autograd(y[by_source], splits[0], splits[1], group)
        unsorted = torch.zeros_like(rows).index_copy(0, choice, rows)
        by_token = unsorted.view(*weights.shape, -1)
        return torch.bmm(weights.unsqueeze(1), by_token.to(weights.dtype)).squeeze(1).to(rows.dtype)

    def predict_bytes(
        self, topk_ids: list[Tensor], hidden_dim: int, dtype: torch.dtype, x_needs_grad: bool = True
    ) -> dict[str, Tensor]:
        """See Dispatcher: the choices that live elsewhere."""
        rows = ep.AllToAllDispatcher.rows_between(self, topk_ids)
        row = hidden_dim * dtype.itemsize
        return ep.bytes_by_pass(rows, rows.t(), row, 0, row * x_needs_grad)


def plain_layer(layer: ep.EPMoE) -> Callable[[Tensor], Tensor]:
    """Our layer's router and weights with PlainDispatcher, grouped_mm and autograd: "plain glue"."""
    dispatcher, e = PlainDispatcher(layer.config.num_experts, layer.mesh.ep), layer.experts

    def forward(x: Tensor) -> Tensor:
        routing = layer.router(x)
        arrived = dispatcher.dispatch(x, routing.topk_ids, routing.topk_weights)
        offsets = ep.count_choices(arrived.topk_ids, e.num_local).cumsum(0).to(torch.int32)
        gate, up = (F.grouped_mm(arrived.x, w, offs=offsets) for w in (e.w1, e.w3))
        y = F.grouped_mm(F.silu(gate) * up, e.w2, offs=offsets)
        return dispatcher.combine(y, arrived.handle)

    return forward


def run_bandwidth(suite: Suite) -> tuple[dict, str]:
    """Dispatch and combine, forward, of 4,096 tokens a rank, hidden 7,168, top-8 of 256 experts, bfloat16."""
    comm, device, size = suite.comm, suite.device, suite.comm.size
    num_tokens, d, num_experts = (64, 64, 16) if suite.args.small else (4096, 7168, 256)
    config = ep.MoEConfig(
        num_experts=num_experts, top_k=8, hidden_dim=d, ffn_dim=2048, max_num_tokens=num_tokens, dtype="bfloat16"
    )  # fmt: skip
    torch.manual_seed(comm.rank)
    probs = torch.rand(num_tokens, num_experts, device=device)
    weights, ids = probs.topk(config.top_k)
    weights = weights / config.top_k
    x = torch.randn(num_tokens, d, device=device).to(torch.bfloat16)
    expected = x.float() * weights.sum(1, keepdim=True)
    every_ids = [torch.tensor(i) for i in suite.gather(ids.tolist())]
    variants, sent, errors = {}, {}, {}
    kinds = dispatchers(suite, config, comm) | {"plain glue": PlainDispatcher(num_experts, comm)}
    row_bytes = d * 2
    gather_gb = 4 * size * num_tokens * config.top_k * row_bytes / 1e9  # gathered, twice on the way, kept
    for name, kind in kinds.items():
        if name == "all_gather" and gather_gb > LARGEST_GATHER_GB:
            suite.say(f"  dispatcher all_gather left out: it would hold {gather_gb:.0f} GB a rank")
            continue
        sent_before = {way: comm.meter.total(way) for way in ("dispatch", "combine")}
        arrived = kind.dispatch(x, ids, weights)
        echo = arrived.x * torch.where(arrived.topk_ids < 0, 0, arrived.topk_weights).sum(1, keepdim=True).to(
            x.dtype
        )
        y = kind.combine(echo, arrived.handle)
        predicted = kind.predict_bytes(every_ids, d, x.dtype)
        for way, earlier in sent_before.items():
            own = int(predicted[way][comm.rank].sum())
            sent[f"{name}, {way}"] = statistics.mean(suite.gather(own))
            if (
                name != "plain glue" and comm.meter.total(way) - earlier != own
            ):  # its exchange passes no meter
                suite.failures.append(
                    f"{name}, {way} sent {comm.meter.total(way) - earlier} bytes, not {own}"
                )
        errors[name] = max(suite.gather(float((y.float() - expected).norm() / expected.norm())))
        if not errors[name] <= 2e-2:
            suite.failures.append(f"{name}: tokens came back {errors[name]:.1e} off")
        variants[f"{name}, dispatch"] = lambda kind=kind: kind.dispatch(x, ids, weights)
        variants[f"{name}, combine"] = lambda kind=kind, y=echo, arrived=arrived: kind.combine(
            y, arrived.handle
        )
    outgoing = torch.zeros(num_tokens * config.top_k, d, dtype=torch.bfloat16, device=device)
    incoming = torch.empty_like(outgoing)
    plain = f"plain {dist.get_backend()} all-to-all"
    variants[plain] = lambda: dist.all_to_all_single(incoming, outgoing)
    sent[plain] = outgoing.nbytes * (size - 1) / size
    samples = suite.measure(variants, 2 if suite.args.small else 5)
    ms = medians(samples)
    rates = {name: sent[name] / ms[name] / 1e6 for name in ms}
    for name in sorted(ms, key=ms.get):
        share = f"{ms[name] / ms[plain]:5.2f} x the time of plain" if size > 1 else ""
        suite.say(
            f"  {name:28} {ms[name]:8.3f} ms  {sent[name] / 1e6:8.1f} MB leave  {rates[name]:7.1f} GB/s  {share}"
        )
    best = min((n for n in ms if n.endswith(", dispatch") and not n.startswith("plain")), key=ms.get)
    line = (
        f"plain all-to-all {rates[plain]:.1f} GB/s a rank, the fastest dispatch {best} {rates[best]:.1f} GB/s"
    )
    if size == 1:
        line = f"one rank: nothing leaves it; the fastest is {best} with {ms[best]:.3f} ms"
    result = {
        "tokens": num_tokens, "hidden_dim": d, "num_experts": num_experts, "top_k": config.top_k,
        "mean_bytes_that_leave": sent, "errors": errors, "median_ms": ms, "gb_per_s": rates,
        "samples_ms": samples,
    }  # fmt: skip
    return result, line


def layer_forwards(suite: Suite, layer: ep.EPMoE) -> dict[str, tuple]:
    """{name: (forward, forward for the check, parameters)} of ours and of others."""
    ours = bench_layer.our_forwards(suite.launchers, layer, f"{layer.config.dispatcher} + ")
    found = {name: (forward, forward, parameters) for name, (forward, parameters) in ours.items()}
    plain, own = plain_layer(layer), list(layer.parameters())
    found["plain glue"] = plain, plain, own
    try:
        if suite.device.type != "cuda":
            raise ImportError("its kernels want a GPU")
        mesh = dist.device_mesh.init_device_mesh("cuda", (suite.comm.size,), mesh_dim_names=("ep",))
        moe = peers.peers(layer, Path(suite.args.torchtitan), mesh)
        check = peers.with_choices_of(moe, layer.router)
        found["torchtitan"] = (peers.forward_of(moe), check, [*moe.parameters(), *own])
    except Exception as error:
        suite.say(f"  torchtitan left out: {type(error).__name__}: {str(error)[:200]}")
    return found


def measure_layer(suite: Suite, size: str) -> dict:
    """One size: hold every variant against the float32 reference on a few tokens, then time all of them.

    predicted_kept_gb: of ours, the most of any rank: gate and up of every row that arrives, and the rows.
    """
    comm, device = suite.comm, suite.device
    num_tokens, shape = (SMALL_SIZES if suite.args.small else bench_layer.SIZES)[size]
    torch.manual_seed(0)  # the gate has to be the same on every rank
    dispatcher = "all_to_all" if comm.size > 1 else "local"
    layer = bench_layer.make_layer(suite.launchers[""], num_tokens, shape, dispatcher, device)
    config = layer.config
    torch.manual_seed(1 + comm.rank)  # experts and tokens have to differ
    for parameter in layer.experts.parameters():
        bench_layer.fill(parameter, parameter.shape[1])

    def tokens(count: int) -> tuple[Tensor, Tensor]:
        x, grad = (torch.randn(count, config.hidden_dim, device=device).to(torch.bfloat16) for _ in range(2))
        return x.requires_grad_(), grad

    result: dict = {"tokens": num_tokens, **shape, "dispatcher": dispatcher, "errors": {}, "memory": {}}
    passes, named = {}, dict(layer.experts.named_parameters())
    few, few_grad = tokens(32 if suite.args.small else 256)
    x, grad = tokens(num_tokens)
    expected = bench_layer.reference(layer, few, few_grad, divides=False)
    for name, (forward, to_check, parameters) in layer_forwards(suite, layer).items():
        try:
            run = bench_layer.train_pass(to_check, few, few_grad, parameters)
            is_ours = name != "torchtitan"
            found = bench_layer.errors(run, few, named if is_ours else {}, expected)
            result["errors"][name] = {q: max(e[q] for e in suite.gather(found)) for q in found}
            passes[name] = bench_layer.train_pass(forward, x, grad, parameters)
            passes[name]()
            hooks = name.startswith(("ours", "before"))  # others have tensors without a storage of their own
            found = suite.gather(bench_layer.memory_gb(forward, passes[name], x, parameters, hooks))
            result["memory"][name] = {what: max(f[what] for f in found) for what in found[0]}
        except Exception as error:
            if name.startswith("ours"):
                raise
            passes.pop(name, None)
            suite.say(f"  {size}: {name} left out: {type(error).__name__}: {str(error)[:200]}")
            continue
        worst = max(result["errors"][name].values())
        if name.startswith("ours") and not worst <= 2e-2:
            suite.failures.append(f"{size}: {name} is {worst:.1e} off the reference")
    del expected
    with torch.no_grad():
        counts = comm.all_reduce(ep.count_choices(layer.router(x).topk_ids, config.num_experts))
    rows, columns = int(counts.view(comm.size, -1).sum(1)[comm.rank]), 2 * config.ffn_dim
    columns += config.hidden_dim if comm.size > 1 else 0  # alone, the rows are x itself
    result["predicted_kept_gb"] = max(suite.gather(rows * columns * x.element_size() / 1e9))
    result["samples_ms"] = suite.measure(passes, 1 if suite.args.small else 3)
    result["median_ms"] = ms = medians(result["samples_ms"])
    operations = 6 * num_tokens * config.top_k * 3 * config.hidden_dim * config.ffn_dim
    result["tflop_per_s_a_rank"] = {name: operations / value / 1e9 for name, value in ms.items()}
    for name in sorted(ms, key=ms.get):
        memory = "".join(f" {what[:-3]} {gb:5.2f}" for what, gb in result["memory"][name].items())
        suite.say(
            f"  {size:9} {name:28} {ms[name]:8.3f} ms {result['tflop_per_s_a_rank'][name]:6.1f} TFLOP/s a rank  "
            f"error {max(result['errors'][name].values()):.1e} {memory}"
        )
    return result


def run_layers(suite: Suite) -> tuple[dict, str]:
    """A layer's forward and backward pass over the ranks at the sizes of known models, beside others."""
    names = list(SMALL_SIZES if suite.args.small else bench_layer.SIZES)
    begin, whole, sizes = time.perf_counter(), suite.end, {}
    for turn, name in enumerate(names):
        if suite.is_over():
            suite.failures.append(f"time was up before {name}")
            continue
        suite.end = begin + (whole - begin) * (turn + 1) / len(names)  # each size has its share
        sizes[name] = measure_layer(suite, name)
        gc.collect()
        if suite.device.type == "cuda":
            torch.cuda.empty_cache()
    parts = []
    for name, r in sizes.items():
        ours = {n: ms for n, ms in r["median_ms"].items() if n.startswith("ours")}
        others = {n: ms for n, ms in r["median_ms"].items() if n not in ours}
        best = min(ours, key=ours.get)
        beside = ", ".join(f"{n} {ms:.1f}" for n, ms in others.items())
        parts.append(f"{name} {ours[best]:.1f} ms ({r['tflop_per_s_a_rank'][best]:.0f} TFLOP/s; {beside})")
    return {"sizes": sizes, "torchtitan": peers.VERSION}, "; ".join(parts)


def run_seed(suite: Suite) -> tuple[dict, str]:
    """The seed's run by the launcher's own `train`, as many steps as fit; then ours and the seed's, alternating."""
    comm, device, args = suite.comm, suite.device, suite.args
    problem = ""
    if comm.rank == 0:
        try:
            bench.extract_seed()
        except Exception as error:
            problem = f"build/seed.py cannot be extracted: {error}"
    if problem := suite.gather(problem)[0]:
        raise RuntimeError(problem)
    begin, small = time.perf_counter(), ["--hidden-dim", "64", "--ffn-dim", "128"] if args.small else []
    ours = suite.launchers[""].step(small, device)
    bench.time_ms(ours, 3 if args.small else 50, comm, device)
    ms = max(suite.gather(bench.time_ms(ours, 3 if args.small else 50, comm, device)))
    fitting = 60 if args.small else max(100, int(0.4 * (suite.end - begin) * 1e3 / ms))
    steps = min(suite.gather(min(args.steps, fitting)))
    config, options = ep.parse_flags(
        [*small, "--steps", str(steps), "--log-interval", str(max(1, steps // 10))]
    )
    measured = ep.train(suite.run_by_hand(config, options, suite.launchers[""].mesh))
    bytes_sent = measured["bytes_sent_per_step"]
    if bytes_sent["predicted"] != bytes_sent["counted"]:
        suite.failures.append(f"a step sent {bytes_sent['counted']} bytes, not {bytes_sent['predicted']}")
    if not measured["final_task_loss"] < measured["task_loss"][0]:
        suite.failures.append(f"the loss did not fall: {measured['task_loss']}")
    wanted = {"ours": [], "all_gather + loop": ["--dispatcher", "all_gather", "--experts", "loop"]}
    wanted["capacity"] = ["--dispatcher", "capacity", "--capacity-factor", "8", "--step", "eager"]
    wanted["capacity, graph"] = [*wanted["capacity"][:-1], "graph"]
    variants: dict[str, Callable] = {"seed": bench.seed_step(config, comm, device), "ours": ours}
    for kind, (prefix, launcher) in product(wanted, suite.launchers.items()):
        name = "before" if prefix and kind == "ours" else prefix + kind
        try:
            variants.setdefault(name, launcher.step([*small, *wanted[kind]], device))
        except ValueError as error:
            suite.say(f"  {name} left out: {error}")
    samples = suite.measure(variants, 2 if args.small else 8)
    found = medians(samples)
    for name, value in sorted(found.items(), key=lambda item: item[1]):
        suite.say(
            f"  {name:26} {value:8.3f} ms a step   {found['seed'] / value:6.1f} x the speed of the seed's"
        )
    at = {
        step: measured["task_loss"][step // options.log_interval]
        for step in range(0, steps, options.log_interval)
    }
    suite.say("  task loss " + ", ".join(f"{loss:.4f} at {step}" for step, loss in at.items()))
    line = (
        f"{steps} of {args.steps} steps, {measured['ms_per_step']:.2f} ms a step, task loss "
        f"{measured['task_loss'][0]:.4f} to {measured['final_task_loss']:.4f}; alternating: "
        + ", ".join(f"{name} {value:.2f} ms" for name, value in found.items())
    )
    return {
        "steps": steps,
        "task_loss_at": at,
        "run": measured,
        "samples_ms": samples,
        "median_ms": found,
    }, line


PARTS = {
    "parity": run_parity,
    "invariance": run_invariance,
    "bandwidth": run_bandwidth,
    "layers": run_layers,
    "seed": run_seed,
}


def machine(suite: Suite) -> dict[str, Any]:
    """What the numbers were measured with."""
    on_gpu = suite.device.type == "cuda"
    folders = [
        i + k for i, a in enumerate(sys.argv) if a in ("--output", "--torchtitan", "--before") for k in (0, 1)
    ]
    arguments = [a for i, a in enumerate(sys.argv) if i and i not in folders]  # where it lies says nothing
    start = f"torchrun --standalone --nproc_per_node={suite.comm.size}" if suite.comm.size > 1 else "python"
    return {
        "what": "suite", "device": ep.device_model(suite.device), "num_gpus": suite.comm.size if on_gpu else 0,
        "world_size": suite.comm.size, "backend": dist.get_backend(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "triton": ep.triton and ep.triton.__version__, "python": sys.version.split()[0],
        "command": " ".join([start, "measure/gpus.py", *arguments]), "parts": {},
    } | before.before_facts(suite.args)  # fmt: skip


def run_part(suite: Suite, name: str, seconds: float) -> dict:
    """One part -> its entry in the results; what goes wrong becomes `failures`."""
    begin, suite.failures, problem, result, line = time.perf_counter(), [], "", {}, ""
    suite.end = begin + seconds
    try:
        result, line = PARTS[name](suite)
    except Exception as error:
        problem = f"rank {suite.comm.rank}: {type(error).__name__}: {str(error)[:500]}"
        print(f"{name}, {problem}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    gc.collect()
    if suite.device.type == "cuda":
        torch.cuda.empty_cache()
    failures = [f for own in suite.gather([*suite.failures, problem]) for f in own if f]
    took = time.perf_counter() - begin
    suite.say(f"{name}: {'FAILED' if failures else 'ok'} in {took:.1f} s: {line}")
    for failure in list(dict.fromkeys(failures))[:10]:
        suite.say(f"  {name}: {failure}")
    return {"seconds": took, "budget_s": seconds, "line": line, "failures": failures} | result


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--small", action="store_true", help="small sizes and few repeats, for a CPU")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the seed's run, if they fit")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each variant, if they fit")
    for name, seconds in BUDGETS.items():
        parser.add_argument(
            f"--budget-{name}", type=float, default=seconds, help=f"seconds (default {seconds})"
        )
    parser.add_argument("--timeout-s", type=float, default=120, help="how long a rank waits for another")
    parser.add_argument(
        "--torchtitan", default=str(ROOT / "build/torchtitan"), help="folder with its package"
    )
    before.add_flag(parser)
    parser.add_argument("--output", default=str(ROOT / "results"), help="folder for the result")
    return parser.parse_args()


def start_group(device: torch.device, timeout: timedelta) -> None:
    """A process group, also for one rank that torchrun did not start."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    where = {}
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"init_method": f"tcp://127.0.0.1:{free.getsockname()[1]}", "rank": 0, "world_size": 1}
    if device.type == "cpu":
        ep.schedule_in_batches()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout, **where)


def main() -> int:
    args = parse()
    begin = time.perf_counter()
    try:
        device = ep.choose_device(args.device)
    except ValueError as error:
        return ep.refuse(str(error))
    torch.backends.cuda.matmul.allow_tf32 = False
    start_group(device, timedelta(seconds=args.timeout_s))
    suite = Suite(args, before.launchers(args), device)
    result, failed = machine(suite), []
    suite.say(f"{suite.comm.size} x {result['device']}, torch {result['torch']}, nccl {result['nccl']}")
    for name in args.parts:
        entry = run_part(suite, name, getattr(args, f"budget_{name}"))
        result["parts"][name] = entry
        failed += [name] if entry["failures"] else []
        if suite.comm.rank == 0:
            folder = Path(args.output)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{bench.device_slug(device)}_x{suite.comm.size}_suite.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
    took = time.perf_counter() - begin
    suite.say(f"{len(args.parts)} parts in {took:.0f} s, failed: {', '.join(failed) or 'none'}")
    dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the group's threads may still end, and must not meet a dying interpreter
