"""Stitch tagged notebook cells into one Python file.

    python tools/extract.py                               notebooks/*.ipynb -> ep_launcher/launcher.py
    python tools/extract.py --check                       exit 1 and a diff where launcher.py is stale
    python tools/extract.py --tags seed --output build/seed.py
    python tools/extract.py NB... --tags a b --output F   any notebooks, any tags, any file

Exit code 0: written, or nothing to do. 1: `--check` found a difference. 2: refused; every reason is one line on
stderr, and the old file is as it was. The same notebooks give the same bytes: names are sorted, cells keep
their order, and nothing of the machine, the date or the Python version gets in.

Without NB the notebooks are this repo's, and the book's cell rules are checked as well (see `_check_book`). With NB
only what stitching needs is asked of them. Standard library only: the notebook library repairs missing and
duplicate ids in silence, and the ids are what this file depends on.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import difflib
import hashlib
import inspect
import io
import json
import os
import re
import stat
import sys
import symtable
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
MAX_CODE_LINES = 40

# What parse and compile raise on text that is not a program; the last four on absurdly deep or large text.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError, SystemError)


class Refused(Exception):
    """What was asked cannot be done. `lines` holds the reasons, one line each, ready for stderr."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = [_one_line(line) for line in lines]
        super().__init__("\n".join(self.lines))


# --------------------------------------------------------------------------------------------------------------
# The traceback hook. These functions are copied, as they stand, to the end of every stitched file that defines
# `main`; so they use nothing of this module, and import what they need where they need it.
# --------------------------------------------------------------------------------------------------------------


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
    """The cell and its own line for a line of the stitched file: "notebooks/x.ipynb #id:12", or "" outside cells."""
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
    """Let an uncaught exception name the notebook, cell and line it came from; the last line names the rank too."""
    import os
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

    sys.excepthook = hook


HOOK_FUNCTIONS = (read_cell_markers, locate_cell, describe_frames, install_traceback_hook)
RESERVED_NAMES = frozenset({"SOURCES_SHA256", *(function.__name__ for function in HOOK_FUNCTIONS)})
END_MARKER = "# %% added by tools/extract.py"
MARKER_LIKE = re.compile(r"# %% (?:.+ #[A-Za-z0-9_-]+|added by tools/extract\.py)")


# --------------------------------------------------------------------------------------------------------------
# Reading notebooks
# --------------------------------------------------------------------------------------------------------------


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
        if "worksheets" in data or (isinstance(version, int) and 0 < version < 4):
            upgrade = "upgrade it: jupyter nbconvert --to notebook --nbformat 4"
            raise refuse(f"is an old notebook (nbformat {version!r:.20}, worksheets); {upgrade}")
        raise refuse(
            f"is not a notebook of format 4 (nbformat is {version!r:.20}); save it from a current Jupyter"
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
    resolved = [path.resolve() for path in paths]
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


# --------------------------------------------------------------------------------------------------------------
# Looking at Python
# --------------------------------------------------------------------------------------------------------------


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
    for character, name in (("\0", "a NUL character"),):
        if character in text:
            problems.add(cell, text[: text.index(character)].count("\n") + 1, f"holds {name}; delete it")
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
                cell, number, f"`{magic:.40}` is a notebook magic, not Python; move it to an untagged cell"
            )
        else:
            what = getattr(error, "msg", None) or (
                "nested too deeply" if isinstance(error, (RecursionError, MemoryError)) else str(error)
            )
            problems.add(cell, number, f"syntax error: {what}; mend the cell")
        return None


def _parse_leniently(source: str) -> ast.Module | None:
    """The tree of a cell that may hold magics (their lines are left out), None where it still is no Python."""
    lines = ["" if MAGIC_LINE.match(line) else line for line in source.split("\n")]
    for text in (source, "\n".join(lines)):
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
        visit(statement, top, ast.dump(statement) if is_guarded_import else "")
    return found


def _dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of names (a decorator's or call's function included), else ""."""
    if isinstance(node, ast.Call):
        return _dotted(node.func)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value) if isinstance(node.value, (ast.Name, ast.Attribute)) else ""
        return f"{head}.{node.attr}" if head else ""
    return ""


def _launcher_imports(tree: ast.AST) -> list[ast.ImportFrom]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == LAUNCHER_MODULE
    ]


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


# --------------------------------------------------------------------------------------------------------------
# Stitching
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A cell on its way into the file."""

    cell: Cell
    tag: str
    tree: ast.Module

    @property
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
        kept = [a for a in node.names if a.asname or (left_out is not None and a.name not in left_out)]
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


LEGEND = "T tokens, D hidden, F feed-forward, E experts, L local experts, K top-k, R received rows, W ranks"

