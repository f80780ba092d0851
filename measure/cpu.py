"""Two CPU ranks over gloo: the original's training step and ours, where ours spends its time, and a larger layer.

    python measure/cpu.py                    into results/cpu_exchange.json
    python measure/cpu.py --rounds 40 --what small
    python measure/cpu.py --before build/before.py   beside another commit's launcher.py (measure/before.py)

small: a training step at the original's sizes, 16 experts, top-2, hidden 256, 32 tokens a rank: the original's
(build/seed.py), chapter 03's layer and chapter 07's; and of the last the parts. large: forward and backward of a layer
with hidden 512 and 2,048 tokens a rank, beside its matrix products alone. messages: an all-reduce of 4,096 numbers and
nothing else, with gloo's threads scheduled as the system does and as the launcher does (SCHED_BATCH). The machine's
rates are measured in the same run. Processor time is the main thread's: it leaves out what a rank waits, for the other
rank or for a core.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import before, layer, record  # noqa: E402

CPU = torch.device("cpu")
LARGE = {"num_experts": 16, "top_k": 2, "hidden_dim": 512, "ffn_dim": 2048, "max_num_tokens": 2048}
SQUARE = 2048  # rows and columns of the product that shows the machine's rate: 2 * SQUARE^3 operations
STREAM = 2**25  # numbers in the tensor that shows the memory's rates: 128 MiB, beyond the caches
PARTS = ("products", "optimiser", "messages")


class Stopwatch:
    """Sums what the functions that it wraps take, by name: [wall clock, processor time of this thread] in ms."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def wrap(self, name: str, function: Callable) -> Callable:
        """The function, timed under this name."""

        def timed(*args: object, **kwargs: object) -> object:
            wall, cpu = time.perf_counter(), time.thread_time()
            result = function(*args, **kwargs)
            spent = self.spent.setdefault(name, [0.0, 0.0])
            spent[0] += (time.perf_counter() - wall) * 1e3
            spent[1] += (time.thread_time() - cpu) * 1e3
            return result

        return timed

    def watch(self, owner: object, name: str, *methods: str) -> None:
        """Times an owner's methods from now on."""
        for method in methods:
            setattr(owner, method, self.wrap(name, getattr(owner, method)))

    def clock(self, recorder: record.Recorder) -> Callable:
        """A clock for alternate: {part: [wall, processor] ms a step}; the part `all` is the whole step."""

        def parts_ms(step: Callable[[], object], steps: int) -> dict[str, list[float]]:
            step = self.wrap("all", step)
            recorder.comm.all_reduce(torch.zeros(1))
            self.spent = {}
            for _ in range(steps):
                step()
            return {part: [ms / steps for ms in spent] for part, spent in self.spent.items()}

        return parts_ms


def machine_rates() -> dict[str, Callable[[], object]]:
    """A large product; a large tensor read, written, and changed in place: what the floor is computed from."""
    a, b, out = (torch.randn(SQUARE, SQUARE) for _ in range(3))
    stream = torch.randn(STREAM)
    return {
        "square product": lambda: torch.mm(a, b, out=out),
        "read": stream.sum,
        "in place": lambda: stream.mul_(1.0),
        "write": lambda: stream.fill_(1.0),
    }


def small_variants(recorder: record.Recorder) -> dict[str, Callable[[], object]]:
    """{name: one training step} at the original's sizes."""
    original = before.original_step(ep.MoEConfig(), recorder.comm, CPU)
    variants = {"seed": original, "seed in batches": original}
    kinds = ("all_gather", "loop"), ("all_gather", "blocks"), ("all_to_all", "blocks")
    for prefix, launcher in recorder.launchers.items():
        for dispatcher, experts in kinds:
            flags = ["--dispatcher", dispatcher, "--experts", experts]
            variants[f"{prefix}{dispatcher}+{experts}"] = launcher.step(flags, CPU)
    return variants


def large_variants(recorder: record.Recorder) -> dict[str, Callable[[], object]]:
    """{name: one step} of the larger layer: forward, backward with the input's gradient, the gate's all-reduce."""

    tokens, grad = torch.randn(2, LARGE["max_num_tokens"], LARGE["hidden_dim"])
    grad /= grad.numel()

    def make_step(launcher: before.Launcher, dispatcher: str) -> tuple[ep.EPMoE, Callable[[], None]]:
        made = launcher.layer(ep.MoEConfig(**LARGE, dispatcher=dispatcher), CPU)
        x = tokens.clone().requires_grad_()  # the same for all: loads that differ would be time that differs

        def step() -> None:
            made.zero_grad()
            x.grad = None
            y, aux = launcher.forward(made, x)
            torch.autograd.backward([y, aux], [grad, torch.full_like(aux, 0.01)])
            launcher.sync(made)

        return made, step

    found = {}
    for prefix, launcher in recorder.launchers.items():
        for dispatcher in ("all_gather", "all_to_all"):
            found[prefix + dispatcher] = make_step(launcher, dispatcher)
    ours, exact = found["all_to_all"]
    exact()
    products = layer.products_alone(ours, layer.local_counts(ours, ours.topk_ids), ep.BlockProducts)
    return {name: step for name, (_, step) in found.items()} | {"products": products}


