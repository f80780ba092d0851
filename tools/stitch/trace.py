"""The part of a stitched program that names cells: copied, as it stands, to the end of every file that defines `main`.

So these functions use nothing of this module, and import what they need where they need it.
"""

import os


def find_cell_markers(text: str) -> list[tuple[int, str]]:
    """Where the cells of a stitched text start: [(line, "notebooks/x.ipynb #id")], in order; an empty name ends one."""
    import re

    marker = re.compile(r"# %% (?:(.+ #[A-Za-z0-9_-]+)|added by tools/extract\.py)")
    found = [(number, marker.fullmatch(line)) for number, line in enumerate(text.split("\n"), 1)]
    return [(number, match[1] or "") for number, match in found if match]


def read_cell_markers(path: str) -> list[tuple[int, str]]:
    """The same of a file. Raises OSError where it cannot be read."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        return find_cell_markers(file.read())


def locate_cell(markers: list[tuple[int, str]], line: int) -> str:
    """The cell and its own line for a line of the stitched file: "notebooks/x.ipynb #id:12"; "" outside cells."""
    before = [marker for marker in markers if marker[0] < line]
    start, cell = before[-1] if before else (0, "")
    return f"{cell}:{line - start}" if cell else ""


def describe_frames(exception: BaseException, path: str, markers: list[tuple[int, str]]) -> tuple[str, str]:
    """Python's traceback with the cell beside each frame of the file `path`, and a one-line summary.

    The summary names the innermost cell or line of the plugin: of the exception, else of what it was raised from.
    """
    import os
    import re
    import sys
    import traceback

    own = {path, os.path.abspath(path)}
    plugin = getattr(sys.modules.get("plugin"), "__file__", None)

    def place(file: str, line: int) -> str:
        return f"{file}, line {line}" if file == plugin else locate_cell(markers, line) if file in own else ""

    def add_cell(match: re.Match[str]) -> str:
        cell = place(match[1], int(match[2]))
        return f"{match[0]} ({cell})" if cell else match[0]

    report = "".join(traceback.TracebackException.from_exception(exception).format())
    report = re.sub(r'^[ |+]*File "(.+)", line (\d+), in .+$', add_cell, report, flags=re.MULTILINE)
    where, link, seen = "", exception, set()
    while link is not None and id(link) not in seen and not where:  # a chain may be a circle
        seen.add(id(link))
        for frame, line in traceback.walk_tb(link.__traceback__):
            cell = place(frame.f_code.co_filename, line)
            where = f" ({cell}, in {frame.f_code.co_qualname})" if cell else where
        link = link.__cause__ or link.__context__
    message = " ".join(str(exception).split())
    return report, f"{type(exception).__name__}{': ' if message else ''}{message}{where}"


def install_traceback_hook() -> None:
    """Let an uncaught exception name the notebook, cell and line it came from, and last of all the rank."""
    import os
    import re
    import sys

    path = install_traceback_hook.__code__.co_filename
    own_path = os.path.abspath(path)
    # Read now: by the time something fails, the notebooks may have been stitched anew.
    markers = read_cell_markers(own_path)

    def hook(kind: type[BaseException], exception: BaseException, trace: object) -> None:
        report, summary = describe_frames(exception, path, markers)
        # One write a rank, so that the ranks' reports do not mix line by line.
        sys.stderr.write(f"{report}error: rank {os.environ.get('RANK', '0')}: {summary}\n")
        sys.stderr.flush()

    def locate(exception: BaseException) -> str:
        report = describe_frames(exception, path, markers)[0]
        cells = re.findall(r"in (\w+) \((notebooks/[^)]+|[^)]+, line \d+)\)", report)
        # A collective's own frames say nothing that its message does not.
        collective = "entering all_gather begin_all_to_all all_to_all all_reduce wait".split()
        inner = [cell for name, cell in cells if name not in collective]
        return f" ({inner[-1]})" if inner else ""

    # For a program that catches an exception and still wants to say where it came from. Not on the hook: joining a
    # process group wraps sys.excepthook.
    install_traceback_hook.locate = locate
    sys.excepthook = hook


HOOK_FUNCTIONS = (find_cell_markers, read_cell_markers, locate_cell, describe_frames, install_traceback_hook)


def cell_of(filename: str | os.PathLike[str], lineno: int) -> str | None:
    """The cell that a line of a stitched file came from: "notebooks/x.ipynb #id:line".

    None where the line belongs to no cell, and for every file that is not stitched or cannot be read.
    """
    try:
        return locate_cell(read_cell_markers(os.fspath(filename)), lineno) or None
    except (OSError, ValueError):
        return None
