"""The kernels of chapters 06, 10, 11, 13 and 14 against their PyTorch twins: on a GPU, or under Triton's interpreter.

Without Triton there is nothing to test: the twins are what runs then, and the parity suite tests them. The
interpreter must be asked for before Triton is imported: `make test-kernels` does.
"""

import os

import pytest
import torch

from ep_launcher import launcher as ep

is_possible = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
with_kernels = pytest.mark.skipif(
    not is_possible or ep.triton is None, reason="wants a GPU or the interpreter"
)

if (
    os.environ.get("TRITON_INTERPRET") == "1" and ep.triton
):  # it counts no loop whose bounds a kernel computes
    from triton.runtime import interpreter

    patched = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(5, 2, 4, 32, 64), (7, 3, 8, 384, 96), (1, 1, 1, 130, 200), (6, 4, 8, 1024, 768), (0, 2, 4, 32, 64)]
CLOSE = {torch.float32: {"atol": 1e-4, "rtol": 1e-5}, torch.bfloat16: {"atol": 7e-2, "rtol": 2e-2}}


def twin(function, *arguments):
    """What the function's PyTorch twin says."""
    kept, ep.uses_kernels = ep.uses_kernels, lambda x: False
    try:
        return function(*arguments)
    finally:
        ep.uses_kernels = kept


@pytest.fixture(params=SIZES, ids=str)
def case(request) -> tuple:
    """(order with choices that are not sent, T, K, D, F, rows sent)."""
    num_tokens, top_k, num_experts, d, f = request.param
    torch.manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :top_k].to(DEVICE)
    if num_tokens:
        ids[0, 0] = -1
        ids[-1] = -1
    order = ep.order_rows(ids, num_experts)
    return order, num_tokens, top_k, d, f, int(order.counts.sum())


ORDERS = [
    (5, 2, 4, None),
    (100, 3, 8, None),
    (70, 8, 130, None),
    (40, 4, 200, 90),
    (1, 1, 3, None),
    (9, 2, 2, 0),
]


@with_kernels
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "max_pairs"), ORDERS)
def test_order_rows(num_tokens, top_k, num_experts, max_pairs):
    """Also where an expert gets nothing, and where rows are fewer than choices, of which the rest is not sent."""
    torch.manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :top_k].to(DEVICE)
    ids[torch.rand(ids.shape, device=DEVICE) < 0.3] = -1
    ids[0 if max_pairs is None else max_pairs // top_k :: 2] = -1
    if max_pairs is not None:
        ids[max_pairs // top_k :] = -1
    ours, theirs = (run(ep.order_rows, ids, num_experts, max_pairs) for run in (direct, twin))
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


@with_kernels
def test_the_scan_of_a_table_that_is_longer_than_a_tile():
    table = torch.randint(0, 9, (21, 6), dtype=torch.int32).to(DEVICE)
    expected, totals = table.cumsum(0) - table, table.sum(0)
    counts = torch.full((6,), -1, device=DEVICE)
    ep.scan_kernel[(2,)](table, counts, 21, 5, 8, 4)
    assert torch.equal(table, expected.int()) and torch.equal(counts, totals)


@with_kernels
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(5, 4, 2), (33, 130, 8), (1, 8, 8), (0, 4, 2)]
)
def test_the_choice_in_one_launch(num_tokens, num_experts, top_k):
    torch.manual_seed(num_tokens)
    keys = torch.rand(num_tokens, num_experts).to(DEVICE)
    ours, theirs = (run(ep.OneLaunch.choose, keys, top_k) for run in (direct, twin))
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    same = ep.OneLaunch.choose(torch.zeros(3, num_experts, device=DEVICE), top_k)
    assert same.tolist() == [list(range(top_k))] * 3


@with_kernels
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(("n", "depth", "columns"), [(5, 64, 70), (3, 130, 16)])
def test_eight_bits_with_a_scale_a_row(n, depth, columns, dtype):
    """Equal on a GPU. The interpreter loses a carry where it rounds to eight bits: there most are equal."""
    torch.manual_seed(n)
    x, w = draw(n, depth + 8, dtype=dtype)[:, :depth], draw(3, depth, columns, dtype=dtype)
    w[1] = 0
    for function, argument in ((ep.scale_rows, x), (ep.scale_columns, w)):
        ours, theirs = (run(function, argument) for run in (direct, twin))
        torch.testing.assert_close(ours.scales, theirs.scales)
        equal = (ours.values.float() == theirs.values.float()).float().mean()
        assert equal == 1 if DEVICE == "cuda" else equal > 0.95
        assert ours.values.is_contiguous() and ours.values.shape == theirs.values.shape


