"""What bounds the kernels of chapters 06 and 14: hardware counters, read by Nsight Compute (ncu). On one GPU.

    python measure/counters.py                   all sizes, into results/<device>_counters.json; half a minute

ncu runs this file again, with --run, and plays each kernel several times, once for each set of counters. The clocks are
left as they are. Bytes are those that went through device memory; `tensor_pct` is the share of all cycles in which
the matrix units worked; `l2_hit_pct` the share of sectors that were found in the L2 cache; `stalls` says for what a
warp waited, in warps that wait for each instruction issued: the four largest.
"""

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import layer as layers  # noqa: E402
from measure import parts, record  # noqa: E402

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
REASONS = ("long_scoreboard", "short_scoreboard", "gmma", "barrier", "wait", "math_pipe_throttle", "mio_throttle",
           "lg_throttle", "membar", "drain", "sleeping", "not_selected", "dispatch_stall", "selected")  # fmt: skip
COUNTERS = {
    "ms": "gpu__time_duration.sum",
    "bytes_read": "dram__bytes_read.sum",
    "bytes_written": "dram__bytes_write.sum",
    "tensor_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l2_hit_pct": "lts__t_sector_hit_rate.pct",
}
UNITS = {"ns": 1e-6, "us": 1e-3, "usecond": 1e-3, "nsecond": 1e-6, "ms": 1.0, "msecond": 1.0, "s": 1e3,
         "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 1, "": 1, "inst": 1}  # fmt: skip


KERNELS = {  # part: some of the name of the kernel that is meant, in the order in which they run
    "copy_to_rows": "copy_to_rows_kernel", "x w1, grouped_mm": "cutlass|nvjet",
    "x w1, persistent": "rows_product_kernel",
    "gate and up": "gate_up_kernel", "x gradient": "x_gradient_kernel", "swiglu backward": "swiglu_backward_kernel",
    "sum_rows": "sum_rows_kernel",
}  # fmt: skip


def ladder(layer: ep.EPMoE, x: torch.Tensor, grad: torch.Tensor) -> dict[str, Callable]:
    """{name: what launches it}, as in KERNELS."""
    order = ep.order_rows(layer.router(x).topk_ids, layer.config.num_experts)
    num_rows, sent = len(order.choice_of_row), order.counts.sum()
    w1, w2, w3 = (getattr(layer.experts, name).detach() for name in ("w1", "w2", "w3"))
    grouped, fused = (kind(order.counts, num_rows) for kind in (ep.GroupedProducts, ep.FusedProducts))
    rows, weights = grouped.rows(x, order), torch.rand(num_rows, device=x.device)
    gate, up = fused.times(rows, w1), fused.times(rows, w3)
    into = grouped.times(grouped.rows(grad, order), w2.mT)

    def gated() -> None:
        with mock.patch.object(ep, "WIDEST_GATED", 1 << 30):
            fused.gated(x, order, w1, None, w3, None, weights, sent, ep.SwiGLU)

    runs = (
        lambda: ep.copy_to_rows(x, order), lambda: grouped.times(rows, w1), lambda: fused.times(rows, w1), gated,
        lambda: fused.x_gradient(gate, up, w1, w3),
        lambda: ep.weighted_activation_backward_(ep.SwiGLU, into, gate, up, weights, sent),
        lambda: ep.sum_rows(rows, order),
    )  # fmt: skip
    return dict(zip(KERNELS, runs, strict=True))


def run_all(recorder: record.Recorder) -> None:
    """Inside ncu: every kernel once, after a run that nobody watches."""
    for size in recorder.args.sizes:
        layer = layers.make_layer(recorder, size)
        x, grad = layers.tokens(layer, layer.config.max_num_tokens)
        with torch.no_grad():
            for run in ladder(layer, x.detach(), grad).values():
                run()
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStart()
                run()
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStop()
        del layer, x, grad
        recorder.free_memory()


def read_counters(text: str) -> list[dict]:
    """ncu's table, a line a kernel -> [{"kernel", "grid", counters by our names, "stalls"}]."""
    lines = text[text.index('"ID"') :].splitlines()
    header, units, *rows = csv.reader(lines)
    found = []
    for row in rows:
        units_of, cells = dict(zip(header, units, strict=True)), dict(zip(header, row, strict=True))

        def number(metric: str, cells: dict = cells, units_of: dict = units_of) -> float:
            return float(cells[metric].replace(",", "")) * UNITS[units_of[metric]]

        stalls = {reason: round(number(STALL.format(reason)), 2) for reason in REASONS}
        largest = sorted(stalls, key=stalls.get, reverse=True)[:4]
        counters = {name: round(number(metric), 4) for name, metric in COUNTERS.items()}
        launch = {
            "kernel": cells["Kernel Name"][:120],
            "grid": cells["Grid Size"],
            "block": cells["Block Size"],
        }
        found.append(launch | counters | {"stalls": {reason: stalls[reason] for reason in largest}})
    return found


def measure(recorder: record.Recorder) -> None:
    """Runs ncu, and picks each part's kernel out of what it printed."""
    if recorder.args.run:
        return run_all(recorder)
    metrics = [*COUNTERS.values(), *(STALL.format(reason) for reason in REASONS)]
    command = [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
        "--metrics", ",".join(metrics), sys.executable, __file__, "--run", "--sizes", *recorder.args.sizes,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if '"ID"' not in done.stdout:
        sys.exit(f"error: ncu has read nothing: {(done.stdout + done.stderr)[-2000:]}")
    launches, sizes = read_counters(done.stdout), {}
    for size in recorder.args.sizes:
        sizes[size] = {}
        for name, kernel in KERNELS.items():
            while not re.search(kernel, launches[0]["kernel"]):
                launches.pop(0)  # what runs beside it
            found = launches.pop(0)
            while launches and re.search(kernel, launches[0]["kernel"]):
                found = max(
                    found, launches.pop(0), key=lambda launch: launch["ms"]
                )  # grouped_mm's plan, its products
            sizes[size][name] = found
            moved = (found["bytes_read"] + found["bytes_written"]) / 1e9
            recorder.say(
                f"  {size:9} {name:18} {found['ms']:7.3f} ms {moved:6.2f} GB {moved / found['ms']:6.2f} TB/s  tensor "
                f"{found['tensor_pct']:4.1f}%  L2 {found['l2_hit_pct']:4.1f}%  {found['stalls']}"
            )
    version = subprocess.run(["ncu", "--version"], capture_output=True, text=True).stdout
    recorder.write("counters", {"ncu": version.partition("Version ")[2].split()[0], "sizes": sizes})


def flags() -> argparse.ArgumentParser:
    """The flags."""
    parser = parts.flags(__doc__)
    parser.add_argument("--run", action="store_true", help="inside ncu: run the kernels")
    return parser


if __name__ == "__main__":
    record.main(measure, flags())
