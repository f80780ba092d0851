"""Chapter 15's mesh and checkpoints on several ranks, on GPUs too where there are some: what mesh_trials.py found; and
the chapter's own cells on GPUs.

    pytest tests/ranks/test_mesh.py -k cuda      with one GPU or more
"""

import functools
import json

import pytest
import torch
from mesh_trials import DISPATCHERS, KINDS, LIMITS, MESHES, RUN_AS, SAVED, STEPS
from support import ROOT, outcome, play

NUM_GPUS = torch.cuda.device_count()
WORLDS = {"cpu": list(MESHES), "cuda": [size for size in MESHES if size <= NUM_GPUS]}
PLACES = [(device, size) for device, sizes in WORLDS.items() for size in sizes]


@pytest.fixture(scope="module")
def played(build):
    """device -> the folder of what every rank found."""
    return functools.cache(
        lambda device: play(build / f"mesh-{device}", "mesh_trials", max(WORLDS[device]), device=device)
    )


def alone(folder) -> dict[str, list[float]]:
    """{kind of run: its losses on one rank}."""
    found = outcome(folder, "every_mesh", 1)[0]
    return {name: found[f"{name}, ep 1"] for name in KINDS}


def apart(ours: list[float], right: list[float]) -> float:
    assert len(ours) == len(right) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize(("device", "world_size"), PLACES)
def test_no_curve_depends_on_the_mesh(played, device, world_size):
    right = alone(played(device))
    for found in outcome(played(device), "every_mesh", world_size):
        kinds = 1 if world_size == 8 else len(KINDS)
        assert len(found) == len(MESHES[world_size]) * kinds + len(DISPATCHERS.get(world_size, ()))
        for name, curve in found.items():
            kind = next(kind for kind in KINDS if name.startswith(kind))
            assert apart(curve, right[kind]) < LIMITS[kind], name


@pytest.mark.parametrize(("device", "world_size"), PLACES)
def test_a_checkpoint_goes_on_on_any_mesh(played, device, world_size):
    found = outcome(played(device), "saved_and_resumed", world_size)[0]
    right = alone(played(device))["bias, clipped"]
    for name, curve in found.items():
        assert apart(curve, right) < 1e-10, name
    own = [ep_size for saved_on, ep_size in SAVED if saved_on == world_size]
    for ep_size in own:  # on the same mesh bit by bit
        mesh = f"{world_size} x {ep_size}"
        for step in RUN_AS[device]:
            assert found[f"{mesh}, then {mesh}, {step}"] == found[f"never stopped, {mesh}, {step}"]
    saved = [saved_on for saved_on, _ in SAVED if world_size <= saved_on <= max(WORLDS[device])]
    assert len(found) == (len(own) + len(saved) * len(MESHES[world_size])) * len(RUN_AS[device])


@pytest.mark.parametrize("device", {device for device, _ in PLACES})
def test_what_cannot_be_recorded_is_refused(played, device):
    """On a GPU the capacity in global scope; every other kind of run is recorded. On a CPU none is."""
    for name, said in outcome(played(device), "recorded", 1)[0].items():
        is_global = name == "global capacity"
        assert bool(said) == (is_global or device == "cpu"), (name, said)
        assert ("; capacity_scope global waits for the device, local does not" in said) == is_global
        assert "\n" not in said and (not said or said.endswith("take auto (here: eager)"))


@pytest.mark.skipif(NUM_GPUS < 2, reason="each rank needs a GPU of its own")
def test_a_save_in_the_background_stays_on_its_gpu_cuda(played):
    size = min(4, max(WORLDS["cuda"]))
    for rank, found in enumerate(outcome(played("cuda"), "gpus_of_a_rank", size)):
        assert [gpu for gpu, has in enumerate(found) if has] == [rank]


@pytest.mark.skipif(NUM_GPUS < 2, reason="one GPU has no replicas")
def test_the_cells_of_the_chapter_on_cuda():
    """ZeRO-1, FSDP2 and DTensor as the chapter shows them, over NCCL: its cells run, and its checks hold."""
    from tools.ranks.cells import run_cell_on_ranks

    notebook = json.loads((ROOT / "notebooks/15_mesh.ipynb").read_text("utf-8"))
    cells = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}
    bodies = [cells[f"{name}-demo"].partition("\n")[2] for name in ("zero", "fsdp", "dtensor")]
    run_cell_on_ranks("\n".join(bodies), nproc=NUM_GPUS // 2 * 2, device="cuda", timeout_s=120)
