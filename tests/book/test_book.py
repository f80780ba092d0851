"""The book itself: lint, format, fresh outputs, and every notebook executed headless by papermill."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from bs4 import BeautifulSoup
from support import ROOT
from wrong_answers import with_wrong_answers

from tools import commands, site
from tools.notebooks import clean
from tools.site import foreign_addresses

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def run(*command: str, cwd: Path = ROOT, timeout: float = 300) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff(command):
    done = run(sys.executable, "-m", "ruff", *command, ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_launcher_is_what_the_notebooks_say():
    done = run(sys.executable, "tools/extract.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def private_words(cell: dict) -> list[str]:
    """What of this machine stands in a cell's outputs."""
    words = {str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir(), socket.gethostname()}
    text = json.dumps(cell.get("outputs"), ensure_ascii=False)
    text = re.sub(
        r"data:image/[\w+]+;base64,[\w+/=\\\s]+|[\w+/=]{400,}", "", text
    )  # pictures may hold any letters
    text = re.sub(r"\\[nrt]|\\u001b\[[\d;]*m", " ", text)
    words = sorted(words - {"/", "localhost", ""})
    return [word for word in words if re.search(rf"(?<![\w./~-]){re.escape(word)}(?![\w-])", text)]


def test_private_words_are_found_and_innocent_ones_pass(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "my-host")
    monkeypatch.setattr(sys, "prefix", "/opt/my-python")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/my-tmp")  # the clone may lie in the real one
    for text, words in (
        (f"log in {ROOT}/ep_launcher\n", [str(ROOT)]),
        (f"{Path.home()}/data\non my-host: ok", [str(Path.home()), "my-host"]),
        ("File \x1b[32m/opt/my-python/lib", ["/opt/my-python"]),
        (f"my-hosts, a-my-host, x{ROOT}, sub{Path.home()}, https://example.org/tmp", []),
    ):
        output = {"output_type": "stream", "name": "stdout", "text": text}
        assert private_words({"outputs": [output]}) == words, text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_committed_is_clean(path):
    """As tools/notebooks.py --clean leaves it: no counts, figures by their files, solutions folded, no errors."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    clean(notebook, path)
    assert nbformat.writes(notebook) + "\n" == text, (
        f"python tools/notebooks.py --clean notebooks/{path.name}"
    )
    for cell in notebook.cells:
        assert not private_words(cell), (
            f"the output of #{cell.id} tells of this machine: print something relative"
        )
        assert set(cell.metadata) <= {"tags", "jupyter"}, cell.id
        if cell.cell_type == "code":
            assert not any(output.output_type == "error" for output in cell.outputs), cell.id
            assert "Warning" not in json.dumps(cell.outputs), cell.id
            pictures = sum(len(output.get("data", {}).get("image/png", "")) for output in cell.outputs)
            assert not pictures or "save_figure" not in cell.source, f"#{cell.id} embeds what images/ holds"


def shape_of(cell: dict) -> list:
    """What a cell has put out, without its numbers: kinds of outputs, and texts whose digits are gone."""
    cell = nbformat.from_dict(cell)
    shown = []
    for output in cell.outputs:
        data = output.get("data", {})
        text = output.get("text") or data.get("text/plain", "") * (len(data) == 1)
        words = re.sub(r"[-+]?\d[\d.,e+-]*", "0", text).split()
        shown.append((output.output_type, sorted(data), words))
    return shown


def test_outputs_name_lines_that_are_there():
    """Readers follow an output to `#cell:line`: where that cell was edited, execute the output's notebook again."""
    books = {f"notebooks/{path.name}": nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    source = {
        (name, cell.id): cell.source.splitlines() for name, book in books.items() for cell in book.cells
    }
    named = re.compile(r"(notebooks/\w+\.ipynb) #([\w-]+):(\d+)(?:, in [\w.<>]+: (.+))?")
    found = [
        (cell.id, *place)
        for book in books.values()
        for cell in book.cells
        for output in cell.get("outputs", [])
        for place in named.findall(output.get("text", ""))
        if place[0] in books  # not the toy of chapter 05
    ]
    assert any(line for *_, line in found), "no traceback in any output: nothing was looked at"
    for shown_in, name, cell, number, line in found:
        there = source.get((name, cell), [])[int(number) - 1 : int(number)]
        # chapter 05 breaks a line of a copy behind its end
        assert there and (not line or line.startswith(there[0].strip())), (
            f"#{shown_in} names {name} #{cell}:{number}, {line!r}, and there is {there}: execute it again"
        )


def test_figures_that_the_texts_show_exist():
    for page in [*ROOT.glob("*.md")]:
        for part in page.read_text(encoding="utf-8").split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            if target and not target.startswith("http"):
                assert (ROOT / target).exists(), f"{page.name} points at {target}"


def test_the_readme_has_a_line_for_each_chapter_and_each_target():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in NOTEBOOKS if f"](notebooks/{path.name})" not in text]
    assert not missing, f"README.md's table of chapters lacks {', '.join(missing)}"
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"train", "test", "lab", "site"} < set(targets)
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", text))
    assert named <= set(targets), f"README.md names targets that are not there: {named - set(targets)}"


