"""Chapter 07: the exact all-to-all. Bytes, corrupt counts, the backward of the exchange, ranks with nothing.

Outputs and gradients against the dense reference are tests/test_parity.py's: the dispatcher registers itself.
"""

import time

import pytest
import torch
from conftest import ROOT, torchrun

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
    path = build / f"{name}.py"
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
layer = ep.EPMoE(ep.MoEConfig(num_experts=8, hidden_dim=16, ffn_dim=16, dispatcher="all_to_all"), comm)
layer(torch.randn(6, 16))[0].sum().backward()
ep.Communicator.all_to_all = corrupt
try:
    layer(torch.randn(6, 16))[0].sum().backward()
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


BYTES = """
config = ep.MoEConfig(num_experts=16, top_k=2, hidden_dim=256)
ids = torch.arange(32 * 2).view(32, 2) % 16  # every expert equally often
routing = ep.Routing(ids, torch.full((32, 2), 0.5), torch.zeros(32, 16))
x, sent = torch.randn(32, 256, requires_grad=True), {}
for name in ("all_gather", "all_to_all"):
    own = ep.Communicator()
    dispatcher = ep.REGISTRIES["dispatcher"][name](config, own)
    dispatcher.run(x, routing, lambda rows, counts: rows * 2).sum().backward()
    predicted = 2 * sum(dispatcher.rows_sent([ids] * world_size, 16 // world_size)) * 256 * 4
    total = ep.sum_over_ranks(own.meter.total("rows"), ep.Communicator())
    assert total == predicted, (name, total, predicted)
    sent[name] = torch.tensor(own.meter.sent["rows"])
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
layer = ep.EPMoE(config, comm)
x = torch.randn(0 if rank == 1 else 5, 8, dtype=torch.float64, requires_grad=True)  # rank 1 has no tokens
ids = torch.tensor([[0, 1]]).expand(len(x), 2).clone()  # and its experts get no rows
ids[2:3] = -1  # and one token is not sent
weights = torch.full((len(x), 2), 0.5, dtype=torch.float64, requires_grad=True)
y = layer.dispatcher.run(x, ep.Routing(ids, weights, weights), layer.experts)
y.sum().backward()
comm.all_reduce(torch.zeros(1))  # all ranks are still in step
assert y.shape == x.shape and x.grad.shape == x.shape
assert all(p.grad is not None for p in layer.experts.parameters())
if rank == 1:
    assert all(p.grad.abs().max() == 0 for p in layer.experts.parameters())
else:
    assert y[2].abs().max() == 0 and x.grad[2].abs().max() == 0 and weights.grad[2].abs().max() == 0
    expert = [layer.experts(x.detach()[:1], torch.tensor(n)) for n in ([1, 0], [0, 1])]
    assert torch.allclose(y[0], (expert[0] + expert[1])[0] / 2)
    assert torch.allclose(weights.grad[0], torch.stack([e.sum() for e in expert]))
print("in step")
dist.destroy_process_group()
"""


def test_ranks_without_tokens_or_rows_enter_everything(build):
    done = run_script(build, "nothing", 2, NOTHING)
    assert done.stdout.count("in step") == 2, done.stdout + done.stderr[-1500:]


NUMERICAL = """
torch.manual_seed(0)
table = torch.randint(0, 4, (world_size, world_size))  # rows from i to j, zeros among them
table[0, 1] = 0
there, back = table[rank].tolist(), table[:, rank].tolist()
torch.manual_seed(rank)
rows = torch.randn(sum(there), 3, dtype=torch.float64, requires_grad=True)
factor = torch.randn(sum(back), 3, dtype=torch.float64)
def loss(rows):
    return comm.all_reduce((ep.AllToAll.apply(rows, comm, there, back).sin() * factor).sum().detach().clone())
(ep.AllToAll.apply(rows, comm, there, back).sin() * factor).sum().backward()
for source in range(world_size):  # all ranks step together; one of them changes a number
    for i in range(int(table[source].sum())):
        with torch.no_grad():
            change = torch.zeros_like(rows)
            if rank == source:
                change[i, 1] = 1e-6
            slope = (loss(rows + change) - loss(rows - change)) / 2e-6
        if rank == source:
            assert abs(slope - rows.grad[i, 1]) < 1e-8, (slope, rows.grad[i, 1])
print("the slope is the gradient")
dist.destroy_process_group()
"""


def test_backward_of_the_exchange_is_the_numerical_gradient(build):
    done = run_script(build, "numerical", 4, NUMERICAL)
    assert done.stdout.count("the slope is the gradient") == 4, done.stdout + done.stderr[-1500:]


@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (4, 3), (2, 8)])
def test_reorder_by_counts_is_a_stable_sort(shape):
    torch.manual_seed(1)
    counts = torch.randint(0, 3, shape)
    experts = torch.arange(shape[1]).repeat(shape[0]).repeat_interleave(counts.reshape(-1))
    index, inverse = ep.block_indices(*ep.block_shifts(counts), len(experts))
    assert torch.equal(index, experts.argsort(stable=True))
    assert torch.equal(index[inverse], torch.arange(len(experts)))
    rows = torch.randn(len(experts), 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(ep.Reorder.apply(rows, index, inverse), rows[index])
    assert not len(rows) or torch.autograd.gradcheck(lambda r: ep.Reorder.apply(r, index, inverse), (rows,))


def test_weighted_sum_is_the_sum_written_out():
    torch.manual_seed(0)
    ids = torch.tensor([[2, 0], [-1, 1], [0, 2], [-1, -1]])
    order = ep.order_rows(ids, 3)
    rows = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: ep.WeightedSum.apply(r, w, order), (rows, weights))
    y = ep.WeightedSum.apply(rows, weights, order)
    expected = (
        weights[0, 0] * rows[order.row_of_choice[0, 0]] + weights[0, 1] * rows[order.row_of_choice[0, 1]]
    )
    assert torch.allclose(y[0], expected) and y[3].abs().max() == 0
    assert ep.WeightedSum.apply(rows[:0], weights, ep.order_rows(torch.full((4, 2), -1), 3)).abs().max() == 0


def test_on_one_rank_it_is_the_local_dispatcher(monkeypatch):
    config = ep.MoEConfig(num_experts=4, hidden_dim=16, ffn_dim=16)
    one, other = (ep.EPMoE(ep.replace(config, dispatcher=name), seed=1) for name in ("all_to_all", "local"))
    monkeypatch.setattr(ep, "announce", None)
    x = torch.randn(6, 16)
    assert torch.equal(one(x)[0], other(x)[0])
    assert ep.AllToAllDispatcher.rows_sent([torch.tensor([[0, 1]])], 4) == (0, 0)


def test_auto_takes_it_where_there_are_ranks():
    config = ep.MoEConfig()
    assert ep.pick("dispatcher", config, "cpu", 2) is ep.AllToAllDispatcher
    assert ep.pick("dispatcher", config, "cpu", 1) is not ep.AllToAllDispatcher
