"""Stitch tagged notebook cells into one Python file.

    python tools/extract.py                               notebooks/*.ipynb -> ep_launcher/launcher.py
    python tools/extract.py --check                       exit 1 and a diff where launcher.py is stale
    python tools/extract.py --tags seed --output build/seed.py
    python tools/extract.py NB... --tags a b --output F   any notebooks, any tags, any file

Exit code 0: written, or nothing to do. 1: `--check` found a difference. 2: refused; every reason is one line
on stderr, and the old file is as it was. The same notebooks give the same bytes: names are sorted, cells keep
their order, and nothing of the machine, the date or the Python version gets in.

Without NB the notebooks are this repo's, and the book's cell rules are checked as well (`stitch_book`). With NB
only what stitching needs is asked of them (`stitch_any`). Standard library only: the notebook library repairs
missing and duplicate ids in silence, and the ids are what this file depends on.

From other tools and from notebooks: `assert_fresh`, `check_kernel_definitions`, `cell_of`.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import difflib
import functools
import hashlib
import inspect
import io
import json
import os
import re
import stat
import symtable
import sys
import tempfile
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = "ep_launcher/launcher.py"
LAUNCHER_MODULE = "ep_launcher.launcher"

EXPORTED_TAGS = ("theory", "all_to_all", "experts", "training", "performance", "routing")
OTHER_ROLES = ("setup", "seed", "parameters", "demo", "check", "launch", "plot", "exercise", "solution")
ROLE_TAGS = EXPORTED_TAGS + OTHER_ROLES
SIDE_TAGS = ("raises-exception", "hide-input")
MAX_CODE_LINES, MAX_CLASS_LINES = 40, 60  # of a cell, and of a cell that is one class
OLDEST_PYTHON = (3, 11)  # the book's cells must run on it, whatever Python stitches them

# What parse and compile raise on text that is not a program; the last four on absurdly deep or large text.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError, SystemError)


class Refused(Exception):
    """What was asked cannot be done. `lines` holds the reasons, one line each, ready for stderr."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = [_one_line(line) for line in lines]
        super().__init__("\n".join(self.lines))


# ----------------------------------------------------------------------------------------------------------
# The traceback hook. These functions are copied, as they stand, to the end of every stitched file that defines
# `main`; so they use nothing of this module, and import what they need where they need it.
# ----------------------------------------------------------------------------------------------------------


def read_cell_markers(path: str) -> list[tuple[int, str]]:
    """Where the cells of a stitched file start: [(line, "notebooks/x.ipynb #id")], in the file's order.

    An entry with an empty name ends the last cell. Raises OSError where the file cannot be read.
    """
    import re

    marker = re.compile(r"# %% (?:(.+ #[A-Za-z0-9_-]+)|added by tools/extract\.py)\n?")
    with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
        found = [
            (number, marker.fullmatch(line)) for number, line in enumerate(lines, 1) if line[:5] == "# %% "
        ]
    return [(number, match[1] or "") for number, match in found if match]


def locate_cell(markers: list[tuple[int, str]], line: int) -> str:
    """The cell and its own line for a line of the stitched file: "notebooks/x.ipynb #id:12"; "" outside cells."""
    before = [marker for marker in markers if marker[0] < line]
    start, cell = before[-1] if before else (0, "")
    return f"{cell}:{line - start}" if cell else ""


def describe_frames(exception: BaseException, path: str, markers: list[tuple[int, str]]) -> tuple[str, str]:
    """Python's traceback with the cell beside each frame of the file `path`, and a one-line summary.

    The summary names the innermost cell: of the exception, else of what it was raised from.
    """
    import os
    import re
    import traceback

    own = {path, os.path.abspath(path)}

    def add_cell(match: re.Match[str]) -> str:
        cell = locate_cell(markers, int(match[2])) if match[1] in own else ""
        return f"{match[0]} ({cell})" if cell else match[0]

    frame_line = re.compile(r'^[ |+]*File "(.+)", line (\d+), in .+$', re.MULTILINE)
    report = frame_line.sub(
        add_cell, "".join(traceback.TracebackException.from_exception(exception).format())
    )
    where, link, seen = "", exception, set()
    while link is not None and id(link) not in seen and not where:
        seen.add(id(link))
        for frame, line in traceback.walk_tb(link.__traceback__):
            cell = locate_cell(markers, line) if frame.f_code.co_filename in own else ""
            where = f" ({cell}, in {frame.f_code.co_qualname})" if cell else where
        link = link.__cause__ or link.__context__
    try:
        message = " ".join(str(exception).split())
    except Exception:
        message = "(its message cannot be printed)"
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
        cells = re.findall(r"in (\w+) \((notebooks/[^)]+)\)", report)
        inner = [
            cell for name, cell in cells if name not in ("entering", "all_gather", "all_to_all", "all_reduce")
        ]
        return f" ({inner[-1]})" if inner else ""

    # For a program that catches an exception and still wants to say where it came from. Not on the hook: joining a
    # process group wraps sys.excepthook.
    install_traceback_hook.locate = locate
    sys.excepthook = hook


HOOK_FUNCTIONS = (read_cell_markers, locate_cell, describe_frames, install_traceback_hook)
RESERVED_NAMES = frozenset({"SOURCES_SHA256", *(function.__name__ for function in HOOK_FUNCTIONS)})
GENERATED_LINE = '"""GENERATED by tools/extract.py. Do not edit: edit a notebook, then run '
BANNER_RULE = "# " + "=" * 106
END_MARKER = "# %% added by tools/extract.py"
MARKER_LIKE = re.compile(r"# %% (?:(.+ #[A-Za-z0-9_-]+)|added by tools/extract\.py)")


# ----------------------------------------------------------------------------------------------------------
# Reading notebooks
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One cell as stored. `source` has LF line ends, or is None where the notebook holds no text for it."""

    notebook: str
    position: int
    name: str  # its id, or 8 hex digits of its source's sha256
    id: object  # as stored, None where missing
    kind: object
    tags: tuple[str, ...]
    raw_tags: object
    language: str
    source: str | None

    @property
    def label(self) -> str:
        return f"{self.notebook} #{self.name}"

    @property
    def text(self) -> str:
        return self.source or ""

    def refusal(self, line: int, what: str) -> str:
        return f"{self.label}:{line}: {what}"


@dataclass(frozen=True)
class Notebook:
    name: str
    minor: object
    language: str  # lower case, "" where the notebook does not say
    cells: tuple[Cell, ...]


@dataclass
class Problems:
    """Refusals as they are found; reported once each."""

    lines: list[str] = field(default_factory=list)

    def add(self, cell: Cell, line: int, what: str) -> None:
        self.lines.append(cell.refusal(line, what))

    def raise_if_any(self) -> None:
        if self.lines:
            raise Refused(dict.fromkeys(self.lines))


def _one_line(text: str) -> str:
    """Text with every character that could break the line, or the terminal, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _brief(value: object, length: int = 40) -> str:
    """The start of a value's repr, for a refusal."""
    try:
        return repr(value)[:length]
    except (RecursionError, ValueError):
        return type(value).__name__


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _join_source(source: object) -> str | None:
    """A cell's source, a string or a list of strings, with LF line ends; None for anything else."""
    if isinstance(source, list) and all(isinstance(part, str) for part in source):
        source = "".join(source)
    return source.replace("\r\n", "\n").replace("\r", "\n") if isinstance(source, str) else None


