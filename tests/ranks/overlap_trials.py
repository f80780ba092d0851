"""Chapter 12 on real ranks: equal bits, the order in which things happen, curves, exchanges that are not ended."""

import importlib
import json
import os
import time
from pathlib import Path

import torch
from trials import copied_code, leave_group, train, trial

from ep_launcher import launcher as ep
from tools.exercises.overlap import hidden, watch

SIZES = {"num_experts": 8, "top_k": 2, "hidden_dim": 16, "ffn_dim": 24, "max_num_tokens": 32}
TOKENS = {"none": [0], "one": [1], "odd": [13], "a half without tokens": [1, 8, 0, 5]}
# {what: (what stands in the launcher, what stands in its copy)}
FORGOTTEN = {
    "combine": (
        "y = torch.cat([dispatcher.end_combine(a), dispatcher.end_combine(b)])",
        "y = torch.cat([dispatcher.end_combine(a), b[0][0].new_zeros(len(x) // 2, x.shape[1])])",
    ),
}
STEPS = 60
RUNS = {
    "tbo": "--overlap tbo --num-shared-experts 1",
    "shared": "--overlap shared --num-shared-experts 1 --dispatcher dedup",
    "tbo, global capacity": "--overlap tbo --capacity-factor 1 --capacity-scope global --balance bias "
    "--bias-speed 0.01",
    "tbo, two stages": "--overlap tbo --dispatcher two_stage --ranks-per-host 1",
    "tbo, slots": "--overlap tbo --dispatcher gather_tokens",
}


class InTurn(ep.InOrder):
    """The halves of tbo, one after the other."""

    num_parts = 2

    @staticmethod
    def forward(layer: ep.EPMoE, x: torch.Tensor, routing: ep.Routing) -> torch.Tensor:
        tensors = x, routing.topk_ids, routing.topk_weights
        arrived = []
        for part in zip(*(t.tensor_split(2) for t in tensors), strict=True):
            here = layer.dispatcher.dispatch(*part)
            arrived.append(layer.dispatcher.combine(layer.experts(here), here.handle))
        y = torch.cat(arrived)
        return y if layer.shared is None else y + layer.shared(x)


def passed(mesh: ep.Mesh, order: str, dispatcher: str, num_tokens: int) -> list[torch.Tensor]:
    """y and all gradients of a layer with a shared expert, in an order."""
    config = ep.MoEConfig(**SIZES, num_shared_experts=1, dispatcher=dispatcher, overlap=order)
    layer = ep.EPMoE(config, mesh, seed=0)
    generator = torch.Generator().manual_seed(mesh.batch.rank)
    x = torch.randn(num_tokens, SIZES["hidden_dim"], generator=generator, requires_grad=True)
    y = layer(x)
    (y.square().sum() + ep.aux_loss(layer)).backward()
    ep.sync_gradients(layer, mesh)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@trial(1, 2, 4)
def equal(mesh: ep.Mesh, folder: Path) -> dict[str, list[bool]]:
    """{dispatcher, tokens: [shared is none, tbo is the same halves in turn]}, bit by bit."""
    ep.REGISTRIES["overlap"]["in turn"] = InTurn
    found = {}
    for name, kind in ep.REGISTRIES["dispatcher"].items():
        config = ep.MoEConfig(**SIZES)
        if kind.needs_capacity or kind.preference(config, torch.device("cpu"), mesh.ep.size) <= 0:
            continue
        for what, sizes in TOKENS.items():
            tokens = sizes[mesh.batch.rank % len(sizes)]
            pairs = ("none", "shared"), ("in turn", "tbo")
            found[f"{name}, {what}"] = [
                all(
                    torch.equal(a, b)
                    for a, b in zip(*(passed(mesh, o, name, tokens) for o in pair), strict=True)
                )
                for pair in pairs
            ]
    return found


