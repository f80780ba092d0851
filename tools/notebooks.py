"""Execute the notebooks without a browser.

    python tools/notebooks.py [NB...] [-p NAME VALUE]     execute, copies into build/notebooks/
    python tools/notebooks.py --in-place [NB...]          refresh the outputs that are committed, cleaned
    python tools/notebooks.py --clean [NB...]             clean what is there, without executing anything

Without NB: all of notebooks/. Exit code 0: all ran. 1: a cell failed, or the time was over; named on stderr with
the notebook and the cell's id. 2: refused before anything started. 130: interrupted. No kernel, torchrun or rank
outlives this program. Plain papermill, `jupyter execute` and `nbconvert --execute` run the notebooks just as well.
"""

import argparse
import ast
import contextlib
import html
import logging
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while modules are read is one line, too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import nbformat  # noqa: E402
import psutil  # noqa: E402
from jupyter_client.kernelspec import KernelSpecManager  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError  # noqa: E402
from nbformat import NotebookNode  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from tools import commands  # noqa: E402
from tools.commands import Refused  # noqa: E402
from tools.stitch.reading import book_notebooks  # noqa: E402

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COPIES = ROOT / "build/notebooks"
FOLDED = {"setup", "plot", "solution"}  # cells whose source JupyterLab and the site show on a click


def refuse(what: str, code: int = 2) -> Refused:
    return Refused(f"error: {what}", code=code)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def read_value(text: str) -> Any:
    """`-p`'s value: a Python literal, true, false or null, else the text itself."""
    words = {"true": "True", "false": "False", "null": "None", "none": "None"}
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(words.get(text.lower(), text))
    return text


def read(path: Path, parameters: dict[str, Any]) -> NotebookNode:
    """A notebook, as nbformat 4, with the parameters' values in a cell behind the one tagged `parameters`, as papermill
    does. Refused where it is none, or has no such parameter."""
    from papermill.translators import PythonTranslator

    try:
        with warnings.catch_warnings(action="ignore"):  # nbformat makes up ids that are missing
            notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # of nbformat, json and the disk, of many types
        said = str(error).partition("\n")[0]
        raise refuse(f"{shown(path)} is not a notebook: {type(error).__name__}: {said:.100}") from None
    tagged = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    known = [found.name for n in tagged[:1] for found in PythonTranslator.inspect(notebook.cells[n])]
    if unknown := [name for name in parameters if name not in known]:
        has = f"it has {', '.join(known) or 'none'}"
        raise refuse(f"{shown(path)} has no parameter {', '.join(unknown)}; {has}")
    if parameters:
        lines = ["# Parameters", *(f"{name} = {value!r}" for name, value in parameters.items())]
        cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(tagged[0] + 1, cell)
    return notebook


def end_marked(mark: str) -> None:
    """Ends every process that has the mark in its environment: a kernel and what it started, wherever they went."""
    for _ in range(10):  # until none is left that another has just started
        found = [p for p in psutil.process_iter(["environ"]) if mark in (p.info["environ"] or {}).values()]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if not found:
            return
        psutil.wait_procs(found, timeout=1)


def failure_lines(where: str, error: CellExecutionError) -> list[str]:
    """What a failed cell says: its own message, and the line of the cell where it is not in the message."""
    first, *more = ANSI.sub("", error.evalue).replace(str(ROOT) + os.sep, "").splitlines() or [""]
    if not first.startswith("error: "):
        first = f"{error.ename}: {first}".rstrip(": ")
    lines = [f"error: {where}: {first.removeprefix('error: ')}", *(f"  {line.strip()}" for line in more[:12])]
    if at := re.search(r"^-+> +(\d+) (.*)$", ANSI.sub("", error.traceback), re.MULTILINE):
        lines.append(f"  line {at[1]} of the cell: {at[2].strip()}")
    return lines


