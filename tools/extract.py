"""Stitch tagged notebook cells into one Python file.

    python tools/extract.py                               notebooks/*.ipynb -> ep_launcher/launcher.py
    python tools/extract.py --check                       exit 1 and a diff where launcher.py is stale
    python tools/extract.py --tags seed --output build/seed.py
    python tools/extract.py NB... --tags a b --output F   any notebooks, any tags, any file

Exit code 0: written, or nothing to do. 1: `--check` found a difference. 2: refused; every reason is one line
on stderr, and the old file is as it was. The same notebooks give the same bytes, whatever the machine or the date.

Without NB the notebooks are this repo's chapters, and the book's cell rules are checked as well. Tools and notebooks
take `assert_fresh`, `check_kernel_definitions` and `cell_of` from here.
"""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from tools import commands  # noqa: E402
from tools.commands import Refused, one_line  # noqa: E402
from tools.stitch import reading, rules  # noqa: E402
from tools.stitch.fresh import assert_fresh, check_kernel_definitions  # noqa: E402, F401
from tools.stitch.reading import EXPORTED_TAGS, LAUNCHER, Cell  # noqa: E402
from tools.stitch.trace import cell_of  # noqa: E402, F401


def _read_given(given: Sequence[str], root: Path) -> list[Cell]:
    """The notebooks of the command line, named without the machine: as in the repo, or the file's."""
    paths: dict[str, Path] = {}
    for path in (Path(os.path.abspath(path)) for path in given):
        name = one_line(path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name)
        if name in paths:
            raise Refused(f"{name}: is given twice, or two have this name; rename one")
        paths[name] = path
    return [cell for name, path in sorted(paths.items()) for cell in reading.read_notebook(path, name)]


def _choose_output(arguments: argparse.Namespace, root: Path) -> tuple[Path, str]:
    """The file to write and the name to show for it."""
    if arguments.output is None:
        if arguments.notebooks or {*(arguments.tags or EXPORTED_TAGS)} != {*EXPORTED_TAGS}:
            raise Refused(f"extract.py: --output is missing ({LAUNCHER} is the whole book's); name a file")
        return root / LAUNCHER, LAUNCHER
    path = Path(os.path.realpath(arguments.output))
    read = [Path(os.path.realpath(p)) for p in arguments.notebooks or reading.book_notebooks(root)]
    if path in read or (os.path.exists(path) and not os.path.isfile(path)):
        raise Refused(
            f"{arguments.output}: is a notebook that is read, or no regular file; name another file"
        )
    return path, one_line(arguments.output)


def _run(argv: Sequence[str] | None, root: Path) -> int:
    parser = commands.Parser("extract.py", description="Stitch tagged notebook cells into one Python file.")
    add = parser.add_argument
    add("notebooks", nargs="*", metavar="NB", help="what to read (default: the chapters, rules checked)")
    add("--tags", nargs="+", metavar="TAG", help=f"tags to export (default: {' '.join(EXPORTED_TAGS)})")
    add("--output", metavar="F", help=f"file to write (default, without NB and TAG: {LAUNCHER})")
    add("--check", action="store_true", help="write nothing; exit 1 and show a diff where F is stale")
    arguments = parser.parse_intermixed_args(argv)
    tags = list(dict.fromkeys(arguments.tags or EXPORTED_TAGS))
    read = _read_given(arguments.notebooks, root) if arguments.notebooks else reading.read_book(root)
    names = ", ".join(dict.fromkeys(cell.notebook for cell in read)) or "the notebooks (NN_name.ipynb)"
    path, shown = _choose_output(arguments, root)
    for asked in [[tag] for tag in arguments.tags or ()] or [tags]:
        if not reading.select(read, asked):
            raise Refused(f"{names}: no code cell is tagged {' or '.join(asked)}; check the tags")
    text, cells = rules.stitch(read, tags, is_book=not arguments.notebooks)
    number = len({cell.notebook for cell in cells})
    count = f"{len(cells)} cell{'s' * (len(cells) != 1)} from {number} notebook{'s' * (number != 1)}"
    try:
        old = path.read_bytes().decode("utf-8", "backslashreplace") if path.exists() else None
        if old == text:
            print(f"{shown} is up to date: {count}")
            return 0
        if not arguments.notebooks and not rules.has_ruff():
            hint = "pip install ruff, and stitch again"
            print(f"extract.py: no ruff here, so nobody looked for undefined names; {hint}", file=sys.stderr)
        if arguments.check:
            titles = shown if old is not None else "/dev/null", f"{shown} (from the notebooks)"
            lines = (old or "").split("\n"), text.split("\n")
            print("\n".join(difflib.unified_diff(*lines, *titles, lineterm="")))
            hint = "run `make launcher`" if shown == LAUNCHER else "run the same command without --check"
            raise Refused(f"{shown}: {'is missing' if old is None else 'is stale'}; {hint}", code=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        commands.replace_file(path, text.encode())
    except OSError as error:
        what = f"cannot be written ({error.strerror}); check it, or name another file"
        raise Refused(f"{shown}: {what}") from None
    print(f"wrote {shown}: {count}")
    return 0


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; `root` is the repo. Returns the exit code."""
    return commands.run(lambda: _run(argv, Path(root).resolve()))


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal may know less than Unicode
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader of a long diff may go away
    sys.exit(main())
