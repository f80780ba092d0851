"""The parity suite: an EP layer against the dense float64 reference, on real ranks.

    torchrun --standalone --nproc_per_node=2 tests/parity.py --output build/parity.json
    python tests/parity.py --device cuda --dtypes float32 bfloat16        (one GPU, world size 1)

Every registered dispatcher with every registered experts kind runs every case. Rank 0 writes a list of results:
{case, dtype, dispatcher, experts, world_size, errors: {quantity: relative error}, limit, bytes: [predicted,
counted], ...}. Exit code 1 where an error is over its limit.
"""

import argparse
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ep_launcher.launcher import (  # noqa: E402
    DTYPES,
    REGISTRIES,
    Communicator,
    EPMoE,
    MoEConfig,
    all_reduce_gradients,
    choose_device,
    dense_moe,
    schedule_in_batches,
    world_from_env,
)

LIMITS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}
ALPHA = 0.01
BASE = {"num_experts": 8, "top_k": 2, "hidden_dim": 32, "ffn_dim": 64}


def cases(world_size: int) -> dict[str, dict]:
    """{name: tokens per rank, config changes, gate bias per expert}; rank r takes tokens[r % len(tokens)]."""
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
    }
    return {name: {"bias": None, "experts_without_rows": False} | case for name, case in found.items()}


def cases_of(activation: str, wanted: list[str]) -> list[str]:
    """The cases that an activation runs: all for gelu; for the others those that differ for the experts."""
    few = {"even", "rank_without_tokens", "rank_without_rows", "top_k_is_num_experts"}
    return [name for name in wanted if activation == "gelu" or name in few]


def variants(device: torch.device, world_size: int, dtypes: list[str]) -> list[tuple[str, str, str, str]]:
    """(dispatcher, experts, activation, dtype) of everything registered that can run on so many such ranks."""

    def can_run(dispatcher: str, experts: str, activation: str, dtype: str) -> bool:
        config = MoEConfig(**BASE, dtype=dtype)
        kinds = REGISTRIES["dispatcher"][dispatcher], REGISTRIES["experts"][experts]
        if hasattr(kinds[0], "needs_capacity"):
            return False  # tests/parity_capacity.py runs those
        return all(kind.preference(config, device, world_size) > 0 for kind in kinds)

    kinds = product(*(sorted(REGISTRIES[kind]) for kind in ("dispatcher", "experts", "activation")), dtypes)
    return [kind for kind in kinds if can_run(*kind)]


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


def make_layer(config: MoEConfig, comm: Communicator, device: torch.device, bias: list | None) -> EPMoE:
    """A layer whose gate leans as the case wants."""
    layer = EPMoE(config, comm, seed=3, device=device)
    if bias is not None:
        with torch.no_grad():
            layer.router.gate.weight.mul_(0.1)
            layer.router.gate.bias += torch.tensor(bias, device=device)[: config.num_experts]
    return layer


def alone() -> Communicator:
    """A communicator of one rank, inside a larger group or not."""
    comm = Communicator()
    comm.rank, comm.size = 0, 1
    return comm


def parameter_errors(layer: EPMoE, parameters: dict[str, Tensor], own: slice) -> dict[str, float]:
    """The errors of every parameter's gradient; own: this rank's experts. Infinite where a rank holds others."""
    errors = {}
    for name, parameter in layer.named_parameters():
        grad = parameters[name].grad
        grad = torch.zeros_like(parameters[name]) if grad is None else grad
        is_local = name.startswith("experts.")
        errors[name + ".grad"] = relative_error(parameter.grad, grad[own] if is_local else grad)
        if is_local and parameter.shape[0] != own.stop - own.start:
            errors[name + " holds other ranks' experts"] = float("inf")
    return errors


