"""Notebooks as they are stored, and the Python in their cells.

Standard library only: the notebook library repairs missing and duplicate ids in silence, and the ids are what the
stitched file depends on.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "ep_launcher/launcher.py"
LAUNCHER_MODULE = "ep_launcher.launcher"

EXPORTED_TAGS = ("theory", "all_to_all", "experts", "training", "performance", "routing")
OTHER_ROLES = ("setup", "seed", "parameters", "demo", "check", "launch", "plot", "exercise", "solution")
ROLE_TAGS = EXPORTED_TAGS + OTHER_ROLES
SIDE_TAGS = ("hide-input",)

MARKER = re.compile(r"# %% (?:(.+ #[A-Za-z0-9_-]+)|added by tools/extract\.py)")
MAGIC = re.compile(r"\s*(?:[%!?]|[\w.]+\s*\?+\s*$|[\w., ]+=\s*[%!])")
# What parse and compile raise on text that is not a program; the last four on absurdly deep or large text.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError, SystemError)


class Refused(Exception):
    """What was asked cannot be done. `lines` holds the reasons, one line each, ready for stderr."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = [one_line(line) for line in dict.fromkeys(lines)]
        super().__init__("\n".join(self.lines))


def one_line(text: str) -> str:
    """Text with every character that could break the line, or the terminal, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell as stored. `source` has LF line ends, or is None where the notebook holds no text for it."""

    notebook: str
    name: str  # its id, or 8 hex digits of its source's sha256
    id: object  # as stored, None where missing
    kind: object
    tags: tuple[str, ...]
    raw_tags: object
    language: str  # lower case, "" where the notebook does not say
    source: str | None

    @property
    def label(self) -> str:
        return f"{self.notebook} #{self.name}"

    @property
    def text(self) -> str:
        return self.source or ""

    @functools.cached_property
    def bindings(self) -> list[Binding]:
        return list(find_bindings(self.tree))

    def refusal(self, line: int, what: str) -> str:
        return f"{self.label}:{line}: {what}"

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The cell's Python. Raises Refused, with one line, where it is none that can be stitched."""
        lines = self.text.split("\n")
        marker = next((n for n, line in enumerate(lines, 1) if MARKER.fullmatch(line)), 0)
        number, what = 1, ""
        if self.source is None:
            what = "has no source text (a string or a list of strings); save the notebook again from Jupyter"
        elif self.language and not re.fullmatch(r"i?python[\d.]*", self.language):
            what = f"is written in {self.language:.40}, not Python; take the tag off"
        elif marker:
            number, what = marker, "this line reads like a cell marker of the stitched file; reword it"
        else:
            try:
                return compiled(self.text + "\n")
            except NOT_PYTHON as error:
                number = min(max(getattr(error, "lineno", None) or 1, 1), len(lines))
                what = f"syntax error: {why_not_python(error)}; mend the cell"
                if isinstance(error, SyntaxError) and MAGIC.match(lines[number - 1]):
                    code = f"`{lines[number - 1].strip():.40}`"
                    what = f"{code} is a notebook magic, not Python; move it to a cell that stays, a demo"
        raise Refused([self.refusal(number, what)])


@dataclass(frozen=True)
class Notebook:
    """A notebook of format 4; `minor` as stored."""

    name: str
    minor: object
    cells: tuple[Cell, ...]


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    """A string or a list of strings with LF line ends; None for anything else."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "".join(value)
    return value.replace("\r\n", "\n").replace("\r", "\n") if isinstance(value, str) else None


def _read_cell(notebook: str, language: object, data: dict) -> Cell:
    source, given, metadata = _text(data.get("source")), data.get("id"), _mapping(data.get("metadata"))
    raw_tags = metadata.get("tags")
    tags = re.split(r"[,;\s]+", raw_tags) if isinstance(raw_tags, str) else raw_tags
    digest = hashlib.sha256((source or "").encode("utf-8", "surrogatepass")).hexdigest()[:8]
    language = _mapping(metadata.get("vscode")).get("languageId") or language
    return Cell(
        notebook=notebook,
        name=given if isinstance(given, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", given) else digest,
        id=given,
        kind=data.get("cell_type"),
        tags=tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else (),
        raw_tags=raw_tags,
        language=language.lower() if isinstance(language, str) else "",
        source=source,
    )


def read_notebook(path: Path, name: str) -> Notebook:
    """Read one notebook of format 4. Raises Refused, with one line, for anything else."""
    cells, what = None, "is not a notebook of format 4; save it in a current Jupyter"
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
        cells = data.get("cells") if isinstance(data, dict) and data.get("nbformat") == 4 else None
    except OSError as error:
        what = f"cannot be read ({error.strerror or type(error).__name__}); check the path"
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
    except (ValueError, RecursionError) as error:
        what = f"is not JSON ({error}); save it again from Jupyter"
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise Refused([f"{name}: {what}"])
    metadata = _mapping(data.get("metadata"))
    language = _mapping(metadata.get("kernelspec")).get("language")
    language = language or _mapping(metadata.get("language_info")).get("name")
    return Notebook(name, data.get("nbformat_minor"), tuple(_read_cell(name, language, c) for c in cells))


def read_notebooks(paths: Sequence[Path], names: Sequence[str]) -> list[Notebook]:
    """The notebooks in the order of their names. Raises Refused with a line for each that is none."""
    notebooks, lines = [], []
    for name, path in sorted(zip(names, paths, strict=True)):
        try:
            notebooks.append(read_notebook(path, name))
        except Refused as refused:
            lines += refused.lines
    if lines:
        raise Refused(lines)
    return notebooks


def book_notebooks(root: Path) -> list[Path]:
    """The chapters, in the book's order: the notebooks whose name begins with a number. Others stop nothing."""
    return sorted((root / "notebooks").glob("[0-9]*.ipynb"), key=lambda path: path.name)


