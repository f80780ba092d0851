"""The parity suite: models with EP layers against the dense float64 reference, on real ranks.

    torchrun --standalone --nproc_per_node=2 tools/parity.py
    python tools/parity.py --device cuda --dtypes float32 bfloat16        (one GPU, world size 1)
    torchrun --nproc_per_node=4 tools/parity.py --dispatcher mine --plugin mine.py
    torchrun --nproc_per_node=4 tools/parity.py --dispatcher two_stage --ranks-per-host 2

Every registered dispatcher with every registered experts kind runs every case. A result is {case, dtype, dispatcher,
experts, world_size, errors: {quantity: relative error}, limit, bytes: [predicted, counted], ...}. Exit code 1 where an
error is over its limit, a byte was not predicted, or a case crashes, whose variant and cell are named then.
"""

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ep_launcher import launcher as ep  # noqa: E402

LIMITS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}  # where an experts kind states none of its own
ALPHA = 0.01
NAMES = ("dispatcher", "experts", "activation", "dtype")
BASE = {"num_experts": 8, "top_k": 2, "hidden_dim": 32, "ffn_dim": 64}
# What a case may say besides the config. ep: the ranks that share the experts are so many times fewer than all.
PLAIN = {"bias": None, "layers": 1, "micro_batches": 1, "checkpoint": False, "ep": 1,
         "x_needs_grad": True, "extras": ()}  # fmt: skip


@dataclass(frozen=True)
class LeftOut(ep.Options):
    """Choices of -1, as a capacity makes them: a token's first, its second, both, none, and so on."""

    def after_routing(self, routing: ep.Routing, config: ep.MoEConfig, batch: ep.Communicator) -> ep.Routing:
        ids = routing.topk_ids.clone()
        ids[0::4, 0], ids[1::4, 1], ids[2::4] = -1, -1, -1
        return replace(routing, topk_ids=ids)


