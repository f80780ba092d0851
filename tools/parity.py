"""The parity suite: models with EP layers against the dense float64 reference, on real ranks.

    torchrun --standalone --nproc_per_node=2 tools/parity.py --output build/parity.json
    python tools/parity.py --device cuda --dtypes float32 bfloat16        (one GPU, world size 1)
    torchrun --nproc_per_node=4 tools/parity.py --dispatcher mine --plugin mine.py
    torchrun --nproc_per_node=4 tools/parity.py --dispatcher two_stage --ranks-per-host 2

Every registered dispatcher with every registered experts kind runs every case. Rank 0 writes a list of results:
{case, dtype, dispatcher, experts, world_size, errors: {quantity: relative error}, limit, bytes: [predicted,
counted], ...}. Exit code 1 where an error is over its limit, a byte was not predicted, or a case crashes, whose
variant and cell are named then.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ep_launcher import launcher  # noqa: E402
from ep_launcher.launcher import (  # noqa: E402
    DTYPES,
    PASSES,
    REGISTRIES,
    Communicator,
    EPMoE,
    Mesh,
    MoEConfig,
    TrafficOptions,
    aux_loss,
    bytes_of_layer,
    choose_device,
    dense_moe,
    init_ep,
    load_plugin,
    schedule_in_batches,
    sync_gradients,
    world_from_env,
)

LIMITS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}  # where an experts kind states none of its own
ALPHA = 0.01
BASE = {"num_experts": 8, "top_k": 2, "hidden_dim": 32, "ffn_dim": 64}
# What a case may say besides: how many layers, how many micro-batches, and whether each layer is recomputed.
PLAIN = {
    "bias": None,
    "experts_without_rows": False,
    "layers": 1,
    "micro_batches": 1,
    "checkpoint": False,
    "ep": 1,
}


def cases(world_size: int) -> dict[str, dict]:
    """{name: tokens per rank, config changes, gate bias per expert, ...}; rank r takes tokens[r % len(tokens)].

    ep: the ranks that share the experts are so many times fewer than all.
    """
    last_rank = [-2.0 if e >= 8 - 8 // world_size else 0.0 for e in range(8)]
    found = {
        "even": {"tokens": [12]},
        "uneven": {"tokens": [13, 5, 9, 1]},
        "rank_without_tokens": {"tokens": [11, 0, 7, 0] if world_size > 1 else [0]},
        "no_tokens_at_all": {"tokens": [0]},
        "rank_without_rows": {"tokens": [12], "bias": last_rank, "experts_without_rows": world_size > 1},
        "all_to_one_expert": {"tokens": [9, 12], "top_k": 1, "bias": [2.0] + [0.0] * 7},
        "top_1": {"tokens": [12, 10], "top_k": 1},
        "top_k_is_num_experts": {"tokens": [6, 8], "top_k": 8},
        "one_expert_a_rank": {"tokens": [10, 12], "num_experts": world_size, "top_k": min(2, world_size)},
        "shared_experts": {"tokens": [7, 9], "num_shared_experts": 2},
        "two_layers": {"tokens": [8, 0, 5, 9] if world_size > 1 else [8], "layers": 2},
        "micro_batches": {"tokens": [10, 5, 8, 1], "layers": 2, "micro_batches": 2},
        "checkpoint": {"tokens": [9, 12, 0, 4], "layers": 2, "checkpoint": True},
        "shared_beside": {"tokens": [7, 0, 9, 1], "num_shared_experts": 1, "overlap": "shared"},
        # An odd number; one token, whose second half is empty; none.
        "two_halves": {"tokens": [13, 1, 0, 8], "layers": 2, "num_shared_experts": 1, "overlap": "tbo"},
        "two_halves_checkpoint": {"tokens": [1, 12], "layers": 2, "checkpoint": True, "overlap": "tbo"},
    }
    if world_size in (2, 4):
        found["replicas"] = {"tokens": [9, 12, 0, 4], "layers": 2, "ep": 2}  # 4 ranks: a 2 x 2 mesh
    return {name: PLAIN | case for name, case in found.items()}


def plain_cases(world_size: int) -> dict[str, dict]:
    """Those of one layer, one micro-batch and one group, for references that know no more."""
    found = cases(world_size).items()
    return {name: case for name, case in found if name not in MODEL_CASES}


OVERLAP_CASES = {"shared_beside", "two_halves", "two_halves_checkpoint"}
MODEL_CASES = {"shared_experts", "two_layers", "micro_batches", "checkpoint", "replicas"} | OVERLAP_CASES


def cases_of(activation: str, dtype: str, wanted: list[str]) -> list[str]:
    """The cases that a variant runs: all for gelu; for the others those that differ for the experts. Models of more
    than a layer are judged where rounding does not add up."""
    few = {"even", "rank_without_tokens", "rank_without_rows", "top_k_is_num_experts"} | MODEL_CASES
    names = [name for name in wanted if activation == "gelu" or name in few]
    return [name for name in names if dtype != "bfloat16" or name not in MODEL_CASES]


def variants(
    device: torch.device, ep_size: int, dtypes: list[str], dispatcher: str | None = None
) -> list[tuple[str, str, str, str]]:
    """(dispatcher, experts, activation, dtype) of everything registered that can run on so many such ranks."""

    def can_run(dispatcher: str, experts: str, activation: str, dtype: str) -> bool:
        config = MoEConfig(**BASE, dtype=dtype)
        kinds = REGISTRIES["dispatcher"][dispatcher], REGISTRIES["experts"][experts]
        if kinds[0].needs_capacity:
            return False  # tests/ranks/capacity_parity.py runs those
        return all(kind.preference(config, device, ep_size) > 0 for kind in kinds)

    dispatchers = sorted(REGISTRIES["dispatcher"]) if dispatcher is None else [dispatcher]
    kinds = product(dispatchers, *(sorted(REGISTRIES[kind]) for kind in ("experts", "activation")), dtypes)
    return [kind for kind in kinds if can_run(*kind)]


def limit_of(experts: str, dtype: str) -> float:
    """The largest relative error that an experts kind may have in this dtype; auto, the dtype's own."""
    return getattr(REGISTRIES["experts"].get(experts), "parity_limit", LIMITS[dtype])


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over the reference's; absolute where the reference is 0."""
    ours, reference = ours.detach().double(), reference.detach().double()
    difference = (ours - reference).norm()
    scale = reference.norm()
    return float(difference / scale) if scale > 0 else float(difference)


