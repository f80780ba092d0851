"""The layer in models of one's own, on 1, 2 and 4 ranks: the example on several meshes, README's code."""

import argparse
import json
import re
import runpy
from pathlib import Path

from trials import trial

from ep_launcher import launcher as ep

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = str(ROOT / "examples" / "language_model.py")
STEPS, MORE = 30, 36  # a checkpoint is written after the first, and continued to the second


def train(folder: Path, mesh: ep.Mesh, steps: int, **flags) -> list[float] | None:
    """A run of the example in float64 -> the loss of every step, on rank 0."""
    losses = folder / "losses.json"
    known = {
        "ep_size": None,
        "save": None,
        "load": None,
        "losses": str(losses),
        "dtype": "float64",
        "steps": steps,
    }
    runpy.run_path(EXAMPLE)["main"](argparse.Namespace(**known | flags))
    return json.loads(losses.read_text()) if mesh.batch.rank == 0 else None


@trial(4)
def four_ranks(mesh: ep.Mesh, folder: Path) -> list[float] | None:
    return train(folder, mesh, STEPS, ep_size=4)


@trial(4)
def two_by_two(mesh: ep.Mesh, folder: Path) -> list[float] | None:
    return train(folder, mesh, STEPS, ep_size=2)


@trial(4)
def saved(mesh: ep.Mesh, folder: Path) -> list[float] | None:
    return train(folder, mesh, STEPS, save=str(folder / "checkpoint.pt"))


@trial(1, 2)
def continued(mesh: ep.Mesh, folder: Path) -> list[float] | None:
    return train(folder, mesh, MORE, load=str(folder / "checkpoint.pt"))


def readme_code() -> str:
    """The code of README's section on the layer in a model of one's own."""
    section = (ROOT / "README.md").read_text().partition("## In your own model\n")[2].partition("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@trial(1, 2)
def readme(mesh: ep.Mesh, folder: Path) -> list[float]:
    """README's code, run as printed -> numbers of what it leaves."""
    script = folder / f"mine-{mesh.batch.rank}.py"
    script.write_text(readme_code())
    made = runpy.run_path(str(script))
    gate, expert = made["state"]["1.router.gate.weight"], made["state"]["1.experts.w1"]
    return [float(made["norm"]), float(gate.double().norm()), float(expert.double().norm()), len(expert)]
