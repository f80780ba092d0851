"""The book's cell rules. Each check yields its refusals, one line each."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.stitch import reading
from tools.stitch.program import RESERVED_NAMES, assemble, check_compiles, markers_in
from tools.stitch.reading import EXPORTED_TAGS, LAUNCHER_MODULE, ROLE_TAGS, SIDE_TAGS, Cell, Notebook, Refused
from tools.stitch.trace import locate_cell

MAX_CODE_LINES, MAX_CLASS_LINES = 40, 60  # of a cell, and of a cell with a class
OLDEST_PYTHON = "py311"  # the book's cells must run on it, whatever Python stitches them
SLUG = re.compile(r"(?=.{1,64}\Z)[a-z0-9]+(?:-[a-z0-9]+)*")
# What Jupyter makes up by itself: eight hex digits (one of them a digit, so that a word may pass), or a UUID.
GENERATED_ID = re.compile(r"(?=.*\d)[0-9a-f]{8}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# What a constant's value may call while the file is imported, `math` besides: it makes a value and does nothing else.
PURE_CALLS = frozenset(
    """
    abs bool bytes complex dict enumerate float frozenset getattr globals int isinstance len list max min object pow
    range reversed round set slice sorted str sum tuple type zip field partial namedtuple TypeVar ParamSpec NewType
    Path cwd resolve joinpath Fraction Decimal MappingProxyType OrderedDict Counter defaultdict deque ContextVar Lock
    RLock local auto compile itemgetter attrgetter Struct getLogger find_spec device finfo iinfo Size constexpr
    property staticmethod classmethod copy format items keys values get index count join split splitlines strip
    lower upper title startswith endswith removeprefix removesuffix union difference intersection
    """.split()
)


def check_structure(notebooks: Sequence[Notebook]) -> Iterator[str]:
    """Format, ids, tags and prose of every cell, exported or not."""
    owners: dict[object, str] = {}
    for notebook in notebooks:
        if notebook.minor != 5:
            yield f"{notebook.name}: is of nbformat 4.{notebook.minor!r:.40}; save it as 4.5"
        before = None
        for cell in notebook.cells:
            found = [*_id_problems(cell, owners), *_tag_problems(cell)]
            owners.setdefault(str(cell.id), notebook.name)
            if cell.kind not in ("code", "markdown", "raw"):
                found.append(f"is of unknown cell type {cell.kind!r:.40}; make it code or markdown")
            if cell.source is None:
                found.append("has no source text; save the notebook again from Jupyter")
            if cell.kind == "code" and not (before and before.kind == "markdown" and before.text.strip()):
                found.append("no prose stands before this code cell; put a markdown cell there")
            yield from (cell.refusal(1, what) for what in found)
            before = cell


def _id_problems(cell: Cell, owners: dict[object, str]) -> Iterator[str]:
    if cell.id is None:
        yield "has no id; give it one like `dispatch-all-gather`"
    elif not (isinstance(cell.id, str) and SLUG.fullmatch(cell.id)):
        yield f"its id {cell.id!r:.70} is no slug of a-z, 0-9 and -, at most 64 long; choose another"
    elif GENERATED_ID.fullmatch(cell.id):
        yield "its id was generated; choose one that says what the cell is about"
    elif cell.id in owners:
        yield f"its id is taken by a cell of {owners[cell.id]}; choose another"


def _tag_problems(cell: Cell) -> Iterator[str]:
    roles = [tag for tag in ROLE_TAGS if tag in cell.tags]
    if cell.raw_tags is not None and [*cell.tags] != cell.raw_tags:
        yield "its tags are no list of strings; make them one"
    elif cell.kind != "code":
        yield from (f"the tag `{tag}` is for code cells; take it off this one" for tag in roles[:1])
    else:
        for tag in dict.fromkeys(cell.tags):
            if tag not in ROLE_TAGS + SIDE_TAGS:
                yield f"unknown tag `{tag:.40}`; the tags are {', '.join(ROLE_TAGS + SIDE_TAGS)}"
        if len(roles) > 1:
            yield f"two role tags, `{roles[0]}` and `{roles[1]}`; keep one"
        if not roles:
            yield f"no role tag; give it exactly one of {', '.join(ROLE_TAGS)}"


def _code_lines(cell: Cell) -> int:
    """Lines with code on them: not blank, not only comment, not a docstring."""
    lines = cell.text.split("\n")
    covered = {n for n, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")}
    for node in ast.walk(cell.tree):
        is_scope = isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if is_scope and ast.get_docstring(node, clean=False) is not None:
            covered -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return len(covered)


def _effects(tree: ast.Module, classes: set[str]) -> Iterator[ast.AST]:
    """What runs when a cell is imported, and is neither an import, nor a constant, nor a definition.

    `if` and `try` may hold these too, as in `try: import triton`. Decorators may register.
    """
    waiting: list[ast.AST | None] = tree.body[::-1]
    while waiting:
        node = waiting.pop()
        inner: list[ast.AST | None] = []
        match node:
            case None | ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Expr(value=ast.Constant()):
                pass
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                inner = [*node.args.defaults, *node.args.kw_defaults]
            case ast.ClassDef():
                inner = [*node.bases, *(keyword.value for keyword in node.keywords), *node.body]
            case ast.Assign() | ast.AnnAssign():
                stored = [n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store)]
                if any(isinstance(n, (ast.Attribute, ast.Subscript)) for n in stored):
                    yield node
                inner = [node.value]
            case ast.If() | ast.Try():
                inner = [*ast.iter_child_nodes(node)]
            case ast.Call():
                name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
                is_math = getattr(getattr(node.func, "value", None), "id", "") == "math"
                if name in PURE_CALLS or name in classes or is_math:
                    inner = [*ast.iter_child_nodes(node)]
                else:
                    yield node
            case ast.stmt() | ast.Await() | ast.Yield() | ast.YieldFrom() | ast.NamedExpr():
                yield node
            case _:
                inner = [*ast.iter_child_nodes(node)]
        waiting += inner[::-1]


def check_cell(cell: Cell, tag: str, classes: set[str]) -> Iterator[str]:
    """The rules for one exported cell (or one of the seed) on its own."""
    for node in cell.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            what = "`from __future__` would change the whole file; leave it out"
            yield cell.refusal(node.lineno, what)
    for node in _effects(cell.tree, classes):
        code = " ".join((ast.get_source_segment(cell.text, node) or "").split("\n")[0].split())
        what = f"`{code:.60}` runs when the file is imported; move it into a function or a demo cell"
        yield cell.refusal(getattr(node, "lineno", 1), what)
    if not cell.tree.body:
        yield cell.refusal(1, "an exported cell without code; delete it, or make it markdown")
    has_class = any(isinstance(node, ast.ClassDef) for node in cell.tree.body)
    limit = MAX_CLASS_LINES if has_class else MAX_CODE_LINES
    if tag in EXPORTED_TAGS and (count := _code_lines(cell)) > limit:
        what = f"{count} lines of code, docstrings and comments not counted, and {limit} is the most"
        yield cell.refusal(1, f"{what}; split the cell")


def check_registrations(cells: Sequence[Cell]) -> Iterator[str]:
    """Refuses `@register("KIND", ...)` where KIND is no key of the book's literal REGISTRIES."""
    known: set[object] = set()
    for node in (node for cell in cells for node in cell.tree.body):
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "REGISTRIES":
            known = {getattr(key, "value", None) for key in getattr(node.value, "keys", ())}
    for cell in cells if known else ():
        for call in (call for node in cell.tree.body for call in getattr(node, "decorator_list", ())):
            match call:
                case ast.Call(func=ast.Name(id="register"), args=[ast.Constant(value=kind), *_]):
                    if kind not in known:
                        what = f"there is no kind {kind!r} to register; take one of"
                        yield cell.refusal(call.lineno, f"{what} {', '.join(sorted(map(str, known)))}")


