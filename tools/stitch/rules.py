"""The book's cell rules. Each check yields its refusals, one line each."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

from tools.commands import Refused
from tools.stitch import reading
from tools.stitch.program import RESERVED_NAMES, assemble
from tools.stitch.reading import EXPORTED_TAGS, LAUNCHER_MODULE, NOT_PYTHON, ROLE_TAGS, Binding, Cell
from tools.stitch.trace import find_cell_markers, locate_cell

MAX_CODE_LINES, MAX_CLASS_LINES = 40, 60  # of a cell, and of a cell with a class
OLDEST_PYTHON = "py311"  # the book's cells must run on it, whatever Python stitches them
SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
# What Jupyter makes up by itself: eight hex digits (one of them a digit, so that a word may pass), or a UUID.
GENERATED_ID = re.compile(r"(?=.*\d)[0-9a-f]{8}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def check_structure(cells: Sequence[Cell]) -> Iterator[str]:
    """Ids, tags and prose of every cell, exported or not."""
    owners: dict[str, str] = {}
    for before, cell in pairwise([None, *cells]):
        yield from (cell.refusal(1, what) for what in _problems(cell, before, owners))
        owners.setdefault(cell.name, cell.notebook)


def _problems(cell: Cell, before: Cell | None, owners: dict[str, str]) -> Iterator[str]:
    if GENERATED_ID.fullmatch(cell.name) or not SLUG.fullmatch(cell.name):
        yield f"its id {cell.name!r} is generated, or no slug; give it one like `dispatch-all-gather`"
    elif cell.name in owners:
        yield f"its id is taken by a cell of {owners[cell.name]}; choose another"
    roles = [tag for tag in ROLE_TAGS if tag in cell.tags]
    if cell.kind != "code":
        yield from (f"the tag `{tag}` is for code cells; take it off this one" for tag in roles[:1])
        return
    for tag in sorted({*cell.tags} - {*ROLE_TAGS, "hide-input"}):
        yield f"unknown tag `{tag:.40}`; the tags are {', '.join(ROLE_TAGS)}, hide-input"
    if len(roles) != 1:
        listed = f"two role tags, `{roles[0]}` and `{roles[1]}`" if roles else "no role tag"
        yield f"{listed}; give it exactly one of {', '.join(ROLE_TAGS)}"
    is_prose = before and before.notebook == cell.notebook and before.kind == "markdown"
    if not (is_prose and before.text.strip()):
        yield "no prose stands before this code cell; put a markdown cell there"


def _code_lines(cell: Cell) -> int:
    """Lines on which code begins: not blank, no comment, no docstring, no line of constants alone."""
    nodes = (node for node in ast.walk(cell.tree) if not isinstance(node, (ast.Expr, ast.Constant)))
    return len({node.lineno for node in nodes if isinstance(node, (ast.stmt, ast.expr))})


def _effects(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a cell is imported, and is neither an import, nor a constant, nor a definition."""
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Pass():
                pass
            case ast.Expr(ast.Constant()) | ast.AnnAssign(ast.Name()):
                pass
            case ast.Assign() if not any(isinstance(n, (ast.Attribute, ast.Subscript)) for n in node.targets):
                pass
            case ast.ClassDef() | ast.If() | ast.Try() | ast.ExceptHandler():  # as in `try: import triton`
                parts = ast.iter_child_nodes(node)
                yield from _effects([n for n in parts if isinstance(n, (ast.stmt, ast.ExceptHandler))])
            case _:
                yield node


def check_cell(cell: Cell) -> Iterator[str]:
    """The rules for one exported cell on its own."""
    for node in _effects(cell.tree.body):
        code = " ".join(ast.get_source_segment(cell.text, node).split("\n")[0].split())
        what = f"`{code:.60}` runs when the file is imported; move it into a function or a demo cell"
        yield cell.refusal(node.lineno, what)
    has_class = any(isinstance(node, ast.ClassDef) for node in cell.tree.body)
    limit = MAX_CLASS_LINES if has_class else MAX_CODE_LINES
    if (count := _code_lines(cell)) > limit:
        what = f"{count} lines of code, docstrings and comments not counted, and {limit} is the most"
        yield cell.refusal(1, f"{what}; split the cell")


def _own_bindings(cells: Sequence[Cell]) -> list[tuple[Cell, Binding]]:
    """The names that cells bring, those imported from the launcher left out."""
    both = ((cell, binding) for cell in cells for binding in cell.bindings)
    return [(cell, b) for cell, b in both if not b.what.startswith(f"{LAUNCHER_MODULE}:")]


