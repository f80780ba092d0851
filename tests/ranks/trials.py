"""Trials on real ranks: one process plays all those of a module, at every world size that they want.

    python tests/ranks/trials.py 4 build/model model_trials
    python tests/ranks/trials.py 4 build/model model_trials retain_graph
    TRIALS_DEVICE=cuda python tests/ranks/trials.py 2 build/mesh mesh_trials

It imports torch and the launcher, and forks the ranks from there: one import in place of one a rank. A trial is a
function of (mesh, folder) under `@trial(1, 2, 4)`. The largest world comes first; a smaller one are the first ranks, to
whom it looks as if torchrun had started no others. Each trial gets a process group of its own, so that
what one leaves behind does not reach the next. Every rank writes FOLDER/NAME-SIZE-RANK.json: what went wrong, or "",
and what the trial returned. `play` starts it from a test, `outcome` reads it.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which an optimizer imports: once, and not in every rank
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
    device, mesh = ep.check_run(config, options), ep.init_ep(options.ep_size)
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


def play(
    rank: int, num_ranks: int, meeting: socket.socket, folder: Path, module: str, names: list[str]
) -> None:
    """All that one rank has to do."""
    end_with_parent()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ["LOCAL_WORLD_SIZE"] = str(num_ranks)
    if DEVICE == "cuda":
        torch.cuda.set_device(ep.choose_device("cuda"))
    else:  # as init_distributed does
        with contextlib.suppress(AttributeError, OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    patience, listening = timedelta(seconds=60), meeting.fileno() if rank == 0 else None
    store = dist.TCPStore(
        *meeting.getsockname(), is_master=rank == 0, timeout=patience, wait_for_workers=False,
        master_listen_fd=listening,
    )  # fmt: skip

    def late(*_: object) -> None:
        raise TimeoutError("did not end within its limit")

    signal.signal(signal.SIGALRM, late)
    for name, size in trials_of(module):
        if rank < size <= num_ranks and (not names or name in names):
            found = run_trial(name, rank, size, dist.PrefixStore(f"{name} {size}", store), folder)
            (folder / f"{name}-{size}-{rank}.json").write_text(json.dumps(found))
    store.set(f"left {rank}", "")
    if rank == 0:  # whose process holds the store
        store.wait([f"left {other}" for other in range(num_ranks)], timedelta(minutes=20))


def end_with_parent() -> None:
    """No rank outlives the process that has forked it."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def main() -> int:
    """Forks the ranks and waits for them; where one fails, all end."""
    num_ranks, folder, module, *names = sys.argv[1:]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    meeting, running, code = socket.create_server(("127.0.0.1", 0)), set(), 0
    for rank in range(int(num_ranks)):
        if (pid := os.fork()) == 0:
            try:
                play(rank, int(num_ranks), meeting, folder, module, names)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(
                code
            )  # threads of a group's libraries may still end, and must not meet a dying interpreter
        running.add(pid)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and not code:
            code = 1
            for other in running:
                os.kill(other, signal.SIGKILL)
    return code


if __name__ == "__main__":
    import trials  # the one that the modules of trials import

    sys.exit(trials.main())