def plain_cases(size: int) -> dict[str, dict]:
    """{name: tokens per rank, config changes, gate bias per expert, ...}; rank r takes tokens[r % len(tokens)].

    Those of one layer, one micro-batch and one group, for references that know no more.
    """
    last_rank = [-2.0 if e >= 8 - 8 // size else 0.0 for e in range(8)]
    found = {
        "even": {"tokens": [12]},
        "uneven": {"tokens": [70, 5, 9, 1]},
        "rank_without_tokens": {"tokens": [11, 0, 7, 0] if size > 1 else [0]},
        "no_tokens_at_all": {"tokens": [0]},
        "rank_without_rows": {"tokens": [12], "bias": last_rank},
        "idle_rank": {"tokens": [*[12] * (size - 1), 0], "bias": last_rank},  # neither sends nor receives
        "all_to_one_expert": {"tokens": [9, 12], "top_k": 1, "bias": [2.0] + [0.0] * 7},
        "top_1": {"tokens": [12, 10], "top_k": 1},
        "top_k_is_num_experts": {"tokens": [6, 8], "top_k": 8},
        "one_expert_a_rank": {"tokens": [10, 12], "num_experts": size, "top_k": min(2, size)},
        "tokens_without_gradient": {"tokens": [9, 12], "x_needs_grad": False},  # as in a model's first layer
    }
    return {name: PLAIN | case for name, case in found.items()}


def model_cases(size: int) -> dict[str, dict]:
    """Those of whole models, and of choices that are not the router's alone."""
    found = {
        "choices_left_out": {"tokens": [9, 12, 0, 6], "extras": (LeftOut(),)},
        "shared_experts": {"tokens": [7, 9], "num_shared_experts": 2},
        "two_layers": {"tokens": [8, 0, 5, 9] if size > 1 else [8], "layers": 2},
        "micro_batches": {"tokens": [10, 5, 8, 1], "layers": 2, "micro_batches": 2},
        "checkpoint": {"tokens": [9, 12, 0, 4], "layers": 2, "checkpoint": True},
        "shared_beside": {"tokens": [7, 0, 9, 1], "num_shared_experts": 1, "overlap": "shared"},
        # An odd number; one token, whose second half is empty; none.
        "two_halves": {"tokens": [13, 1, 0, 8], "layers": 2, "num_shared_experts": 1, "overlap": "tbo"},
        "two_halves_checkpoint": {"tokens": [1, 12], "layers": 2, "checkpoint": True, "overlap": "tbo"},
    }
    if size in (2, 4):
        found["replicas"] = {"tokens": [9, 12, 0, 4], "layers": 2, "ep": 2}  # 4 ranks: a 2 x 2 mesh
    return {name: PLAIN | case for name, case in found.items()}


def cases(size: int) -> dict[str, dict]:
    return plain_cases(size) | model_cases(size)


def cases_of(activation: str, dtype: str, known: dict[str, dict]) -> dict[str, dict]:
    """The cases that a variant runs: all for gelu; for the others those that differ for the experts. Models of more
    than a layer are judged where rounding does not add up."""
    of_models = set(model_cases(4))
    few = {"even", "rank_without_tokens", "rank_without_rows", "top_k_is_num_experts"} | of_models
    names = set(known) if activation == "gelu" else few
    names -= of_models if dtype == "bfloat16" else set()
    return {name: case for name, case in known.items() if name in names}


def variants(device: torch.device, ep_size: int, dtypes: list[str], only: str | None = None) -> list[tuple]:
    """NAMES of everything registered that can run on so many such ranks, without fixed buffers (those run in
    tests/ranks/capacity_parity.py); only: this dispatcher."""

    def can_run(dispatcher: str, experts: str, activation: str, dtype: str) -> bool:
        config = ep.MoEConfig(**BASE, dtype=dtype, activation=activation)
        kinds = ep.REGISTRIES["dispatcher"][dispatcher], ep.REGISTRIES["experts"][experts]
        return not kinds[0].needs_capacity and all(k.preference(config, device, ep_size) > 0 for k in kinds)

    dispatchers = [only] if only else sorted(ep.REGISTRIES["dispatcher"])
    kinds = product(dispatchers, *(sorted(ep.REGISTRIES[kind]) for kind in ("experts", "activation")), dtypes)
    return [kind for kind in kinds if can_run(*kind)]


def limit_of(experts: str, dtype: str) -> float:
    """The largest relative error that an experts kind may have in this dtype; auto, the dtype's own."""
    return getattr(ep.REGISTRIES["experts"].get(experts), "parity_limit", LIMITS[dtype])


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over the reference's; absolute where the reference is 0; infinite for NaN."""
    ours, reference = ours.detach().double(), reference.detach().double()
    error = float((ours - reference).norm() / (reference.norm() or 1))
    return error if error >= 0 else float("inf")


def everyones_rows(x: Tensor, comm: ep.Communicator) -> Tensor:
    """[n, ...] with any n a rank -> all ranks' rows in one tensor, by rank. Collective."""
    return torch.cat(ep.gather_objects(x.detach().cpu(), comm)).to(x.device)


class Stack(nn.Module):
    """Layers one after the other, each beside a residual; recomputed where the case says so."""

    def __init__(self, layers: list[ep.EPMoE], is_recomputed: bool) -> None:
        super().__init__()
        self.layers, self.is_recomputed = nn.ModuleList(layers), is_recomputed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.is_recomputed else layer(x))
        return x


def make_model(config: ep.MoEConfig, mesh: ep.Mesh, device: torch.device, case: dict) -> Stack:
    """The case's model, whose gates lean as it wants; its layers have seeds of their own."""
    layers = [ep.EPMoE(config, mesh, seed=3 + n, device=device) for n in range(case["layers"])]
    if case["bias"] is not None:
        with torch.no_grad():
            for gate in (layer.router.gate for layer in layers):
                gate.weight.mul_(0.1)
                gate.bias += torch.tensor(case["bias"], device=device)[: config.num_experts]
    return Stack(layers, case["checkpoint"])


def parameter_errors(model: nn.Module, grads: dict[str, Tensor | None], own: slice) -> dict[str, float]:
    """The errors of every parameter's gradient; grads: the whole layer's, None for zeros; own: this rank's experts."""
    errors = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if grads[name] is None else grads[name]
        is_cut = name.split(".")[-2] == "experts" and grads[name] is not None
        errors[name + ".grad"] = relative_error(parameter.grad, grad[own] if is_cut else grad)
    return errors