@with_kernels
@pytest.mark.parametrize("sizes", [(5, 2, 4, 64, 64), (40, 2, 3, 128, 192), (150, 1, 2, 64, 320)], ids=str)
def test_products_that_do_more(sizes):
    """Experts without rows, blocks that stick out, tiles that end early, choices that are not sent."""
    num_tokens, top_k, num_experts, d, f = sizes
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    torch.manual_seed(0)
    ids = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :top_k].to(DEVICE)
    ids[ids == 1], ids[0, 0] = 0, -1
    order = ep.order_rows(ids, num_experts)
    sent, num_rows = int(order.counts.sum()), len(order.choice_of_row)
    x, w1, w3 = (
        draw(num_tokens, d, dtype=dtype),
        *(draw(num_experts, d, f, dtype=dtype) / d**0.5 for _ in "13"),
    )
    weights = torch.rand(num_rows, device=DEVICE)
    products = ep.FusedProducts(order.counts, num_rows)
    asked = x, order, w1, None, w3, None, weights, order.counts.sum(), ep.SwiGLU
    gate, up, hidden = products.gated(*asked)
    for ours, theirs in zip((gate, up, hidden), twin(products.gated, *asked), strict=True):
        torch.testing.assert_close(ours[:sent], theirs[:sent], **CLOSE[dtype])
    products.in_pairs = True
    side_by_side = products.gated(*asked)
    pairs = ep.pairs_of(*side_by_side[:2])
    assert torch.equal(pairs.view(dtype).view(num_rows, f, -1)[:sent, :, 0], side_by_side[0][:sent])
    for ours, theirs in zip(side_by_side, (gate, up, hidden), strict=True):
        assert torch.equal(ours[:sent], theirs[:sent])
    for rows, held in (
        (hidden, draw(num_experts, f, d, dtype=dtype) / f**0.5),
        (draw(num_rows, d, dtype=dtype), w1),
    ):
        for stored in (held, held.mT.contiguous().mT):  # the second as a product of backward has it
            torch.use_deterministic_algorithms(True, warn_only=True)  # what nobody writes is NaN
            ours = products.times(rows, stored)
            torch.use_deterministic_algorithms(False)
            torch.testing.assert_close(ours[:sent], twin(products.times, rows, stored)[:sent], **CLOSE[dtype])
            assert ours[sent:].isnan().all()
    (ours, rest), theirs = products.x_gradient(gate, up, w1, w3), twin(products.x_gradient, gate, up, w1, w3)
    assert rest is None
    torch.testing.assert_close(ours[:sent], sum(theirs)[:sent], **CLOSE[dtype])


def test_what_auto_prefers_on_a_hopper(monkeypatch):
    """By results/h100_parts.json: fused before grouped, and quack where it is installed."""
    monkeypatch.setattr(ep, "is_hopper", lambda device: True)
    monkeypatch.setattr(ep, "triton", ep.triton or object())
    installed = {"quack": None}
    monkeypatch.setattr(ep.importlib.util, "find_spec", installed.get)

    def order(**changes) -> list[str]:
        sizes = {"hidden_dim": 2048, "ffn_dim": 768, "dtype": "bfloat16", "activation": "swiglu"} | changes
        config, device = ep.MoEConfig(experts="auto", **sizes), torch.device("cuda")
        worth = {
            k: ep.REGISTRIES["experts"][k].preference(config, device, 1)
            for k in ("grouped", "fused", "quack")
        }
        return [k for k in sorted(worth, key=worth.get, reverse=True) if worth[k]]

    assert order() == ["fused", "grouped"]
    installed["quack"] = True
    assert order() == ["quack", "fused", "grouped"]
    assert order(ffn_dim=2048) == ["quack", "fused", "grouped"]
    assert order(ffn_dim=1000) == ["grouped"] and order(activation="gelu") == ["grouped"]


