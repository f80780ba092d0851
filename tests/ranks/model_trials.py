"""The layer in somebody's model, on real ranks: trials, which tests/ranks/test_model.py plays and reads."""

import contextlib
import copy
import gc
import io
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from trials import trial

from ep_launcher import launcher as ep

SIZES = {"num_experts": 8, "top_k": 2, "hidden_dim": 16, "ffn_dim": 32}
EXPERTS = ("loop", "bmm", "blocks", "grouped")
MANY = ("all_gather", "all_to_all")


def config(**changes) -> ep.MoEConfig:
    return ep.MoEConfig(**SIZES | changes)


def tokens(number: int, rank: int, size: int, dtype: torch.dtype = torch.float64, total: int = 24) -> Tensor:
    """This rank's share of a global batch of `total` tokens; uneven, where size does not divide it less 1."""
    x = torch.randn(total - 1, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return x.to(dtype).tensor_split(size)[rank]


def close(a: Tensor, b: Tensor, limit: float = 1e-12, what: str = "") -> None:
    error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
    assert error < limit, f"{what} differs by {error:.1e}"


@contextlib.contextmanager
def refused(kind: type[BaseException], *words: str) -> Iterator[None]:
    """The body must raise this, with these words, in one line."""
    try:
        yield
    except kind as error:
        text = str(error)
        missing = [word for word in words if word not in text]
        assert not missing, f"{missing} not in {text!r}"
        assert words == () or "\n" not in text, f"more than one line: {text!r}"
        return
    raise AssertionError(f"no {kind.__name__} about {words}")


def whole(state: dict[str, Tensor], layer_config: ep.MoEConfig, **more) -> ep.EPMoE:
    """A layer of world size 1 with this state, on every rank by itself; without the exchange that is tried."""
    alone = ep.Communicator.alone()
    layer_config = ep.replace(layer_config, dispatcher="local")
    layer = ep.EPMoE(layer_config, ep.Mesh(alone, alone, alone), seed=99, **more)
    layer.load_state_dict(state)
    return layer


def summed(value: int, mesh: ep.Mesh) -> int:
    """Its sum over the ranks. Collective."""
    return mesh.batch.all_reduce(torch.tensor(value)).item()


def gradients(model: nn.Module, mesh: ep.Mesh) -> dict[str, Tensor]:
    """Every parameter's gradient, the experts' gathered over mesh.ep: what world size 1 has."""
    local = {id(p) for layer in ep.moe_layers(model) for p in layer.experts.parameters()}
    found = {}
    for name, p in model.named_parameters():
        is_local = id(p) in local
        found[name] = mesh.ep.all_gather(p.grad, "check").flatten(0, 1) if is_local else p.grad.clone()
    return found


class Kept(TorchDispatchMode):
    """Inside, notes every storage that is made; `alive` says which of them somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, *allowed: Tensor) -> int:
        """Bytes of the storages that are still held, those of the given tensors left out."""
        known = {t.untyped_storage()._cdata for t in allowed}
        left = [(ref, n) for cdata, (ref, n) in self.made.items() if cdata not in known and not ref.expired()]
        return sum(num_bytes for _, num_bytes in left)


def kept_bytes(
    layer: ep.EPMoE, run: Callable[[], Tensor], inputs: tuple[Tensor, ...], enough: int = 0
) -> tuple[int, Tensor]:
    """What one forward leaves behind for backward, beside its result, and what watchers and aux_loss may read.

    Waits a moment for what falls to `enough`.
    """
    kept = Kept()
    with kept:
        y = run()
    own = [*layer.parameters(), *layer.buffers(), *layer.aux_shares, layer.topk_ids, layer.probs, y, *inputs]
    deadline = time.monotonic() + 20  # gloo's own thread lets go of a message a moment after it has arrived
    while time.monotonic() < deadline and kept.alive(*own) > enough:
        gc.collect()
        time.sleep(0.02)
    return kept.alive(*own), y


def check_checkpoint(mesh: ep.Mesh, dispatcher: str) -> None:
    """Under checkpoint the layer keeps its input alone, runs its router twice, counts its load once, and is right."""
    for activation in ("gelu", "swiglu"):
        for experts in EXPERTS:
            layer = ep.EPMoE(
                config(experts=experts, activation=activation, dispatcher=dispatcher, balance="bias"),
                mesh,
                seed=3,
            )
            name, calls = f"{experts}, {activation}", []
            layer.router.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            x = tokens(1, mesh.batch.rank, mesh.batch.size, torch.float32).requires_grad_()
            plain = layer(x)
            plain.square().sum().backward()
            expected = [p.grad.clone() for p in (x, *layer.parameters())]
            for p in (x, *layer.parameters()):
                p.grad = None
            ep.aux_loss(layer)
            layer.balance.load.zero_()
            calls.clear()
            left, y = kept_bytes(
                layer, lambda layer=layer, x=x: checkpoint(layer, x, use_reentrant=False), (x,)
            )
            assert left == 0, f"{name}: {left} bytes are kept"
            assert len(layer.aux_shares) == 1, name
            y.square().sum().backward()
            assert len(calls) == 2, f"{name}: the router ran {len(calls)} times"
            assert len(layer.aux_shares) == 1, f"{name}: recomputation added an aux loss"
            assert int(layer.balance.load.sum()) == 2 * len(x), (
                f"{name}: {int(layer.balance.load.sum())} choices"
            )
            for p, wanted in zip((x, *layer.parameters()), expected, strict=True):
                close(p.grad, wanted, 1e-6, name)


@trial(2)
def checkpointing(mesh: ep.Mesh, folder: Path) -> None:
    for dispatcher in MANY:
        check_checkpoint(mesh, dispatcher)


@trial(2)
def kept_for_backward(mesh: ep.Mesh, folder: Path) -> None:
    """Without a checkpoint: the arrived rows once, 2 F numbers a row, and what fits into 64 numbers a row besides."""
    for activation in ("gelu", "swiglu"):
        for experts in ("blocks", "grouped"):
            sizes = {"hidden_dim": 128, "ffn_dim": 256, "max_num_tokens": None}
            layer = ep.EPMoE(
                config(experts=experts, activation=activation, dispatcher="all_to_all", **sizes), mesh, seed=3
            )
            x = torch.randn(64, 128, requires_grad=True)
            owner = layer.router(x).topk_ids.flatten() // layer.experts.num_local
            here = torch.bincount(owner, minlength=mesh.ep.size)
            rows = int(mesh.ep.all_reduce(here)[mesh.ep.rank])
            limit = rows * 4 * (128 + 2 * 256) + 4 * 64 * max(rows, 128)
            left, y = kept_bytes(layer, lambda layer=layer, x=x: layer(x), (x,), limit)
            assert left <= limit, f"{experts}, {activation}: {left} bytes, where {limit} are enough"
            assert left >= rows * 4 * 2 * 256, "the measurement sees nothing"
            y.sum().backward()


@trial(2, 4)
def two_layers_bytes(mesh: ep.Mesh, folder: Path) -> None:
    """Predicted by pass, counted by pass, summed over the layers of a model, on every rank."""
    capacity = (ep.CapacityOptions(capacity_factor=1.5),)
    for dispatcher in (*MANY, "capacity"):
        extras = capacity if dispatcher == "capacity" else ()
        layer_config = config(dispatcher=dispatcher, extras=extras, max_num_tokens=32, dtype="float64")
        for x_needs_grad in (False, True):
            model = nn.Sequential(*(ep.EPMoE(layer_config, mesh, seed=n) for n in range(2)))
            x = tokens(5, mesh.batch.rank, mesh.batch.size).requires_grad_(x_needs_grad)
            mesh.meter.sent.clear()
            model(x).square().sum().backward()
            counted = {name: mesh.meter.total(name) for name in ep.PASSES}
            tables = ep.predicted_bytes(model, x_needs_grad)
            predicted = {name: int(table[mesh.ep.rank].sum()) for name, table in tables.items()}
            assert predicted == counted and min(counted.values()) > 0, (
                dispatcher,
                x_needs_grad,
                predicted,
                counted,
            )


class SumTask:
    """A task whose loss is a share of one mean over a global batch of so many tokens, however it is cut."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 1).square().sum() / (self.num_tokens * x.shape[1])


@trial(2, 4)
def micro_batches(mesh: ep.Mesh, folder: Path) -> None:
    """Micro-batches through train_step give one batch's losses and gradients; so do two forwards and one backward."""
    options = ep.TrainingOptions(aux_alpha=0.0)
    for dispatcher in MANY:
        x = tokens(2, mesh.batch.rank, mesh.batch.size)
        found = []
        for batches in ([x], list(x.split(2)), [x[:0], x]):
            number = summed(len(batches), mesh) // mesh.batch.size
            batches = (batches + [x[:0]] * 9)[: max(3, number + 1)] if len(batches) > 1 else batches
            model = ep.EPMoE(config(dispatcher=dispatcher, dtype="float64", balance="none"), mesh, seed=4)
            losses = ep.train_step(model, mesh, SumTask(23), batches, options)
            found.append((losses, gradients(model, mesh)))
        model = ep.EPMoE(config(dispatcher=dispatcher, dtype="float64", balance="none"), mesh, seed=4)
        task = SumTask(23)
        (task.loss(model, x[:1]) + task.loss(model, x[1:])).backward()
        ep.sync_gradients(model, mesh)
        found.append((found[0][0], gradients(model, mesh)))
        for losses, grads in found[1:]:
            close(losses, found[0][0], what="losses")
            for name, grad in grads.items():
                close(grad, found[0][1][name], what=f"{dispatcher} {name}")


@trial(2)
def micro_batches_weigh_their_aux_loss(mesh: ep.Mesh, folder: Path) -> None:
    """The same batch once or three times: the aux loss and what it adds to the gate's gradient do not grow."""
    x, found = tokens(4, mesh.batch.rank, mesh.batch.size), []
    for batches in ([x], [x] * 3):
        grads = []
        for aux_alpha in (0.0, 1.0):
            model = ep.EPMoE(config(dtype="float64"), mesh, seed=4)
            options = ep.TrainingOptions(aux_alpha=aux_alpha)
            losses = ep.train_step(model, mesh, SumTask(23), batches, options)
            grads.append(model.router.gate.weight.grad)
        found.append((losses[1], grads[1] - grads[0]))
    assert found[0][1].abs().max() > 1e-4
    for one, three, what in zip(*found, ("aux loss", "its gradient"), strict=True):
        close(three, one, what=what)


@trial(2)
def summed_once(mesh: ep.Mesh, folder: Path) -> None:
    layer = ep.EPMoE(config(), mesh, seed=1)
    x = tokens(3, mesh.batch.rank, mesh.batch.size, torch.float32)
    layer(x).sum().backward()
    ep.sync_gradients(layer, mesh)
    with refused(RuntimeError, "summed over the ranks already", "zero_grad(set_to_none=True)"):
        ep.sync_gradients(layer, mesh)
    layer(x).sum().backward()  # on top of the sum: it would be summed again
    with refused(RuntimeError, "summed over the ranks already", "zero_grad(set_to_none=True)"):
        ep.sync_gradients(layer, mesh)
    layer.zero_grad()
    layer(x).sum().backward()
    ep.sync_gradients(layer, mesh)


@trial(2, 4)
def another_mesh(mesh: ep.Mesh, folder: Path) -> None:
    """A layer that made its own mesh is refused together with another one, and taken with an equal one."""
    layer, halves, equal = ep.EPMoE(config(), seed=1), ep.init_ep(mesh.batch.size // 2), ep.init_ep()
    layer(tokens(5, mesh.batch.rank, mesh.batch.size, torch.float32)).sum().backward()
    state = layer.state_dict()
    with refused(RuntimeError, "not summed over the ranks yet; call sync_gradients"):
        ep.clip_grad_norm_(layer, 1.0, equal)
    for call in (
        lambda: ep.sync_gradients(layer, halves),
        lambda: ep.clip_grad_norm_(layer, 1.0, halves),
        lambda: ep.full_state_dict(layer, halves),
        lambda: ep.load_full_state_dict(layer, state, halves),
    ):
        with refused(ValueError, "a layer's mesh", "EPMoE(config, mesh, seed=...)"):
            call()
    ep.sync_gradients(layer, equal)
    ep.clip_grad_norm_(layer, 1.0, equal)
    ep.load_full_state_dict(layer, ep.full_state_dict(layer, equal), equal)


@trial(4)
def time_limits(mesh: ep.Mesh, folder: Path) -> None:
    """The groups of a mesh have the limit that it was made with, and not the library's 30 minutes."""
    halves = ep.init_ep(2, timeout_s=8)
    for comm in (halves.ep, halves.replicas):
        limit = comm.group._get_backend(torch.device("cpu")).options._timeout
        assert limit.total_seconds() == 8, limit


@trial(2, 4)
def wide_sums(mesh: ep.Mesh, folder: Path) -> None:
    """Gradients in bfloat16 are added up in float32 and rounded once, in whatever order the ranks come."""
    size = mesh.batch.size
    everyones = [
        torch.randint(-256, 257, (1000,), generator=torch.Generator().manual_seed(r)) for r in range(size)
    ]
    mine, wanted = everyones[mesh.batch.rank].bfloat16(), sum(everyones).bfloat16()
    ep.sync_gradients(nn.Module(), mesh, mine)
    assert torch.equal(mine, wanted), f"{(mine != wanted).sum()} of 1000 sums are rounded more than once"
    third = torch.tensor([1 / 3], dtype=torch.float64)
    ep.sync_gradients(nn.Module(), mesh, third, mine)
    assert abs(third.item() - mesh.batch.size / 3) < 1e-15, "float64 beside bfloat16"
    count, several = torch.tensor(20_000_001), torch.tensor([[True, False]])
    third = torch.tensor(1 / 3)
    ep.sync_gradients(nn.Module(), mesh, count, third, several)
    assert count.item() == 20_000_001 * mesh.batch.size, "a count in float32"
    assert abs(third.item() - mesh.batch.size / 3) < 1e-6 and several.tolist() == [[True, False]]


def every_kind(mesh: ep.Mesh) -> Iterator[tuple[str, ep.EPMoE, torch.Tensor]]:
    """(names, layer, tokens that need a gradient): every experts with every dispatcher."""
    for dispatcher, experts in product(MANY, EXPERTS):
        layer = ep.EPMoE(config(experts=experts, dispatcher=dispatcher), mesh, seed=2)
        x = tokens(6, mesh.batch.rank, mesh.batch.size, torch.float32).requires_grad_()
        yield f"{experts} {dispatcher}", layer, x


@trial(2)
def gradient_penalty(mesh: ep.Mesh, folder: Path) -> None:
    """Second derivatives through an exchange are refused: they would miss what other ranks did."""
    for _, layer, x in every_kind(mesh):
        by_hand = layer.config.experts in ("blocks", "grouped")
        for loss in (layer(x).square().sum(), layer(x).sum()):
            with refused(RuntimeError, "no second derivative" if by_hand else "once_differentiable"):
                (grad,) = torch.autograd.grad(loss, x, create_graph=True)
                grad.square().sum().backward()


@trial(2)
def retain_graph(mesh: ep.Mesh, folder: Path) -> None:
    """A second backward adds the same gradients again, or is refused; never anything else."""
    for kinds, layer, x in every_kind(mesh):
        loss = layer(x).square().sum()
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in (x, *layer.parameters())]
        if layer.config.experts in ("blocks", "grouped"):
            with refused(RuntimeError, "a second backward", "take experts bmm or loop"):
                loss.backward()
            continue
        loss.backward()
        for p, once in zip((x, *layer.parameters()), first, strict=True):
            close(p.grad, 2 * once, 1e-5, kinds)


@trial(2)
def copies(mesh: ep.Mesh, folder: Path) -> None:
    """deepcopy copies the parameters, talks to the same ranks, and forgets aux losses; torch.save says what to save."""
    layer = ep.EPMoE(config(balance="bias"), mesh, seed=2)
    x = tokens(7, mesh.batch.rank, mesh.batch.size, torch.float32)
    y = layer(x)
    other = copy.deepcopy(layer)
    assert len(layer.aux_shares) == 1 and len(other.aux_shares) == 0
    assert torch.equal(other(x), y)
    with torch.no_grad():
        other.experts.w1.zero_()
    assert not torch.equal(other(x), y) and torch.equal(layer(x), y)
    ep.aux_loss(other)
    other(x).sum().backward()
    ep.sync_gradients(other, mesh)
    with refused(TypeError, "save full_state_dict(model, mesh)"):
        torch.save(layer, io.BytesIO())
    torch.save(ep.full_state_dict(layer, mesh), io.BytesIO())


@trial(2)
def others_state(mesh: ep.Mesh, folder: Path) -> None:
    """Rank 0's state dict is refused on rank 1, and loads on rank 0."""
    layer = ep.EPMoE(config(), mesh, seed=2)
    torch.manual_seed(0)
    holder = [layer.state_dict()]
    dist.broadcast_object_list(holder, 0)
    if mesh.batch.rank == 0:
        layer.load_state_dict(holder[0])
    else:
        try:
            layer.load_state_dict(holder[0])
        except RuntimeError as error:
            assert "this rank holds experts 4-7" in str(error) and "load_full_state_dict" in str(error), error
        else:
            raise AssertionError("rank 0's experts were loaded on rank 1")
    layer.load_state_dict(layer.state_dict())
    other, state = ep.EPMoE(config(), mesh, seed=3), ep.full_state_dict(layer, mesh)
    other.load_state_dict(state)  # of all experts every rank takes its own
    assert torch.equal(other.experts.w1, layer.experts.w1)
    state["experts.w1"] = state["experts.w1"][:4]
    with refused(RuntimeError):
        other.load_state_dict(state)


@trial(2)
def dcp(mesh: ep.Mesh, folder: Path) -> None:
    """torch.distributed.checkpoint keeps every rank's experts."""
    import torch.distributed.checkpoint as checkpoints

    model = nn.Sequential(nn.Linear(16, 16), ep.EPMoE(config(), mesh, seed=2))
    before = ep.full_state_dict(model, mesh)
    path = str(folder / "dcp")
    checkpoints.save(model.state_dict(), checkpoint_id=path)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = model.state_dict()
    checkpoints.load(state, checkpoint_id=path)
    model.load_state_dict(state)
    after = ep.full_state_dict(model, mesh)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert len({t.sum().item() for t in after["1.experts.w1"]}) == 8, "some experts are equal"


def continue_training(
    model: nn.Module, mesh: ep.Mesh, optimizer: torch.optim.Optimizer, steps: range
) -> list[float]:
    """The global task losses of these steps."""
    options = ep.TrainingOptions(max_grad_norm=0.05)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        x = tokens(100 + step, mesh.batch.rank, mesh.batch.size)
        losses.append(ep.train_step(model, mesh, SumTask(23), [x], options)[0].item())
        optimizer.step()
        ep.after_step(model)
    return losses


def training_model(mesh: ep.Mesh, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two layers, a Linear between them, float64, a bias that follows the load in one; and its AdamW."""
    configs = (config(dtype="float64", balance=balance) for balance in ("aux", "bias"))
    first, second = (ep.EPMoE(each, mesh, seed=seed + number) for number, each in enumerate(configs))
    torch.manual_seed(seed)
    model = nn.Sequential(first, nn.Linear(16, 16, dtype=torch.float64), second)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def resume(mesh: ep.Mesh, folder: Path) -> None:
    """Loads what 4 ranks saved, into a model that was made of another seed, and goes on as they did."""
    saved = torch.load(folder / "of-4-ranks.pt")
    model, optimizer = training_model(mesh, seed=50)
    ep.load_full_state_dict(model, saved["state"], mesh, optimizer)
    again = ep.full_state_dict(model, mesh, optimizer)
    assert again.keys() == saved["state"].keys()
    for name, tensor in saved["state"].items():
        if name != "optimizer":
            assert torch.equal(tensor, again[name]), name
    for name, values in saved["state"]["optimizer"].items():
        for key, value in values.items():
            assert torch.equal(value, again["optimizer"][name][key]), (name, key)
    losses = continue_training(model, mesh, optimizer, range(3, 8))
    worst = max(abs(a - b) / b for a, b in zip(losses, saved["losses"], strict=True))
    assert worst < 1e-11, f"the losses differ by {worst:.1e}"


@trial(4)
def saves_full_state(mesh: ep.Mesh, folder: Path) -> None:
    model, optimizer = training_model(mesh, seed=10)
    alone = ep.Communicator.alone()
    fresh, _ = training_model(ep.Mesh(alone, alone, alone), seed=10)
    state = ep.full_state_dict(model, mesh)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} is not world size 1's"
    continue_training(model, mesh, optimizer, range(3))
    state = ep.full_state_dict(model, mesh, optimizer)
    losses = continue_training(model, mesh, optimizer, range(3, 8))
    if mesh.batch.rank == 0:
        torch.save({"state": state, "losses": losses}, folder / "of-4-ranks.pt")


@trial(1, 2)
def resumes_full_state(mesh: ep.Mesh, folder: Path) -> None:
    resume(mesh, folder)


@trial(2, 4)
def clipping(mesh: ep.Mesh, folder: Path) -> None:
    """One norm, the same on every rank and at world size 1, and gradients scaled by it."""
    model = nn.Sequential(
        ep.EPMoE(config(dtype="float64"), mesh, seed=4), nn.Linear(16, 3, dtype=torch.float64)
    )
    with torch.no_grad():
        for p in model[1].parameters():
            p.copy_(torch.arange(p.numel(), dtype=torch.float64).view_as(p).sin())
    task = lambda m, x: m(x).square().sum() + 0.1 * ep.aux_loss(m)  # noqa: E731
    task(model, tokens(8, mesh.batch.rank, mesh.batch.size)).backward()
    ep.sync_gradients(model, mesh)
    single = nn.Sequential(
        whole(ep.full_state_dict(model[0], mesh), model[0].config), copy.deepcopy(model[1])
    )
    single.zero_grad()
    task(single, tokens(8, 0, 1)).backward()
    wanted = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in single.parameters()]))
    for p in single.parameters():
        p.grad *= 0.5 / wanted
    norm = ep.clip_grad_norm_(model, 0.5, mesh)
    norms = [None] * mesh.batch.size
    dist.all_gather_object(norms, norm.item())
    assert len(set(norms)) == 1, norms
    close(norm, wanted, 1e-12, "the norm")
    for (name, grad), p in zip(gradients(model, mesh).items(), single.parameters(), strict=True):
        close(grad, p.grad, 1e-5, name)  # torch adds 1e-6 to the norm


@trial(2, 4)
def mean_shares(mesh: ep.Mesh, folder: Path) -> None:
    """share_of_mean: the shares add up to the mean over all tokens, though rank 0 has none."""
    rank = mesh.batch.rank
    x = torch.arange(5 * rank, dtype=torch.float64).requires_grad_()
    share = ep.share_of_mean(x.square().mean(), len(x), mesh)
    assert rank or (share.item() == 0 and share.requires_grad)
    share.backward()
    total = mesh.batch.all_reduce(share.detach().clone())
    everyones = torch.cat([torch.arange(5 * r, dtype=torch.float64) for r in range(mesh.batch.size)])
    close(total, everyones.square().mean(), what="the mean")
    close(x.grad, 2 * x.detach() / len(everyones), what="its gradient") if rank else None
    values, mask = torch.ones(4, requires_grad=True), torch.full((4,), rank > 0)
    ep.share_of_mean(values[mask].mean(), int(mask.sum()), mesh).backward()
    assert values.grad.isfinite().all(), "a mean under an empty mask"
    layer = ep.EPMoE(config(dtype="float64"), mesh, seed=1)
    y = layer(torch.ones(3 * rank, 16, dtype=torch.float64))
    (ep.share_of_mean(y.mean(), len(y), mesh) + ep.aux_loss(layer)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@trial(2, 4)
def z_loss_and_capacity(mesh: ep.Mesh, folder: Path) -> None:
    """The shares of all ranks add up to Switch's loss + z_alpha * mean of logsumexp^2, with choices dropped."""
    extras = (ep.CapacityOptions(capacity_factor=0.5), ep.RoutingOptions(z_alpha=0.3))
    for dispatcher in (*MANY, "capacity"):
        layer_config = config(dispatcher=dispatcher, extras=extras, max_num_tokens=32, dtype="float64")
        layer = ep.EPMoE(layer_config, mesh, seed=1)
        layer(tokens(9, mesh.batch.rank, mesh.batch.size)).sum().backward(retain_graph=True)
        dropped = summed(int((layer.topk_ids < 0).sum()), mesh)
        assert dropped > 0, "nothing was dropped"
        total = mesh.batch.all_reduce(ep.aux_loss(layer).detach().clone())
        x = tokens(9, 0, 1)
        routing = layer.router(x)
        left = extras[0].after_routing(routing, layer_config, ep.Communicator.alone())
        assert left.logits is routing.logits
        logits = F.linear(x, layer.router.gate.weight, layer.router.gate.bias)
        _, switch = ep.dense_moe(x, ep.full_state_dict(layer, mesh), 2)
        close(total, switch + 0.3 * logits.logsumexp(1).square().mean(), what=dispatcher)


@trial(2)
def compiled(mesh: ep.Mesh, folder: Path) -> None:
    """torch.compile around a model with the layer in it."""
    for dispatcher in MANY:
        layer = ep.EPMoE(config(dispatcher=dispatcher), mesh, seed=1)
        model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), layer, nn.LayerNorm(16))
        ep.sync_gradients(model, mesh)
        with torch.no_grad():
            for p in model[0].parameters():
                dist.broadcast(p, 0)
        model.zero_grad()
        x = tokens(1, mesh.batch.rank, mesh.batch.size, torch.float32)
        model(x).square().sum().backward()
        wanted = [p.grad.clone() for p in model.parameters()]
        ep.after_step(model)
        model.zero_grad()
        graphs = []  # around the layer alone: one that differed from rank to rank would keep others waiting
        torch.compile(model, backend=lambda graph, _, graphs=graphs: graphs.append(1) or graph.forward)(x)
        assert len(graphs) <= 4, f"{len(graphs)} graphs: the exchange is in pieces"
        ep.after_step(model)
        torch._dynamo.reset()
        torch.compile(model)(x).square().sum().backward()
        assert len(layer.aux_shares) == 1
        ep.aux_loss(model)
        for (name, p), grad in zip(model.named_parameters(), wanted, strict=True):
            close(p.grad, grad, 1e-4, f"{dispatcher} {name}")


