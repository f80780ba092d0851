"""Execute the notebooks without a browser.

    python tools/notebooks.py [NB...] [-p NAME VALUE]     execute by papermill, copies into build/notebooks/
    python tools/notebooks.py --in-place [NB...]          refresh the outputs that are committed, cleaned

Without NB: all of notebooks/. Exit code 0: all ran. 1: a cell failed, or the time was over; named on stderr with
the notebook and the cell's id. 2: refused before anything started. 130: interrupted. No kernel, torchrun or rank
outlives this program.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from tools.extract import Refused, book_notebooks, read_notebook  # noqa: E402
from tools.ranks.failures import shown_path  # noqa: E402
from tools.ranks.processes import Family, end_with_parent, interrupt  # noqa: E402

DEFAULT_TIMEOUT_S = 300.0
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
IMAGE_BYTES = re.compile(
    r"data:image/[\w+]+;base64,[\w+/=\\\s]+"
)  # a player's frames: any letters may stand in them
MOST_MESSAGE_LINES = 15


class Stopped(Exception):
    """A notebook that did not run through. lines: for stderr; code: the exit code."""

    def __init__(self, lines: Sequence[str], code: int) -> None:
        self.lines, self.code = list(lines), code
        super().__init__("\n".join(self.lines))


def refuse(what: str) -> Stopped:
    return Stopped([f"error: {what}"], 2)


# ----------------------------------------------------------------------------------------------------------
# Before anything starts
# ----------------------------------------------------------------------------------------------------------


def read_value(text: str) -> Any:
    """`-p`'s value: a Python literal, true, false or null, else the text itself."""
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def parameter_names(path: Path) -> list[str]:
    """The names that a notebook's cells tagged `parameters` assign. Stopped where it is no notebook."""
    try:
        notebook = read_notebook(path, shown_path(path))
    except Refused as refused:
        raise refuse(refused.lines[0]) from None
    names = []
    for cell in notebook.cells:
        if "parameters" in cell.tags:
            with contextlib.suppress(SyntaxError, ValueError):
                for node in ast.parse(cell.text).body:
                    targets = (
                        node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                    )
                    names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def check_parameters(paths: Sequence[Path], parameters: dict[str, Any]) -> None:
    """Stopped, with one line, where a notebook lacks a parameter: papermill would only warn."""
    for path in paths:
        known = parameter_names(path)
        unknown = [name for name in parameters if name not in known]
        if unknown:
            listed = f"it has {', '.join(known)}" if known else "it has none"
            raise refuse(f"{shown_path(path)} has no parameter {', '.join(unknown)}; {listed}")


def choose_notebooks(given: Sequence[str]) -> list[Path]:
    """The notebooks to run. Stopped where one does not exist, or two would share a copy."""
    paths = [Path(name).resolve() for name in given] or book_notebooks(ROOT)
    if not paths:
        raise refuse("notebooks/ holds no notebook; name one")
    for path in paths:
        if not path.is_file() or path.suffix != ".ipynb":
            raise refuse(f"{shown_path(path)} is not a notebook; check the path")
    twice = [path.name for path in paths if [other.name for other in paths].count(path.name) > 1]
    if twice:
        raise refuse(f"{twice[0]} is given twice, and copies go by name; run one at a time")
    return paths


# ----------------------------------------------------------------------------------------------------------
# Running one notebook
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One notebook to execute: where it is, where its copy goes, the kernel's folder, its parameters."""

    path: Path
    copy: Path
    cwd: Path
    parameters: dict[str, Any]
    timeout_s: float

    @property
    def name(self) -> str:
        return shown_path(self.path)


def execute_here(source: str, copy: str, cwd: str, parameters: str, parent: str) -> None:
    """In the child process: papermill over one notebook. Prints `done/all` as cells end. Ends with its parent."""
    threading.Thread(target=end_with_parent, args=(int(parent),), daemon=True).start()
    import papermill

    bar = {"file": sys.stdout, "bar_format": "{n_fmt}/{total_fmt}", "mininterval": 0, "miniters": 1}
    with contextlib.suppress(
        papermill.exceptions.PapermillExecutionError
    ):  # the parent reads it from the copy
        papermill.execute_notebook(
            source,
            copy,
            json.loads(parameters),
            cwd=cwd,
            progress_bar=bar,
            kernel_name="python3",
            language="python",
        )