@pytest.mark.skipif(
    not torch.cuda.is_available() or not ep.importlib.util.find_spec("quack"),
    reason="wants a GPU and quack-kernels",
)
@pytest.mark.parametrize("widest", [0, 1024])
@pytest.mark.parametrize("sizes", [(5, 2, 4, 64, 64), (300, 2, 5, 128, 192), (150, 1, 2, 64, 320)], ids=str)
def test_products_of_quack(sizes, widest, monkeypatch):
    """Every method, narrow and wide, on experts without rows, odd counts and choices that are not sent."""
    monkeypatch.setattr(ep, "WIDEST_GATED", widest)
    num_tokens, top_k, num_experts, d, f = sizes
    torch.manual_seed(0)
    ids = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :top_k].to(DEVICE)
    ids[ids == 1], ids[0, 0] = 0, -1
    order = ep.order_rows(ids, num_experts)
    sent, num_rows, half = int(order.counts.sum()), len(order.choice_of_row), torch.bfloat16
    x, grad = draw(num_tokens, d, dtype=half), draw(num_rows, d, dtype=half)
    w1, w3 = (draw(num_experts, d, f, dtype=half) / d**0.5 for _ in "13")
    w2, weights = draw(num_experts, f, d, dtype=half) / f**0.5, torch.rand(num_rows, device=DEVICE)
    found = []
    for kind in (ep.GroupedProducts, ep.QuackProducts):
        products = kind(order.counts, num_rows)
        results = products.gated(x, order, w1, None, w3, None, weights, order.counts.sum(), ep.SwiGLU)
        times = products.times(results[2], w2)
        results += products.hidden_gradient(grad, w2, *results[:2], weights, order.counts.sum(), ep.SwiGLU)
        weight = products.weight_gradient(results[3], grad)
        found.append(([t[:sent].clone() for t in (*results[2:], times)], weight))
    for (theirs, their_weight), (ours, our_weight) in [found]:
        for mine, other in zip((*ours, our_weight), (*theirs, their_weight), strict=True):
            assert (mine - other).float().norm() < 1e-2 * other.float().norm()
        assert not our_weight[1].any()  # no rows


def draw(*shape, dtype):
    return torch.randn(*shape).to(dtype).to(DEVICE)


@with_kernels
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_copy_to_rows(case, dtype):
    order, num_tokens, _, d, _, sent = case
    x = draw(num_tokens, d, dtype=dtype)
    assert torch.equal(ep.copy_to_rows(x, order)[:sent], twin(ep.copy_to_rows, x, order)[:sent])


@with_kernels
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_rows_may_be_the_first_columns_of_wider_ones(case, dtype):
    order, num_tokens, top_k, d, _, sent = case
    x, rows = draw(num_tokens, d + 8, dtype=dtype)[:, :d], draw(num_tokens * top_k, d + 16, dtype=dtype)
    beside = rows[:, d:].clone()
    ep.copy_to_rows(x, order, rows[:, :d])
    assert torch.equal(rows[:sent, :d], twin(ep.copy_to_rows, x, order)[:sent])
    assert torch.equal(rows[:, d:], beside)
    torch.testing.assert_close(
        ep.sum_rows(rows[:, :d], order), twin(ep.sum_rows, rows[:, :d], order), **CLOSE[dtype]
    )


