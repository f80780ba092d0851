"""The layer in models of one's own: the example on meshes of several kinds, README's code, the package by itself."""

import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from support import ROOT, torchrun

EXAMPLE = str(ROOT / "examples" / "language_model.py")
STEPS, MORE = 100, 106  # a checkpoint is written after the first, and continued to the second


def train(world_size: int, folder: Path, *flags: str) -> list[float]:
    """A run of the example in float64, with torchrun or, on one rank, without -> the loss of every step."""
    losses = folder / "losses.json"
    flags = ("--dtype", "float64", "--losses", str(losses), *flags)
    if world_size == 1:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, EXAMPLE, *flags], env=environment, capture_output=True, text=True
        )
    else:
        done = torchrun(world_size, EXAMPLE, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(losses.read_text())


def difference(curve: list[float], reference: list[float]) -> float:
    """The largest relative difference between a curve and the reference's beginning."""
    return max(abs(a - b) / b for a, b in zip(curve, reference[: len(curve)], strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    """The curve of world size 1."""
    return train(1, tmp_path_factory.mktemp("alone"), "--steps", str(MORE))


def test_the_example_is_short_and_learns(alone):
    assert len(Path(EXAMPLE).read_text().splitlines()) <= 80
    assert len(alone) == MORE and 5 < alone[0] < 6.5 and sum(alone[-10:]) / 10 < 0.55 * alone[0]


@pytest.mark.parametrize(("world_size", "ep_size"), [(4, 4), (4, 2)], ids=["4 ranks", "2 x 2 ranks"])
def test_the_curve_does_not_know_the_world_size(alone, tmp_path, world_size, ep_size):
    curve = train(world_size, tmp_path, "--steps", str(STEPS), "--ep-size", str(ep_size))
    assert len(curve) == STEPS and difference(curve, alone) < 1e-10


def test_a_checkpoint_of_two_ranks_continues_on_four_and_on_one(alone, tmp_path):
    checkpoint = str(tmp_path / "checkpoint.pt")
    curve = train(2, tmp_path, "--steps", str(STEPS), "--save", checkpoint)
    assert len(curve) == STEPS and difference(curve, alone) < 1e-10
    for world_size in (4, 1):
        curve = train(world_size, tmp_path, "--steps", str(MORE), "--load", checkpoint)
        assert len(curve) == MORE and difference(curve, alone) < 1e-10


def readme_code() -> str:
    """The code of README's section on the layer in a model of one's own."""
    section = (ROOT / "README.md").read_text().partition("## In your own model\n")[2].partition("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def contributing_code() -> str:
    """The dispatcher that CONTRIBUTING.md starts from."""
    return textwrap.dedent(
        re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    )


def test_the_dispatcher_in_contributing_is_right(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(contributing_code())
    command = ["tools/parity.py", "--plugin", str(plugin), "--dispatcher", "mine", "--dtypes", "float64"]
    done = torchrun(2, *command, "--cases", "uneven", "micro_batches")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-1000:]
    assert re.search(r"([1-9]\d*) of \1 within limits", done.stdout), done.stdout


WATCH = """
import json, sys
gate, expert = state["1.router.gate.weight"], state["1.experts.w1"]
said = json.dumps([float(norm), float(gate.double().norm()), float(expert.double().norm()), len(expert)])
sys.stdout.write(f"said {said}\\n")  # whole lines: the ranks share this stream
"""


def test_the_code_in_the_readme_runs_as_printed(tmp_path, monkeypatch):
    script = tmp_path / "mine.py"
    script.write_text(readme_code() + WATCH)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    said = {}
    for world_size in (1, 2):
        done = torchrun(world_size, str(script))
        assert done.returncode == 0, done.stderr[-2000:]
        said[world_size] = [
            json.loads(line) for line in re.findall(r"^said (.*)$", done.stdout, re.MULTILINE)
        ]
    assert len(said[1]) == 1 and len(said[2]) == 2
    for line in said[2]:
        assert line == pytest.approx(said[1][0], rel=1e-5)


IMPORT_ALONE = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("tensorboard", "tqdm", "tools", "matplotlib"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import ep_launcher, torch
layer = ep_launcher.EPMoE(ep_launcher.MoEConfig(hidden_dim=8, ffn_dim=8), seed=1)
assert layer(torch.randn(2, 3, 8)).shape == (2, 3, 8)
assert all(hasattr(ep_launcher, name) for name in ep_launcher.__all__)
"""


def test_importing_the_layer_needs_torch_alone(tmp_path):
    command = [sys.executable, "-I", "-c", IMPORT_ALONE, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_installed_package_is_the_layer_and_torch_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"] == ["ep_launcher"]
    assert [re.match(r"\w+", name)[0] for name in project["project"]["dependencies"]] == ["torch"]
