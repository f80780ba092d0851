"""Everything that several GPUs have to show, in one run under eight minutes.

    torchrun --standalone --nproc_per_node=2 measure/gpus.py
    torchrun --standalone --nproc_per_node=2 measure/gpus.py --device cpu --small     in small, on gloo
    python measure/gpus.py --parts bandwidth layers                                   one rank
    torchrun --standalone --nproc_per_node=2 measure/gpus.py --before build/before.py      (measure/before.py)

Parts, each within its own --budget-PART seconds: parity (every variant against the dense reference), invariance (the
loss curve at world sizes 1, 2, .. N), bandwidth (dispatch and combine beside a plain all-to-all), growth (the same by
one copy a rank and by everything to everyone, on 2, 4, .. N ranks), layers (forward and backward at the sizes of three
known models) and seed (the default run; then its step, recorded with fixed buffers
too, the original's and the one --before names, alternating).
A part that fails says so, and the next one runs; the exit code then is 1. After each part rank 0 writes
<output>/<device>_x<N>_suite.json. A rank that fails alone leaves the others waiting: they end after --timeout-s.
"""

import argparse
import sys
import time
import traceback
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed._functional_collectives import (  # noqa: E402
    all_to_all_single,
    all_to_all_single_autograd,
)

from ep_launcher import launcher as ep  # noqa: E402
from measure import before, layer, peers, record, traffic  # noqa: E402
from measure.record import ROOT, Recorder  # noqa: E402
from tools import parity  # noqa: E402

BUDGETS = {
    "parity": 90,
    "invariance": 90,
    "bandwidth": 25,
    "growth": 25,
    "layers": 100,
    "seed": 45,
}  # seconds
LARGEST_GATHER_GB = 20


def dispatchers(recorder: Recorder, config: ep.MoEConfig, comm: ep.Communicator) -> dict[str, ep.Dispatcher]:
    """Every registered dispatcher that can run with this config alone; a line for each that cannot."""
    found = {}
    for name, kind in sorted(ep.REGISTRIES["dispatcher"].items()):
        try:
            if kind.preference(config, recorder.device, comm.size) <= 0:
                raise ValueError(f"it cannot run on {comm.size} {recorder.device.type} ranks")
            found[name] = kind.for_layer(config, comm)
        except ValueError as error:
            recorder.say(f"  dispatcher {name} left out: {error}")
    return found


def run_parity(recorder: Recorder) -> dict:
    """Every variant in every case, float32 and bfloat16."""
    dtypes, few = ["float32", "bfloat16"], ["even", "uneven", "rank_without_tokens"]
    mesh = recorder.launchers[""].mesh

    def wanted(*kinds: str) -> list[str]:
        return [] if recorder.is_over() else few if recorder.args.small else list(parity.cases(4))

    results = parity.run_suite(recorder.device, dtypes, mesh, wanted=wanted)
    kinds = {tuple(r[name] for name in parity.NAMES) for r in results}
    if missing := set(parity.variants(recorder.device, recorder.comm.size, dtypes)) - kinds:
        recorder.failures.append(f"time was up before {len(missing)} variants")
    for r in parity.over_the_limit(results):
        what = " ".join(r[name] for name in ("case", *parity.NAMES))
        recorder.failures.append(f"{what}: {parity.fault_of(r)}")
    worst = dict.fromkeys(dtypes, 0.0)
    of_kind = {" ".join(kind): 0.0 for kind in sorted(kinds)}
    for r in results:
        kind, most = " ".join(r[name] for name in parity.NAMES), max(r["errors"].values())
        worst[r["dtype"]], of_kind[kind] = max(worst[r["dtype"]], most), max(of_kind[kind], most)
    found = ", ".join(f"{d} {e:.1e}" for d, e in worst.items())
    recorder.say(f"  {len(results)} results of {len(kinds)} variants; worst {found}")
    return {"num_results": len(results), "worst": worst, "worst_of_variant": of_kind}


