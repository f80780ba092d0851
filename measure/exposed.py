"""What several GPUs wait for beside their products, and two ways to wait for less: results/<device>_x<N>_exposed.json.

    torchrun --standalone --nproc_per_node=2 measure/exposed.py                       two GPUs; about two minutes
    torchrun --standalone --nproc_per_node=2 measure/exposed.py --device cpu --small  whether it runs, anywhere

Layers of measure/layer.py, forward and backward, each held against the plain order first. Kernels: `peer` and one rank
alone with as many rows, kernel by kernel. Arrival: `peer` with room for fewer choices than can come. Chunks: cut by
experts instead of tokens (chapter 12's second exercise). Copies: rows in order by the copy engine, on a stream of
their own, with nothing, a shared expert or another half's experts beside them.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import layer, overlap, record, traffic  # noqa: E402
from measure.record import Recorder  # noqa: E402

FACTOR = 1.1  # room for so many times an even load


@ep.register("overlap", "chunks")
class Chunks(ep.InOrder):
    """The first half of each rank's experts, and the second: chapter 12's second exercise, solved."""

    @staticmethod
    def preference(config: ep.MoEConfig, device: torch.device, ep_size: int) -> float:
        return 0.1

    @staticmethod
    def forward(layer: ep.EPMoE, x: Tensor, routing: ep.Routing) -> Tensor:
        dispatcher, experts = layer.dispatcher, layer.experts
        ids, weights, local = routing.topk_ids, routing.topk_weights, dispatcher.num_local_experts
        is_first = ids % local < (local + 1) // 2
        a = dispatcher.begin_dispatch(x, torch.where(is_first, ids, -1), weights)
        b = dispatcher.begin_dispatch(x, torch.where(is_first, -1, ids), weights)
        a = dispatcher.end_dispatch(a)
        a = dispatcher.begin_combine(experts(a), a.handle)
        b = dispatcher.end_dispatch(b)
        b = dispatcher.begin_combine(experts(b), b.handle)
        return dispatcher.end_combine(a) + dispatcher.end_combine(b)


@dataclass(frozen=True)
class Case:
    """dispatcher, order, and whether a shared expert is there."""

    dispatcher: str
    order: str = "none"
    has_shared: bool = False

    @property
    def name(self) -> str:
        return f"{self.dispatcher}, {self.order}" + ", shared expert" * self.has_shared


CASES = [
    *(Case(name, order) for name in ("all_to_all", "dedup") for order in ("none", "tbo", "chunks")),
    Case("gather_tokens"), Case("peer"), Case("copies"), Case("copies", "tbo"),
    *(Case(n, o, True) for n, o in (("peer", "none"), ("copies", "none"), ("copies", "shared"), ("copies", "tbo"))),
]  # fmt: skip


def alone_with_half(recorder: Recorder, ours: ep.EPMoE, num_shared: int) -> ep.EPMoE | None:
    """One rank alone with this rank's share of the experts: as many rows, and no exchange."""
    num_local = ours.config.num_experts // recorder.comm.size
    if num_local < ours.config.top_k:
        return None
    config = replace(
        ours.config, num_experts=num_local, dispatcher="local", overlap="none", num_shared_experts=num_shared
    )
    return traffic.alone().layer(config, recorder.device, layer.fill)


def least_of_ranks(recorder: Recorder, times: dict[str, float]) -> dict[str, float]:
    """{kernel: ms}, of the rank where it took least: the others waited in it. "all" is their sum."""
    by_rank = recorder.gather(times)
    names = [name for name in times if name != "all" and all(name in own for own in by_rank)]
    least = {name: min(own[name] for own in by_rank) for name in names}
    return {"all": sum(least.values())} | least


def one_size(recorder: Recorder, size: str) -> dict:
    """Errors, times, exposed exchange and kernels of every case at one size."""
    ours = layer.make_layer(recorder, size)
    x, grad = layer.tokens(ours, ours.config.max_num_tokens)
    launcher = recorder.launchers[""]
    base = launcher.sharing(ours, num_shared_experts=1)
    for parameter in base.shared.parameters():
        layer.fill(parameter, parameter.shape[1])
    made = {
        case.name: launcher.sharing(
            base if case.has_shared else ours, dispatcher=case.dispatcher, overlap=case.order
        )
        for case in CASES
    }
    made[f"peer, room for {FACTOR}"] = bounded = launcher.sharing(ours, dispatcher="peer")
    bounded.dispatcher.arrival_factor = FACTOR
    for name, num_shared in (("one rank alone", 0), ("one rank alone, shared expert", 1)):
        if (alone := alone_with_half(recorder, ours, num_shared)) is not None:
            made[name] = alone
    passes = {n: layer.train_pass(own, x, grad, list(own.parameters())) for n, own in made.items()}
    errors, plain, kernels, memory = {}, {}, {}, {}
    pool = torch.cuda.graph_pool_handle() if recorder.on_gpu else None  # one for all: they run in turn
    for name, run in list(passes.items()):
        found = [run().detach(), x.grad, made[name].experts.w1.grad, made[name].router.gate.weight.grad]
        if "alone" not in name:
            errors[name] = overlap.off_plain(recorder, size, name, found, plain)
        if name in ("all_to_all, none", "peer, none", f"peer, room for {FACTOR}"):
            variant = layer.Variant(made[name], list(made[name].parameters()))
            memory[name] = layer.memory_gb(variant, run, x)
        if recorder.on_gpu and made[name].dispatcher.records:
            if name in ("peer, none", "one rank alone"):
                kernels[name] = least_of_ranks(recorder, layer.kernel_times(run))
            with mock.patch.object(torch.cuda, "graph", partial(torch.cuda.graph, pool=pool)):
                passes[name] = record.captured(run)
    words = (*overlap.EXCHANGE_KERNELS, "memcpy ptop", "meet_kernel")
    result = overlap.compare(recorder, size, passes, errors, words)
    recorder.say(f"  {size} memory: {memory}")
    for name, times in kernels.items():
        recorder.say(f"  {size} {name}: " + "; ".join(f"{k[:48]} {v:.3f}" for k, v in times.items()))
    return {"tokens": len(x)} | result | {"kernels": kernels, "memory": memory}


def measure(recorder: Recorder) -> None:
    """Size by size, into the file."""
    sizes = {}
    for size in layer.SMALL_SIZES if recorder.args.small else recorder.args.sizes:
        sizes[size] = one_size(recorder, size)
        recorder.free_memory()
        recorder.write(f"x{recorder.comm.size}_exposed", {"sizes": sizes})
    for failure in recorder.failures:
        recorder.say(f"FAILED: {failure}")


if __name__ == "__main__":
    flags = record.parser(__doc__, device="auto", small=False, rounds=10)
    flags.add_argument("--sizes", nargs="+", choices=list(layer.SIZES), default=list(layer.SIZES)[::-1])
    record.main(measure, flags, needs_group=True)
