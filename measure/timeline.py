"""What a GPU and its host do during one forward and backward pass of a layer over several GPUs, into results/.

    torchrun --standalone --nproc_per_node=2 measure/timeline.py

Qwen3-30B's sizes, `all_to_all` and `grouped`, rank 0, by torch.profiler, after a warm-up. Kernels and copies as
[category, stream, start in us, length in us]; of the host the starts of kernels and the calls in which it waits for
the device. Every start is counted from that of the pass. The profiler makes the host slower: read the order and the
waiting, and not the sum.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402

SIZES = {"num_experts": 128, "top_k": 8, "hidden_dim": 2048, "ffn_dim": 768}
CATEGORIES = (  # the first one whose word is in a kernel's name
    ("messages", ("nccl",)),
    ("products", ("gemm", "cutlass", "nvjet", "grouped")),
    ("activation", ("swiglu",)),
    ("permute", ("copy_to_rows", "sum_rows")),
)
WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize")


def category(name: str) -> str:
    """What a kernel does, by its name."""
    found = (kind for kind, words in CATEGORIES if any(word in name.lower() for word in words))
    return next(found, "everything else")


def trace(run: object) -> list[dict]:
    """The events of one call of run, as torch.profiler writes them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a rank")
    parser.add_argument("--output", default="results", help="folder for the result")
    args = parser.parse_args()
    mesh, device = ep.init_ep(), torch.device("cuda", torch.cuda.current_device())
    config = ep.MoEConfig(**SIZES, dispatcher="all_to_all", experts="grouped", activation="swiglu",
                          dtype="bfloat16", balance="none")  # fmt: skip
    with device:
        layer = ep.EPMoE(config, mesh, seed=0, device=device)
        x = torch.randn(args.tokens, config.hidden_dim, dtype=torch.bfloat16, requires_grad=True)

    def run() -> None:
        with record_function("forward"):
            y = layer(x)
        with record_function("backward"):
            y.sum().backward()
        x.grad = None
        layer.zero_grad()

    for _ in range(10):
        run()
    torch.cuda.synchronize()
    mesh.batch.all_reduce(torch.zeros(1, device=device))
    events = [event for event in trace(run) if event.get("ph") == "X"]
    start = min(e["ts"] for e in events if e["name"] == "forward")

    def placed(event: dict) -> list[float]:
        return [round(event["ts"] - start, 1), round(event["dur"], 1)]

    device_events = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    result = {
        "what": "timeline", "device": torch.cuda.get_device_name(), "world_size": mesh.batch.size,
        "torch": torch.__version__, "command": f"torchrun --standalone --nproc_per_node={mesh.batch.size} "
        f"measure/timeline.py --tokens {args.tokens}", "sizes": SIZES | {"tokens": args.tokens},
        "phases": {e["name"]: placed(e) for e in events
                   if e["name"] in ("forward", "backward") and e.get("cat") == "user_annotation"},
        "kernels": sorted([[category(e["name"]), e["args"]["stream"], *placed(e)] for e in device_events],
                          key=lambda kernel: kernel[2]),
        "starts": sorted(placed(e)[0] for e in events if "Launch" in e["name"] and e.get("cat") == "cuda_runtime"),
        "waits": sorted([e["name"], *placed(e)] for e in events if e["name"] in WAITS),
    }  # fmt: skip
    if mesh.batch.rank == 0:
        kind = "h200" if "H200" in result["device"] else "h100"
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, separators=(",", ": ")).replace('["', '\n["')
        (folder / f"{kind}_x{mesh.batch.size}_timeline.json").write_text(text + "\n")
        names = sorted({e["name"][:90] for e in device_events if category(e["name"]) == "everything else"})
        print(len(device_events), "kernels;", result["phases"], result["waits"], *names, sep="\n")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # NCCL's watchdog may outlive the group
