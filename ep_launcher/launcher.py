"""GENERATED from the notebooks by tools/extract.py. Do not edit: edit a notebook, then run `make launcher`.

The mixture-of-experts training program of the book, stitched from the tagged code cells of its chapters:

    torchrun --nproc_per_node=2 ep_launcher/launcher.py --steps 2000

Each cell stands below a line that names its notebook and its id, line for line as in the notebook; imports
from this file itself are blanked. Tracebacks of this program name the cells.

Shape letters: T tokens, D hidden, F feed-forward, E experts, L local experts, K top-k, R received rows, W ranks.
"""

# Cells bring the imports they need, so imports stand between definitions and repeat, sorted cell by cell:
# ruff: noqa: E402, F811, I001

# Notebooks: notebooks/01_parallelism.ipynb, notebooks/02_all_to_all.ipynb, notebooks/03_experts.ipynb, notebooks/04_training.ipynb
# Tags: theory, all_to_all, experts, training
# Of the notebook, id, tag and source of every cell below:
SOURCES_SHA256 = "52bcbd6b4dc909bcca900706a6437b823a29c10f1c2ade7461ae8f51d0dead08"


# ============================================================================================================
# theory: notebooks/01_parallelism.ipynb
# ============================================================================================================


# %% notebooks/01_parallelism.ipynb #imports
import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import signal
import statistics
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


# %% notebooks/01_parallelism.ipynb #registry
REGISTRIES: dict[str, dict[str, Any]] = {
    "router": {},
    "dispatcher": {},
    "experts": {},
    "balance": {},
    "activation": {},
}
OPTION_GROUPS: list[type] = []
G = TypeVar("G")


def register(kind: str, name: str) -> Callable[[G], G]:
    """Decorator: makes an implementation choosable by name, in the config and as the flag `--KIND NAME`.

    kind is a key of REGISTRIES. Raises ValueError where the name is taken.
    """

    def add(implementation: G) -> G:
        if name in REGISTRIES[kind]:
            raise ValueError(f"{kind} {name!r} is registered already; choose another name")
        REGISTRIES[kind][name] = implementation
        return implementation

    return add


def option_group(group: type[G]) -> type[G]:
    """Decorator: every field of this frozen dataclass becomes a flag; its docstring's `field: text` is the help."""
    OPTION_GROUPS.append(group)
    return group


# %% notebooks/01_parallelism.ipynb #config
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@option_group
@dataclass(frozen=True)
class MoEConfig:
    """One mixture-of-experts layer; the same on every rank. ValueError where the numbers do not fit together.

    num_experts: experts E in the whole layer, over all ranks
    top_k: experts K that each token visits
    hidden_dim: width D of a token
    ffn_dim: width F inside an expert
    max_num_tokens: most tokens that one rank may bring to a forward pass
    router: how a token chooses its experts
    dispatcher: how rows travel to their experts and back; auto takes the fastest for the device
    experts: how the local experts are computed; auto takes the fastest for the device
    balance: what keeps the experts' load even
    activation: the nonlinearity inside an expert
    dtype: of parameters and optimiser: float32, float64 or bfloat16
    """

    num_experts: int = 16
    top_k: int = 2
    hidden_dim: int = 256
    ffn_dim: int = 1024
    max_num_tokens: int = 128
    router: str = "softmax"
    dispatcher: str = "auto"
    experts: str = "auto"
    balance: str = "aux"
    activation: str = "gelu"
    dtype: str = "float32"
    extras: tuple = field(default=(), metadata={"flag": False})  # option groups of later chapters

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "hidden_dim", "ffn_dim", "max_num_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, above the {self.num_experts} experts; lower --top-k")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; take one of {', '.join(DTYPES)}")

    def num_local_experts(self, ep_size: int) -> int:
        """Experts L that each of ep_size ranks owns. ValueError where they cannot be shared out evenly."""
        if self.num_experts % ep_size:
            raise ValueError(
                f"{self.num_experts} experts cannot be shared evenly by {ep_size} ranks; "
                f"take a multiple of {ep_size} for --num-experts"
            )
        return self.num_experts // ep_size

    def option(self, group: type[G]) -> G:
        """This config's option group of the given type, or that group's defaults."""
        return next((extra for extra in self.extras if isinstance(extra, group)), group())


# %% notebooks/01_parallelism.ipynb #traffic-meter
class TrafficMeter:
    """Counts the bytes that one rank hands to `torch.distributed` for other ranks.

    sent: {purpose: bytes by destination, a list of W ints}. A rank's message to itself costs nothing.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sent: dict[str, list[int]] = {}

    def record(self, purpose: str, bytes_by_destination: list[int]) -> None:
        """Adds one collective's bytes to each destination, the rank's own share left out."""
        totals = self.sent.setdefault(purpose, [0] * self.size)
        for destination, num_bytes in enumerate(bytes_by_destination):
            if destination != self.rank:
                totals[destination] += num_bytes

    def total(self, purpose: str) -> int:
        """Bytes sent for one purpose so far, to all other ranks together."""
        return sum(self.sent.get(purpose, ()))


# %% notebooks/01_parallelism.ipynb #collective-error
class CollectiveError(RuntimeError):
    """A collective failed on this rank: another rank died, stayed away too long, or sent another size."""


# %% notebooks/01_parallelism.ipynb #communicator
class Communicator:
    """The collectives of one expert-parallel group; every byte of rows passes the meter.

    group: a process group; None is the default group, or a group of one where none was started.
    rank, size: this rank's number in the group (`ep_rank`) and the number of ranks W (`ep_size`).
    num_collectives: how many collectives this rank has entered; names the straggler when a run hangs.
    At size 1 every collective is local and sends nothing.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if started else 0
        self.size = dist.get_world_size(group) if started else 1
        self.meter = TrafficMeter(self.rank, self.size)
        self.num_collectives = 0

    @contextlib.contextmanager
    def entering(self) -> Iterator[None]:
        """Counts a collective; a failure inside becomes a CollectiveError that names rank and number."""
        self.num_collectives += 1
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise CollectiveError(f"rank {self.rank}, collective {self.num_collectives}: {reason}") from error

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        """x [n, ...], the same shape on all ranks -> [W, n, ...]. Sends x to each of W - 1 ranks. No gradient."""
        if self.size == 1:
            return x[None]
        self.meter.record(purpose, [x.nbytes] * self.size)
        out = x.new_empty(self.size, *x.shape)
        with self.entering():
            dist.all_gather(list(out.unbind(0)), x.contiguous(), group=self.group)
        return out

    def all_to_all(
        self, x: Tensor, input_splits: list[int], output_splits: list[int], purpose: str
    ) -> Tensor:
        """Sends the j-th piece of x [n, ...] to rank j; receives [sum(output_splits), ...], sorted by source.

        input_splits[j]: rows for rank j; output_splits[i]: rows from rank i; W ints each. No gradient.
        """
        if self.size == 1:
            return x
        row_bytes = x.element_size() * math.prod(x.shape[1:])
        self.meter.record(purpose, [rows * row_bytes for rows in input_splits])
        out = x.new_empty(sum(output_splits), *x.shape[1:])
        with self.entering():
            dist.all_to_all_single(out, x.contiguous(), output_splits, input_splits, group=self.group)
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in place. Not metered: its route is the library's own choice."""
        if self.size > 1:
            with self.entering():
                dist.all_reduce(x, group=self.group)
        return x