def check_duplicates(cells: Sequence[Cell]) -> Iterator[str]:
    """A top-level name is defined once; the same import may stand in many cells."""
    owners: dict[str, tuple[Cell, Binding]] = {}
    for cell, b in _own_bindings(cells):
        if b.name in RESERVED_NAMES:
            what = f"`{b.name}` is a name of tools/extract.py's; rename it"
            yield cell.refusal(b.node.lineno, what)
        first, known = owners.setdefault(b.name, (cell, b))
        if known.statement is b.statement or (b.what and b.what == known.what) or b.name == "_":
            continue
        what = f"`{b.name}` is defined a second time, first in {first.label}:{known.node.lineno}; rename one"
        yield cell.refusal(b.node.lineno, what)


def check_launcher_imports(cells: Sequence[Cell], book: Sequence[Cell]) -> Iterator[str]:
    """A chapter imports from the launcher what it or an earlier chapter defines; an exported cell only so."""
    owners = {b.name: cell.notebook for cell, b in reversed(_own_bindings(book))}
    for cell in (cell for cell in cells if cell.kind == "code" and "ep_launcher" in cell.text):
        nodes = ast.walk(reading.parse_leniently(cell.text))
        for node in (node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))):
            is_by_name = getattr(node, "module", "") == LAUNCHER_MODULE
            for name in (alias.name for alias in node.names if is_by_name):
                if owners.get(name, "") > cell.notebook:  # chapters come in the order of their names
                    what = f"imports `{name}`, which only a later chapter defines ({owners[name]}); move one"
                    yield cell.refusal(node.lineno, what)
            is_plain = is_by_name and not any(alias.asname for alias in node.names)
            if cell in book and "ep_launcher" in ast.unparse(node) and not is_plain:
                what = f"the launcher cannot import itself so; write `from {LAUNCHER_MODULE} import` names"
                yield cell.refusal(node.lineno, what)


def has_ruff() -> bool:
    return importlib.util.find_spec("ruff") is not None


def check_names(text: str, cells: Sequence[Cell]) -> Iterator[str]:
    """What ruff finds in the stitched text: names that are undefined, or used at import before they are defined, star
    imports, and syntax that the oldest Python lacks. Nothing where ruff is not installed: the command says so."""
    if not has_ruff():
        return
    options = ["--isolated", "--ignore-noqa", "--exit-zero", "--select=F821,F403", "--output-format=json"]
    command = [sys.executable, "-m", "ruff", "check", *options, f"--target-version={OLDEST_PYTHON}", "-"]
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise Refused(f"extract.py: ruff failed ({done.stderr.strip()[-200:]}); mend it, or install another")
    owners = {b.name: cell.label for cell in reversed(cells) for b in cell.bindings}
    for finding in json.loads(done.stdout):
        what = f"{finding['message']}; mend the cell"
        if finding["code"] == "F821":
            name = finding["message"].split("`")[1]
            what = f"`{name}` is not defined in any exported cell; define or import it"
            if name in owners:
                what = f"`{name}` is needed at import, but defined further down, in {owners[name]}; move one"
        yield f"{locate_cell(find_cell_markers(text), finding['location']['row'])}: {what}"


def stitch(all_cells: Sequence[Cell], tags: Sequence[str], is_book: bool) -> tuple[str, list[Cell]]:
    """The stitched text and its cells. Raises Refused with a line for all that is wrong.

    Any notebooks' tagged cells are Python, and one program together; the book's keep all rules of this file.
    """
    chosen = reading.select(all_cells, tags)
    cells = [cell for cell, _ in chosen]
    book = [cell for cell, _ in reading.select(all_cells, EXPORTED_TAGS)] if is_book else []
    ruled = [cell for cell, _ in reading.select(all_cells, [*EXPORTED_TAGS, "seed"])] if is_book else cells
    problems = [*check_structure(all_cells)] if is_book else []
    unread = [line for cell in dict.fromkeys([*ruled, *cells]) for line in cell.refusals]
    if unread:  # with a cell missing, its names would seem to be undefined
        raise Refused(*problems, *unread)
    text = assemble(chosen, is_launcher=is_book and {*tags} == {*EXPORTED_TAGS})
    if is_book:
        problems += [line for cell in book for line in check_cell(cell)]
        problems += [*check_duplicates(ruled), *check_launcher_imports(all_cells, book)]
        problems += [*check_names(text, cells)]
    if problems:
        raise Refused(*problems)
    try:
        reading.compiled(text)
    except NOT_PYTHON as error:  # of cells that each compile
        place = locate_cell(find_cell_markers(text), getattr(error, "lineno", None) or 1) or "extract.py"
        raise Refused(f"{place}: stitched, a syntax error: {reading.why(error)}; mend it") from None
    return text, cells
