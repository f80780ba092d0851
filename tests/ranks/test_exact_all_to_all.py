"""Chapter 07: the exact all-to-all. Bytes, corrupt counts, the backward of the exchange, ranks with nothing.

Outputs and gradients against the dense reference are tests/ranks/test_parity.py's: the dispatcher registers itself.
"""

import time

import pytest
import torch
from support import ROOT, torchrun

from ep_launcher import launcher as ep

HEAD = """
import sys, json
from datetime import timedelta
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
from ep_launcher import launcher as ep
ep.schedule_in_batches()
dist.init_process_group("gloo", timeout=timedelta(seconds=30))
comm = ep.Communicator()
rank, world_size = comm.rank, comm.size
"""


def run_script(build, name: str, world_size: int, body: str, timeout: float = 90):
    """Runs the body on so many ranks, with the launcher as `ep` and `comm`, `rank`, `world_size` in scope."""
    (build / "scripts").mkdir(exist_ok=True)
    path = build / "scripts" / f"{name}.py"
    path.write_text(HEAD.format(root=str(ROOT)) + body)
    return torchrun(world_size, str(path), timeout=timeout)


def sealed(counts: list, row_bytes: int = 64) -> torch.Tensor:
    """[2, W, L + 3]: the same counts [W, L] sent and received."""
    return ep.seal_counts(torch.tensor([counts, counts]), row_bytes)


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("half, text", [(0, "rank 3 sends"), (1, "rank 3 expects")])
def test_no_number_of_a_sealed_line_can_change_unseen(column, half, text):
    lines = sealed([[4, 0, 7], [2, 2, 2]])
    ep.check_seals(lines, 64, 3)
    for change in (1, -1, 5):
        broken = lines.clone()
        broken[half, 1, column] += change
        with pytest.raises(ep.CollectiveError, match=f"{text} .* rank 1") as refused:
            ep.check_seals(broken, 64, 3)
        assert "\n" not in str(refused.value)


def test_the_message_names_rank_sent_and_expected():
    lines = sealed([[4, 0, 7], [2, 2, 2]])
    lines[1, 0, 1] += 1
    with pytest.raises(ep.CollectiveError, match="rank 1 expects 12 rows from rank 0, which announced 11"):
        ep.check_seals(lines, 64, 1)
    swapped = sealed([[4, 0, 7], [2, 2, 2]])
    swapped[1, 0, :3] = torch.tensor([7, 0, 4])
    with pytest.raises(ep.CollectiveError, match=r"expects \[7, 0, 4\] rows .* from rank 0"):
        ep.check_seals(swapped, 64, 1)
    with pytest.raises(ep.CollectiveError, match="rows of 128 bytes .* announced rows of 64"):
        ep.check_seals(sealed([[1, 2]]), 128, 0)
    with pytest.raises(ep.CollectiveError):  # read before the copy arrived
        ep.check_seals(torch.zeros(2, 2, 6, dtype=torch.int64), 64, 0)


CORRUPT = """
honest, stage, where, column = ep.Communicator.all_to_all, *{plan!r}
def corrupt(self, x, input_splits, output_splits, purpose):
    if purpose == "metadata" and self.rank == where and stage == "sent":
        x = x.clone(); x[1, column] += 1
    out = honest(self, x, input_splits, output_splits, purpose)
    if purpose == "metadata" and self.rank == where and stage == "received":
        out[0, column] += 1
    return out
dist.set_debug_level(dist.DebugLevel.INFO)
layer = ep.EPMoE(ep.MoEConfig(num_experts=8, hidden_dim=16, ffn_dim=16, dispatcher="all_to_all"), seed=0)
layer(torch.randn(6, 16)).sum().backward()
ep.Communicator.all_to_all = corrupt
try:
    layer(torch.randn(6, 16)).sum().backward()
    print(f"rank {{rank}} noticed nothing", flush=True)
except ep.CollectiveError as error:
    print(f"rank {{rank}} caught: {{error}}", flush=True)
import os; os._exit(0)
"""


