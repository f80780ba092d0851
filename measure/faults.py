"""Chapter 15's run, broken in every way: what each fault costs, what saving costs, into results/cpu_faults.json.

    python measure/faults.py                       all of it, a quarter of an hour
    python measure/faults.py --rounds 1 --only faults --output build
    python measure/faults.py --only soak --output build      8 random SIGKILLs over 600 steps, bit by bit
    python measure/faults.py --device cuda --only saving     what a save costs beside GPUs, into h100_faults.json

Two ranks, on the CPU unless --device says otherwise. Each run ends, after however many restarts, and its summary is
compared with the undisturbed run's: equal in everything that is no time and no folder. Exit code 1 where one is not,
or a process is left.
"""

import random
import re
import signal
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import record  # noqa: E402
from measure.original import ROOT  # noqa: E402
from measure.pair import BrokenPair  # noqa: E402
from tools.faults import BrokenRun, attempts, recoveries  # noqa: E402
from tools.hosts import HostsUnavailable  # noqa: E402

FLAGS = {
    "steps": 80, "checkpoint_interval": 10, "log_interval": 1, "hidden_dim": 32, "ffn_dim": 64, "tokens": 64,
    "dtype": "float64", "balance": "bias", "bias_speed": 0.01, "max_grad_norm": 0.05, "timeout_s": 3,
}  # fmt: skip
QUICK = {  # fault: (rank, step), one an attempt
    "raise": (1, 12), "exit": (0, 22), "SIGKILL": (1, 34), "SIGSEGV": (0, 41), "killed while it writes": (1, 48),
    "killed before the rename": (0, 57), "SIGTERM": (1, 65),
}  # fmt: skip
SLOW = {"SIGSTOP": (1, 25), "hang": (0, 25)}
LOST = {"machine of rank 0": 0, "the other machine": 1}
PARTS = ("faults", "machines", "saving", "soak", "long")
OWN = {"ms_per_step", "config", "took"}  # of a run: no two have the same
RUNS = ROOT / "build" / "runs" / "faults"


def is_equal(summary: dict, calm: dict) -> bool:
    """Whether a run's summary is the undisturbed one's, bit by bit."""
    return all(summary.get(name) == value for name, value in calm.items() if name not in OWN)


def run_to_the_end(name: str, faults: list = (), **flags: object) -> tuple[dict, BrokenRun]:
    """A run -> its summary, and what is left to look at."""
    with BrokenRun(RUNS / name, faults=faults, **FLAGS | flags) as run:
        summary = run.finish()
    return summary, run


def measure_faults(rounds: int) -> dict:
    """{fault: {"down_s", "back_s", "lost_steps": lists, "equal", "orphans"}}."""
    calm, _ = run_to_the_end("calm")
    found = {
        n: {"down_s": [], "back_s": [], "lost_steps": [], "equal": True, "orphans": 0}
        for n in (*QUICK, *SLOW)
    }
    plans = [QUICK] * rounds + [{name: place} for name, place in SLOW.items()] * rounds
    for plan in plans:
        faults = [(name, *place, attempt) for attempt, (name, place) in enumerate(plan.items())]
        summary, run = run_to_the_end("broken", faults)
        for name, cost in zip(plan, recoveries(attempts(run.folder / "log")), strict=True):
            kept = found[name]
            for key, value in cost.items():
                kept[key].append(round(value, 2))
            kept["equal"] = kept["equal"] and is_equal(summary, calm)
            kept["orphans"] += len(run.left())
            print(
                f"{name:26} {cost['lost_steps']:3} steps again, down {cost['down_s']:5.1f} s, {kept['equal']}",
                flush=True,
            )
    full = [("full disk", 1, 25, 0), ("space again", 1, 35, 0)]
    summary, run = run_to_the_end("full", full, max_restarts=0)
    warnings = [line for line in run.log() if line.startswith("warning")]
    found["full disk"] = {
        "down_s": [0.0], "back_s": [0.0], "lost_steps": [0], "equal": is_equal(summary, calm),
        "orphans": len(run.left()), "warnings": warnings,
    }  # fmt: skip
    return found


def measure_machines(rounds: int) -> dict:
    """One machine of two is lost; the other's torchrun ends; both start again by hand, at once: as measure_faults.

    ended_s: from the loss to the end of the other's torchrun. {} where this machine allows no two hosts.
    """
    found = {
        n: {"down_s": [], "back_s": [], "lost_steps": [], "ended_s": [], "equal": True, "orphans": 0}
        for n in LOST
    }
    try:
        with BrokenPair(RUNS / "pair", **FLAGS) as run:
            calm = run.finish()
    except HostsUnavailable as why:
        print(f"machines left out: {why}", flush=True)
        return {}
    for name, machine in [pair for pair in LOST.items() for _ in range(rounds)]:
        with BrokenPair(RUNS / "pair", **FLAGS) as broken:
            broken.wait_for_step(25)
            since = time.monotonic()
            broken.lose(machine)
            broken.machines[1 - machine].process.wait(timeout=FLAGS["timeout_s"] + 30)
            ended_s = time.monotonic() - since
            left = len(broken.left())
        again = {"checkpoint_dir": broken.checkpoints, "log_dir": broken.folder / "log", "resume": True}
        with BrokenPair(RUNS / "pair-again", **FLAGS | again) as resumed:
            summary = resumed.finish()
        (cost,) = recoveries(attempts(broken.folder / "log"))
        kept = found[name]
        for key, value in (cost | {"ended_s": ended_s}).items():
            kept[key].append(round(value, 2))
        kept["equal"] = kept["equal"] and is_equal(summary, calm)
        kept["orphans"] += left + len(resumed.left())
        print(
            f"{name:26} ended after {ended_s:.1f} s, down {cost['down_s']:5.1f} s, {kept['equal']}",
            flush=True,
        )
    return found


