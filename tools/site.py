"""The book as static pages: `make site` -> build/site/index.html, to be opened without a server or a network.

    python tools/site.py [--output DIR]

Pages are made by nbconvert from the notebooks as they were executed and committed; nothing runs here. Frame, search
and colours are of this file alone: no CDN, no web font, no MathJax, no require.js. Every notebook in notebooks/ becomes
a page. Ends with 1 and one line where a page would fetch something from elsewhere.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from tools.extract import book_notebooks  # noqa: E402

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="book.css">
</head>
<body>
<nav class="side">
<p class="name"><a href="index.html">A book you can launch</a></p>
<input id="search" type="search" placeholder="Search the book" aria-label="Search the book" autocomplete="off">
<ul id="found" aria-live="polite"></ul>
<ol>{chapters}</ol>
</nav>
<main>
{body}
<nav class="turn">{turn}</nav>
</main>
<script src="index.js"></script>
<script src="search.js"></script>
</body>
</html>
"""

CSS = """
:root { --ink: #1d1d1f; --faint: #b8bcc2; --pale: #f1f1f4; --accent: #0b4f8a; }
* { box-sizing: border-box; }
body { margin: 0; display: flex; color: var(--ink); font: 17px/1.55 system-ui, sans-serif; }
a { color: var(--accent); }
.side { width: 270px; flex: none; height: 100vh; overflow: auto; position: sticky; top: 0; padding: 20px;
        background: var(--pale); font-size: 15px; }
.side .name { font-weight: bold; margin: 0 0 12px; }
.side a { text-decoration: none; }
.side ol { list-style: none; padding: 0; }
.side li { margin: 6px 0; }
.side li.here > a { font-weight: bold; color: var(--ink); }
.side li ul { padding-left: 14px; list-style: none; font-size: 14px; }
#search { width: 100%; padding: 7px; font-size: 15px; border: 1px solid var(--faint); border-radius: 4px; }
#found { list-style: none; padding: 0; }
#found small { display: block; color: #55585e; }
main { max-width: 1060px; padding: 16px 32px 60px; min-width: 0; flex: 1; }
main p, main li, main table { max-width: 820px; }
main h1 { line-height: 1.2; }
h2, h3 { scroll-margin-top: 12px; }
.anchor-link { display: none; }
pre, code { font: 13.5px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
pre { margin: 0; overflow-x: auto; }
code { background: var(--pale); border-radius: 3px; padding: 0 3px; }
pre code { background: none; padding: 0; }
.code { border: 1px solid #dcdde1; border-left: 4px solid var(--faint); border-radius: 4px; padding: 10px 12px;
        background: #fafafb; margin: 12px 0 0; overflow-x: auto; position: relative; }
.code.exported { border-left-color: var(--accent); }
.code .tag { position: absolute; right: 8px; top: 2px; font-size: 12px; color: #777b82; }
.output { padding: 8px 12px 8px 16px; overflow-x: auto; }
.output + .code, .code + .text, .output + .text { margin-top: 18px; }
.output img, .output svg, main p img { max-width: 100%; height: auto; }
.output .stderr { background: #fdf3e4; }
.output .error { background: #fbe9e7; padding: 6px; }
table { border-collapse: collapse; margin: 12px 0; font-size: 16px; }
th, td { border-bottom: 1px solid #dcdde1; padding: 4px 10px; text-align: left; vertical-align: top; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--accent); }
.turn { display: flex; justify-content: space-between; margin-top: 40px; border-top: 1px solid #dcdde1;
        padding-top: 14px; }
.anim-controls .anim-state { display: inline; }
@media (max-width: 800px) { body { display: block; } .side { width: auto; height: auto; position: static; } }
@media print { .side, .turn { display: none; } }
"""

SEARCH = """
"use strict";
// BOOK: [{page, id, title, chapter, text}], a section each. Every word of the query must begin a word of the section.
const field = document.getElementById("search"), list = document.getElementById("found");
const words = (text) => text.toLowerCase().match(/[\\p{L}\\p{N}_]+/gu) || [];
const sections = BOOK.map((s) => ({ ...s, heads: words(s.title), all: words(s.text) }));

function score(section, query) {
  let total = 0;
  for (const word of query) {
    const inTitle = section.heads.filter((w) => w.startsWith(word)).length;
    const inText = section.all.filter((w) => w.startsWith(word)).length;
    if (!inTitle && !inText) return 0;
    total += 10 * inTitle + Math.min(inText, 8) * 400 / (400 + section.all.length);
  }
  return total;
}

function show() {
  const query = words(field.value);
  const hits = query.length ? sections.map((s) => [score(s, query), s]).filter((h) => h[0] > 0) : [];
  hits.sort((a, b) => b[0] - a[0]);
  list.replaceChildren(...hits.slice(0, 12).map(([, s]) => {
    const item = document.createElement("li"), link = document.createElement("a");
    const where = document.createElement("small");
    link.href = s.page + "#" + s.id;
    link.textContent = s.title;
    where.textContent = s.chapter;
    item.append(link, where);
    return item;
  }));
  if (query.length && !hits.length) list.textContent = "Nothing found.";
}
field.addEventListener("input", show);
"""