def execute(name: str, notebook: NotebookNode, cwd: Path, timeout_s: float) -> None:
    """Executes a notebook, in place in memory, with a bar on a terminal. Refused where a cell does not end well."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # nbclient leaves a task where a cell hangs
    mark, started = f"{os.getpid()}-{time.monotonic_ns()}", [(name, 0.0)]
    bar = tqdm(desc=name, total=len(notebook.cells), unit="cell", leave=False, disable=None)

    def note_start(cell: NotebookNode, cell_index: int) -> None:
        started.append((f"{name} #{cell.id}", time.monotonic()))
        bar.update(cell_index - bar.n)

    own = KernelSpecManager(kernel_dirs=[])  # this Python's kernel, whatever else is called python3
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=own)
    client = NotebookClient(
        notebook, km=kernel, extra_arguments=["--log-level=ERROR"], on_cell_start=note_start,
        timeout_func=lambda _: max(0.1, started[1][1] + timeout_s - time.monotonic()),  # without the kernel's start
        coalesce_streams=True, record_timing=False, store_widget_state=False, shutdown_kernel="immediate",
    )  # fmt: skip
    # In a thread of its own: in the main one nbclient would take the signals.
    with tempfile.TemporaryDirectory(prefix="ep-notebook-") as scratch, bar, ThreadPoolExecutor(1) as thread:
        # The same outputs from every run; and the ranks that cells start share the cores.
        environment = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"} | os.environ
        environment |= {"EP_NOTEBOOK": mark, "IPYTHONDIR": scratch, "TMPDIR": scratch}
        environment |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        try:
            thread.submit(client.execute, cwd=str(cwd), env=environment, cleanup_kc=True).result()
        except CellExecutionError as error:
            raise Refused(*failure_lines(started[-1][0], error), code=1) from None
        except CellTimeoutError:
            raise refuse(f"{started[-1][0]}: did not end within {timeout_s:g} s; it was ended", 1) from None
        except (DeadKernelError, RuntimeError) as error:
            raise refuse(f"{started[-1][0]}: the kernel died: {error}", 1) from None
        finally:
            end_marked(mark)


def show_image(name: str, path: Path) -> NotebookNode:
    """The output that shows a file of images/ by its name; its text is the title that the picture has."""
    image = ROOT / "images" / name
    title = re.search(r"title[^<>]*>([^<]+)<", image.read_text("utf-8"))
    text = html.unescape(title[1]) if title else image.stem.replace("_", " ")
    text = re.sub(r"[\[\]$]", "", " ".join(text.split()))  # which Markdown would read
    link = os.path.relpath(image, path.parent).replace(os.sep, "/")
    return nbformat.v4.new_output("display_data", {"text/markdown": f"![{text}]({link})"})


def clean_outputs(cell: NotebookNode, path: Path) -> list[NotebookNode]:
    """Outputs fit to be committed: no counts, nothing empty, images/ shown by name, the repo's paths relative."""
    names = re.findall(r'"([\w-]+\.svg)"', cell.source)
    names = [name for name in names if (ROOT / "images" / name).is_file()]
    kept = []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "execute_result":
            output.execution_count = None
        is_picture = {"image/png", "image/svg+xml"} & data.keys() or "![" == data.get("text/markdown", "")[:2]
        if names and is_picture:
            output = show_image(names.pop(0), path)
        if "text" in output:
            output.text = re.sub(r" *\r", "", output.text)  # what is left of a bar
        if data != {"text/plain": ""} and output.get("text") != "":  # where a progress bar was
            kept.append(output)
    return kept


def clean(notebook: NotebookNode, path: Path) -> None:
    """Leaves what a commit holds: sources, tags, folded cells, clean outputs; nothing of the run."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata |= {"kernelspec": kernel, "language_info": {"name": "python"}}
    for extra in ("papermill", "widgets"):
        notebook.metadata.pop(extra, None)
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        tags, folding = cell.metadata.get("tags", []), {}
        if FOLDED & {*tags} or cell.metadata.get("jupyter", {}).get("source_hidden"):
            folding["source_hidden"] = True
        if "solution" in tags:
            folding["outputs_hidden"] = True
        kept = {"tags": tags, "jupyter": folding}
        cell.metadata = nbformat.from_dict({key: value for key, value in kept.items() if value})
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, clean_outputs(cell, path)


def write(notebook: NotebookNode, path: Path) -> None:
    """Writes a notebook as a whole, or not at all, and is refused then."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        commands.replace_file(path, f"{nbformat.writes(notebook)}\n".encode())
    except OSError as error:
        raise refuse(f"cannot write {shown(path)}: {error.strerror}", 1) from None


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, read. Refused where it asks for something that cannot be."""
    parser = commands.Parser(prog="notebooks.py", description="Execute the notebooks without a browser.")
    add = parser.add_argument
    add("notebooks", nargs="*", metavar="NB", help="notebooks to run (default: notebooks/*.ipynb)")
    add("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    add("--in-place", action="store_true", help="refresh the notebooks' own outputs, cleaned")
    add("--clean", action="store_true", help="clean the notebooks' outputs; execute nothing")
    add("--timeout", type=float, default=300.0, metavar="SECONDS", help="for each notebook (%(default)g)")
    options = parser.parse_intermixed_args(argv)
    options.paths = [Path(name).resolve() for name in options.notebooks] or book_notebooks(ROOT)
    names = [path.name for path in options.paths]
    options.parameters = {name: read_value(value) for name, value in options.parameter}
    if sys.flags.optimize:
        raise refuse("without assertions (PYTHONOPTIMIZE, -O) no check can fail; leave that out")
    if options.parameters and (options.in_place or options.clean):
        raise refuse("what is committed has the notebooks' own parameters; leave -p out")
    if twice := [name for name in names if names.count(name) > 1]:
        raise refuse(f"{twice[0]} is given twice, and copies go by name; run one at a time")
    return options


def run_one(path: Path, notebook: NotebookNode, options: argparse.Namespace) -> None:
    """Executes one notebook, as the options say, and prints a line about it."""
    original, start, copy = path.read_text("utf-8"), time.monotonic(), COPIES / path.name
    where = ""
    if not options.clean:
        try:
            execute(shown(path), notebook, path.parent, options.timeout)
        except Refused as refused:
            write(notebook, copy)
            raise Refused(*refused.lines, f"  executed copy: {shown(copy)}", code=1) from None
    if options.in_place or options.clean:
        clean(notebook, path)
        if path.read_text("utf-8") != original:
            raise refuse(f"{shown(path)} was changed while it ran; run it again", 1)
        write(notebook, path)
    else:
        write(notebook, copy)
        where = f" -> {shown(copy)}"
    print(f"{shown(path)}: {len(notebook.cells)} cells, {time.monotonic() - start:.0f} s{where}", flush=True)


def run_all(argv: Sequence[str] | None) -> int:
    options = arguments(argv)
    notebooks = [read(path, options.parameters) for path in options.paths]
    for path, notebook in zip(options.paths, notebooks, strict=True):
        run_one(path, notebook, options)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> exit code."""
    return commands.run(lambda: run_all(argv), "every kernel and rank has ended")


if __name__ == "__main__":
    code = main()
    if code == 130:  # nbclient's exit function would ask for a kernel that is gone
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
