"""A run over two machines (tools/hosts.py), one of which can be lost: what measure/faults.py and the tests break."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import psutil

from tools import hosts
from tools.launch import LAUNCHER, flag_arguments
from tools.ranks.processes import Agent


class BrokenPair:
    """A run of two machines with one rank each, in a new folder that both see: checkpoints/, log/, summary.json.

    flags: the launcher's. HostsUnavailable, in `with`, where this machine allows no two hosts.
    """

    def __init__(self, folder: str | Path, **flags: Any) -> None:
        self.folder = Path(folder).resolve()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.checkpoints = self.folder / "checkpoints"
        places = {"checkpoint_dir": self.checkpoints, "log_dir": self.folder / "log", "device": "cpu"}
        arguments = flag_arguments(places | {"summary": self.folder / "summary.json"} | flags)
        self.program = [str(LAUNCHER), *arguments]
        self.outputs = [self.folder / f"machine{number}.log" for number in (1, 2)]
        self.namespaces: list[int] = []
        self.machines: list[Agent] = []
        self.opened = contextlib.ExitStack()

    def __enter__(self) -> BrokenPair:
        with contextlib.ExitStack() as opened:
            self.namespaces = opened.enter_context(hosts.two_namespaces())
            for number, (namespace, output) in enumerate(zip(self.namespaces, self.outputs, strict=True), 1):
                host = hosts.start_host(namespace, number, self.program, output)
                self.machines.append(opened.enter_context(host))
            self.opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()

    def wait_for_step(self, step: int, limit_s: float = 120) -> None:
        """Until this step, one that is logged, is done. RuntimeError where it does not come."""
        deadline = time.monotonic() + limit_s
        while f"[step {step:05d}]" not in self.outputs[0].read_text("utf-8", "replace"):
            if time.monotonic() > deadline or any(m.returncode is not None for m in self.machines):
                raise RuntimeError(f"step {step} did not come:\n{self.outputs[0].read_text()[-2000:]}")
            time.sleep(0.005)

    def lose(self, machine: int) -> None:
        """Machine 0 or 1 goes: its cable is dead, and every process of it ends at once, torchrun first."""
        lost = self.machines[machine]
        for one in self.machines:
            one.note(every_s=0)
        hosts.run_inside(self.namespaces[machine], "ip", "link", "set", hosts.INTERFACE, "down")
        lost.process.kill()
        for process in lost.alive():
            with contextlib.suppress(psutil.Error):  # Linux ends a rank whose torchrun is gone
                process.kill()

    def finish(self, limit_s: float = 120) -> dict[str, Any]:
        """Waits until both torchruns have ended -> the summary, or {}. RuntimeError where one hangs."""
        hosts.wait_for(self.machines, limit_s)
        if any(machine.returncode is None for machine in self.machines):
            raise RuntimeError(f"the two machines did not end in {limit_s:g} s")
        path = self.folder / "summary.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def left(self) -> list[str]:
        """Command lines of processes that have outlived the run, of either machine; empty if all is well."""
        return [line for machine in self.machines for line in machine.left()]

    def errors(self, machine: int) -> list[str]:
        """The error lines that a machine has printed."""
        lines = self.outputs[machine].read_text("utf-8", "replace").splitlines()
        return [line for line in lines if line.startswith("error: ")]
