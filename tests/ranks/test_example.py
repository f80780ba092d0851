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
from example_trials import EXAMPLE, MORE, STEPS
from support import ROOT, outcome, play, torchrun


@pytest.fixture(scope="module")
def played(build):
    """The folder of what every rank found."""
    return play(build / "example", "example_trials", 4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    """The curve of world size 1, by the command line without torchrun."""
    losses = tmp_path_factory.mktemp("alone") / "losses.json"
    command = [sys.executable, EXAMPLE, "--dtype", "float64", "--losses", str(losses), "--steps", "100"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(losses.read_text())


def difference(curve: list[float], reference: list[float]) -> float:
    """The largest relative difference between a curve and the reference's beginning."""
    return max(abs(a - b) / b for a, b in zip(curve, reference[: len(curve)], strict=True))


def test_the_example_is_short_and_learns(alone):
    assert len(Path(EXAMPLE).read_text().splitlines()) <= 80
    assert len(alone) == 100 and 5 < alone[0] < 6.5 and sum(alone[-10:]) / 10 < 0.55 * alone[0]


@pytest.mark.parametrize("name", ["four_ranks", "two_by_two", "saved"])
def test_the_curve_does_not_know_the_world_size(alone, played, name):
    curve = outcome(played, name, 4)[0]
    assert len(curve) == STEPS and difference(curve, alone) < 1e-10


@pytest.mark.parametrize("world_size", [2, 1])
def test_a_checkpoint_of_four_ranks_continues_on_two_and_on_one(alone, played, world_size):
    curve = outcome(played, "continued", world_size)[0]
    assert len(curve) == MORE and difference(curve, alone) < 1e-10


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


def test_the_code_in_the_readme_runs_as_printed(played):
    whole = outcome(played, "readme", 1)[0]
    for numbers in outcome(played, "readme", 2):
        assert numbers == pytest.approx(whole, rel=1e-5)


LEAVES_AT_ONCE = """
import sys, torch
from ep_launcher import init_ep
sys.setswitchinterval(1000)  # nothing takes the interpreter from this thread, until it waits
init_ep().batch.all_gather(torch.ones(256, 256), "dispatch")
"""


def test_a_program_may_end_right_behind_an_exchange(tmp_path):
    """gloo's thread gives its tensors back to an interpreter that lives: else the process ends by SIGABRT."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES_AT_ONCE)
    done = torchrun(4, str(script), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]


LOADS_NUMBERS = """
import torch
from ep_launcher import *
mesh = init_ep()
layer = EPMoE(MoEConfig(num_experts=2, top_k=1, hidden_dim=8, ffn_dim=1, dtype="float64"), mesh, seed=1)
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
x = torch.arange(32, dtype=torch.float64).sin().view(4, 8)
def step():
    share_of_mean(layer(x).square().mean(), len(x), mesh).backward()
    sync_gradients(layer, mesh)
    optimizer.step()
    optimizer.zero_grad()
    after_step(layer)
step()
state = full_state_dict(layer, mesh, optimizer)
step()
right = full_state_dict(layer, mesh)
load_full_state_dict(layer, state, mesh, optimizer)
step()
again = full_state_dict(layer, mesh)
assert all(right[name].equal(again[name]) for name in right)
"""


def test_moments_of_one_number_are_cut_by_expert(tmp_path):
    script = tmp_path / "loads.py"
    script.write_text(LOADS_NUMBERS)
    done = torchrun(2, str(script), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]


IMPORT_ALONE = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("tensorboard", "tqdm", "tools", "matplotlib", "IPython"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import ep_launcher, torch
layer = ep_launcher.EPMoE(ep_launcher.MoEConfig(hidden_dim=8, ffn_dim=8), seed=1)
y = layer(torch.randn(2, 3, 8))
(y.sum() + ep_launcher.aux_loss(layer)).backward()
assert y.shape == (2, 3, 8)
assert all(hasattr(ep_launcher, name) for name in ep_launcher.__all__)
"""


def test_importing_the_layer_needs_torch_alone(tmp_path):
    command = [sys.executable, "-I", "-c", IMPORT_ALONE, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr[-2000:]


def test_the_installed_package_is_the_layer_and_torch_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"] == ["ep_launcher"]
    assert [re.match(r"\w+", name)[0] for name in project["project"]["dependencies"]] == ["torch"]
