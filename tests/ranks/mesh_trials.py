"""Chapter 15 on real ranks, CPUs or GPUs: the curve on every mesh, checkpoints that change meshes. test_mesh.py
reads it."""

import shutil
from itertools import product
from pathlib import Path

from trials import DEVICE, train, trial

from ep_launcher import launcher as ep

SMALL = "--dtype float64 --hidden-dim 16 --ffn-dim 16 --tokens 36 --lr 3e-3 --log-interval 1"
KINDS = {
    "bias, clipped": "--balance bias --bias-speed 0.01 --max-grad-norm 0.02",
    "global capacity": "--capacity-factor 1 --capacity-scope global --overflow reroute",
    "swiglu, shared expert": "--activation swiglu --num-shared-experts 1",
    "groups": "--router sigmoid --num-groups 4 --topk-groups 2 --z-alpha 0.1",
    "float32": "--dtype float32",
    "bfloat16": "--dtype bfloat16",
}
LIMITS = dict.fromkeys(KINDS, 1e-10) | {"float32": 1e-5, "bfloat16": 2e-2}  # how far from one rank's curve
MESHES = {1: (1,), 2: (1, 2), 4: (1, 2, 4), 8: (4, 8)}
DISPATCHERS = {4: ("all_gather", "gather_tokens", "dedup", "two_stage")}
SAVED = [(8, 4), (8, 8), (4, 2), (2, 2)]  # (world size, ep_size) of the runs that are saved
# How runs that save and go on take their steps. In float64 not every dispatcher can be recorded; this one can.
EAGER = {"eager": "--step eager"}
RUN_AS = {"cpu": EAGER, "cuda": EAGER | {"graph": "--step graph --dispatcher gather_tokens"}}
STEPS = 6


def curve(flags: str, steps: int = STEPS) -> list[float]:
    return train(f"{SMALL} --steps {steps} {flags}".split())["task_loss"]


@trial(8, 4, 2, 1)
def every_mesh(mesh: ep.Mesh, folder: Path) -> dict[str, list[float]]:
    """The losses of each kind of run on each mesh, and with each dispatcher that can run on the first."""
    size, found = mesh.batch.size, {}
    for ep_size in MESHES[size]:
        for name, flags in list(KINDS.items())[: 1 if size == 8 else None]:
            found[f"{name}, ep {ep_size}"] = curve(f"{flags} --ep-size {ep_size}")
    for name in DISPATCHERS.get(size, ()):
        found[f"bias, clipped, {name}"] = curve(
            f"{KINDS['bias, clipped']} --ep-size {MESHES[size][-1]} --dispatcher {name}"
        )
    return found


@trial(1)
def recorded(mesh: ep.Mesh, folder: Path) -> dict[str, str]:
    """{kind of run: why its step cannot be recorded, or "" where it has been}."""
    said = {}
    for name, flags in KINDS.items():
        try:
            curve(f"{flags} --step graph", steps=2)
            said[name] = ""
        except ep.CannotRun as error:
            said[name] = str(error)
    return said


@trial(4, 2)
def gpus_of_a_rank(mesh: ep.Mesh, folder: Path) -> list[bool]:
    """Whether this rank has memory on each GPU, after saves in the background: a thread begins on GPU 0."""
    here = (
        f"--checkpoint-dir {folder / f'gpus-{mesh.batch.size}'} --checkpoint-interval 3 --async-checkpoints"
    )
    curve(f"{here} --dtype float32 --dispatcher gather_tokens")
    count = ep.torch.cuda.device_count()
    return [ep.torch._C._cuda_hasPrimaryContext(gpu) for gpu in range(count)]  # nothing public says it


@trial(8, 4, 2, 1)
def saved_and_resumed(mesh: ep.Mesh, folder: Path) -> dict[str, list[float]]:
    """Saves on each mesh that there are ranks for; all that are no larger go on in copies, at every ep_size."""
    size, found, comm = mesh.batch.size, {}, mesh.batch
    for (saved_on, ep_size), step in product(SAVED, RUN_AS[DEVICE]):
        flags = f"{KINDS['bias, clipped']} {RUN_AS[DEVICE][step]}"
        here = folder / f"saved-on-{saved_on}-{ep_size}-{step}"
        if size == saved_on:
            kept = f"--checkpoint-dir {here} --checkpoint-interval 3 --keep-checkpoints 9 --ep-size {ep_size}"
            found[f"never stopped, {saved_on} x {ep_size}, {step}"] = curve(f"{flags} {kept}")
        if size > saved_on or not here.exists():
            continue
        for own in MESHES[size]:
            copy = folder / f"{saved_on}-{ep_size}-to-{size}-{own}-{step}"
            if comm.rank == 0:
                shutil.copytree(here / "step-00000003", copy / "step-00000003")
            comm.all_reduce(ep.torch.zeros(1, device=DEVICE)).item()
            found[f"{saved_on} x {ep_size}, then {size} x {own}, {step}"] = curve(
                f"{flags} --resume --checkpoint-dir {copy} --ep-size {own}"
                + " --async-checkpoints --checkpoint-interval 2" * (own == 1)
            )
    return found
