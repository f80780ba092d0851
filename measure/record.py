"""What every measurement shares: flags, ranks, variants that take turns, memory, graphs, and the file in results/.

A program of this folder says what is measured; this says how. Every round times each variant once, in turn and in
one process group, so that a slow minute of the machine hits all alike. Compare medians of one file, never two files.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_launcher import launcher as ep
from measure import before, original
from measure.original import ROOT

FLAGS: dict[str, dict[str, Any]] = {
    "ranks": {"type": int, "help": "processes, which this command starts"},
    "device": {"choices": ["auto", "cpu", "cuda"]},
    "rounds": {"type": int, "help": "samples of each variant, at least 20 for results/"},
    "steps": {"type": int, "help": "steps in a sample"},
    "small": {"action": "store_true", "help": "small sizes and few rounds: whether it runs, anywhere"},
    "before": {"metavar": "FILE", "help": "another commit's launcher.py, timed beside ours"},
    "output": {"metavar": "FOLDER", "help": "where the result goes"},
}
PLACES = (
    "--output",
    "--torchtitan",
)  # flags that say where something lies, and nothing about what was measured
PEERS = ("transformers", "torchtitan", "quack", "sonicmoe", "cutlass")


def parser(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """The flags of FLAGS that defaults names, and --output."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, default in ({"output": str(ROOT / "results")} | defaults).items():
        made.add_argument(f"--{name}", default=default, **FLAGS[name])
    return made


def command() -> str:
    """The command that runs, without this machine's paths."""
    size = ep.world_from_env()[1]
    started = size > 1 and "MEASURE_RANKS" not in os.environ
    words = f"torchrun --standalone --nproc_per_node={size}" if started else "python"
    kept, arguments = [], iter(sys.argv[1:])
    for word in arguments:
        name, _, value = word.partition("=")
        if name in (*PLACES, "--before"):
            value or next(arguments, None)
            kept += ["--before FILE"] if name == "--before" else []
        else:
            kept.append(shlex.quote(word))
    return " ".join([words, f"measure/{Path(sys.argv[0]).name}", *kept])


def sha256(path: str | Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def version_of(package: str) -> str:
    """A loaded package's version."""
    try:
        names = importlib.metadata.packages_distributions().get(package, [package])
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules[package], "__version__", "unknown"))


def facts(device: torch.device, before_path: str | None = None) -> dict[str, Any]:
    """What the numbers were measured with: machine, versions, programs, command. What is not here is left out."""
    on_gpu = device.type == "cuda"
    found = {
        "device": ep.device_model(device), "num_cores": os.cpu_count(), "world_size": ep.world_from_env()[1],
        "backend": dist.get_backend() if dist.is_initialized() else None, "torch": torch.__version__,
        "cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "triton": ep.triton and ep.triton.__version__, "python": sys.version.split()[0],
        "peers": {name: version_of(name) for name in PEERS if name in sys.modules} or None,
        "launcher_sha256": sha256(ep.__file__), "before_sha256": before_path and sha256(before_path),
        "command": command(),
    }  # fmt: skip
    return {name: fact for name, fact in found.items() if fact is not None}


def write(
    folder: str | Path, what: str, device: torch.device, result: dict, before_path: str | None = None
) -> None:
    """<folder>/<device>_<what>.json, whole or not at all. A list of numbers takes one line."""
    model = ep.device_model(device)
    slug = "h100" if "H100" in model else "h200" if "H200" in model else device.type
    text = json.dumps({"what": what} | facts(device, before_path) | result, indent=1)
    text = re.sub(r'\[[^][{}"]*\]', lambda numbers: " ".join(numbers[0].split()), text)
    path = Path(folder) / f"{slug}_{what}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(text.replace(f"{ROOT}/", "") + "\n")
    path.with_suffix(".part").replace(path)


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """{name: median}."""
    return {name: statistics.median(values) for name, values in samples.items()}


def schedule_threads(policy: int) -> None:
    """Puts every thread of this process under a scheduling policy: os.SCHED_OTHER, os.SCHED_BATCH. Linux only; nothing
    where a sandbox forbids it."""
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), policy, os.sched_param(0))


