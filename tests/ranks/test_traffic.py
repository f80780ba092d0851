"""Chapter 10: gather_tokens, dedup and two_stage. Bytes counted a second way, ranks with nothing, bad settings.

Outputs and gradients against the dense reference are in tests/ranks/test_parity.py, with capacity in test_capacity.py,
with every router in test_balance.py: the dispatchers register themselves. Here two_stage runs on machines.
"""

import json

import pytest
import torch
from support import copy_of_the_code, torchrun
from test_exact_all_to_all import run_script

from ep_launcher import launcher as ep

MESHES = {"4 ranks, 2 a machine": (4, 2), "2 ranks, 1 a machine": (2, 1), "8 ranks, 2 a machine": (8, 2),
          "8 ranks, 4 a machine": (8, 4)}  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES)
def test_two_stage_on_machines(build, mesh):
    world_size, ranks_per_host = MESHES[mesh]
    output = build / f"parity-machines-{world_size}-{ranks_per_host}.json"
    output.unlink(missing_ok=True)
    flags = ["--dispatcher", "two_stage", "--ranks-per-host", str(ranks_per_host), "--output", str(output)]
    few = ["--cases", "uneven", "rank_without_tokens", "rank_without_rows"] if world_size == 8 else []
    done = torchrun(world_size, "tools/parity.py", *flags, *few, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads(output.read_text())
    assert {r["case"] for r in results} >= {"uneven", "rank_without_tokens", "rank_without_rows"}
    assert all(r["bytes"][0] == r["bytes"][1] and r["bytes_agree"] for r in results)


def test_parity_refuses_a_copy_too_many_and_a_choice_on_the_wrong_machine(build):
    """The suite can fail: an id that is one off, and two copies of a token for one rank."""
    for number, (right, wrong) in enumerate(
        (
            ("row * per_row + earlier)", "row * per_row)"),
            ("own = topk_ids.cpu() - machine * num_experts", "own = topk_ids.cpu()"),
            ("torch.where(earlier == 0, owner, -1)", "owner"),
        )
    ):
        broken = copy_of_the_code(build / f"broken_traffic_{number}", right, wrong)
        flags = [
            "--dispatcher",
            "two_stage",
            "--ranks-per-host",
            "1",
            "--dtypes",
            "float64",
            "--cases",
            "even",
        ]
        done = torchrun(2, str(broken / "tools/parity.py"), *flags)
        assert done.returncode != 0, done.stdout + done.stderr


NOTHING = """
for name, options in (("gather_tokens", {}), ("dedup", {}), ("two_stage", {"ranks_per_host": 1})):
    extras = (ep.TrafficOptions(**options),)
    config = ep.MoEConfig(num_experts=4, top_k=2, hidden_dim=8, ffn_dim=8, dtype="float64", dispatcher=name,
                          extras=extras)
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
    print("in step", name, flush=True)
dist.destroy_process_group()
"""


def test_ranks_without_tokens_or_rows_enter_everything(build):
    done = run_script(build, "nothing_in_traffic", 2, NOTHING)
    assert done.stdout.count("in step") == 2 * 3, done.stdout + done.stderr[-1500:]


BYTES = """
experts, top_k, d, ranks_per_host = 16, 4, 8, {ranks_per_host}
local = experts // world_size
def choices(r):
    ids = torch.rand(6 + r, experts, generator=torch.Generator().manual_seed(r)).topk(top_k).indices
    ids[0] = torch.arange(4) if local >= 4 else ids[0]  # all on one rank
    ids[1, 1:] = -1
    return ids
def places(line, size):  # where a token's choices live, by plain Python
    return {{e // size for e in line if e >= 0}}
everyones = [choices(r).tolist() for r in range(world_size)]
x = torch.randn(len(everyones[rank]), d, requires_grad=True)
w = torch.rand(len(x), top_k, requires_grad=True)
machine = lambda r: r // ranks_per_host
for name in ("gather_tokens", "dedup", "two_stage"):
    own = ep.Communicator()
    config = ep.MoEConfig(num_experts=experts, top_k=top_k, hidden_dim=d, dispatcher=name,
                          extras=(ep.TrafficOptions(ranks_per_host=ranks_per_host),))
    dispatcher = ep.REGISTRIES["dispatcher"][name].for_layer(config, own)
    arrived = dispatcher.dispatch(x, choices(rank), w)
    dispatcher.combine(arrived.x * arrived.topk_weights.sum(1, keepdim=True), arrived.handle).sum().backward()
    rows = [0] * world_size
    for r in range(world_size):
        if name == "gather_tokens":
            rows[r] = max(map(len, everyones))
        elif name == "dedup":
            rows[r] = sum(r in places(line, local) for line in everyones[rank])
        elif machine(r) != machine(rank):  # the same place on another machine: a token with a choice there
            is_there = sum(machine(r) in places(line, local * ranks_per_host) for line in everyones[rank])
            rows[r] = is_there if r % ranks_per_host == rank % ranks_per_host else 0
        else:  # what came here from this place of every machine, this one included
            lane = range(rank % ranks_per_host, world_size, ranks_per_host)
            rows[r] = sum(r in places(line, local) for source in lane for line in everyones[source])
        rows[r] *= r != rank
    assert [n // (d * 4) for n in own.meter.sent["combine backward"]] == rows, (name, rank, rows, own.meter.sent)
    predicted = dispatcher.predict_bytes([choices(r) for r in range(world_size)], d, torch.float32)
    for part in ep.PASSES:
        assert own.meter.sent[part] == predicted[part][rank].tolist(), (name, part)
print("exact", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world_size, ranks_per_host", [(2, 1), (4, 2), (8, 2), (8, 4)])
def test_one_copy_a_rank_and_one_a_machine(build, world_size, ranks_per_host):
    body = BYTES.format(ranks_per_host=ranks_per_host)
    done = run_script(build, f"traffic_bytes_{world_size}_{ranks_per_host}", world_size, body)
    assert done.stdout.count("exact") == world_size, done.stdout + done.stderr[-1500:]


def test_copies_of_a_token_by_hand():
    topk_ids = torch.tensor(
        [[0, 5, 1, -1], [7, 6, 4, 5], [-1, -1, -1, -1], [2, 0, 3, 1]]
    )  # 2 ranks of 4 experts
    order = ep.order_copies(topk_ids, 4, 2)
    assert order.copies.counts.tolist() == [2, 2] and order.per_row == 4
    assert (order.copies.row_of_choice >= 0).sum(1).tolist() == [2, 1, 0, 1]
    ids = order.spread(torch.where(topk_ids < 0, -1, topk_ids % 4), -1)
    assert ids[:4].tolist() == [[0, 1, -1, -1], [2, 0, 3, 1], [1, -1, -1, -1], [3, 2, 0, 1]]


def test_slots_hold_the_share_of_a_run_or_the_largest_batch():
    comm = ep.Communicator.alone()
    gather = ep.REGISTRIES["dispatcher"]["gather_tokens"]
    config = ep.MoEConfig(num_experts=4)
    asks = gather.for_layer(config, comm)
    assert asks.syncs_host and not asks.records
    fixed = gather.for_layer(ep.replace(config, extras=(ep.TrafficOptions(slot_tokens=3),)), comm)
    assert fixed.records and not fixed.syncs_host and fixed.num_slots == 3
    with pytest.raises(ValueError, match="4 tokens on one rank, and gather_tokens was made for 3"):
        fixed.dispatch(torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2))
    assert gather.for_layer(ep.replace(config, max_num_tokens=9), comm).num_slots == 9


def test_bad_settings_are_one_line():
    with pytest.raises(ValueError, match="ranks_per_host is 0, and must be at least 1"):
        ep.TrafficOptions(ranks_per_host=0)
    flags = ["--dispatcher", "two_stage", "--ranks-per-host", "3", "--steps", "2", "--device", "cpu"]
    done = torchrun(4, "ep_launcher/launcher.py", *flags)
    assert done.returncode != 0 and "[rank" not in done.stderr  # torchrun has a traceback of its own
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: 4 ranks, 3 on a machine, do not fill their machines evenly; give --ranks-per-host a "
                    "divisor of 4"]  # fmt: skip