def _own_bindings(cells: Sequence[Cell]) -> list[tuple[Cell, reading.Binding]]:
    """The names that cells bring, those imported from the launcher left out."""
    launcher = f"{LAUNCHER_MODULE}:"
    return [(cell, b) for cell in cells for b in cell.bindings if not b.what.startswith(launcher)]


def check_duplicates(cells: Sequence[Cell]) -> Iterator[str]:
    """A top-level name is defined once; the same import may stand in many cells."""
    owners: dict[str, tuple[Cell, reading.Binding]] = {}
    for cell, b in _own_bindings(cells):
        first, known = owners.setdefault(b.name, (cell, b))
        same_statement = first is cell and known.statement == b.statement
        if same_statement or (b.what and b.what == known.what) or b.name == "_":
            continue
        where = f"{first.label}:{known.line}"
        what = f"`{b.name}` is defined a second time, first in {where}; rename one"
        if b.what and known.what:
            what = f"`{b.name}` is something else in {where}; import it the same way"
        yield cell.refusal(b.line, what)


def check_launcher_imports(notebooks: Sequence[Notebook], book: Sequence[Cell]) -> Iterator[str]:
    """A chapter may import from the launcher what it or an earlier chapter defines; an exported cell only so."""
    order = {notebook.name: number for number, notebook in enumerate(notebooks)}
    owners = {b.name: cell.notebook for cell, b in reversed(_own_bindings(book))}
    owners |= dict.fromkeys(RESERVED_NAMES, notebooks[0].name)
    for cell in (cell for notebook in notebooks for cell in notebook.cells if cell.kind == "code"):
        tree = reading.parse_leniently(cell.text) if "ep_launcher" in cell.text else None
        imports = reading.launcher_imports(tree) if tree else []
        for node in imports:
            for name in (alias.name for alias in node.names):
                what = ""
                if name == "*":
                    what = "`*` hides which names it imports; import them by name"
                elif name not in owners:
                    what = f"imports `{name}` from the launcher, but no exported cell defines it; check it"
                elif order[owners[name]] > order[cell.notebook]:
                    what = f"imports `{name}`, which only a later chapter defines ({owners[name]}); move one"
                if what:
                    yield cell.refusal(node.lineno, what)
        for node in ast.walk(tree) if tree and cell in book else ():
            code = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ""
            is_plain = node in imports and not any(alias.asname for alias in node.names)
            if not is_plain and re.search(r"^from ep_launcher\b|^import (?:.*, )?ep_launcher\b", code):
                what = f"the launcher cannot import itself so; write `from {LAUNCHER_MODULE} import` names"
                yield cell.refusal(node.lineno, what)


