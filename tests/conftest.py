"""Fixtures of all tests."""

import signal
from pathlib import Path

import pytest
from support import ROOT

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in `make test &`; the tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def build() -> Path:
    """build/, where generated files go."""
    path = ROOT / "build"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session")
def seed_module(build: Path):
    """build/seed.py, freshly extracted: the original's algorithm with its defects."""
    from tools import original

    original.extract()
    return original.load()