def dense_reference(layer: ep.EPMoE, x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(y, aux) of all ranks' tokens, the shared experts included; with the layer's choices in bfloat16, and where some
    are left out. Collective."""
    config, kind = layer.config, layer.config.activation
    given = everyones_rows(layer.topk_ids, layer.mesh.batch)
    is_short = bool((given < 0).any())
    given = given if is_short or config.dtype == "bfloat16" else None
    y, aux = ep.dense_moe(x, parameters, config.top_k, given, kind)
    if is_short:  # the aux loss sees what the router wanted
        aux = ep.dense_moe(x, parameters, config.top_k, None, kind)[1]
    if config.num_shared_experts:  # as a layer with one expert, which everybody visits
        names = {name: name.replace("shared.", "experts.") for name in parameters if "shared" in name}
        only = {new: parameters[name] for name, new in names.items()}
        only["router.gate.weight"] = x.new_zeros(1, x.shape[1])
        y = y + ep.dense_moe(x, only, 1, None, kind)[0]
    return y, aux


def watch_bytes(model: Stack, mesh: ep.Mesh) -> Callable[[], tuple[list[int], str]]:
    """Predicts every layer's bytes when it has run -> a function that says ([predicted, counted] bytes of this rank,
    where they first differ: in which pass, to which rank; "" where they do not). Collective."""
    predictions: list[Tensor] = []  # [pass, destination], of every forward

    def predict(layer: ep.EPMoE, args: tuple, y: Tensor) -> None:
        tables = ep.predicted_bytes(layer, args[0].requires_grad)
        predictions.append(torch.stack([tables[name][mesh.ep.rank] for name in ep.PASSES]))

    for layer in model.layers:
        layer.register_forward_hook(predict)

    def count() -> Tensor:  # [pass, destination]
        mesh.meter.total()  # brings what kernels have counted
        sent, nothing = mesh.meter.sent, [0] * mesh.meter.size
        return torch.tensor([[sent.get(name, nothing)[rank] for rank in mesh.ep.ranks] for name in ep.PASSES])

    before = count()

    def compare() -> tuple[list[int], str]:
        counted, predicted = count() - before, sum(predictions)
        differ = [
            f"{predicted[n, rank]} bytes predicted for {ep.PASSES[n]} from rank {mesh.ep.rank} to rank {rank}, "
            f"and {counted[n, rank]} counted"
            for n, rank in (predicted != counted).nonzero().tolist()
        ]
        return [int(predicted.sum()), int(counted.sum())], (differ or [""])[0]

    return compare


def learn(forward: Callable, parts: list[Tensor], targets: list[Tensor], total: int) -> tuple:
    """Forward and backward of every micro-batch: forward(x) -> (y, aux) -> (all y, the sum of the aux losses)."""
    ys, aux_total = [], 0
    for part, wanted in zip(parts, targets, strict=True):
        y, aux = forward(part)
        ((y.double() - wanted).square().sum() / max(1, total) + ALPHA * aux.double()).backward()
        ys, aux_total = [*ys, y.detach()], aux_total + aux.detach().double()
    return ys, aux_total


def run_dense(
    model: Stack, case: dict, x: Tensor, target: Tensor, micro: list[Tensor], reference: Callable
) -> dict:
    """The case at world size 1, by the reference, in float64; micro: which tokens each micro-batch has. -> y [T, D],
    the sum of the aux losses, x's gradient, {parameter: its gradient, None where there is none}."""
    alone = ep.Mesh(*[ep.Communicator.alone()] * 3)
    whole = make_model(model.layers[0].config, alone, x.device, case).double()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        total = 0
        for layer, dense in zip(model.layers, whole.layers, strict=True):
            y, aux = reference(layer, x, dict(dense.named_parameters()))
            x, total = x + y, total + aux
        return x, total

    x = x.double().requires_grad_()
    ys, aux = learn(forward, [x[index] for index in micro], [target[index] for index in micro], len(x))
    y = torch.empty_like(x, requires_grad=False).index_copy_(0, torch.cat(micro), torch.cat(ys))
    return {"y": y, "aux": aux, "x.grad": x.grad, "grads": {n: p.grad for n, p in whole.named_parameters()}}