def check_seed(notebooks: Sequence[Notebook], book: Sequence[Cell]) -> Iterator[str]:
    """The seed's way has names of its own: in a notebook's kernel it lives beside the book's."""
    owners = {b.name: f"{cell.label}:{b.line}" for cell, b in reversed(_own_bindings(book))}
    for cell, _ in reading.select(notebooks, ["seed"]):
        for b in reading.find_bindings(reading.parse_leniently(cell.text) or ast.Module(body=[])):
            if not b.what and b.name in owners:
                what = f"`{b.name}` is the name of an exported definition, {owners[b.name]}"
                yield cell.refusal(b.line, f"{what}; rename the seed's")


def find_ruff() -> str | None:
    return shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def check_names(text: str, cells: Sequence[Cell]) -> Iterator[str]:
    """What ruff finds in the stitched text: names that are undefined, or used at import before they are defined, star
    imports, and syntax that the oldest Python lacks. Nothing where ruff is not installed: the command says so."""
    ruff = find_ruff()
    if ruff is None:
        return
    options = ["--isolated", "--ignore-noqa", "--exit-zero", "--select=F821,F403", "--output-format=json"]
    command = [ruff, "check", *options, f"--target-version={OLDEST_PYTHON}", "-"]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip()
        raise Refused([f"extract.py: ruff failed ({why[-200:]}); mend it, or install another"])
    owners = {b.name: cell.label for cell in reversed(cells) for b in cell.bindings}
    markers = markers_in(text)
    for finding in json.loads(done.stdout):
        what = f"syntax error: {finding['message']}; mend the cell"
        if finding["code"] == "F403":
            what = "a star import hides which names it brings; import them by name"
        elif finding["code"] == "F821":
            name = finding["message"].split("`")[1]
            what = f"`{name}` is not defined in any exported cell; define or import it"
            if name in owners:
                what = f"`{name}` is needed at import, but defined further down, in {owners[name]}; move one"
        yield f"{locate_cell(markers, finding['location']['row'])}: {what}"


def stitch(notebooks: Sequence[Notebook], tags: Sequence[str], is_book: bool) -> tuple[str, list[Cell]]:
    """The stitched text and its cells. Raises Refused with a line for all that is wrong.

    Of any notebooks: the tagged cells are Python, and one program together. Of the book, besides, for every cell:
    format, id, tags, prose before code, imports from the launcher; for exported cells, whatever the tags asked for:
    they define a name once. For every cell that carries one of `tags`: it holds imports, constants and definitions
    only, its names are defined, and in time; exported ones keep to 40 lines of code.
    """
    chosen = reading.select(notebooks, tags)
    cells, book = [cell for cell, _ in chosen], [cell for cell, _ in reading.select(notebooks, EXPORTED_TAGS)]
    problems, unread, text = [*check_structure(notebooks)] if is_book else [], [], ""
    for cell in dict.fromkeys([*cells, *(book if is_book else ())]):
        try:
            for b in (b for b in cell.bindings if b.name in RESERVED_NAMES):
                what = f"`{b.name}` is a name of tools/extract.py's; rename it"
                problems.append(cell.refusal(b.line, what))
        except Refused as refused:
            unread += refused.lines
    problems += unread
    if is_book:
        good = [cell for cell in {*cells, *book} if "bindings" in vars(cell)]
        classes = {b.name for cell in good for b in cell.bindings if isinstance(b.node, ast.ClassDef)}
        for cell, tag in chosen:
            problems += check_cell(cell, tag, classes) if cell in good else []
    if not unread:
        text = assemble(chosen, is_launcher=is_book and {*tags} == {*EXPORTED_TAGS})
        if is_book:
            # With a cell missing, its names would seem to be undefined.
            problems += [*check_duplicates(book), *check_registrations(book), *check_seed(notebooks, book)]
            problems += [*check_launcher_imports(notebooks, book), *check_names(text, cells)]
            problems += check_duplicates(cells)
    if problems:
        raise Refused(problems)
    check_compiles(text)
    return text, cells