@trial(2)
def ddp(mesh: ep.Mesh, folder: Path) -> None:
    """DistributedDataParallel makes all ranks' experts rank 0's: refused in forward, and in sync_gradients."""
    model = nn.Sequential(nn.Linear(16, 16), ep.EPMoE(config(), mesh, seed=1))
    wrapped = nn.parallel.DistributedDataParallel(model)
    with refused(RuntimeError, "DistributedDataParallel has overwritten", "sync_gradients(model, mesh)"):
        wrapped(torch.randn(4, 16))
    with refused(RuntimeError, "DistributedDataParallel", "take it out"):
        ep.sync_gradients(wrapped, mesh)


@trial(2)
def fsdp(mesh: ep.Mesh, folder: Path) -> None:
    """fully_shard over experts is refused, by whatever would take an expert's parameter for whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), ep.EPMoE(config(), mesh, seed=1))

    flat = FullyShardedDataParallel(make(), device_id=torch.device("cpu"))
    with refused(RuntimeError, "FullyShardedDataParallel is around the model"):
        ep.sync_gradients(flat, mesh)
    model = make()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    for call in (ep.sync_gradients, ep.full_state_dict, lambda *a: ep.clip_grad_norm_(a[0], 1.0, a[1])):
        with refused(TypeError, "is a DTensor, which fully_shard has made", "init_ep(ep_size)"):
            call(model, mesh)


@trial(2, 4)
def frozen_parts(mesh: ep.Mesh, folder: Path) -> None:
    """A frozen gate, frozen experts, or both behind a part that learns: the others' gradients stay right."""
    for dispatcher in MANY:
        for frozen in ("router", "experts", "both"):
            layer = ep.EPMoE(config(dispatcher=dispatcher, dtype="float64", balance="none"), mesh, seed=6)
            first = nn.Parameter(torch.full((16,), 0.5, dtype=torch.float64))
            for part in (layer.router, layer.experts):
                part.requires_grad_(frozen != "both" and part is not getattr(layer, frozen))
            (layer(tokens(4, mesh.batch.rank, mesh.batch.size) * first)).square().sum().backward()
            ep.sync_gradients(nn.ParameterList([first]), mesh)
            ep.sync_gradients(layer, mesh)
            single = whole(ep.full_state_dict(layer, mesh), layer.config)
            other = first.detach().clone().requires_grad_()
            (single(tokens(4, 0, 1) * other)).square().sum().backward()
            close(first.grad, other.grad, 1e-11, f"{dispatcher}, {frozen} frozen")
            learns = [p.grad is not None for p in layer.router.parameters()]
            assert all(learns) == (frozen == "experts") and any(learns) == (frozen == "experts"), frozen


