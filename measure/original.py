"""The original tutorial's algorithm, defects included, as a module: the cells tagged `seed`, in build/seed.py."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "build" / "seed.py"


def load_module(path: str | Path, name: str) -> ModuleType:
    """A Python file as a module of the given name, which dataclasses look up."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extract() -> None:
    """Writes build/seed.py from the notebooks. On one rank, before the others load it."""
    PATH.parent.mkdir(exist_ok=True)
    command = [sys.executable, "tools/extract.py", "--tags", "seed", "--output", str(PATH)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def load() -> ModuleType:
    """build/seed.py as it is; by its path, since other packages are named `build` too."""
    return load_module(PATH, "ep_seed")