def load_json(path: Path) -> dict[str, Any]:
    """A notebook as stored; {} where there is none, or one half written."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def tags_of(cell: dict[str, Any]) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def failed_cell(notebook: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(id, error output) of the first cell that failed and is not tagged raises-exception."""
    for cell in notebook.get("cells", []):
        errors = [output for output in cell.get("outputs", []) if output["output_type"] == "error"]
        has_failed = errors or cell.get("metadata", {}).get("papermill", {}).get("exception") is True
        if has_failed and "raises-exception" not in tags_of(cell):
            return cell.get("id", "?"), errors[0] if errors else {}
    return None


def failure_lines(job: Job, cell_id: str, error: dict[str, Any]) -> list[str]:
    """What a failed cell says: its own message, and the line of the cell where it is not in the message."""
    name = error.get("ename", "the kernel died")
    said = ANSI.sub("", error.get("evalue", "")).replace(str(ROOT) + os.sep, "").splitlines() or [""]
    first = said[0] if said[0].startswith("error: ") else f"{name}: {said[0]}".rstrip(": ")
    lines = [f"error: {job.name} #{cell_id}: {first.removeprefix('error: ')}"]
    lines += [f"  {line.strip()}" for line in said[1 : MOST_MESSAGE_LINES - 2]]
    trace = ANSI.sub("", "\n".join(error.get("traceback", [])))
    at = re.search(r"^-+> +(\d+) (.*)$", trace, re.MULTILINE)
    if at:
        lines.append(f"  line {at[1]} of the cell: {at[2].strip()}")
    return [*lines, f"  executed copy: {shown_path(job.copy)}"]


def running_cell(notebook: dict[str, Any]) -> str:
    """The id of the cell that papermill started last."""
    for cell in notebook.get("cells", []):
        if cell.get("metadata", {}).get("papermill", {}).get("status") == "running":
            return f" #{cell.get('id', '?')}"
    return ""