class Recorder:
    """One measurement on this rank: its ranks, its clocks, its record. failures: what it found wrong.

    end: when its time is up, by time.perf_counter; None is never. needs_group: also where there is one rank.
    """

    def __init__(self, args: argparse.Namespace, needs_group: bool = False) -> None:
        self.args, self.end, self.failures = args, None, []
        self.device = ep.choose_device(getattr(args, "device", "auto"))
        self.on_gpu = self.device.type == "cuda"
        ep.keep_freed_memory()  # as the launcher does
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = False
        else:
            self.schedule("")
        if needs_group or ep.world_from_env()[1] > 1:
            self.join_group()
        self.before = getattr(args, "before", None)
        self.launchers = {"": before.Launcher()}  # by the prefix of its variants' names
        self.launchers |= {"before, ": before.Launcher(self.before)} if self.before else {}
        self.comm = self.launchers[""].batch

    def join_group(self) -> None:
        """torchrun's process group, or one of this rank alone."""
        where = {}
        if "RANK" not in os.environ:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                where = {
                    "init_method": f"tcp://127.0.0.1:{free.getsockname()[1]}",
                    "rank": 0,
                    "world_size": 1,
                }
        timeout = timedelta(seconds=getattr(self.args, "timeout_s", 120))
        dist.init_process_group("nccl" if self.on_gpu else "gloo", timeout=timeout, **where)

    def say(self, line: str) -> None:
        """A line on the screen, by rank 0."""
        if self.comm.rank == 0:
            print(line, flush=True)

    def gather(self, value: Any) -> list:
        """Every rank's value, by rank. Collective."""
        values: list = [value] * self.comm.size
        if self.comm.size > 1:
            dist.all_gather_object(values, value, group=self.comm.group)
        return values

    def is_over(self) -> bool:
        """Whether the time is up, on any rank; the same answer on all. Collective."""
        return self.end is not None and any(self.gather(time.perf_counter() > self.end))

    def extract_original(self) -> None:
        """Writes build/seed.py, by rank 0. RuntimeError on every rank where it cannot be extracted. Collective."""
        problem = ""
        if self.comm.rank == 0:
            try:
                original.extract()
            except Exception as error:
                problem = f"build/seed.py cannot be extracted: {error}"
        if problem := self.gather(problem)[0]:
            raise RuntimeError(problem)

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def free_memory(self) -> None:
        """Gives back what nobody holds; recorded steps hold the group's messages."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def wall_ms(self, step: Callable[[], object], steps: int) -> float:
        """Milliseconds a step by the wall clock, over a block of steps that all ranks start together."""
        self.comm.all_reduce(torch.zeros(1, device=self.device))
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3 / steps

    def event_ms(self, step: Callable[[], object], steps: int) -> float:
        """Milliseconds a step between CUDA events around a block of steps; without a GPU by the wall clock."""
        if not self.on_gpu:
            return self.wall_ms(step, steps)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / steps

    def schedule(self, name: str) -> None:
        """The threads as the variant of this name has them: the original leaves them alone, the launcher does not."""
        if not self.on_gpu and hasattr(os, "sched_setscheduler"):
            schedule_threads(os.SCHED_OTHER if name in ("seed", "default") else os.SCHED_BATCH)

    def alternate(
        self,
        variants: dict[str, Callable],
        steps: int = 1,
        clock: Callable[[Callable, int], Any] | None = None,
        warm_up: int = 1,
        length: Callable[[Any], float] | None = None,
    ) -> dict[str, list]:
        """{name: samples}, variants in turn, args.rounds rounds or until the time is up, after warm_up more.

        clock(variant, steps) -> a sample, by default wall_ms. Each sample is that of the rank where it took longest,
        by length(sample), by default the sample itself. Milliseconds to four decimals. Collective.
        """
        clock, samples = clock or self.wall_ms, {name: [] for name in variants}
        for turn in range(-warm_up, 2 if getattr(self.args, "small", False) else self.args.rounds):
            if turn > 0 and self.is_over():
                break
            for name, variant in variants.items():
                self.schedule(name)
                sample = clock(variant, steps)
                if turn >= 0:
                    samples[name].append(round(sample, 4) if isinstance(sample, float) else sample)
        by_rank = self.gather(samples)
        return {n: [max(s, key=length) for s in zip(*(r[n] for r in by_rank), strict=True)] for n in samples}

    def say_speeds(self, median_ms: dict[str, float], baseline: str = "seed") -> None:
        """A line for each variant, the fastest first."""
        for name, ms in sorted(median_ms.items(), key=lambda item: item[1]):
            self.say(f"  {name:34} {ms:9.3f} ms   {median_ms[baseline] / ms:6.2f} x the speed of {baseline}")

    def write(self, what: str, result: dict) -> None:
        """The record so far, by rank 0: see write."""
        if self.comm.rank == 0:
            write(self.args.output, what, self.device, result, self.before)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most GPU memory that run takes above what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def on_side_stream(run: Callable[[], object]) -> None:
    """Runs on a stream of its own, as a warm-up before a capture has to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


def captured(run: Callable[[], Any], warm_up: int = 3) -> Callable[[], Any]:
    """run as a CUDA graph, legal where nothing in it asks the host -> its replay, which returns what run returned."""
    on_side_stream(lambda: [run() for _ in range(warm_up)])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def main(
    work: Callable[[Recorder], object], flags: argparse.ArgumentParser, needs_group: bool = False
) -> None:
    """Runs work on every rank, then exits: 1 where it found failures. --ranks, where it is a flag, starts the ranks."""
    args = flags.parse_args()
    if hasattr(args, "ranks") and "RANK" not in os.environ:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={args.ranks}",
        ]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"MEASURE_RANKS": str(args.ranks)}
        sys.exit(subprocess.run([*torchrun, *sys.argv], env=environment).returncode)
    try:
        recorder = Recorder(args, needs_group)
    except ValueError as error:
        sys.exit(ep.refuse(str(error)))
    work(recorder)
    code = 1 if recorder.failures else 0
    recorder.free_memory()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the group's threads may still end, and must not meet a dying interpreter