LAUNCHER_DOC = f'''"""GENERATED from the notebooks by tools/extract.py. Do not edit: edit a notebook, then run `make launcher`.

The mixture-of-experts training program of the book, stitched from the tagged code cells of its chapters:

    torchrun --nproc_per_node=2 ep_launcher/launcher.py --steps 2000

Each cell stands below a line that names its notebook and its id, line for line as in the notebook; imports
from this file itself are blanked. Tracebacks of this program name the cells.

Shape letters: {LEGEND}.
"""'''

OTHER_DOC = '''"""GENERATED from notebooks by tools/extract.py. Do not edit: edit a notebook, then run it again:

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
        "# Cells bring the imports they need, so imports stand between definitions and repeat, sorted cell by cell:",
        "# ruff: noqa: E402, F811, I001",
        "",
    ]
    if future:
        parts += [f"from __future__ import {', '.join(future)}", ""]
    parts += ["# Notebooks: " + ", ".join(notebooks), "# Tags: " + _one_line(", ".join(tags))]
    parts += ["# Of the notebook, id, tag and source of every cell below:", f'SOURCES_SHA256 = "{digest}"']
    return "\n".join(parts) + "\n" + (FIND_PACKAGE if finds else "")


def _footer() -> str:
    sources = [inspect.getsource(function).rstrip("\n") for function in HOOK_FUNCTIONS]
    guard = 'if __name__ == "__main__":\n    import sys\n\n    install_traceback_hook()\n    sys.exit(main())'
    return "\n\n\n".join([f"\n\n{END_MARKER}\n" + sources[0], *sources[1:], guard]) + "\n"


def _has_main_guard(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.dump(node.test) for node in tree.body)


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
        or any(alias.asname or alias.name not in defined for alias in node.names)
        for e in exported
        for node in _imports_package(e.tree)
    )
    finds = keeps and not is_launcher
    out = [_header(exported, digest, is_launcher, sorted(futures), finds)]
    section = None
    for e in exported:
        if (e.tag, e.cell.notebook) != section:
            section = (e.tag, e.cell.notebook)
            rule = "# " + "=" * 108
            out.append(f"\n\n{rule}\n# {_one_line(e.tag)}: {e.cell.notebook}\n{rule}\n")
        source = _rendered_source(e.cell, e.tree, None if is_launcher else defined, hoist=True)
        out.append(f"\n\n# %% {e.cell.label}\n{source}\n")
    has_main = any(b.name == "main" and b.kind == "def" for e in exported for b in e.bindings)
    if has_main and not any(_has_main_guard(e.tree) for e in exported):
        out.append(_footer())
    text = "".join(out)
    try:
        _quiet_compile(text)
    except NOT_PYTHON as error:
        place = _locate_in_text(text, getattr(error, "lineno", None) or 1)
        what = getattr(error, "msg", None) or type(error).__name__
        raise Refused(
            [f"{place or exported[0].cell.notebook}: stitched, a syntax error: {what}; mend it"]
        ) from None
    return text


def _locate_in_text(text: str, line: int) -> str:
    found = [(n, MARKER_LIKE.fullmatch(row)) for n, row in enumerate(text.split("\n"), 1)]
    markers = [(n, match[0][5:] if " #" in match[0] else "") for n, match in found if match]
    return locate_cell(markers, line)


def _parse_chosen(
    chosen: Sequence[tuple[Cell, str]], languages: dict[str, str], problems: Problems
) -> list[Exported]:
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
            tree = _parse(cell, problems)
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
                problems.add(cell, 1, f"its tags are a string ({cell.raw_tags!r:.40}); make them a list")
    languages = {notebook.name: notebook.language for notebook in notebooks}
    exported = _parse_chosen(_select(notebooks, tags), languages, problems)
    _refuse_reserved(exported, problems)
    problems.raise_if_any()
    if not exported:
        raise Refused([f"{_listing(notebooks)}: no code cell is tagged {' or '.join(tags)}; check the tags"])
    return _assemble(exported, is_launcher=False), exported


def _listing(notebooks: Sequence[Notebook]) -> str:
    return ", ".join(n.name for n in notebooks)


def stitch_book(notebooks: Sequence[Notebook], tags: Sequence[str]) -> tuple[str, list[Exported]]:
    """Stitch this repo's notebooks, with every cell rule checked. Raises Refused with all that breaks one."""
    problems = Problems()
    is_launcher = set(tags) == set(EXPORTED_TAGS)
    languages = {notebook.name: "" for notebook in notebooks}
    exported = _parse_chosen(_select(notebooks, tags), languages, problems)
    _refuse_reserved(exported, problems)
    problems.raise_if_any()
    if not exported:
        where = _listing(notebooks) or "notebooks"
        raise Refused([f"{where}: no code cell is tagged {' or '.join(tags)}; tag one, or check the tags"])
    return _assemble(exported, is_launcher), exported


# --------------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------------


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
    if path.exists() and not path.is_file():
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
    path, shown = _choose_output(arguments, root)
    notebooks = _choose_notebooks(arguments, root)
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


if __name__ == "__main__":
    sys.exit(main())
