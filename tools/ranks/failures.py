"""What a reader is told of a run that failed: which rank, which cell, what to do; at most 15 lines, the culprit first.

Which rank failed first, and how it ended, is known to torch.distributed.elastic (ChildFailedError), and agent.py
brings its record. What the rank had to say stands in its own output.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.ranks.processes import ROOT

MOST_LINES = 15
LIBRARY_LOG = re.compile(r"^\[[WIEF]\d{3,4} |^[WIEF]\d{4} |^\[Gloo\]")
HERE = (str(ROOT) + os.sep, "")  # for str.replace: no path of this machine in an output
CELL_FILE = "%%ranks cell"  # the file name in tracebacks of a cell's body
TO_DO = {
    "SIGKILL": "look at `dmesg`: if the memory ran out, take fewer tokens or ranks; else somebody ended it",
    "SIGSEGV": "a fault in native code: run it again with PYTHONFAULTHANDLER=1 to see where",
    "SIGTERM": "somebody ended it; start the run again",
}


class OneMessage(BaseException):
    """An error that a notebook shows as its message alone: `lines`, without a traceback."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)[:MOST_LINES]
        super().__init__("\n".join(self.lines))

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for an exception's own look."""
        return [f"{type(self).__name__}: {self.lines[0]}", *self.lines[1:]]


class LaunchError(OneMessage, RuntimeError):
    """A run that could not start, or failed. rank: the one to blame, None where it is not known.

    lines: at most 15; log_dir: where the ranks' whole output is, or None; returncode: for a shell.
    """

    def __init__(
        self, *lines: str, rank: int | None = None, log_dir: Path | None = None, returncode: int = 1
    ) -> None:
        super().__init__(lines)
        self.rank, self.log_dir, self.returncode = rank, log_dir, returncode


class Interrupted(OneMessage, KeyboardInterrupt):
    """A run or a cell that was interrupted, after every process of it has ended."""


def without_root(path: Path) -> str:
    """A path as seen from the repository's root; absolute where it lies outside."""
    return str(path).replace(*HERE)


def clean_message(text: str) -> str:
    """An error's text on one line, without source paths of the library, addresses and ports."""
    text = re.sub(r"\[[^\[\]\s]*\.(?:cc|cpp|h|hpp|cu):\d+\] ?", "", " ".join(text.split()))
    text = re.sub(r"\[[0-9a-fA-F:.]*\]:\d+|\b\d+\.\d+\.\d+\.\d+:\d+", "another rank", text)
    return text if len(text) <= 400 else text[:400] + " ..."


def signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def frames_of_traceback(lines: list[str]) -> list[tuple[str, str]]:
    """The frames of a rank's traceback that come from cells, and from a plugin (stitch/trace.py marks both):
    [(place, what a reader sees)], "notebooks/x.ipynb #id:12, in f: code" or "mine.py, line 12, in f: code"."""
    frame = re.compile(r'^\s*File ".+", line \d+, in (\S+) \((\S+ #[A-Za-z0-9_-]+:\d+|.+, line \d+)\)$')
    pairs = zip(map(frame.match, lines), [*lines[1:], ""], strict=True)
    return [(match[2], f"  {match[2]}, in {match[1]}: {code.strip()}") for match, code in pairs if match]


def to_mend(places: list[str]) -> str:
    """What to do about a traceback through these places, the innermost last. Code of yours is looked at first."""
    yours = [place for place in places if not re.search(r" #[A-Za-z0-9_-]+:\d+$", place)]
    if not yours:
        return "to do: mend the last of these cells, save, `make launcher`, and launch again"
    if yours[-1] == places[-1]:
        return f"to do: mend {yours[-1]}, and launch again"
    return f"to do: look at {yours[-1]}, first, from where the cells below it were called; then launch again"


def last_stack(lines: list[str]) -> list[str]:
    """Where a rank was when it was ended (agent.py), of what it wrote to stderr; the innermost frame first."""
    starts = [number for number, line in enumerate(lines, 1) if line == "Stack (most recent call first):"]
    return lines[starts[-1] :] if starts else []


def stack_of(lines: list[str]) -> list[str]:
    """Of a rank's last stack the innermost frame, and up to 3 outer ones that are no installed library's."""
    from tools.extract import cell_of

    found = [re.match(r'  File "(.+)", line (\d+) in (\S+)', line) for line in last_stack(lines)]
    frames = [(match[1], int(match[2]), match[3]) for match in found if match]
    frames = frames[:1] + [frame for frame in frames[1:] if "-packages" not in frame[0]][:3]
    return [
        f"  {cell_of(file, number) or f'{file}, line {number}'.replace(*HERE)}, in {function}"
        for file, number, function in frames
    ]


def describe_failure(report: dict[str, Any], errors: dict[int, list[str]]) -> tuple[int | None, list[str]]:
    """(rank to blame, message). A message of one line is a refusal, which needs no log.

    report: of agent.py: {"ranks": [{"rank", "exitcode": None where it was not the first to end, "is_stopped"}],
    "error": of torchrun itself}. errors: what each rank wrote to stderr, the one that said "error: ..." first before
    all others.
    """
    stopped = [one["rank"] for one in report["ranks"] if one["is_stopped"]]
    failures = [(one["rank"], one["exitcode"]) for one in report["ranks"] if one["exitcode"]]
    killed = [(rank, code) for rank, code in failures if code < 0]
    rank, code = [*killed, *failures, (None, 0)][0]
    speaker, said = next(
        ((r, line) for r, lines in errors.items() for line in lines if line.startswith("error: ")), (None, "")
    )
    said = said.removeprefix("error: ")
    then = [f"  then {said}"] if said else []
    if stopped:
        line = f"rank {stopped[0]} was stopped by SIGSTOP, and the others waited for it"
        return stopped[0], [line, *then, "to do: find out who stopped it; `kill -CONT` lets a rank go on"]
    if killed or (code == 130 and not said):  # 130: what the launcher makes of a SIGTERM
        name = signal_name(-code) if code < 0 else "SIGTERM"
        line = f"rank {rank} was ended by {name}; the other ranks were stopped"
        return rank, [line, *then, f"to do: {TO_DO.get(name, 'look at its log')}"]
    if said:
        named, lines = re.match(r"rank (\d+)\b", said), errors[speaker]
        blamed = int(named[1]) if named else speaker
        if "Traceback (most recent call last):" in lines:
            found = frames_of_traceback(lines)
            frames = [text for _, text in found] or [f"  {text}" for text in lines[:-1]]
            to_do = (
                to_mend([place for place, _ in found]) if found else "to do: mend what the last lines name"
            )
            return blamed, [said, *frames[-8:], to_do]
        if stack := named and stack_of(errors.get(blamed, [])):
            to_do = f"to do: see why rank {blamed} does not go on from there; rank{blamed}.err has its whole stack"
            return blamed, [said, f"rank {blamed} was here, the innermost line first:", *stack, to_do]
        is_refused = code == 2 or not (failures or re.search(r"\brank \d", said))
        to_do = ["to do: see what the ranks said last, in rank*.err and rank*.out there"]
        return blamed, [said, *to_do * (not is_refused)]
    if failures:
        last = [f"  {text}" for text in errors.get(rank, []) if not LIBRARY_LOG.match(text)][-8:]
        to_do = "to do: see what ends a process without an error: sys.exit, a library's abort"
        return rank, [f"rank {rank} ended with exit code {code}", *last, to_do]
    return None, ["torchrun failed", f"  {report['error']}"]
