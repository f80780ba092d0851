"""Chapter 07's exact all-to-all on real ranks: bytes, corrupt counts, the exchange's backward, ranks with nothing."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from trials import trial

from ep_launcher import launcher as ep


def corrupted(stage: str, where: int, column: int) -> Callable:
    """An all_to_all that, on rank `where`, damages a number of the counts before they are sent, or when they come."""
    honest = ep.Communicator.all_to_all

    def all_to_all(self, x, input_splits, output_splits, purpose):
        is_hit = purpose == "metadata" and self.rank == where
        if is_hit and stage == "sent":
            x = x.clone()
            x[1, column] += 1
        out = honest(self, x, input_splits, output_splits, purpose)
        if is_hit and stage == "received":
            out[0, column] += 1
        return out

    return all_to_all


def try_corrupt(mesh: ep.Mesh, folder: Path, name: str, stage: str, where: int, column: int) -> None:
    """Writes down what this rank says when a count is damaged in the second of two steps, and ends the process.

    Played by itself: gloo tells the others at once where a process ends, and not before.
    """
    config = ep.MoEConfig(num_experts=8, hidden_dim=16, ffn_dim=16, dispatcher="all_to_all")
    layer, honest = ep.EPMoE(config, mesh, seed=0), ep.Communicator.all_to_all
    dist.set_debug_level(dist.DebugLevel.INFO)  # counts travel sealed
    said = "noticed nothing"
    try:  # the first step too: a slow rank may be in it when another has ended
        layer(torch.randn(6, 16)).sum().backward()
        ep.Communicator.all_to_all = corrupted(stage, where, column)
        layer(torch.randn(6, 16)).sum().backward()
    except ep.CollectiveError as error:
        said = str(error)
    finally:
        ep.Communicator.all_to_all = honest
    found = {"error": "", "result": said}
    (folder / f"{name}-{mesh.batch.size}-{mesh.batch.rank}.json").write_text(json.dumps(found))
    os._exit(0)


@trial(2)
def corrupt_when_sent(mesh: ep.Mesh, folder: Path) -> None:
    try_corrupt(mesh, folder, "corrupt_when_sent", "sent", 0, 0)


@trial(2)
def corrupt_when_received(mesh: ep.Mesh, folder: Path) -> None:
    try_corrupt(mesh, folder, "corrupt_when_received", "received", 1, 2)


@trial(4)
def corrupt_for_one_of_four(mesh: ep.Mesh, folder: Path) -> None:
    try_corrupt(mesh, folder, "corrupt_for_one_of_four", "sent", 0, 1)


@trial(2)
def seals(mesh: ep.Mesh, folder: Path) -> None:
    """Counts travel with a seal of three integers where torch's debug level says so, and only there."""
    sent = {}
    for level in (dist.DebugLevel.OFF, dist.DebugLevel.INFO):
        dist.set_debug_level(level)
        own = ep.Communicator()
        ep.announce(torch.tensor([3, 0, 1, 2]), 64, own)()
        sent[level] = own.meter.total("metadata")
    dist.set_debug_level(dist.DebugLevel.OFF)
    assert list(sent.values()) == [2 * 8, (2 + 3) * 8], sent


@trial(2, 4)
def even_load(mesh: ep.Mesh, folder: Path) -> None:
    """Under even load the all-gather sends W times the bytes, to every rank; all are predicted, by destination."""
    size, rank = mesh.batch.size, mesh.batch.rank
    config = ep.MoEConfig(num_experts=16, top_k=2, hidden_dim=256)
    ids = torch.arange(32 * 2).view(32, 2) % 16  # every expert equally often
    x, w, sent = torch.randn(32, 256, requires_grad=True), torch.full((32, 2), 0.5, requires_grad=True), {}
    for name in ("all_gather", "all_to_all"):
        own = ep.Communicator()
        dispatcher = ep.REGISTRIES["dispatcher"][name].for_layer(config, own)
        arrived = dispatcher.dispatch(x, ids, w)
        dispatcher.combine(arrived.x * arrived.topk_weights, arrived.handle).sum().backward()
        predicted = dispatcher.predict_bytes([ids] * size, 256, torch.float32)
        for part in ep.PASSES:
            assert own.meter.sent[part] == predicted[part][rank].tolist(), (name, part)
        sent[name] = torch.tensor(own.meter.sent["combine"])
    assert torch.equal(sent["all_gather"], size * sent["all_to_all"]), sent
    assert sent["all_to_all"].sum() > 0


