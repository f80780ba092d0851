"""The book as static pages: `make site` -> build/site/index.html, to be opened without a server or a network.

    python tools/site.py

Pages are made by nbconvert from the notebooks as they were executed and committed; nothing runs here. Frame, search and
colours lie in tools/site_files/: no CDN, no web font, no MathJax, no require.js. Ends with 1 and one
line where a page would fetch something from elsewhere, or shows a figure that is not there: then the old pages stay.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
from bs4 import BeautifulSoup, NavigableString, Tag
from jinja2 import Environment, FileSystemLoader
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from tools import commands  # noqa: E402
from tools.commands import Refused  # noqa: E402
from tools.stitch.reading import EXPORTED_TAGS, book_notebooks  # noqa: E402

FILES = ROOT / "tools/site_files"
HEADINGS = ("h1", "h2", "h3")
FETCHED = {*"src srcset data poster background xlink:href style".split()}  # and href where it is no link
ELSEWHERE = re.compile(
    r"""(?:https?:)?//[\w-]+\.[^\s"')]+|\b(?:fetch|import)\(|XMLHttpRequest|WebSocket|EventSource"""
)


def find_sections(body: str) -> list[dict[str, str]]:
    """Cuts a page's body at its headings, for the contents and the search: each one's id, title, and text up to the
    next."""
    soup, found = BeautifulSoup(body, "html.parser"), []
    apart = {id(node) for tag in soup([*HEADINGS, "svg"]) for node in tag.descendants}
    for node in soup.descendants:
        if isinstance(node, Tag) and node.name in HEADINGS:
            found.append({"id": node.get("id", ""), "title": node.get_text().strip(), "text": ""})
        elif found and type(node) is NavigableString and id(node) not in apart:
            found[-1]["text"] += node
    return [section | {"text": " ".join(section["text"].split())} for section in found]


def make_page(file: str, notebook: NotebookNode) -> SimpleNamespace:
    """A notebook -> its page, with links that lead to pages: file's name, title, body, and sections for the search."""
    loaders = [FileSystemLoader(FILES)]
    exporter = HTMLExporter(template_name="basic", template_file="cell.html.j2", extra_loaders=loaders)
    body, _ = exporter.from_notebook_node(notebook, resources={"exported": EXPORTED_TAGS})
    body = re.sub(r'href="(?:\./|notebooks/)?(\w+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', body)
    body = re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', "", body).replace('src="../images/', 'src="images/')
    sections = find_sections(body)
    title = sections[0]["title"] if sections else file
    return SimpleNamespace(file=file, title=title, body=body, sections=sections)


def foreign_addresses(page: str) -> list[str]:
    """What a page would load from elsewhere: by attributes, style sheets, scripts. Links to follow are fine."""
    soup = BeautifulSoup(page, "html.parser")
    texts = [tag.get_text() for tag in soup(["script", "style"])]
    for tag in soup(True):
        names = FETCHED if tag.name in ("a", "area") else FETCHED | {"href"}
        texts += [tag[name] for name in names & tag.attrs.keys() if not tag[name].startswith("data:")]
    return [found for text in texts for found in ELSEWHERE.findall(text)]


def check_page(name: str, page: str, folder: Path) -> None:
    """Refused where a page needs the network, or shows a figure that is not there."""
    if foreign := foreign_addresses(page):
        why = "the book's pages work without a network"
        raise Refused(f"error: {name} would fetch {foreign[0]}; {why}", code=1)
    for target in re.findall(r'<img[^>]*\bsrc="(?!data:)([^"]+)"', page):
        if not (folder / target).is_file():
            raise Refused(f"error: {name} shows {target}, which is not there", code=1)


def build(folder: Path) -> int:
    """Writes the site into an empty folder -> the number of its pages. Refused where check_page refuses one."""
    readme = nbformat.v4.new_markdown_cell((ROOT / "README.md").read_text("utf-8"))
    pages = [make_page("index.html", nbformat.v4.new_notebook(cells=[readme]))]
    pages += [make_page(f"{path.stem}.html", nbformat.read(path, 4)) for path in book_notebooks(ROOT)]
    shutil.copytree(ROOT / "images", folder / "images")
    shutil.copy(FILES / "search.js", folder)
    colors = HtmlFormatter(style="default").get_style_defs(".highlight")
    (folder / "book.css").write_text((FILES / "book.css").read_text("utf-8") + colors, "utf-8")
    index = [{"page": p.file, "chapter": p.title} | section for p in pages for section in p.sections]
    (folder / "index.js").write_text(f"const BOOK = {json.dumps(index, ensure_ascii=False)};\n", "utf-8")
    template = Environment(loader=FileSystemLoader(FILES), autoescape=True).get_template("page.html.j2")
    for before, page, after in zip([None, *pages[:-1]], pages, [*pages[1:], None], strict=True):
        text = template.render(pages=pages, here=page, before=before, after=after)
        check_page(page.file, text, folder)
        (folder / page.file).write_text(text, "utf-8")
    return len(pages)


def make_site() -> int:
    commands.Parser(prog="site.py", description="Build the book as static pages.").parse_args()
    folder = ROOT / "build/site"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".site-", dir=folder.parent) as aside:
            made = Path(aside) / "site"
            made.mkdir()
            count = build(made)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    except OSError as error:
        raise Refused(f"error: cannot write {folder}: {error.strerror or error}", code=1) from None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{count} pages, {size / 1e6:.1f} MB: open {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(commands.run(make_site))
