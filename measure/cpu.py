"""Two CPU ranks over gloo: the seed's training step and ours, where ours spends its time, and a larger layer.

    python measure/cpu.py                    into results/cpu_exchange.json
    python measure/cpu.py --rounds 40 --what small
    python measure/cpu.py --before build/before.py   beside another commit's launcher.py (measure/before.py)

small: a training step at the seed's sizes, 16 experts, top-2, hidden 256, 32 tokens a rank: the seed's algorithm
(build/seed.py), chapter 03's layer and chapter 07's; and of the last the parts. large: forward and backward of a layer
with hidden 512 and 2,048 tokens a rank, beside its matrix products alone. messages: an all-reduce of 4,096 numbers and
nothing else, with gloo's threads scheduled as the system does and as the launcher does (SCHED_BATCH). The machine's
rates are measured in the same run. Everything alternates within each round; compare medians of one file. Processor
time is the main thread's: it leaves out what a rank waits, for the other rank or for a core.
"""

import argparse
import json
import os
import statistics
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
from measure import before  # noqa: E402
from measure.step import as_scheduled, run_again_on_ranks, schedule_threads, seed_step  # noqa: E402

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

    def take(self) -> dict[str, list[float]]:
        """What was spent since the last call."""
        spent, self.spent = self.spent, {}
        return spent


def watch_parts(watch: Stopwatch, launchers: dict[str, before.Launcher]) -> None:
    """Lets the products, the messages and the optimiser of every layer made from now on run under the watch.

    Messages hold the wait for the other rank.
    """
    for module in [launcher.ep for launcher in launchers.values()]:
        for method in ("times", "weight_gradient"):
            setattr(
                module.BlockProducts, method, watch.wrap("products", getattr(module.BlockProducts, method))
            )
        for method in ("all_to_all", "all_reduce", "all_gather"):
            setattr(module.Communicator, method, watch.wrap("messages", getattr(module.Communicator, method)))
    torch.optim.AdamW.step = watch.wrap("optimiser", torch.optim.AdamW.step)


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


def small_variants(launchers: dict[str, before.Launcher]) -> dict[str, Callable[[], object]]:
    """{name: one training step} at the seed's sizes."""
    device = torch.device("cpu")
    seed = seed_step(ep.MoEConfig(), ep.Communicator(), device)
    variants = {"seed": seed, "seed in batches": seed}
    for prefix, launcher in launchers.items():
        for dispatcher, experts in (
            ("all_gather", "loop"),
            ("all_gather", "blocks"),
            ("all_to_all", "blocks"),
        ):
            flags = ["--dispatcher", dispatcher, "--experts", experts]
            variants[f"{prefix}{dispatcher}+{experts}"] = launcher.step(flags, device)
    return variants


def products_alone(layer: ep.EPMoE, comm: ep.Communicator) -> Callable[[], None]:
    """The six products of a layer's step, of as many rows as this rank's experts got last, and nothing else."""
    config = layer.config
    chosen = comm.all_gather(ep.count_choices(layer.topk_ids, config.num_experts), "metadata").sum(0)
    counts = chosen.long().view(comm.size, -1)[comm.rank]
    num_rows = int(counts.sum())
    rows, hidden = torch.randn(num_rows, config.hidden_dim), torch.randn(num_rows, config.ffn_dim)
    w1, w2 = layer.experts.w1.detach(), layer.experts.w2.detach()

    def step() -> None:
        products = ep.BlockProducts(counts, num_rows)
        products.times(rows, w1)
        products.times(hidden, w2)
        products.times(rows, w2.transpose(1, 2))
        products.times(hidden, w1.transpose(1, 2))
        products.weight_gradient(rows, hidden)
        products.weight_gradient(hidden, rows)

    return step


def large_variants(launchers: dict[str, before.Launcher]) -> dict[str, Callable[[], object]]:
    """{name: one step} of the larger layer: forward, backward with the input's gradient, the gate's all-reduce."""

    def make_step(launcher: before.Launcher, dispatcher: str) -> tuple[ep.EPMoE, Callable[[], None]]:
        layer = launcher.layer(ep.MoEConfig(**LARGE, dispatcher=dispatcher), torch.device("cpu"))
        x = torch.randn(LARGE["max_num_tokens"], LARGE["hidden_dim"], requires_grad=True)
        grad = torch.randn_like(x) / x.numel()

        def step() -> None:
            layer.zero_grad()
            x.grad = None
            y, aux = launcher.forward(layer, x)
            torch.autograd.backward([y, aux], [grad, torch.full_like(aux, 0.01)])
            launcher.sync(layer)

        return layer, step

    found = {
        prefix + dispatcher: make_step(launcher, dispatcher)
        for prefix, launcher in launchers.items()
        for dispatcher in ("all_gather", "all_to_all")
    }
    layer, exact = found["all_to_all"]
    exact()
    return {name: step for name, (_, step) in found.items()} | {
        "products": products_alone(layer, launchers[""].batch)
    }


def loop_cpu_ms() -> float:
    """Processor time so far of the thread that moves gloo's messages."""
    nanoseconds = 0
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "gloo_tcp_loop":
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e6