def measure_saving(rounds: int) -> dict:
    """What three saves cost a run: without, stopping, in the background, in turn. A GPU's steps are short: it makes
    more of them, so that a save ends before the next begins."""
    interval = 15 if FLAGS["device"] == "cpu" else 600
    steps = 4 * interval
    sizes = {
        "steps": steps, "hidden_dim": 256, "ffn_dim": 1024, "tokens": 128, "dtype": "float32", "timeout_s": 60,
    }  # fmt: skip
    ways = {
        "without": {"checkpoint_interval": None}, "stopping": {"checkpoint_interval": interval},
        "background": {"checkpoint_interval": interval, "async_checkpoints": True},
    }  # fmt: skip
    found = {name: {"run_s": [], "longest_step_ms": []} for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            _, run = run_to_the_end("saving", **sizes | way)
            (life,) = attempts(run.folder / "log")
            times = [when for when, _ in life.steps]
            found[name]["run_s"].append(round(times[-1] - times[0], 3))
            longest = max(b - a for a, b in zip(times[1:], times[2:], strict=False))
            found[name]["longest_step_ms"].append(round(longest * 1e3, 1))
            num_bytes = sum(path.stat().st_size for path in run.checkpoints.glob(f"step-{steps:08d}/*"))
        print({name: statistics.median(kept["run_s"]) for name, kept in found.items()}, flush=True)
    return found | {"megabytes": num_bytes / 1e6, "interval": interval, "saves": 3, "steps": steps}


def soak(kills: int = 8, steps: int = 600) -> dict:
    """Random SIGKILLs of random ranks at random steps; then the end is compared."""
    dice, flags = random.Random(0), {"steps": steps, "checkpoint_interval": 25}
    calm, _ = run_to_the_end("calm-soak", **flags)
    at = sorted(dice.sample(range(10, steps - 20), kills))
    with BrokenRun(RUNS / "soak", **FLAGS | flags) as run:
        for step in at:
            run.wait_for_step(step)
            run.send(dice.randrange(2), signal.SIGKILL)
            run.wait_for_step(run.step + 1)
        summary = run.finish()
    told = recoveries(attempts(run.folder / "log"))
    return {
        "kills": kills, "steps": steps, "at": at, "equal": is_equal(summary, calm), "orphans": len(run.left()),
        "down_s": [round(cost["down_s"], 2) for cost in told], "lost_steps": [cost["lost_steps"] for cost in told],
    }  # fmt: skip


def long_run(steps: int = 9000) -> dict:
    """Resident memory and what malloc has given out (MB), and open files of the ranks, in a long run with saves."""
    seen = {"log_interval": 50, "step": [], "rss_mb": [], "heap_mb": [], "open_files": []}
    places = [*range(steps // 10, steps, steps // 10), steps - 30]
    faults = [("heap", rank, step, 0) for step in places for rank in range(2)]
    flags = FLAGS | {"steps": steps, "checkpoint_interval": 100, "log_interval": seen["log_interval"]}
    flags["plugin"] = Path(__file__).with_name("heap.py")
    with BrokenRun(RUNS / "long", faults=faults, **flags) as run:
        for step in places:
            run.wait_for_step(step)
            ranks: list[psutil.Process] = [run.rank(number) for number in range(2)]
            seen["step"].append(step)
            seen["rss_mb"].append([round(rank.memory_info().rss / 1e6, 1) for rank in ranks])
            seen["open_files"].append([rank.num_fds() for rank in ranks])
        run.finish()
    said = (run.folder / "output").read_text()
    heaps = [re.findall(rf"^heap of rank {rank}: (\d+)", said, re.MULTILINE) for rank in range(2)]
    seen["heap_mb"] = [[round(int(own) / 1e6, 2) for own in both] for both in zip(*heaps, strict=True)]
    print(seen, flush=True)
    return seen


def main() -> None:
    """All parts, or one."""
    parser = record.parser(__doc__, rounds=3, device="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    device = ep.choose_device(args.device)
    FLAGS["device"] = device.type
    result: dict = {
        "ranks": 2,
        "checkpoint_interval": FLAGS["checkpoint_interval"],
        "timeout_s": FLAGS["timeout_s"],
    }
    work = {
        "faults": lambda: measure_faults(args.rounds), "machines": lambda: measure_machines(args.rounds),
        "saving": lambda: measure_saving(3 * args.rounds),
        "soak": soak, "long": long_run,
    }  # fmt: skip
    for part in args.only:
        result[part] = work[part]()
        print(part, "done", flush=True)
        record.write(args.output, "faults", device, result)
    judged = [found for part in ("faults", "machines") for found in result.get(part, {}).values()]
    judged += [result["soak"]] if "soak" in result else []
    sys.exit(0 if all(found["equal"] and not found["orphans"] for found in judged) else 1)


if __name__ == "__main__":
    main()
