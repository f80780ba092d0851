"""What a reader is told of a run that failed: which rank, which cell, what to do; at most 15 lines, the culprit first.

Which rank failed first, and how it ended, is known to torch.distributed.elastic (ChildFailedError), and agent.py
brings its record. What the rank had to say stands in its own output.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.stitch.reading import ROOT
from tools.stitch.trace import cell_of

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
    """An error that a notebook shows as its message alone: `lines`, without a traceback; paths as seen from the
    repository's root."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = [line.replace(*HERE) for line in lines][:MOST_LINES]
        super().__init__("\n".join(self.lines))

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for an exception's own look."""
        return [f"{type(self).__name__}: {self.lines[0]}", *self.lines[1:]]


class LaunchError(OneMessage, RuntimeError):
    """A run that could not start, or failed. rank: the one to blame, None where it is not known.

    lines: at most 15, one for a refusal, else the last says where the whole output is; returncode: for a shell, 2 for a
    refusal.
    """

    def __init__(self, *lines: str, rank: int | None = None) -> None:
        super().__init__(lines)
        self.rank, self.returncode = rank, 2 if len(lines) == 1 else 1


class Interrupted(OneMessage, KeyboardInterrupt):
    """A run or a cell that was interrupted, after every process of it has ended."""


def clean_message(text: str) -> str:
    """An error's text on one line, without source paths of the library, addresses and ports."""
    text = re.sub(r"\[[^\[\]\s]*\.(?:cc|cpp|h|hpp|cu):\d+\] ?", "", " ".join(text.split()))
    text = re.sub(r"\[[0-9a-fA-F:.]*\]:\d+|\b\d+\.\d+\.\d+\.\d+:\d+", "another rank", text)
    return text if len(text) <= 400 else text[:400] + " ..."


def how_ended(code: int) -> str:
    """Of a process's exit code, or minus the signal that ended it: "ended by SIGKILL"."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"
    return f"exited with code {code}"


def last_lines(lines: Sequence[str], count: int = 8) -> list[str]:
    """The last lines without the empty ones and the libraries' logs."""
    return [f"  {line}" for line in lines if line.strip() and not LIBRARY_LOG.match(line)][-count:]


def read_report(path: Path) -> dict[str, Any]:
    """What agent.py knows of a run: {"nproc": "auto" where it is not known, "ranks": [[rank, exit code, None where it
    was not the first to end]], "error": of torchrun itself}."""
    if not path.exists() or not (text := path.read_text()):  # nothing: a full disk
        return {"nproc": "auto", "ranks": [], "error": "it was killed"}
    return json.loads(text)


def frames_of_traceback(lines: list[str]) -> list[tuple[str, str]]:
    """The frames of a rank's traceback that come from cells, and from a plugin (stitch/trace.py marks both):
    [(place, what a reader sees)], "notebooks/x.ipynb #id:12, in f: code" or "mine.py, line 12, in f: code"."""
    frame = re.compile(r'^\s*File ".+", line \d+, in (\S+) \((\S+ #[A-Za-z0-9_-]+:\d+|.+, line \d+)\)$')
    pairs = zip(map(frame.match, lines), [*lines[1:], ""], strict=True)
    return [(match[2], f"  {match[2]}, in {match[1]}: {code.strip()}") for match, code in pairs if match]


def last_stack(lines: list[str]) -> list[tuple[str, int, str]]:
    """Where a rank was when it was ended (agent.py), of what it wrote to stderr: (file, line, function) of each frame,
    the innermost first."""
    last = "\n".join(lines).rpartition("Stack (most recent call first):\n")[2].splitlines()
    found = [re.match(r'  File "(.+)", line (\d+) in (\S+)', line) for line in last]
    return [(match[1], int(match[2]), match[3]) for match in found if match]


def describe_failure(
    report: dict[str, Any], error: tuple[int | None, str], errors: dict[int, list[str]]
) -> tuple[int | None, list[str]]:
    """(rank to blame, message). A message of one line is a refusal, which needs no log.

    report: see read_report; error: the rank that said "error: ..." first, and what; errors: each rank's stderr.
    """
    failures = [(rank, code) for rank, code in report["ranks"] if code]
    rank, code = min(failures, key=lambda failure: failure[1] > 0, default=(None, 0))  # the killed first
    speaker, said = error
    if code < 0 or (code == 130 and not said):  # 130: what the launcher makes of a SIGTERM
        how = how_ended(min(code, 0) or -signal.SIGTERM)
        then, to_do = [f"  then {said}"] * bool(said), TO_DO.get(how.split()[-1], "look at its log")
        return rank, [f"rank {rank} was {how}; the other ranks were stopped", *then, f"to do: {to_do}"]
    if said:
        named = re.match(r"rank (\d+)\b", said)
        blamed = int(named[1]) if named else speaker
        stack = last_stack(errors.get(blamed, [])) if named else []
        if frames := frames_of_traceback(errors[speaker]):
            details = [text for _, text in frames[-8:]]
            places = [place for place, _ in frames]
            place = ([yours for yours in places if ", line " in yours] or places)[-1]
            to_do = f"look at {place} first; mend it (a cell: save, `make launcher`), and launch again"
        elif stack:
            shown = stack[:1] + [frame for frame in stack[1:] if "-packages" not in frame[0]][:3]
            details = [f"rank {blamed} was here, the innermost line first:"]
            details += [f"  {cell_of(file, n) or f'{file}, line {n}'}, in {name}" for file, n, name in shown]
            to_do = f"see why rank {blamed} does not go on from there; rank{blamed}.err has its whole stack"
        elif code == 2 or not (failures or re.search(r"\brank \d", said)):
            return blamed, [said]
        else:
            details, to_do = [], "see what the ranks said last, in rank*.err and rank*.out there"
        return blamed, [said, *details, f"to do: {to_do}"]
    if failures:
        to_do = "to do: see what ends a process without an error: sys.exit, a library's abort"
        return rank, [f"rank {rank} {how_ended(code)}", *last_lines(errors.get(rank, [])), to_do]
    return None, ["torchrun failed", f"  {report['error']}"]