def pictures_of(page: str) -> list[tuple[str, str]]:
    """(alt, src or id) of a page's figures and players; a picture inside a notebook has no words of its own."""
    pictures = BeautifulSoup(page, "html.parser").find_all("img")
    found = [(tag.get("alt", ""), tag.get("src") or tag.get("id", "")) for tag in pictures]
    return [(alt, src) for alt, src in found if not src.startswith("data:")]


def test_a_picture_without_words_is_found():
    page = '<img alt="06 rows" src="images/06_rows.svg"><img id="_anim_img1"><img alt="x" src="data:image/png;base64,">'
    assert pictures_of(page) == [("06 rows", "images/06_rows.svg"), ("", "_anim_img1")]


def test_the_site_is_built_and_needs_no_network(build):
    """Every notebook is a page; tools/site.py itself refuses a page that would fetch something or lacks a figure."""
    done = run(sys.executable, "tools/site.py")
    assert done.returncode == 0, done.stderr
    for path in NOTEBOOKS:
        page = (build / "site" / f"{path.stem}.html").read_text(encoding="utf-8")
        silent = [src for alt, src in pictures_of(page) if len(alt.split()) < 12]
        assert not silent, f"{path.stem}.html does not say in words what one sees in {', '.join(silent)}"
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                assert f'id="{cell["id"]}"' in page, f"{path.stem}.html lacks #{cell['id']}"


def test_the_site_refuses_a_page_that_fetches_something():
    for wrong in (
        '<script src="https://x.org/a.js"></script>',
        "<link rel=stylesheet href='//x.org/a.css'>",
        '<img class="a" src="http://x.org/a.png">',
        '<object data="https://x.org/a.svg"></object>',
        '<p style="background: url(//x.org/a.png)"></p>',
        "<style>@import 'https://x.org/a.css';</style>",
        "<script>fetch(name)</script>",
    ):
        assert len(foreign_addresses(wrong)) == 1, wrong
    assert not foreign_addresses(
        '<a href="https://x.org">x</a><img src="images/a.svg"><script src="index.js"></script>'
        '<img src="data:image/png;base64,//x.org/AA"><script>let a = 1; // a.b</script>'
    )


@pytest.fixture
def small_site(tmp_path, monkeypatch):
    """A book of one chapter and a notebook that is none; builds its site -> (exit code, pages by name)."""
    for folder in ("notebooks", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "README.md").write_text("# The book\n\n[one](notebooks/01_one.ipynb)")
    script = "<script>window.mine = 1</script>"
    cell = nbformat.v4.new_code_cell(
        "1", outputs=[nbformat.v4.new_output("display_data", {"text/html": script})]
    )
    for name in ("01_one", "Untitled"):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {name}"), cell])
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site.sys, "argv", ["site.py"])

    def build() -> tuple[int, dict[str, str]]:
        code = commands.run(site.make_site)
        return code, {path.name: path.read_text("utf-8") for path in (tmp_path / "build/site").glob("*.html")}

    return build


def test_a_chapter_is_a_page_with_its_players_scripts_and_other_notebooks_are_none(small_site):
    code, pages = small_site()
    assert code == 0 and sorted(pages) == ["01_one.html", "index.html"]
    assert 'href="01_one.html"' in pages["index.html"]
    assert "<script>window.mine = 1</script>" in pages["01_one.html"]


