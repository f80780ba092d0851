"""Balance and routers on real ranks and meshes: parity with a dense float64 reference, invariance, the bias's state.

tests/ranks/test_balance.py plays and reads these trials. The reference shares no line with the launcher: plain
formulas, loops over tokens, ranks and sequences.
"""

import math
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trials import copied_code, train, trial

from ep_launcher import launcher as ep
from tools.parity import LIMITS, everyones_rows, parameter_errors, plain_cases, relative_error

ALPHA, Z_ALPHA, SEQUENCE_ALPHA = 0.3, 0.2, 0.5  # large, so that a wrong loss shows in every gradient
LENGTH = 4
SIZES = {"num_experts": 8, "top_k": 2, "hidden_dim": 16, "ffn_dim": 32}
CURVE_SIZES = SIZES | {"ffn_dim": 16, "dtype": "float64"}
FEW_CASES = ("even", "uneven", "rank_without_tokens")
VARIANTS = list(product(("softmax", "sigmoid"), ("none", "aux", "aux_local", "bias"), (False, True), (1, 4)))


def mesh_of(batch: ep.Communicator) -> ep.Mesh:
    """The mesh on which all ranks of a group share the experts."""
    return ep.Mesh(batch, batch, ep.Communicator.alone(batch.meter))


def choose(keys: Tensor, top_k: int, num_groups: int, topk_groups: int) -> Tensor:
    """keys [T, E] -> the chosen experts [T, K], token by token: the best groups, then the best experts in them."""
    rows = []
    for row in keys.tolist():
        size = len(row) // num_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
        best = math.ceil(top_k / topk_groups)  # keys that a group is worth
        groups.sort(key=lambda group: -sum(sorted((row[e] for e in group), reverse=True)[:best]))
        within = sorted((e for group in groups[:topk_groups] for e in group), key=lambda e: -row[e])
        rows.append(within[:top_k])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(keys), top_k).to(keys.device)


def switch(probs: Tensor, topk_ids: Tensor) -> Tensor:
    """E * sum of f_e P_e over these tokens; 0 where there are none, or a single expert."""
    num_experts = probs.shape[1]
    if not len(probs) or num_experts == 1:
        return probs.new_zeros(())
    f = F.one_hot(topk_ids, num_experts).to(probs.dtype).mean(dim=(0, 1))
    return num_experts * (f * probs.mean(dim=0)).sum()


