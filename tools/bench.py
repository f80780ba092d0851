"""Measures variants of one thing, alternating in one process group and one run, into results/.

    python tools/bench.py step            a training step at the seed's sizes, two gloo ranks: ours and the seed's
    python tools/bench.py step --device cuda --ranks 1

Every round times each variant once, in turn, so that a slow minute of the machine hits all alike. A result holds
the hardware's model, versions, the command and all samples; compare medians of one file, never two files.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402


def our_step(config: ep.MoEConfig, comm: ep.Communicator, device: torch.device) -> Callable[[], None]:
    """A training step of the launcher: draw, forward, backward, all-reduce, check, AdamW."""
    options = ep.TrainingOptions()
    num_tokens = 32 * comm.size
    model = ep.EPMoE(config, comm, device=device)
    stream = ep.TokenStream(config, 0, num_tokens, comm, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)

    def step() -> None:
        x, target = stream.next()
        optimizer.zero_grad()
        losses = ep.train_step(model, x, target, num_tokens, options)
        if device.type == "cpu":
            ep.check_finite(losses, 0, comm)
        optimizer.step()

    return step


def seed_step(config: ep.MoEConfig, comm: ep.Communicator, device: torch.device) -> Callable[[], None]:
    """A training step of the seed's algorithm (build/seed.py), row by row in Python."""
    from build.seed import SeedTraining

    if device.type == "cuda":
        torch.set_default_device(device)
    training = SeedTraining(config, comm)
    torch.set_default_device("cpu")
    return lambda: float(training.step()) and None


def step_variants(comm: ep.Communicator, device: torch.device) -> dict[str, Callable[[], None]]:
    """{name: one step} at the seed's sizes: 16 experts, top-2, hidden 256, 32 tokens a rank."""
    variants = {"seed": seed_step(ep.MoEConfig(), comm, device)} if device.type == "cpu" else {}
    dispatchers = ep.REGISTRIES["dispatcher"].items()
    for dispatcher in sorted(name for name, kind in dispatchers if not hasattr(kind, "needs_capacity")):
        for experts in sorted(ep.REGISTRIES["experts"]):
            config = ep.MoEConfig(dispatcher=dispatcher, experts=experts)
            variants[f"{dispatcher}+{experts}"] = our_step(config, comm, device)
    return variants


def time_ms(step: Callable[[], None], steps: int, comm: ep.Communicator, device: torch.device) -> float:
    """Milliseconds a step over a block of steps that all ranks start together."""
    comm.all_reduce(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / steps


def measure(variants: dict, rounds: int, steps: int, comm: ep.Communicator, device: torch.device) -> dict:
    """{name: samples in ms}, variants alternating; one warm-up round before."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, step in variants.items():
            value = time_ms(step, steps, comm, device)
            if turn:
                samples[name].append(value)
    return samples


def write_result(
    what: str, samples: dict[str, list[float]], args: argparse.Namespace, device: torch.device
) -> None:
    """results/<device>_<what>.json and a table on the screen."""
    model = ep.device_model(device)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    slug = "h100" if "H100" in model else "h200" if "H200" in model else device.type
    command = (
        f"python tools/bench.py {what} --ranks {args.ranks} --device {device.type} --rounds {args.rounds}"
    )
    result = {
        "what": what, "device": model, "num_cores": os.cpu_count(), "ranks": args.ranks,
        "torch": torch.__version__, "python": sys.version.split()[0], "command": command,
        "steps_per_sample": args.steps, "median_ms": medians, "samples_ms": samples,
    }  # fmt: skip
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{slug}_{what}.json").write_text(json.dumps(result, indent=1) + "\n")
    baseline = "seed" if "seed" in medians else max(medians, key=medians.get)
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        print(f"{name:24} {median:8.3f} ms   {medians[baseline] / median:5.2f} x the speed of {baseline}")


def work(args: argparse.Namespace) -> None:
    """One rank's part."""
    device = ep.choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ep.world_from_env()[1] > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=120))
    comm = ep.Communicator()
    samples = measure(WHAT[args.what](comm, device), args.rounds, args.steps, comm, device)
    if comm.rank == 0:
        write_result(args.what, samples, args, device)
    if dist.is_initialized():
        dist.destroy_process_group()


WHAT = {"step": step_variants}


def main() -> int:
    """Starts the ranks, which run this file again with --worker."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(WHAT))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=20, help="samples of each variant, at least 20 for results/"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps in a sample")
    parser.add_argument("--output", default=str(ROOT / "results"), help="folder for the result")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return 0
    extract = [sys.executable, "tools/extract.py", "--tags", "seed", "--output", "build/seed.py"]
    (ROOT / "build").mkdir(exist_ok=True)
    subprocess.run(extract, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={args.ranks}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(
        [*torchrun, str(Path(__file__).resolve()), *sys.argv[1:], "--worker"], env=environment
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