def gather_uneven(x: Tensor, comm: Communicator) -> Tensor:
    """[n, ...] with any n a rank -> all ranks' rows in one tensor, by rank."""
    if comm.size == 1:
        return x
    pieces: list = [None] * comm.size
    dist.all_gather_object(pieces, x.detach().cpu())
    return torch.cat(pieces).to(x.device)


class Stack(nn.Module):
    """Layers one after the other, each beside a residual; recomputed where the case says so."""

    def __init__(self, layers: list[EPMoE], is_recomputed: bool) -> None:
        super().__init__()
        self.layers, self.is_recomputed = nn.ModuleList(layers), is_recomputed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.is_recomputed else layer(x))
        return x


def make_layer(
    config: MoEConfig, mesh: Mesh, device: torch.device, bias: list | None, seed: int = 3
) -> EPMoE:
    """A layer whose gate leans as the case wants."""
    layer = EPMoE(config, mesh, seed=seed, device=device)
    if bias is not None:
        with torch.no_grad():
            layer.router.gate.weight.mul_(0.1)
            layer.router.gate.bias += torch.tensor(bias, device=device)[: config.num_experts]
    return layer


def make_model(config: MoEConfig, mesh: Mesh, device: torch.device, case: dict) -> Stack:
    """The case's model; its layers have seeds of their own."""
    layers = [make_layer(config, mesh, device, case["bias"], 3 + n) for n in range(case["layers"])]
    return Stack(layers, case["checkpoint"])


def alone() -> Mesh:
    """This rank by itself, inside a larger job or not."""
    return Mesh(*[Communicator.alone()] * 3)


def parameter_errors(model: nn.Module, grads: dict[str, Tensor | None], own: slice) -> dict[str, float]:
    """The errors of every parameter's gradient; grads: the whole layer's, own: this rank's experts. Infinite where a
    rank holds others."""
    errors = {}
    for name, parameter in model.named_parameters():
        is_local, grad = name.split(".")[-2] == "experts", grads[name]
        if grad is None:
            grad = parameter.new_zeros(own.stop if is_local else parameter.shape[0], *parameter.shape[1:])
        errors[name + ".grad"] = relative_error(parameter.grad, grad[own] if is_local else grad)
        if is_local and parameter.shape[0] != own.stop - own.start:
            errors[name + " holds other ranks' experts"] = float("inf")
    return errors