@trial(2, 4)
def shared_experts(mesh: ep.Mesh, folder: Path) -> None:
    """A shared expert is a copy on every rank: values and gradients are world size 1's."""
    for activation in ("gelu", "swiglu"):
        layer_config = config(dtype="float64", num_shared_experts=2, activation=activation)
        layer = ep.EPMoE(layer_config, mesh, seed=6)
        x = tokens(4, mesh.batch.rank, mesh.batch.size)
        y = layer(x)
        (y.square().sum() + ep.aux_loss(layer)).backward()
        ep.sync_gradients(layer, mesh)
        single = whole(ep.full_state_dict(layer, mesh), layer_config)
        all_y = single(tokens(4, 0, 1))
        (all_y.square().sum() + ep.aux_loss(single)).backward()
        close(y, all_y.tensor_split(mesh.batch.size)[mesh.batch.rank], what="y")
        wanted = dict(single.named_parameters())
        for name, grad in gradients(layer, mesh).items():
            close(grad, wanted[name].grad, 1e-11, name)
        assert wanted["shared.w1"].shape == (1, 16, 64)


@trial(2, 4)
def means_of_copies(mesh: ep.Mesh, folder: Path) -> None:
    """[B, S, D] inputs, eval, no_grad and inference on several ranks."""
    layer = ep.EPMoE(config(), mesh, seed=6)
    x = torch.randn(2 + mesh.batch.rank, 3, 16)
    y = layer(x)
    assert y.shape == x.shape
    close(layer(x.flatten(0, 1)).view_as(x), y, 1e-6)
    ep.aux_loss(layer)
    with torch.no_grad():
        layer(x)
    assert len(layer.aux_shares) == 0
    with torch.inference_mode():
        close(layer.eval()(x), y.detach(), 1e-6)