def test_a_refused_build_keeps_the_old_pages(small_site, tmp_path, capsys):
    before = small_site()[1]
    wrong = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Two\n\n![a](../images/none.svg)")]
    )
    nbformat.write(wrong, tmp_path / "notebooks" / "02_two.ipynb")
    assert small_site() == (1, before)
    assert capsys.readouterr().err == "error: 02_two.html shows images/none.svg, which is not there\n"
    assert not list((tmp_path / "build").glob(".site*"))


def test_a_figure_with_other_parameters_leaves_the_books_alone(tmp_path, monkeypatch):
    """papermill puts its parameters into a cell of their own, which the kernel then runs as any other."""
    import matplotlib.pyplot as plt

    from tools import figures

    cells = ["", "ranks = 4"]
    monkeypatch.setattr(figures, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(figures, "get_ipython", lambda: SimpleNamespace(user_ns={"In": cells}))
    fig = plt.figure()
    figures.save_figure(fig, "a.svg", "nothing")
    cells.append("# Parameters\nranks = 2\n")
    figures.save_figure(fig, "b.svg", "nothing")
    plt.close(fig)
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.svg"))
    assert made == ["build/images/b.svg", "images/a.svg"]


def test_a_figure_carries_its_title(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    from tools import figures, notebooks

    monkeypatch.setattr(figures, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    fig = plt.figure()
    figures.save_figure(fig, "a.svg", "Rows [sent]\n& kept")
    plt.close(fig)
    shown = notebooks.show_image("a.svg", tmp_path / "notebooks" / "x.ipynb")
    assert shown.data["text/markdown"] == "![Rows sent & kept](../images/a.svg)"


def tracked_changes() -> str:
    """What differs from the last commit."""
    return run("git", "diff", "--no-ext-diff", "notebooks", "images", "results").stdout


OURS = "tools/notebooks.py {path}", ROOT
PAPERMILL = "-m papermill --no-progress-bar {path} {out}"
PLAIN = {  # {the start of a chapter's name: how it runs without this repository's own runner, and where}
    "01": (PAPERMILL, ROOT),
    "03": (PAPERMILL, ROOT / "notebooks"),
    "06": ("-m jupyter execute {path} --output {out}", ROOT),
    "09": ("-m nbconvert --execute --to notebook --output {out} {path}", ROOT / "notebooks"),
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_executes(path, build):
    """Each once, into build/, with wrong answers to its exercises behind it; and what is committed is what comes out.

    All but numbers: a cell whose committed output another run, or another source, has left is named. Most of them by
    tools/notebooks.py, and one each way by the tools that a reader may have: to these all notebooks are alike.
    """
    with_answers = build / "with_wrong_answers" / path.name
    with_answers.parent.mkdir(exist_ok=True)
    with_answers.write_text(json.dumps(with_wrong_answers(json.loads(path.read_text("utf-8")))), "utf-8")
    out, before = build / "notebooks" / path.name, tracked_changes()
    out.parent.mkdir(exist_ok=True)
    out.unlink(missing_ok=True)
    command, folder = PLAIN.get(path.name[:2], OURS)
    given = os.path.relpath(with_answers, folder)
    done = run(sys.executable, *command.format(path=given, out=out).split(), cwd=folder, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert tracked_changes() == before
    executed = nbformat.read(out, as_version=4)
    merge_streams(executed)
    clean(executed, path)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    made = {cell.id: shape_of(cell) for cell in code}
    stale = [
        cell.id
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code" and made[cell.id] != shape_of(cell)
    ]
    assert not stale, (
        f"refresh the outputs of {', '.join(stale)}: tools/notebooks.py --in-place notebooks/{path.name}"
    )


def merge_streams(notebook: nbformat.NotebookNode) -> None:
    """One text for what a cell has printed in pieces, as tools/notebooks.py has it."""
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        merged: list = []
        for output in cell.outputs:
            if merged and output.get("name") == merged[-1].get("name", "none"):
                merged[-1].text += output.text
            else:
                merged.append(output)
        cell.outputs = merged
