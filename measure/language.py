"""Trains the decoder of chapter 16, dense and with experts, on text that it never reads twice: are experts worth it?

    python measure/corpus.py                            first: the text, into build/
    python measure/language.py --minutes 8              on one GPU, into results/<device>_language.json
    python measure/language.py --only normalised        one part, into results/<device>_language_normalised.json
    python measure/language.py --device cpu             the miniature on plays, into results/cpu_language.json
    python measure/language.py --speed --ranks 2        on two GPUs, into results/<device>_x2_language.json

First every configuration is timed alone, in turn with all others, recorded as a graph, and the main pair compiled too.
Then the losses: --workers runs side by side, each in a process of its own, in the order of their weight for the
verdict; the file is written after each, so that what is cut short keeps what it has. "Equal time" is equal
milliseconds as timed alone. On the CPU runs follow one another and are timed as they go. --speed times steps of a
model of 1 B parameters.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import corpus, peers, record  # noqa: E402

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bfloat16, NVIDIA's data sheets (SXM)
COMMON = "--model lm --task text --activation swiglu --warmup-steps 50 --final-lr 0.05 --max-grad-norm 1"
SIZES = {  # flags, then steps
    "small": (
        "--hidden-dim 256 --ffn-dim 256 --num-layers 6 --num-heads 4 --num-experts 16 --top-k 2 --context 256 "
        "--tokens 16384 --max-num-tokens 16384 --dtype bfloat16 --lr 2e-3 --eval-tokens 65536",
        1200,
    ),
    "large": (
        "--hidden-dim 512 --ffn-dim 512 --num-layers 8 --num-heads 8 --num-experts 16 --top-k 2 --context 256 "
        "--tokens 16384 --max-num-tokens 16384 --dtype bfloat16 --lr 1e-3 --eval-tokens 65536",
        800,
    ),
    "miniature": (
        "--hidden-dim 128 --ffn-dim 128 --num-layers 4 --num-heads 4 --num-experts 8 --top-k 2 --context 128 "
        "--tokens 1024 --max-num-tokens 1024 --dtype float32 --lr 3e-3 --eval-tokens 32768",
        6000,
    ),
    "tiny": (
        "--hidden-dim 32 --ffn-dim 32 --num-layers 2 --num-heads 2 --num-experts 4 --top-k 2 --context 32 "
        "--tokens 128 --max-num-tokens 128 --dtype float32 --lr 3e-3 --eval-tokens 512",
        6,
    ),
}
# What the comparison on two GPUs trains: 0.94 B parameters in all, of which a token meets 0.15 B.
BILLION = (
    "--hidden-dim 1024 --ffn-dim 768 --num-layers 12 --num-heads 16 --num-kv-heads 4 --num-experts 32 --top-k 4 "
    "--context 1024 --dtype bfloat16 --lr 1e-4"
)
SPEEDS = {  # flags of each variant
    "dense, replicas": "--ep-size 1",
    "experts, replicas": "--ep-size 1 --dispatcher local",
    "experts, all_to_all": "--ep-size 2 --dispatcher all_to_all",
    "experts, dedup": "--ep-size 2 --dispatcher dedup",
    "experts, gather_tokens": "--ep-size 2 --dispatcher gather_tokens",
    "experts, peer": "--ep-size 2 --dispatcher peer",
    "experts, torchtitan": "--ep-size 2 --dispatcher all_to_all --aux-alpha 0",
}
POINTS = 12  # places of a curve
LAST_TOKENS = 2**20  # of the text held out, for the last of them
READS_SOURCES = (
    "small",
    "large",
)  # sizes that read measure/corpus.py's text; the others read the book's plays


@dataclass(frozen=True)
class Job:
    """One run. flags: what differs from the size's. as_long_as: another job, whose time it may take."""

    name: str
    group: str
    size: str
    seed: int = 0
    flags: str = ""
    as_long_as: str = ""
    is_dense: bool = field(default=False)

    @property
    def timed_as(self) -> str:
        """The job without its seed and its length: what is timed."""
        return self.name.partition(", equal time")[0]


