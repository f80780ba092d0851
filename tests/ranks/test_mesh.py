"""Chapter 15's mesh and checkpoints on several ranks: what tests/ranks/mesh_trials.py found."""

import pytest
from mesh_trials import DISPATCHERS, KINDS, MESHES, SAVED, STEPS
from support import outcome, play


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    return play(build / "mesh", "mesh_trials", 8)


@pytest.fixture(scope="module")
def alone(played):
    """{kind of run: its losses on one rank}."""
    found = outcome(played, "every_mesh", 1)[0]
    return {name: found[f"{name}, ep 1"] for name in KINDS}


def apart(ours: list[float], right: list[float]) -> float:
    assert len(ours) == len(right) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize("world_size", MESHES)
def test_no_curve_depends_on_the_mesh(played, alone, world_size):
    for found in outcome(played, "every_mesh", world_size):
        kinds = 1 if world_size == 8 else len(KINDS)
        assert len(found) == len(MESHES[world_size]) * kinds + len(DISPATCHERS.get(world_size, ()))
        for name, curve in found.items():
            kind = next(kind for kind in KINDS if name.startswith(kind))
            assert apart(curve, alone[kind]) < 1e-10, name


@pytest.mark.parametrize("world_size", MESHES)
def test_a_checkpoint_goes_on_on_any_mesh(played, alone, world_size):
    found = outcome(played, "saved_and_resumed", world_size)[0]
    for name, curve in found.items():
        assert apart(curve, alone["bias, clipped"]) < 1e-10, name
    own = [ep_size for saved_on, ep_size in SAVED if saved_on == world_size]
    for ep_size in own:  # on the same mesh bit by bit
        mesh = f"{world_size} x {ep_size}"
        assert found[f"{mesh}, then {mesh}"] == found[f"never stopped, {mesh}"]
    no_smaller = [saved_on for saved_on, _ in SAVED if saved_on >= world_size]
    assert len(found) == len(own) + len(no_smaller) * len(MESHES[world_size])
