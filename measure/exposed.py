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
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import layer, overlap, record, traffic  # noqa: E402
from measure.record import Recorder  # noqa: E402

SLOTS = 4  # two halves have two exchanges under way, and a third begins before the first one's rows are read


@ep.kernel
def meet_kernel(
    table, state, missing, looks, RANK: ep.constexpr, NUM_RANKS: ep.constexpr, PLACES: ep.constexpr
):
    """One program: raises this rank's flag everywhere, and waits for all others'."""
    epoch = ep.tl.load(state)
    ep.signal_peers(table, state, epoch, RANK, NUM_RANKS, PLACES)
    ep.await_peers(table, epoch + 1, missing, looks, RANK, NUM_RANKS, PLACES)


class CopyFlight:
    """One exchange of blocks that are in order already, by copies into the peers' slots, beside what computes.

    spread: a block [S, n] of this rank to all; home: block p of [W * S, n] to rank p. Two tensors of 16 bits and of
    float32 at a time. land gives what came as [W * S, n], in the memory that turns.
    """

    side: dict[torch.device, Any] = {}

    def __init__(self, comm: ep.Communicator, memory: ep.PeerMemory, num_slots: int) -> None:
        self.comm, self.memory, self.num_slots = comm, memory, num_slots

    def begin(self, rows: Tensor | None, riders: Tensor | None, is_home: bool) -> None:
        """Copies on the side stream, once everything before is done."""
        self.sources, memory, size, S = (rows, riders), self.memory, self.comm.size, self.num_slots
        shape = (size * S, 0 if rows is None else rows.shape[1], 0 if riders is None else riders.shape[1])
        dtype = riders.dtype if rows is None else rows.dtype
        own = slice(self.comm.rank * S, (self.comm.rank + 1) * S)

        def copy() -> None:
            for p in [(self.comm.rank + 1 + n) % size for n in range(size - 1)]:
                block = slice(p * S, (p + 1) * S) if is_home else slice(None)
                for source, slot in zip(self.sources, memory.slot(p, shape, dtype), strict=True):
                    if source is not None:
                        slot[own].copy_(source[block], non_blocking=True)

        self.landed = memory.slot(self.comm.rank, shape, dtype)
        if rows is not None and rows.is_cuda or rows is None and riders.is_cuda:
            device = self.sources[0 if riders is None else 1].device
            side = self.side.setdefault(device, torch.cuda.Stream(device))
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                copy()
                meet_kernel[(1,)](
                    memory.table, memory.state, memory.missing, memory.looks, self.comm.rank, size,
                    1 << (size - 1).bit_length(),
                )  # fmt: skip
                self.done = torch.cuda.Event()
                self.done.record()
        else:
            copy()
            self.comm.all_reduce(torch.zeros(1))
            self.done = None
        memory.turn = (memory.turn + 1) % memory.turns

    def land(self) -> tuple[Tensor, Tensor, tuple]:
        """(rows, riders) in the slot, and what this rank sent; the current stream waits."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
        sources, self.sources = self.sources, None
        return *self.landed, sources

    def blocks(self, landed: Tensor, own: Tensor) -> Tensor:
        """A copy of [W * S, n] with this rank's own block in its place."""
        S, rank = self.num_slots, self.comm.rank
        out = torch.empty_like(landed)
        out[: rank * S], out[(rank + 1) * S :] = landed[: rank * S], landed[(rank + 1) * S :]
        out[rank * S : (rank + 1) * S] = own
        return out

    def total(self, landed: Tensor, sent: Tensor) -> Tensor:
        """The sum over ranks of what came home, [S, n], in float32."""
        S, rank = self.num_slots, self.comm.rank
        parts = [(sent if p == rank else landed)[p * S : (p + 1) * S] for p in range(self.comm.size)]
        if len(parts) == 2:
            return parts[0] + parts[1]
        return torch.stack([part.float() for part in parts]).sum(0).to(sent.dtype)


class BeginThere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ids: Tensor, flight: CopyFlight) -> Tensor:
        ctx.flight, ctx.x_needs_grad = flight, ctx.needs_input_grad[0]
        flight.x_needs_grad = ctx.x_needs_grad
        flight.begin(x.contiguous(), torch.cat([weights, ids.to(weights.dtype)], 1), is_home=False)
        return weights.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple:
        rows, riders, (sent, sent_riders) = ctx.flight.land()
        grad_x = None if sent is None else ctx.flight.total(rows, sent)
        return grad_x, ctx.flight.total(riders, sent_riders), None, None


class EndThere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: CopyFlight) -> tuple[Tensor, Tensor, Tensor]:
        ctx.flight = flight
        landed, riders, (x, own) = flight.land()
        rows, riders, k = flight.blocks(landed, x), flight.blocks(riders, own), own.shape[1] // 2
        ids = riders[:, k:].long()
        ctx.mark_non_differentiable(ids, *(() if flight.x_needs_grad else (rows,)))
        ctx.set_materialize_grads(False)
        return rows, riders[:, :k].contiguous(), ids

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, grad_weights: Tensor, _: None) -> tuple:
        rows = grad_rows.contiguous() if ctx.flight.x_needs_grad else None
        ctx.flight.begin(rows, grad_weights.contiguous(), is_home=True)
        return grad_weights.new_empty(0), None


class BeginHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, flight: CopyFlight) -> Tensor:
        ctx.flight = flight
        flight.begin(y, None, is_home=True)
        return y.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple:
        rows, _, (own, _) = ctx.flight.land()
        return ctx.flight.blocks(rows, own), None


class EndHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: CopyFlight) -> Tensor:
        ctx.flight = flight
        rows, _, (y, _) = flight.land()
        return flight.total(rows, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ctx.flight.begin(grad.contiguous(), None, is_home=False)
        return grad.new_empty(0), None


@ep.register("dispatcher", "copies")
class CopiesDispatcher(ep.GatherTokensDispatcher):
    """gather_tokens by the copy engine: every rank's tokens in order into every other's memory. Every rank has S."""

    memories: dict[ep.Communicator, ep.PeerMemory] = {}

    @staticmethod
    def preference(config: ep.MoEConfig, device: torch.device, ep_size: int) -> float:
        return 0.1

    def flight(self, num_bytes: int, device: torch.device) -> CopyFlight:
        num_bytes = max(2**20, 1 << (num_bytes - 1).bit_length())
        held = self.memories.get(self.comm)
        if held is None or held.slot_bytes < num_bytes:
            blocks = ep.share_memory(self.comm, SLOTS * num_bytes + 2**13, device)
            self.memories[self.comm] = held = ep.PeerMemory(self.comm.rank, blocks, turns=SLOTS)
        return CopyFlight(self.comm, held, self.num_slots)

    def begin_dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple:
        if len(x) != self.num_slots:
            raise ValueError(f"{len(x)} tokens, and copies was made for {self.num_slots} on every rank")
        self.bytes = self.comm.size * len(x) * (x.shape[1] * x.element_size() + 8 * topk_ids.shape[1]) + 2**12
        flight = self.flight(self.bytes, x.device)
        return BeginThere.apply(x, topk_weights, topk_ids, flight), flight

    def end_dispatch(self, pending: tuple) -> ep.Arrived:
        rows, weights, ids = EndThere.apply(*pending)
        local = self.num_local_experts
        own = ids - self.comm.rank * local
        ids = torch.where((own >= 0) & (own < local), own, -1)
        return ep.Arrived(rows, ids, weights, ids, max_pairs=len(rows) * min(ids.shape[1], local))

    def begin_combine(self, y: Tensor, handle: Tensor) -> tuple:
        flight = self.flight(self.bytes, y.device)
        return BeginHome.apply(y.contiguous(), flight), flight

    def end_combine(self, pending: tuple) -> Tensor:
        return EndHome.apply(*pending)


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
    for name, num_shared in (("one rank alone", 0), ("one rank alone, shared expert", 1)):
        if (alone := alone_with_half(recorder, ours, num_shared)) is not None:
            made[name] = alone
    passes = {n: layer.train_pass(own, x, grad, list(own.parameters())) for n, own in made.items()}
    errors, plain, kernels = {}, {}, {}
    for name, run in list(passes.items()):
        found = [run().detach(), x.grad, made[name].experts.w1.grad, made[name].router.gate.weight.grad]
        if "alone" not in name:
            first = plain.setdefault("shared" in name, [t.clone() for t in found])
            off = max(
                float((a.float() - b.float()).norm() / b.float().norm())
                for a, b in zip(found, first, strict=True)
            )
            errors[name] = max(recorder.gather(off))
            if not errors[name] <= 2e-2:
                recorder.failures.append(f"{size}: {name} is {errors[name]:.1e} off the plain order")
        if recorder.on_gpu and made[name].dispatcher.records:
            if name in ("peer, none", "one rank alone"):
                kernels[name] = layer.kernel_times(run)
            passes[name] = record.captured(run)
    words = (*overlap.EXCHANGE_KERNELS, "memcpy ptop", "meet_kernel")
    samples = recorder.alternate(passes, 2, recorder.event_ms, warm_up=2)
    ms, exchange = record.medians(samples), {}
    with mock.patch.object(overlap, "EXCHANGE_KERNELS", words):
        for name in made if recorder.on_gpu else ():
            by_rank = recorder.gather(overlap.exchange_of(passes[name]))
            exchange[name] = max(by_rank, key=lambda found: found["exposed_ms"])
    for name in ms:
        parts = ", ".join(f"{what} {value:.2f}" for what, value in exchange.get(name, {}).items())
        recorder.say(f"  {size:9} {name:34} {ms[name]:8.3f} ms  {parts}  off {errors.get(name, 0):.1e}")
    for name, times in kernels.items():
        recorder.say(f"  {size} {name}: " + "; ".join(f"{k[:48]} {v:.3f}" for k, v in times.items()))
    return {"tokens": len(x), "errors": errors, "median_ms": ms, "samples_ms": samples, "exchange": exchange,
            "kernels": kernels}  # fmt: skip


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
