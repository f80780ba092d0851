"""Chapter 11's dispatcher on real ranks: bytes counted by hand, ranks with nothing, one that never comes, two slots."""

import gc
import importlib
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from exchange_trials import nothing_arrives
from parity_trials import run_broken
from traffic_trials import choices, places
from trials import DEVICE, copied_code, leave_group, trial

from ep_launcher import launcher as ep

BROKEN = {  # {what: (what stands in the launcher, what stands in its copy)}
    "one place for all": (
        "rows[token] = x[token]  # a token's place",
        "rows[token] = x[token[:1]]  # a token's place",
    ),
    "rows that did not come": (
        "at_home = torch.where(reached(owner, comm.size) > 0, at_home, -1)\n        out",
        "out",
    ),
    "riders of one token": ("slots = torch.full_like(copies, ", "slots = torch.full_like(copies, 1 + "),
}

AGAIN = {  # the same, of a step that is taken again
    "an update that is not skipped": ("optimizer.found_inf = self.is_crowded  #", "pass  #"),
    "a generator that goes on": ("self.training.task.generator.set_state(state)", "pass"),
    "buffers that go on": ("buffer.copy_(kept)\n        seen", "pass\n        seen"),
}  # fmt: skip
CROWDED = (
    "--dispatcher peer --num-experts 16 --top-k 4 --hidden-dim 16 --ffn-dim 16 --steps 12 --log-interval 1 "
    "--balance bias --bias-speed 0.01 --max-grad-norm 1 --lr 1e-2 --dtype "
) + ("float64" if DEVICE == "cpu" else "float32 --step graph")


def curve(launcher: ModuleType, *flags: str) -> dict[str, Any]:
    """What a launcher, or a copy of it, measures, and "log", its lines."""
    config, options = launcher.parse_flags([*CROWDED.split(), *flags, "--device", DEVICE])
    log, lines = launcher.RunLog(Path("."), options.steps, 1), []
    log.write = lines.append
    run = launcher.Run(config, options, launcher.init_ep(), launcher.choose_device(DEVICE), log)
    return launcher.train(run) | {"log": lines}


@trial(2, 4)
def crowded(mesh: ep.Mesh, folder: Path) -> list:
    """[what is measured with room for all, with too little room], of an eager step; of a recorded one on GPUs."""
    return [curve(ep), curve(ep, "--arrival-factor", "1.02")]


def add_broken_again(number: int) -> None:
    """The trial `broken_again_NUMBER`: what becomes of the losses in a broken copy."""

    def run(mesh: ep.Mesh, folder: Path) -> str:
        right = curve(ep)["task_loss"]
        with copied_code(folder.parent / "broken_again" / str(number)):
            try:
                broken = curve(importlib.import_module("ep_launcher.launcher"), "--arrival-factor", "1.02")
                return "equal" if broken["task_loss"] == right else "others"
            except (RuntimeError, IndexError) as error:
                return f"{type(error).__name__}: {error}"
            finally:
                leave_group()

    run.__name__ = f"broken_again_{number}"
    trial(2)(run)


for number in range(len(AGAIN)):
    add_broken_again(number)


@trial(2)
def library(mesh: ep.Mesh, folder: Path) -> list[str]:
    """What a layer with too little room says at the next call, and before an update; forward alone is silent."""
    said = []
    for look in ("call", "sync_gradients"):
        for made in ep.memories_of(mesh.ep).values():
            for memory in made:
                memory.crowded.zero_(), memory.overflow.zero_()
        extras = (ep.ArrivalOptions(1.25),)
        config = ep.MoEConfig(4, 2, 8, 8, 16, dispatcher="peer", balance="none", extras=extras)
        layer = ep.EPMoE(config, mesh, seed=0)
        with torch.no_grad():
            layer.router.gate.bias.copy_(torch.tensor([90.0, 90, 0, 0]))
        y = layer(torch.randn(16, 8))
        try:
            if look == "call" and mesh.ep.rank == 0:
                layer(torch.randn(16, 8))
            elif look == "sync_gradients":
                y.sum().backward()
                ep.check_ended(mesh.meter)
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said


def add_broken(number: int) -> None:
    """The trial `broken_copy_NUMBER`."""

    def run(mesh: ep.Mesh, folder: Path) -> tuple[int, str]:
        flags = "--dispatcher peer --dtypes float64 --cases uneven micro_batches".split()
        return run_broken(folder.parent / "broken_peer" / str(number), flags)

    run.__name__ = f"broken_copy_{number}"
    trial(2)(run)


for number in range(len(BROKEN)):
    add_broken(number)


@trial(2)
def nothing(mesh: ep.Mesh, folder: Path) -> None:
    """Rank 1 has no tokens, and its experts get no rows."""
    nothing_arrives(mesh, "peer")


