"""What stands around the experts' products, part by part, and whole layers of every experts kind. On one GPU.

    python measure/parts.py                     all sizes, into results/<device>_parts.json
    python measure/parts.py --before build/before.py   beside another commit's launcher.py (measure/before.py)
    python measure/parts.py --device cpu --small       whether it runs, anywhere

Each part is recorded as a CUDA graph, so that its kernels are timed and not their launches, and beside its time stand
the bytes that it must move at the least. Layers are those of measure/layer.py, forward and backward, recorded too; the
profiler watches the same replays, back to back, and nvidia-smi the clock and the power meanwhile. `quack` takes part
where quack-kernels is installed, SonicMoE where it is: `pip install --no-deps --target build/site-packages
sonic-moe==0.1.2.post1` and PYTHONPATH=build/site-packages. (The folder's name matters: quack-kernels searches code that
lies elsewhere for what may change, and refuses what it finds in cutlass's.)
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import layer as layers  # noqa: E402
from measure import record  # noqa: E402

Part = tuple[Callable[[], Any], int]  # what is timed, and the bytes that it must move


def kinds(layer: ep.EPMoE) -> list[str]:
    """The experts kinds that take part: those that can run here."""
    device, usual = layer.experts.w1.device, ("grouped", "fused", "grouped_fp8", "quack")
    return [k for k in usual if ep.REGISTRIES["experts"][k].preference(layer.config, device, 1) > 0]


def moving_parts(layer: ep.EPMoE, x: Tensor, order: ep.RowOrder) -> dict[str, Part]:
    """Copies, sums and activations, in their order in a pass.

    SwiGLU's backward works in place, so all but its first call read what the last one left: it moves as many bytes.
    """
    w1, num_rows = layer.experts.w1.detach(), len(order.choice_of_row)
    rows, gate = (torch.randn(num_rows, n, device=x.device).to(x.dtype) for n in w1.shape[1:])
    others = torch.randn_like(rows)
    up, grad, weights = torch.randn_like(gate), torch.randn_like(gate), torch.rand(num_rows, device=x.device)
    sent, index = order.counts.sum(), order.row_of_choice.nbytes
    used = [grad, gate.clone(), up.clone()]
    return {
        "copy_to_rows": (lambda: ep.copy_to_rows(x, order), x.nbytes + rows.nbytes + index),
        "sum_rows": (lambda: ep.sum_rows(rows, order), rows.nbytes + x.nbytes + index),
        "sum_rows of two": (lambda: ep.sum_rows(rows, order, others), 2 * rows.nbytes + x.nbytes + index),
        "swiglu": (
            lambda: ep.weighted_activation(ep.SwiGLU, gate, up, weights, sent),
            3 * gate.nbytes + weights.nbytes,
        ),
        "swiglu backward": (
            lambda: ep.weighted_activation_backward_(ep.SwiGLU, *used, weights, sent),
            6 * gate.nbytes + 2 * weights.nbytes,
        ),
    }


def product_parts(layer: ep.EPMoE, x: Tensor, order: ep.RowOrder) -> dict[str, Part]:
    """One product of each sort by every kind, with what it does to its factors; and FP8's conversions alone."""
    w1, w2 = layer.experts.w1.detach(), layer.experts.w2.detach()
    num_rows = len(order.choice_of_row)
    hidden = torch.randn(num_rows, w2.shape[1], device=x.device).to(x.dtype)
    weights = torch.rand(num_rows, device=x.device)
    parts: dict[str, Part] = {}
    for kind in kinds(layer):
        products = ep.REGISTRIES["experts"][kind].products(order.counts, num_rows)
        rows = products.rows(x, order)
        grad = torch.randn_like(x)
        moved = num_rows * x.shape[1] * x.itemsize + w1.nbytes
        parts[f"{kind}, rows"] = (lambda p=products: p.rows(x, order), x.nbytes)
        parts[f"{kind}, x w1"] = (lambda p=products, r=rows: p.times(r, w1), moved + hidden.nbytes)
        parts[f"{kind}, hidden w2"] = (lambda p=products: p.times(hidden, w2), moved + hidden.nbytes)
        if kind == "grouped_fp8":
            continue  # backward is grouped's
        grads = products.rows(grad, order)
        parts[f"{kind}, grad w2^T"] = (
            lambda p=products, g=grads: p.times(g, w2.transpose(1, 2)),
            moved + hidden.nbytes,
        )
        parts[f"{kind}, x^T grad"] = (
            lambda p=products, r=rows: p.weight_gradient(r, hidden),
            moved + hidden.nbytes,
        )
        parts[f"{kind}, hidden^T grad"] = (
            lambda p=products, g=grads: p.weight_gradient(hidden, g),
            moved + hidden.nbytes,
        )
        gated = (x, order, w1, None, w1, None, weights, order.counts.sum(), ep.SwiGLU)
        parts[f"{kind}, gated"] = (
            lambda p=products, g=gated: p.gated(*g),
            x.nbytes + 2 * w1.nbytes + 3 * hidden.nbytes,
        )
        overwritten = products.gated(*gated)[:2]
        parts[f"{kind}, hidden gradient"] = (
            lambda p=products, g=grads, t=overwritten, more=gated[6:]: p.hidden_gradient(g, w2, *t, *more),
            moved + 5 * hidden.nbytes,
        )
        parts[f"{kind}, x gradient"] = (
            lambda p=products: p.x_gradient(hidden, hidden, w1, w1),
            2 * w1.nbytes + 2 * hidden.nbytes + num_rows * x.shape[1] * x.itemsize,
        )
    if "grouped_fp8" in kinds(layer):
        parts["scale_rows of x"] = (lambda: ep.scale_rows(x), 3 * x.nbytes // 2)
        parts["scale_rows of hidden"] = (lambda: ep.scale_rows(hidden), 3 * hidden.nbytes // 2)
        parts["scale_columns of w1"] = (lambda: ep.scale_columns(w1), 3 * w1.nbytes // 2)
    return parts


def few_configurations() -> None:
    """Before quack's products are imported: what it tries where SonicMoE tunes them, six of its seventy and more."""
    from quack import gemm_config

    tiles = (128, 128, True), (128, 160, True), (128, 192, True), (128, 256, False), (256, 128, False)
    gemm_config.get_all_configs = lambda *_, **__: [
        gemm_config.GemmConfig(
            tile_m=m, tile_n=n, pingpong=pingpong, cluster_m=2, cluster_n=1, is_dynamic_persistent=False
        )
        for m, n, pingpong in (*tiles, (256, 192, False))
    ]


def clock_and_power(replay: Callable[[], Any], seconds: float = 0.6) -> dict[str, float]:
    """{"mhz", "watts"}: medians of what nvidia-smi saw every 20 ms while a pass was replayed back to back."""
    asked = "nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "20"
    seen = subprocess.Popen(asked, stdout=subprocess.PIPE, text=True)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(4):
            replay()
        torch.cuda.synchronize()
    seen.terminate()
    lines = [line.split(",") for line in seen.communicate()[0].splitlines()[:-1] if line.count(",") == 1]
    return dict(
        zip(
            ("mhz", "watts"),
            (statistics.median(map(float, c)) for c in zip(*lines, strict=True)),
            strict=False,
        )
    )


def layer_makers(recorder: record.Recorder, layer: ep.EPMoE) -> dict[str, Callable[[], layers.Variant]]:
    """{name: what makes it}: every kind on the weights of `layer`, and another commit's grouped."""

    def make(launcher: Any, experts: str) -> layers.Variant:
        other = launcher.sharing(layer, experts=experts)
        return layers.Variant(lambda x: launcher.forward(other, x)[0], list(other.parameters()))

    made = {k: lambda k=k: make(recorder.launchers[""], k) for k in kinds(layer)}
    if importlib.util.find_spec("sonicmoe"):
        made["SonicMoE"] = lambda: layers.sonicmoe_layer(layer)
    if recorder.before:
        made["before, grouped"] = lambda: make(recorder.launchers["before, "], "grouped")
    return made


def timed_parts(
    recorder: record.Recorder, size: str, parts: dict[str, Part], passes: int = 4
) -> dict[str, dict]:
    """{part: its samples in us, and bytes}; one that cannot run is left out, with a line."""
    runs, found = {}, {}
    for name, (run, _) in parts.items():
        try:
            with torch.no_grad():
                run()
                runs[name] = record.captured(run) if recorder.on_gpu else run
        except Exception as error:
            recorder.say(f"  {size}: {name} left out: {type(error).__name__}: {str(error)[:400]}")
    samples = recorder.alternate(runs, passes, recorder.event_ms, warm_up=2)
    for name, values in samples.items():
        micros = [round(1e3 * ms, 2) for ms in values]
        median = record.medians({name: micros})[name]
        found[name] = {"samples_us": micros, "median_us": median, "bytes": parts[name][1]}
        rate = f" {parts[name][1] / median / 1e3:8.1f} GB/s" if parts[name][1] else ""
        recorder.say(f"  {size:9} {name:32} {median:9.1f} us{rate}")
    return found


def one_size(recorder: record.Recorder, size: str) -> dict:
    """Parts, then layers."""
    layer = layers.make_layer(recorder, size)
    c, batch = layer.config, layers.tokens(layer, layer.config.max_num_tokens)
    x = batch[0].detach()
    with torch.no_grad():
        routing = layer.router(x)
        order = ep.order_rows(routing.topk_ids, c.num_experts)
        parts = moving_parts(layer, x, order) | product_parts(layer, x, order)
        found = {"parts": timed_parts(recorder, size, parts)}
    del parts
    recorder.free_memory()
    passes, checked = layers.prepare(
        recorder, size, layer, layer_makers(recorder, layer), batch, checked=batch
    )
    timed = dict(passes)
    if recorder.on_gpu:
        replays = {name: record.captured(run) for name, run in passes.items()}
        timed |= {f"{name}, recorded": replay for name, replay in replays.items()}
    samples = recorder.alternate(timed, 2, recorder.event_ms, warm_up=2)
    if recorder.on_gpu:
        checked["clock"] = {name: clock_and_power(replay) for name, replay in replays.items()}
        checked["kernels_ms"] = {n: layers.kernel_times(replay, 30) for n, replay in replays.items()}
    return found | layers.finish(recorder, size, layer, samples, checked)


def measure_sizes(recorder: record.Recorder, what: str, one_size: Callable, result: dict) -> None:
    """one_size(recorder, size) of every size, into results/<device>_<what>.json one by one; then what is wrong."""
    result["sizes"] = {}
    for size in recorder.args.sizes:
        if recorder.args.small and size not in layers.SMALL_SIZES:
            continue
        result["sizes"][size] = one_size(recorder, size)
        recorder.free_memory()
        recorder.write(what, result)
    for failure in recorder.failures:
        recorder.say(f"FAILED: {failure}")


def measure(recorder: record.Recorder) -> None:
    """Every size."""
    if recorder.on_gpu and importlib.util.find_spec("sonicmoe"):
        few_configurations()
    measure_sizes(recorder, "parts", one_size, {})


def flags(doc: str, **more: Any) -> argparse.ArgumentParser:
    """The flags, of measure/fused.py too."""
    parser = record.parser(doc, device="cuda", rounds=20, small=False, **more)
    parser.add_argument("--sizes", nargs="+", choices=list(layers.SIZES), default=list(layers.SIZES))
    return parser


if __name__ == "__main__":
    record.main(measure, flags(__doc__, before=None))