def dense_reference(layer: EPMoE, x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(y, aux) of all ranks' tokens, the shared experts included. Collective."""
    topk_ids, config = gather_uneven(layer.topk_ids, layer.mesh.batch), layer.config
    low = config.dtype == "bfloat16"
    y, aux = dense_moe(x, parameters, config.top_k, topk_ids if low else None, config.activation)
    if config.num_shared_experts:
        w1, b1, w2, b2, w3, b3 = (
            parameters.get(f"shared.expert.{name}") for name in ("w1", "b1", "w2", "b2", "w3", "b3")
        )
        gate = x @ w1[0] + (0 if b1 is None else b1[0])
        up = None if w3 is None else x @ w3[0] + (0 if b3 is None else b3[0])
        hidden = REGISTRIES["activation"][config.activation].apply(gate, up)
        y = y + hidden @ w2[0] + (0 if b2 is None else b2[0])
    return y, aux


def run_reference(model: Stack, x: Tensor, parameters: dict[str, Tensor], reference: Callable) -> tuple:
    """The stack on all ranks' tokens of one micro-batch -> y, the sum of the layers' aux losses."""
    total = 0
    for n, layer in enumerate(model.layers):
        prefix = f"layers.{n}."
        own = {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
        y, aux = reference(layer, x, own)
        x, total = x + y, total + aux
    return x, total


def watch_bytes(model: Stack, mesh: Mesh) -> Callable[[], tuple[list[int], bool]]:
    """Notes every layer's choices as it runs -> a function that says ([predicted, counted] bytes over all ranks, is
    this rank's every pass and destination as predicted). Collective."""
    runs: list[tuple[EPMoE, Tensor]] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, args, y: runs.append((layer, layer.topk_ids)))
    before = {name: list(sent) for name, sent in mesh.meter.fetch().items()}

    def compare() -> tuple[list[int], bool]:
        nothing, sent_since = [0] * mesh.meter.size, mesh.meter.fetch()
        counted, predicted = {}, {name: torch.zeros(mesh.ep.size, dtype=torch.int64) for name in PASSES}
        for name in PASSES:
            pairs = zip(sent_since.get(name, nothing), before.get(name, nothing), strict=True)
            counted[name] = torch.tensor([now - then for now, then in pairs])[mesh.ep.ranks]
        for layer, topk_ids in list(runs):
            for name, sent in bytes_of_layer(layer, topk_ids).items():
                predicted[name] += sent[mesh.ep.rank]
        agrees = all(torch.equal(predicted[name], counted[name]) for name in PASSES)
        return [sum(int(t.sum()) for t in which.values()) for which in (predicted, counted)], agrees

    return compare


class Dense(NamedTuple):
    """What the reference makes of all ranks' tokens: y [T, D], the sum of the aux losses, x's gradient, {parameter: its
    gradient, None where there is none}."""

    y: Tensor
    aux: Tensor
    x_grad: Tensor
    grads: dict[str, Tensor | None]


def run_dense(
    model: Stack,
    case: dict,
    config: MoEConfig,
    x: Tensor,
    target: Tensor,
    micro: list[Tensor],
    reference: Callable,
) -> Dense:
    """The case at world size 1, by the reference, in float64; micro: which tokens each micro-batch has."""
    whole = make_model(config, alone(), x.device, case)
    parameters = {n: p.detach().double().requires_grad_() for n, p in whole.named_parameters()}
    x = x.double().requires_grad_()
    y, aux = torch.empty_like(x), x.new_zeros(())
    for index in micro:
        y_part, aux_part = run_reference(model, x[index], parameters, reference)
        ((y_part - target[index]).square().sum() / max(1, len(x)) + ALPHA * aux_part).backward()
        y[index], aux = y_part.detach(), aux + aux_part.detach()
    return Dense(y.detach(), aux, x.grad, {name: p.grad for name, p in parameters.items()})


def run_case(
    case: dict,
    config: MoEConfig,
    mesh: Mesh,
    device: torch.device,
    reference=dense_reference,
    known: dict | None = None,
) -> dict:
    """One case on all ranks -> this rank's errors and facts.

    known: what the reference said for other kinds of dispatchers and experts, which it knows nothing of; added to.
    """
    case, dtype, batch = PLAIN | case, DTYPES[config.dtype], mesh.batch
    sizes = [case["tokens"][rank % len(case["tokens"])] for rank in range(batch.size)]
    generator = torch.Generator().manual_seed(17)
    total, d = sum(sizes), config.hidden_dim
    x_all = torch.randn(total, d, generator=generator, dtype=torch.float64).to(dtype).to(device)
    # A small target: the squared error's gradient follows y, so sums over tokens do not cancel, and
    # rounding is judged against the terms that were rounded.
    target = 0.1 * torch.randn(total, d, generator=generator, dtype=torch.float64).to(device)
    mine = slice(sum(sizes[: batch.rank]), sum(sizes[: batch.rank + 1]))

    model = make_model(config, mesh, device, case)
    compare_bytes = watch_bytes(model, mesh)
    x = x_all[mine].clone().requires_grad_()
    parts = torch.arange(total, device=device).split(sizes)  # each rank's tokens, cut into micro-batches
    micro = [
        torch.cat([p.tensor_split(case["micro_batches"])[m] for p in parts])
        for m in range(case["micro_batches"])
    ]
    ys, aux_total = [], torch.zeros((), dtype=torch.float64, device=device)
    for part, wanted in zip(*(t.tensor_split(case["micro_batches"]) for t in (x, target[mine])), strict=True):
        y = model(part)
        aux = aux_loss(model).double()
        ((y.double() - wanted).square().sum() / max(1, total) + ALPHA * aux).backward()
        ys, aux_total = [*ys, y.detach()], aux_total + aux.detach()
    sync_gradients(model, mesh, aux_total)
    num_bytes, agrees = ([0, 0], True) if case["checkpoint"] else compare_bytes()

    topk_ids = gather_uneven(model.layers[0].topk_ids, batch)
    given = topk_ids.tolist() if config.dtype == "bfloat16" else None  # there the reference takes our choices
    key = repr((case, replace(config, dispatcher="auto", experts="auto"), given))
    known = {} if known is None else known
    if key not in known:
        known[key] = run_dense(model, case, config, x_all, target, micro, reference)
    dense: Dense = known[key]

    num_local = config.num_experts // mesh.ep.size
    own = slice(mesh.ep.rank * num_local, (mesh.ep.rank + 1) * num_local)
    errors = {
        "y": relative_error(torch.cat(ys), dense.y[mine]),
        "aux": relative_error(aux_total, dense.aux),
        "x.grad": relative_error(x.grad, dense.x_grad[mine]),
    } | parameter_errors(model, dense.grads, own)
    received = torch.bincount(topk_ids[topk_ids >= 0].cpu(), minlength=config.num_experts)[own]
    return {
        "errors": {name.removeprefix("layers.0."): error for name, error in errors.items()},
        "bytes": num_bytes,
        "bytes_agree": agrees,
        "rows_received": int(received.sum()),
    }


def mesh_of(parts: int) -> Mesh:
    """All ranks, in so many groups that each hold all experts."""
    return init_ep(max(1, world_from_env()[1] // parts))


def collect(facts: dict, batch: Communicator) -> dict:
    """Every rank's facts of a case -> the worst of them, the same on all ranks. Collective."""
    gathered: list = [facts]
    if batch.size > 1:
        gathered = [None] * batch.size
        dist.all_gather_object(gathered, facts)
    return {
        "errors": {q: max(f["errors"].get(q, 0.0) for f in gathered) for q in gathered[0]["errors"]},
        "bytes": [sum(f["bytes"][which] for f in gathered) for which in (0, 1)],
        "bytes_agree": all(f["bytes_agree"] for f in gathered),
        "rows_received": [f["rows_received"] for f in gathered],
    }


def name_crash(error: Exception, what: str) -> str:
    """One line: what was running, what happened, and in which cell."""
    markers = launcher.read_cell_markers(launcher.__file__)
    return f"crashed: {what}: {launcher.describe_frames(error, launcher.__file__, markers)[1]}"


def run_suite(
    device: torch.device,
    dtypes: list[str],
    mesh: Mesh,
    wanted: list[str] | None = None,
    is_over: Callable[[], bool] = lambda: False,
    dispatcher: str | None = None,
    extras: tuple = (),
    takes: Callable[..., bool] = lambda *kinds: True,
) -> list[dict]:
    """Every variant in every case, over the ranks of the default group -> results, the same list on every rank.

    extras: option groups of every config. takes(dispatcher, experts, activation, dtype): whether a variant runs.
    is_over: asked before each variant, on every rank alike; where it says yes, the rest is left out. A crash is told
    on stderr, and raised. Collective.
    """
    results, known, references, size = [], cases(mesh.batch.size), {}, mesh.batch.size
    for parts in sorted({case["ep"] for case in known.values()}):
        among = mesh_of(parts)
        for kinds in variants(device, size // parts if size > 1 else 1, dtypes, dispatcher):
            if is_over():
                break
            if not takes(*kinds):
                continue
            for name in cases_of(kinds[2], kinds[3], wanted or list(known)):
                case = known[name]
                if case["ep"] != parts:
                    continue
                changes = {k: case[k] for k in (*BASE, "num_shared_experts", "overlap") if k in case}
                config = MoEConfig(**BASE | changes, **dict(zip(NAMES, kinds, strict=True)), extras=extras)
                try:
                    facts = run_case(case, config, among, device, known=references)
                except Exception as error:
                    what = f"rank {mesh.batch.rank}, {name} {kinds[3]} {' '.join(kinds[:3])}"
                    print(name_crash(error, what), file=sys.stderr, flush=True)
                    raise
                results.append(
                    {
                        "case": name,
                        **dict(zip(NAMES, kinds, strict=True)),
                        "world_size": size,
                        "device": device.type,
                    }
                    | {
                        "limit": limit_of(kinds[1], kinds[3]),
                        "experts_without_rows": case["experts_without_rows"],
                    }
                    | collect(facts, mesh.batch)
                )
    return results


NAMES = ("dispatcher", "experts", "activation", "dtype")


def over_the_limit(results: list[dict]) -> list[dict]:
    """The results that are not within their limits, or whose bytes are not as predicted."""
    return [r for r in results if not (max(r["errors"].values()) <= r["limit"] and r["bytes_agree"])]


def begin() -> tuple[argparse.Namespace, torch.device]:
    """The command line's flags and this rank's device; joins the process group."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32", "bfloat16"])
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--dispatcher", help="this one alone")
    parser.add_argument("--ranks-per-host", type=int, help="as if so many ranks shared a machine")
    parser.add_argument("--plugin", help="a file that registers more")
    parser.add_argument("--output")
    args = parser.parse_args()
    if sys.flags.optimize:
        parser.error("without assertions (PYTHONOPTIMIZE, -O) not every check can fail; leave that out")
    load_plugin(sys.argv[1:])
    if args.dispatcher and args.dispatcher not in REGISTRIES["dispatcher"]:
        parser.error(
            f"no dispatcher {args.dispatcher!r}; take one of {', '.join(sorted(REGISTRIES['dispatcher']))}"
        )
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    if world_from_env()[1] > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        schedule_in_batches()
        dist.init_process_group(backend, timeout=timedelta(seconds=30))
    return args, device


def print_summary(what: str, results: list[dict], failed: list[dict], dtypes: list[str]) -> None:
    """A line for each that is over, then how many are within their limits, and the worst error of each dtype."""
    for r in failed:
        quantity = max(r["errors"], key=r["errors"].get)
        over = f"{quantity} {r['errors'][quantity]:.2e} > {r['limit']:g}"
        wrong = f"bytes predicted {r['bytes'][0]}, counted {r['bytes'][1]}, by pass and destination not equal"
        over = wrong if r["errors"][quantity] <= r["limit"] else over
        print(
            f"over the limit: {r['case']} {r['dtype']} {r['dispatcher']} {r['experts']} {r['activation']}: {over}"
        )
    worst = {
        d: max((max(r["errors"].values()) for r in results if r["dtype"] == d), default=0.0) for d in dtypes
    }
    errors = ", ".join(f"{d} {e:.1e}" for d, e in worst.items())
    print(f"{what}: {len(results) - len(failed)} of {len(results)} within limits; worst {errors}")


def finish(what: str, args: argparse.Namespace, comm: Communicator, results: list[dict], failed: list[dict],
           written: Any) -> int:  # fmt: skip
    """Rank 0 writes `written` where --output says and prints the summary; all leave the group -> exit code."""
    if comm.rank == 0:
        if args.output:
            Path(args.output).write_text(json.dumps(written, indent=1) + "\n")
        print_summary(f"{what} at world size {comm.size} on {args.device}", results, failed, args.dtypes)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if failed or not results else 0


def main() -> int:
    args, device = begin()
    mesh = init_ep()
    try:
        extras = (TrafficOptions(ranks_per_host=args.ranks_per_host),)
        results = run_suite(device, args.dtypes, mesh, args.cases, dispatcher=args.dispatcher, extras=extras)
    except Exception:
        sys.stdout.flush()
        os._exit(1)  # told already; the other ranks wait for this one, and torchrun ends them
    return finish("parity", args, mesh.batch, results, over_the_limit(results), results)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of ended groups must not meet a dying interpreter
