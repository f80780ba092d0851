"""Chapter 14's own products, tile by tile, beside grouped_mm's; and two kernels that were tried and lose. On one GPU.

    python measure/fused.py                      all sizes, into results/<device>_fused.json; a minute
    python measure/fused.py --device cpu --small whether it runs, without the kernels

Sizes, parts and clocks are those of measure/parts.py: each way is recorded as a graph and they take turns. Tried: the
activation's gradient in the epilogue of the product that makes its factor, and weight gradients that read one factor
by index. Every kernel is held against the other way first. Rates are in TFLOP/s of the products alone.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import layer as layers  # noqa: E402
from measure import parts, record  # noqa: E402

own_tile, in_groups, tl = ep.own_tile, ep.in_groups, ep.tl  # as the kernels name them
TILES = {  # rows, columns, depth, tiles in a group; the launcher's first
    "product": [(128, 256, 64, 16), (128, 256, 64, 1), (128, 128, 64, 16), (256, 128, 64, 8)],
    "gated": [(128, 128, 64, 8), (128, 128, 64, 1), (128, 64, 64, 8)],
    "x_gradient": [(128, 256, 64, 16), (128, 256, 64, 1), (128, 128, 64, 16)],
}


@ep.kernel
def swiglu_gradient(d, w, gate, up, hidden, row, end, column, F: tl.constexpr):
    """The tile of gate, up and hidden that belongs to d [rows, columns] -> each row's sum of d * silu(gate) * up."""
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    is_own = (row < end)[:, None] & (column < F)[None, :]
    g = tl.load(gate + at, mask=is_own, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=is_own, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    tl.store(gate + at, (d * w * u * (s + silu * (1 - s))).to(gate.dtype.element_ty), mask=is_own)
    tl.store(up + at, (d * w * silu).to(up.dtype.element_ty), mask=is_own)
    tl.store(hidden + at, (silu * u * w).to(hidden.dtype.element_ty), mask=is_own)
    return tl.sum(tl.where(is_own, d * silu * u, 0.0), axis=1)


@ep.kernel
def hidden_gradient_kernel(
    grad, token, w2, weights, counts, gate, up, hidden, row_sums, num_tiles, num_experts, num_rows,
    D: tl.constexpr, F: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of d = grad[token] w2^T stays on the chip: gate and up become their gradients in place, hidden is made
    again, and a row's sum of d * silu(gate) * up goes to row_sums[block, row]."""
    tile, block = in_groups(tl.program_id(0), num_tiles, (F + COLUMNS - 1) // COLUMNS, GROUP)
    e, first, end = own_tile(tile, counts, num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    row, deep = first + tl.arange(0, ROWS), tl.arange(0, DEEP)
    source = tl.load(token + row, mask=row < end, other=0).to(tl.int64) * D
    d = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, D, DEEP):
        rows = tl.load(grad + source[:, None] + (start + deep)[None, :])
        d = tl.dot(rows, w2.load([e * F + block * COLUMNS, start]).T, d)
    w = tl.load(weights + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
    left, right = tl.split(tl.permute(tl.reshape(d, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    column, half = block * COLUMNS + tl.arange(0, COLUMNS // 2), COLUMNS // 2
    own = swiglu_gradient(left, w, gate, up, hidden, row, end, column, F)
    own += swiglu_gradient(right, w, gate, up, hidden, row, end, column + half, F)
    tl.store(row_sums + block * num_rows + row, own, mask=row < end)


@ep.kernel
def weight_gradient_kernel(
    first, second, token, counts, out, num_experts, M: tl.constexpr, N: tl.constexpr, GATHERS_SECOND: tl.constexpr,
    EXPERTS: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of expert e's out[e] = first^T second over its rows; one of the two is read through `token`."""
    height, width = (M + ROWS - 1) // ROWS, (N + COLUMNS - 1) // COLUMNS
    e = tl.program_id(1)
    tile, block = in_groups(tl.program_id(0), height, width, GROUP)
    expert = tl.arange(0, EXPERTS)
    number = tl.load(counts + expert, mask=expert < num_experts, other=0).to(tl.int32)
    begin = tl.sum(tl.where(expert < e, number, 0), axis=0)
    end = begin + tl.sum(tl.where(expert == e, number, 0), axis=0)
    m, n = tile * ROWS + tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
    m_read, n_read = m % M, n % N  # what sticks out reads something and is not stored
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(begin, end, DEEP):
        row = start + tl.arange(0, DEEP)
        source = tl.load(token + row, mask=row < end, other=0).to(tl.int64)
        a_row, b_row = (row.to(tl.int64), source) if GATHERS_SECOND else (source, row.to(tl.int64))
        is_row = (row < end)[:, None]
        a = tl.load(first + a_row[:, None] * M + m_read[None, :], mask=is_row, other=0.0)
        b = tl.load(second + b_row[:, None] * N + n_read[None, :], mask=is_row, other=0.0)
        total = tl.dot(a.T, b, total)
    at = e.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def hidden_gradient(
    grad: Tensor, token: Tensor, plan: Any, w2: Tensor, weights: Tensor, gate: Tensor, up: Tensor
) -> tuple:
    """The first one -> hidden and the gradient of weights; gate and up become their gradients."""
    (_, f, d), (rows, columns, depth, group) = w2.shape, (128, 128, 64, 8)
    blocks, num_rows = -(-f // columns), len(token)
    hidden, sums = torch.empty_like(gate), torch.zeros(blocks, num_rows, device=gate.device)
    num_tiles, num_local = -(-num_rows // rows) + len(w2), len(w2)
    hidden_gradient_kernel[(num_tiles * blocks,)](
        grad, token, ep.tiles_of(w2, columns, depth), weights, plan.counts, gate, up, hidden, sums, num_tiles,
        num_local, num_rows, d, f, 1 << (num_local - 1).bit_length(), rows, columns, depth, group,
        num_warps=8, num_stages=4,
    )  # fmt: skip
    return hidden, sums.sum(0)


def weight_gradient(first: Tensor, second: Tensor, token: Tensor, plan: Any) -> Tensor:
    """The second one: first[token]^T second for each expert."""
    (m, n), num_local, (rows, columns, depth, group) = (
        (first.shape[1], second.shape[1]),
        len(plan.counts),
        (128, 128, 32, 8),
    )
    out = first.new_empty(num_local, m, n)
    weight_gradient_kernel[(-(-m // rows) * -(-n // columns), num_local)](
        first, second, token, plan.counts, out, num_local, m, n, False, 1 << (num_local - 1).bit_length(), depth,
        rows, columns, group, num_warps=4, num_stages=5,
    )  # fmt: skip
    return out


def with_tiles(way: str, tiles: tuple, run: Callable) -> Callable:
    """run with other tiles, and without a limit on columns."""

    def call() -> Any:
        with mock.patch.dict(ep.TILES, {way: tiles}), mock.patch.object(ep, "WIDEST_GATED", 1 << 30):
            return run()

    return call


def ended(run: Callable) -> Callable:
    """run with a program for every tile, which ends with it, instead of a program for every multiprocessor."""

    def call() -> Any:
        with mock.patch.object(ep, "num_cores", lambda device: 1 << 30):
            return run()

    return call


def all_of(tensors: tuple) -> Tensor:
    """All numbers of several tensors, so that one error speaks of all."""
    return torch.cat([t.float().flatten() / t.float().norm() for t in tensors])


def far(ours: Tensor, theirs: Tensor) -> float:
    """The relative error."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def ways(recorder: record.Recorder, layer: ep.EPMoE, x: Tensor, grad: Tensor, order: ep.RowOrder) -> dict:
    """{work: (operations, {way: what runs it}, what of its result is compared)}; the first way is grouped_mm's."""
    w1, w2, w3 = (getattr(layer.experts, name).detach() for name in ("w1", "w2", "w3"))
    num_rows, sent = len(order.choice_of_row), order.counts.sum()
    weights, token = torch.rand(num_rows, device=x.device), (order.choice_of_row // layer.config.top_k).int()
    grouped, fused = (kind(order.counts, num_rows) for kind in (ep.GroupedProducts, ep.FusedProducts))
    asked = x, order, w1, None, w3, None, weights, sent, ep.SwiGLU
    gate, up, hidden = grouped.gated(*asked)
    rows, grad_rows = grouped.rows(x, order), grouped.rows(grad, order)
    one = 2 * num_rows * w1.shape[1] * w1.shape[2]

    def two_products() -> tuple:
        with mock.patch.object(ep, "WIDEST_GATED", 0):
            return fused.gated(*asked)

    products = {
        "x w1": lambda plan: plan.times(rows, w1),
        "hidden w2": lambda plan: plan.times(hidden, w2),
        "grad w2^T": lambda plan: plan.times(grad_rows, w2.mT),
    }
    found = {}
    for name, run in products.items():
        found[name] = one, {"grouped": lambda run=run: run(grouped)}, lambda out: out
        for tiles in TILES["product"] if name == "x w1" else TILES["product"][:1]:
            plan = ep.FusedProducts(order.counts, num_rows)  # its table is of these tiles
            found[name][1][str(tiles)] = with_tiles("product", tiles, lambda run=run, plan=plan: run(plan))
        found[name][1]["a program a tile"] = ended(lambda run=run: run(fused))
    found["gated"] = 2 * one, {"grouped": lambda: grouped.gated(*asked)}, lambda out: out[2]
    found["gated"][1]["two products"] = two_products
    found["gated"][1].update(
        {str(t): with_tiles("gated", t, lambda: fused.gated(*asked)) for t in TILES["gated"]}
    )

    def gradient_of_x(plan: Any) -> Tensor:
        first, rest = plan.x_gradient(gate, up, w1, w3)
        return ep.sum_rows(first, order, rest)

    found["x_gradient"] = 2 * one, {"grouped": lambda: gradient_of_x(grouped)}, lambda out: out
    found["x_gradient"][1].update(
        {str(t): with_tiles("x_gradient", t, lambda: gradient_of_x(fused)) for t in TILES["x_gradient"]}
    )
    overwritten = [(gate.clone(), up.clone()) for _ in range(2)]  # gradients in place

    def activation_backward() -> tuple:
        into = grouped.times(grouped.rows(grad, order), w2.mT)
        return ep.weighted_activation_backward_(ep.SwiGLU, into, *overwritten[0], weights, sent)

    def one_kernel() -> tuple:
        hidden, sums = hidden_gradient(grad, token, grouped, w2, weights, *overwritten[1])
        return hidden, *overwritten[1], sums

    found["hidden gradient"] = one, {"grouped": activation_backward, "one kernel": one_kernel}, all_of
    found["weight gradient"] = (
        one,
        {
            "grouped": lambda: grouped.weight_gradient(grouped.rows(x, order), gate),
            "by index": lambda: weight_gradient(x, gate, token, grouped),
        },
        lambda out: out,
    )
    return found


def one_size(recorder: record.Recorder, size: str) -> dict:
    """{"parts", "tflop_per_s", "errors"} of every way."""
    layer = layers.make_layer(recorder, size)
    x, grad = layers.tokens(layer, layer.config.max_num_tokens)
    x, errors, runs, operations = x.detach(), {}, {}, {}
    with torch.no_grad():
        order = ep.order_rows(layer.router(x).topk_ids, layer.config.num_experts)
        for work, (count, of_work, compared) in ways(recorder, layer, x, grad, order).items():
            expected = None
            for way, run in of_work.items():
                name = f"{work}: {way}"
                if not recorder.on_gpu and work.endswith("gradient") and way in ("one kernel", "by index"):
                    continue
                result = compared(run())
                if expected is None:
                    expected = result.clone()
                else:
                    errors[name] = far(result, expected)
                runs[name], operations[name] = (run, 0), count
            del expected, result
        recorder.failures += [f"{size} {n}: {e:.1e}" for n, e in errors.items() if not e < 2e-2]
        found = parts.timed_parts(recorder, size, runs, passes=3)
    rates = {name: operations[name] / part["median_us"] / 1e6 for name, part in found.items()}
    for name, rate in rates.items():
        recorder.say(f"  {size:9} {name:34} {rate:6.0f} TFLOP/s")
    return {"parts": found, "tflop_per_s": rates, "errors": errors}


def measure(recorder: record.Recorder) -> None:
    """Every size, into the file one by one."""
    ceiling = layers.product_tflop_per_s(recorder, *([256] if recorder.args.small else []))
    recorder.say(f"  8192-cubed product: {ceiling:.0f} TFLOP/s")
    parts.measure_sizes(recorder, "fused", one_size, {"ceiling_tflop_per_s": ceiling})


if __name__ == "__main__":
    record.main(measure, parts.flags(__doc__))