def dense_reference(layer: EPMoE, x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(y, aux) of all ranks' tokens. Collective."""
    topk_ids, config = gather_uneven(layer.topk_ids, layer.comm), layer.config
    low = config.dtype == "bfloat16"
    return dense_moe(x, parameters, config.top_k, topk_ids if low else None, config.activation)


def run_case(
    case: dict, config: MoEConfig, comm: Communicator, device: torch.device, reference=dense_reference
) -> dict:
    """One case on all ranks -> this rank's errors and facts."""
    dtype = DTYPES[config.dtype]
    sizes = [case["tokens"][rank % len(case["tokens"])] for rank in range(comm.size)]
    generator = torch.Generator().manual_seed(17)
    total, d = sum(sizes), config.hidden_dim
    x_all = torch.randn(total, d, generator=generator, dtype=torch.float64).to(dtype).to(device)
    # A small target: the squared error's gradient follows y, so sums over tokens do not cancel, and
    # rounding is judged against the terms that were rounded.
    target = 0.1 * torch.randn(total, d, generator=generator, dtype=torch.float64).to(device)
    mine = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))

    layer = make_layer(config, comm, device, case["bias"])
    x = x_all[mine].clone().requires_grad_()
    before = comm.meter.total("rows")
    y, aux = layer(x)
    ((y.double() - target[mine]).square().sum() / max(1, total) + ALPHA * aux.double()).backward()
    aux_total = aux.detach().clone()
    all_reduce_gradients(layer.replicated_parameters(), comm, aux_total)
    counted = torch.tensor([comm.meter.total("rows") - before])
    comm.all_reduce(counted := counted.to(device))

    whole = make_layer(config, alone(), device, case["bias"])
    parameters = {n: p.detach().double().requires_grad_() for n, p in whole.named_parameters()}
    x_ref = x_all.double().requires_grad_()
    topk_ids = gather_uneven(layer.topk_ids, comm)
    y_ref, aux_ref = reference(layer, x_ref, parameters)
    ((y_ref - target).square().sum() / max(1, total) + ALPHA * aux_ref).backward()

    num_local = config.num_experts // comm.size
    own = slice(comm.rank * num_local, (comm.rank + 1) * num_local)
    errors = {
        "y": relative_error(y.detach(), y_ref[mine]),
        "aux": relative_error(aux_total, aux_ref),
        "x.grad": relative_error(x.grad, x_ref.grad[mine]),
    } | parameter_errors(layer, parameters, own)
    by_rank = list(topk_ids.split(sizes)) if comm.size > 1 else [layer.topk_ids]
    predicted = 2 * sum(layer.dispatcher.rows_sent(by_rank, num_local)) * d * dtype.itemsize
    received = torch.bincount(topk_ids[topk_ids >= 0].cpu(), minlength=config.num_experts)[own]
    return {"errors": errors, "bytes": [predicted, int(counted)], "rows_received": int(received.sum())}


def run_suite(
    device: torch.device,
    dtypes: list[str],
    comm: Communicator,
    wanted: list[str] | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> list[dict]:
    """Every variant in every case, over the ranks of the default group -> results, the same list on every rank.

    is_over: asked before each variant, on every rank alike; where it says yes, the rest is left out. Collective.
    """
    results = []
    for dispatcher, experts, activation, dtype in variants(device, comm.size, dtypes):
        if is_over():
            break
        for name, case in cases(comm.size).items():
            if name not in cases_of(activation, wanted or list(cases(comm.size))):
                continue
            changes = {k: case[k] for k in BASE if k in case}
            config = MoEConfig(**BASE | changes, dispatcher=dispatcher, experts=experts,
                               activation=activation, dtype=dtype)  # fmt: skip
            facts = [run_case(case, config, Communicator(), device)]
            if comm.size > 1:
                gathered: list = [None] * comm.size
                dist.all_gather_object(gathered, facts[0])
                facts = gathered
            errors = {q: max(f["errors"].get(q, 0.0) for f in facts) for q in facts[0]["errors"]}
            results.append(
                {
                    "case": name,
                    "dtype": dtype,
                    "dispatcher": dispatcher,
                    "experts": experts,
                    "activation": activation,
                    "world_size": comm.size,
                    "device": device.type,
                    "errors": errors,
                    "limit": LIMITS[dtype],
                    "bytes": facts[0]["bytes"],
                    "rows_received": [f["rows_received"] for f in facts],
                    "experts_without_rows": case["experts_without_rows"],
                }
            )
    return results


def over_the_limit(results: list[dict]) -> list[dict]:
    """The results that are not within their limits."""
    return [r for r in results if not max(r["errors"].values()) <= r["limit"]]


def begin() -> tuple[argparse.Namespace, torch.device]:
    """The command line's flags and this rank's device; joins the process group."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32", "bfloat16"])
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--output")
    args = parser.parse_args()
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    if world_from_env()[1] > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        schedule_in_batches()
        dist.init_process_group(backend, timeout=timedelta(seconds=30))
    return args, device


def print_summary(what: str, results: list[dict], failed: list[dict], dtypes: list[str]) -> None:
    """The last line: how many are within their limits, and the worst error of each dtype."""
    worst = {
        d: max((max(r["errors"].values()) for r in results if r["dtype"] == d), default=0.0) for d in dtypes
    }
    errors = ", ".join(f"{d} {e:.1e}" for d, e in worst.items())
    print(f"{what}: {len(results) - len(failed)} of {len(results)} within limits; worst {errors}")


def main() -> int:
    args, device = begin()
    comm = Communicator()
    results = run_suite(device, args.dtypes, comm, args.cases)
    failed = over_the_limit(results)
    if comm.rank == 0:
        if args.output:
            Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
        for r in failed:
            quantity = max(r["errors"], key=r["errors"].get)
            print(
                f"over the limit: {r['case']} {r['dtype']} {r['dispatcher']} {r['experts']} {r['activation']}: "
                f"{quantity} {r['errors'][quantity]:.2e} > {r['limit']:g}"
            )
        print_summary(f"parity at world size {comm.size} on {device.type}", results, failed, args.dtypes)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
