"""Measures variants of one thing, alternating in one process group and one run, into results/.

    python measure/step.py step            a training step at the seed's sizes, two gloo ranks: ours and the seed's
    python measure/step.py step --device cuda --ranks 1
    python measure/step.py step --before build/before.py   beside another commit's launcher.py (measure/before.py)

Every round times each variant once, in turn, so that a slow minute of the machine hits all alike. A result holds
the hardware's model, versions, the command and all samples; compare medians of one file, never two files.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import before  # noqa: E402


def extract_seed() -> None:
    """Writes build/seed.py: the seed's algorithm, from the cells that hold it."""
    (ROOT / "build").mkdir(exist_ok=True)
    command = [sys.executable, "tools/extract.py", "--tags", "seed", "--output", "build/seed.py"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def load_seed() -> ModuleType:
    """build/seed.py as a module, by its path: other packages are named `build` too."""
    return before.load(ROOT / "build" / "seed.py", "ep_seed")


def seed_step(config: ep.MoEConfig, comm: ep.Communicator, device: torch.device) -> Callable[[], None]:
    """A training step of the seed's algorithm (build/seed.py), row by row in Python."""
    with device:
        training = load_seed().SeedTraining(config, comm)

    def step() -> None:
        with device:
            float(training.step())

    return step


def step_variants(
    device: torch.device, launchers: dict[str, before.Launcher]
) -> dict[str, Callable[[], object]]:
    """{name: one step} at the seed's sizes: 16 experts, top-2, hidden 256, 32 tokens a rank."""
    seed = seed_step(ep.MoEConfig(), ep.Communicator(), device)
    variants = {"seed": seed} if device.type == "cuda" else {"seed": seed, "seed in batches": seed}
    kinds = product(*(sorted(ep.REGISTRIES[kind]) for kind in ("dispatcher", "experts")))
    wanted = [(*names, "eager") for names in kinds if names[0] != "capacity"]
    if device.type == "cuda":
        wanted += [("local", "bmm", "graph"), ("local", "bmm", "compiled"), ("capacity", "bmm", "graph")]
    for prefix, launcher in launchers.items():
        for dispatcher, experts, step in wanted:
            flags = ["--dispatcher", dispatcher, "--experts", experts, "--step", step]
            flags += ["--capacity-factor", "8"] if dispatcher == "capacity" else []
            with contextlib.suppress(ValueError):  # what cannot run here
                name = f"{prefix}{dispatcher}+{experts}" + (f", {step}" if step != "eager" else "")
                variants[name] = launcher.step(flags, device)
    return variants


def schedule_threads(policy: int) -> None:
    """Puts every thread of this process under a scheduling policy: os.SCHED_OTHER, os.SCHED_BATCH. Linux only."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setscheduler(int(thread), policy, os.sched_param(0))


def as_scheduled(name: str, device: torch.device) -> None:
    """The threads as the variant of this name has them: the seed leaves them alone, the launcher's main does not."""
    if device.type == "cpu" and hasattr(os, "sched_setscheduler"):
        schedule_threads(os.SCHED_OTHER if name == "seed" else os.SCHED_BATCH)


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


def measure(
    variants: dict,
    rounds: int,
    steps: int,
    comm: ep.Communicator,
    device: torch.device,
    is_over: Callable[[], bool] = lambda: False,
) -> dict:
    """{name: samples in ms}, variants alternating; one warm-up round before.

    is_over: asked before each round after the first two, on every rank alike; where it says yes, no more follow.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        if turn > 1 and is_over():
            break
        for name, step in variants.items():
            as_scheduled(name, device)
            value = time_ms(step, steps, comm, device)
            if turn:
                samples[name].append(value)
    return samples


def device_slug(device: torch.device) -> str:
    """The hardware's name in a result's file name."""
    model = ep.device_model(device)
    return "h100" if "H100" in model else "h200" if "H200" in model else device.type


def write_result(
    what: str, samples: dict[str, list[float]], args: argparse.Namespace, device: torch.device
) -> None:
    """results/<device>_<what>.json and a table on the screen."""
    model = ep.device_model(device)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    command = f"python measure/step.py {what} --ranks {args.ranks} --device {device.type} "
    command += f"--rounds {args.rounds} --steps {args.steps}" + (" --before FILE" if args.before else "")
    result = {
        "what": what, "device": model, "num_cores": os.cpu_count(), "ranks": args.ranks,
        "torch": torch.__version__, "python": sys.version.split()[0], "command": command,
        "steps_per_sample": args.steps, "median_ms": medians, "samples_ms": samples,
    } | before.before_facts(args)  # fmt: skip
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{device_slug(device)}_{what}.json").write_text(json.dumps(result, indent=1) + "\n")
    baseline = "seed" if "seed" in medians else max(medians, key=medians.get)
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        print(f"{name:32} {median:8.3f} ms   {medians[baseline] / median:5.2f} x the speed of {baseline}")


def work(args: argparse.Namespace) -> None:
    """One rank's part."""
    ep.keep_freed_memory()  # as the launcher does
    device = ep.choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ep.world_from_env()[1] > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=120))
    comm = ep.Communicator()
    variants = WHAT[args.what](device, before.launchers(args))
    samples = measure(variants, args.rounds, args.steps, comm, device)
    if comm.rank == 0:
        write_result(args.what, samples, args, device)
    del variants
    gc.collect()  # recorded steps hold the group's messages
    if dist.is_initialized():
        dist.destroy_process_group()


WHAT = {"step": step_variants}


def run_again_on_ranks(script: str, ranks: int) -> int:
    """Starts this command once more, on ranks and with --worker -> torchrun's exit code. Extracts build/seed.py."""
    extract_seed()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [*torchrun, str(Path(script).resolve()), *sys.argv[1:], "--worker"]
    return subprocess.run(command, env=environment).returncode


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
    before.add_flag(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return 0
    return run_again_on_ranks(__file__, args.ranks)


if __name__ == "__main__":
    sys.exit(main())