@pytest.mark.parametrize(
    "world_size, plan", [(2, ("sent", 0, 0)), (2, ("received", 1, 2)), (4, ("sent", 0, 1))]
)
def test_corrupt_counts_end_every_rank_in_seconds(build, world_size, plan):
    start = time.monotonic()
    done = run_script(build, "corrupt_counts", world_size, CORRUPT.format(plan=plan))
    assert done.stdout.count("caught") == world_size, done.stdout + done.stderr[-1500:]
    said = [line for line in done.stdout.splitlines() if "rank 1 expects" in line]
    assert len(said) == 1 and "from rank 0, which announced" in said[0] and "corrupt" in said[0]
    assert time.monotonic() - start < 28  # the group's own time-out is 30 s


SEALS = """
for level in (dist.DebugLevel.OFF, dist.DebugLevel.INFO):
    dist.set_debug_level(level)
    own = ep.Communicator()
    ep.announce(torch.tensor([3, 0, 1, 2]), 64, own)()
    print(f"{level.name}: {own.meter.total('metadata')} bytes", flush=True)
"""


def test_counts_travel_sealed_where_torchs_debug_level_says_so(build):
    done = run_script(build, "seals", 2, SEALS)
    assert done.stdout.count("OFF: 16 bytes") == 2 and done.stdout.count("INFO: 40 bytes") == 2, (
        done.stdout + done.stderr
    )


BYTES = """
config = ep.MoEConfig(num_experts=16, top_k=2, hidden_dim=256)
ids = torch.arange(32 * 2).view(32, 2) % 16  # every expert equally often
x, w, sent = torch.randn(32, 256, requires_grad=True), torch.full((32, 2), 0.5, requires_grad=True), {}
for name in ("all_gather", "all_to_all"):
    own = ep.Communicator()
    dispatcher = ep.REGISTRIES["dispatcher"][name].for_layer(config, own)
    arrived = dispatcher.dispatch(x, ids, w)
    dispatcher.combine(arrived.x * arrived.topk_weights, arrived.handle).sum().backward()
    predicted = dispatcher.predict_bytes([ids] * world_size, 256, torch.float32)
    for part in ep.PASSES:
        assert own.meter.sent[part] == predicted[part][rank].tolist(), (name, part)
    sent[name] = torch.tensor(own.meter.sent["combine"])
assert torch.equal(sent["all_gather"], world_size * sent["all_to_all"]), sent
assert sent["all_to_all"].sum() > 0
print("exact")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_are_w_times_fewer_to_every_rank_under_even_load(build, world_size):
    done = run_script(build, "exact_bytes", world_size, BYTES)
    assert done.stdout.count("exact") == world_size, done.stdout + done.stderr[-1500:]


NOTHING = """
config = ep.MoEConfig(num_experts=4, top_k=2, hidden_dim=8, ffn_dim=8, dtype="float64", dispatcher="all_to_all")
layer = ep.EPMoE(config, seed=0)
x = torch.randn(0 if rank == 1 else 5, 8, dtype=torch.float64, requires_grad=True)  # rank 1 has no tokens
ids = torch.tensor([[0, 1]]).expand(len(x), 2).clone()  # and its experts get no rows
ids[2:3] = -1  # and one token is not sent
weights = torch.full((len(x), 2), 0.5, dtype=torch.float64, requires_grad=True)
arrived = layer.dispatcher.dispatch(x, ids, weights)
y = layer.dispatcher.combine(layer.experts(arrived), arrived.handle)
y.sum().backward()
comm.all_reduce(torch.zeros(1))  # all ranks are still in step
assert y.shape == x.shape and x.grad.shape == x.shape
assert all(p.grad is not None for p in layer.experts.parameters())
if rank == 1:
    assert all(p.grad.abs().max() == 0 for p in layer.experts.parameters())
