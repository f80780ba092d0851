"""A run of the launcher that somebody breaks: torchrun with restarts, signals from outside, faults from inside.

    from tools.faults import BrokenRun
    with BrokenRun("build/runs/mine", nproc=2, steps=200, checkpoint_interval=20) as run:
        run.wait_for_step(50)
        run.send(1, signal.SIGKILL)
        summary = run.finish()

Nothing is left of it where the block ends, however it ends. `attempts` reads from the run's TensorBoard files which
steps ran when.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tools.launch import LAUNCHER, flag_arguments, torchrun_flags
from tools.ranks.failures import last_lines
from tools.ranks.output import NOTES_BYTES, read_notes
from tools.ranks.processes import Agent

PLUGIN = Path(__file__).with_name("faulty.py")


class BrokenRun(Agent):
    """A run of nproc ranks in a new folder: checkpoints/ (unless the flags name another place), log/, output.

    flags: the launcher's; faults: (what, rank, step, attempt), from inside (tools/faulty.py).
    """

    def __init__(
        self,
        folder: str | Path,
        nproc: int = 2,
        max_restarts: int = 20,
        faults: Sequence[tuple] = (),
        **flags: Any,
    ) -> None:
        self.folder = Path(folder).resolve()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.checkpoints, self.steps = self.folder / "checkpoints", self.folder / "steps"
        self.steps.write_bytes(bytes(NOTES_BYTES))
        places = {"checkpoint_dir": self.checkpoints, "log_dir": self.folder / "log", "device": "cpu"}
        usual = places | {"summary": self.folder / "summary.json"}
        inside = {"plugin": PLUGIN, "step": "faulty"} if faults else {}
        program = [LAUNCHER, *flag_arguments(usual | inside | flags)]
        words = [self.folder / "report.json", *torchrun_flags(nproc, max_restarts=max_restarts), *program]
        environment = {"EP_STEPS": self.steps, "EP_FAULTS": json.dumps(faults)}
        with (self.folder / "output").open("wb") as output:
            super().__init__(*words, environment=environment, stdout=output)

    @property
    def step(self) -> int:
        """Steps that the present attempt, or the one before, has done."""
        return read_notes(self.steps)[2][0]

    def wait(self, found: Callable[[], Any], what: str, limit_s: float) -> Any:
        """Until found() is true -> what it found. RuntimeError where the run ends before, or is late."""
        deadline = time.monotonic() + limit_s
        while True:
            is_over = self.returncode is not None or time.monotonic() > deadline
            if came := found():
                return came
            if is_over:
                raise RuntimeError(f"{what} did not come, after {self.step} steps:\n{self.last_lines()}")
            self.note()
            time.sleep(0.005)

    def wait_for_step(self, step: int, limit_s: float = 120) -> int:
        """Until so many steps are done -> how many really are. RuntimeError where the run ends before, or is late."""
        self.wait(lambda: self.step >= step, f"step {step}", limit_s)
        return self.step

    def rank(self, rank: int) -> psutil.Process:
        """The process of this rank, in the attempt that runs."""

        def found() -> list[psutil.Process]:
            self.note(every_s=0)
            return [member for member in self.alive() if member.name() == f"rank {rank}"]  # agent.py

        return self.wait(found, f"rank {rank}", 60)[0]

    def send(self, rank: int, number: int) -> float:
        """Sends a signal to a rank -> when, in time.time()."""
        self.rank(rank).send_signal(number)
        return time.time()

    def finish(self, limit_s: float = 300) -> dict[str, Any]:
        """Waits for the end -> the summary; {} where there is none. RuntimeError where it does not end in time."""
        self.wait(lambda: self.returncode is not None, "the end", limit_s)
        path = self.folder / "summary.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def log(self) -> list[str]:
        """The lines of train.log, of all attempts."""
        path = self.folder / "log" / "train.log"
        return path.read_text("utf-8").splitlines() if path.exists() else []

    def last_lines(self) -> str:
        """What the ranks said last, without the libraries' logs."""
        return "\n".join(last_lines((self.folder / "output").read_text("utf-8", "replace").splitlines(), 12))


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run. steps: (when, number) of those that it logged; saves: (when, steps done, seconds).

    Times are time.time()'s.
    """

    steps: list[tuple[float, int]]
    saves: list[tuple[float, int, float]]


def attempts(log_dir: str | Path) -> list[Attempt]:
    """A run's attempts in their order, from the TensorBoard file that each has left. Needs --log-interval 1."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for path in Path(log_dir).glob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        seen = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
        steps = [(e.wall_time, e.step) for e in seen.get("loss/task", ())]
        if steps:
            saves = [(e.wall_time, e.step, e.value) for e in seen.get("checkpoint/seconds", ())]
            found.append(Attempt(steps, saves))
    return sorted(found, key=lambda attempt: attempt.steps[0])


def recoveries(found: list[Attempt]) -> list[dict[str, float]]:
    """For each attempt but the first: {"lost_steps": done again, "down_s": from the last step before to the first one
    after, "back_s": until the run is further than it was}."""
    told, furthest = [], -1
    for before, after in zip(found, found[1:], strict=False):
        furthest, (last, _) = max(furthest, before.steps[-1][1]), before.steps[-1]
        beyond = [when for when, step in after.steps if step > furthest]
        told.append({
            "lost_steps": furthest + 1 - after.steps[0][1], "down_s": after.steps[0][0] - last,
            "back_s": beyond[0] - last if beyond else float("nan"),
        })  # fmt: skip
    return told
