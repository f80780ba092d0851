"""Execute the notebooks without a browser.

    python tools/notebooks.py [NB...] [-p NAME VALUE]     execute, copies into build/notebooks/
    python tools/notebooks.py --in-place [NB...]          refresh the outputs that are committed, cleaned
    python tools/notebooks.py --clean [NB...]             clean what is there, without executing anything

Without NB: all of notebooks/. Exit code 0: all ran. 1: a cell failed, or the time was over; named on stderr with
the notebook and the cell's id. 2: refused before anything started. 130: interrupted. No kernel, torchrun or rank
outlives this program. Plain papermill, `jupyter execute` and `nbconvert --execute` run the notebooks just as well.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

if __name__ == "__main__":  # Ctrl-C while modules are read is one line, too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import nbformat  # noqa: E402
import psutil  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError  # noqa: E402
from nbformat import NotebookNode  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_TIMEOUT_S = 300.0
MOST_MESSAGE_LINES = 15
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PLAYER_FRAMES = re.compile(r"data:image/[\w+]+;base64,[\w+/=\\\s]+")  # any letters may stand in them


class Stopped(Exception):
    """A notebook that did not run through. lines: for stderr; code: the exit code."""

    def __init__(self, code: int, *lines: str) -> None:
        self.lines, self.code = lines, code
        super().__init__("\n".join(lines))


def refuse(what: str) -> Stopped:
    return Stopped(2, f"error: {what}")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


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


def read(path: Path, needs_ids: bool) -> NotebookNode:
    """A notebook, as nbformat 4. Stopped where it is none, is not Python's, or lacks the ids that are needed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nbformat makes up ids that are missing
            notebook = nbformat.read(path, as_version=4)
        ids = [cell.get("id") for cell in json.loads(path.read_text("utf-8")).get("cells", [])]
    except Exception as error:  # of nbformat, json and the disk, of many types
        said = (str(error).splitlines() or [""])[0]
        raise refuse(f"{shown(path)} is not a notebook: {type(error).__name__}: {said[:100]}") from None
    info, kernel = (notebook.metadata.get(key, {}) for key in ("language_info", "kernelspec"))
    language = info.get("name") or kernel.get("language") or "python"
    if language.lower() != "python":
        raise refuse(f"{shown(path)} is a notebook for {language}; this program runs Python's")
    if needs_ids and (None in ids or len(set(ids)) < len(ids)):
        raise refuse(f"{shown(path)} has a cell without an id of its own; give it one")
    return notebook