@with_kernels
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_gaps_hold_zeros(case, dtype):
    _, num_tokens, top_k, d, _, _ = case
    torch.manual_seed(1)
    ids = torch.rand(num_tokens, 8).argsort(dim=1)[:, :top_k].to(DEVICE)
    order = ep.order_in_blocks(ids, 8, max(1, num_tokens // 2))
    x = draw(num_tokens, d, dtype=dtype)
    ours, theirs = ep.copy_to_rows(x, order), twin(ep.copy_to_rows, x, order)
    assert torch.equal(ours, theirs) and not ours[order.choice_of_row < 0].any()


@with_kernels
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_sum_rows(case, dtype, two):
    order, num_tokens, top_k, d, _, sent = case
    a, b = (draw(num_tokens * top_k, d, dtype=dtype) for _ in range(2))
    a[sent:], b[sent:] = float("nan"), float("nan")  # nobody reads them
    ours, theirs = ep.sum_rows(a, order, b if two else None), twin(ep.sum_rows, a, order, b if two else None)
    torch.testing.assert_close(ours, theirs, **CLOSE[dtype])


@with_kernels
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_weighted_swiglu_and_its_backward(case, dtype):
    order, num_tokens, top_k, _, f, sent = case
    gate, up, grad = (draw(num_tokens * top_k, f, dtype=dtype) for _ in range(3))
    weights, total = torch.rand(num_tokens * top_k, device=DEVICE), order.counts.sum()
    forward = ep.weighted_activation, ep.SwiGLU, gate, up, weights, total
    ours, theirs = (run(*forward) for run in (direct, twin))
    torch.testing.assert_close(ours[:sent], theirs[:sent], **CLOSE[dtype])
    found = []
    for run in (direct, twin):
        used = [t.clone() for t in (grad, gate, up)]
        found.append(run(ep.weighted_activation_backward_, ep.SwiGLU, *used, weights, total))
    assert not found[0][3][sent:].any()
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(
            mine[:sent], other[:sent], atol=CLOSE[dtype]["atol"] * 3, rtol=CLOSE[dtype]["rtol"]
        )


def direct(function, *arguments):
    return function(*arguments)


def test_the_twin_of_the_backward_is_the_derivative():
    torch.manual_seed(0)
    gate, up = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6, 5, dtype=torch.float64)
    hidden = torch.nn.functional.silu(gate) * up * weights[:, None]
    expected = torch.autograd.grad(hidden, (gate, up, weights), grad)
    used = [t.detach().clone() for t in (grad, gate, up)]
    ours = ep.weighted_activation_backward_(ep.SwiGLU, *used, weights.detach(), torch.tensor(6))
    for mine, other in zip(ours, [hidden.detach(), *expected], strict=True):
        torch.testing.assert_close(mine, other)


def placed(rank_sizes: tuple[int, int, int, int]) -> tuple[torch.Tensor, int, int]:
    """(ids [T, K] of which some are not sent, local experts, ranks)."""
    num_tokens, top_k, local, ranks = rank_sizes
    torch.manual_seed(num_tokens)
    ids = torch.rand(num_tokens, local * ranks).argsort(dim=1)[:, :top_k]
    ids = torch.where(torch.rand(ids.shape) < 0.2, -1, ids)
    ids[: num_tokens // 4] = -1
    return ids.to(DEVICE), local, ranks


COPIES = [(5, 2, 4, 2), (600, 4, 3, 4), (40, 6, 2, 5), (7, 3, 1, 8), (1, 1, 2, 1), (0, 2, 2, 2)]
FEW_COPIES = [(30, *sizes[1:]) if sizes[0] > 100 else sizes for sizes in COPIES]  # the interpreter is slow


@with_kernels
@pytest.mark.parametrize("rank_sizes", COPIES, ids=str)
def test_order_copies(rank_sizes):
    ids, local, ranks = placed(rank_sizes)
    ours, theirs = ep.order_copies(ids, local, ranks), twin(ep.order_copies, ids, local, ranks)
    assert ours.per_row == theirs.per_row and torch.equal(ours.place_of_choice, theirs.place_of_choice)
    for mine, other in zip(ours.copies[:3], theirs.copies[:3], strict=True):
        assert mine.shape == other.shape and torch.equal(mine, other)


@with_kernels
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(
    ("rank_sizes", "d"), list(zip(FEW_COPIES, (32, 8, 130, 17, 96, 8), strict=True)), ids=str
)
def test_pack_copies(rank_sizes, d, dtype):
    ids, local, ranks = placed(rank_sizes)
    order = ep.order_copies(ids, local, ranks)
    x, weights = draw(len(ids), d + 8, dtype=dtype)[:, :d], torch.rand(ids.shape, device=DEVICE)
    sent, arguments = int(order.copies.counts.sum()), (x, ids, weights, order, local)
    used = d + 2 * order.per_row * 4 // dtype.itemsize  # behind: padding
    ours, theirs = (run(ep.pack_copies, *arguments)[:sent, :used] for run in (direct, twin))
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    held = ep.get_riders(ours, d, 2 * order.per_row)[:, order.per_row :]
    assert int((held >= 0).sum()) == int((ids >= 0).sum())


def played_ranks(tokens: list[int], num_slots: int, dtype, d: int):
    """(plans, x, topk_ids, weights) of ranks that this process plays by itself; two experts a rank, top-2."""
    torch.manual_seed(sum(tokens) + d)
    size = len(tokens)
    blocks, plans = [torch.zeros(2**16, dtype=torch.uint8, device=DEVICE) for _ in tokens], []
    for rank in range(size):
        comm = ep.Communicator.alone()
        comm.rank, comm.size, comm.ranks, comm.meter = (
            rank,
            size,
            list(range(size)),
            ep.TrafficMeter(rank, size),
        )
        plans.append(ep.PeerPlan(comm, ep.PeerMemory(rank, blocks, limit_s=30), num_slots, 2))
    x = [draw(n, d + 8, dtype=dtype)[:, :d] for n in tokens]
    ids = [torch.rand(n, 2 * size).argsort(dim=1)[:, :2] for n in tokens]
    ids = [torch.where(torch.rand(i.shape) < 0.2, -1, i).to(DEVICE) for i in ids]
    return plans, x, ids, [torch.rand(i.shape, device=DEVICE) for i in ids]


def postponed(monkeypatch, name: str) -> list:
    """The launches of a kernel, to be made when all ranks have written."""
    compiled, launches = getattr(ep, name), []

    class Later:
        def __getitem__(self, grid):
            return lambda *args, **flags: launches.append(lambda: compiled[grid](*args, **flags))

    monkeypatch.setattr(ep, name, Later())
    return launches


PLAYED = [([3, 5], 5, 32), ([4, 0, 2], 4, 17), ([3], 3, 130), ([1, 2, 1, 2, 1], 2, 8)]


@with_kernels
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("sizes", PLAYED, ids=str)
def test_rows_written_into_the_memory_of_peers(sizes, dtype, monkeypatch):
    plans, x, ids, weights = played_ranks(*sizes[:2], dtype, sizes[2])
    size, num_slots, d = len(plans), plans[0].num_slots, sizes[2]
    takes, sums = postponed(monkeypatch, "take_rows_kernel"), postponed(monkeypatch, "sum_home_kernel")
    for turn in range(3):  # slots come again
        there = [ep.to_experts(x[r], ids[r], weights[r], None, plans[r], "dispatch") for r in range(size)]
        [launch() for launch in takes]
        for r, (rows, came, own) in enumerate(there):
            for s, t in ((s, t) for s in range(size) for t in range(num_slots)):
                local = (
                    [e - 2 * r if e // 2 == r else -1 for e in ids[s][t].tolist()]
                    if t < len(x[s])
                    else [-1, -1]
                )
                row = s * num_slots + t
                assert own[row].tolist() == local
                assert torch.equal(rows[row], x[s][t] if max(local) >= 0 else torch.zeros_like(rows[row]))
                assert max(local) < 0 or torch.equal(came[row], weights[s][t])
            copies = [sum(any(e // 2 == p for e in line) for line in ids[r].tolist()) for p in range(size)]
            copies[r] = 0
            assert plans[r].memory.sent["dispatch"].tolist() == [
                n * d * x[r].element_size() * (turn + 1) for n in copies
            ]
        home = [
            ep.to_home(t[0] * (r + 1), t[1], ids[r], t[2], plans[r], "combine") for r, t in enumerate(there)
        ]
        [launch() for launch in sums]
        for r, (y, grads) in enumerate(home):
            owners = [{e // 2 for e in line if e >= 0} for line in ids[r].tolist()]
            factor = torch.tensor([sum(p + 1 for p in own) for own in owners], device=DEVICE)[:, None]
            torch.testing.assert_close(y.float(), x[r].float() * factor, **CLOSE[dtype])
            assert torch.equal(grads, torch.where(ids[r] < 0, 0, weights[r]))
        takes.clear(), sums.clear()
    for plan in plans:
        plan.memory.check()


@with_kernels
def test_a_kernel_gives_up_on_a_rank_that_does_not_write():
    plans, x, ids, weights = played_ranks([2, 2], 2, torch.float32, 8)
    plans[0].memory.looks = 3
    ep.to_experts(x[0], ids[0], weights[0], None, plans[0], "dispatch")
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ep.CollectiveError, match="rank 0 gave up on rank 1, which did not write"):
        plans[0].memory.check()


# Chapter 13. The interpreter multiplies bfloat16 as if it were whole numbers, so there it is float32 alone.
DECODE_DTYPES = ["float32"] + ["bfloat16"] * torch.cuda.is_available()
DECODE_SIZES = [  # tokens, batch, experts, top_k, D, F: some with split sums, some whose rows need two tiles
    (5, 8, 8, 2, 64, 48), (1, 1, 4, 2, 32, 32), (20, 24, 6, 3, 128, 64), (3, 4, 16, 8, 64, 64),
    (40, 40, 2, 1, 256, 32), (40, 40, 16, 1, 32, 32),
]  # fmt: skip


def decode_layer(sizes, dtype, **kind):
    """(a layer in eval mode, its tokens)."""
    num_tokens, _, num_experts, top_k, d, f = sizes
    options = ep.RoutingOptions(
        normalize_topk=kind.pop("normalize", True) and top_k > 1, routed_scaling_factor=1.5
    )
    config = ep.MoEConfig(
        num_experts, top_k, d, f, dtype=dtype, activation="swiglu", extras=(options,), **kind
    )
    layer = ep.EPMoE(config, ep.Mesh(*[ep.Communicator.alone()] * 3), seed=0, device=DEVICE).eval()
    torch.manual_seed(num_tokens)
    if layer.balance.bias is not None:
        layer.balance.bias.normal_(std=0.1)
    if num_tokens > 2 * num_experts and layer.router.gate.bias is not None:
        layer.router.gate.bias.data[1] += 50  # all go to one expert, in several tiles
    return layer, draw(num_tokens, d, dtype=ep.DTYPES[dtype])


def far_apart(ours, theirs):
    """Relative error, by norms."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@with_kernels
@pytest.mark.parametrize("dtype", DECODE_DTYPES)
@pytest.mark.parametrize("sizes", DECODE_SIZES, ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        {"router": "softmax", "normalize": False},
        {"router": "sigmoid", "balance": "bias"},
        {"router_bias": False},
    ],
    ids=["softmax", "sigmoid, bias", "no gate bias"],
)
def test_decode_kernels_give_the_layers_answer(sizes, kind, dtype):
    layer, x = decode_layer(sizes, dtype, **kind)
    with torch.no_grad():
        expected = twin(layer, x)
    fast = ep.for_inference(layer, sizes[1], sizes=sizes[1:2])
    first = fast(x)
    kept = first.clone()
    fast(-x)
    assert torch.equal(first, kept)  # nobody wrote over what came back
    step = fast.batches[sizes[1]].run
    assert step.choose and step.decode  # both kernels ran
    assert far_apart(first, expected) < (1e-5 if dtype == "float32" else 2e-2)
    assert torch.equal(fast(x), first)  # the lists are empty again, and every counter is 0
    assert (
        not step.decode.lists.counts.any() and not step.decode.arrived.any() and not step.choose.arrived.any()
    )
    few = max(1, len(x) // 2)
    assert far_apart(fast(x[:few]), expected[:few]) < (1e-5 if dtype == "float32" else 2e-2)
    assert (step.choose.topk_ids[few:] == -1).all()  # padding reads no expert


@with_kernels
@pytest.mark.parametrize("dtype", DECODE_DTYPES)
def test_decode_kernels_with_choices_that_are_not_sent(dtype):
    layer, x = decode_layer((12, 12, 4, 3, 64, 32), dtype)
    e, ids = layer.experts, torch.rand(12, 4, device=DEVICE).argsort(1)[:, :3].contiguous()
    ids[0], ids[3, 1] = -1, -1
    weights = torch.rand(12, 3, device=DEVICE)
    wide = torch.cat([x, x * float("nan")], dim=1)[:, :64]  # the first columns of a wider tensor
    decode = ep.DecodeKernels(12, 3, e.w1)
    with torch.no_grad():
        expected = twin(e, ep.Arrived(x, ids, weights))
        decode.put_on_lists(ids)
        assert decode.lists.counts[:4].tolist() == ep.count_choices(ids, 4).tolist()
        decode.compute(wide, weights, e.w1, e.w2, e.w3)
        y = decode.sum_up(ids)
    assert far_apart(y, expected) < (1e-5 if dtype == "float32" else 2e-2) and not y[0].any()


@with_kernels
def test_decode_results_do_not_depend_on_the_order_of_the_lists():
    layer, x = decode_layer((20, 20, 3, 2, 128, 32), "float32")
    e, routing, found = layer.experts, layer.router(x), []
    with torch.no_grad():
        for seed in range(2):
            decode = ep.DecodeKernels(20, 2, e.w1)
            decode.put_on_lists(routing.topk_ids)
            for number, own in enumerate(decode.lists.counts[:3].tolist()):
                torch.manual_seed(seed)
                line = decode.lists.choices[number]
                line[:own] = line[:own][torch.randperm(own, device=DEVICE)]
            decode.compute(x, routing.topk_weights, e.w1, e.w2, e.w3)
            found.append(decode.sum_up(routing.topk_ids).clone())
    assert torch.equal(*found) and decode.tiles.parts > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_a_decode_step_does_not_wait_for_the_device():
    layer, x = decode_layer((5, 8, 8, 2, 64, 48), "bfloat16")
    fast = ep.for_inference(layer, 8)
    fast(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