def read_book(root: Path) -> list[Notebook]:
    paths = book_notebooks(root)
    return read_notebooks(paths, [f"notebooks/{one_line(path.name)}" for path in paths])


def select(notebooks: Sequence[Notebook], tags: Sequence[str]) -> list[tuple[Cell, str]]:
    """The code cells that carry one of the tags, in order, each with its first such tag (in the tags' order)."""
    cells = (cell for notebook in notebooks for cell in notebook.cells if cell.kind == "code")
    return [(cell, next(tag for tag in tags if tag in cell.tags)) for cell in cells if {*tags} & {*cell.tags}]


# ----------------------------------------------------------------------------------------------------------
# Looking at Python
# ----------------------------------------------------------------------------------------------------------


def why_not_python(error: BaseException) -> str:
    return getattr(error, "msg", None) or str(error) or type(error).__name__


def compiled(text: str) -> ast.Module:
    """The tree of a text that compiles. Raises one of NOT_PYTHON."""
    with warnings.catch_warnings(action="ignore"):
        compile(text, "<cell>", "exec", dont_inherit=True)
        return ast.parse(text)


def parse_leniently(source: str) -> ast.Module | None:
    """The tree of a cell that may hold magics (`pass` stands for them), None where it still is no Python."""
    plain = [re.sub(r"\S.*", "pass", line) if MAGIC.match(line) else line for line in source.split("\n")]
    for text in (source, "\n".join(plain)):
        try:
            with warnings.catch_warnings(action="ignore"):
                return ast.parse(text)
        except NOT_PYTHON:
            continue
    return None


@dataclass(frozen=True)
class Binding:
    """A name that a module's top level binds."""

    name: str
    line: int
    statement: int  # the position of the top-level statement that holds it
    node: ast.AST  # the import, the def or class, or the name that is assigned to
    what: str = ""  # of an import: "module:name", so that the same import may stand twice


def find_bindings(tree: ast.Module) -> Iterator[Binding]:
    """Every name the module's top level binds, in order, `if` and `try` and loops included."""
    for number, statement in enumerate(tree.body):
        waiting: list[ast.AST] = [statement]
        while waiting:
            node = waiting.pop()
            match node:
                case ast.Import() | ast.ImportFrom():
                    module = "." * getattr(node, "level", 0) + (getattr(node, "module", "") or "")
                    for alias in node.names:
                        # `import a.b` binds a, and may stand beside `import a.c`.
                        name = alias.asname or alias.name.split(".")[0]
                        what = f"{module}:{alias.name if alias.asname or module else name}"
                        yield Binding(name, node.lineno, number, node, what)
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    yield Binding(node.name, node.lineno, number, node)
                case ast.Name(ctx=ast.Store()):
                    yield Binding(node.id, node.lineno, number, node)
                case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                    pass
                case ast.AnnAssign(value=None):
                    pass
                case _:
                    waiting += reversed(list(ast.iter_child_nodes(node)))


def launcher_imports(tree: ast.AST) -> list[ast.ImportFrom]:
    """The `from ep_launcher.launcher import names` in a tree."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [node for node in imports if node.level == 0 and node.module == LAUNCHER_MODULE]