def run_case(
    case: dict, config: ep.MoEConfig, mesh: ep.Mesh, device: torch.device, reference: Callable = dense_reference,
    known: dict | None = None,
) -> dict:  # fmt: skip
    """One case on all ranks -> this rank's errors and facts.

    known: what the reference said for other kinds of dispatchers and experts, which it knows nothing of; added to.
    """
    case, dtype, batch = PLAIN | case, ep.DTYPES[config.dtype], mesh.batch
    sizes = [case["tokens"][rank % len(case["tokens"])] for rank in range(batch.size)]
    generator, total, num_parts = torch.Generator().manual_seed(17), sum(sizes), case["micro_batches"]
    draws = torch.randn(2, total, config.hidden_dim, generator=generator, dtype=torch.float64).to(device)
    # A small target: the squared error's gradient follows y, so sums over tokens do not cancel, and
    # rounding is judged against the terms that were rounded.
    x_all, target = draws[0].to(dtype), 0.1 * draws[1]
    mine = torch.arange(total, device=device).split(sizes)  # each rank's tokens
    micro = [torch.cat([m.tensor_split(num_parts)[n] for m in mine]) for n in range(num_parts)]
    mine = mine[batch.rank]

    model = make_model(config, mesh, device, case)
    compare_bytes = watch_bytes(model, mesh)
    x = x_all[mine].requires_grad_(case["x_needs_grad"])
    parts = (t.tensor_split(num_parts) for t in (x, target[mine]))
    ys, aux_total = learn(lambda part: (model(part), ep.aux_loss(model)), *parts, total)
    ep.sync_gradients(model, mesh, aux_total)
    num_bytes, differ = ([0, 0], "") if case["checkpoint"] else compare_bytes()

    topk_ids, known = model.layers[0].topk_ids, {} if known is None else known
    # In bfloat16 the reference takes our choices.
    given = everyones_rows(topk_ids, batch).tolist() if config.dtype == "bfloat16" else None
    key = repr((case, replace(config, dispatcher="auto", experts="auto"), given))
    if key not in known:
        known[key] = run_dense(model, case, x_all, target, micro, reference)
    dense, num_local = known[key], config.num_experts // mesh.ep.size
    first, owners = mesh.ep.rank * num_local, topk_ids[topk_ids >= 0].cpu() // num_local
    errors = {
        "y": relative_error(torch.cat(ys), dense["y"][mine]),
        "aux": relative_error(aux_total, dense["aux"]),
        **({"x.grad": relative_error(x.grad, dense["x.grad"][mine])} if case["x_needs_grad"] else {}),
    } | parameter_errors(model, dense["grads"], slice(first, first + num_local))
    return {
        "errors": {name.removeprefix("layers.0."): error for name, error in errors.items()},
        "bytes": num_bytes,
        "bytes_differ": differ,
        "rows_received": torch.bincount(owners, minlength=mesh.ep.size).tolist(),
    }


def collect(results: list[dict], mesh: ep.Mesh) -> list[dict]:
    """Every rank's results of some cases -> rank 0's, with the worst of all facts, on all ranks. Collective."""
    return [
        by_rank[0]
        | {
            "errors": {q: max(f["errors"].get(q, 0.0) for f in by_rank) for q in by_rank[0]["errors"]},
            "bytes": [sum(f["bytes"][which] for f in by_rank) for which in (0, 1)],
            "bytes_differ": max((f["bytes_differ"] for f in by_rank), key=bool),
            "rows_received": [sum(rows) for rows in zip(*(f["rows_received"] for f in by_rank), strict=True)],
        }
        for by_rank in zip(*ep.gather_objects(results, mesh.batch), strict=True)
    ]