@trial(2)
def orders(mesh: ep.Mesh, folder: Path) -> dict[str, list]:
    """{order: [events, how many exchanges are hidden]}."""
    ep.REGISTRIES["overlap"]["in turn"] = InTurn
    found = {}
    for order in ("none", "in turn", "tbo"):
        layer = ep.EPMoE(ep.MoEConfig(**SIZES, dispatcher="all_to_all", overlap=order), mesh, seed=0)
        events = watch(layer, torch.randn(12, SIZES["hidden_dim"], requires_grad=True))
        found[order] = [events, sum(hidden(events).values())]
    return found


@trial(1, 2, 4)
def curves(mesh: ep.Mesh, folder: Path) -> dict[str, list]:
    """{run: [losses, bytes]}."""
    small = (
        f"--dtype float64 --hidden-dim 16 --ffn-dim 16 --tokens 37 --lr 3e-3 --log-interval 1 --steps {STEPS}"
    )
    found = {}
    for name, flags in RUNS.items():
        measured = train(
            f"{small} {flags if mesh.batch.size > 1 else flags.split(' --dispatcher')[0]}".split()
        )
        found[name] = [measured["task_loss"], measured["bytes_sent_per_step"]]
    return found


@trial(2)
def forgotten(mesh: ep.Mesh, folder: Path) -> str:
    """What a copy of the code says whose order leaves out an end."""
    with copied_code(folder.parent / "broken_overlap" / "combine"):
        broken = importlib.import_module("ep_launcher.launcher")
        config = broken.MoEConfig(**SIZES, dispatcher="all_to_all", overlap="tbo")
        layer = broken.EPMoE(config, broken.init_ep(), seed=0)
        layer(torch.randn(8, 16)).sum().backward()
        try:
            broken.sync_gradients(layer, layer.mesh)
        except RuntimeError as error:
            path = broken.__file__
            return broken.describe_frames(error, path, broken.read_cell_markers(path))[0]
        finally:
            leave_group()
    return "noticed nothing"


@trial(2)
def refused(mesh: ep.Mesh, folder: Path) -> list[str]:
    """What runs say that cannot overlap."""
    said = []
    for flags in ("--overlap shared", "--overlap tbo --dispatcher capacity --capacity-factor 1"):
        try:
            train([*flags.split(), "--steps", "2"])
        except ep.CannotRun as error:
            said.append(str(error))
    return said


@trial(2)
def ended_twice(mesh: ep.Mesh, folder: Path) -> list[str]:
    """What the second end of an exchange says."""
    layer, said = ep.EPMoE(ep.MoEConfig(**SIZES, dispatcher="dedup"), mesh, seed=0), []
    routing = layer.router(x := torch.randn(5, 16))
    pending = layer.dispatcher.begin_dispatch(x, routing.topk_ids, routing.topk_weights)
    arrived = layer.dispatcher.end_dispatch(pending)
    home = layer.dispatcher.begin_combine(layer.experts(arrived), arrived.handle)
    layer.dispatcher.end_combine(home)
    for end, what in ((layer.dispatcher.end_dispatch, pending), (layer.dispatcher.end_combine, home)):
        try:
            end(what)
        except RuntimeError as error:
            said.append(str(error))
    ep.check_ended(mesh.meter)
    return said


@trial(2)
def dies_under_way(mesh: ep.Mesh, folder: Path) -> None:
    """Rank 1 ends while an exchange is under way; rank 0 writes down what it says, and in how many seconds.

    Played by itself, as its processes end here.
    """
    rank, x = mesh.batch.rank, torch.zeros(4_000_000)
    mesh.ep.all_to_all(x, [2_000_000] * 2, [2_000_000] * 2, "dispatch")
    said, seconds = "", 0.0
    if rank == 0:
        pending, start = (
            mesh.ep.begin_all_to_all(x, [2_000_000] * 2, [2_000_000] * 2, "dispatch"),
            time.time(),
        )
        try:
            pending.wait()
        except ep.CollectiveError as error:
            said, seconds = str(error), time.time() - start
        said += f"; under way {len(mesh.meter.under_way)}"
    found = {"error": "", "result": [said, seconds]}
    (folder / f"dies_under_way-2-{rank}.json").write_text(json.dumps(found))
    os._exit(0)