def gpu_jobs(size: str = "small", large: str = "large") -> Iterator[Job]:
    """Every comparison, those first that matter most."""
    for seed in range(3):
        yield Job("experts", "main", size, seed)
        yield Job("dense", "main", size, seed, is_dense=True)
        yield Job("dense, equal time", "main", size, seed, as_long_as="experts", is_dense=True)
    yield Job("large experts", "large", large)
    yield Job("large dense", "large", large, is_dense=True)
    yield Job("large dense, equal time", "large", large, as_long_as="large experts", is_dense=True)
    for number in (64, 4, 8, 32):
        yield Job(f"{number} experts", "experts", size, flags=f"--num-experts {number}")
    width = 64 if size == "tiny" else 512
    for top_k, number in ((4, 32), (1, 8)):  # as many parameters, and as many that a token meets
        sizes = f"--top-k {top_k} --num-experts {number} --ffn-dim {width // top_k}"
        yield Job(f"top-{top_k}", "top_k", size, flags=sizes)
    yield Job("no balance", "balance", size, flags="--balance none")
    yield Job("bias", "balance", size, flags="--balance bias --router sigmoid --normalize-topk")
    for seed in range(3):
        yield Job("normalised", "normalised", size, seed, flags="--normalize-topk")
    yield Job("64 experts, normalised", "normalised", size, flags="--num-experts 64 --normalize-topk")


def cpu_jobs() -> Iterator[Job]:
    """The chapter's miniature, and the same model without experts."""
    yield Job("experts", "main", "miniature")
    yield Job("dense", "main", "miniature", is_dense=True)


def made(flags: str, seed: int, is_dense: bool, device: torch.device, text: Path | None = None) -> ep.Run:
    """The run that the launcher would make of these flags; dense: without any layer of experts."""
    words = f"{COMMON} {flags} --seed {seed} --device {device.type}".split()
    config, options = ep.parse_flags(words + (["--text-file", str(text)] if text else []))
    if is_dense:
        old = config.option(ep.DecoderOptions)
        new = replace(old, dense_layers=old.num_layers)
        config = replace(config, extras=tuple(new if extra is old else extra for extra in config.extras))
    mesh = ep.init_ep(options.ep_size)
    return ep.Run(config, options, mesh, device, ep.RunLog(Path("."), options.steps, rank=1))


def optimizer_of(model: torch.nn.Module, run: ep.Run) -> torch.optim.Optimizer:
    """As chapter 04's train makes it."""
    on_gpu = run.device.type == "cuda"
    return torch.optim.AdamW(model.parameters(), lr=run.options.lr, fused=True, capturable=on_gpu)


def step_of(wanted: str, run: ep.Run, model: torch.nn.Module, task: Any, optimizer: Any) -> tuple[str, Any]:
    """(its name, the kind of step that is wanted); auto: recorded where it can be."""
    can_record = ep.REGISTRIES["step"]["graph"].preference(run, model) > 0
    name = ("graph" if can_record else "eager") if wanted == "auto" else wanted
    return name, ep.REGISTRIES["step"][name](run, model, task, optimizer)


def begin(job: Job, steps: int, device: torch.device) -> tuple[ep.Run, ep.Decoder, ep.TextStream, Any]:
    """A job's run, model, task and optimiser, before its first step."""
    text = corpus.TEXT if job.size in READS_SOURCES else None
    run = made(f"{SIZES[job.size][0]} {job.flags} --steps {steps}", job.seed, job.is_dense, device, text)
    model = ep.Decoder(run.config, run.mesh, job.seed, device)
    task = ep.TextStream(run.config, job.seed, run.num_global_tokens, run.mesh.batch, device)
    optimizer = optimizer_of(model, run)
    ep.set_lr(optimizer, run.config.option(ep.ScheduleOptions), run.options, 0)
    return run, model, task, optimizer


