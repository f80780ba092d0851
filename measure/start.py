"""From `make train` to the first step: where the time goes, beside another commit; into results/<device>_start.json.

    mkdir -p build/start_before && git archive COMMIT | tar -x -C build/start_before
    python measure/start.py --before build/start_before                       two gloo ranks, four minutes
    python measure/start.py --before build/start_before --device cuda --rounds 2     two GPUs

A sample is what `make train` runs, tools/extract.py and tools/launch.py, in the tree of each commit by turns. The first
of each is kept by itself: files are not in memory yet, and kernels have to be compiled. Times are of the rank that
came last.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from measure import record  # noqa: E402
from measure.original import ROOT  # noqa: E402

# What ends each phase.
PHASES = ("stitched", "ranks started", "modules read", "group joined", "model made", "first step")

# Read by every Python below, before anything else: notes when a rank begins, and what it then comes to.
MARKS = """
import os, sys, time

def mark(name):
    with open(os.environ["START_MARKS"], "a") as file:
        file.write(f"{os.getpid()} {name} {time.time()}\\n")

def around(owner, name, before, after):
    function = getattr(owner, name)
    def marked(*args, **kwargs):
        mark(before)
        found = function(*args, **kwargs)
        mark(after)
        return found
    setattr(owner, name, marked)

def hook(event, args):
    global is_over
    torch = sys.modules.get("torch") if event == "import" and not is_over else None
    if torch and not getattr(torch.__spec__, "_initializing", False):
        is_over = True
        around(torch.distributed, "init_process_group", "modules read", "group joined")
        around(torch.optim.AdamW, "__init__", "model made", "optimizer made")

is_over = False
mark("ranks started")
os.register_at_fork(after_in_child=lambda: mark("ranks started"))
sys.addaudithook(hook)
"""


def read_marks(path: Path) -> dict[str, float]:
    """{what: when it happened on the last rank}; processes that join no group are no ranks."""
    marks: dict[str, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        pid, rest = line.split(" ", 1)
        name, _, when = rest.rpartition(" ")
        marks.setdefault(pid, {})[name] = float(when)
    ranks = [found for found in marks.values() if "group joined" in found]
    return {name: max(found[name] for found in ranks) for name in PHASES[1:-1]}


def sample(tree: Path, args: object, folder: Path) -> dict[str, float]:
    """One start -> {phase: seconds; "total"; "processor": that of all processes, three steps and the end included}."""
    marks = folder / "marks"
    marks.write_text("")
    cpu, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    environment = os.environ | {"PYTHONPATH": str(folder), "START_MARKS": str(marks)}
    subprocess.run([sys.executable, "tools/extract.py"], cwd=tree, check=True, stdout=subprocess.DEVNULL)
    ends = {"stitched": time.time()}
    flags = f"--nproc {args.ranks} --steps 3 --log-interval 1 --device {args.device}".split()
    command = [sys.executable, "tools/launch.py", *flags, "--log-dir", str(folder / "log")]
    with subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("[step 00000]"):
                ends.setdefault("first step", time.time())
    if process.returncode or "first step" not in ends:
        raise RuntimeError(f"{' '.join(command)} in {tree} ended with {process.returncode}")
    ends |= read_marks(marks)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found, last = {}, begin
    for name in PHASES:
        found[name], last = ends[name] - last, ends[name]
    found |= {"total": last - begin}
    found |= {"processor": after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime}
    return {name: round(seconds, 3) for name, seconds in found.items()}


def main() -> None:
    flags = record.parser(__doc__, ranks=2, device="cpu", rounds=20, before=None)
    args = flags.parse_args()
    trees = {"ours": ROOT} | ({"before": Path(args.before).resolve()} if args.before else {})
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in reversed(trees)}
    with tempfile.TemporaryDirectory(prefix="ep-start-") as place:
        folders = {name: Path(place) / name for name in trees}
        for name in folders:
            folders[name].mkdir()
            (folders[name] / "sitecustomize.py").write_text(MARKS)
        for turn in range(args.rounds + 1):
            for name, found in samples.items():
                os.environ["TRITON_CACHE_DIR"] = str(folders[name] / "kernels")
                found.append(sample(trees[name], args, folders[name]))
                print(f"{turn:3} {name:8} {found[-1]['total']:6.2f} s to the first step", flush=True)
    first = {name: found.pop(0) for name, found in samples.items()}
    columns = {
        name: {key: [one[key] for one in found] for key in found[0]} for name, found in samples.items()
    }
    medians = {name: record.medians(column) for name, column in columns.items()}
    for key in (*PHASES, "total", "processor"):
        print(f"  {key:16}" + "".join(f"{name:>10} {found[key]:6.2f} s" for name, found in medians.items()))
    result = {"world_size": args.ranks, "median_s": medians, "first_s": first, "samples_s": columns}
    device = torch.device(args.device)
    what = "start" if device.type == "cpu" else f"x{args.ranks}_start"
    record.write(args.output, what, device, result, args.before and f"{args.before}/ep_launcher/launcher.py")


if __name__ == "__main__":
    main()