# %% notebooks/01_parallelism.ipynb #byte-formulas
def ep_bytes(num_tokens: int, hidden_dim: int, top_k: int, ep_size: int, itemsize: int = 2) -> float:
    """Bytes that one rank sends in a forward pass of an EP layer: dispatch and combine, one copy per choice.

    num_tokens: on this rank. The expectation under even routing: a choice lives elsewhere with (P - 1) / P.
    """
    return 2 * itemsize * num_tokens * hidden_dim * top_k * (ep_size - 1) / ep_size


def tp_bytes(num_tokens: int, hidden_dim: int, tp_size: int, itemsize: int = 2) -> float:
    """Bytes that one rank sends in a forward pass of a TP layer: one all-reduce of [num_tokens, hidden_dim].

    num_tokens: of the whole TP group. A reduce-scatter, then an all-gather, each (T - 1) / T of the tensor.
    """
    return 2 * itemsize * num_tokens * hidden_dim * (tp_size - 1) / tp_size


def expected_distinct_ranks(num_experts: int, top_k: int, ep_size: int) -> float:
    """How many different ranks own a token's top_k experts, on average, if every choice is equally likely."""
    elsewhere = math.comb(num_experts - num_experts // ep_size, top_k)
    return ep_size * (1 - elsewhere / math.comb(num_experts, top_k))


# ============================================================================================================
# all_to_all: notebooks/02_all_to_all.ipynb
# ============================================================================================================


# %% notebooks/02_all_to_all.ipynb #routing
@dataclass
class Routing:
    """Where each token goes. topk_ids int64 [T, K]; topk_weights float [T, K]; probs float [T, E].

    topk_ids holds global expert numbers, all different within a row; -1 marks a choice that is not sent.
    Weights and probabilities are float32 or wider, and carry the router's gradient.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    probs: Tensor


# %% notebooks/02_all_to_all.ipynb #dispatcher-interface
class Dispatcher(ABC):
    """Brings rows to the ranks that own their experts, and the results back. One subclass a chapter."""

    def __init__(self, config: MoEConfig, comm: Communicator) -> None:
        self.config, self.comm = config, comm
        self.num_local_experts = config.num_local_experts(comm.size)

    @staticmethod
    def preference(device: torch.device, dtype: torch.dtype) -> int:
        """How much `auto` likes this implementation there; 0 where it cannot run."""
        return 1

    @abstractmethod
    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Any]:
        """x [T, D] -> rows [R, D] sorted by local expert, num_tokens_per_local_expert int64 [L], a handle.

        The handle is opaque; combine takes it. All ranks enter, with or without tokens.
        """

    @abstractmethod
    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Experts' results [R, D], in dispatch's order -> y [T, D], each token's weighted sum."""

    @staticmethod
    @abstractmethod
    def rows_sent(topk_ids: list[Tensor], num_local_experts: int) -> tuple[int, int]:
        """Prediction: rows that dispatch and combine send to other ranks, summed over ranks.

        topk_ids: every rank's [T, K], by rank. The backward pass of each sends the same number again.
        """


# %% notebooks/02_all_to_all.ipynb #metadata
EXPERT, SOURCE_RANK, SOURCE_TOKEN, SOURCE_K, IS_PADDING = range(5)  # the columns of a row's metadata


def make_metadata(topk_ids: Tensor, rank: int) -> Tensor:
    """topk_ids [T, K] -> int64 [T * K, 5], a line per choice: which expert it seeks and where it comes from."""
    num_tokens, top_k = topk_ids.shape
    choice = torch.arange(num_tokens * top_k, device=topk_ids.device)
    expert = topk_ids.reshape(-1)
    source_rank = torch.full_like(expert, rank)
    is_padding = (expert < 0).long()  # a choice that is not sent travels as padding
    return torch.stack([expert, source_rank, choice // top_k, choice % top_k, is_padding], dim=1)


def pad_rows(rows: Tensor, metadata: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Appends zero rows, marked IS_PADDING, until there are `length`: [n, D], [n, 5] -> [length, D], [length, 5]."""
    missing = length - rows.shape[0]
    padding = metadata.new_zeros(missing, 5)
    padding[:, IS_PADDING] = 1
    return F.pad(rows, (0, 0, 0, missing)), torch.cat([metadata, padding])


# %% notebooks/02_all_to_all.ipynb #all-gather-autograd
class AllGather(torch.autograd.Function):
    """[n, D] on every rank -> [W, n, D]; backward sends each block's gradient home and adds: a reduce-scatter.

    Every rank must enter backward: the input has to require a gradient on all ranks or on none.
    Sends n * D * itemsize bytes to each other rank, in each direction.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return comm.all_gather(x, "rows")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size, length = grad.shape[:2]
        splits = [length] * size
        blocks = ctx.comm.all_to_all(grad.flatten(0, 1), splits, splits, "rows")
        return blocks.view(grad.shape).sum(0), None


def gather_padded(rows: Tensor, metadata: Tensor, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Every rank's rows on every rank: [n, D], [n, 5] -> [W * m, D], [W * m, 5], m the longest rank's n.

    n may differ from rank to rank, and be 0. One host synchronisation, for m.
    """
    lengths = comm.all_gather(torch.tensor([rows.shape[0]], device=rows.device), "metadata")
    rows, metadata = pad_rows(rows, metadata, int(lengths.max()))
    all_metadata = comm.all_gather(metadata, "metadata")
    return AllGather.apply(rows, comm).flatten(0, 1), all_metadata.flatten(0, 1)


# %% notebooks/02_all_to_all.ipynb #dispatch-all-gather
@dataclass
class AllGatherHandle:
    """What combine needs to know: metadata of the kept rows [R, 5], weights [T, K]."""

    metadata: Tensor
    topk_weights: Tensor


def dispatch_all_gather(
    x: Tensor, routing: Routing, num_local_experts: int, comm: Communicator
) -> tuple[Tensor, Tensor, AllGatherHandle]:
    """x [T, D] -> rows [R, D] for this rank's experts, sorted by expert, their counts [L], a handle.

    Gathers everything and keeps what is for this rank: W times the bytes that are needed.
    """
    rows = x.repeat_interleave(routing.topk_ids.shape[1], dim=0)
    rows, metadata = gather_padded(rows, make_metadata(routing.topk_ids, comm.rank), comm)
    local_expert = metadata[:, EXPERT] - comm.rank * num_local_experts
    is_mine = (local_expert >= 0) & (local_expert < num_local_experts) & (metadata[:, IS_PADDING] == 0)
    mine = is_mine.nonzero().squeeze(1)
    mine = mine[local_expert[mine].argsort(stable=True)]
    counts = torch.bincount(local_expert[mine], minlength=num_local_experts)
    return rows[mine], counts, AllGatherHandle(metadata[mine], routing.topk_weights)


# %% notebooks/02_all_to_all.ipynb #combine-all-gather
def combine_all_gather(rows: Tensor, handle: AllGatherHandle, comm: Communicator) -> Tensor:
    """Experts' rows [R, D] -> y [T, D]: the weighted sum of each token's rows, in float32 or wider.

    Weights are applied here, at the token's own rank, so the router's gradient never travels.
    """
    rows, metadata = gather_padded(rows, handle.metadata, comm)
    is_mine = (metadata[:, SOURCE_RANK] == comm.rank) & (metadata[:, IS_PADDING] == 0)
    mine = is_mine.nonzero().squeeze(1)
    token, k = metadata[mine, SOURCE_TOKEN], metadata[mine, SOURCE_K]
    weights = handle.topk_weights[token, k].unsqueeze(1)
    weighted = rows[mine].to(weights.dtype) * weights
    y = weighted.new_zeros(handle.topk_weights.shape[0], rows.shape[1])
    return y.index_add(0, token, weighted).to(rows.dtype)


# %% notebooks/02_all_to_all.ipynb #all-gather-dispatcher
@register("dispatcher", "all_gather")
class AllGatherDispatcher(Dispatcher):
    """The readable dispatcher: every rank gathers every row and keeps its own (chapter 02)."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, AllGatherHandle]:
        """See Dispatcher. Sends (W - 1) * max over ranks of T * K rows; three host synchronisations."""
        return dispatch_all_gather(x, routing, self.num_local_experts, self.comm)

    def combine(self, rows: Tensor, handle: AllGatherHandle) -> Tensor:
        """See Dispatcher. Sends (W - 1) * max over ranks of R rows; two host synchronisations."""
        return combine_all_gather(rows, handle, self.comm)

    @staticmethod
    def rows_sent(topk_ids: list[Tensor], num_local_experts: int) -> tuple[int, int]:
        """See Dispatcher: the longest rank's rows, from each rank to each other rank."""
        size = len(topk_ids)
        ids = torch.cat([ids.reshape(-1).cpu() for ids in topk_ids])
        received = torch.bincount(ids[ids >= 0] // num_local_experts, minlength=size)
        longest = max(ids.numel() for ids in topk_ids)
        return size * (size - 1) * longest, size * (size - 1) * int(received.max())


# ============================================================================================================
# experts: notebooks/03_experts.ipynb
# ============================================================================================================


# %% notebooks/03_experts.ipynb #init
def seeded_uniform_(parameter: Tensor, fan_in: int, *seeds: int) -> None:
    """Fills parameter in place with uniform(-b, b), b = 1 / sqrt(fan_in), as nn.Linear does.

    The numbers depend on the seeds and the shape alone, not on rank, world size, device or dtype.
    """
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(fan_in)
    values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        parameter.copy_((2 * values - 1) * bound)


# %% notebooks/03_experts.ipynb #router
@register("router", "softmax")
class Router(nn.Module):
    """Scores every expert for every token and picks the top_k best: softmax of one linear layer, the gate.

    Replicated: every rank holds the same gate. The weights are not renormalised over the chosen experts.
    """

    def __init__(self, config: MoEConfig, seed: int = 0) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.gate = nn.Linear(config.hidden_dim, config.num_experts, dtype=DTYPES[config.dtype])
        seeded_uniform_(self.gate.weight, config.hidden_dim, seed, "gate.weight")
        seeded_uniform_(self.gate.bias, config.hidden_dim, seed, "gate.bias")

    def forward(self, x: Tensor) -> Routing:
        """x [T, D] -> Routing. The gate computes in float32 or wider, whatever the parameters' dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        probs = F.linear(x.to(wide), self.gate.weight.to(wide), self.gate.bias.to(wide)).softmax(dim=-1)
        topk_weights, topk_ids = probs.topk(self.top_k, dim=-1)
        return Routing(topk_ids, topk_weights, probs)


# %% notebooks/03_experts.ipynb #activation
@register("activation", "gelu")
class GELU:
    """An expert of two matrices with biases: gelu(x w1 + b1) w2 + b2, as the seed has it."""

    has_bias, is_gated = True, False

    @staticmethod
    def apply(up: Tensor, gate: Tensor | None = None) -> Tensor:
        """up [n, F] -> [n, F]."""
        return F.gelu(up)


# %% notebooks/03_experts.ipynb #experts-parameters
class Experts(nn.Module):
    """The L experts that this rank owns, stacked: w1 [L, D, F], b1 [L, F], w2 [L, F, D], b2 [L, D].

    Gated activations add w3 [L, D, F]; those without biases leave b1 and b2 None. An expert's numbers come
    from its global number and the seed, so they do not depend on which rank owns it.
    """

    def __init__(self, config: MoEConfig, comm: Communicator, seed: int = 0) -> None:
        super().__init__()
        num_local, d, f = config.num_local_experts(comm.size), config.hidden_dim, config.ffn_dim
        self.first_expert = comm.rank * num_local
        self.activation = REGISTRIES["activation"][config.activation]
        shapes = {"w1": (d, f), "w2": (f, d)}
        if self.activation.is_gated:
            shapes["w3"] = (d, f)
        if self.activation.has_bias:
            shapes |= {"b1": (f,), "b2": (d,)}
        for name in ("w1", "b1", "w2", "b2", "w3"):
            self.register_parameter(name, None)
            if name in shapes:
                stacked = nn.Parameter(torch.empty(num_local, *shapes[name], dtype=DTYPES[config.dtype]))
                for local, parameter in enumerate(stacked):
                    fan_in = f if name in ("w2", "b2") else d
                    seeded_uniform_(parameter, fan_in, seed, "expert", self.first_expert + local, name)
                self.register_parameter(name, stacked)

    @staticmethod
    def preference(device: torch.device, dtype: torch.dtype) -> int:
        """How much `auto` likes this implementation there; 0 where it cannot run."""
        return 1


# %% notebooks/03_experts.ipynb #experts-loop
@register("experts", "loop")
class LoopExperts(Experts):
    """One expert after the other: two matrix products each, 4 * R * D * F operations a forward pass in all."""

    def forward(self, rows: Tensor, num_tokens_per_local_expert: Tensor) -> Tensor:
        """rows [R, D] sorted by expert, counts int64 [L] -> [R, D]. One host synchronisation, for the counts.

        An expert without rows runs on an empty block, so that its gradient is zero and not missing.
        """
        blocks = rows.split(num_tokens_per_local_expert.tolist())
        num_local = len(blocks)
        w1, b1, w2, b2, w3 = (
            (None,) * num_local if p is None else p.unbind(0)
            for p in (self.w1, self.b1, self.w2, self.b2, self.w3)
        )
        results = []
        for e, block in enumerate(blocks):
            gate = None if w3[e] is None else block @ w3[e]
            hidden = self.activation.apply(affine(block, w1[e], b1[e]), gate)
            results.append(affine(hidden, w2[e], b2[e]))
        return torch.cat(results)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, i] @ weight [i, o] + bias [o] -> [n, o]; without a bias where it is None."""
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


# %% notebooks/03_experts.ipynb #balance
def count_choices(topk_ids: Tensor, num_experts: int) -> Tensor:
    """topk_ids int64 [T, K] -> float32 [E]: how often each expert was chosen; -1 counts nowhere. No host sync."""
    ids = topk_ids.reshape(-1)
    counts = torch.zeros(num_experts, device=ids.device)
    return counts.scatter_add_(0, ids.clamp(min=0), (ids >= 0).to(counts.dtype))


@register("balance", "none")
class NoBalance(nn.Module):
    """Lets the load fall as it will: the loss is 0."""

    def __init__(self, config: MoEConfig, comm: Communicator) -> None:
        super().__init__()

    def forward(self, routing: Routing) -> Tensor:
        """Routing -> a zero."""
        return routing.probs.new_zeros(())


@register("balance", "aux")
class SwitchAuxLoss(nn.Module):
    """E * sum over e of f_e * P_e over the global batch (Switch Transformer, section 2.2, equation 4).

    f_e: share of all ranks' choices that went to expert e, no gradient; P_e: mean probability of e over all
    ranks' tokens. The result is 1 under even load. One all-reduce of E + 1 numbers, none in backward.
    """

    def __init__(self, config: MoEConfig, comm: Communicator) -> None:
        super().__init__()
        self.comm = comm

    def forward(self, routing: Routing) -> Tensor:
        """Routing -> this rank's share of the loss: the shares of all ranks add up to it, and so do the
        gradients. 0 for one expert, which has nothing to balance, and where no rank has a token.
        """
        probs, (num_tokens, top_k) = routing.probs, routing.topk_ids.shape
        num_experts = probs.shape[1]
        if num_experts == 1:
            return probs.new_zeros(())
        counts = count_choices(routing.topk_ids, num_experts)
        totals = self.comm.all_reduce(torch.cat([counts, counts.new_full((1,), num_tokens)])).to(probs.dtype)
        global_tokens = totals[-1].clamp(min=1)
        load = totals[:-1] / (global_tokens * top_k)
        return num_experts * (load * probs.sum(0)).sum() / global_tokens


# %% notebooks/03_experts.ipynb #ep-moe
class EPMoE(nn.Module):
    """A mixture-of-experts layer over the ranks of one expert-parallel group.

    Gradients follow one rule: every rank's loss is its share of the global loss. Then an expert's gradient,
    fed by all ranks' rows, is complete as it is, and a replicated parameter's is the sum over ranks
    (`all_reduce_gradients`). Nothing is divided by W anywhere.
    """

    def __init__(
        self,
        config: MoEConfig,
        comm: Communicator | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config, self.comm = config, comm or Communicator()
        self.router = REGISTRIES["router"][config.router](config, seed)
        self.balance = REGISTRIES["balance"][config.balance](config, self.comm)
        self.dispatcher = pick("dispatcher", config, device)(config, self.comm)
        self.experts = pick("experts", config, device)(config, self.comm, seed)
        self.topk_ids: Tensor | None = None  # of the last forward pass, for whoever watches the load
        self.to(device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> (y [T, D], this rank's share of the aux loss; 0 in eval mode).

        T may differ from rank to rank, and be 0. ValueError if T is above max_num_tokens or D is wrong.
        """
        check_tokens(x, self.config)
        routing = self.router(x)
        self.topk_ids = routing.topk_ids
        aux = self.balance(routing) if self.training else routing.probs.new_zeros(())
        rows, num_tokens_per_local_expert, handle = self.dispatcher.dispatch(x, routing)
        rows = self.experts(rows, num_tokens_per_local_expert)
        return self.dispatcher.combine(rows, handle), aux

    def replicated_parameters(self) -> list[nn.Parameter]:
        """The parameters that every rank holds a copy of: all but the experts'."""
        local = set(self.experts.parameters())
        return [p for p in self.parameters() if p not in local]


def check_tokens(x: Tensor, config: MoEConfig) -> None:
    """ValueError where x [T, D] is not what the layer was made for."""
    if x.dim() != 2 or x.shape[1] != config.hidden_dim:
        raise ValueError(f"tokens have shape {list(x.shape)}; the layer wants [T, {config.hidden_dim}]")
    if x.shape[0] > config.max_num_tokens:
        raise ValueError(f"{x.shape[0]} tokens on one rank, above max_num_tokens {config.max_num_tokens}")


# %% notebooks/03_experts.ipynb #pick
def pick(kind: str, config: MoEConfig, device: torch.device | str) -> Any:
    """The implementation that the config names, or for `auto` the one that likes device and dtype best.

    One that cannot run there is replaced by the best that can, with a line on stderr that says so.
    ValueError for a name that nobody registered.
    """
    device = torch.device(device)
    name, dtype = getattr(config, kind), DTYPES[config.dtype]
    registered = REGISTRIES[kind]
    if name != "auto" and name not in registered:
        raise ValueError(f"{kind} is {name!r}; take one of auto, {', '.join(sorted(registered))}")
    best = max(registered, key=lambda other: registered[other].preference(device, dtype))
    if name != "auto" and registered[name].preference(device, dtype) > 0:
        return registered[name]
    if name != "auto" and os.environ.get("RANK", "0") == "0":
        print(f"{kind} {name} cannot run in {config.dtype} on {device.type}: taking {best}", file=sys.stderr)
    return registered[best]


# %% notebooks/03_experts.ipynb #all-reduce-gradients
def all_reduce_gradients(parameters: list[nn.Parameter], comm: Communicator, *extra: Tensor) -> None:
    """Sums the gradients of replicated parameters over the ranks, in place, in one message.

    extra: further tensors (losses, say) that ride along and are summed in place as well.
    A parameter without a gradient counts as zeros on the wire. Accumulates in float32 or wider.
    """
    if comm.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    tensors = [parameter.grad for parameter in parameters] + list(extra)
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    bucket = comm.all_reduce(torch.cat([t.reshape(-1).to(wide) for t in tensors]))
    for tensor, summed in zip(tensors, bucket.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


# %% notebooks/03_experts.ipynb #dense-reference
def dense_moe(
    x: Tensor, parameters: dict[str, Tensor], top_k: int, topk_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The reference: every expert computes every token, and the weights pick. No communication, no sorting.

    x [T, D], the tokens of all ranks; parameters: the state dict of a layer at world size 1, in x's dtype.
    topk_ids [T, K]: use these choices instead of the router's own (for comparisons in low precision).
    Returns y [T, D] and Switch's aux loss. 4 * T * E * D * F operations.
    """
    gate = F.linear(x, parameters["router.gate.weight"], parameters["router.gate.bias"])
    probs = gate.softmax(dim=-1)
    topk_ids = probs.topk(top_k).indices if topk_ids is None else topk_ids
    chosen = F.one_hot(topk_ids, probs.shape[1]).sum(1).to(probs.dtype)
    w1, w2 = parameters["experts.w1"], parameters["experts.w2"]
    hidden = F.gelu(torch.einsum("td,edf->etf", x, w1) + parameters["experts.b1"][:, None])
    every = torch.einsum("etf,efd->etd", hidden, w2) + parameters["experts.b2"][:, None]
    y = torch.einsum("te,etd->td", probs * chosen, every)
    num_tokens, num_experts = probs.shape
    load = chosen.sum(0) / max(1, num_tokens * top_k)
    aux = num_experts * (load * probs.sum(0)).sum() / max(1, num_tokens)
    return y, aux if num_experts > 1 else aux * 0


# ============================================================================================================
# training: notebooks/04_training.ipynb
# ============================================================================================================


# %% notebooks/04_training.ipynb #training-options
@option_group
@dataclass(frozen=True)
class TrainingOptions:
    """A training run. ValueError where a number makes no sense.

    steps: optimiser steps
    lr: AdamW's learning rate
    aux_alpha: weight of the aux loss in the total loss
    log_interval: steps between two log lines
    seed: of parameters, teacher and tokens
    tokens: tokens a step over all ranks, shared out as evenly as possible (default: 32 a rank)
    device: auto (cuda if there are at least as many GPUs as local ranks, else cpu), cpu or cuda
    log_dir: for TensorBoard and the text log (default: a new folder in ep_launcher/runs; TB_LOGDIR overrides)
    summary: write the run's summary to this JSON file
    timeout_s: seconds that a rank waits for another before the run ends with an error
    """

    steps: int = 2000
    lr: float = 5e-4
    aux_alpha: float = 1e-2
    log_interval: int = 100
    seed: int = 0
    tokens: int | None = None
    device: str = "auto"
    log_dir: str | None = None
    summary: str | None = None
    timeout_s: float = 60

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "log_interval": 1, "tokens": 0, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, and must be at least {least}")
        if not (0 < self.lr < math.inf and 0 <= self.aux_alpha < math.inf and 0 < self.timeout_s < math.inf):
            raise ValueError("lr and timeout_s must be positive and finite, aux_alpha not negative")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; take auto, cpu or cuda")


# %% notebooks/04_training.ipynb #teacher-task
def make_teacher(config: MoEConfig, seed: int) -> Tensor:
    """The fixed linear layer that the model learns to imitate: [D, D], the same on every rank."""
    weight = torch.empty(config.hidden_dim, config.hidden_dim, dtype=DTYPES[config.dtype])
    seeded_uniform_(weight, config.hidden_dim, seed, "teacher")
    return weight


def shard_sizes(num_tokens: int, world_size: int) -> list[int]:
    """How many tokens each rank takes, as torch.tensor_split shares them: the first ranks take one more."""
    return [num_tokens // world_size + (rank < num_tokens % world_size) for rank in range(world_size)]


class TokenStream:
    """Endless batches x ~ N(0, 1) with their targets x teacher^T: the global batch, drawn alike on every rank."""

    def __init__(
        self,
        config: MoEConfig,
        seed: int,
        num_tokens: int,
        comm: Communicator,
        device: torch.device | str = "cpu",
    ) -> None:
        self.teacher = make_teacher(config, seed).to(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.num_tokens, self.comm = num_tokens, comm

    def next(self) -> tuple[Tensor, Tensor]:
        """This rank's share of the next global batch: x [T, D], target [T, D]."""
        shape = (self.num_tokens, self.teacher.shape[0])
        x = torch.randn(shape, generator=self.generator, device=self.generator.device)
        x = x.tensor_split(self.comm.size)[self.comm.rank].to(self.teacher.dtype)
        return x, F.linear(x, self.teacher)


# %% notebooks/04_training.ipynb #train-step
def train_step(
    model: EPMoE, x: Tensor, target: Tensor, num_global_tokens: int, options: TrainingOptions
) -> Tensor:
    """Forward, loss, backward, gradients summed over ranks; the update is the caller's.

    x, target: this rank's [T, D]. The task loss is the mean squared error over the global batch.
    Returns float32 or wider [2]: task and aux loss of the global batch, before the update, on every rank.
    """
    y, aux = model(x)
    wide = torch.promote_types(y.dtype, torch.float32)
    squared_error = (y.to(wide) - target.to(wide)).square().sum()
    task = squared_error / max(1, num_global_tokens * x.shape[1])
    (task + options.aux_alpha * aux).backward()
    losses = torch.stack([task, aux.to(wide)]).detach()
    all_reduce_gradients(model.replicated_parameters(), model.comm, losses)
    return losses


# %% notebooks/04_training.ipynb #init-distributed
def world_from_env() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun sets them; (0, 1, 0, 1) without it."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in names.items())


def choose_device(wanted: str) -> torch.device:
    """auto, cpu or cuda -> this rank's device. ValueError where cuda is asked for and there are too few GPUs."""
    _, _, local_rank, local_world_size = world_from_env()
    num_gpus = torch.cuda.device_count()
    if wanted == "cuda" and num_gpus < local_world_size:
        raise ValueError(
            f"{local_world_size} ranks on this host want a GPU each, and it has {num_gpus}; "
            "start fewer, or take --device cpu"
        )
    if wanted == "cpu" or num_gpus < local_world_size:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def init_distributed(device: torch.device, timeout_s: float) -> dist.Store | None:
    """Joins the process group that torchrun announced: NCCL for GPUs, gloo for CPUs.

    Returns the rendezvous store, through which ranks tell one another where they are; None at world size 1,
    where no group is needed.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_from_env()[1] == 1:
        return None
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return dist.PrefixStore("ep_launcher", store)


# %% notebooks/04_training.ipynb #heartbeat
class Heartbeat:
    """Tells the other ranks, twice a second, how far this one has come; finds the straggler when a run hangs.

    A background thread writes `steps collectives` to the store, also while the main thread waits.
    """

    def __init__(self, store: dist.Store | None, comm: Communicator) -> None:
        self.store, self.comm, self.step = store, comm, 0
        self.stopped = threading.Event()
        if store is not None:
            self.beat()
            threading.Thread(target=self.run, daemon=True).start()

    def beat(self) -> None:
        """Writes this rank's position."""
        self.store.set(f"position/{self.comm.rank}", f"{self.step} {self.comm.num_collectives}")

    def run(self) -> None:
        """The thread: beats until stopped, or until the store is gone."""
        with contextlib.suppress(RuntimeError):
            while not self.stopped.wait(0.5):
                self.beat()

    def stragglers(self) -> str:
        """One line on the ranks that entered fewer collectives than the others. Waits 1.2 s for their beats."""
        time.sleep(1.2)
        keys = [f"position/{rank}" for rank in range(self.comm.size)]
        positions = [tuple(map(int, self.store.get(key).split())) for key in keys if self.store.check([key])]
        if len(positions) < self.comm.size:
            return "not every rank has started"
        furthest = max(positions, key=lambda position: position[1])
        behind = [rank for rank, position in enumerate(positions) if position[1] < furthest[1]]
        return (
            "; ".join(
                f"rank {rank} stayed behind at step {positions[rank][0]}, after {positions[rank][1]} collectives "
                f"(the others: step {furthest[0]}, {furthest[1]})"
                for rank in behind
            )
            or f"all ranks are at step {furthest[0]}, after {furthest[1]} collectives"
        )

    def first_to_report(self) -> bool:
        """True on the first rank that asks: the one that prints what went wrong."""
        return self.store is None or self.store.add("reported", 1) == 1


# %% notebooks/04_training.ipynb #step-timer
class StepTimer:
    """Milliseconds between marks, without stopping the device: CUDA events on a GPU, the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Ends one interval and begins the next."""
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def median_ms(self, skip_fraction: float = 0.1) -> float:
        """The median interval, the first tenth left out; 0 where there is none. Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        pairs = list(zip(self.marks, self.marks[1:]))
        pairs = pairs[int(len(pairs) * skip_fraction) :]
        if not pairs:
            return 0.0
        return statistics.median(a.elapsed_time(b) if self.on_gpu else (b - a) * 1e3 for a, b in pairs)


# %% notebooks/04_training.ipynb #run-log
LAUNCHER_DIR = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()


def default_log_dir() -> Path:
    """TB_LOGDIR, or a new folder in ep_launcher/runs, named by the time."""
    return Path(os.environ.get("TB_LOGDIR") or LAUNCHER_DIR / "runs" / time.strftime("%Y%m%d-%H%M%S"))


class RunLog:
    """What rank 0 writes: the log lines (screen and train.log), TensorBoard, the progress bar. Others: nothing.

    ValueError where log_dir cannot be written.
    """

    def __init__(self, log_dir: Path, num_steps: int, rank: int) -> None:
        self.writer = self.bar = None
        if rank != 0:
            return
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            self.text = (log_dir / "train.log").open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ValueError(f"cannot write logs to {log_dir} ({error.strerror}); set --log-dir") from None
        from torch.utils.tensorboard import SummaryWriter  # a second's import that only rank 0 needs

        self.writer = SummaryWriter(str(log_dir), purge_step=0)
        self.bar = tqdm(total=num_steps, unit="step", disable=None, dynamic_ncols=True)

    def write(self, line: str) -> None:
        """A line on the screen and in train.log."""
        if self.writer:
            tqdm.write(line)
            sys.stdout.flush()
            self.text.write(line + "\n")

    def scalars(self, step: int, **values: float) -> None:
        """`loss__task=0.1` becomes TensorBoard's `loss/task`."""
        for name, value in values.items():
            if self.writer:
                self.writer.add_scalar(name.replace("__", "/"), value, step)

    def close(self) -> None:
        """Everything to disk."""
        if self.writer:
            self.bar.close()
            self.writer.close()
            self.text.close()


# %% notebooks/04_training.ipynb #load-history
class LoadHistory:
    """Choices per expert, one row a log interval, over all ranks: what TensorBoard shows and the summary sums."""

    def __init__(self, num_experts: int, device: torch.device | str = "cpu") -> None:
        self.interval = torch.zeros(num_experts + 1, device=device)  # the last one counts choices not sent
        self.rows: list[Tensor] = []

    def add(self, topk_ids: Tensor) -> None:
        """Counts one step's choices [T, K] of this rank. No synchronisation."""
        counts = count_choices(topk_ids, len(self.interval) - 1)
        self.interval += torch.cat([counts, topk_ids.numel() - counts.sum(0, keepdim=True)])

    def end_interval(self, comm: Communicator) -> None:
        """Sums the interval over the ranks and begins the next. One all-reduce of E numbers."""
        self.rows.append(comm.all_reduce(self.interval.clone()).cpu())
        self.interval.zero_()

    def newest(self, least_choices: int = 6400) -> tuple[float, float]:
        """(largest load over mean load, fraction of choices not sent) in the newest intervals that hold
        least_choices together, or in all intervals where there are fewer. 0 where there is nothing."""
        total = torch.zeros_like(self.rows[-1])
        for row in reversed(self.rows):
            total += row
            if total.sum() >= least_choices:
                break
        load, lost = total[:-1], total[-1]
        max_over_mean = load.max() / load.mean() if load.sum() > 0 else lost * 0
        return float(max_over_mean), float(lost / total.sum().clamp(min=1))

    def image(self) -> Tensor:
        """float32 [1, E, intervals] in 0 to 1: each interval's load as a column, its largest expert white."""
        history = torch.stack(self.rows, dim=1)[:-1]
        return (history / history.amax(dim=0).clamp(min=1))[None]

    def show(self, log: RunLog, step: int) -> None:
        """The last interval as histogram, all of them as an image."""
        if log.writer:
            load = self.rows[-1][:-1]
            log.writer.add_histogram("load/per_expert", load / load.mean().clamp(min=1), step)
            log.writer.add_image("load/over_time", self.image(), step)


# %% notebooks/04_training.ipynb #step-bytes
def predicted_bytes(model: EPMoE) -> int:
    """Bytes of rows that one training step sends over all ranks, from the last step's topk_ids alone.

    Dispatch forward, combine forward and backward; tokens need no gradient here, so dispatch has no backward.
    A collective call: every rank enters. It moves 8 * T * K bytes a rank, under the meter's name `metadata`.
    """
    config, comm, ids = model.config, model.comm, model.topk_ids
    lengths = comm.all_gather(torch.tensor([len(ids)], device=ids.device), "metadata").flatten().tolist()
    padded = F.pad(ids, (0, 0, 0, max(lengths) - len(ids)))
    gathered = comm.all_gather(padded, "metadata")
    every = [block[:length] for block, length in zip(gathered, lengths, strict=True)]
    dispatched, combined = model.dispatcher.rows_sent(every, config.num_local_experts(comm.size))
    return (dispatched + 2 * combined) * config.hidden_dim * DTYPES[config.dtype].itemsize


def sum_over_ranks(value: int, comm: Communicator, device: torch.device | str = "cpu") -> int:
    """The sum of an int over the ranks. Collective."""
    return int(comm.all_reduce(torch.tensor([value], dtype=torch.int64, device=device)))


# %% notebooks/04_training.ipynb #non-finite
class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; every rank raises it at the same step."""


def check_finite(losses: Tensor, step: int, comm: Communicator) -> None:
    """NonFiniteLoss where the global losses [2] are not finite. They are sums over ranks, so all ranks agree."""
    if not losses.isfinite().all():
        task, aux = losses.tolist()
        raise NonFiniteLoss(
            f"step {step}: task loss {task}, aux loss {aux}; lower --lr or look at the inputs"
        )


# %% notebooks/04_training.ipynb #train
@dataclass
class Run:
    """Everything that one rank needs to train; made by `main`, or by hand in a notebook."""

    config: MoEConfig
    options: TrainingOptions
    comm: Communicator
    device: torch.device
    heartbeat: Heartbeat
    log: RunLog

    @property
    def num_global_tokens(self) -> int:
        """Tokens a step over all ranks."""
        return 32 * self.comm.size if self.options.tokens is None else self.options.tokens


def train(run: Run) -> dict[str, Any]:
    """Trains the layer on the teacher task -> the measured part of the summary. Collective.

    Every step: draw, forward, backward, one all-reduce, update. NonFiniteLoss where the loss breaks.
    """
    options, comm, device = run.options, run.comm, run.device
    model = EPMoE(run.config, comm, options.seed, device)
    stream = TokenStream(run.config, options.seed, run.num_global_tokens, comm, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    record = Record(run, model)
    for step in range(options.steps):
        run.heartbeat.step = step
        record.begin_step(step)
        x, target = stream.next()
        optimizer.zero_grad()
        losses = train_step(model, x, target, run.num_global_tokens, options)
        record.end_step(step, losses)
        optimizer.step()
    return record.summary()


# %% notebooks/04_training.ipynb #record
class Record:
    """Watches a run: losses, time, load, bytes. Reads the device only at log intervals, on a GPU."""

    def __init__(self, run: Run, model: EPMoE) -> None:
        self.run, self.model, self.comm = run, model, run.comm
        self.timer = StepTimer(run.device)
        self.history = LoadHistory(run.config.num_experts, run.device)
        self.tail: list[Tensor] = []  # losses of the last 5% of steps
        self.logged: list[tuple[float, float]] = []
        self.interval_start = time.perf_counter()
        self.bytes_before = 0

    def begin_step(self, step: int) -> None:
        """Reads the meter; a step's bytes are the difference."""
        self.timer.mark()
        self.bytes_before = self.comm.meter.total("rows")

    def end_step(self, step: int, losses: Tensor) -> None:
        """Takes the global losses [2] of this step, logs them where it is time, stops at NaN."""
        options = self.run.options
        is_logged = step % options.log_interval == 0
        if is_logged or self.run.device.type == "cpu":
            check_finite(losses, step, self.comm)
        if step >= options.steps - max(1, options.steps // 20):
            self.tail.append(losses)
        self.history.add(self.model.topk_ids)
        if is_logged:
            self.log_interval(step, losses)
        if self.run.log.bar:
            self.run.log.bar.update()

    def log_interval(self, step: int, losses: Tensor) -> None:
        """The log line, TensorBoard's scalars, the load of the interval."""
        task, aux = losses.tolist()
        self.logged.append((task, aux))
        total = task + self.run.options.aux_alpha * aux
        now = time.perf_counter()
        seconds, self.interval_start = now - self.interval_start, now
        log = self.run.log
        log.write(
            f"[step {step:05d}] task={task:.6f} aux={aux:.6f} total={total:.6f} interval_s={seconds:.2f}"
        )
        log.scalars(step, loss__task=task, loss__aux=aux, loss__total=total, time__interval_s=seconds)
        self.history.end_interval(self.comm)
        self.history.show(log, step)

    def summary(self) -> dict[str, Any]:
        """The measured part of the summary. Collective."""
        self.timer.mark()
        sent = self.comm.meter.total("rows") - self.bytes_before
        metadata = self.comm.meter.total("metadata") // self.run.options.steps
        self.history.end_interval(self.comm)
        tail = torch.stack(self.tail)
        check_finite(tail.sum(0), self.run.options.steps - 1, self.comm)
        max_load_over_mean, dropped_fraction = self.history.newest()
        return {
            "task_loss": [task for task, _ in self.logged],
            "final_task_loss": float(tail[:, 0].mean()),
            "aux_loss": float(tail[:, 1].mean()),
            "ms_per_step": self.timer.median_ms(),
            "bytes_sent_per_step": {
                "predicted": predicted_bytes(self.model),
                "counted": sum_over_ranks(sent, self.comm, self.run.device),
            },
            "metadata_bytes_per_step": sum_over_ranks(metadata, self.comm, self.run.device),
            "dropped_fraction": dropped_fraction,
            "max_load_over_mean": max_load_over_mean,
        }


# %% notebooks/04_training.ipynb #flags
def field_help(group: type) -> dict[str, str]:
    """{field: help text}, from the `field: text` lines of an option group's docstring."""
    lines = (line.strip().partition(": ") for line in (group.__doc__ or "").splitlines())
    return {name: text for name, _, text in lines if text}


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are ValueErrors."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; --help lists the flags")


def make_parser() -> FlagParser:
    """One flag per field of every registered option group; names, defaults and help come from there."""
    parser = FlagParser(
        prog="launcher.py", description="Trains an expert-parallel MoE layer.", allow_abbrev=False
    )
    for group in OPTION_GROUPS:
        flags = parser.add_argument_group(group.__name__)
        texts = field_help(group)
        for f in fields(group):
            if not f.metadata.get("flag", True):
                continue
            default = "" if f.default is None else f" (default: {f.default})"
            choices = sorted(REGISTRIES[f.name]) if f.name in REGISTRIES else None
            if choices and f.default == "auto":
                choices = ["auto", *choices]
            kind = next((t for t in (int, float) if f.type in (t, t | None)), str)
            settings = (
                {"action": argparse.BooleanOptionalAction}
                if f.type is bool
                else {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
            )
            text = (texts.get(f.name, "") + default).replace("%", "%%")
            flags.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **settings)
    return parser


def parse_flags(argv: list[str] | None = None) -> tuple[MoEConfig, TrainingOptions]:
    """Command line -> config, with later chapters' groups as extras, and training options. ValueError if bad."""
    values = vars(make_parser().parse_args(argv))
    groups = {}
    for group in OPTION_GROUPS:
        names = [f.name for f in fields(group) if f.metadata.get("flag", True)]
        groups[group] = group(**{name: values[name] for name in names})
    config, options = groups.pop(MoEConfig), groups.pop(TrainingOptions)
    return replace(config, extras=tuple(groups.values())), options


# %% notebooks/04_training.ipynb #check-run
def check_run(config: MoEConfig, options: TrainingOptions) -> torch.device:
    """This rank's device. ValueError, before anything starts, where config, world and machine do not fit."""
    _, world_size, _, _ = world_from_env()
    config.num_local_experts(world_size)
    num_tokens = 32 * world_size if options.tokens is None else options.tokens
    share = shard_sizes(num_tokens, world_size)[0]
    if share > config.max_num_tokens:
        raise ValueError(
            f"{num_tokens} tokens over {world_size} ranks are up to {share} a rank, above max_num_tokens "
            f"{config.max_num_tokens}; lower --tokens or raise --max-num-tokens"
        )
    if options.summary and not os.access(Path(options.summary).resolve().parent, os.W_OK):
        raise ValueError(f"cannot write the summary to {options.summary}; make its folder first")
    return choose_device(options.device)


def refuse(message: str) -> int:
    """Prints one line, once a host, and returns the exit code 2. The other ranks wait for torchrun to end them."""
    if world_from_env()[2] == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(20)
    return 2


# %% notebooks/04_training.ipynb #write-summary
def device_model(device: torch.device) -> str:
    """The hardware's model name, never a host name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def relative_to_root(path: str | Path) -> str:
    """A path as seen from the repository's root."""
    return os.path.relpath(path, LAUNCHER_DIR.parent)


def write_summary(run: Run, measured: dict[str, Any], log_dir: Path) -> None:
    """The summary as JSON, where --summary asks for it; rank 0 only. Written aside, then renamed."""
    options = run.options
    if not options.summary or run.comm.rank != 0:
        return
    flags = asdict(run.config) | asdict(options)
    for extra in flags.pop("extras"):
        flags |= extra
    flags |= {"log_dir": relative_to_root(log_dir), "summary": relative_to_root(options.summary)}
    summary = (
        {"world_size": run.comm.size, "steps": options.steps}
        | measured
        | {
            "config": flags,
            "device": device_model(run.device),
            "torch": torch.__version__,
            "launcher_sha256": hashlib.sha256((LAUNCHER_DIR / "launcher.py").read_bytes()).hexdigest(),
        }
    )
    aside = Path(options.summary + ".part")
    aside.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    aside.replace(options.summary)


# %% notebooks/04_training.ipynb #main
def die_with_parent() -> None:
    """On Linux: this process gets SIGTERM when torchrun dies, so that no rank trains on alone."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def interrupt(signum: int, frame: Any) -> None:
    """Signal handler: SIGTERM, torchrun's way to stop a rank, ends the run as Ctrl-C does."""
    raise KeyboardInterrupt


def run_training(config: MoEConfig, options: TrainingOptions, device: torch.device) -> int:
    """One rank's whole run -> exit code: 0, 1 where a rank or the loss failed, 130 where it was stopped."""
    rank, log_dir = world_from_env()[0], Path(options.log_dir or default_log_dir())
    try:
        log = RunLog(log_dir, options.steps, rank)
    except ValueError as error:
        return refuse(str(error))
    store = init_distributed(device, options.timeout_s)
    comm = Communicator()
    run = Run(config, options, comm, device, Heartbeat(store, comm), log)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        measured = train(run)
        write_summary(run, measured, log_dir)
        log.write(
            f"task loss {measured['final_task_loss']:.6f} after {options.steps} steps on {comm.size} "
            f"{device.type} rank(s), {measured['ms_per_step']:.2f} ms a step"
        )
        log.write(f"logs in {relative_to_root(log_dir)}; to look at them: make tensorboard")
        return 0
    except (CollectiveError, NonFiniteLoss) as error:
        return report_failure(run, error)
    except KeyboardInterrupt:
        log.write(f"stopped at step {run.heartbeat.step}; logs in {relative_to_root(log_dir)}")
        return 130
    except Exception:
        run.heartbeat.first_to_report()  # the traceback below says it; the ranks that lose this one are silent
        raise
    finally:
        log.close()


def report_failure(run: Run, error: Exception) -> int:
    """Prints one line on one rank, says who stayed behind where a collective failed, and returns 1."""
    if run.heartbeat.first_to_report():
        where = f" ({run.heartbeat.stragglers()})" if isinstance(error, CollectiveError) else ""
        print(f"error: {error}{where}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)  # torchrun ends every rank when the first one leaves: let the reporting rank finish
    return 1


def main(argv: list[str] | None = None) -> int:
    """The program that torchrun starts on every rank -> exit code. A bad setting is one line on the screen."""
    die_with_parent()
    try:
        config, options = parse_flags(argv)
        device = check_run(config, options)
    except ValueError as error:
        return refuse(str(error))
    code = run_training(config, options, device)
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a failed group's threads may hold up a normal exit
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


# %% added by tools/extract.py
def read_cell_markers(path: str) -> list[tuple[int, str]]:
    """Where the cells of a stitched file start: [(line, "notebooks/x.ipynb #id")], in the file's order.

    An entry with an empty name ends the last cell. Raises OSError where the file cannot be read.
    """
    import re

    marker = re.compile(r"# %% (?:(.+ #[A-Za-z0-9_-]+)|added by tools/extract\.py)\n?")
    with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
        found = [
            (number, marker.fullmatch(line)) for number, line in enumerate(lines, 1) if line[:5] == "# %% "
        ]
    return [(number, match[1] or "") for number, match in found if match]


def locate_cell(markers: list[tuple[int, str]], line: int) -> str:
    """The cell and its own line for a line of the stitched file: "notebooks/x.ipynb #id:12", or "" outside cells."""
    before = [marker for marker in markers if marker[0] < line]
    start, cell = before[-1] if before else (0, "")
    return f"{cell}:{line - start}" if cell else ""


def describe_frames(exception: BaseException, path: str, markers: list[tuple[int, str]]) -> tuple[str, str]:
    """Python's traceback with the cell beside each frame of the file `path`, and a one-line summary.

    The summary names the innermost cell: of the exception, else of what it was raised from.
    """
    import os
    import re
    import traceback

    own = {path, os.path.abspath(path)}

    def add_cell(match: re.Match[str]) -> str:
        cell = locate_cell(markers, int(match[2])) if match[1] in own else ""
        return f"{match[0]} ({cell})" if cell else match[0]

    frame_line = re.compile(r'^[ |+]*File "(.+)", line (\d+), in .+$', re.MULTILINE)
    report = frame_line.sub(
        add_cell, "".join(traceback.TracebackException.from_exception(exception).format())
    )
    where, link, seen = "", exception, set()
    while link is not None and id(link) not in seen and not where:
        seen.add(id(link))
        for frame, line in traceback.walk_tb(link.__traceback__):
            cell = locate_cell(markers, line) if frame.f_code.co_filename in own else ""
            where = f" ({cell}, in {frame.f_code.co_qualname})" if cell else where
        link = link.__cause__ or link.__context__
    try:
        message = " ".join(str(exception).split())
    except Exception:
        message = "(its message cannot be printed)"
    return report, f"{type(exception).__name__}{': ' if message else ''}{message}{where}"


def install_traceback_hook() -> None:
    """Let an uncaught exception name the notebook, cell and line it came from; the last line names the rank too."""
    import os
    import sys

    path = install_traceback_hook.__code__.co_filename
    own_path = os.path.abspath(path)
    # Read now: by the time something fails, the notebooks may have been stitched anew.
    markers = read_cell_markers(own_path)

    def hook(kind: type[BaseException], exception: BaseException, trace: object) -> None:
        report, summary = describe_frames(exception, path, markers)
        # One write a rank, so that the ranks' reports do not mix line by line.
        sys.stderr.write(f"{report}error: rank {os.environ.get('RANK', '0')}: {summary}\n")
        sys.stderr.flush()

    sys.excepthook = hook


if __name__ == "__main__":
    import sys

    install_traceback_hook()
    sys.exit(main())
