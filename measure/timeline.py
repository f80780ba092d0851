"""What a GPU and its host do during one forward and backward pass of a layer over several GPUs, into results/.

    torchrun --standalone --nproc_per_node=2 measure/timeline.py

Qwen3-30B's sizes, `all_to_all` and `grouped`, rank 0, the second of three passes in a row, by torch.profiler. In us
from the pass's start on the host: kernels, [category, start, length], copies and memsets too; starts, when the host
started one; waits, [call, start, length] in which the host waited for the device; host, its two phases.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
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


def trace(run: Callable[[], None], passes: int = 3) -> list[dict]:
    """The events of some calls of run, as torch.profiler writes them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(passes):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def second_pass(events: list[dict]) -> dict[str, list]:
    """What belongs to the second pass, in us from its start on the host; kernels by who started them."""
    phases = {name: sorted((e for e in events if e["name"] == name and e["cat"] == "user_annotation"),
                           key=lambda e: e["ts"]) for name in ("forward", "backward")}  # fmt: skip
    start, end = phases["forward"][1]["ts"], phases["forward"][2]["ts"]

    def placed(event: dict) -> list[float]:
        return [round(event["ts"] - start, 1), round(event["dur"], 1)]

    host = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and start <= e["ts"] < end]
    started = {e["args"]["correlation"] for e in host}
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
              and e["args"]["correlation"] in started]  # fmt: skip
    return {
        "host": [[name, *placed(phases[name][1])] for name in phases],
        "waits": [[e["name"], *placed(e)] for e in host if e["name"] in WAITS],
        "starts": sorted(placed(e)[0] for e in host if "Launch" in e["name"]),
        "kernels": sorted(([category(e["name"]), *placed(e)] for e in device), key=lambda kernel: kernel[1]),
    }


def write(events: list[dict], args: argparse.Namespace, world_size: int) -> None:
    """The result, with machine and command."""
    name = torch.cuda.get_device_name()
    result = {
        "what": "timeline", "device": name, "world_size": world_size, "torch": torch.__version__,
        "command": f"torchrun --standalone --nproc_per_node={world_size} measure/timeline.py --tokens {args.tokens}",
        "sizes": SIZES | {"tokens": args.tokens}, **second_pass(events),
    }  # fmt: skip
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    kind = "h200" if "H200" in name else "h100"
    (folder / f"{kind}_x{world_size}_timeline.json").write_text(
        json.dumps(result, separators=(",", ": ")) + "\n"
    )


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
    for _ in range(2):  # the first time, the profiler itself has much to set up
        torch.cuda.synchronize()
        mesh.batch.all_reduce(torch.zeros(1, device=device))
        torch.cuda.synchronize()
        events = trace(run)
    if mesh.batch.rank == 0:
        write(events, args, mesh.batch.size)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # NCCL's watchdog may outlive the group
