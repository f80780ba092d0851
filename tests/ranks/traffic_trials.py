"""Chapter 10's dispatchers on real ranks and pretended machines: parity, bytes counted by hand, ranks with nothing."""

from pathlib import Path

import torch
from exchange_trials import nothing_arrives
from parity_trials import run_broken, wanted
from trials import train, trial

from ep_launcher import launcher as ep
from tools.parity import LIMITS, run_suite

MACHINES = {2: [1], 4: [2], 8: [2, 4]}  # {world size: ranks a machine}
FEW = ["uneven", "rank_without_tokens", "rank_without_rows"]
BROKEN = {  # {what: (what stands in the launcher, what stands in its copy)}
    "an id that is one off": ("topk_ids % num_local_experts)", "(topk_ids + 1) % num_local_experts)"),
    "a choice on the wrong machine": ("own = topk_ids.cpu() - machine * num_experts", "own = topk_ids.cpu()"),
    "a copy too many": ("is_copy = reached(owner, num_ranks)", "is_copy = reached(owner, num_ranks) * 0 + 1"),
}

BROKEN_ON = (2, 4, 2)  # ranks; a machine of one rank does not care how its choices are numbered


@trial(*MACHINES, limit_s=900)
def machines(mesh: ep.Mesh, folder: Path) -> dict[int, list[dict]] | None:
    """two_stage with auto's experts against the reference -> {ranks a machine: results}, of rank 0."""
    size, found = mesh.batch.size, {}

    def on_machines(dispatcher: str, experts: str, *kinds: str) -> list[str]:
        if (experts, kinds[0]) != ("blocks", "gelu"):
            return []  # test_parity.py: to the experts it is one machine
        return FEW if size == 8 else wanted(size, dispatcher, experts, *kinds)

    for ranks_per_host in MACHINES[size]:
        extras = (ep.TrafficOptions(ranks_per_host=ranks_per_host),)
        dtypes = ["float64"] if size == 8 else list(LIMITS)
        found[ranks_per_host] = run_suite(torch.device("cpu"), dtypes, mesh, "two_stage", extras, on_machines)
    return found if mesh.batch.rank == 0 else None


def add_broken(number: int, world_size: int) -> None:
    """The trial `broken_copy_NUMBER`, on two machines."""

    def run(mesh: ep.Mesh, folder: Path) -> tuple[int, str]:
        flags = "--dispatcher two_stage --dtypes float64 --cases even --ranks-per-host".split()
        return run_broken(folder.parent / "broken_traffic" / str(number), [*flags, str(world_size // 2)])

    run.__name__ = f"broken_copy_{number}"
    trial(world_size)(run)


for number, world_size in enumerate(BROKEN_ON):
    add_broken(number, world_size)


@trial(2)
def nothing(mesh: ep.Mesh, folder: Path) -> None:
    """Rank 1 has no tokens, and its experts get no rows."""
    for name in ("gather_tokens", "dedup", "two_stage"):
        nothing_arrives(mesh, name, (ep.TrafficOptions(ranks_per_host=1 if name == "two_stage" else None),))


@trial(4)
def refused(mesh: ep.Mesh, folder: Path) -> str:
    """What a run says whose ranks do not fill their machines."""
    try:
        train(["--dispatcher", "two_stage", "--ranks-per-host", "3", "--steps", "2"])
    except ValueError as error:
        return str(error)
    return "nothing"


def choices(rank: int, local: int) -> torch.Tensor:
    """Some tokens' choices, of 16 experts: all of one rank, three of four not sent, and others."""
    ids = torch.rand(6 + rank, 16, generator=torch.Generator().manual_seed(rank)).topk(4).indices
    ids[0] = torch.arange(4) if local >= 4 else ids[0]
    ids[1, 1:] = -1
    return ids


def places(line: list[int], size: int) -> set[int]:
    """Where a token's choices live, by plain Python."""
    return {e // size for e in line if e >= 0}


def rows_by_hand(name: str, everyones: list, rank: int, local: int, ranks_per_host: int) -> list[int]:
    """How many rows' gradients this rank sends home to each other rank."""
    size, machine, rows = len(everyones), rank // ranks_per_host, []
    for r in range(size):
        there = r // ranks_per_host
        if name == "gather_tokens":
            count = max(map(len, everyones))
        elif name == "dedup":
            count = sum(r in places(line, local) for line in everyones[rank])
        elif there != machine:  # the same place on another machine: a token with a choice there
            is_there = sum(there in places(line, local * ranks_per_host) for line in everyones[rank])
            count = is_there if r % ranks_per_host == rank % ranks_per_host else 0
        else:  # what came here from this place of every machine, this one included
            lane = range(rank % ranks_per_host, size, ranks_per_host)
            count = sum(r in places(line, local) for source in lane for line in everyones[source])
        rows.append(count * (r != rank))
    return rows


@trial(*MACHINES)
def one_copy(mesh: ep.Mesh, folder: Path) -> None:
    """One copy of a token a rank, and one a machine: counted, predicted, and counted by hand."""
    rank, size, d = mesh.batch.rank, mesh.batch.size, 8
    ids = [choices(r, 16 // size) for r in range(size)]
    x = torch.randn(len(ids[rank]), d, requires_grad=True)
    w = torch.rand(len(x), 4, requires_grad=True)
    for ranks_per_host in MACHINES[size]:
        for name in ("gather_tokens", "dedup", "two_stage"):
            own = ep.Communicator()
            config = ep.MoEConfig(num_experts=16, top_k=4, hidden_dim=d, dispatcher=name,
                                  extras=(ep.TrafficOptions(ranks_per_host=ranks_per_host),))  # fmt: skip
            dispatcher = ep.REGISTRIES["dispatcher"][name].for_layer(config, own)
            arrived = dispatcher.dispatch(x, ids[rank], w)
            weights = arrived.topk_weights.sum(1, keepdim=True)
            dispatcher.combine(arrived.x * weights, arrived.handle).sum().backward()
            rows = rows_by_hand(name, [t.tolist() for t in ids], rank, 16 // size, ranks_per_host)
            sent = own.meter.sent
            assert [n // (d * 4) for n in sent["combine backward"]] == rows, (name, rank, rows, sent)
            predicted = dispatcher.predict_bytes(ids, d, torch.float32)
            for part in ep.PASSES:
                assert sent[part] == predicted[part][rank].tolist(), (name, part)
