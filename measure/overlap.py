"""Chapter 12: what is hidden beside computing, and what is left, into results/<device>_overlap.json.

    python measure/overlap.py                               two machines (tools/hosts.py), a rank each; three minutes
    torchrun --standalone --nproc_per_node=2 measure/overlap.py --device cuda         two GPUs; two minutes
    torchrun --standalone --nproc_per_node=2 measure/overlap.py --device cpu --small  whether the GPUs' part runs

Two machines: forward and backward of a layer over a cable of 400 Mbit/s, and over one without a limit, in each order;
then with experts of several widths, so that products take from much less to much more time than the exchange. A sample
is [ms, of which the rank waited for rows], of the slower rank. And one pass of each order as torch.profiler saw it.

GPUs: the layers of measure/layer.py with each dispatcher and order, recorded where the dispatcher records, all held
against the plain order first; what of the exchange's kernels runs while no other does, by torch.profiler; one product
beside a copy. Needs Linux and root for the
two machines.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import layer, record  # noqa: E402
from measure.record import Recorder  # noqa: E402

MARK = "overlap: "
SHAPE = {"num_tokens": 512, "hidden_dim": 512, "num_experts": 8, "top_k": 2}
FFN_DIM, FFN_DIMS = 1024, (64, 256, 512, 1024, 2048, 4096)
ORDERS = ("none", "shared", "tbo")
DISPATCHERS = ("all_to_all", "dedup", "gather_tokens", "peer")
EXCHANGE_KERNELS = (
    "nccl",
    "push_tokens",
    "take_rows",
    "push_home",
    "sum_home",
)  # by a word in a kernel's name


class Waited:
    """Seconds that this rank has spent in waiting for other ranks, while `counting`."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def counted(self, method: Callable) -> Callable:
        """The method, its time added up; a call inside another counts once."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.depth -= 1
                self.seconds += (time.perf_counter() - start) * (self.depth == 0)

        return call

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, waits are counted."""
        names = (
            (ep.Pending, "wait"),
            *((ep.Communicator, n) for n in ("all_to_all", "all_gather", "all_reduce")),
        )
        patches = [
            mock.patch.object(owner, name, self.counted(getattr(owner, name))) for owner, name in names
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def small_layer(overlap: str, ffn_dim: int = FFN_DIM, num_shared: int = 0) -> ep.EPMoE:
    """The layer that the two machines share."""
    sizes = {name: n for name, n in SHAPE.items() if name != "num_tokens"}
    config = ep.MoEConfig(**sizes, ffn_dim=ffn_dim, num_shared_experts=num_shared, overlap=overlap, balance="none",
                          dispatcher="all_to_all", experts="blocks")  # fmt: skip
    return ep.EPMoE(config, ep.init_ep(), seed=0)


def small_pass(made: ep.EPMoE) -> Callable[[], None]:
    """Forward and backward of this rank's tokens, the same in every run."""
    generator = torch.Generator().manual_seed(made.mesh.batch.rank)
    shape = SHAPE["num_tokens"], SHAPE["hidden_dim"]
    x = torch.randn(shape, generator=generator, requires_grad=True)
    grad = torch.randn(shape, generator=generator)
    return layer.train_pass(made, x, grad, list(made.parameters()))


def rows_alone(comm: ep.Communicator) -> dict[str, Callable[[], None]]:
    """As many rows as a dispatch sends, and nothing else: in one message, in two at once, in two in turn."""
    count = SHAPE["num_tokens"] * SHAPE["top_k"] // comm.size
    x = torch.zeros(count, SHAPE["hidden_dim"])
    whole, half = ([n * (r != comm.rank) for r in range(comm.size)] for n in (count, count // 2))
    begin, first, second = comm.begin_all_to_all, x[: count // 2], x[count // 2 :]

    def at_once() -> None:
        for pending in [begin(part, half, half, "alone") for part in (first, second)]:
            pending.wait()

    return {
        "rows": lambda: comm.all_to_all(x, whole, whole, "alone"),
        "rows, two halves at once": at_once,
        "rows, two halves in turn": lambda: [
            comm.all_to_all(p, half, half, "alone") for p in (first, second)
        ],
    }


def traced(run: Callable[[], object]) -> list[dict]:
    """The events of one call of run, as torch.profiler writes them."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def lanes(events: list[dict]) -> dict[str, list]:
    """A CPU trace -> {"flights": [[start, length]], "work": [[kind, start, length]]}, ms from the first event.

    A flight is an exchange of rows, from its beginning to its end on this rank. Work is what the rank's main thread
    computes: torch's operations, merged where nothing lies between; kind: experts (inside ExpertsOnTokens, forward or
    backward) or other. Where the thread does nothing of that, it waits, or runs Python.
    """
    operations = [e for e in events if e.get("cat") == "cpu_op"]
    main = max(
        {e["tid"] for e in operations}, key=lambda tid: sum(e["dur"] for e in operations if e["tid"] == tid)
    )
    own = sorted((e for e in operations if e["tid"] == main), key=lambda e: e["ts"])
    first = own[0]["ts"]
    inside = [(e["ts"], e["ts"] + e["dur"]) for e in own if e["name"].startswith("ExpertsOnTokens")]
    work: list[list] = []
    for event in own:
        if not event["name"].startswith("aten::"):
            continue
        start, end = event["ts"], event["ts"] + event["dur"]
        kind = "experts" if any(a <= start <= b for a, b in inside) else "other"
        if work and start <= work[-1][2] + (50 if kind == work[-1][0] else 0):
            work[-1][2] = max(work[-1][2], end)
        else:
            work.append([kind, start, end])
    flights = [e for e in events if e["name"] == "gloo:all_to_all"]
    return {
        "flights": [[round((e["ts"] - first) / 1e3, 3), round(e["dur"] / 1e3, 3)] for e in flights],
        "work": [[k, round((a - first) / 1e3, 3), round((b - a) / 1e3, 3)] for k, a, b in work],
    }


def work(args: argparse.Namespace) -> None:
    """One rank of two machines: prints the result, by rank 0, as a line that begins with MARK."""
    recorder, waited = Recorder(args), Waited()

    def clock(run: Callable[[], None], steps: int) -> list[float]:
        recorder.comm.all_reduce(torch.zeros(1))
        waited.seconds, start = 0.0, time.perf_counter()
        with waited.counting():
            run()
        return [round(s * 1e3, 3) for s in (time.perf_counter() - start, waited.seconds)]

    variants = {name: small_pass(small_layer(name)) for name in ("none", "tbo")}
    variants |= {f"{name}, shared expert": small_pass(small_layer(name, num_shared=1)) for name in ORDERS}
    wide = {}
    for ffn_dim in FFN_DIMS if args.wide else ():
        wide |= {f"{name}, {ffn_dim}": small_pass(small_layer(name, ffn_dim)) for name in ("none", "tbo")}
    rows = rows_alone(recorder.comm)
    samples = recorder.alternate(variants | wide | rows, clock=clock, length=lambda sample: sample[0])
    seen = {name: recorder.gather(lanes(traced(run))) for name, run in variants.items()}
    recorder.say(MARK + json.dumps({"samples": samples, "timelines": seen}))
    torch.distributed.destroy_process_group()


def two_machines(mbit_per_s: float, rounds: int, wide: bool) -> dict:
    """{"samples": {order: [[ms, waited ms]]}, "timelines": {order: lanes by rank}} at one rate, 0 for no limit.

    HostsUnavailable where that is forbidden."""
    from tools.hosts import run_program  # which imports what the ranks do not need

    program = [str(Path(__file__).resolve()), "--work", "--device", "cpu", "--rounds", str(rounds)]
    texts, _ = run_program(program + ["--wide"] * wide, mbit_per_s=mbit_per_s or None, limit_s=200)
    (line,) = [line for text in texts for line in text.splitlines() if line.startswith(MARK)]
    return json.loads(line.removeprefix(MARK))


def machines(args: argparse.Namespace) -> int:
    """Both rates, into the file."""
    from tools.hosts import HostsUnavailable

    rates = {}
    for rate in args.rates:
        name = f"{rate:g} Mbit/s" if rate else "no limit"
        try:
            found = two_machines(rate, args.rounds, wide=rate > 0)
        except HostsUnavailable as reason:
            print(f"no two machines here: {reason}", file=sys.stderr)
            return 3
        found["median_ms"] = {n: statistics.median(s[0] for s in own) for n, own in found["samples"].items()}
        found["waited_ms"] = {n: statistics.median(s[1] for s in own) for n, own in found["samples"].items()}
        rates[name] = found
        for variant, ms in found["median_ms"].items():
            print(f"{name}: {variant:22} {ms:7.1f} ms, waited {found['waited_ms'][variant]:7.1f}", flush=True)
    facts = {"machines": 2, "ranks_per_host": 1, "rounds": args.rounds, **SHAPE, "ffn_dim": FFN_DIM}
    facts |= {"ffn_dims": list(FFN_DIMS), "dtype": "float32"}
    record.write(args.output, "overlap", torch.device("cpu"), facts | {"rates": rates})
    return 0


def covered_ms(spans: list[tuple[float, float]]) -> tuple[float, list[tuple[float, float]]]:
    """Spans (start, end) in us -> the ms that they cover together, and the same as spans that do not touch."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return sum(end - start for start, end in merged) / 1e3, merged


def exchange_of(run: Callable[[], object], kernels: Sequence[str], passes: int = 3) -> dict[str, float]:
    """Per pass, in ms, by torch.profiler: exchange_ms, in which a kernel of the exchange runs (its name holds a word of
    `kernels`); exposed_ms, of that, in which no other kernel does; idle_ms, in which none does."""
    for _ in range(2):  # the profiler's first start takes a while, and not on every rank as long
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(passes):
                run()
            torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [
        (e.name, e.time_range.start, e.time_range.end)
        for e in events
        if e.time_range.end > e.time_range.start
    ]
    is_exchange = [any(word in name.lower() for word in kernels) for name, _, _ in spans]
    own = [span[1:] for span, own in zip(spans, is_exchange, strict=True) if own]
    others = [span[1:] for span, own in zip(spans, is_exchange, strict=True) if not own]
    all_ms, merged = covered_ms(own + others)
    span_ms = (merged[-1][1] - merged[0][0]) / 1e3 if merged else 0.0
    exposed_ms = all_ms - covered_ms(others)[0]
    found = {"exchange_ms": covered_ms(own)[0], "exposed_ms": exposed_ms, "idle_ms": span_ms - all_ms}
    return {name: round(ms / passes, 4) for name, ms in found.items()}


def alone_layer(recorder: Recorder, ours: ep.EPMoE) -> ep.EPMoE:
    """A layer of this rank alone, with all experts: as many tokens, and nothing travels."""
    config = replace(ours.config, dispatcher="local", overlap="none")
    mesh = ep.Mesh(*[ep.Communicator.alone()] * 3)
    with mock.patch.object(ep, "seeded_uniform_", layer.fill), recorder.device:
        return ep.EPMoE(config, mesh, seed=0, device=recorder.device)


def orders_of(recorder: Recorder, ours: ep.EPMoE) -> dict[str, ep.EPMoE]:
    """{dispatcher, order: a layer on the weights of ours}; with a shared expert too, which has weights of its own."""
    launcher, config = recorder.launchers[""], ours.config
    registered = ep.REGISTRIES["dispatcher"]
    names = [name for name in DISPATCHERS if name in registered
             and registered[name].preference(config, recorder.device, recorder.comm.size) > 0]  # fmt: skip
    base = launcher.sharing(ours, num_shared_experts=1)
    for parameter in base.shared.parameters():
        layer.fill(parameter, parameter.shape[1])
    made = {}
    for name in names:
        for order in ("none", "tbo"):
            made[f"{name}, {order}"] = launcher.sharing(ours, dispatcher=name, overlap=order)
        for order in ORDERS if name in ("all_to_all", "peer") else ():
            made[f"{name}, {order}, shared expert"] = launcher.sharing(base, dispatcher=name, overlap=order)
    return made


def off_plain(recorder: Recorder, size: str, name: str, found: list, plain: dict[bool, list]) -> float:
    """How far the tensors that a pass found are from the plain order's, on the worst rank; a failure above 2e-2.

    plain: filled by the first case without, and the first with, a shared expert: the plain orders."""
    first = plain.setdefault("shared" in name, [t.clone() for t in found])
    pairs = zip(found, first, strict=True)
    off = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    off = max(recorder.gather(off))
    if not off <= 2e-2:
        recorder.failures.append(f"{size}: {name} is {off:.1e} off the plain order")
    return off


def compare(
    recorder: Recorder, size: str, passes: dict[str, Callable[[], object]], errors: dict[str, float],
    kernels: Sequence[str] = EXCHANGE_KERNELS,
) -> dict:  # fmt: skip
    """The passes' times, in turns, and how much of each exchange is exposed, of the slowest rank."""
    samples = recorder.alternate(passes, 2, recorder.event_ms, warm_up=2)
    ms, exchange = record.medians(samples), {}
    for name in passes if recorder.on_gpu else ():
        by_rank = recorder.gather(exchange_of(passes[name], kernels))
        exchange[name] = max(by_rank, key=lambda found: found["exposed_ms"])
    for name in ms:
        parts = ", ".join(f"{what} {value:.2f}" for what, value in exchange.get(name, {}).items())
        recorder.say(f"  {size:9} {name:34} {ms[name]:8.3f} ms  {parts}  off {errors.get(name, 0):.1e}")
    return {"errors": errors, "median_ms": ms, "samples_ms": samples, "exchange": exchange}


def one_size(recorder: Recorder, size: str) -> dict:
    """Every dispatcher and order at one size: how far from the plain order, times, exchanges."""
    ours = layer.make_layer(recorder, size)
    x, grad = layer.tokens(ours, ours.config.max_num_tokens)
    made = orders_of(recorder, ours) | {"one rank alone": alone_layer(recorder, ours)}
    passes = {n: layer.train_pass(own, x, grad, list(own.parameters())) for n, own in made.items()}
    errors, plain = {}, {}
    for name, run in list(passes.items()):
        found = [run().detach(), x.grad, made[name].experts.w1.grad]
        if name != "one rank alone":
            errors[name] = off_plain(recorder, size, name, found, plain)
            if recorder.on_gpu and made[name].dispatcher.records:
                passes[name] = record.captured(run)
    return {"tokens": len(x)} | compare(recorder, size, passes, errors)


def beside(recorder: Recorder) -> dict:
    """One large product, alone and while something else moves 235 MiB to the other GPU: the product's own ms."""
    n, comm = 8192, recorder.comm
    a, b = (torch.randn(n, n, device=recorder.device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.zeros(235 * 2**19, device=recorder.device, dtype=torch.bfloat16)
    other = torch.empty(x.shape, dtype=x.dtype, device=f"cuda:{(comm.rank + 1) % torch.cuda.device_count()}")
    gathered, side = x.new_empty(comm.size * len(x)), torch.cuda.Stream()

    def product_ms(start_copy: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        side.wait_stream(torch.cuda.current_stream())
        start_copy()
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def copy_engine() -> None:
        with torch.cuda.stream(side):
            other.copy_(x, non_blocking=True)

    def nccl() -> None:
        works.append(torch.distributed.all_gather_into_tensor(gathered, x, async_op=True))

    works: list = []  # which keep the tensors until all is done
    ways = {
        "alone": lambda: None,
        "beside a copy engine's copy": copy_engine,
        "beside NCCL's all_gather": nccl,
    }
    samples = recorder.alternate(ways, clock=lambda way, _: product_ms(way), warm_up=3)
    for name, ms in record.medians(samples).items():
        recorder.say(f"  a product of {n} cubed, {name:30} {ms:.3f} ms")
    return {"size": n, "copied_mib": 235, "median_ms": record.medians(samples), "samples_ms": samples}


def gpus(recorder: Recorder) -> None:
    """The GPUs' part, into the file size by size."""
    result: dict = {"beside": beside(recorder) if recorder.on_gpu else None, "sizes": {}}
    for size in layer.SMALL_SIZES if recorder.args.small else layer.SIZES:
        result["sizes"][size] = one_size(recorder, size)
        recorder.free_memory()
        recorder.write(f"x{recorder.comm.size}_overlap", result)
    for failure in recorder.failures:
        recorder.say(f"FAILED: {failure}")


def main() -> int:
    parser = record.parser(__doc__, rounds=20, device="auto", small=False)
    parser.add_argument("--rates", nargs="+", type=float, default=[400, 0], help="Mbit/s; 0 sets no limit")
    parser.add_argument("--work", action="store_true", help="be one of the two machines' ranks")
    parser.add_argument("--wide", action="store_true", help="experts of several widths too")
    args = parser.parse_args()
    if args.work:
        work(args)
        return 0
    if ep.world_from_env()[1] > 1:
        record.main(gpus, parser, needs_group=True)  # which ends the process
    return machines(args)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the group's threads may still end