def measure_messages(rounds: int, comm: ep.Communicator) -> dict:
    """{policy: ms of an all-reduce, and processor time of it in gloo's loop}, 50 a round, alternating."""
    policies = {"default": os.SCHED_OTHER, "batch": os.SCHED_BATCH}
    found = {name: {"samples_ms": [], "samples_loop_ms": []} for name in policies}
    numbers = torch.zeros(4096)
    for turn in range(rounds + 1):
        for name, policy in policies.items():
            schedule_threads(policy)
            comm.all_reduce(numbers)
            loop, times = loop_cpu_ms(), []
            for _ in range(50):
                begin = time.perf_counter()
                comm.all_reduce(numbers)
                times.append(round((time.perf_counter() - begin) * 1e3, 4))
            if turn:
                found[name]["samples_ms"] += times
                found[name]["samples_loop_ms"].append(round((loop_cpu_ms() - loop) / 50, 4))
    for values in found.values():
        values["mean_ms"] = statistics.mean(values["samples_ms"])
        values["p95_ms"] = statistics.quantiles(values["samples_ms"], n=20)[-1]
        values["median_loop_ms"] = statistics.median(values["samples_loop_ms"])
    return found


def measure(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    steps: int,
    comm: ep.Communicator,
    watch: Stopwatch,
) -> dict:
    """{variant: {part: samples of [wall, processor] ms a step}}, alternating; the part `all` is the whole step."""
    samples: dict[str, dict] = {name: {} for name in variants}
    timed = {name: watch.wrap("all", step) for name, step in variants.items()}
    for turn in range(rounds + 1):
        for name, step in timed.items():
            as_scheduled(name, torch.device("cpu"))
            comm.all_reduce(torch.zeros(1))
            watch.take()
            for _ in range(steps):
                step()
            for part, spent in watch.take().items():
                if turn:
                    samples[name].setdefault(part, []).append([ms / steps for ms in spent])
    return samples


def summarise(samples: dict) -> dict:
    """Medians and all samples by variant and part, and `rest`: the whole step without the named parts."""
    found = {}
    for name, parts in samples.items():
        named = zip(*(parts[part] for part in PARTS if part in parts), strict=True)
        sums = [[sum(clock) for clock in zip(*row, strict=True)] for row in named]
        if sums:
            whole = zip(parts["all"], sums, strict=True)
            parts["rest"] = [[a - b for a, b in zip(*pair, strict=True)] for pair in whole]
        found[name] = {
            part: {
                "median_ms": statistics.median(wall for wall, _ in values),
                "median_cpu_ms": statistics.median(cpu for _, cpu in values),
                "samples_ms": [round(wall, 4) for wall, _ in values],
                "samples_cpu_ms": [round(cpu, 4) for _, cpu in values],
            }
            for part, values in parts.items()
        }
    return found


def work(args: argparse.Namespace) -> None:
    """One rank's part."""
    ep.keep_freed_memory()  # as the launcher does
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    launchers, watch, result = before.launchers(args), Stopwatch(), {}
    comm = launchers[""].batch
    watch_parts(watch, launchers)
    if "messages" in args.what and hasattr(os, "SCHED_BATCH"):  # a policy of Linux
        result["messages"] = measure_messages(args.rounds, comm)
    for what in [what for what in args.what if what != "messages"]:
        make, steps = {"small": (small_variants, args.steps), "large": (large_variants, 1)}[what]
        with torch.random.fork_rng():
            torch.manual_seed(comm.rank)
            result[what] = summarise(
                measure(make(launchers), args.rounds, steps, comm, watch)
                | measure(machine_rates(), args.rounds, 1, comm, watch)
            )
    if comm.rank == 0:
        write_result(result, args)
    dist.destroy_process_group()


def write_result(result: dict, args: argparse.Namespace) -> None:
    """results/cpu_exchange.json, and a table on the screen."""
    facts = {
        "what": "exchange", "device": ep.device_model(torch.device("cpu")), "num_cores": os.cpu_count(),
        "ranks": args.ranks, "torch": torch.__version__, "python": sys.version.split()[0],
        "command": f"python measure/cpu.py --rounds {args.rounds} --steps {args.steps}"
        + " --before FILE" * bool(args.before),
        "square": SQUARE, "stream": STREAM, "large_config": LARGE,
    } | before.before_facts(args)  # fmt: skip
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu_exchange.json").write_text(json.dumps(facts | result, indent=1) + "\n")
    for name, message in result.get("messages", {}).items():
        print(
            f"an all-reduce, {name:8}: mean {message['mean_ms']:.2f} ms, one in 20 above {message['p95_ms']:.2f}"
        )
    for what, variants in [(what, found) for what, found in result.items() if what != "messages"]:
        for name, parts in variants.items():
            texts = [f"{part} {v['median_ms']:.2f} ({v['median_cpu_ms']:.2f})" for part, v in parts.items()]
            print(f"{what} {name:22} ms a step, in brackets processor time: {', '.join(texts)}")


def main() -> int:
    """Starts the ranks, which run this file again with --worker."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = ["messages", "small", "large"]
    parser.add_argument("--what", nargs="+", choices=everything, default=everything)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=20, help="samples of each variant, at least 20 for results/"
    )
    parser.add_argument("--steps", type=int, default=10, help="steps in a sample, of the small ones")
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