def reference(
    x: Tensor, p: dict[str, Tensor], config: ep.MoEConfig, sizes: list[int], bias: Tensor | None,
    given_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [T, D] of all ranks, a whole layer's parameters -> y [T, D], the balance's loss, the chosen experts."""
    options = config.option(ep.RoutingOptions)
    logits = x @ p["router.gate.weight"].t() + p["router.gate.bias"]
    scores = torch.sigmoid(logits) if config.router == "sigmoid" else torch.softmax(logits, 1)
    probs = scores / scores.sum(1, keepdim=True)
    keys = scores.detach() if bias is None else scores.detach() + bias
    ids = choose(keys, config.top_k, options.num_groups, options.topk_groups)
    ids = ids if given_ids is None else given_ids
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(1, keepdim=True) if options.normalize_topk else weights
    weights = options.routed_scaling_factor * weights
    hidden = F.gelu(torch.einsum("td,edf->tef", x, p["experts.w1"]) + p["experts.b1"])
    every = torch.einsum("tef,efd->ted", hidden, p["experts.w2"]) + p["experts.b2"]
    y = (weights[:, :, None] * every.gather(1, ids[:, :, None].expand(-1, -1, x.shape[1]))).sum(1)
    total = len(x)
    loss = logits.new_zeros(())
    if total and config.balance == "aux":
        loss = loss + switch(probs, ids)
    for shard_probs, shard_ids in zip(probs.split(sizes), ids.split(sizes), strict=True):
        if total and config.balance == "aux_local":
            loss = loss + len(shard_ids) / total * switch(shard_probs, shard_ids)
        for start in range(0, len(shard_ids), options.sequence_length):
            part = shard_probs[start : start + options.sequence_length]
            by_score = part.topk(config.top_k, dim=1).indices
            loss = loss + options.sequence_alpha * len(part) / total * switch(part, by_score)
    z = torch.log(torch.exp(logits).sum(1)).square().sum() / max(1, total)
    return y, loss + options.z_alpha * z, ids


def run_case(case: dict, config: ep.MoEConfig, mesh: ep.Mesh, device: torch.device) -> dict:
    """One case on all ranks -> this rank's errors."""
    comm, ep_group = mesh.batch, mesh.ep
    dtype, low = ep.DTYPES[config.dtype], config.dtype == "bfloat16"
    sizes = [case["tokens"][rank % len(case["tokens"])] for rank in range(comm.size)]
    generator = torch.Generator().manual_seed(17)
    total, d, num_experts = sum(sizes), config.hidden_dim, config.num_experts
    draws = torch.randn(2, total, d, generator=generator, dtype=torch.float64)
    x_all, target = draws[0].to(dtype).to(device), 0.1 * draws[1].to(device)
    bias = 0.3 * torch.randn(num_experts, generator=generator).to(device)
    mine = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))

    def make_layer(among: ep.Mesh) -> ep.EPMoE:
        layer = ep.EPMoE(config, among, seed=3, device=device)
        with torch.no_grad():
            if case["bias"] is not None:
                layer.router.gate.weight.mul_(0.1)
                layer.router.gate.bias += torch.tensor(case["bias"], device=device)[:num_experts]
            if config.balance == "bias" and case["bias"] is None:
                layer.balance.bias.copy_(bias)
        return layer

    layer = make_layer(mesh)
    x = x_all[mine].clone().requires_grad_()
    before = {name: mesh.meter.total(name) for name in ep.PASSES}
    y = layer(x)
    aux = ep.aux_loss(layer)
    ((y.double() - target[mine]).square().sum() / max(1, total) + ALPHA * aux.double()).backward()
    aux_total = aux.detach().clone()
    ep.sync_gradients(layer, mesh, aux_total)
    counted = torch.tensor([mesh.meter.total(name) - before[name] for name in ep.PASSES], device=device)
    counted = comm.all_reduce(counted).tolist()

    whole = make_layer(mesh_of(ep.Communicator.alone()))
    parameters = {name: p.detach().double().requires_grad_() for name, p in whole.named_parameters()}
    x_ref = x_all.double().requires_grad_()
    topk_ids = everyones_rows(layer.topk_ids, comm)
    chosen_bias = whole.balance.bias
    y_ref, aux_ref, ids_ref = reference(
        x_ref, parameters, config, sizes, None if chosen_bias is None else chosen_bias.double(),
        topk_ids if low else None,
    )  # fmt: skip
    ((y_ref - target).square().sum() / max(1, total) + ALPHA * aux_ref).backward()

    num_local = num_experts // ep_group.size
    own = slice(ep_group.rank * num_local, (ep_group.rank + 1) * num_local)
    errors = {
        "topk_ids": float((topk_ids.sort(1).values != ids_ref.sort(1).values).sum()),
        "y": relative_error(y.detach(), y_ref[mine]),
        "aux": relative_error(aux_total, aux_ref),
        "x.grad": relative_error(x.grad, x_ref.grad[mine]),
    } | parameter_errors(layer, {name: p.grad for name, p in parameters.items()}, own)
    tables = ep.predicted_bytes(layer, x_needs_grad=True)
    predicted = [int(table[ep_group.rank].sum()) for table in tables.values()]
    predicted = comm.all_reduce(torch.tensor(predicted, device=device)).tolist()
    errors["bytes"] = float(sum(abs(p - c) for p, c in zip(predicted, counted, strict=True)))
    home = torch.arange(comm.size, device=device).repeat_interleave(torch.tensor(sizes, device=device))
    if (topk_ids // num_local != home[:, None] % ep_group.size).any() and not sum(counted):
        errors["bytes"] = float("inf")
    made = torch.bincount(topk_ids.flatten(), minlength=num_experts)
    if config.balance == "bias":  # every choice, once
        errors["counted"] = float((comm.all_reduce(layer.balance.load.clone()) - made).abs().sum())
    load = torch.bincount(topk_ids.flatten().cpu(), minlength=num_experts)
    return {"errors": errors, "rows_received": int(load[own].sum())}


def make_config(
    case: dict, router: str, balance: str, normalize: bool, groups: int, **more
) -> ep.MoEConfig | None:
    """The config of a variant in a case; None where the options refuse it, or cannot give the case what it wants."""
    sizes = SIZES | {k: case[k] for k in SIZES if k in case}
    try:
        options = ep.RoutingOptions(
            normalize_topk=normalize, num_groups=groups, topk_groups=1, z_alpha=Z_ALPHA,
            sequence_alpha=SEQUENCE_ALPHA, sequence_length=LENGTH, routed_scaling_factor=2.5 if normalize else 1.0,
        )  # fmt: skip
        extras = [options]
        if getattr(ep.REGISTRIES["dispatcher"].get(more.get("dispatcher")), "needs_capacity", False):
            more["max_num_tokens"] = 16
            extras.append(ep.CapacityOptions(float(sizes["num_experts"])))  # room for everything
        return ep.MoEConfig(**sizes, router=router, balance=balance, extras=tuple(extras), **more)
    except ValueError:
        return None


def plan(world_size: int, num_groups: int) -> list[tuple[tuple, str, str]]:
    """(variant, dtype, case): every variant in float64 on a few cases, or on one where ranks are fewer than four or
    num_groups groups hold all experts each; those that differ most on all cases, and in low precision on one."""
    found = []
    for variant, name in product(VARIANTS, plain_cases(world_size)):
        few = FEW_CASES if (world_size, num_groups) == (4, 1) else ("uneven",)
        is_plain = variant[2:] in PLAIN and num_groups == 1
        if name in few or is_plain:
            found.append((variant, "float64", name))
        if name == "uneven" and is_plain:
            found += [(variant, dtype, name) for dtype in LIMITS if dtype != "float64"]
    return found


PLAIN = ((False, 1), (True, 4))  # normalize and groups of the variants that run everything


def fitting(variant: tuple, dtype: str, name: str, mesh: ep.Mesh, device: torch.device) -> list[str]:
    """The dispatchers that a case is tried with: all that can run here on `uneven`, with each router and the bias,
    else auto's; what else a balance does, no dispatcher sees."""
    if (dtype, name, variant[1]) != ("float64", "uneven", "bias") or variant[2:] not in PLAIN:
        return ["auto"]
    some = ep.MoEConfig(dtype=dtype)
    kinds = ep.REGISTRIES["dispatcher"].items()
    return [name for name, kind in kinds if kind.preference(some, device, mesh.ep.size) > 0]


def parity_on(mesh: ep.Mesh, chosen: list[tuple[tuple, str, str]]) -> list[dict]:
    """Each (variant, dtype, case) that the options allow -> results. Collective."""
    comm, results, device = mesh.batch, [], torch.device("cpu")
    known = plain_cases(comm.size)
    known["uneven"]["tokens"] = [13, 5, 9, 1]  # few, for the capacity's buffers
    for variant, dtype, name in chosen:
        router, balance, normalize, groups = variant
        for dispatcher in fitting(variant, dtype, name, mesh, device):
            config = make_config(
                known[name], router, balance, normalize, groups, dtype=dtype, dispatcher=dispatcher
            )
            if config is None:
                continue
            facts = [run_case(known[name], config, mesh, device)]
            if comm.size > 1:
                gathered: list = [None] * comm.size
                dist.all_gather_object(gathered, facts[0])
                facts = gathered
            results.append(
                {
                    "case": name, "mesh": f"{comm.size // mesh.ep.size} x {mesh.ep.size}",
                    "router": router, "balance": balance, "normalize": normalize, "groups": groups,
                    "dtype": dtype, "dispatcher": dispatcher, "limit": LIMITS[dtype],
                    "errors": {q: max(f["errors"][q] for f in facts) for q in facts[0]["errors"]},
                    "rows_received": [f["rows_received"] for f in facts],
                }
            )  # fmt: skip
    return results


@trial(1, 2, 4, limit_s=900)
def parity(mesh: ep.Mesh, folder: Path) -> list[dict] | None:
    """The plan on all ranks, and on four also as a 2 x 2 mesh -> the results, of rank 0."""
    size = mesh.batch.size
    found = parity_on(mesh, plan(size, 1))
    if size == 4:
        found += parity_on(ep.init_ep(2), plan(size, 2))
    return found if mesh.batch.rank == 0 else None


WEIGHTS = "probs.gather(1, topk_ids)"
BROKEN = {  # {what: (what stands in the launcher, what stands in its copy)}
    "own tokens": (
        "self.batch.all_reduce(probs.new_full((), len(probs)))",
        "probs.new_full((), len(probs))",
    ),
    "own tokens, in added losses": (
        " batch.all_reduce(total.new_full((), len(routing.probs)))",
        " total.new_full((), len(routing.probs))",
    ),
    "biased weights": (
        f"topk_weights = {WEIGHTS}",
        f"topk_weights = keys.gather(1, topk_ids) + 0 * {WEIGHTS}",
    ),
}


@trial(2)
def broken(mesh: ep.Mesh, folder: Path) -> dict[str, int]:
    """{what: how many results are over their limit in a copy of the code that is wrong there}."""
    found = {}
    for what in BROKEN:
        with copied_code(folder.parent / "broken_balance" / what):
            import balance_trials as copy

            mesh = copy.ep.init_ep()
            results = copy.parity_on(
                mesh, [one for one in copy.plan(2, 1) if one[1:] == ("float64", "uneven")]
            )
        found[what] = sum(not max(r["errors"].values()) <= r["limit"] for r in results)
    return found


def curve_methods(num_tokens: int, world_size: int) -> dict[str, dict]:
    """{name: config changes and, under `options`, RoutingOptions}; sequences that fit into every rank's share."""
    length = num_tokens // world_size if num_tokens % world_size == 0 else 1
    every = {"z_alpha": 0.1, "sequence_alpha": 0.5, "sequence_length": length}
    return {
        "aux": {"options": {}},
        "aux_local": {"balance": "aux_local", "options": {}},
        "aux and all losses": {"options": every},
        "bias and all losses": {
            "balance": "bias", "router": "sigmoid",
            "options": every | {
                "bias_speed": 0.01, "normalize_topk": True, "num_groups": 4, "topk_groups": 1,
            },
        },
        "bias and all losses, recomputed": {
            "balance": "bias", "router": "sigmoid", "recomputed": True,
            "options": every | {
                "bias_speed": 0.01, "normalize_topk": True, "num_groups": 4, "topk_groups": 1,
            },
        },
        "sequences of a fourth": {"balance": "none", "options": {"sequence_alpha": 1.0, "sequence_length": length}},
    }  # fmt: skip


class Recomputed(nn.Module):
    """A layer under activation checkpointing."""

    def __init__(self, layer: ep.EPMoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


class Training:
    """A layer, its optimiser and its stream; step by step."""

    def __init__(self, method: dict, mesh: ep.Mesh, num_tokens: int, sort_tokens: bool) -> None:
        changes = dict(method)
        is_recomputed = changes.pop("recomputed", False)
        extras = (ep.RoutingOptions(**changes.pop("options")), ep.ClusterOptions(8, 1.5, sort_tokens))
        config = ep.MoEConfig(**CURVE_SIZES, **changes, extras=extras)
        self.layer, self.mesh = ep.EPMoE(config, mesh, seed=1), mesh
        self.model = Recomputed(self.layer) if is_recomputed else self.layer
        self.stream = ep.ClusterStream(config, 1, num_tokens, mesh.batch)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        self.options = ep.TrainingOptions(aux_alpha=0.1)

    def step(self) -> list[float]:
        """One step -> its global task and aux loss."""
        self.optimizer.zero_grad()
        losses = ep.train_step(self.model, self.mesh, self.stream, [self.stream.next()], self.options)
        self.optimizer.step()
        ep.after_step(self.model)
        return losses.tolist()

    def state(self) -> dict:
        """All that a checkpoint needs."""
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "generator": self.stream.generator.get_state(),
        }  # fmt: skip

    def load(self, state: dict) -> None:
        """Goes on from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.generator.set_state(state["generator"])


STEPS = 40


@trial(4, limit_s=900)
def curves(mesh: ep.Mesh, folder: Path) -> list[dict] | None:
    """Curves on groups of 1, 2 and 4 ranks and on a 2 x 2 mesh, every rank with its own topics, 64 tokens a step
    and 3; all biases; of rank 0."""
    rank, world_size = mesh.batch.rank, mesh.batch.size
    found, meshes = [], {"2 x 2": ep.init_ep(2)}
    for size in (1, 2, 4):
        group = dist.new_group(range(size), timeout=timedelta(seconds=60))
        if rank < size:
            meshes[str(size)] = mesh_of(ep.Communicator(group))
    for size, mesh in meshes.items():
        for num_tokens, names in ((64, None), (3, ("aux and all losses", "bias and all losses"))):
            for name, method in curve_methods(num_tokens, world_size).items():
                if names and name not in names:
                    continue
                training = Training(method, mesh, num_tokens, sort_tokens=True)
                curve = [training.step() for _ in range(STEPS if num_tokens == 64 else STEPS // 4)]
                bias = training.layer.balance.bias
                biases: list = [None] * mesh.batch.size
                dist.all_gather_object(
                    biases, None if bias is None else bias.tolist(), group=mesh.batch.group
                )
                found.append(
                    {
                        "size": size, "tokens": num_tokens, "method": name, "curve": curve, "biases": biases,
                    }
                )  # fmt: skip
    return found if rank == 0 else None


@trial(2)
def resume(mesh: ep.Mesh, folder: Path, steps: int = 40) -> dict:
    """This rank's facts: a run of `steps`, and one that stops half-way, is saved, built anew, loaded, and goes on."""
    comm = mesh.batch
    method = curve_methods(64, comm.size)["bias and all losses"]
    through = Training(method, mesh, 64, False)
    whole = [through.step() for _ in range(steps)]
    stopped = Training(method, mesh, 64, False)
    halves = [stopped.step() for _ in range(steps // 2)]
    path = folder / f"resume-{comm.rank}-of-{comm.size}.pt"
    torch.save(stopped.state(), path)
    again = Training(method, mesh, 64, False)
    again.load(torch.load(path, weights_only=True))
    halves += [again.step() for _ in range(steps - steps // 2)]
    first, second = through.model.state_dict(), again.model.state_dict()
    forgetful = Training(method, mesh, 64, False)
    state = torch.load(path, weights_only=True)
    state["model"]["balance.bias"].zero_()
    forgetful.load(state)
    lost = [forgetful.step() for _ in range(steps - steps // 2)]
    return {
        "same_curve": whole == halves,
        "same_state": all(torch.equal(first[name], second[name]) for name in first),
        "same_without_bias": lost == whole[steps // 2 :],
        "names": sorted(first),
        "bias": first["balance.bias"].tolist(),
    }


FLAGS = ["--task", "clusters", "--num-clusters", "8", "--sort-tokens", "--router", "sigmoid", "--balance", "bias",
         "--bias-speed", "0.01", "--normalize-topk", "--num-groups", "4", "--topk-groups", "2", "--z-alpha", "0.1",
         "--sequence-alpha", "0.1", "--sequence-length", "16", "--dtype", "float64", "--steps", "40",
         "--log-interval", "10", "--tokens", "32", "--hidden-dim", "32", "--ffn-dim", "32"]  # fmt: skip


@trial(1, 2)
def every_flag(mesh: ep.Mesh, folder: Path) -> dict:
    """A run of the launcher, its log beside the results."""
    return train(FLAGS, folder / f"runs{mesh.batch.size}")


@trial(1)
def graph(mesh: ep.Mesh, folder: Path) -> dict | None:
    """On a GPU: routing, losses and the bias's step without a synchronisation, and replayed from a CUDA graph."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda")
    options = ep.RoutingOptions(
        normalize_topk=True, num_groups=4, topk_groups=2, z_alpha=0.1, sequence_alpha=0.1, sequence_length=8
    )
    config = ep.MoEConfig(**SIZES, router="sigmoid", balance="bias", extras=(options,))
    comm, x = ep.Communicator.alone(), torch.zeros(32, SIZES["hidden_dim"], device=device)
    batches = torch.randn(5, *x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    router = ep.SigmoidRouter(config, 0, device)

    def step(balance: ep.BiasBalance) -> Tensor:
        routing = router(x, balance.bias)
        loss = balance(routing) + options.added_loss(routing, config, comm)
        balance.load += ep.count_choices(routing.topk_ids, config.num_experts)
        balance.after_step()
        return loss

    eager, graphed = (ep.BiasBalance(config, comm, device) for _ in range(2))
    step(eager)  # libraries start here
    eager.bias.zero_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    losses = []
    for batch in batches:
        x.copy_(batch)
        losses.append(step(eager).detach().clone())
    torch.cuda.set_sync_debug_mode("default")
    captured = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(captured):
        loss = step(graphed)
    graphed.bias.zero_()
    replayed = []
    for batch in batches:
        x.copy_(batch)
        captured.replay()
        replayed.append(loss.clone())
    return {
        "same_bias": torch.equal(eager.bias, graphed.bias),
        "same_loss": torch.allclose(torch.stack(losses), torch.stack(replayed), rtol=1e-5),
        "bias": graphed.bias.tolist(),
    }
