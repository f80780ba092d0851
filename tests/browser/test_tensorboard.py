"""TensorBoard in a browser, as `make tensorboard` starts it: the loss curve, the load histogram, the routing image."""

import shutil
import subprocess
import sys

import pytest
from pages import wait_until
from playwright.sync_api import Locator, Page


@pytest.fixture(scope="module")
def board(book, environment, serve) -> str:
    """The address of TensorBoard over one short run."""
    shutil.rmtree(book / "ep_launcher" / "runs", ignore_errors=True)  # of earlier notebooks
    run = [
        sys.executable,
        "tools/launch.py",
        "--nproc",
        "2",
        "--device",
        "cpu",
        "--steps",
        "60",
        "--log-interval",
        "5",
    ]
    run += ["--hidden-dim", "32", "--ffn-dim", "32", "--log-dir", "ep_launcher/runs/seen"]
    subprocess.run(run, cwd=book, env=environment, check=True, capture_output=True, timeout=120)
    port, _ = serve("tensorboard")
    return f"http://127.0.0.1:{port}"


def card(page: Page, board: str, plugin: str, kind: str, tag: str) -> Locator:
    """The card of a tag, on the page of a plugin."""
    page.goto(f"{board}/#{plugin}")
    found = page.locator(kind, has=page.get_by_text(f"tag: {tag}", exact=True))
    found.wait_for(state="attached")
    found.scroll_into_view_if_needed()
    return found


def test_the_loss_curve(board, page, context):
    found = card(page, board, "scalars", "tf-scalar-card", "loss/task")
    line = found.locator("path.line").first
    page.wait_for_function(
        "(line) => line.getAttribute('d').split('L').length >= 12", arg=line.element_handle()
    )
    assert not context.foreign, context.foreign


def test_the_load_histogram(board, page):
    found = card(page, board, "histograms", "tf-histogram-loader", "load/per_expert")
    layers = found.locator("path.outline")  # one for each step that was logged
    wait_until(lambda: layers.count() == 12, 30, "twelve layers of the histogram")
    assert all(len(layer.get_attribute("d")) > 100 for layer in layers.all())


def test_the_routing_image(board, page):
    found = card(page, board, "images", "tf-image-loader", "load/over_time")
    picture = found.locator("img")
    picture.wait_for()
    page.wait_for_function("(picture) => picture.naturalWidth > 0", arg=picture.element_handle())
    size = picture.evaluate("(picture) => [picture.naturalWidth, picture.naturalHeight]")
    assert size == [13, 16], (
        "a column for each of 12 intervals and for the steps behind them, a row for each expert"
    )