else:
    assert y[2].abs().max() == 0 and x.grad[2].abs().max() == 0 and weights.grad[2].abs().max() == 0
    one = torch.ones(1, 1, dtype=torch.float64)
    expert = [layer.experts(ep.Arrived(x.detach()[:1], torch.tensor([[e]]), one)) for e in (0, 1)]
    assert torch.allclose(y[0], (expert[0] + expert[1])[0] / 2)
    assert torch.allclose(weights.grad[0], torch.stack([e.sum() for e in expert]))
print("in step")
dist.destroy_process_group()
"""


def test_ranks_without_tokens_or_rows_enter_everything(build):
    done = run_script(build, "nothing", 2, NOTHING)
    assert done.stdout.count("in step") == 2, done.stdout + done.stderr[-1500:]


ROUND_TRIP = """
torch.manual_seed(rank)
ids = torch.rand([0, 7, 3, 5][rank], 8).topk(3).indices
ids[ids == 2] = -1  # expert 2's rank gets fewer, and some choices are not sent
x = torch.randn(len(ids), 6, dtype=torch.float64, requires_grad=True)
w = torch.rand(ids.shape, dtype=torch.float64, requires_grad=True)
order = ep.order_rows(ids, 8)
plan = ep.announce(order.counts, 64, comm)
rows, weights = ep.SendRows.apply(x, w, order, plan, comm)
assert len(rows) == len(plan().topk_ids) == sum(plan().counts_on_host)
y = ep.ReturnRows.apply((rows * weights).sin() * (rank + 1), order, plan(), comm)
y.square().sum().backward()
x0, w0 = (t.detach().clone().requires_grad_() for t in (x, w))
owner = (ids // (8 // world_size) + 1).double() * (ids >= 0)
right = ((x0[:, None] * w0[:, :, None]).sin() * owner[:, :, None]).sum(1)
right.square().sum().backward()
for ours, theirs in ((y, right), (x.grad, x0.grad), (w.grad, w0.grad)):
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13), (ours - theirs).abs().max()
print("there and back")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world_size", [2, 4])
def test_there_and_back_and_both_gradients(build, world_size):
    done = run_script(build, "round_trip", world_size, ROUND_TRIP)
    assert done.stdout.count("there and back") == world_size, done.stdout + done.stderr[-1500:]


@pytest.mark.parametrize("dtype", list(ep.DTYPES.values()), ids=str)
@pytest.mark.parametrize("shape", [(5, 6, 1), (4, 7, 3), (0, 8, 1), (1, 1, 2)])
def test_weights_ride_bit_by_bit(dtype, shape):
    n, d, j = shape
    wide = torch.promote_types(dtype, torch.float32)
    packed = torch.randn(n, d + ep.rider_columns(d, dtype, j)).to(dtype)
    rows, weights = packed[:, :d].clone(), torch.rand(n, j, dtype=wide)
    ep.set_riders(packed, d, weights)
    assert torch.equal(ep.get_riders(packed, d, j), weights) and torch.equal(packed[:, :d], rows)
    assert packed.shape[1] * packed.element_size() % 16 == 0


def test_on_one_rank_it_is_right_too_and_sends_nothing():
    config = ep.MoEConfig(num_experts=4, hidden_dim=16, ffn_dim=16)
    one, other = (ep.EPMoE(ep.replace(config, dispatcher=name), seed=1) for name in ("all_to_all", "local"))
    x = torch.randn(6, 16)
    assert torch.allclose(one(x), other(x), atol=1e-6)
    predicted = one.dispatcher.predict_bytes([torch.tensor([[0, 1]])], 16, torch.float32)
    assert not any(sent.any() for sent in predicted.values()) and not one.mesh.meter.total(*ep.PASSES)


def test_auto_takes_it_where_there_are_ranks():
    config = ep.MoEConfig()
    assert ep.pick("dispatcher", config, "cpu", 2) == "all_to_all"
    assert ep.pick("dispatcher", config, "cpu", 1) == "local"
