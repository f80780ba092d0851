"""What a reader sees of a run while it goes on: the ranks' lines as they come, and a bar that moves every step."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tools.ranks.failures import HERE, LIBRARY_LOG

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


class Bar:
    """Progress over the steps: on a terminal, or as an output of its own in a live notebook. Leaves nothing."""

    def __init__(self, total: int | None, quiet: bool) -> None:
        self.total, self.start, self.shown = total, 0.0, 0.0
        self.terminal = self.handle = None
        is_wanted = bool(total) and not quiet
        self.on_terminal = is_wanted and kernel() is None and sys.stderr is not None and sys.stderr.isatty()
        self.in_notebook = is_wanted and is_live_notebook()

    def reach(self, step: int) -> None:
        """So many steps are done. The first call shows the bar: the time that processes take to start is no step's."""
        if not self.start:
            self.start = time.monotonic()
            if self.on_terminal:
                from tqdm import tqdm

                self.terminal = tqdm(total=self.total, unit="step", leave=False, dynamic_ncols=True)
            elif self.in_notebook:
                from IPython.display import display

                self.handle = display({"text/plain": ""}, raw=True, display_id=True)
        if self.terminal is not None:
            self.terminal.update(step - self.terminal.n)
        elif self.handle is not None and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            full, seconds = round(30 * step / self.total), self.shown - self.start
            text = f"|{'█' * full}{' ' * (30 - full)}| {step}/{self.total} steps, {seconds:.0f} s"
            self.handle.update({"text/plain": text}, raw=True)

    def print(self, line: str, stream: Any) -> None:
        """A line of output, above the bar."""
        write = print if self.terminal is None else self.terminal.write
        write(line, file=stream)
        with contextlib.suppress(AttributeError, ValueError):
            stream.flush()

    def close(self) -> None:
        if self.terminal is not None:
            self.terminal.close()
        if self.handle is not None:
            self.handle.update({"text/plain": ""}, raw=True)


def attempt_of(path: Path) -> int:
    """The attempt whose output it is, of a file .../attempt_N/RANK/stderr.log."""
    return int(path.parents[1].name.removeprefix("attempt_"))


class RankOutput:
    """Follows the files into which torchrun sends every rank's output; keeps them; shows what a reader needs."""

    def __init__(self, folder: Path, bar: Bar, quiet: bool) -> None:
        self.folder, self.bar, self.quiet = folder, bar, quiet
        # file -> (open, so that it can be read when its folder is gone; the line that has not ended yet)
        self.files: dict[Path, tuple[Any, bytes]] = {}
        self.errors: dict[
            int, list[str]
        ] = {}  # rank -> its lines on stderr; the first to report an error stands first
        self.has_error = False
        self.in_report: set[int] = set()  # ranks that print a traceback: held back for the failure's message
        self.seen: set[str] = set()
        self.attempt = 0  # torchrun's count of restarts

    def poll(self, *, is_last: bool = False) -> None:
        """Reads what is new, and shows it; at the end also a line that no newline closes."""
        self.read(is_last)  # the ranks of an attempt have ended before the next one starts
        for path in sorted(self.folder.glob("*/attempt_*/*/std*.log")):
            if path not in self.files:
                if attempt_of(path) > self.attempt:
                    self.begin_attempt(attempt_of(path))
                with contextlib.suppress(OSError):
                    self.files[path] = open(path, "rb"), b""
        self.read(is_last)

    def begin_attempt(self, number: int) -> None:
        """What went wrong before is told in a line, and is the failure no more."""
        said = [line for lines in self.errors.values() for line in lines if line.startswith("error: ")]
        why = said[0].removeprefix("error: ") if said else "a rank has ended"
        if not self.quiet:
            self.bar.print(f"restart {number}, after this: {why}", sys.stderr)
        self.attempt, self.errors, self.has_error, self.in_report = number, {}, False, set()

    def read(self, is_last: bool) -> None:
        for path, (file, rest) in sorted(self.files.items()):
            *lines, rest = (rest + file.read()).split(b"\n")
            if is_last and rest:
                lines, rest = [*lines, rest], b""
            self.files[path] = file, rest
            for line in lines:
                text = RANK_PREFIX.sub("", line.decode("utf-8", "replace").rstrip("\r"))
                take = self.take_stdout if path.stem == "stdout" else self.take_stderr
                take(int(path.parent.name), text)

    def take_stdout(self, rank: int, line: str) -> None:
        if not self.quiet:
            self.bar.print(line if rank == 0 else f"rank {rank}: {line}", sys.stdout)

    def take_stderr(self, rank: int, line: str) -> None:
        if line.startswith("error: ") and not self.has_error:
            self.has_error, self.errors = True, {rank: self.errors.get(rank, [])} | self.errors
        self.errors.setdefault(rank, []).append(line)
        if line.startswith(("error: ", "Traceback (most recent call last)")):
            self.in_report.add(rank)
        is_shown = line.strip() and line not in self.seen and not LIBRARY_LOG.match(line)
        self.seen.add(line)  # what every rank says is shown once
        if is_shown and rank not in self.in_report and not self.quiet:
            self.bar.print(line.replace(*HERE), sys.stderr)

    def settle(self) -> None:
        """Puts each rank's files where a person finds them: rank0.out, rank0-restart1.err; empty ones go."""
        for path, (file, _) in self.files.items():
            file.close()
            with contextlib.suppress(OSError):
                if path.stat().st_size:
                    again = f"-restart{attempt_of(path)}" if attempt_of(path) else ""
                    path.replace(self.folder.parent / f"rank{path.parent.name}{again}.{path.stem[3:]}")
        shutil.rmtree(self.folder, ignore_errors=True)