def set_parameters(path: Path, notebook: NotebookNode, parameters: dict[str, Any]) -> None:
    """Puts a cell with the values behind the one tagged `parameters`, as papermill does. Stopped for unknown names."""
    if not parameters:
        return
    from papermill import inspect_notebook

    try:
        known = list(inspect_notebook(str(path).replace("{", "{{").replace("}", "}}")))
    except ValueError as error:
        raise refuse(f"{shown(path)}: {error}") from None
    unknown = [name for name in parameters if name not in known]
    if unknown:
        listed = f"it has {', '.join(known)}" if known else "it has none"
        raise refuse(f"{shown(path)} has no parameter {', '.join(unknown)}; {listed}")
    lines = ["# Parameters", *(f"{name} = {value!r}" for name, value in parameters.items())]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
    at = next(n for n, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    notebook.cells.insert(at + 1, cell)


def choose_notebooks(given: Sequence[str]) -> list[Path]:
    """The notebooks to run. Stopped where one does not exist, or two would share a copy."""
    paths = [Path(name).resolve() for name in given] or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for path in paths:
        if not path.is_file() or path.suffix != ".ipynb":
            raise refuse(f"{shown(path)} is not a notebook; check the path")
    names = [path.name for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise refuse(f"{name} is given twice, and copies go by name; run one at a time")
    return paths


# ----------------------------------------------------------------------------------------------------------
# Running one notebook
# ----------------------------------------------------------------------------------------------------------


def end_marked(mark: str) -> None:
    """Ends every process that has the mark in its environment: a kernel and what it started, wherever they went."""

    def is_marked(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            return process.environ().get("EP_NOTEBOOK") == mark
        return False

    for _ in range(10):  # until none is left that another has just started
        if not (found := [process for process in psutil.process_iter() if is_marked(process)]):
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def failure_lines(where: str, error: CellExecutionError) -> list[str]:
    """What a failed cell says: its own message, and the line of the cell where it is not in the message."""
    said = ANSI.sub("", error.evalue).replace(str(ROOT) + os.sep, "").splitlines() or [""]
    first = said[0].removeprefix("error: ")
    first = first if first != said[0] else f"{error.ename}: {first}".rstrip(": ")
    lines = [f"error: {where}: {first}", *(f"  {line.strip()}" for line in said[1 : MOST_MESSAGE_LINES - 2])]
    if at := re.search(r"^-+> +(\d+) (.*)$", ANSI.sub("", error.traceback), re.MULTILINE):
        lines.append(f"  line {at[1]} of the cell: {at[2].strip()}")
    return lines


def execute(name: str, notebook: NotebookNode, cwd: Path, timeout_s: float) -> None:
    """Executes a notebook, in place in memory, with a bar on a terminal. Stopped where a cell does not end well."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    logging.getLogger("asyncio").setLevel(
        logging.CRITICAL
    )  # nbclient leaves a task behind where a cell hangs
    mark, started = f"{os.getpid()}-{time.monotonic_ns()}", [(name, 0.0)]

    def note_start(cell: NotebookNode, cell_index: int) -> None:
        started.append((f"{name} #{cell.id}", time.monotonic()))

    def seconds_left(cell: NotebookNode) -> float:
        return max(0.1, started[1][1] + timeout_s - time.monotonic())  # a kernel's own start does not count

    bar = tqdm(
        desc=name, total=len(notebook.cells), unit="cell", leave=False, disable=None, dynamic_ncols=True
    )
    client = NotebookClient(
        notebook,
        # This Python's own kernel, whatever else is installed under the name of python3.
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])),
        extra_arguments=["--log-level=ERROR"],
        timeout_func=seconds_left,
        on_cell_start=note_start,
        on_cell_complete=lambda cell, cell_index: bar.update(cell_index + 1 - bar.n),
        coalesce_streams=True, record_timing=False, store_widget_state=False, shutdown_kernel="immediate",
    )  # fmt: skip
    # In a thread of its own: in the main one nbclient would take the signals.
    with tempfile.TemporaryDirectory(prefix="ep-notebook-") as scratch, bar, ThreadPoolExecutor(1) as thread:
        environment = os.environ | {"EP_NOTEBOOK": mark, "IPYTHONDIR": scratch, "TMPDIR": scratch}
        environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
        environment.setdefault("PYTHONHASHSEED", "0")  # the same outputs from every run
        environment.setdefault("OMP_NUM_THREADS", "1")  # the ranks that cells start share the cores
        running = thread.submit(client.execute, cwd=str(cwd), env=environment, cleanup_kc=True)
        try:
            running.result()
        except CellExecutionError as error:
            raise Stopped(1, *failure_lines(started[-1][0], error)) from None
        except CellTimeoutError:
            said = f"did not end within {timeout_s:g} s; it was ended"
            raise Stopped(1, f"error: {started[-1][0]}: {said}") from None
        except (DeadKernelError, RuntimeError) as error:
            raise Stopped(1, f"error: {started[-1][0]}: the kernel died: {error}") from None
        finally:
            end_marked(mark)


# ----------------------------------------------------------------------------------------------------------
# Cleaning
# ----------------------------------------------------------------------------------------------------------


def show_image(name: str, path: Path) -> NotebookNode:
    """The output that shows a file of images/ by its name; its text is the title that the picture has."""
    image = ROOT / "images" / name
    titles = [
        part.text for part in ElementTree.parse(image).iter() if part.tag.endswith("}title") and part.text
    ]
    text = [*titles, image.stem.replace("_", " ")][0]
    text = re.sub(r"[\[\]$]", "", " ".join(text.split()))  # which Markdown would read
    link = os.path.relpath(image, path.parent).replace(os.sep, "/")
    return nbformat.v4.new_output("display_data", {"text/markdown": f"![{text}]({link})"})


def clean_outputs(cell: NotebookNode, path: Path) -> list[NotebookNode]:
    """Outputs fit to be committed: no counts, nothing empty, images/ shown by name, the repo's paths relative."""
    names = [
        name for name in re.findall(r'"([\w-]+\.svg)"', cell.source) if (ROOT / "images" / name).is_file()
    ]
    kept = []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "execute_result":
            output.execution_count = None
        if output.output_type == "error":  # Python's own traceback names files by their path
            output.traceback = [line.replace(str(ROOT) + os.sep, "") for line in output.traceback]
        is_picture = not data.keys().isdisjoint(("image/png", "image/svg+xml"))
        if names and (is_picture or data.get("text/markdown", "").startswith("![")):
            output = show_image(names.pop(0), path)
        if "text" in output:
            output.text = re.sub(r" *\r", "", output.text)  # what is left of a bar
        if data != {"text/plain": ""} and output.get("text") != "":  # where a progress bar was
            kept.append(output)
    return kept


FOLDED = {"setup", "plot", "solution"}  # cells whose source JupyterLab and the site show on a click


def clean(notebook: NotebookNode, path: Path) -> None:
    """Leaves what a commit holds: sources, tags, folded cells, clean outputs; nothing of the run."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata |= {"kernelspec": kernel, "language_info": {"name": "python"}}
    for extra in ("papermill", "widgets"):
        notebook.metadata.pop(extra, None)
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        is_folded = FOLDED & set(tags) or cell.metadata.get("jupyter", {}).get("source_hidden")
        cell.metadata = NotebookNode({"tags": tags} if tags else {})
        if is_folded:
            cell.metadata.jupyter = NotebookNode(source_hidden=True)
        if "solution" in tags:
            cell.metadata.jupyter.outputs_hidden = True
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, clean_outputs(cell, path)


def private_texts() -> dict[str, re.Pattern[str]]:
    """What must not be in a committed output: {its description: a pattern that finds it}."""
    paths = {
        "the repository's absolute path": str(ROOT),
        "the home folder": str(Path.home()),
        "the Python installation's path": sys.prefix,
        "the folder for temporary files": tempfile.gettempdir(),
    }
    found = {what: rf"(?<![\w./~-]){re.escape(p)}(?![\w-])" for what, p in paths.items() if len(p) > 1}
    if (host := socket.gethostname()) not in ("", "localhost"):
        found["the host's name"] = rf"(?<![\w.-]){re.escape(host)}(?![\w-])"
    return {what: re.compile(pattern) for what, pattern in found.items()}


def texts_of(output: NotebookNode) -> Iterator[str]:
    """Every text in an output; no image bytes."""
    yield "\n".join([output.get("text", ""), output.get("evalue", ""), *output.get("traceback", [])])
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml":
            yield PLAYER_FRAMES.sub("", str(value))


def check_private(name: str, cells: Sequence[NotebookNode]) -> None:
    """Stopped, naming the cell, where an output tells of this machine."""
    patterns = private_texts()
    for cell in cells:
        for text in (ANSI.sub("", text) for output in cell.get("outputs", []) for text in texts_of(output)):
            for what, pattern in patterns.items():
                if match := pattern.search(text):
                    message = (
                        f"{name} #{cell.id}: its output holds {what} ({match[0]}); print something relative"
                    )
                    raise Stopped(1, f"error: {message}; the notebook is as it was")


def write(notebook: NotebookNode, path: Path) -> None:
    """Writes a notebook as a whole, or not at all; a new file takes the mode of the old one. Stopped if it cannot."""
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(nbformat.writes(notebook) + "\n", "utf-8")
        if path.exists():
            shutil.copymode(path, aside)
        aside.replace(path)
    except OSError as error:
        raise Stopped(1, f"error: cannot write {shown(path)}: {error.strerror}; see --output-dir") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def write_clean(path: Path, original: str, notebook: NotebookNode) -> None:
    """Replaces the notebook, cleaned. Stopped where it was changed meanwhile, or an output is private."""
    clean(notebook, path)
    check_private(shown(path), notebook.cells)
    if path.read_text("utf-8") != original:
        raise Stopped(1, f"error: {shown(path)} was changed while it ran; run it again")
    write(notebook, path)


# ----------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise refuse(f"{message}; see --help")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, read. Stopped where it asks for something that cannot be."""
    parser = _Parser(prog="notebooks.py", description="Execute the notebooks without a browser.")
    parser.add_argument(
        "notebooks", nargs="*", metavar="NB", help="notebooks to run (default: notebooks/*.ipynb)"
    )
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="sets a parameter of every notebook")  # fmt: skip
    parser.add_argument("--in-place", action="store_true", help="refresh the notebooks' own outputs, cleaned")
    parser.add_argument("--clean", action="store_true", help="clean the notebooks' outputs; execute nothing")
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, metavar="SECONDS",
                        help=f"for each notebook (default: {DEFAULT_TIMEOUT_S:g})")  # fmt: skip
    parser.add_argument("--output-dir", type=Path, default=ROOT / "build" / "notebooks", metavar="DIR",
                        help="where copies go (default: build/notebooks)")  # fmt: skip
    words = sys.argv[1:] if argv is None else argv
    # A number like -1e-3 would pass for a flag, were it not for a space.
    options = parser.parse_intermixed_args([re.sub(r"^(?=-[\d.])", " ", word) for word in words])
    options.parameters = {
        name: read_value(re.sub(r"^ (?=-[\d.])", "", value)) for name, value in options.parameter
    }
    if sys.flags.optimize:
        raise refuse(
            "without assertions (PYTHONOPTIMIZE, -O) no check of a notebook can fail; leave that out"
        )
    if not options.timeout > 0:
        raise refuse(f"--timeout is {options.timeout:g}, and must be positive")
    if options.parameters and (options.in_place or options.clean):
        raise refuse("what is committed has the notebooks' own parameters; leave -p out")
    options.paths, folder = choose_notebooks(options.notebooks), options.output_dir.resolve()
    if any(path.parent == folder for path in options.paths):
        raise refuse(f"--output-dir {shown(folder)} holds the notebooks themselves; take another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise refuse(f"cannot write to --output-dir {shown(folder)}: {error.strerror}") from None
    return options


def run_one(path: Path, notebook: NotebookNode, options: argparse.Namespace) -> None:
    """Executes one notebook, as the options say, and prints a line about it."""
    original, start, name = path.read_text("utf-8"), time.monotonic(), shown(path)
    copy = options.output_dir.resolve() / path.name
    if not options.clean:
        copy.unlink(missing_ok=True)
        try:
            execute(name, notebook, path.parent, options.timeout)
        except Stopped as stopped:
            last = f"  executed copy: {shown(copy)}"
            try:
                write(notebook, copy)
            except Stopped as unwritten:
                last = unwritten.lines[0].replace("error:", " ")
            raise Stopped(stopped.code, *stopped.lines, last) from None
    if options.in_place or options.clean:
        write_clean(path, original, notebook)
    else:
        write(notebook, copy)
    where = "" if options.in_place or options.clean else f" -> {shown(copy)}"
    print(f"{name}: {len(notebook.cells)} cells, {time.monotonic() - start:.0f} s{where}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> exit code."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        options = arguments(argv)
        jobs = [(path, read(path, options.in_place or options.clean)) for path in options.paths]
        for path, notebook in jobs:
            set_parameters(path, notebook, options.parameters)
        for path, notebook in jobs:
            run_one(path, notebook, options)
        return 0
    except Stopped as stopped:
        print("\n".join(stopped.lines), file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print("interrupted: every kernel and rank has ended", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