CELLS = """
{%- extends 'base/display_priority.j2' -%}
{%- block markdowncell -%}
<div class="text">{{ cell.source | markdown2html | strip_files_prefix }}</div>
{%- endblock -%}
{%- block input -%}
{%- set tags = cell.metadata.get('tags', []) -%}
{%- set is_folded = 'hide-input' in tags -%}
{%- if is_folded %}<details class="folded"><summary>its code</summary>{% endif -%}
<div class="code{% if tags and tags[0] in resources.exported %} exported{% endif %}" id="{{ cell.id }}">
<span class="tag">{{ tags[0] if tags }}</span>{{ cell.source | highlight_code(metadata=cell.metadata) }}</div>
{%- if is_folded %}</details>{% endif -%}
{%- endblock -%}
{%- block output_group -%}{%- if cell.outputs -%}<div class="output">{{ super() }}</div>{%- endif -%}{%- endblock -%}
{%- block stream_stdout -%}<pre>{{ output.text | ansi2html }}</pre>{%- endblock -%}
{%- block stream_stderr -%}<pre class="stderr">{{ output.text | ansi2html }}</pre>{%- endblock -%}
{%- block error -%}<pre class="error">{{ output.traceback | join('\\n') | ansi2html }}</pre>{%- endblock -%}
{%- block execute_result scoped -%}
{%- block data_priority scoped -%}{{ super() }}{%- endblock -%}
{%- endblock execute_result -%}
{%- block data_text scoped -%}<pre>{{ output.data['text/plain'] | ansi2html }}</pre>{%- endblock -%}
{%- block data_html scoped -%}{{ output.data['text/html'] }}{%- endblock -%}
{%- block data_svg scoped -%}
<img alt="{{ cell.id }}" src="data:image/svg+xml;base64,{{ output.data['image/svg+xml'] | base64 }}">{%- endblock -%}
{%- block data_png scoped -%}
<img alt="{{ cell.id }}" src="data:image/png;base64,{{ output.data['image/png'] }}">{%- endblock -%}
{%- block data_markdown scoped -%}{{ output.data['text/markdown'] | markdown2html }}{%- endblock -%}
"""


@dataclass(frozen=True)
class Chapter:
    """One page: its file name, its title, its body, its sections [(id, title, text)]."""

    page: str
    title: str
    body: str
    sections: list[tuple[str, str, str]]


class Sections(HTMLParser):
    """Cuts a page's body at its headings, for the index: [(heading's id, its text, the text up to the next)]."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[str]] = []
        self.in_heading = self.is_hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.is_hidden = tag in ("script", "style", "svg")
        if tag in ("h1", "h2", "h3"):
            self.found.append([dict(attrs).get("id") or "", "", ""])
            self.in_heading = True

    def handle_endtag(self, tag: str) -> None:
        self.is_hidden = False
        if tag in ("h1", "h2", "h3"):
            self.in_heading = False

    def handle_data(self, data: str) -> None:
        if self.found and not self.is_hidden:
            self.found[-1][1 if self.in_heading else 2] += data.replace("¶", "")


def exporter() -> object:
    """nbconvert's HTML exporter with our cells in place of its page."""
    import base64

    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    made = HTMLExporter(
        template_name="basic",
        extra_loaders=[DictLoader({"cells.html.j2": CELLS})],
        template_file="cells.html.j2",
    )
    made.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    return made


