"""One browser, one JupyterLab, a copy of the book: shared by the tests that look at it as a reader does.

`make test-browser` runs them. They need Debian's Chromium (another one: CHROMIUM=/path/to/it) and Playwright's Python
package; nothing is downloaded. Whatever a page asks of another host than this one is refused, and noted.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pages import TOKEN, end_tree, free_port, wait_until
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from support import ROOT

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree, as a clone would have it: what is run here changes no committed file."""
    folder = tmp_path_factory.mktemp("browser") / "book"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(
        listed, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For programs of the tests: settings of this user's Jupyter have no part in them."""
    folder = tmp_path_factory.mktemp("jupyter")
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "RUNTIME", "DATA")}
    own |= {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "spaces"),
    }
    return os.environ | own | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def serve(
    book: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable]:
    """serve("lab", "--flag") starts `make lab` in the copy -> (its port, its log). Ended after the tests."""
    started = []

    def start(target: str, *flags: str) -> tuple[int, Path]:
        port, log = free_port(), tmp_path_factory.mktemp(target) / "log"
        command = ["make", target, f"PY={sys.executable}", f"ARGS=--port={port} {' '.join(flags)}"]
        with open(log, "wb") as out:
            process = subprocess.Popen(
                command, cwd=book, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        started.append(process)

        def listens() -> bool:
            assert process.poll() is None, log.read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(listens, 60, f"make {target} listens")
        return port, log

    yield start
    for process in started:
        end_tree(process)


@pytest.fixture(scope="session")
def lab(serve: Callable) -> str:
    """JupyterLab's address, as `make lab` starts it."""
    flags = ["--no-browser", f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True"]
    flags += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    port, _ = serve("lab", *flags)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, without a window and with an empty profile."""
    path = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A fresh session. Requests to other hosts are refused, and listed in context.foreign."""
    made = browser.new_context(viewport={"width": 1300, "height": 1000})
    made.foreign = []

    def refuse(route) -> None:
        made.foreign.append(route.request.url)
        route.abort()

    made.route(lambda url: not url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:")), refuse)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    page = context.new_page()
    page.set_default_timeout(60_000)
    return page