def loop_cpu_ms() -> float:
    """Processor time so far of the thread that moves gloo's messages."""
    nanoseconds = 0
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "gloo_tcp_loop":
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e6


def messages_ms(message: Callable[[], object], number: int) -> tuple[list[float], float]:
    """A clock for alternate -> ms of each message, and processor time of one in gloo's loop."""
    message()
    loop, times = loop_cpu_ms(), []
    for _ in range(number):
        begin = time.perf_counter()
        message()
        times.append(round((time.perf_counter() - begin) * 1e3, 4))
    return times, round((loop_cpu_ms() - loop) / number, 4)


def measure_messages(recorder: record.Recorder) -> dict:
    """{policy: ms of an all-reduce, and processor time of it in gloo's loop}, 50 a round."""
    numbers, found = torch.zeros(4096), {}
    variants = dict.fromkeys(("default", "batch"), lambda: recorder.comm.all_reduce(numbers))
    for name, samples in recorder.alternate(variants, 50, messages_ms, length=lambda s: sum(s[0])).items():
        times, loops = [ms for times, _ in samples for ms in times], [loop for _, loop in samples]
        found[name] = {
            "mean_ms": statistics.mean(times), "p95_ms": statistics.quantiles(times, n=20)[-1],
            "median_loop_ms": statistics.median(loops), "samples_ms": times, "samples_loop_ms": loops,
        }  # fmt: skip
    return found


def summarise(samples: dict[str, list]) -> dict:
    """Medians and all samples by variant and part, and `rest`: the whole step without the named parts."""
    found = {}
    for name, steps in samples.items():
        for step in steps:
            if named := [step[part] for part in PARTS if part in step]:
                step["rest"] = [whole - sum(of) for whole, *of in zip(step["all"], *named, strict=True)]
        found[name] = {}
        for part in steps[0]:
            wall, cpu = (
                [round(ms, 4) for ms in clock] for clock in zip(*(step[part] for step in steps), strict=True)
            )
            medians = {"median_ms": statistics.median(wall), "median_cpu_ms": statistics.median(cpu)}
            found[name][part] = medians | {"samples_ms": wall, "samples_cpu_ms": cpu}
    return found


def measure(recorder: record.Recorder) -> None:
    """What --what names, into one file; products, messages and the optimiser of every layer under the watch."""
    args, watch = recorder.args, Stopwatch()
    recorder.extract_original()
    for launcher in recorder.launchers.values():
        watch.watch(launcher.ep.BlockProducts, "products", "times", "weight_gradient")
        watch.watch(launcher.ep.Communicator, "messages", "all_to_all", "all_reduce", "all_gather")
    watch.watch(torch.optim.AdamW, "optimiser", "step")
    result: dict = {"square": SQUARE, "stream": STREAM, "large_config": LARGE}
    if "messages" in args.what and hasattr(os, "SCHED_BATCH"):  # a policy of Linux
        result["messages"] = measure_messages(recorder)
        for name, message in result["messages"].items():
            late = f"one in 20 above {message['p95_ms']:.2f}"
            recorder.say(f"an all-reduce, {name:8}: mean {message['mean_ms']:.2f} ms, {late}")
    for what, make, steps in (("small", small_variants, args.steps), ("large", large_variants, 1)):
        if what not in args.what:
            continue
        with torch.random.fork_rng():
            torch.manual_seed(recorder.comm.rank)
            take = {"clock": watch.clock(recorder), "length": lambda parts: parts["all"][0]}
            samples = recorder.alternate(make(recorder), steps, **take)
            result[what] = summarise(samples | recorder.alternate(machine_rates(), **take))
        for name, parts in result[what].items():
            texts = [f"{part} {v['median_ms']:.2f} ({v['median_cpu_ms']:.2f})" for part, v in parts.items()]
            recorder.say(f"{what} {name:22} ms a step, in brackets processor time: {', '.join(texts)}")
    recorder.write("exchange", result)


def flags() -> argparse.ArgumentParser:
    """The flags."""
    parser = record.parser(__doc__, ranks=2, rounds=20, steps=10, before=None)
    parser.set_defaults(device="cpu")
    everything = ["messages", "small", "large"]
    parser.add_argument("--what", nargs="+", choices=everything, default=everything)
    return parser


if __name__ == "__main__":
    record.main(measure, flags())