@trial(4)
def two_by_two(mesh: ep.Mesh, folder: Path) -> None:
    """On a 2 x 2 mesh: aux shares add up, the bias is one, every gradient is world size 1's."""
    grid = ep.init_ep(ep_size=2)
    assert (grid.ep.size, grid.replicas.size, grid.batch.size) == (2, 2, 4)
    for dispatcher in MANY:
        for balance in ("aux", "bias"):
            layer_config = config(dtype="float64", balance=balance, dispatcher=dispatcher)
            layer = ep.EPMoE(layer_config, grid, seed=5)
            x = tokens(11, grid.batch.rank, 4)
            y = layer(x)
            aux = ep.aux_loss(layer)
            (y.square().sum() + 0.3 * aux).backward()
            ep.sync_gradients(layer, grid)
            norm = ep.clip_grad_norm_(layer, 1e9, grid)
            single = whole(ep.full_state_dict(layer, grid), layer_config)
            all_y = single(tokens(11, 0, 1))
            all_aux = ep.aux_loss(single)
            (all_y.square().sum() + 0.3 * all_aux).backward()
            close(y, all_y.tensor_split(4)[grid.batch.rank], what="y")
            close(grid.batch.all_reduce(aux.detach().clone()), all_aux, what="aux")
            wanted = dict(single.named_parameters())
            for name, grad in gradients(layer, grid).items():
                close(grad, wanted[name].grad, 1e-11, name)
            close(
                norm,
                torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in wanted.values()])),
                1e-11,
                "norm",
            )
            if balance == "bias":
                ep.after_step(layer)
                ep.after_step(single)
                assert torch.equal(layer.balance.bias, single.balance.bias) and single.balance.bias.any()
    counted = {name: sum(grid.meter.sent[name]) for name in ep.PASSES}
    assert min(counted.values()) > 0 and len(grid.meter.sent["dispatch"]) == 4
    outside = [r for r in range(4) if r // 2 != grid.batch.rank // 2]
    assert all(grid.meter.sent["dispatch"][r] == 0 for r in outside), (
        "rows left the group that shares the experts"
    )