def run_suite(
    device: torch.device, dtypes: list[str], mesh: ep.Mesh, dispatcher: str | None = None, extras: tuple = (),
    wanted: Callable[..., Collection[str]] = lambda *kinds: cases(4),
) -> list[dict]:  # fmt: skip
    """Every variant in every case, over the ranks of the default group -> results, the same list on every rank.

    extras: option groups of every config. wanted(dispatcher, experts, activation, dtype): the cases that a variant
    runs, asked on every rank alike. A crash is told on stderr, and raised. Collective.
    """
    results, size, known = [], mesh.batch.size, cases(mesh.batch.size)
    for parts in sorted({case["ep"] for case in known.values()}):
        among, ran, references = ep.init_ep(max(1, size // parts)), [], {}
        for kinds in variants(device, among.ep.size, dtypes, dispatcher):
            names, chosen = set(wanted(*kinds)), dict(zip(NAMES, kinds, strict=True))
            for name, case in cases_of(*kinds[2:], known).items():
                if case["ep"] != parts or name not in names:
                    continue
                changes = {k: case[k] for k in (*BASE, "num_shared_experts", "overlap") if k in case}
                told = {"case": name, **chosen, "world_size": size, "device": device.type}
                try:
                    config = ep.MoEConfig(**BASE | changes, **chosen, extras=(*extras, *case["extras"]))
                    found = run_case(case, config, among, device, known=references)
                except Exception as error:
                    markers = ep.read_cell_markers(ep.__file__)
                    said = ep.describe_frames(error, ep.__file__, markers)[1]
                    what = f"rank {mesh.batch.rank}, {name} {kinds[3]} {' '.join(kinds[:3])}"
                    print(f"crashed: {what}: {said}", file=sys.stderr, flush=True)
                    raise
                ran.append(told | {"limit": limit_of(kinds[1], kinds[3])} | found)
        results += collect(ran, among)
    return results


def fault_of(r: dict) -> str:
    """What is wrong with a result: an error over its limit, or bytes that are not as predicted; "" where nothing is."""
    quantity, error = max(r["errors"].items(), key=lambda item: item[1])
    is_over = not error <= r["limit"]
    return f"{quantity} is off by {error:.1e}, limit {r['limit']:g}" if is_over else r["bytes_differ"]


def over_the_limit(results: list[dict]) -> list[dict]:
    """The results with a fault."""
    return [r for r in results if fault_of(r)]


def begin() -> tuple[argparse.Namespace, torch.device, ep.Mesh]:
    """The command line's flags, this rank's device, and all ranks, which have met."""
    ep.load_plugin(sys.argv[1:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=list(LIMITS), help=f"of {', '.join(LIMITS)}")
    parser.add_argument("--cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases(4))}")
    kinds = sorted(ep.REGISTRIES["dispatcher"])
    parser.add_argument("--dispatcher", choices=kinds, metavar="NAME", help="this one alone")
    parser.add_argument("--ranks-per-host", type=int, help="as if so many ranks shared a machine")
    parser.add_argument("--plugin", help="a file that registers more")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.device != "cpu":
        BASE.update(hidden_dim=64, ffn_dim=128)  # the least that chapter 14's kernels take
    return args, ep.choose_device(args.device), ep.init_ep(device=args.device, timeout_s=30)


def finish(
    what: str, args: argparse.Namespace, comm: ep.Communicator, results: list[dict], failed: list[dict]
) -> int:
    """Rank 0 says what is over, how many are within their limits, and the worst error of each dtype; all leave the
    group -> exit code."""
    if comm.rank == 0:
        worst = dict.fromkeys(args.dtypes, 0.0)
        for r in results:
            worst[r["dtype"]] = max(worst[r["dtype"]], *r["errors"].values())
        within = f"{len(results) - len(failed)} of {len(results)} within limits"
        errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
        said = f"{what} at world size {comm.size} on {args.device}: {within}; worst {errors}"
        for r in failed[:20]:
            kind = f"{r['case']} {r['dtype']} {r['dispatcher']} {r['experts']} {r['activation']}"
            print(f"over the limit: {kind}: {fault_of(r) or 'other choices'}")
        if failed[20:]:
            print(f"over the limit: {len(failed) - 20} more")
        print(said)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if failed or not results else 0


def main() -> int:
    args, device, mesh = begin()
    extras = (ep.TrafficOptions(ranks_per_host=args.ranks_per_host),)
    try:
        wanted = args.cases or cases(4)
        results = run_suite(device, args.dtypes, mesh, args.dispatcher, extras, lambda *kinds: wanted)
    except Exception:
        sys.stdout.flush()
        os._exit(1)  # told already; the other ranks wait for this one, and torchrun ends them
    return finish("parity", args, mesh.batch, results, over_the_limit(results))


if __name__ == "__main__":
    faulthandler.enable()  # gloo ends a process by SIGABRT where ranks send other sizes than are waited for
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of ended groups must not meet a dying interpreter
