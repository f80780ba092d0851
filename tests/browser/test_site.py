"""The book as a site, opened from the disk with the network off."""

import re
import subprocess
import sys

import pytest

SHOWN = (
    "() => [...document.images].filter((i) => !(i.complete && i.naturalWidth > 0)).map((i) => i.alt || i.src)"
)


@pytest.fixture(scope="module")
def site(book):
    """The pages, made from the committed outputs."""
    done = subprocess.run(
        [sys.executable, "tools/site.py"], cwd=book, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return book / "build" / "site"


@pytest.fixture
def offline(context, page):
    """A page without a network that collects what goes wrong on it."""
    context.set_offline(True)
    page.wrong = []
    page.on("requestfailed", lambda request: page.wrong.append(request.url))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    return page


def test_next_leads_through_the_whole_book_and_every_figure_shows(site, book, offline, context):
    page = offline
    page.goto((site / "index.html").as_uri())
    names = []
    while True:
        names.append(page.url.rpartition("/")[2])
        page.wait_for_load_state("load")
        page.wait_for_function(f"() => ({SHOWN})().length === 0")
        cells = page.locator(".code").count()
        assert cells > 10 or names[-1] == "index.html"
        onward = page.locator("a[rel=next]")
        if not onward.count():
            break
        onward.click()
    chapters = [
        f"{path.stem}.html" for path in sorted((book / "notebooks").glob("*.ipynb")) if path.stem[0].isdigit()
    ]
    assert names == ["index.html", *chapters]
    page.locator("a[rel=prev]").click()
    assert page.url.endswith(names[-2])
    assert not page.wrong and not context.foreign, (page.wrong, context.foreign)


def test_links_between_pages_lead_somewhere(site):
    pages = {path.name: path.read_text("utf-8") for path in site.glob("*.html")}
    for name, text in pages.items():
        for target in re.findall(r'href="([^"#:]*\.html)?#?[^"]*"', text):
            assert not target or target in pages, f"{name} leads to {target}"


def test_the_search_finds_sections_and_leads_there(site, offline):
    page = offline
    page.goto((site / "index.html").as_uri())
    page.fill("#search", "padding passes")
    found = page.locator("#found a")
    assert "padding" in found.first.inner_text().lower()
    found.first.click()
    page.wait_for_url(re.compile(r"02_all_to_all\.html#."))
    heading = page.locator(f"[id='{page.url.partition('#')[2]}']")
    assert heading.count() == 1 and heading.bounding_box()["y"] < 400
    page.fill("#search", "zzzz")
    assert page.locator("#found").inner_text() == "Nothing found."
    assert not page.wrong


def test_the_player_steps_through_the_flight(site, offline):
    page = offline
    page.goto((site / "02_all_to_all.html").as_uri())
    player = page.locator(".animation")
    picture = player.locator("img")
    picture.scroll_into_view_if_needed()
    player.get_by_label("First frame").click()
    first = picture.get_attribute("src")
    player.get_by_label("Next frame").click()
    assert player.get_by_label("Next frame").inner_text() == "Next"  # in words, without a font of icons
    assert picture.get_attribute("src") != first
    assert not page.wrong
