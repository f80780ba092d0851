"""How a command of tools/ says that it cannot do what was asked, or was interrupted: in lines, and by its exit code."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


class Refused(Exception):
    """What was asked cannot be done. lines: the reasons, one line each, ready for stderr; code: the exit code."""

    def __init__(self, *lines: str, code: int = 2) -> None:
        self.lines, self.code = [one_line(line) for line in dict.fromkeys(lines)], code
        super().__init__("\n".join(self.lines))


def one_line(text: str) -> str:
    """Text with every character that could break the line, or the terminal, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Parser(argparse.ArgumentParser):
    """Raises Refused where argparse would print its usage and exit."""

    def error(self, message: str) -> None:
        raise Refused(f"error: {message}; see --help")


def run(command: Callable[[], int], ended: str = "") -> int:
    """The command's exit code; what it refuses goes to stderr. Ctrl-C and SIGTERM interrupt it, which is 130 and one
    line; ended: what that says, where the interrupt itself says nothing."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        return command()
    except Refused as refused:
        print("\n".join(refused.lines), file=sys.stderr)
        return refused.code
    except KeyboardInterrupt as stopped:
        print(": ".join(filter(None, ["interrupted", str(stopped) or ended])), file=sys.stderr)
        return 130


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file as a whole, its mode kept, or leaves it as it was and raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(data)
        if path.exists():
            aside.chmod(path.stat().st_mode)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
