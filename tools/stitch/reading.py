"""Notebooks as they are stored, and the Python in their cells.

Standard library only: nbformat repairs missing and duplicate ids in silence, and the stitched file depends on the ids.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tools.commands import Refused, one_line
from tools.stitch.trace import find_cell_markers

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "ep_launcher/launcher.py"
LAUNCHER_MODULE = "ep_launcher.launcher"

EXPORTED_TAGS = ("theory", "all_to_all", "experts", "training", "performance", "routing")
OTHER_ROLES = ("setup", "seed", "parameters", "demo", "check", "launch", "plot", "exercise", "solution")
ROLE_TAGS = EXPORTED_TAGS + OTHER_ROLES

MAGIC = re.compile(r"\s*(?:[%!?]|[\w.]+\s*\?+\s*$|[\w., ]+=\s*[%!])")
# What parse and compile raise on text that is not a program; the last four on absurdly deep or large text.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError, SystemError)


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell as stored; `text` has LF line ends; `name` is its id, or 8 digits of the text's sha256 without one."""

    notebook: str
    name: str
    kind: object
    tags: tuple[str, ...]
    language: str  # of its notebook, lower case; "" where that does not say
    text: str

    @property
    def label(self) -> str:
        return f"{self.notebook} #{self.name}"

    def refusal(self, line: int, what: str) -> str:
        return f"{self.label}:{line}: {what}"

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The cell's Python. Raises one of NOT_PYTHON where it is none: see refusals."""
        return compiled(self.text + "\n")

    @functools.cached_property
    def bindings(self) -> list[Binding]:
        return list(find_bindings(self.tree))

    @functools.cached_property
    def refusals(self) -> list[str]:
        """Why the cell cannot be stitched, in one line; nothing where it can."""
        lines = self.text.split("\n")
        if markers := find_cell_markers(self.text):
            what = "this line reads like a cell marker of the stitched file; reword it"
            return [self.refusal(markers[0][0], what)]
        if not re.fullmatch(r"(i?python[\d.]*)?", self.language):
            return [self.refusal(1, f"is written in {self.language:.40}, not Python; take the tag off")]
        try:
            self.tree  # noqa: B018
            return []
        except NOT_PYTHON as error:
            number = min(max(getattr(error, "lineno", None) or 1, 1), len(lines))
            line, what = lines[number - 1], f"syntax error: {why(error)}; mend the cell"
            magic = (
                f"`{line.strip():.40}` is a notebook magic, not Python; move it to a cell that stays, a demo"
            )
            return [self.refusal(number, magic if MAGIC.match(line) else what)]


def _dig(data: object, *keys: str) -> Any:
    """data[key][key]..., None where something on the way is missing, or is no object."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _read_cell(notebook: str, language: str, data: object) -> Cell:
    """Raises TypeError where the cell has no text."""
    source, tags, name = _dig(data, "source"), _dig(data, "metadata", "tags"), _dig(data, "id")
    text = "".join(source if isinstance(source, list) else [source]).replace("\r\n", "\n").replace("\r", "\n")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", str(name)) or name is None:
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    tags = tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else ()
    return Cell(notebook, str(name), _dig(data, "cell_type"), tags, language, text)


def read_notebook(path: Path, name: str) -> list[Cell]:
    """The cells of one notebook of format 4. Raises Refused, with one line, for anything else."""
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
        if _dig(data, "nbformat") != 4:
            raise TypeError("its nbformat is not 4")
        language = _dig(data, "metadata", "kernelspec", "language")
        language = language or _dig(data, "metadata", "language_info", "name") or ""
        return [_read_cell(name, str(language).lower(), cell) for cell in data["cells"]]
    except OSError as error:
        what = f"cannot be read ({error.strerror or type(error).__name__}); check the path"
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = (
            f"is not a notebook of format 4 ({type(error).__name__}: {error}); save it in a current Jupyter"
        )
    raise Refused(f"{name}: {what}")


def book_notebooks(root: Path) -> list[Path]:
    """The chapters, in the book's order: the notebooks whose name begins with a number. Others stop nothing."""
    return sorted((root / "notebooks").glob("[0-9]*.ipynb"))


def read_book(root: Path) -> list[Cell]:
    paths = book_notebooks(root)
    return [cell for path in paths for cell in read_notebook(path, f"notebooks/{one_line(path.name)}")]


def select(cells: Sequence[Cell], tags: Sequence[str]) -> list[tuple[Cell, str]]:
    """The code cells that carry one of the tags, in order, each with its first such tag (in the tags' order)."""
    found = (cell for cell in cells if cell.kind == "code" and {*tags} & {*cell.tags})
    return [(cell, next(tag for tag in tags if tag in cell.tags)) for cell in found]


def why(error: BaseException) -> str:
    return getattr(error, "msg", None) or str(error) or type(error).__name__


def compiled(text: str) -> ast.Module:
    """The tree of a text that compiles. Raises one of NOT_PYTHON."""
    with warnings.catch_warnings(action="ignore"):
        compile(text, "<cell>", "exec", dont_inherit=True)
        return ast.parse(text)


def parse_leniently(source: str) -> ast.Module:
    """The tree of a cell that may hold magics (`pass` stands for them), an empty one where it still is no Python."""
    plain = [re.sub(r"\S.*", "pass", line) if MAGIC.match(line) else line for line in source.split("\n")]
    for text in (source, "\n".join(plain)):
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(*NOT_PYTHON):
            return ast.parse(text)
    return ast.Module(body=[])


class Binding(NamedTuple):
    """A name that a module's top level binds: by which import, def, class or assigned name, in which statement."""

    name: str
    node: ast.AST
    statement: ast.stmt
    what: str = ""  # of an import: "module:name", so that the same import may stand twice


def find_bindings(tree: ast.Module) -> Iterator[Binding]:
    """Every name the module's top level binds, in order, `if` and `try` and loops included."""
    for statement in tree.body:
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
                        yield Binding(name, node, statement, what)
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    yield Binding(node.name, node, statement)
                case ast.Name(ctx=ast.Store()):
                    yield Binding(node.id, node, statement)
                case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                    pass
                case _:
                    waiting += reversed(list(ast.iter_child_nodes(node)))