def execute(job: Job, advance: Callable[[int, int], None]) -> dict[str, Any]:
    """Executes one notebook in a child process -> the executed notebook, as JSON.

    advance: called with (cells done, cells). Stopped where a cell fails or the time is over; then, and on any
    interrupt, the child, the kernel and everything that the kernel started is ended.
    """
    job.copy.parent.mkdir(parents=True, exist_ok=True)
    job.copy.unlink(missing_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="ep-notebook-"))
    environment = os.environ | {"IPYTHONDIR": str(scratch), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    environment.setdefault("PYTHONHASHSEED", "0")  # the same outputs from every run
    environment.setdefault("OMP_NUM_THREADS", "1")  # the ranks that cells start share the cores
    command = [
        sys.executable, str(Path(__file__).resolve()), "--execute-here", str(job.path), str(job.copy), str(job.cwd),
        json.dumps(job.parameters), str(os.getpid()),
    ]  # fmt: skip
    out, log = scratch / "progress", scratch / "log"
    with open(out, "wb") as progress, open(log, "wb") as errors:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=progress,
            stderr=errors,
            start_new_session=True,
        )
    family, deadline = Family(child), time.monotonic() + job.timeout_s
    try:
        while child.poll() is None:
            family.note()
            counts = re.findall(rb"(\d+)/(\d+)", out.read_bytes())
            if counts:
                advance(*map(int, counts[-1]))
            if time.monotonic() > deadline:
                where = running_cell(load_json(job.copy))
                family.end()
                message = f"error: {job.name}{where}: did not end within {job.timeout_s:g} s; it was ended"
                raise Stopped([message, f"  executed copy: {shown_path(job.copy)}"], 1)
            time.sleep(0.05)
        notebook = load_json(job.copy)
        failed = failed_cell(notebook)
        if failed:
            raise Stopped(failure_lines(job, *failed), 1)
        if child.returncode or not notebook:
            said = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
            raise Stopped(
                [f"error: {job.name}: papermill failed: {said[-1] if said else child.returncode}"], 1
            )
        return notebook
    finally:
        family.end(patience_s=0.5 if child.poll() is not None else 3.0)
        shutil.rmtree(scratch, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------
# Cleaning
# ----------------------------------------------------------------------------------------------------------


def as_terminal(text: str) -> str:
    """What a terminal would show of text with carriage returns and backspaces: a progress bar's last state."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.rstrip("\r").split("\r"):
            shown = part + shown[len(part) :]
        while "\b" in shown:
            shown = re.sub(r"[^\x08]\x08|^\x08+", "", shown, count=1)
        lines.append(shown.rstrip(" ") if "\r" in line else shown)
    return "\n".join(lines)


def clean_outputs(outputs: list[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    """Outputs fit to be committed: streams joined, nothing empty, the cell's number, the repo's paths relative."""
    kept: list[dict[str, Any]] = []
    for output in json.loads(json.dumps(outputs)):
        kind = output["output_type"]
        if kind == "stream":
            text = joined(output["text"])
            if kept and kept[-1]["output_type"] == "stream" and kept[-1]["name"] == output["name"]:
                kept[-1]["text"] += text
                continue
            output["text"] = text
        if (
            kind == "display_data"
            and not joined(output["data"].get("text/plain", "x"))
            and len(output["data"]) == 1
        ):
            continue  # where a progress bar was
        if kind == "execute_result":
            output["execution_count"] = count
        if kind == "error":  # Python's own traceback names files by their path
            output["traceback"] = [line.replace(str(ROOT) + os.sep, "") for line in output["traceback"]]
        kept.append(output)
    for output in kept:
        if output["output_type"] == "stream":
            output["text"] = as_terminal(output["text"]).splitlines(keepends=True)
    return [output for output in kept if output.get("text") != []]


def private_texts() -> dict[str, re.Pattern[str]]:
    """What must not be in a committed output: {its description: a pattern that finds it}."""
    home, host = str(Path.home()), socket.gethostname()
    paths = {
        "the repository's absolute path": str(ROOT),
        "the home folder": home,
        "the Python installation's path": sys.prefix,
        "the folder for temporary files": tempfile.gettempdir(),
    }
    found = {
        what: re.compile(rf"(?<![\w./~-]){re.escape(path)}(?![\w-])")
        for what, path in paths.items()
        if len(path) > 1
    }
    if host not in ("", "localhost"):
        found["the host's name"] = re.compile(rf"(?<![\w.-]){re.escape(host)}(?![\w-])")
    return found


def texts_of(output: dict[str, Any]) -> Iterator[str]:
    """Every text in an output; no image bytes."""
    yield joined(output.get("text", ""))
    yield "\n".join([output.get("evalue", ""), *output.get("traceback", [])])
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml":
            text = value if isinstance(value, str) else "".join(map(str, value))
            yield IMAGE_BYTES.sub("", text)


def check_private(name: str, cells: Sequence[dict[str, Any]]) -> None:
    """Stopped, naming the cell, where an output tells of this machine."""
    patterns = private_texts()
    for cell in cells:
        for text in (ANSI.sub("", text) for output in cell.get("outputs", []) for text in texts_of(output)):
            for what, pattern in patterns.items():
                if match := pattern.search(text):
                    message = f"{name} #{cell['id']}: its output holds {what} ({match[0]}); print something relative"
                    raise Stopped([f"error: {message}; the notebook is as it was"], 1)


def clean_notebook(original: dict[str, Any], executed: dict[str, Any]) -> dict[str, Any]:
    """The original with the outputs of its execution: ids, tags, sources stay; what execution adds goes."""
    results = {cell["id"]: cell for cell in executed["cells"]}
    metadata = {key: value for key, value in original.get("metadata", {}).items() if key != "papermill"}
    metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata["language_info"] = {"name": "python"}
    cells, count = [], 0
    for cell in original["cells"]:
        cell = dict(cell)
        extra = ("papermill", "execution", "ExecuteTime")
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key not in extra}
        cell["source"] = joined(cell["source"]).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            result = results[cell["id"]]
            has_run = result.get("execution_count") is not None
            count += has_run
            cell["execution_count"] = count if has_run else None
            cell["outputs"] = clean_outputs(result.get("outputs", []), cell["execution_count"])
        cells.append(cell)
    return original | {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def check_ids(path: Path) -> None:
    """Stopped where a cell has no id of its own: its outputs could not find their way back."""
    ids = [cell.get("id") for cell in load_json(path).get("cells", [])]
    if None in ids or len(set(ids)) < len(ids):
        raise refuse(f"{shown_path(path)} has a cell without an id of its own; give it one")


def write_in_place(path: Path, original: str, executed: dict[str, Any]) -> None:
    """Replaces the notebook as a whole. Stopped where it was changed meanwhile, or an output is private."""
    cleaned = clean_notebook(json.loads(original), executed)
    check_private(shown_path(path), cleaned["cells"])
    if path.read_text("utf-8") != original:
        raise Stopped([f"error: {shown_path(path)} was changed while it ran; run it again"], 1)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(cleaned, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
    shutil.copymode(path, aside)
    aside.replace(path)


# ----------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise refuse(f"{message}; see --help")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="notebooks.py", description="Execute the notebooks without a browser.")
    parser.add_argument(
        "notebooks", nargs="*", metavar="NB", help="notebooks to run (default: notebooks/*.ipynb)"
    )
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="sets a parameter of every notebook")  # fmt: skip
    parser.add_argument("--in-place", action="store_true", help="refresh the notebooks' own outputs, cleaned")
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, metavar="SECONDS",
                        help=f"for each notebook (default: {DEFAULT_TIMEOUT_S:g})")  # fmt: skip
    parser.add_argument("--cwd", choices=("notebooks", "root"),
                        help="the folder that kernels start in (default: the notebook's own)")  # fmt: skip
    parser.add_argument("--output-dir", metavar="DIR", help="where copies go (default: build/notebooks)")
    return parser.parse_intermixed_args(argv)


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """What to run. Stopped where the command asks for something that cannot be."""
    if not options.timeout > 0:
        raise refuse(f"--timeout is {options.timeout:g}, and must be positive")
    parameters = {name: read_value(value) for name, value in options.parameter}
    if options.in_place and parameters:
        raise refuse("--in-place refreshes what the notebooks' own parameters give; leave -p out")
    paths = choose_notebooks(options.notebooks)
    check_parameters(paths, parameters)
    if options.in_place:
        for path in paths:
            check_ids(path)
    folder = Path(options.output_dir).resolve() if options.output_dir else ROOT / "build" / "notebooks"
    if any(path.parent == folder for path in paths):
        raise refuse(f"--output-dir {shown_path(folder)} holds the notebooks themselves; take another folder")
    starts = {"notebooks": ROOT / "notebooks", "root": ROOT}
    return [
        Job(path, folder / path.name, starts.get(options.cwd, path.parent), parameters, options.timeout)
        for path in paths
    ]


def run_jobs(jobs: Sequence[Job], in_place: bool) -> None:
    """Executes one notebook after the other; a bar on a terminal, a line a notebook elsewhere."""
    from tqdm import tqdm

    for job in jobs:
        original, start = job.path.read_text("utf-8"), time.monotonic()
        with tqdm(desc=job.name, unit="cell", leave=False, disable=None, dynamic_ncols=True) as bar:

            def advance(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            notebook = execute(job, advance)
        if in_place:
            write_in_place(job.path, original, notebook)
        where = "" if in_place else f" -> {shown_path(job.copy)}"
        cells = len(json.loads(original)["cells"])
        print(f"{job.name}: {cells} cells, {time.monotonic() - start:.0f} s{where}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> exit code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
    try:
        options = arguments(argv)
        run_jobs(make_jobs(options), options.in_place)
        return 0
    except Stopped as stopped:
        print("\n".join(stopped.lines), file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print("interrupted: every kernel and rank has ended", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.argv[1:2] == ["--execute-here"]:
        execute_here(*sys.argv[2:])
    else:
        sys.exit(main())