def times_alone(recorder: record.Recorder, jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """{what is timed: {step: {"median_ms", "samples_ms"}}}, one after the other in turn, nothing beside them."""
    kinds = {job.timed_as: job for job in reversed(jobs)}
    held, variants = [], {}
    for name, job in reversed(kinds.items()):
        for wanted in ("auto", "compiled") if name in ("experts", "dense") and recorder.on_gpu else ("auto",):
            run, model, task, optimizer = begin(job, 1000, recorder.device)
            step, advance = step_of(wanted, run, model, task, optimizer)
            try:
                advance()
            except Exception as error:  # the compiler's, of many kinds
                recorder.say(f"{name}, {step}: {str(error).splitlines()[0][:200]}")
                continue
            variants[name, step] = advance
            held.append((model, task, optimizer))
            recorder.say(f"{name}, {step}: ready after {time.perf_counter() - recorder.start:.0f} s")
    samples = recorder.alternate(variants, steps=2)
    del variants, held, advance, model, task, optimizer
    recorder.free_memory()
    found: dict[str, dict[str, Any]] = {}
    for (name, step), of in samples.items():
        median = record.medians({"": of})[""]
        found.setdefault(name, {})["graph" if step == "eager" else step] = {
            "median_ms": median,
            "samples_ms": of,
        }
        recorder.say(f"{name:16} {step:8} {median:8.3f} ms alone")
    return found


class Curve:
    """Losses of a run, and the seconds that its steps took."""

    def __init__(self, recorder: record.Recorder, run: ep.Run, model: torch.nn.Module, task: Any) -> None:
        self.recorder, self.run, self.model, self.task = recorder, run, model, task
        self.seconds, self.began, self.losses, self.rows = 0.0, 0.0, [], []

    def start(self) -> None:
        self.recorder.synchronize()
        self.began = time.perf_counter()

    def point(self, done: int) -> None:
        """Stops the clock, takes both losses after so many steps, and goes on."""
        self.recorder.synchronize()
        self.seconds += time.perf_counter() - self.began
        is_last = done == self.run.options.steps
        tokens = LAST_TOKENS if is_last else self.run.config.option(ep.TextOptions).eval_tokens
        held_out = ep.held_out_loss(self.model, self.task, tokens)
        training = float(torch.stack(self.losses).double().mean())
        self.rows.append([done, round(self.seconds, 3), round(training, 4), round(held_out, 4)])
        self.losses = []
        self.start()


def trained(recorder: record.Recorder, job: Job, steps: int) -> dict[str, Any]:
    """One run from its first step to its last -> its record."""
    run, model, task, optimizer = begin(job, steps, recorder.device)
    config, schedule = run.config, run.config.option(ep.ScheduleOptions)
    kind, advance = step_of(recorder.args.step, run, model, task, optimizer)
    curve, places = Curve(recorder, run, model, task), {steps * n // POINTS for n in range(1, POINTS + 1)}
    for step in range(steps):
        if step == 1:
            curve.start()  # the first step records, or meets caches for the first time
        ep.set_lr(optimizer, schedule, run.options, step)
        curve.losses.append(advance()[0])
        if step + 1 in places and step > 0:
            curve.point(step + 1)
    layers = ep.moe_layers(model)
    loads = [ep.count_choices(layer.topk_ids, config.num_experts).double() for layer in layers]
    counts, flops = ep.parameter_counts(model), ep.training_flops(model, task.context)
    kept = {
        "name": job.name, "group": job.group, "size": job.size, "seed": job.seed, "flags": job.flags, "steps": steps,
        "tokens": steps * run.num_global_tokens, "text_bytes": len(task.text), "parameters": counts,
        "flops_per_token": flops, "step": kind, "took": layers[0].took if layers else None,
        "ms_per_step": round(curve.seconds * 1e3 / (steps - 1), 4),
        "peak_bytes": torch.cuda.max_memory_allocated() if recorder.on_gpu else None,
        "max_over_mean": [round(float(load.max() / load.mean()), 3) for load in loads],
        "columns": ["step", "seconds", "training loss", "loss on the text held out"], "curve": curve.rows,
    }  # fmt: skip
    del model, task, optimizer, advance, curve, layers, loads
    recorder.free_memory()
    return kept


def trained_apart(args: Any, job: Job, steps: int) -> dict[str, Any]:
    """trained, in a process of its own: no group, and a peak of memory that is this run's alone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return trained(record.Recorder(args), job, steps)


def steps_of(job: Job, args: Any, times: dict[str, dict[str, Any]]) -> int:
    """How many steps a run makes: as its size says, or as many as take the time of another."""
    steps = args.steps or SIZES[job.size][1]
    if not job.as_long_as:
        return steps
    other, own = (times[name]["graph"]["median_ms"] for name in (job.as_long_as, job.timed_as))
    return max(2, round(steps * other / own))


def with_time(kept: dict[str, Any], times: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The record of a run with the milliseconds that a step takes alone in place of those among other runs."""
    if name not in times:
        return kept
    ms = times[name]["graph"]["median_ms"]
    curve = [[step, round(step * ms / 1e3, 3), *losses] for step, _, *losses in kept["curve"]]
    return kept | {"ms_per_step": ms, "ms_beside_others": kept["ms_per_step"], "curve": curve}


def compare(recorder: record.Recorder) -> None:
    """Times, then the jobs, until the time is up."""
    args, recorder.start = recorder.args, time.perf_counter()
    end = recorder.start + 60 * args.minutes if args.minutes else float("inf")
    jobs = list(gpu_jobs("tiny", "tiny") if args.small else gpu_jobs() if recorder.on_gpu else cpu_jobs())
    jobs = [job for job in jobs if not args.only or job.group in args.only]
    if any(job.size in READS_SOURCES for job in jobs):
        corpus.unpacked()
    times = times_alone(recorder, jobs) if args.small or recorder.on_gpu else {}
    runs: list[dict[str, Any]] = []
    running: dict[Future, tuple[Job, float]] = {}
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=fresh, max_tasks_per_child=1) as pool:
        while jobs or running:
            while jobs and len(running) < args.workers:
                job = jobs.pop(0)
                steps = steps_of(job, args, times)
                alone = times.get(job.timed_as, {}).get("graph", {"median_ms": 0})["median_ms"]
                lasts = 8 + steps * alone * args.workers / 1e3  # if nothing is gained side by side
                if time.perf_counter() + lasts > end:
                    recorder.say(f"no time left for {job.name}, seed {job.seed}")
                    continue
                running[pool.submit(trained_apart, args, job, steps)] = job, time.perf_counter()
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                job, began = running.pop(future)
                runs.append(with_time(kept := future.result(), times, job.timed_as))
                training, held_out = kept["curve"][-1][2:]
                recorder.say(
                    f"{job.name:26} seed {job.seed} {kept['step']:6} {kept['steps']:5} steps, training {training:.4f}, "
                    f"held out {held_out:.4f}; {kept['ms_per_step']:.2f} ms beside others, "
                    f"{time.perf_counter() - began:.0f} s, ended at {time.perf_counter() - recorder.start:.0f} s"
                )
                sizes = {name: {"flags": flags, "steps": n} for name, (flags, n) in SIZES.items()}
                sha256 = corpus.SHA256 if runs[0]["size"] in READS_SOURCES else ep.BOOK_SHA256
                text = {"sha256": sha256, "common_flags": COMMON, "workers": args.workers}
                name = "_".join(["language", *(args.only or ())])
                recorder.write(name, {"text": text, "sizes": sizes, "times": times, "runs": runs})


def fill(model: torch.nn.Module) -> None:
    """Random numbers made on the device: the launcher's own are drawn on the CPU, too slowly for a billion."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                p.uniform_(-(p.shape[-1] ** -0.5), p.shape[-1] ** -0.5)


class TitanStep:
    """An eager training step with torchtitan's layers in the place of ours, everything else as it was.

    They have no aux loss here, and the norm is not clipped: both are left out in torchtitan's favour.
    """

    def __init__(self, model: ep.Decoder, task: Any, run: ep.Run, folder: Path) -> None:
        from torch.distributed.tensor import DTensor

        mesh = torch.distributed.init_device_mesh(
            run.device.type, (run.mesh.ep.size,), mesh_dim_names=("ep",)
        )
        for block in model.layers:
            theirs = peers.torchtitan_layer(block.mlp, folder, mesh)
            block.mlp = torch.nn.Module()
            block.mlp.moe, block.mlp.forward = theirs, peers.forward_of(theirs)
        self.model, self.task, self.mesh = model, task, run.mesh
        self.others = [p for p in model.parameters() if not isinstance(p, DTensor)]
        experts = [p for p in model.parameters() if isinstance(p, DTensor)]
        self.optimizers = [torch.optim.AdamW(of, lr=1e-4, fused=True) for of in (self.others, experts)]

    def __call__(self) -> None:
        """Forward, backward, the sum over the batch, the update."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.task.loss(self.model, self.task.next()).backward()
        ep.sync_gradients(torch.nn.Module(), self.mesh, *(p.grad for p in self.others if p.grad is not None))
        for optimizer in self.optimizers:
            optimizer.step()


def speed(recorder: record.Recorder, name: str) -> dict[str, Any]:
    """Tokens a second of one variant: warm-up, then samples of the slowest rank."""
    args, device = recorder.args, recorder.device
    sizes = SIZES["tiny"][0] if args.small else BILLION
    own = 128 if args.small else args.tokens
    tokens = f"--tokens {own * recorder.comm.size} --max-num-tokens {own}"
    run = made(f"{sizes} {tokens} {SPEEDS[name]}", 0, name.startswith("dense"), device)
    model = ep.Decoder(run.config, run.mesh, 0, "meta").to_empty(device=device)
    fill(model)
    flops = ep.training_flops(model, run.config.option(ep.TextOptions).context)
    task = ep.TextStream(run.config, 0, run.num_global_tokens, run.mesh.batch, device)
    counts, took = ep.parameter_counts(model), [layer.took for layer in ep.moe_layers(model)[:1]]
    if name.endswith("torchtitan"):
        kind, advance, took = "eager", TitanStep(model, task, run, args.torchtitan), []
    else:
        kind, advance = step_of(args.step, run, model, task, optimizer_of(model, run))
    if recorder.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    samples = recorder.alternate({name: advance}, steps=args.steps or 1, warm_up=3)[name]
    best = record.medians({name: samples})[name]
    rate = run.num_global_tokens / best * 1e3
    peak = next((p for card, p in PEAK_FLOPS.items() if card in ep.device_model(device)), None)
    kept = {
        "flags": SPEEDS[name], "step": kind, "took": took[0] if took else None, "parameters": counts,
        "flops_per_token": flops,
        "tokens_per_step": run.num_global_tokens, "median_ms": best, "tokens_per_s": round(rate),
        "mfu": peak and round(rate * flops / (peak * recorder.comm.size), 4),
        "peak_bytes": torch.cuda.max_memory_allocated() if recorder.on_gpu else None, "samples_ms": samples,
    }  # fmt: skip
    del model, task, advance
    recorder.free_memory()
    return kept


def speeds(recorder: record.Recorder) -> None:
    """Every variant on these ranks, until the time is up."""
    args = recorder.args
    recorder.end = time.perf_counter() + 60 * args.minutes if args.minutes else None
    found: dict[str, dict] = {}
    for name in SPEEDS:
        kind = SPEEDS[name].partition("--dispatcher ")[2].partition(" ")[0]
        if recorder.is_over() or (kind and kind not in ep.REGISTRIES["dispatcher"]):
            recorder.say(f"{name}: left out")
            continue
        try:
            found[name] = speed(recorder, name)
        except (ValueError, ImportError, RuntimeError) as error:  # the same on every rank
            recorder.say(f"{name}: {str(error).splitlines()[0]}")
            recorder.free_memory()
            continue
        of = found[name]
        mfu = f", {of['mfu']:.1%} of the peak" if of["mfu"] else ""
        recorder.say(
            f"{name:24} {of['step']:6} {of['median_ms']:9.2f} ms, {of['tokens_per_s']:,} tokens/s{mfu}"
        )
        recorder.write(
            f"x{recorder.comm.size}_language", {"common_flags": COMMON, "flags": BILLION, "variants": found}
        )


def main() -> None:
    """The flags, and what they ask for."""
    flags = record.parser(__doc__, ranks=1, device="auto", rounds=20, steps=0, small=False)
    flags.set_defaults(steps=None)
    flags.add_argument("--minutes", type=float, help="begin no run after so many")
    flags.add_argument(
        "--only",
        nargs="+",
        choices=["main", "large", "experts", "top_k", "balance", "normalised"],
    )
    flags.add_argument("--workers", type=int, default=1, help="runs side by side")
    flags.add_argument("--speed", action="store_true", help="time steps of a model of 1 B parameters instead")
    flags.add_argument("--step", choices=["auto", "eager"], default="auto")
    flags.add_argument(
        "--torchtitan", type=Path, default=record.ROOT / "build/torchtitan", help="its package"
    )
    flags.add_argument("--tokens", type=int, default=16384, help="of a rank, with --speed")
    record.main(lambda recorder: (speeds if recorder.args.speed else compare)(recorder), flags)


if __name__ == "__main__":
    main()
