"""JupyterLab in a browser: every notebook from top to bottom, output while it runs, an interrupt, the sliders."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from pages import TOKEN, wait_until
from playwright.sync_api import Page
from support import ROOT

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
LIMIT_S = 400  # for one notebook, on a busy machine; on an idle one none takes more than 120

READY = """() => {
  const widget = window.jupyterapp && window.jupyterapp.shell.currentWidget;
  if (!widget || !widget.content || !widget.content.model || !widget.sessionContext) return false;
  const kernel = widget.sessionContext.session && widget.sessionContext.session.kernel;
  return widget.context.isReady && widget.sessionContext.isReady && kernel && kernel.status === 'idle';
}"""
RUN_ALL = """() => {
  window.ended = null;
  window.jupyterapp.commands.execute('notebook:run-all-cells').then(
    () => { window.ended = 'through'; }, (error) => { window.ended = String(error); });
}"""
CELLS = "() => JSON.stringify(window.jupyterapp.shell.currentWidget.content.model.toJSON().cells)"
STATUS = "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"
SHUT_DOWN = "() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()"


def open_notebook(page: Page, lab: str, name: str) -> None:
    """Opens a notebook of the book, and waits for its kernel."""
    page.goto(f"{lab}/lab/tree/notebooks/{name}?token={TOKEN}&reset")
    page.wait_for_function(READY, polling=500)


def cells(page: Page) -> list[dict]:
    """The code cells, with their outputs as they are now."""
    return [cell for cell in json.loads(page.evaluate(CELLS)) if cell["cell_type"] == "code"]


def wait_for_the_end(page: Page) -> None:
    """Until Run All is through: every cell was run, or the kernel has nothing more to do.

    The command's own promise ends at the first error, also at one that a cell's tag allows; the kernel goes on.
    """
    page.wait_for_function("window.ended", polling=500, timeout=1000 * LIMIT_S)
    assert page.evaluate("window.ended") == "through"
    idle_since = time.monotonic()

    def is_over() -> bool:
        nonlocal idle_since
        if page.evaluate(STATUS) != "idle":
            idle_since = time.monotonic()
        return time.monotonic() - idle_since > 5 or all(cell["execution_count"] for cell in cells(page))

    wait_until(is_over, LIMIT_S, "all cells were run")


def text_of(cell: dict) -> str:
    """All text that a cell has put out."""
    return "".join("".join(output.get("text", [])) for output in cell["outputs"])


def ranks_of(book: Path) -> list[psutil.Process]:
    """The processes of the copy's runs: torchrun, and the ranks forked from it, which keep its command line."""
    found, agent = [], str(book / "tools" / "ranks" / "agent.py")
    for process in psutil.process_iter(["name", "cmdline", "status"]):
        of_a_run = process.info["name"] == "torchrun" or process.info["name"].startswith("rank ")
        words = {os.path.normpath(word) for word in process.info["cmdline"] or ()}
        if of_a_run and agent in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_the_lab_asks_for_its_token_and_listens_here_alone(lab):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{lab}/api/contents", timeout=20)
    assert refused.value.code == 403
    listed = json.load(urllib.request.urlopen(f"{lab}/api/contents/notebooks?token={TOKEN}", timeout=20))
    assert (
        sorted(entry["name"] for entry in listed["content"] if entry["name"].endswith(".ipynb")) == NOTEBOOKS
    )
    port = int(lab.rpartition(":")[2])
    hosts = {
        c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port
    }
    assert hosts == {"127.0.0.1"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all(name, page, context, lab):
    open_notebook(page, lab, name)
    page.evaluate(RUN_ALL)
    wait_for_the_end(page)
    for cell in cells(page):
        errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
        if "raises-exception" not in cell["metadata"]["tags"]:
            assert not errors, f"#{cell['id']}: {errors[0]['evalue']}"
        assert cell["execution_count"], f"#{cell['id']} was not run"
    if name.startswith("01"):
        check_sliders(page)
    assert not context.foreign, context.foreign
    page.evaluate(SHUT_DOWN)


def test_committed_figures_show_and_solutions_are_folded(page, lab):
    """A committed figure is a link to its file in images/; nothing has to run for it."""
    open_notebook(page, lab, "03_experts.ipynb")
    ids = [cell["id"] for cell in json.loads(page.evaluate(CELLS))]
    for cell_id, is_there in (
        (
            "picture-figure",
            "[...document.images].some((i) => /03_routing/.test(i.src) && i.naturalWidth > 0)",
        ),
        ("solution-activation", "document.querySelector('.jp-InputPlaceholder')"),
    ):
        number = ids.index(cell_id)
        page.evaluate(f"() => window.jupyterapp.shell.currentWidget.content.scrollToItem({number}, 'center')")
        page.wait_for_function(f"() => {is_there}", polling=200)
    page.evaluate(SHUT_DOWN)


def check_sliders(page: Page) -> None:
    """Chapter 01's sliders are there, and moving one draws another figure."""
    number = next(
        n for n, cell in enumerate(json.loads(page.evaluate(CELLS))) if cell["id"] == "bytes-control"
    )
    page.evaluate(f"() => window.jupyterapp.shell.currentWidget.content.scrollToItem({number}, 'center')")
    control = page.locator(".widget-interact")
    control.locator(".noUi-handle").first.wait_for()
    assert control.locator(".noUi-handle").count() == 5
    picture = control.locator("img")
    picture.wait_for()
    before = picture.get_attribute("src")
    handle = control.locator(".widget-hslider", has_text="ranks").locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowLeft")
    wait_until(
        lambda: picture.count() == 1 and picture.get_attribute("src") != before, 30, "the figure changes"
    )


def write_scratch(book: Path) -> str:
    """A notebook that launches a run far too long to wait for."""
    setup = "import sys\nsys.path.insert(0, '..')\nfrom tools.launch import launch"
    run = "launch(nproc=2, steps=1_000_000, log_interval=20, device='cpu', hidden_dim=32, ffn_dim=32)"
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": ""}},
    }
    notebook["cells"] = [
        {
            "cell_type": "code",
            "id": name,
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": source,
        }
        for name, source in (("setup", setup), ("run", run))
    ]
    (book / "notebooks" / "scratch.ipynb").write_text(json.dumps(notebook))
    return "scratch.ipynb"