def run_invariance(recorder: Recorder) -> dict:
    """The float64 loss curve at world sizes 1, 2, .. N, as groups inside this one."""
    world_size, steps = recorder.comm.size, 12 if recorder.args.small else 100
    flags = ["--num-experts", "16", "--hidden-dim", "64", "--ffn-dim", "128", "--max-num-tokens", "64"]
    flags += ["--dtype", "float64", "--steps", str(steps), "--lr", "2e-3", "--log-interval", "1"]
    flags += ["--tokens", "64", "--step", "eager"]
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0 and 16 % size == 0]
    timeout = timedelta(seconds=recorder.args.timeout_s)
    curves: dict[str, list[float]] = {}
    for (
        size
    ) in sizes:  # every rank trains in some group: torch numbers a rank's meetings over symmetric memory
        groups = [
            dist.new_group(list(range(r, r + size)), timeout=timeout) for r in range(0, world_size, size)
        ]
        comm = ep.Communicator(groups[recorder.comm.rank // size])
        config, _ = ep.parse_flags(flags)
        names = list(dispatchers(recorder, config, comm))
        for dispatcher, experts in product(recorder.gather(names)[0], ("loop", "blocks")):
            name = f"{size} ranks: {dispatcher}+{experts}"
            if recorder.is_over():
                recorder.failures.append(f"time was up before {name}")
            else:
                try:
                    mesh = ep.Mesh(comm, comm, ep.Communicator.alone(comm.meter))
                    kinds = ["--dispatcher", dispatcher, "--experts", experts]
                    curves[name] = train(recorder, [*flags, *kinds], mesh)["task_loss"]
                except Exception as error:  # the other groups wait for the next question
                    recorder.failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    away, first = {"": 0.0}, [0.0]
    if recorder.comm.rank == 0:
        first = next(iter(curves.values()), first)
        away = {n: max(abs(a - b) for a, b in zip(c, first, strict=True)) for n, c in curves.items()}
        far = {n: value for n, value in away.items() if not value <= 1e-10}
        recorder.failures += [f"{n} is {value:.1e} off the curve of one rank" for n, value in far.items()]
        quarter = max(1, len(first) // 4)
        if not recorder.args.small and not sum(first[-quarter:]) < sum(first[:quarter]):
            recorder.failures.append(f"the loss did not fall: {first[0]:.4f} to {first[-1]:.4f}")
    apart = max(away.values(), default=0.0)
    recorder.say(f"  {len(curves)} curves, {first[0]:.4f} to {first[-1]:.4f}; furthest apart {apart:.1e}")
    return {"steps": steps, "sizes": sizes, "furthest": away, "task_loss": first}


def train(recorder: Recorder, flags: list[str], mesh: ep.Mesh) -> dict[str, Any]:
    """The launcher's own training with these flags over the ranks of a mesh, without logs -> its summary."""
    config, options = ep.parse_flags(flags)
    log = ep.RunLog(ROOT / "build", options.steps, rank=1)  # a rank that writes nothing
    return ep.train(ep.Run(config, options, mesh, recorder.device, log))


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


def plain_layer(ours: ep.EPMoE) -> layer.Variant:
    """Our layer's router and weights with PlainDispatcher, grouped_mm and autograd: "plain glue"."""
    dispatcher, e = PlainDispatcher(ours.config.num_experts, ours.mesh.ep), ours.experts

    def forward(x: Tensor) -> Tensor:
        routing = ours.router(x)
        arrived = dispatcher.dispatch(x, routing.topk_ids, routing.topk_weights)
        offsets = ep.count_choices(arrived.topk_ids, e.num_local).cumsum(0).to(torch.int32)
        gate, up = (F.grouped_mm(arrived.x, w, offs=offsets) for w in (e.w1, e.w3))
        y = F.grouped_mm(F.silu(gate) * up, e.w2, offs=offsets)
        return dispatcher.combine(y, arrived.handle)

    return layer.Variant(forward, list(ours.parameters()), hooks=False)


def torchtitan_layer(recorder: Recorder, ours: ep.EPMoE) -> layer.Variant:
    """torchtitan's layer on the weights of ours. ImportError where it cannot run."""
    if not recorder.on_gpu:
        raise ImportError("its kernels want a GPU")
    mesh = dist.device_mesh.init_device_mesh("cuda", (recorder.comm.size,), mesh_dim_names=("ep",))
    moe = peers.torchtitan_layer(ours, Path(recorder.args.torchtitan), mesh)
    parameters = [*moe.parameters(), *ours.parameters()]
    check = peers.with_choices_of(moe, ours.router)
    return layer.Variant(peers.forward_of(moe), parameters, check, is_copy=True, hooks=False)


def run_bandwidth(recorder: Recorder) -> dict:
    """Dispatch and combine, forward, of 4,096 tokens a rank, hidden 7,168, top-8 of 256 experts, bfloat16."""
    comm, device, size, config = (
        recorder.comm,
        recorder.device,
        recorder.comm.size,
        traffic.exchange_config(recorder),
    )
    num_tokens, d, num_experts = config.max_num_tokens, config.hidden_dim, config.num_experts
    kinds = dispatchers(recorder, config, comm) | {"plain glue": PlainDispatcher(num_experts, comm)}
    gather_gb = 4 * size * num_tokens * config.top_k * d * 2 / 1e9  # gathered, twice on the way, kept
    if "all_gather" in kinds and gather_gb > LARGEST_GATHER_GB:
        recorder.say(f"  dispatcher all_gather left out: it would hold {gather_gb:.0f} GB a rank")
        del kinds["all_gather"]
    variants, sent, errors = traffic.there_and_back(recorder, config, kinds, unmetered=("plain glue",))
    outgoing = torch.zeros(num_tokens * config.top_k, d, dtype=torch.bfloat16, device=device)
    incoming = torch.empty_like(outgoing)
    plain = f"plain {dist.get_backend()} all-to-all"
    variants[plain] = lambda: dist.all_to_all_single(incoming, outgoing)
    sent[plain] = outgoing.nbytes * (size - 1) / size
    for name, run in traffic.recorded(recorder, variants, kinds).items():
        variants[name] = run
        sent[name] = sum(
            sent[f"{name.split(', ')[0]}, {way}"] for way in ("dispatch", "combine") if way in name
        )
        sent[name] = sent[name] or sum(
            sent[f"{name.split(', ')[0]}, {way}"] for way in ("dispatch", "combine")
        )
    samples = recorder.alternate(variants, 2 if recorder.args.small else 5)
    ms = record.medians(samples)
    rates = {name: sent[name] / ms[name] / 1e6 for name in ms}
    for name in sorted(ms, key=ms.get):
        share = f"{ms[name] / ms[plain]:5.2f} x the time of plain" if size > 1 else ""
        recorder.say(
            f"  {name:28} {ms[name]:8.3f} ms  {sent[name] / 1e6:8.1f} MB leave  {rates[name]:7.1f} GB/s  {share}"
        )
    return {
        "tokens": num_tokens, "hidden_dim": d, "num_experts": num_experts, "top_k": config.top_k,
        "mean_bytes_that_leave": sent, "errors": errors, "median_ms": ms, "gb_per_s": rates,
        "samples_ms": samples,
    }  # fmt: skip


def run_growth(recorder: Recorder) -> dict:
    """One copy a rank (peer, dedup) and everything to everyone (gather_tokens) on groups of 2, 4, .. N ranks: distinct
    ranks of a token, expected and drawn, bytes, and times, recorded where they record."""
    comm, found, num_rounds = recorder.comm, {}, 2 if recorder.args.small else 5
    timeout = timedelta(seconds=recorder.args.timeout_s)
    for size in [size for size in (2, 4, 8) if comm.size % size == 0]:
        groups = [
            dist.new_group(list(range(r, r + size)), timeout=timeout) for r in range(0, comm.size, size)
        ]
        recorder.comm = ep.Communicator(groups[comm.rank // size])
        try:
            config = traffic.exchange_config(recorder)
            names = ("gather_tokens", "dedup", "peer")
            kinds = {n: ep.REGISTRIES["dispatcher"][n].for_layer(config, recorder.comm) for n in names}
            ways, sent, errors = traffic.there_and_back(recorder, config, kinds)
            variants = {
                f"{n}, there and back": lambda n=n, ways=ways: [
                    ways[f"{n}, {w}"]() for w in ("dispatch", "combine")
                ]
                for n in names
            } | traffic.recorded(recorder, ways, kinds)
            samples = recorder.alternate(variants, num_rounds)
        finally:
            recorder.comm = comm
        row_bytes = config.max_num_tokens * config.hidden_dim * 2 * (size - 1) / size
        distinct = sent["dedup, combine"] / row_bytes
        expected = ep.expected_distinct_ranks(config.num_experts, config.top_k, size)
        found[size] = {"distinct_ranks": distinct, "expected": expected, "errors": errors}
        found[size] |= {
            "mean_bytes_that_leave": sent,
            "median_ms": record.medians(samples),
            "samples_ms": samples,
        }
        times = ", ".join(f"{n} {ms:.3f}" for n, ms in found[size]["median_ms"].items())
        recorder.say(f"  {size} ranks, distinct {distinct:.2f}, expected {expected:.2f}; ms: {times}")
        recorder.free_memory()
    return {"sizes": found}


def measure_layer(recorder: Recorder, size: str) -> dict:
    """One size: hold every variant against the float32 reference on a few tokens, then time all of them.

    predicted_kept_gb: of ours, the most of any rank: gate and up of every row that arrives, and the rows.
    """
    ours = layer.make_layer(recorder, size)
    config = ours.config
    makers = layer.our_variants(recorder, ours, f"{config.dispatcher} + ")
    launcher = recorder.launchers[""]

    def with_dispatcher(name: str) -> layer.Variant:
        other = launcher.sharing(ours, dispatcher=name)
        return layer.Variant(lambda x: launcher.forward(other, x)[0], list(other.parameters()))

    names = [n for n in ("gather_tokens", "peer") if n in dispatchers(recorder, config, recorder.comm)]
    makers |= {
        f"ours, {n} + grouped": lambda n=n: with_dispatcher(n) for n in names if recorder.comm.size > 1
    }
    makers |= {
        "plain glue": lambda: plain_layer(ours),
        "torchtitan": lambda: torchtitan_layer(recorder, ours),
    }
    few, batch = (layer.tokens(ours, n) for n in (32 if recorder.args.small else 256, config.max_num_tokens))
    passes, result = layer.prepare(recorder, size, ours, makers, batch, checked=few)
    with torch.no_grad():
        rows = int(layer.local_counts(ours, ours.router(batch[0]).topk_ids).sum())
    columns = 2 * config.ffn_dim
    columns += config.hidden_dim if recorder.comm.size > 1 else 0  # alone, the rows are x itself
    result["predicted_kept_gb"] = max(recorder.gather(rows * columns * batch[0].element_size() / 1e9))
    if recorder.on_gpu:
        names = [name for name in ("ours, gather_tokens + grouped", "ours, peer + grouped") if name in passes]
        passes |= {f"{name}, recorded": record.captured(passes[name]) for name in names}
    samples = recorder.alternate(passes, 1 if recorder.args.small else 3)
    return layer.finish(recorder, size, ours, samples, result)


def run_layers(recorder: Recorder) -> dict:
    """A layer's forward and backward pass over the ranks at the sizes of known models, beside others."""
    names = list(layer.SMALL_SIZES if recorder.args.small else layer.SIZES)
    begin, whole, sizes = time.perf_counter(), recorder.end, {}
    for turn, name in enumerate(names):
        if recorder.is_over():
            recorder.failures.append(f"time was up before {name}")
            continue
        recorder.end = begin + (whole - begin) * (turn + 1) / len(names)  # each size has its share
        sizes[name] = measure_layer(recorder, name)
        recorder.free_memory()
    return {"sizes": sizes}


def run_seed(recorder: Recorder) -> dict:
    """The original's run by the launcher's own `train`, as many steps as fit; then ours and others', alternating."""
    recorder.extract_original()
    args, launcher = recorder.args, recorder.launchers[""]
    begin, small = time.perf_counter(), ["--hidden-dim", "64", "--ffn-dim", "128"] if args.small else []
    ours = launcher.step(small, recorder.device)
    for _ in range(2):  # the first warms up
        ms = max(recorder.gather(recorder.wall_ms(ours, 3 if args.small else 50)))
    fitting = 60 if args.small else max(100, int(0.4 * (recorder.end - begin) * 1e3 / ms))
    steps = min(recorder.gather(min(args.steps, fitting)))
    interval = max(1, steps // 10)
    run = [*small, "--steps", str(steps), "--log-interval", str(interval)]
    measured = train(recorder, run, launcher.mesh)
    bytes_sent = measured["bytes_sent_per_step"]
    if bytes_sent["predicted"] != bytes_sent["counted"]:
        recorder.failures.append(f"a step sent {bytes_sent['counted']} bytes, not {bytes_sent['predicted']}")
    if not measured["final_task_loss"] < measured["task_loss"][0]:
        recorder.failures.append(f"the loss did not fall: {measured['task_loss']}")
    capacity = ["--dispatcher", "capacity", "--capacity-factor", "8", "--step"]
    wanted = {"ours": [], "all_gather + loop": ["--dispatcher", "all_gather", "--experts", "loop"]}
    wanted |= {"capacity": [*capacity, "eager"], "capacity, graph": [*capacity, "graph"]}
    wanted |= {
        f"{name}, graph": ["--dispatcher", name, "--step", "graph"] for name in ("gather_tokens", "peer")
    }
    config, _ = ep.parse_flags(run)
    variants = {"seed": before.original_step(config, recorder.comm, recorder.device), "ours": ours}
    for kind, (prefix, other) in product(wanted, recorder.launchers.items()):
        name = "before" if prefix and kind == "ours" else prefix + kind
        try:
            variants.setdefault(name, other.step([*small, *wanted[kind]], recorder.device))
        except ValueError as error:
            recorder.say(f"  {name} left out: {error}")
    samples = recorder.alternate(variants, 2 if args.small else 8)
    found = record.medians(samples)
    recorder.say_speeds(found)
    at = {step: measured["task_loss"][step // interval] for step in range(0, steps, interval)}
    recorder.say(
        f"  {steps} steps of {measured['ms_per_step']:.2f} ms, task loss "
        + ", ".join(f"{loss:.4f} at {step}" for step, loss in at.items())
    )
    times = {"samples_ms": samples, "median_ms": found}
    return {"steps": steps, "task_loss_at": at, "run": measured} | times


PARTS = {
    "parity": run_parity,
    "invariance": run_invariance,
    "bandwidth": run_bandwidth,
    "growth": run_growth,
    "layers": run_layers,
    "seed": run_seed,
}


def run_part(recorder: Recorder, name: str, seconds: float) -> dict:
    """One part -> its entry in the results; what goes wrong becomes `failures`."""
    begin, recorder.failures, problem, result = time.perf_counter(), [], "", {}
    recorder.end = begin + seconds
    try:
        result = PARTS[name](recorder)
    except Exception as error:
        problem = f"rank {recorder.comm.rank}: {type(error).__name__}: {str(error)[:500]}"
        print(f"{name}, {problem}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    recorder.free_memory()
    failures = [f for own in recorder.gather([*recorder.failures, problem]) for f in own if f]
    took = time.perf_counter() - begin
    recorder.say(f"{name}: {'FAILED' if failures else 'ok'} in {took:.1f} s")
    for failure in list(dict.fromkeys(failures))[:10]:
        recorder.say(f"  {name}: {failure}")
    return {"seconds": took, "budget_s": seconds, "failures": failures} | result


def measure(recorder: Recorder) -> None:
    """Every part, into the file one by one."""
    begin, parts = time.perf_counter(), {}
    recorder.say(f"{recorder.comm.size} x {ep.device_model(recorder.device)}, torch {torch.__version__}")
    for name in recorder.args.parts:
        parts[name] = run_part(recorder, name, getattr(recorder.args, f"budget_{name}"))
        recorder.write(f"x{recorder.comm.size}_suite", {"parts": parts})
    recorder.failures = [name for name, part in parts.items() if part["failures"]]
    took, failed = time.perf_counter() - begin, ", ".join(recorder.failures) or "none"
    recorder.say(f"{len(parts)} parts in {took:.0f} s, failed: {failed}")


def flags() -> argparse.ArgumentParser:
    """The flags."""
    parser = record.parser(__doc__, device="auto", small=False, rounds=20, steps=10_000, before=None)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    for name, seconds in BUDGETS.items():
        parser.add_argument(
            f"--budget-{name}", type=float, default=seconds, help=f"seconds (default {seconds})"
        )
    parser.add_argument("--timeout-s", type=float, default=120, help="how long a rank waits for another")
    parser.add_argument("--torchtitan", default=ROOT / "build/torchtitan", help="folder with its package")
    return parser


if __name__ == "__main__":
    record.main(measure, flags(), needs_group=True)
