"""What a reader sees of a run while it goes on: the ranks' lines as they come, and a bar that moves every step."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.ranks.failures import HERE, LIBRARY_LOG

NOTES_BYTES = 2**13  # of the file behind EP_STEPS: for 959 ranks
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch's, on the lines of an uncaught exception


def kernel() -> Any:
    """The IPython shell this runs in, or None."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module else None


def is_live_notebook() -> bool:
    """Whether a person looks at this kernel: a front end that could answer a question, unlike papermill."""
    try:
        return bool(kernel().get_parent()["content"]["allow_stdin"])
    except (AttributeError, KeyError, TypeError):
        return False


def read_notes(path: Path) -> tuple[str, int, list[int]]:
    """(a warning or "", the number of steps, how many each rank has done), of the file behind EP_STEPS (launcher.py,
    StepNotes)."""
    notes = path.read_bytes()
    num_steps, *done = memoryview(notes[512:]).cast("q")
    return notes[:512].rstrip(b"\0").decode(errors="replace"), num_steps, done


def attempt_of(path: Path) -> int:
    """The attempt whose output it is, of a file .../attempt_N/RANK/stderr.log."""
    return int(path.parents[1].name.removeprefix("attempt_"))


class RankOutput:
    """Follows the files into which torchrun sends every rank's output; keeps them; shows what a reader needs.

    command: says what stands above the first line. A run that is refused shows nothing.
    Of the attempt that runs: errors, {rank: its lines on stderr}; error, the rank and text of the first "error: ...".
    """

    def __init__(self, folder: Path, quiet: bool, command: Callable[[], str]) -> None:
        folder.mkdir()
        self.folder, self.quiet, self.command = folder, quiet, command
        # On a terminal, or among a live notebook's own lines, where two streams would not mix.
        file = sys.stderr if kernel() is None else sys.stdout
        is_shown = is_live_notebook() if kernel() else file is not None and file.isatty()
        look = {"unit": "step", "leave": False, "ascii": False, "dynamic_ncols": True}
        self.bar = tqdm(file=file, disable=quiet or not is_shown, **look)
        self.done: dict[Path, int] = {}  # file -> how far it has been read
        self.seen: set[str] = set()
        self.begin_attempt(0)

    def begin_attempt(self, number: int) -> None:
        """What went wrong before is the failure no more."""
        self.attempt, self.error, self.errors = number, (None, ""), defaultdict(list)
        self.in_report: set[int] = set()  # ranks that print a traceback: held back for the failure's message

    def poll(self, *, is_last: bool = False) -> None:
        """Reads what is new, and shows it; at the end also a line that no newline closes."""
        files = self.folder.glob("*/attempt_*/*/std*.log")
        for path in sorted(files, key=lambda path: (attempt_of(path), path)):
            if attempt_of(path) > self.attempt:  # the ranks of the one before have ended
                why = self.error[1] or "a rank has ended"
                self.show(f"restart {attempt_of(path)}, after this: {why}", sys.stderr)
                self.begin_attempt(attempt_of(path))
            with path.open("rb") as file:
                file.seek(self.done.setdefault(path, 0))
                new = file.read()
            if new := new if is_last else new[: new.rfind(b"\n") + 1]:
                self.done[path] += len(new)
                for line in new.decode("utf-8", "replace").removesuffix("\n").split("\n"):
                    self.take(path, RANK_PREFIX.sub("", line.rstrip("\r")))

    def take(self, path: Path, line: str) -> None:
        """A line of a rank's file."""
        rank = int(path.parent.name)
        if path.stem == "stdout":
            self.show(line if rank == 0 else f"rank {rank}: {line}", sys.stdout)
            return
        self.errors[rank].append(line)
        if line.startswith("error: ") and not self.error[1]:
            self.error = rank, line.removeprefix("error: ")
        if line.startswith(
            ("error: ", "Traceback (most recent call last)", "Stack (most recent call first)")
        ):
            self.in_report.add(rank)
        is_shown = line.strip() and line not in self.seen and not LIBRARY_LOG.match(line)
        self.seen.add(line)  # what every rank says is shown once
        if is_shown and rank not in self.in_report:
            self.show(line.replace(*HERE), sys.stderr)

    def show(self, line: str, stream: Any) -> None:
        """Above the bar."""
        if self.quiet:
            return
        if self.command:
            tqdm.write(self.command(), file=sys.stdout)
            self.command = None
        tqdm.write(line, file=stream)
        stream.flush()

    def keep(self, log_dir: Path) -> Path:
        """Copies all output to a new folder, ranks of log_dir, or a temporary one where nothing can be written there:
        rank0.out, rank0-restart1.err, torchrun.log; no empty files."""
        whole, names = self.folder / "whole", {self.folder / "torchrun.log": "torchrun.log"}
        for path in self.done:
            again = f"-restart{attempt_of(path)}" if attempt_of(path) else ""
            names[path] = f"rank{path.parent.name}{again}.{path.stem[3:]}"
        whole.mkdir()
        for path, name in names.items():
            if path.stat().st_size:
                path.rename(whole / name)
        try:
            return shutil.copytree(whole, new_folder(log_dir / "ranks"), dirs_exist_ok=True)
        except OSError:
            return shutil.copytree(whole, Path(tempfile.mkdtemp(prefix="ep-ranks-")), dirs_exist_ok=True)


def new_folder(path: Path) -> Path:
    """Makes a folder that was not there: path, or path-2, path-3, ..."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = path.with_name(f"{path.name}-{number}") if number > 1 else path
            folder.mkdir(parents=True)
            return folder