def make_chapter(path: Path, convert: object) -> Chapter:
    """A notebook -> its page."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    body, _ = convert.from_notebook_node(notebook, resources={"exported": EXPORTED})
    body = re.sub(r'href="(?:\./)?(\d\d_\w+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', body)
    body = re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', "", body)
    sections = Sections()
    sections.feed(body)
    title = sections.found[0][1].strip() if sections.found else path.stem
    return Chapter(
        f"{path.stem}.html", title, body, [tuple(map(str.strip, found)) for found in sections.found]
    )


def make_front(convert: object) -> Chapter:
    """README.md -> the front page; its links to notebooks lead to the pages."""
    import nbformat

    text = (ROOT / "README.md").read_text("utf-8")
    text = re.sub(r"\]\(notebooks/(\w+)\.ipynb\)", r"](\1.html)", text)
    cell = nbformat.v4.new_markdown_cell(text)
    body, _ = convert.from_notebook_node(
        nbformat.v4.new_notebook(cells=[cell]), resources={"exported": EXPORTED}
    )
    body = re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', "", body)
    sections = Sections()
    sections.feed(body)
    return Chapter(
        "index.html", sections.found[0][1], body, [tuple(map(str.strip, f)) for f in sections.found]
    )


EXPORTED = ("theory", "all_to_all", "experts", "training", "performance", "routing")


def list_chapters(chapters: list[Chapter], here: Chapter) -> str:
    """The contents, with the sections of the page that is open."""
    lines = []
    for chapter in chapters:
        is_here = chapter is here
        inner = "".join(
            f'<li><a href="#{html.escape(name)}">{html.escape(title)}</a></li>'
            for name, title, _ in chapter.sections[1:] * is_here
        )
        mark = ' class="here"' if is_here else ""
        below = f"<ul>{inner}</ul>" if inner else ""
        lines.append(f'<li{mark}><a href="{chapter.page}">{html.escape(chapter.title)}</a>{below}</li>')
    return "\n".join(lines)


def turn_links(pages: list[Chapter], number: int) -> str:
    """Previous and next."""
    before = pages[number - 1] if number else None
    after = pages[number + 1] if number + 1 < len(pages) else None
    left = (
        f'<a rel="prev" href="{before.page}">&larr; {html.escape(before.title)}</a>'
        if before
        else "<span></span>"
    )
    right = f'<a rel="next" href="{after.page}">{html.escape(after.title)} &rarr;</a>' if after else ""
    return left + right


def foreign_addresses(page: str) -> list[str]:
    """What a page would load from elsewhere: sources, style sheets, imports. Links to follow are fine."""
    kinds = "script|img|iframe|video|audio|source|embed"
    found = re.findall(rf"""<(?:{kinds})\b[^>]*\bsrc=["']((?:https?:)?//[^"']+)""", page)
    found += re.findall(r"""<link\b[^>]*\bhref=["']((?:https?:)?//[^"']+)""", page)
    return found + re.findall(r"""(?:@import|url\()\s*["']?((?:https?:)?//[^"')]+)""", page)


def build(folder: Path) -> list[Path]:
    """Writes the site -> its pages. ValueError where a page needs the network, or shows a figure that is not there."""
    from pygments.formatters import HtmlFormatter

    convert = exporter()
    front = make_front(convert)
    chapters = [make_chapter(path, convert) for path in book_notebooks(ROOT)]
    pages = [front, *chapters]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "images", folder / "images")
    index = [
        {
            "page": chapter.page,
            "id": name,
            "title": title,
            "chapter": chapter.title,
            "text": " ".join(text.split()),
        }
        for chapter in pages
        for name, title, text in chapter.sections
    ]
    (folder / "index.js").write_text(f"const BOOK = {json.dumps(index, ensure_ascii=False)};\n", "utf-8")
    (folder / "search.js").write_text(SEARCH.lstrip(), "utf-8")
    colors = HtmlFormatter(style="default").get_style_defs(".highlight")
    (folder / "book.css").write_text(CSS.lstrip() + colors, "utf-8")
    written = []
    for number, chapter in enumerate(pages):
        text = PAGE.format(
            title=html.escape(chapter.title), chapters=list_chapters(pages, chapter), body=chapter.body,
            turn=turn_links(pages, number),
        )  # fmt: skip
        if foreign := foreign_addresses(text):
            raise ValueError(
                f"{chapter.page} would fetch {foreign[0]}; the book's pages work without a network"
            )
        for target in re.findall(r'<img[^>]*\bsrc="(?!data:)([^"]+)"', text):
            if not (folder / target).is_file():
                raise ValueError(f"{chapter.page} shows {target}, which is not there")
        (folder / chapter.page).write_text(text, "utf-8")
        written.append(folder / chapter.page)
    return written


def main() -> int:
    """The command line -> exit code."""
    parser = argparse.ArgumentParser(prog="site.py", description="Build the book as static pages.")
    parser.add_argument("--output", metavar="DIR", default=str(ROOT / "build" / "site"))
    folder = Path(parser.parse_args().output).resolve()
    if folder == ROOT or folder in ROOT.parents or (folder.exists() and not (folder / "book.css").exists()):
        print(f"error: {folder} holds something else; name a new folder", file=sys.stderr)
        return 2
    try:
        pages = build(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(pages)} pages, {size / 1e6:.1f} MB: open {pages[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