@trial(2, 4)
def by_hand(mesh: ep.Mesh, folder: Path) -> None:
    """A row a (token, rank), weights and ids of all slots: counted, predicted, and counted by hand."""
    rank, size, d = mesh.batch.rank, mesh.batch.size, 8
    ids = [choices(r, 16 // size) for r in range(size)]
    x, w = (
        torch.randn(len(ids[rank]), d, requires_grad=True),
        torch.rand(len(ids[rank]), 4, requires_grad=True),
    )
    own = ep.Communicator()
    dispatcher = ep.REGISTRIES["dispatcher"]["peer"](16, own, 12)
    arrived = dispatcher.dispatch(x, ids[rank], w)
    dispatcher.combine(arrived.x * arrived.topk_weights.sum(1, keepdim=True), arrived.handle).sum().backward()
    own.meter.total()  # brings what kernels have counted
    predicted, sent = dispatcher.predict_bytes(ids, d, torch.float32), own.meter.sent
    for part in ep.PASSES:
        assert sent[part] == predicted[part][rank].tolist(), (part, sent[part], predicted[part][rank])
    there = [
        sum(r in places(line, 16 // size) for line in ids[rank].tolist()) * (r != rank) for r in range(size)
    ]
    assert sent["combine backward"] == [n * d * 4 for n in there]
    assert sent["dispatch"] == [n * d * 4 + 12 * 4 * 2 * 4 * (r != rank) for r, n in enumerate(there)]


@trial(2)
def turns(mesh: ep.Mesh, folder: Path) -> dict[int, list[float]]:
    """{slots: what rank 1 reads in the first exchange, when rank 0 has written the second}."""
    comm, found = mesh.ep, {}

    class SlowReader(ep.PeerPlan):
        def wait(self, x: torch.Tensor) -> None:
            if comm.rank == 0 and x[0, 0] == 2:
                self.memory.blocks[1][0] = 1
            super().wait(x)
            while comm.rank == 1 and x[0, 0] == 1 and not self.memory.blocks[1][0]:
                pass

    for slots in (1, 2):
        memory = ep.PeerMemory(comm.rank, ep.share_memory(comm, 2**14, torch.device("cpu")), turns=slots)
        plan = SlowReader(comm, memory, 4, 1)
        ids, weights = torch.ones(4, 1, dtype=torch.int64), torch.ones(4, 1)
        rows = [
            ep.to_experts_twin(torch.full((4, 8), n), ids, weights, None, plan, "dispatch")[0]
            for n in (1.0, 2.0)
        ]
        found[slots] = rows[0][:4, 0].tolist()
    return found


@trial(2, 4)
def small_sums(mesh: ep.Mesh, folder: Path) -> str:
    """Sums through memory, of which slots come again: everyone's are the same bits, and the library's to rounding.

    -> the bits of all, "kernel" or "twin"; what is large or of another kind is summed too.
    """
    comm, generator = mesh.batch, torch.Generator().manual_seed(mesh.batch.rank)
    add_up = ep.SmallSums(comm, torch.zeros(1))
    for number in range(3):
        for count, dtype in ((1, torch.float32), (17, torch.int64), (4130, torch.float32), (9000, torch.float32),
                             (5, torch.float64)):  # fmt: skip
            x = torch.randint(-99, 99, (count,), generator=generator) / 7
            x = (x * 7).round().to(dtype) if dtype == torch.int64 else x.to(dtype)
            right, uses = add_up.library(x.clone()), add_up.memory.state[0].item() + add_up.memory.turn
            assert add_up(x) is x
            torch.testing.assert_close(x, right, rtol=1e-5, atol=1e-5)
            is_small = count <= ep.SMALL_SUM and dtype != torch.float64
            assert (add_up.memory.state[0].item() + add_up.memory.turn != uses) == is_small, (
                number,
                count,
                dtype,
            )
            assert all(torch.equal(x, other) for other in comm.all_gather(x, "metadata"))
    ep.check_ended(mesh.meter)
    return "kernel" if add_up.memory.state[0] else "twin"


@trial(2)
def grows(mesh: ep.Mesh, folder: Path) -> None:
    """A larger layer behind a small one gets a larger memory, and both go on; no file is left behind."""
    x = {d: torch.randn(300, d) for d in (16, 2048)}
    layers = {d: ep.EPMoE(ep.MoEConfig(4, 2, d, 8, None, dispatcher="peer"), mesh, seed=d) for d in x}
    for d in (16, 2048, 16):
        layers[d](x[d]).sum().backward()
    sizes = [memory.slot_bytes for made in ep.memories_of(mesh.ep).values() for memory in made]
    assert len(sizes) == 2 and sizes[0] < sizes[1], sizes
    assert not list(Path("/dev/shm").glob("ep_launcher-*"))


@trial(2)
def never_comes(mesh: ep.Mesh, folder: Path) -> str:
    """Rank 1 stays away from an exchange: rank 0 has an error within the group's time limit."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    comm = ep.Communicator(group)
    dispatcher = ep.REGISTRIES["dispatcher"]["peer"](4, comm, 8)
    tokens = torch.randn(8, 4), torch.tensor([[0, 3]] * 8), torch.ones(8, 2)
    dispatcher.dispatch(*tokens)
    said = ""
    if comm.rank == 0:
        try:
            dispatcher.dispatch(*tokens)
        except ep.CollectiveError as error:
            said = str(error)
    del dispatcher, comm, group
    gc.collect()
    return said
