"""A text too large to learn by heart: the sources of Python 3.11.7's standard library and of torch 2.13.0.

    python measure/corpus.py        writes build/python.txt.xz (14 MB), which measure/language.py reads

Both are in the pinned environment, under their own licences (PSF, BSD), so nothing is downloaded and nothing is kept in
the repository. Every file is a document; form feeds stand between two. The hash below is that of the text that the
results were measured with: another version of Python or of torch gives another text, and is refused.
"""

import hashlib
import lzma
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKED, TEXT = ROOT / "build" / "python.txt.xz", ROOT / "build" / "python.txt"
SHA256 = "4b15687bcf19383c4e5cd2f177e646d3a63a69bc144f0dababc7a617a8fe7bc3"
TABLES = ("encodings", "_sysconfigdata", "site-packages", "annotated_fn_args", "lib2to3/tests/data")
SHORTEST, LONGEST = 200, 450_000  # bytes of a file: no stubs, and no tables of data


def documents() -> Iterator[str]:
    """Every source file's text once, by folder and name, without form feeds, which some sources hold."""
    import torch

    seen = set()
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent):
        for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
            name = path.relative_to(folder).as_posix()
            if any(table in name for table in TABLES) or not SHORTEST <= path.stat().st_size <= LONGEST:
                continue
            try:
                text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\f", "")
            except UnicodeDecodeError:
                continue  # a test's file, wrong on purpose
            if text not in seen:
                seen.add(text)
                yield text


def checked(data: bytes) -> bytes:
    """The same bytes. ValueError where they are not those that the results were measured with."""
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ValueError(
            f"this text has SHA-256 {found[:12]}, not {SHA256[:12]}: it takes Python 3.11.7 and torch 2.13.0"
        )
    return data


def unpacked() -> Path:
    """build/python.txt, unpacked from build/python.txt.xz where it is not there yet. ValueError where neither is."""
    if not TEXT.is_file():
        if not PACKED.is_file():
            raise ValueError(f"{PACKED.name} is not in build/; run `python measure/corpus.py` first")
        TEXT.with_suffix(".part").write_bytes(checked(lzma.decompress(PACKED.read_bytes())))
        TEXT.with_suffix(".part").replace(TEXT)
    return TEXT


def main() -> None:
    """Builds the text, checks it, packs it."""
    data = "\f".join(documents()).encode()
    print(
        f"{len(data):,} bytes, {data.count(12) + 1:,} documents, SHA-256 {hashlib.sha256(data).hexdigest()}"
    )
    try:
        checked(data)
    except ValueError as error:
        sys.exit(f"error: {error}")
    PACKED.parent.mkdir(exist_ok=True)
    PACKED.write_bytes(lzma.compress(data, preset=6))
    print(f"{PACKED.relative_to(ROOT)}: {PACKED.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
