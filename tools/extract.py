"""Stitch tagged notebook cells into one Python file.

    python tools/extract.py                               notebooks/*.ipynb -> ep_launcher/launcher.py
    python tools/extract.py --check                       exit 1 and a diff where launcher.py is stale
    python tools/extract.py --tags seed --output build/seed.py
    python tools/extract.py NB... --tags a b --output F   any notebooks, any tags, any file

Exit code 0: written, or nothing to do. 1: `--check` found a difference. 2: refused; every reason is one line
on stderr, and the old file is as it was. The same notebooks give the same bytes: names are sorted, cells keep
their order, and nothing of the machine, the date or the Python version gets in.

Without NB the notebooks are this repo's chapters, and the book's cell rules are checked as well. With NB only what
stitching needs is asked of them. tools/stitch/ is what this is made of.

From other tools and from notebooks: `assert_fresh`, `check_kernel_definitions`, `cell_of`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from tools.stitch.fresh import assert_fresh, check_kernel_definitions  # noqa: E402, F401
from tools.stitch.program import GENERATED_LINE  # noqa: E402
from tools.stitch.reading import (  # noqa: E402  # noqa: E402, F401, I001
    EXPORTED_TAGS,
    LAUNCHER,
    Notebook,
    Refused,
    book_notebooks,
    one_line,
    read_book,
    read_notebooks,
    select,
)
from tools.stitch.rules import find_ruff, stitch  # noqa: E402
from tools.stitch.trace import locate_cell, read_cell_markers  # noqa: E402


def cell_of(filename: str | os.PathLike[str], lineno: int) -> str | None:
    """The cell that a line of a stitched file came from: "notebooks/x.ipynb #id:line".

    None where the line belongs to no cell, and for every file that is not stitched or cannot be read.
    """
    try:
        with open(filename, encoding="utf-8", errors="replace") as file:
            if not file.readline().startswith(GENERATED_LINE):
                return None
        return locate_cell(read_cell_markers(os.fspath(filename)), lineno) or None
    except (OSError, ValueError):
        return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Refused([f"extract.py: {message}; see --help"])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="extract.py", description="Stitch tagged notebook cells into one Python file.")
    add = parser.add_argument
    add(
        "notebooks",
        nargs="*",
        metavar="NB",
        help="notebooks to read (default: the chapters, their rules checked)",
    )
    add("--tags", nargs="+", metavar="TAG", help=f"tags to export (default: {' '.join(EXPORTED_TAGS)})")
    add("--output", metavar="F", help=f"file to write (default, without NB and TAG: {LAUNCHER})")
    add("--check", action="store_true", help="write nothing; exit 1 and show a diff where F is stale")
    return parser.parse_intermixed_args(argv)


def _read_given(given: Sequence[str], root: Path) -> list[Notebook]:
    """The notebooks named on the command line, by names that hold nothing of the machine: paths in the repo, or from
    the folder that the others share."""
    # The folder without links, but the notebook's own name even where it is a link.
    paths = [Path(os.path.realpath(Path(path).parent)) / Path(path).name for path in given]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise Refused([f"{given[number]}: is given twice; name each notebook once"])
    outside = [path.parent for path in paths if not path.is_relative_to(root)]
    shared = Path(os.path.commonpath(outside)) if outside else root
    names = [path.relative_to(root if path.is_relative_to(root) else shared).as_posix() for path in paths]
    return read_notebooks(paths, [one_line(name) for name in names])


def _choose_output(arguments: argparse.Namespace, root: Path) -> tuple[Path, str]:
    """The file to write and the name to show for it."""
    if arguments.output is None:
        if arguments.notebooks or {*(arguments.tags or EXPORTED_TAGS)} != {*EXPORTED_TAGS}:
            raise Refused([f"extract.py: --output is missing ({LAUNCHER} is the whole book's); name a file"])
        return root / LAUNCHER, LAUNCHER
    path = Path(os.path.realpath(arguments.output))
    if path in [Path(os.path.realpath(p)) for p in arguments.notebooks or book_notebooks(root)]:
        raise Refused([f"{arguments.output}: is one of the notebooks read; write to another file"])
    if os.path.exists(path) and not os.path.isfile(path):
        raise Refused([f"{arguments.output}: is no regular file, so it cannot be written; name a file"])
    return path, one_line(arguments.output)


def _write(path: Path, data: bytes) -> None:
    """Replace a file as a whole, or leave it as it was and raise OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _run(arguments: argparse.Namespace, root: Path) -> int:
    tags = list(dict.fromkeys(arguments.tags or EXPORTED_TAGS))
    notebooks = _read_given(arguments.notebooks, root) if arguments.notebooks else read_book(root)
    if not notebooks:
        raise Refused(["notebooks: holds no chapter (NN_name.ipynb); add one"])
    path, shown = _choose_output(arguments, root)
    for asked in [[tag] for tag in arguments.tags or ()] or [tags]:
        if not select(notebooks, asked):
            listing = ", ".join(notebook.name for notebook in notebooks)
            raise Refused([f"{listing}: no code cell is tagged {' or '.join(asked)}; check the tags"])
    text, cells = stitch(notebooks, tags, is_book=not arguments.notebooks)
    number = len({cell.notebook for cell in cells})
    count = f"{len(cells)} cell{'s' * (len(cells) != 1)} from {number} notebook{'s' * (number != 1)}"
    try:
        old = path.read_bytes() if path.exists() else None
        if old == text.encode():
            print(f"{shown} is up to date: {count}")
            return 0
        if not arguments.notebooks and not find_ruff():
            hint = "pip install ruff, and stitch again"
            print(
                f"extract.py: ruff is not installed, so nobody looked for undefined names; {hint}",
                file=sys.stderr,
            )
        if arguments.check:
            before = (old or b"").decode("utf-8", "backslashreplace").split("\n")
            names = [shown if old is not None else "/dev/null", f"{shown} (from the notebooks)"]
            print("\n".join(difflib.unified_diff(before, text.split("\n"), *names, lineterm="")))
            hint = "run `make launcher`" if shown == LAUNCHER else "run the same command without --check"
            print(f"{shown}: {'is missing' if old is None else 'is stale'}; {hint}", file=sys.stderr)
            return 1
        _write(path, text.encode())
    except OSError as error:
        raise Refused(
            [
                f"{shown}: cannot be written ({error.strerror or type(error).__name__}); check it, or name another file"
            ]
        ) from None
    print(f"wrote {shown}: {count}")
    return 0


def main(argv: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Run the command line; `root` is the repo (default: the one this file is in). Returns the exit code."""
    try:
        return _run(_arguments(argv), Path(root).resolve() if root else ROOT)
    except Refused as refused:
        print("\n".join(refused.lines), file=sys.stderr)
    except RecursionError:
        print("extract.py: a notebook is nested too deeply to be stitched; simplify it", file=sys.stderr)
    return 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal may know less than Unicode
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a long diff went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