def nothing_arrives(mesh: ep.Mesh, dispatcher: str, extras: tuple = ()) -> None:
    """Rank 1 has no tokens, and its experts get no rows: it enters everything all the same."""
    sizes = {"num_experts": 4, "top_k": 2, "hidden_dim": 8, "ffn_dim": 8, "dtype": "float64"}
    config = ep.MoEConfig(**sizes, dispatcher=dispatcher, extras=extras)
    layer, is_empty = ep.EPMoE(config, mesh, seed=0), mesh.batch.rank == 1
    x = torch.randn(0 if is_empty else 5, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1]]).expand(len(x), 2).clone()
    ids[2:3] = -1  # and one token is not sent
    weights = torch.full((len(x), 2), 0.5, dtype=torch.float64, requires_grad=True)
    arrived = layer.dispatcher.dispatch(x, ids, weights)
    y = layer.dispatcher.combine(layer.experts(arrived), arrived.handle)
    y.sum().backward()
    mesh.batch.all_reduce(torch.zeros(1))  # all ranks are still in step
    assert y.shape == x.shape and x.grad.shape == x.shape
    assert all(p.grad is not None for p in layer.experts.parameters())
    if is_empty:
        assert all(p.grad.abs().max() == 0 for p in layer.experts.parameters())
        return
    assert y[2].abs().max() == 0 and x.grad[2].abs().max() == 0 and weights.grad[2].abs().max() == 0
    one = torch.ones(1, 1, dtype=torch.float64)
    expert = [layer.experts(ep.Arrived(x.detach()[:1], torch.tensor([[e]]), one)) for e in (0, 1)]
    assert torch.allclose(y[0], (expert[0] + expert[1])[0] / 2)
    assert torch.allclose(weights.grad[0], torch.stack([e.sum() for e in expert]))


@trial(2)
def nothing(mesh: ep.Mesh, folder: Path) -> None:
    nothing_arrives(mesh, "all_to_all")


@trial(2, 4)
def there_and_back(mesh: ep.Mesh, folder: Path) -> None:
    """Rows sent and returned around a function of each rank, and the gradients of rows and weights."""
    comm, size = mesh.ep, mesh.ep.size
    torch.manual_seed(comm.rank)
    ids = torch.rand([0, 7, 3, 5][comm.rank], 8).topk(3).indices
    ids[ids == 2] = -1  # expert 2's rank gets fewer, and some choices are not sent
    x = torch.randn(len(ids), 6, dtype=torch.float64, requires_grad=True)
    w = torch.rand(ids.shape, dtype=torch.float64, requires_grad=True)
    order = ep.order_rows(ids, 8)
    plan = ep.announce(order.counts, 64, comm)
    rows, weights, _ = ep.ReceiveRows.apply(*ep.SendRows.apply(x, w, order, plan, comm), 6)
    assert len(rows) == len(plan().topk_ids) == sum(plan().counts_on_host)
    y = ep.SumReturned.apply(
        *ep.ReturnRows.apply((rows * weights).sin() * (comm.rank + 1), plan(), comm), order
    )
    y.square().sum().backward()
    x0, w0 = (t.detach().clone().requires_grad_() for t in (x, w))
    owner = (ids // (8 // size) + 1).double() * (ids >= 0)
    right = ((x0[:, None] * w0[:, :, None]).sin() * owner[:, :, None]).sum(1)
    right.square().sum().backward()
    for ours, theirs in ((y, right), (x.grad, x0.grad), (w.grad, w0.grad)):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13), (ours - theirs).abs().max()
