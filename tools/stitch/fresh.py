"""For a running kernel: are launcher.py, the saved notebooks and the kernel's definitions the same?"""

import ast
import os
import re
import sys
from pathlib import Path

from tools.commands import Refused
from tools.stitch import reading
from tools.stitch.program import assemble, sources_sha256
from tools.stitch.reading import EXPORTED_TAGS, LAUNCHER, LAUNCHER_MODULE, ROOT


def _read_launcher(root: Path) -> str:
    """The launcher's text, as it lies there; a missing one has no cells."""
    return (root / LAUNCHER).read_text("utf-8", errors="replace") if (root / LAUNCHER).is_file() else ""


def _cells_in(text: str) -> dict[str, str]:
    """{cell's label: its text in a stitched file}."""
    return dict(re.findall(r"^# %% ([^\n]+)\n(.*?)\n*(?=^# %% |^# =====|\Z)", text, re.M | re.S))


def assert_fresh(root: str | os.PathLike[str] = ROOT) -> None:
    """Check that ep_launcher/launcher.py holds what the saved notebooks say, and that this kernel imported it.

    root: the repo. Raises RuntimeError, one line, naming the first cells that differ. Compares texts and does not
    check the cell rules: well under 0.2 s.
    """
    root = Path(root).resolve()
    stored = _read_launcher(root)
    try:
        chosen = reading.select(reading.read_book(root), EXPORTED_TAGS)
        wanted = assemble(chosen, is_launcher=True)
    except Refused as refused:
        raise RuntimeError(refused.lines[0]) from None
    if stored != wanted:
        old, new = _cells_in(stored), _cells_in(wanted)
        names = [label for label in {**new, **old} if old.get(label) != new.get(label)]
        names = names or ["the order or the tags of the notebooks' cells"]
        more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
        mend = "save, run `make launcher`, restart the kernel"
        raise RuntimeError(f"{LAUNCHER} differs from {', '.join(names[:3])}{more}: {mend}")
    module = sys.modules.get(LAUNCHER_MODULE)
    if module and Path(getattr(module, "__file__", None) or "").resolve() == root / LAUNCHER:
        if module.SOURCES_SHA256 != sources_sha256(chosen):
            raise RuntimeError(f"this kernel imported an older {LAUNCHER}: restart the kernel")


def _definitions(text: str) -> dict[str, str | None]:
    """{name: content} for what a text's top level binds; no content where it is no def or class."""
    bindings = reading.find_bindings(reading.parse_leniently(text))
    return {b.name: ast.dump(b.node) if hasattr(b.node, "body") else None for b in bindings}


def check_kernel_definitions(namespace: dict, root: str | os.PathLike[str] = ROOT) -> None:
    """Check that functions and classes defined in a kernel are those that launcher.py would run.

    namespace: the kernel's variables; its `In` holds the sources executed so far, of which the last definition of a
    name counts, and without which nothing is compared. Spaces and comments do not matter, docstrings do. Raises
    RuntimeError, one line, with the names that differ. Not compared: constants, and what a magic or `exec` defines.
    """
    in_kernel: dict[str, str | None] = {}
    for source in namespace.get("In", ()):
        # A cell magic may run its body in this kernel, or, as `%%ranks` does, anywhere else.
        if isinstance(source, str) and not source.lstrip().startswith("%%"):
            in_kernel |= _definitions(source)
    if not in_kernel:
        return
    in_file = _definitions(_read_launcher(Path(root)))
    names = [n for n, content in in_file.items() if content and n in namespace and in_kernel.get(n)]
    listed = ", ".join(f"`{name}`" for name in names if in_kernel[name] != in_file[name])
    if listed:
        mend = "save the notebook, make launcher, rerun"
        raise RuntimeError(f"launcher.py runs another {listed} than this kernel: {mend}")