def _read_cell(notebook: str, position: int, data: dict) -> Cell:
    source = _join_source(data.get("source"))
    metadata = _mapping(data.get("metadata"))
    raw_tags = metadata.get("tags")
    given = data.get("id")
    usable = isinstance(given, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", given)
    digest = hashlib.sha256((source or "").encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return Cell(
        notebook=notebook,
        position=position,
        name=given if usable else digest,
        id=given,
        kind=data.get("cell_type"),
        tags=tuple(t for t in raw_tags if isinstance(t, str)) if isinstance(raw_tags, list) else (),
        raw_tags=raw_tags,
        language=_string(_mapping(metadata.get("vscode")).get("languageId")).lower(),
        source=source,
    )


def read_notebook(path: Path, name: str) -> Notebook:
    """Read one notebook of format 4. Raises Refused, with one line, for anything else."""

    def refuse(what: str) -> Refused:
        return Refused([f"{name}: {what}"])

    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise refuse("is a folder; name the notebooks in it") from None
    except FileNotFoundError:
        raise refuse("does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise refuse(
            f"cannot be read ({_why(error) if isinstance(error, OSError) else error}); check it"
        ) from None
    if not raw.strip():
        raise refuse("is empty, not a notebook; save it again from Jupyter")
    try:
        data = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise refuse(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise refuse(f"is not JSON (line {error.lineno}: {error.msg}); save it again from Jupyter") from None
    except (RecursionError, ValueError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
        raise refuse(f"is not a notebook ({why}); save it again from Jupyter") from None
    if not isinstance(data, dict):
        raise refuse("is JSON but not a notebook (no object at the top); check the path")
    version = data.get("nbformat")
    if version != 4 or isinstance(version, bool):
        if "worksheets" in data or version in (1, 2, 3) and version is not True:
            upgrade = "upgrade it: jupyter nbconvert --to notebook --nbformat 4"
            raise refuse(f"is an old notebook (nbformat {_brief(version)}, worksheets); {upgrade}")
        raise refuse(
            f"is not a notebook of format 4 (nbformat is {_brief(version)}); save it from a current Jupyter"
        )
    cells = data.get("cells")
    if not isinstance(cells, list):
        raise refuse("is not a notebook (it has no list of cells); save it again from Jupyter")
    for position, cell in enumerate(cells, 1):
        if not isinstance(cell, dict):
            raise refuse(f"is not a notebook (cell {position} is no object); save it again from Jupyter")
    metadata = _mapping(data.get("metadata"))
    kernel = _mapping(metadata.get("kernelspec"))
    language = _string(kernel.get("language")) or _string(_mapping(metadata.get("language_info")).get("name"))
    return Notebook(
        name=name,
        minor=data.get("nbformat_minor"),
        language=language.lower(),
        cells=tuple(_read_cell(name, position, cell) for position, cell in enumerate(cells)),
    )


def _display_names(paths: Sequence[Path], root: Path) -> list[str]:
    """A name for each notebook that no machine path gets into: relative to the repo, else the file's own name.

    Where two files share a name, as many parent folders stand before it as tell them apart.
    """
    names: list[str] = []
    # The folder without links, but the notebook's own name even where it is a link.
    resolved = [Path(os.path.realpath(path.parent)) / path.name for path in paths]
    for path in resolved:
        if path.is_relative_to(root):
            names.append(path.relative_to(root).as_posix())
            continue
        parts = path.parts[1:] or path.parts
        others = [other.parts[1:] for other in resolved if other != path]
        depth = 1
        while depth < len(parts) and any(other[-depth:] == parts[-depth:] for other in others):
            depth += 1
        names.append("/".join(parts[-depth:]))
    # Bytes that are not UTF-8 come as lone surrogates, and a name may hold a line end: neither fits in a comment.
    return [_one_line(name) for name in names]


# ----------------------------------------------------------------------------------------------------------
# Looking at Python
# ----------------------------------------------------------------------------------------------------------


def _quiet_parse(source: str, feature_version: tuple[int, int] | None = None) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source, feature_version=feature_version)


def _quiet_compile(source: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile(source, "<cell>", "exec", dont_inherit=True)


MAGIC_LINE = re.compile(r"\s*(?:%|!|\?{1,2}\w)|\s*[\w.]+\s*\?{1,2}\s*$|\s*[\w., ]+=\s*[%!]")


def _parse(
    cell: Cell, problems: Problems, feature_version: tuple[int, int] | None = None
) -> ast.Module | None:
    """The cell's syntax tree, or None with the refusal noted."""
    text = cell.text
    if "\0" in text:
        problems.add(cell, text[: text.index("\0")].count("\n") + 1, "holds a NUL character; delete it")
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        line = text[: error.start].count("\n") + 1
        problems.add(
            cell, line, "holds half a surrogate pair, which no file can store; write the character anew"
        )
        return None
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if MARKER_LIKE.fullmatch(line):
            problems.add(cell, number, "this line reads like a cell marker of the stitched file; reword it")
            return None
    try:
        tree = _quiet_parse(text + "\n", feature_version)
        _quiet_compile(text + "\n")
        return tree
    except NOT_PYTHON as error:
        number = getattr(error, "lineno", None) or 1
        number = min(max(number, 1), len(lines))
        first = next((i for i, line in enumerate(lines) if line.strip()), 0)
        if lines[first].lstrip().startswith("%%"):
            magic = lines[first].split()[0]
            problems.add(
                cell, first + 1, f"a cell magic ({magic:.30}) is not Python; take it out, or the tag off"
            )
        elif isinstance(error, SyntaxError) and MAGIC_LINE.match(lines[number - 1]):
            magic = lines[number - 1].strip()
            problems.add(
                cell,
                number,
                f"`{magic:.40}` is a notebook magic, not Python; move it to a cell that stays, a demo",
            )
        else:
            what = getattr(error, "msg", None) or (
                "nested too deeply" if isinstance(error, (RecursionError, MemoryError)) else str(error)
            )
            problems.add(cell, number, f"syntax error: {what}; mend the cell")
        return None


def _parse_leniently(source: str) -> ast.Module | None:
    """The tree of a cell that may hold magics (their lines are left out), None where it still is no Python."""
    lines = source.split("\n")
    plain = [
        f"{line[: len(line) - len(line.lstrip())]}pass" if MAGIC_LINE.match(line) else line for line in lines
    ]
    for text in (source, "\n".join(plain)):
        try:
            return _quiet_parse(text + "\n")
        except NOT_PYTHON:
            continue
    return None


@dataclass(frozen=True)
class Binding:
    """A top-level name that a cell binds."""

    name: str
    line: int
    statement: int  # the position of the top-level statement that holds it
    kind: str  # "import", "def" or "value"
    content: str  # imports: what is imported, so that the same import may stand twice


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The statement lists directly inside a compound statement that opens no scope."""
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list):
            yield block
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield part.body


def _target_names(target: ast.expr) -> Iterator[ast.Name]:
    for node in ast.walk(target):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node


def _bindings(tree: ast.Module) -> list[Binding]:
    """Every name the module's top level binds, in order, `if` and `try` and loops included."""
    found: list[Binding] = []

    def visit(node: ast.stmt, top: int, guard: str) -> None:
        def bind(name: str, line: int, kind: str, content: str = "") -> None:
            found.append(Binding(name, line, top, kind, content))

        if isinstance(node, (ast.Import, ast.ImportFrom)):
            source = f"{'.' * node.level}{node.module or ''}:" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                # `import a.b` binds a, and may stand beside `import a.c`.
                name = alias.asname or alias.name.split(".")[0]
                what = alias.name if alias.asname or source else name
                bind(name, node.lineno, "import", guard or f"{source}{what}")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            overload = any(_dotted(d).split(".")[-1] == "overload" for d in node.decorator_list)
            if not overload:
                bind(node.name, node.lineno, "def", guard)
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if not (isinstance(node, ast.AnnAssign) and node.value is None):
                for target in targets:
                    for name in _target_names(target):
                        bind(name.id, name.lineno, "value", guard)
        else:
            for part in ast.iter_child_nodes(node):
                if isinstance(part, (ast.expr, ast.withitem, ast.pattern)):
                    for name in _target_names(part):
                        bind(name.id, name.lineno, "value", guard)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for block in _blocks(node):
                for child in block:
                    visit(child, top, guard)

    for top, statement in enumerate(tree.body):
        # One `try: import x` may be repeated whole; its names are the same import wherever it stands.
        is_guarded_import = isinstance(statement, (ast.Try, ast.If)) and any(
            isinstance(child, (ast.Import, ast.ImportFrom)) for child in statement.body
        )
        visit(statement, top, _fingerprint(statement) if is_guarded_import else "")
    return found


def _dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of names (of a decorator or call: its function), else ""."""
    node = node.func if isinstance(node, ast.Call) else node
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _fingerprint(node: ast.AST) -> str:
    """Equal for equal trees, wherever they stand. Like ast.dump, without its recursion and its limit on numbers."""
    rows = []
    for part in ast.walk(node):
        row: list[object] = [type(part).__name__]
        for name, value in ast.iter_fields(part):
            if isinstance(value, list):
                # Lists hold nodes or, in `global` and `match`, names; `walk` brings the nodes in order.
                row.append([item if isinstance(item, str) else item is None for item in value])
            elif isinstance(value, int) and not isinstance(value, bool):
                row.append(hex(value))
            else:
                row.append("node" if isinstance(value, ast.AST) else value)
            row.append(name)
        rows.append(row)
    return repr(rows)


def _launcher_imports(tree: ast.AST) -> list[ast.ImportFrom]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == LAUNCHER_MODULE
    ]


def _is_renamed(alias: ast.alias) -> bool:
    return alias.asname not in (None, alias.name)


def _imports_package(tree: ast.AST) -> list[ast.stmt]:
    """Imports of anything in ep_launcher."""
    package = LAUNCHER_MODULE.split(".")[0]
    return [
        node
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == package
            and not node.level
        )
        or (isinstance(node, ast.Import) and any(a.name.split(".")[0] == package for a in node.names))
    ]


# ----------------------------------------------------------------------------------------------------------
# Stitching
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A cell on its way into the file."""

    cell: Cell
    tag: str
    tree: ast.Module

    @functools.cached_property
    def bindings(self) -> list[Binding]:
        return _bindings(self.tree)


def _select(notebooks: Sequence[Notebook], tags: Sequence[str]) -> list[tuple[Cell, str]]:
    """The code cells that carry one of the tags, in order, each with its first such tag (in the tags' order)."""
    return [
        (cell, next(tag for tag in tags if tag in cell.tags))
        for notebook in notebooks
        for cell in notebook.cells
        if cell.kind == "code" and any(tag in cell.tags for tag in tags)
    ]


def sources_sha256(chosen: Iterable[tuple[Cell, str]]) -> str:
    """Content hash of exported cells: notebook, id, tag and source of each, in order."""
    rows = [[cell.notebook, cell.name, tag, cell.text] for cell, tag in chosen]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _replace_statement(lines: list[bytes], node: ast.stmt, text: bytes) -> None:
    """Put `text` where a statement stood. The number of lines stays; no text and nothing else there: blank lines."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset or 0 :]
    alone = not before.strip() and (not after.strip() or after.strip()[:1] in (b"#", b"\\"))
    if alone and not text and not before:
        lines[first] = b""
    else:
        # Inside a block, or beside another statement, something has to stand there.
        lines[first] = before + (text or b"pass") + (b"" if alone else after)
    for index in range(first + 1, last + 1):
        lines[index] = b""


def _rendered_source(cell: Cell, tree: ast.Module, left_out: set[str] | None, hoist: bool) -> str:
    """The cell's text, line for line, without the imports that the stitched file makes needless.

    left_out: the names not to import from the launcher, because the file defines them; None: all of them.
    hoist: drop `from __future__`, which the header then carries.
    """
    lines = [line.encode() for line in cell.text.split("\n")]
    changes: list[tuple[ast.stmt, bytes]] = []
    for node in _launcher_imports(tree):
        kept = [a for a in node.names if _is_renamed(a) or (left_out is not None and a.name not in left_out)]
        if len(kept) < len(node.names):
            statement = ast.ImportFrom(module=LAUNCHER_MODULE, names=kept, level=0)
            changes.append((node, ast.unparse(statement).encode() if kept else b""))
    if hoist:
        changes += [(n, b"") for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    # From the end backwards, so that a change on a line leaves the columns before it as they were.
    for node, text in sorted(
        changes, key=lambda change: (change[0].lineno, change[0].col_offset), reverse=True
    ):
        _replace_statement(lines, node, text)
    return b"\n".join(lines).decode().rstrip("\n")


LEGEND = """
T tokens, D hidden, F feed-forward, E experts, L local experts, K top-k, R received rows, W ranks.""".strip()

LAUNCHER_DOC = f'''{GENERATED_LINE}`make launcher`.

The mixture-of-experts training program of the book, stitched from the tagged code cells of its chapters:

    torchrun --nproc_per_node=2 ep_launcher/launcher.py --steps 2000

Each cell stands below a line that names its notebook and its id, line for line as in the notebook; imports
from this file itself are blanked. Tracebacks of this program name the cells.

Shape letters, in names and comments:
{LEGEND}
"""'''

OTHER_DOC = f'''{GENERATED_LINE}again:

    python tools/extract.py [NB...] --tags TAG... --output FILE

Each cell stands below a line that names its notebook and its id, line for line as in the notebook.
"""'''

# The only import-time effect a stitched file may have, and only where it imports from the book's package.
FIND_PACKAGE = """
# The cells below import from the book's package: look for it in the folders around this file.
import sys as _sys  # noqa: E402
from pathlib import Path as _Path  # noqa: E402

for _folder in _Path(__file__).resolve().parents:
    if (_folder / "ep_launcher" / "launcher.py").is_file():
        if str(_folder) not in _sys.path:
            _sys.path.insert(0, str(_folder))
        break
"""


def _header(
    exported: Sequence[Exported], digest: str, is_launcher: bool, future: Sequence[str], finds: bool
) -> str:
    notebooks = dict.fromkeys(e.cell.notebook for e in exported)
    tags = dict.fromkeys(e.tag for e in exported)
    parts = [
        LAUNCHER_DOC if is_launcher else OTHER_DOC,
        "",
        "# Cells bring their own imports, which so stand between definitions, repeat, and are sorted by cell:",
        "# ruff: noqa: E402, F811, I001",
        "",
    ]
    if future:
        parts += [f"from __future__ import {', '.join(future)}", ""]
    parts += ["# Stitched from:", *(f"#   {notebook}" for notebook in notebooks)]
    parts += ["# the cells tagged " + _one_line(", ".join(tags)) + "."]
    parts += ["# Of the notebook, id, tag and source of each:", f'SOURCES_SHA256 = "{digest}"']
    return "\n".join(parts) + "\n" + (FIND_PACKAGE if finds else "")


def _footer() -> str:
    sources = [inspect.getsource(function).rstrip("\n") for function in HOOK_FUNCTIONS]
    guard = 'if __name__ == "__main__":\n    import sys\n\n    install_traceback_hook()\n    sys.exit(main())'
    return "\n\n\n".join([f"\n\n{END_MARKER}\n" + sources[0], *sources[1:], guard]) + "\n"


def _body(rows: Iterable[tuple[Cell, str, str]]) -> str:
    """The part between header and footer, from (cell, tag, rendered source) rows."""
    out, section = [], None
    for cell, tag, source in rows:
        if (tag, cell.notebook) != section:
            section = (tag, cell.notebook)
            out.append(f"\n\n{BANNER_RULE}\n# {_one_line(tag)}: {cell.notebook}\n{BANNER_RULE}\n")
        out.append(f"\n\n# %% {cell.label}\n{source}\n")
    return "".join(out)


def _has_main_guard(tree: ast.Module) -> bool:
    tests = [node.test for node in tree.body if isinstance(node, ast.If)]
    return any(getattr(part, "value", None) == "__main__" for test in tests for part in ast.walk(test))


def _assemble(exported: Sequence[Exported], is_launcher: bool) -> str:
    """The stitched file's text. Raises Refused where the cells do not make one program together."""
    digest = sources_sha256((e.cell, e.tag) for e in exported)
    defined = {b.name for e in exported for b in e.bindings if b.kind != "import"}
    futures = dict.fromkeys(
        alias.name
        for e in exported
        for node in e.tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
        for alias in node.names
    )
    # An import of the launcher stays where it brings a name that this file does not define.
    keeps = any(
        not isinstance(node, ast.ImportFrom)
        or node.module != LAUNCHER_MODULE
        or any(_is_renamed(alias) or alias.name not in defined for alias in node.names)
        for e in exported
        for node in _imports_package(e.tree)
    )
    finds = keeps and not is_launcher
    rows = [
        (e.cell, e.tag, _rendered_source(e.cell, e.tree, None if is_launcher else defined, hoist=True))
        for e in exported
    ]
    has_main = any(b.name == "main" and b.kind == "def" for e in exported for b in e.bindings)
    guarded = any(_has_main_guard(e.tree) for e in exported)
    footer = _footer() if has_main and not guarded else ""
    text = _header(exported, digest, is_launcher, sorted(futures), finds) + _body(rows) + footer
    try:
        _quiet_compile(text)
    except NOT_PYTHON as error:
        place = locate_cell(_markers_in(text), getattr(error, "lineno", None) or 1)
        what = getattr(error, "msg", None) or type(error).__name__
        raise Refused(
            [f"{place or exported[0].cell.notebook}: stitched, a syntax error: {what}; mend it"]
        ) from None
    return text


def _markers_in(text: str) -> list[tuple[int, str]]:
    """`read_cell_markers` for a text in memory."""
    found = ((number, MARKER_LIKE.fullmatch(row)) for number, row in enumerate(text.split("\n"), 1))
    return [(number, match[1] or "") for number, match in found if match]


def _parse_chosen(
    chosen: Sequence[tuple[Cell, str]],
    languages: dict[str, str],
    problems: Problems,
    feature_version: tuple[int, int] | None = None,
) -> list[Exported]:
    """The chosen cells with their syntax trees; those that have none are noted and left out."""
    exported: list[Exported] = []
    for cell, tag in chosen:
        language = cell.language or languages[cell.notebook]
        if cell.source is None:
            problems.add(
                cell, 1, "has no source text (a string or a list of strings); save it again from Jupyter"
            )
        elif language and not re.fullmatch(r"i?python[\d.]*", language):
            problems.add(cell, 1, f"is written in {language:.40}, not Python; take the tag off")
        else:
            tree = _parse(cell, problems, feature_version)
            if tree is not None:
                exported.append(Exported(cell, tag, tree))
    return exported


def _refuse_reserved(exported: Sequence[Exported], problems: Problems) -> None:
    for e in exported:
        for b in e.bindings:
            if b.name in RESERVED_NAMES:
                problems.add(
                    e.cell, b.line, f"`{b.name}` is a name that tools/extract.py adds itself; rename it"
                )


def stitch_any(notebooks: Sequence[Notebook], tags: Sequence[str]) -> tuple[str, list[Exported]]:
    """Stitch notebooks that follow no rules of ours. Raises Refused where there is no program in them."""
    problems = Problems()
    for notebook in notebooks:
        for cell in notebook.cells:
            if isinstance(cell.raw_tags, str) and set(re.split(r"[,;\s]+", cell.raw_tags)) & set(tags):
                problems.add(cell, 1, f"its tags are a string ({_brief(cell.raw_tags)}); make them a list")
    languages = {notebook.name: notebook.language for notebook in notebooks}
    exported = _parse_chosen(_select(notebooks, tags), languages, problems)
    _refuse_reserved(exported, problems)
    problems.raise_if_any()
    if not exported:
        raise Refused([f"{_listing(notebooks)}: no code cell is tagged {' or '.join(tags)}; check the tags"])
    return _assemble(exported, is_launcher=False), exported


def _listing(notebooks: Sequence[Notebook]) -> str:
    return ", ".join(n.name for n in notebooks)


# ----------------------------------------------------------------------------------------------------------
# The book's cell rules
# ----------------------------------------------------------------------------------------------------------

SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
# What Jupyter makes up by itself: eight hex digits (one of them a digit, so that a word may pass), or a UUID.
GENERATED_ID = re.compile(r"(?=.*\d)[0-9a-f]{8}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# What a constant's value may call while the file is imported: what makes a value and does nothing else.
PURE_CALLS = frozenset(
    """
    abs all any bool bytes complex dict divmod enumerate filter float frozenset getattr globals hasattr hash int
    isinstance issubclass iter len list map max min next object pow range repr reversed round set slice sorted str
    sum tuple type zip field partial namedtuple TypeVar ParamSpec NewType NamedTuple TypedDict Path PurePath
    Fraction Decimal MappingProxyType OrderedDict Counter defaultdict deque ContextVar Lock RLock
    re.compile threading.local threading.Lock threading.RLock enum.auto auto operator.itemgetter itemgetter
    operator.attrgetter attrgetter struct.Struct struct.calcsize dataclasses.field functools.partial
    collections.namedtuple collections.Counter collections.OrderedDict collections.defaultdict collections.deque
    types.MappingProxyType fractions.Fraction decimal.Decimal pathlib.Path Path.cwd pathlib.Path.cwd
    contextvars.ContextVar typing.TypeVar typing.ParamSpec typing.NewType logging.getLogger
    importlib.util.find_spec torch.device torch.finfo torch.iinfo torch.Size tl.constexpr property staticmethod
    classmethod
    """.split()
)
PURE_METHODS = frozenset(
    """
    absolute as_posix casefold copy count difference encode endswith format format_map get index intersection
    is_relative_to items join joinpath keys lower lstrip relative_to resolve rsplit rstrip split splitlines
    startswith strip symmetric_difference title union upper values with_name with_stem with_suffix
    """.split()
)


def _check_structure(notebooks: Sequence[Notebook], problems: Problems) -> None:
    """Format, ids, tags and prose of every cell, exported or not."""
    owners: dict[str, str] = {}
    for notebook in notebooks:
        if type(notebook.minor) is not int or notebook.minor != 5:
            what = f"is of nbformat 4.{_brief(notebook.minor)}; save it as 4.5"
            problems.lines.append(f"{notebook.name}: {what}")
        previous = None
        for cell in notebook.cells:
            if cell.kind not in ("code", "markdown", "raw"):
                problems.add(
                    cell, 1, f"is of unknown cell type {_brief(cell.kind)}; make it code or markdown"
                )
            if cell.source is None:
                problems.add(cell, 1, "has no source text; save the notebook again from Jupyter")
            _check_id(cell, owners, problems)
            _check_tags(cell, problems)
            has_prose = previous is not None and previous.kind == "markdown" and previous.text.strip()
            if cell.kind == "code" and not has_prose:
                problems.add(cell, 1, "no prose stands before this code cell; put a markdown cell there")
            previous = cell


def _check_id(cell: Cell, owners: dict[str, str], problems: Problems) -> None:
    if cell.id is None:
        problems.add(cell, 1, "has no id; give it one like `dispatch-all-gather`")
    elif not (isinstance(cell.id, str) and SLUG.fullmatch(cell.id) and len(cell.id) <= 64):
        what = f"its id {_brief(cell.id, 70)} is no slug of a-z, 0-9 and -, at most 64 long; choose another"
        problems.add(cell, 1, what)
    elif GENERATED_ID.fullmatch(cell.id):
        problems.add(cell, 1, "its id was generated; choose one that says what the cell is about")
    elif cell.id in owners:
        problems.add(cell, 1, f"its id is taken by a cell of {owners[cell.id]}; choose another")
    else:
        owners[cell.id] = cell.notebook


def _check_tags(cell: Cell, problems: Problems) -> None:
    if cell.raw_tags is not None and (
        not isinstance(cell.raw_tags, list) or len(cell.tags) < len(cell.raw_tags)
    ):
        problems.add(cell, 1, "its tags are no list of strings; make them one")
        return
    roles = [tag for tag in dict.fromkeys(cell.tags) if tag in ROLE_TAGS]
    if cell.kind != "code":
        if roles:
            problems.add(cell, 1, f"the tag `{roles[0]}` is for code cells; take it off this one")
        return
    for tag in cell.tags:
        if tag not in ROLE_TAGS + SIDE_TAGS:
            known = ", ".join(ROLE_TAGS + SIDE_TAGS)
            problems.add(cell, 1, f"unknown tag `{tag:.40}`; the tags are {known}")
    if len(roles) > 1:
        problems.add(cell, 1, f"two role tags, `{roles[0]}` and `{roles[1]}`; keep one")
    if not roles:
        problems.add(cell, 1, f"no role tag; give it exactly one of {', '.join(ROLE_TAGS)}")


def _code_lines(source: str, tree: ast.Module) -> int:
    """Lines with code on them: not blank, not only comment, not a docstring."""
    skip = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    covered: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source + "\n", newline="\n").readline):
        if token.type not in skip:
            covered.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    covered -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(covered)


def _effect_in_value(node: ast.AST, classes: set[str]) -> ast.AST | None:
    """The first part of an expression that does more than make a value; lambdas' bodies do not run."""
    if isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)):
        return node
    if isinstance(node, ast.Call):
        name = _dotted(node.func)
        is_method = isinstance(node.func, ast.Attribute) and node.func.attr in PURE_METHODS
        if not (name in PURE_CALLS or name in classes or name.startswith("math.") or is_method):
            return node
    parts = node.args.defaults if isinstance(node, ast.Lambda) else ast.iter_child_nodes(node)
    return next((effect for part in parts if (effect := _effect_in_value(part, classes))), None)


def _effects(body: Iterable[ast.stmt], classes: set[str]) -> Iterator[ast.AST]:
    """What runs when a cell is imported, and is neither an import, nor a constant, nor a definition.

    `if` and `try` may hold such statements, as in `try: import triton`. Decorators may register.
    """

    def values(*nodes: ast.AST | None) -> Iterator[ast.AST]:
        found = (_effect_in_value(node, classes) for node in nodes if node is not None)
        yield from (effect for effect in found if effect)

    for node in body:
        match node:
            case ast.Import() | ast.Pass() | ast.Expr(value=ast.Constant()):
                pass
            case ast.ImportFrom():
                if node.names[0].name == "*":
                    yield node
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from values(*node.args.defaults, *node.args.kw_defaults)
            case ast.ClassDef():
                yield from values(*node.bases, *(keyword.value for keyword in node.keywords))
                yield from _effects(node.body, classes)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                parts = [part for target in targets for part in ast.walk(target)]
                if any(isinstance(part, (ast.Attribute, ast.Subscript)) for part in parts):
                    yield node
                else:
                    yield from values(node.value)
            case ast.If():
                yield from values(node.test)
                yield from _effects(node.body + node.orelse, classes)
            case ast.Try():
                for block in _blocks(node):
                    yield from _effects(block, classes)
            case _:
                yield node


def _check_exported(e: Exported, classes: set[str], problems: Problems) -> None:
    """The rules for one exported cell (or one of the seed) on its own."""
    for node in e.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            what = "`from __future__` would change the whole file; leave it out"
            problems.add(e.cell, node.lineno, what)
    for node in _effects(e.tree.body, classes):
        code = " ".join((ast.get_source_segment(e.cell.text, node) or "").split("\n")[0].split())
        if isinstance(node, ast.ImportFrom):
            what = f"`{code:.60}` hides which names it brings; import them by name"
        else:
            what = f"`{code:.60}` runs when the file is imported; move it into a function or a demo cell"
        problems.add(e.cell, getattr(node, "lineno", 1), what)
    if not e.tree.body:
        problems.add(e.cell, 1, "an exported cell without code; delete it, or make it markdown")
    if e.tag in EXPORTED_TAGS:
        count = _code_lines(e.cell.text, e.tree)
        limit = (
            MAX_CLASS_LINES if any(isinstance(node, ast.ClassDef) for node in e.tree.body) else MAX_CODE_LINES
        )
        if count > limit:
            what = f"{count} lines of code, docstrings and comments not counted, and {limit} is the most"
            problems.add(e.cell, 1, f"{what}; split the cell")


def _check_registrations(exported: Sequence[Exported], problems: Problems) -> None:
    """Refuses `@register("KIND", ...)` where KIND is no key of the book's literal REGISTRIES."""
    known: set[str] = set()
    for e in exported:
        for node in e.tree.body:
            target = node.target if isinstance(node, ast.AnnAssign) else None
            if (
                isinstance(target, ast.Name)
                and target.id == "REGISTRIES"
                and isinstance(node.value, ast.Dict)
            ):
                known = {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    for e in exported if known else ():
        for node in e.tree.body:
            for call in getattr(node, "decorator_list", ()):
                is_register = isinstance(call, ast.Call) and _dotted(call.func) == "register" and call.args
                kind = call.args[0].value if is_register and isinstance(call.args[0], ast.Constant) else None
                if kind is not None and kind not in known:
                    what = f"there is no kind {kind!r} to register; take one of {', '.join(sorted(known))}"
                    problems.add(e.cell, call.lineno, what)


def _own_bindings(e: Exported) -> list[Binding]:
    """The names that a cell brings, those imported from the launcher left out."""
    return [b for b in e.bindings if not b.content.startswith(f"{LAUNCHER_MODULE}:")]


def _check_duplicates(exported: Sequence[Exported], problems: Problems) -> None:
    """A top-level name is defined once; the same import may stand in many cells."""
    owners: dict[str, tuple[Exported, Binding]] = {}
    for e in exported:
        for b in _own_bindings(e):
            first, known = owners.setdefault(b.name, (e, b))
            same_statement = first is e and known.statement == b.statement
            same_import = b.content and b.content == known.content
            if same_statement or same_import or b.name == "_":
                continue
            where = f"{first.cell.label}:{known.line}"
            if b.kind == known.kind == "import":
                what = f"`{b.name}` is something else in {where}; import it the same way"
            else:
                what = f"`{b.name}` is defined a second time, first in {where}; rename one"
            problems.add(e.cell, b.line, what)


MODULE_NAMES = frozenset(dir(builtins)) | set(
    "__file__ __name__ __doc__ __package__ __spec__ __loader__ __builtins__ __annotations__ __dict__ "
    "__module__ __qualname__ __debug__ __class__ __path__".split()
)


def _global_reads(source: str) -> Iterator[tuple[str, int]]:
    """(name, line of its scope) for each name that is looked up in the module or in the builtins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = [symtable.symtable(source, "<cell>", "exec")]
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (
                symbol.is_global()
                or (table.get_type() == "module" and not symbol.is_assigned() and not symbol.is_imported())
            ):
                yield symbol.get_name(), table.get_lineno()


def _reads_on_import(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """The names that a statement looks up while the file is imported: function bodies are left out."""
    inner: list[ast.AST] = []
    match node:
        case ast.Name():
            if isinstance(node.ctx, ast.Load) and node.id not in local:
                yield node
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            arguments = ast.walk(node.args)
            annotations = [a.annotation for a in arguments if isinstance(a, ast.arg) and a.annotation]
            defaults = [d for d in (*node.args.defaults, *node.args.kw_defaults, node.returns) if d]
            inner = [*node.decorator_list, *annotations, *defaults]
        case ast.Lambda():
            inner = [d for d in (*node.args.defaults, *node.args.kw_defaults) if d]
        case ast.ClassDef():
            for part in (*node.decorator_list, *node.bases, *node.keywords):
                yield from _reads_on_import(part, local)
            own = {b.name for b in _bindings(ast.Module(body=node.body, type_ignores=[]))}
            inner, local = list(node.body), local | own
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            inner = list(ast.iter_child_nodes(node))
            local = local | {name.id for g in node.generators for name in _target_names(g.target)}
        case _:
            inner = list(ast.iter_child_nodes(node))
    for part in inner:
        yield from _reads_on_import(part, local)


def _check_names(exported: Sequence[Exported], problems: Problems) -> None:
    """Every name is defined somewhere in the file, and before what uses it at import."""
    owners: dict[str, Exported] = {}
    for e in exported:
        for b in e.bindings:
            owners.setdefault(b.name, e)
    so_far: set[str] = set()
    for e in exported:
        nodes = [node for node in ast.walk(e.tree) if isinstance(node, ast.Name)]
        for name, scope_line in sorted(set(_global_reads(e.cell.text + "\n"))):
            if name not in owners and name not in MODULE_NAMES:
                lines = [node.lineno for node in nodes if node.id == name]
                line = min((n for n in lines if n >= scope_line), default=min(lines, default=scope_line))
                what = f"`{name}` is not defined in any exported cell; define or import it"
                problems.add(e.cell, max(line, 1), what)
        for position, statement in enumerate(e.tree.body):
            names = {b.name for b in e.bindings if b.statement == position}
            if isinstance(statement, (ast.If, ast.Try)):
                so_far |= names
            for node in _reads_on_import(statement):
                if node.id in owners and node.id not in so_far and node.id not in MODULE_NAMES:
                    where = owners[node.id].cell.label
                    what = (
                        f"`{node.id}` is needed at import, but is defined further down, in {where}; move one"
                    )
                    problems.add(e.cell, node.lineno, what)
            so_far |= names


def _check_launcher_imports(
    notebooks: Sequence[Notebook], book: Sequence[Exported], chosen: Sequence[Exported], problems: Problems
) -> None:
    """A chapter may import from the launcher what it or an earlier chapter defines, under its own name."""
    order = {notebook.name: number for number, notebook in enumerate(notebooks)}
    owners: dict[str, str] = {}
    for e in book:
        for b in _own_bindings(e):
            owners.setdefault(b.name, e.cell.notebook)
    if "main" in owners:
        owners |= dict.fromkeys(sorted(RESERVED_NAMES), notebooks[0].name)
    owners["SOURCES_SHA256"] = notebooks[0].name
    in_book = {(e.cell.notebook, e.cell.position) for e in book}
    trees = {(e.cell.notebook, e.cell.position): e.tree for e in (*book, *chosen)}
    for cell in (cell for notebook in notebooks for cell in notebook.cells if cell.kind == "code"):
        key = (cell.notebook, cell.position)
        tree = trees[key] if key in trees else _parse_leniently(cell.text)
        if tree is None:
            continue
        imports = _launcher_imports(tree)
        if key in in_book:
            for node in _imports_package(tree):
                if node not in imports:
                    what = f"write it as `from {LAUNCHER_MODULE} import` and names"
                    problems.add(cell, node.lineno, f"the launcher cannot import its own package so; {what}")
        for node in imports:
            for alias in node.names:
                what = None
                if alias.name == "*":
                    what = "`*` hides which names it imports; import them by name"
                elif alias.name not in owners:
                    what = f"imports `{alias.name}` from the launcher, but no exported cell defines it"
                    what += "; check the name"
                elif order[owners[alias.name]] > order[cell.notebook]:
                    what = f"imports `{alias.name}`, which only a later chapter defines"
                    what += f" ({owners[alias.name]}); move the import, or the definition"
                elif key in in_book and _is_renamed(alias):
                    what = f"imports `{alias.name}` under another name; import it under its own"
                if what:
                    problems.add(cell, node.lineno, what)


def _check_seed(notebooks: Sequence[Notebook], book: Sequence[Exported], problems: Problems) -> None:
    """The seed's way has names of its own: in a notebook's kernel it lives beside the book's."""
    owners = {b.name: f"{e.cell.label}:{b.line}" for e in reversed(book) for b in reversed(_own_bindings(e))}
    for cell, _ in _select(notebooks, ["seed"]):
        tree = _parse_leniently(cell.text)
        for b in _bindings(tree) if tree else ():
            if b.kind != "import" and b.name in owners:
                what = (
                    f"`{b.name}` is the name of an exported definition, {owners[b.name]}; rename the seed's"
                )
                problems.add(cell, b.line, what)


def stitch_book(notebooks: Sequence[Notebook], tags: Sequence[str]) -> tuple[str, list[Exported]]:
    """Stitch this repo's notebooks, with every cell rule checked. Raises Refused with all that breaks one.

    Checked for every cell: format, id, tags, prose before code, imports from the launcher; for exported cells,
    whatever the tags asked for: they are Python, and define a name once. For every cell that carries one of
    `tags`: it holds imports, constants and definitions only, its names are defined, and in time; exported ones
    keep to 40 lines of code.
    """
    problems = Problems()
    _check_structure(notebooks, problems)
    is_launcher = set(tags) == set(EXPORTED_TAGS)
    languages = {notebook.name: notebook.language for notebook in notebooks}
    unread = Problems()
    book = _parse_chosen(_select(notebooks, EXPORTED_TAGS), languages, unread, OLDEST_PYTHON)
    wanted = _parse_chosen(_select(notebooks, tags), languages, unread, OLDEST_PYTHON)
    classes = {node.name for e in (*book, *wanted) for node in e.tree.body if isinstance(node, ast.ClassDef)}
    for e in wanted:
        try:
            _check_exported(e, classes, problems)
        except RecursionError:
            unread.add(e.cell, 1, "is nested too deeply to be checked; simplify it")
    problems.lines += unread.lines
    _refuse_reserved(wanted, problems)
    _check_duplicates(book, problems)
    _check_registrations(book, problems)
    _check_seed(notebooks, book, problems)
    if not is_launcher:
        _check_duplicates(wanted, problems)
    if not unread.lines:
        # With a cell missing, its names would seem to be undefined.
        _check_launcher_imports(notebooks, book, wanted, problems)
        _check_names(wanted, problems)
    problems.raise_if_any()
    if not wanted:
        raise Refused([f"{_listing(notebooks)}: no code cell is tagged {' or '.join(tags)}; tag one"])
    return _assemble(wanted, is_launcher), wanted


# ----------------------------------------------------------------------------------------------------------
# For notebooks and other tools
# ----------------------------------------------------------------------------------------------------------


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


def _body_in(text: str) -> str:
    """The part of a stitched file between its header and its footer."""
    start = text.find(f"\n\n{BANNER_RULE}\n")
    end = text.find(f"\n\n{END_MARKER}\n")
    return text[start if start >= 0 else len(text) : end if end >= 0 else len(text)]


def _cells_in(body: str) -> dict[str, str]:
    """{cell's label: its text in a stitched file}, blank lines and banners after it cut off."""
    banner = re.compile(rf"\n+{re.escape(BANNER_RULE)}\n# .*\n{re.escape(BANNER_RULE)}\n*\Z")
    lines = body.split("\n")
    markers = [(n, label) for n, label in _markers_in(body) if label]
    ends = [n - 1 for n, _ in markers[1:]] + [len(lines)]
    return {
        label: banner.sub("", "\n".join(lines[start:end])).rstrip("\n")
        for (start, label), end in zip(markers, ends, strict=True)
    }


def assert_fresh(root: str | os.PathLike[str] | None = None) -> None:
    """Check that ep_launcher/launcher.py holds what the saved notebooks say, and that this kernel imported it.

    root: the repo (default: the one this file is in). Raises RuntimeError, one line, naming the first cells that
    differ. Compares texts by content hash and does not check the cell rules: well under 0.2 s.
    """
    root = Path(root).resolve() if root else ROOT
    path = root / LAUNCHER
    mend = "run `make launcher`, restart the kernel"
    try:
        text = path.read_text("utf-8")
        paths = book_notebooks(root)
        notebooks = _read_all(paths, [f"notebooks/{_one_line(p.name)}" for p in paths])
    except FileNotFoundError:
        raise RuntimeError(f"{LAUNCHER} does not exist: {mend}") from None
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{LAUNCHER} cannot be read ({error}): {mend}") from None
    except Refused as refused:
        raise RuntimeError(refused.lines[0]) from None
    chosen = _select(notebooks, EXPORTED_TAGS)
    rows = [(cell, tag, _fresh_source(cell)) for cell, tag in chosen]
    match = re.search(r'^SOURCES_SHA256 = "([0-9a-f]{64})"$', text, re.MULTILINE)
    digest = match[1] if match else ""
    body = _body_in(text)
    is_old = digest != sources_sha256(chosen)
    if is_old or body != _body(rows):
        stored, wanted = _cells_in(body), {cell.label: source for cell, _, source in rows}
        labels = [label for label in (*wanted, *stored) if stored.get(label) != wanted.get(label)]
        names = list(dict.fromkeys(labels)) or ["the order or the tags of the notebooks' cells"]
        more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
        what = "is older than" if is_old else "was edited by hand; it differs from"
        raise RuntimeError(f"{LAUNCHER} {what} {', '.join(names[:3])}{more}: save, {mend}")
    module = sys.modules.get(LAUNCHER_MODULE)
    if module is not None and _same_file(Path(getattr(module, "__file__", None) or ""), path):
        if getattr(module, "SOURCES_SHA256", digest) != digest:
            raise RuntimeError(f"this kernel imported an older {LAUNCHER}: restart the kernel")


def _fresh_source(cell: Cell) -> str:
    """What launcher.py should hold for a cell; a cell that is no Python stands for itself."""
    if LAUNCHER_MODULE in cell.text:
        try:
            return _rendered_source(cell, _quiet_parse(cell.text + "\n"), None, hoist=False)
        except NOT_PYTHON:
            pass
    return cell.text.rstrip("\n")


def _definitions(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(name, content) for what a module's top level binds, in order; no content where it is no def or class."""
    nodes = {
        (node.name, node.lineno): node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    for b in _bindings(tree):
        yield b.name, _fingerprint(nodes[b.name, b.line]) if b.kind == "def" else None


def check_kernel_definitions(namespace: dict, root: str | os.PathLike[str] | None = None) -> None:
    """Check that functions and classes defined in a kernel are those that launcher.py would run.

    namespace: the kernel's variables (`globals()` in a notebook); its `In` holds the sources executed so far, and
    without it nothing is compared. Of every name that launcher.py defines, the definition executed last counts;
    an import from the launcher ends its claim. Spaces and comments do not matter, docstrings do. Raises
    RuntimeError, one line, with the names that differ.

    Limits: a cell that failed halfway counts as executed; constants are not compared, nor is what came in by a
    cell magic, `%run`, `exec` or assignment to an attribute. Cost: parses launcher.py and the history once.
    """
    history = namespace.get("In")
    path = (Path(root).resolve() if root else ROOT) / LAUNCHER
    if not isinstance(history, (list, tuple)):
        return
    try:
        stitched = _quiet_parse(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RuntimeError(f"{LAUNCHER} does not exist: run `make launcher`") from None
    except (OSError, *NOT_PYTHON) as error:
        raise RuntimeError(
            f"{LAUNCHER} cannot be read ({_one_line(str(error))}): run `make launcher`"
        ) from None
    in_file = {name: content for name, content in _definitions(stitched) if content}
    in_kernel: dict[str, str | None] = {}
    for source in history:
        # A cell magic may run its body in this kernel, or, as `%%ranks` does, anywhere else.
        is_plain = isinstance(source, str) and not source.lstrip().startswith("%%")
        tree = _parse_leniently(source) if is_plain else None
        in_kernel |= dict(_definitions(tree)) if tree else {}
    names = [
        name
        for name, content in in_file.items()
        if name in namespace and in_kernel.get(name) and in_kernel[name] != content
    ]
    if names:
        listed = ", ".join(f"`{name}`" for name in names)
        mend = "save the notebook, make launcher, rerun"
        raise RuntimeError(f"launcher.py runs another {listed} than this kernel: {mend}")


# ----------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------


def book_notebooks(root: Path) -> list[Path]:
    """The repo's notebooks in the book's order."""
    return sorted((p for p in (root / "notebooks").glob("*.ipynb") if p.name[0] != "."), key=lambda p: p.name)


def _read_all(paths: Sequence[Path], names: Sequence[str]) -> list[Notebook]:
    notebooks, lines = [], []
    for path, name in sorted(zip(paths, names, strict=True), key=lambda pair: pair[1]):
        try:
            notebooks.append(read_notebook(path, name))
        except Refused as refused:
            lines += refused.lines
    if lines:
        raise Refused(lines)
    return notebooks


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Refused([f"extract.py: {message}; see --help"])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="extract.py",
        description="Stitch tagged notebook cells into one Python file.",
        epilog="Without NB: the notebooks of this repo, their cell rules checked. Notebooks are taken in the order "
        "of their names.",
    )
    parser.add_argument(
        "notebooks", nargs="*", metavar="NB", help="notebooks to read (default: notebooks/*.ipynb)"
    )
    parser.add_argument(
        "--tags", nargs="+", metavar="TAG", help=f"tags to export (default: {' '.join(EXPORTED_TAGS)})"
    )
    parser.add_argument(
        "--output", metavar="F", help=f"file to write (default, without NB and TAG: {LAUNCHER})"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 and show a diff where F is stale"
    )
    return parser.parse_intermixed_args(argv)


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except (OSError, ValueError):
        return False


def _choose_notebooks(arguments: argparse.Namespace, root: Path) -> list[Notebook]:
    if not arguments.notebooks:
        paths = book_notebooks(root)
        if not paths:
            raise Refused(["notebooks: holds no notebook (*.ipynb); add one"])
        return _read_all(paths, [f"notebooks/{_one_line(p.name)}" for p in paths])
    if any("\0" in given for given in arguments.notebooks):
        raise Refused(["extract.py: a notebook's path holds a NUL character; check the command"])
    paths = [Path(given) for given in arguments.notebooks]
    for index, path in enumerate(paths):
        if any(path == other or _same_file(path, other) for other in paths[:index]):
            raise Refused([f"{path}: is given twice; name each notebook once"])
    for tag in arguments.tags or ():
        if tag.endswith(".ipynb"):
            raise Refused([f"{tag}: stands among the tags; name notebooks before --tags"])
    return _read_all(paths, _display_names(paths, root))


def _choose_output(arguments: argparse.Namespace, root: Path) -> tuple[Path, str]:
    """The file to write and the name to show for it."""
    if arguments.output is None:
        if arguments.notebooks or (arguments.tags and set(arguments.tags) != set(EXPORTED_TAGS)):
            raise Refused([f"extract.py: --output is missing ({LAUNCHER} is the whole book's); name a file"])
        return root / LAUNCHER, LAUNCHER
    shown = _one_line(arguments.output)
    if not arguments.output or "\0" in arguments.output:
        raise Refused([f"extract.py: --output {shown!r} is no file name; name a file"])
    path = Path(os.path.realpath(arguments.output))
    inputs = [Path(p) for p in arguments.notebooks] or book_notebooks(root)
    if any(path == Path(os.path.realpath(p)) or _same_file(path, p) for p in inputs):
        raise Refused([f"{shown}: is one of the notebooks read; write to another file"])
    if os.path.exists(path) and not os.path.isfile(path):
        raise Refused([f"{shown}: is no regular file, so it cannot be written; name a file"])
    return path, shown


def _write(path: Path, shown: str, data: bytes) -> None:
    """Replace a file as a whole, or leave it as it was and raise Refused."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            mode = stat.S_IMODE(path.stat().st_mode)
            if not os.access(path, os.W_OK):
                raise PermissionError(13, "Permission denied")
        else:
            umask = os.umask(0)
            os.umask(umask)
            mode = 0o666 & ~umask
        handle, temporary = tempfile.mkstemp(prefix=".extract-", suffix=".tmp", dir=path.parent)
        with open(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise Refused(
            [f"{shown}: cannot be written ({_why(error)}); check the folder, or name another"]
        ) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _say(stream: io.TextIOBase, text: str) -> None:
    """Print whatever the text holds, on a terminal that may know less than Unicode."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _diff(old: bytes | None, new: str, shown: str) -> str:
    before = (old or b"").decode("utf-8", "backslashreplace").split("\n")
    name = shown if old is not None else "/dev/null"
    return "\n".join(
        difflib.unified_diff(before, new.split("\n"), name, f"{shown} (from the notebooks)", lineterm="")
    )


def _run(arguments: argparse.Namespace, root: Path) -> int:
    tags = list(dict.fromkeys(arguments.tags or EXPORTED_TAGS))
    notebooks = _choose_notebooks(arguments, root)
    path, shown = _choose_output(arguments, root)
    text, exported = (stitch_any if arguments.notebooks else stitch_book)(notebooks, tags)
    if arguments.tags:
        for tag in tags:
            if not any(tag in e.cell.tags for e in exported):
                raise Refused([f"{_listing(notebooks)}: no code cell is tagged {tag}; check the tag"])
    number = len({e.cell.notebook for e in exported})
    count = f"{len(exported)} cell{'s' * (len(exported) != 1)} from {number} notebook{'s' * (number != 1)}"
    try:
        old = path.read_bytes() if path.exists() else None
    except OSError as error:
        raise Refused([f"{shown}: cannot be read ({_why(error)}); check it"]) from None
    new = text.encode()
    if old == new:
        _say(sys.stdout, f"{shown} is up to date: {count}")
        return 0
    if arguments.check:
        _say(sys.stdout, _diff(old, text, shown))
        hint = "run `make launcher`" if shown == LAUNCHER else "run the same command without --check"
        _say(sys.stderr, f"{shown}: {'is missing' if old is None else 'is stale'}; {hint}")
        return 1
    _write(path, shown, new)
    _say(sys.stdout, f"wrote {shown}: {count}")
    return 0


def main(argv: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Run the command line; `root` is the repo (default: the one this file is in). Returns the exit code."""
    try:
        return _run(_arguments(argv), Path(root).resolve() if root else ROOT)
    except Refused as refused:
        for line in refused.lines:
            _say(sys.stderr, line)
        return 2


def _main_of_process() -> int:
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of a long diff went away; what is left of it has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(_main_of_process())
