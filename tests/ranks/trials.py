"""Trials on real ranks: one torchrun plays all those of a module, at every world size that they want.

    torchrun --standalone --nproc_per_node=4 tests/ranks/trials.py build/model model_trials
    torchrun --standalone --nproc_per_node=4 tests/ranks/trials.py build/model model_trials retain_graph
    TRIALS_DEVICE=cuda torchrun --standalone --nproc_per_node=2 tests/ranks/trials.py build/mesh mesh_trials

A trial is a function of (mesh, folder) under `@trial(1, 2, 4)`. The largest world comes first; a smaller one are the
first ranks, to whom it looks as if torchrun had started no others. Each trial gets a process group of its own, so that
what one leaves behind does not reach the next. Every rank writes FOLDER/NAME-SIZE-RANK.json: what went wrong, or "",
and what the trial returned. `play` starts it from a test, `outcome` reads it.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ep_launcher import launcher as ep  # noqa: E402

DEVICE = os.environ.get("TRIALS_DEVICE", "cpu")  # cuda for those modules of trials that run on GPUs too
TRIALS: dict[str, tuple[Callable, tuple[int, ...], int]] = {}


def trial(*world_sizes: int, limit_s: int = 300) -> Callable:
    """Decorator: this function is tried on so many ranks, as function(mesh, folder); a hang ends after limit_s."""

    def add(function: Callable) -> Callable:
        TRIALS[function.__name__] = function, world_sizes, limit_s
        return function

    return add


def trials_of(module: str) -> list[tuple[str, int]]:
    """[(name, world size)] of what a module tries, in the order in which they run."""
    importlib.import_module(module)
    own = [(name, sizes) for name, (f, sizes, _) in TRIALS.items() if f.__module__ == module]
    return sorted(((name, size) for name, sizes in own for size in sizes), key=lambda pair: -pair[1])


def train(argv: list[str], log_dir: Path | None = None) -> dict[str, Any]:
    """What the launcher measures with these flags, on the trial's ranks; log_dir: for TensorBoard, on rank 0."""
    config, options = ep.parse_flags([*argv, "--device", DEVICE])
    device, mesh = ep.check_run(config, options), ep.init_ep(ep.ep_size_of(config, ep.world_from_env()[1]))
    log = ep.RunLog(log_dir, options.steps, 1 if log_dir is None else mesh.batch.rank)
    run = ep.Run(config, options, mesh, device, log)
    measured = ep.train(run)
    log.close()
    return measured


def leave_group() -> None:
    """As at the end of a process: whoever waits for this rank learns of it at once."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # cycles hold the group, and its connections


@contextlib.contextmanager
def copied_code(folder: Path) -> Iterator[None]:
    """Inside, the programs and the trials are imported anew, from support.copy_of_the_code's folder."""

    def is_ours(name: str) -> bool:
        return name.split(".")[0] in ("ep_launcher", "tools", "measure") or name.endswith("_trials")

    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    paths, known = list(sys.path), dict(TRIALS)
    sys.path[:0] = [str(folder), str(folder / "tests/ranks")]
    try:
        yield
    finally:
        sys.path[:] = paths
        for name in filter(is_ours, list(sys.modules)):
            del sys.modules[name]
        sys.modules |= kept
        TRIALS.clear()
        TRIALS.update(known)


def run_trial(name: str, rank: int, size: int, store: dist.Store, folder: Path) -> dict:
    """One trial in a group of its own -> {"error", "result"} of this rank."""
    function, _, limit_s = TRIALS[name]
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    if size > 1:
        backend, limit = "nccl" if DEVICE == "cuda" else "gloo", timedelta(seconds=120)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    signal.alarm(limit_s)
    found = {"error": "", "result": None}
    try:
        torch.manual_seed(0)
        found["result"] = function(ep.init_ep(), folder)
    except Exception:
        found["error"] = traceback.format_exc()
    signal.alarm(0)
    gc.collect()  # a recorded step holds the group's messages
    if dist.is_initialized():
        store.set(f"ended {rank}", "")
        store.wait([f"ended {other}" for other in range(size)], timedelta(seconds=2 * limit_s))
        dist.destroy_process_group()
    return found


def main() -> None:
    folder, module, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rank = ep.world_from_env()[0]
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(ep.choose_device("cuda"))
    else:
        ep.schedule_in_batches()
    folder.mkdir(parents=True, exist_ok=True)
    store, _, started = next(dist.rendezvous("env://", timeout=timedelta(seconds=60)))

    def late(*_: object) -> None:
        raise TimeoutError("did not end within its limit")

    signal.signal(signal.SIGALRM, late)
    for name, size in trials_of(module):
        if rank < size <= started and (not names or name in names):
            found = run_trial(name, rank, size, dist.PrefixStore(f"{name} {size}", store), folder)
            (folder / f"{name}-{size}-{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of a group's libraries may still end, and must not meet a dying interpreter


if __name__ == "__main__":
    import trials  # the one that the modules of trials import

    trials.main()
