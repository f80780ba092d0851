"""Fixtures of all tests."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in `make test &`; the tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)

if sys.flags.optimize:
    pytest.exit("without assertions (PYTHONOPTIMIZE, -O) no test can fail; leave that out", returncode=2)

FOLDERS = ("fast", "ranks", "book")  # a test's folder is its mark


def pytest_itemcollected(item: pytest.Item) -> None:
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    if folder in FOLDERS:
        item.add_marker(folder)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A file's tests stay together, because they share what they have set up; notebooks share nothing. In the order in
    which they are collected: the long ones come first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_notebook_executes" in nodeid else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def no_processes(request, monkeypatch) -> None:
    """A fast test starts no process; those of extract.py's command line still do, and Triton where it compiles."""
    allowed = request.path.name == "test_extract.py" or torch.cuda.is_available()
    if "fast" in request.keywords and not allowed:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a fast test starts no process; put it into tests/ranks")

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.fixture(scope="session")
def build() -> Path:
    """build/, where generated files go."""
    path = ROOT / "build"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session")
def seed_module(build: Path):
    """build/seed.py, freshly extracted: the original's algorithm with its defects."""
    from measure import original

    original.extract()
    return original.load()