def test_output_streams_and_an_interrupt_leaves_nothing(page, lab, book):
    try:
        open_notebook(page, lab, write_scratch(book))
        page.evaluate(RUN_ALL)
        # A log line stands there, and a later one comes, while the cell is running.
        wait_until(lambda: "[step" in text_of(cells(page)[1]), 120, "a line of the log")
        first = text_of(cells(page)[1])
        wait_until(lambda: len(text_of(cells(page)[1])) > len(first), 30, "another line of the log")
        assert page.evaluate("window.ended") is None and cells(page)[1]["execution_count"] is None
        page.get_by_text("[step", exact=False).first.wait_for()  # on the screen, not only in the model
        assert len(ranks_of(book)) >= 3
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
        took = wait_until(lambda: not ranks_of(book), 20, "every rank has ended")
        assert took <= 5, f"the ranks ended {took:.1f} s after the interrupt"
        page.wait_for_function("window.ended", polling=200)
        (error,) = (output for output in cells(page)[1]["outputs"] if output["output_type"] == "error")
        assert len(error["traceback"]) <= 15 and "every rank has ended" in error["evalue"]
        page.evaluate(SHUT_DOWN)
    finally:
        (book / "notebooks" / "scratch.ipynb").unlink()


def test_nothing_of_the_book_was_changed(book):
    """Run All writes figures: they are those that are committed."""
    for path in sorted((book / "images").iterdir()):
        same = subprocess.run(["cmp", "-s", str(path), str(ROOT / "images" / path.name)]).returncode == 0
        assert same, f"images/{path.name} differs after the notebooks ran in the browser"
