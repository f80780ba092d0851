"""Start torchrun from a cell, or from a shell.

    from tools.launch import launch
    summary = launch(nproc=2, steps=300)          in a notebook; any flag of launcher.py as a keyword

    %load_ext tools.launch                        then, on top of a cell:
    %%ranks 4 --collect rows                      runs the cell's body on 4 fresh ranks: tools/ranks/

    python tools/launch.py [--nproc N] [FLAG...]  in a shell: what `make train` does

A notebook kernel is one process; torchrun starts others, which cannot see its memory and do not end with it.
This file keeps the two together: output as it comes, one short message for a failure, no process left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from tools.extract import assert_fresh, check_kernel_definitions  # noqa: E402

LAUNCHER = ROOT / "ep_launcher" / "launcher.py"
WORKER = ROOT / "tools" / "ranks" / "worker.py"
MOST_LINES = 15  # of a failure's message
STOP_S = 3.0  # what a run gets to stop by itself before it is killed
FAILED_S = (
    6.0  # the same, once a rank has left with an error; torchrun would wait 30 s for a rank that is stuck
)
LIBRARY_LOG = re.compile(r"^\[[WIEF]\d{3,4} |^[WIEF]\d{4} |^\[Gloo\]")
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch's, on the lines of an uncaught exception
LOCAL_PATHS = (str(ROOT) + os.sep, "")


class OneMessage(BaseException):
    """An error that a notebook shows as its message alone: `lines`, without a traceback."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = list(lines)
        super().__init__("\n".join(self.lines))

    def _render_traceback_(self) -> list[str]:
        """IPython's hook for an exception's own look."""
        return [f"{type(self).__name__}: {self.lines[0]}", *self.lines[1:]]


class LaunchError(OneMessage, RuntimeError):
    """A run that could not start, or failed. rank: the one that failed first, None where it is not known.

    lines: at most 15; log_dir: where the ranks' whole output is, or None; returncode: for a shell.
    """

    def __init__(
        self,
        lines: Sequence[str],
        *,
        rank: int | None = None,
        log_dir: Path | None = None,
        returncode: int = 1,
    ) -> None:
        super().__init__([lines[0].removeprefix("error: "), *lines[1:]])
        self.rank, self.log_dir, self.returncode = rank, log_dir, returncode


class Interrupted(OneMessage, KeyboardInterrupt):
    """A run or a cell that was interrupted, after every process of it has ended."""


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path as seen from the repository's root; absolute where it lies outside."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute, ROOT)
    return absolute if relative.startswith("..") else relative


def kernel() -> Any:
    """The IPython shell this runs in, or None."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module else None


def is_live_notebook() -> bool:
    """Whether a person looks at this kernel: a front end that could answer a question, unlike papermill."""
    shell = kernel()
    try:
        return bool(shell.get_parent()["content"]["allow_stdin"])
    except (AttributeError, KeyError, TypeError):
        return False


# ----------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------


def flag_arguments(flags: dict[str, Any]) -> list[str]:
    """{"top_k": 2, "normalize_topk": True, "log_dir": None} -> ["--top-k", "2", "--normalize-topk"]."""
    arguments = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = str(value)
            # A value that starts with a dash would pass for a flag, were it not tied to its own.
            arguments += [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]
    return arguments


def load_launcher(script: Path) -> ModuleType | None:
    """The module of a stitched launcher, to read its flags; None for a script that has none to read."""
    if script == LAUNCHER:
        import ep_launcher.launcher

        return ep_launcher.launcher
    if not re.search(r"^def parse_flags\(", script.read_text("utf-8"), re.MULTILINE):
        return None
    name = f"ep_launcher_at_{abs(hash(str(script)))}"
    spec = importlib.util.spec_from_file_location(name, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def check_flags(arguments: list[str], script: Path) -> dict[str, Any]:
    """{flag's field: value} as the launcher itself reads them. LaunchError, one line, where it refuses them."""
    module = load_launcher(script)
    if module is None:
        return {}
    try:
        with contextlib.chdir(ROOT):  # where torchrun starts, and --plugin is looked for
            module.parse_flags(arguments)
        return vars(module.make_parser().parse_args(arguments))
    except ValueError as error:
        message = str(error)
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            known = [option for action in module.make_parser()._actions for option in action.option_strings]
            close = difflib.get_close_matches(unknown[1], known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            message = f"launcher.py has no flag {unknown[1]}; {hint}--help lists the flags"
        raise LaunchError([f"error: {message}"], returncode=2) from None


def place_paths(arguments: list[str]) -> list[str]:
    """Paths given relative to the current folder, as seen from the root, where torchrun starts."""
    placed = list(arguments)
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--log-dir", "--summary", "--plugin"):
            if equals:
                placed[index] = f"{flag}={shown_path(value)}"
            elif index + 1 < len(arguments):
                placed[index + 1] = shown_path(arguments[index + 1])
    return placed


def default_nproc() -> int:
    """One process a GPU where there are two or more, else two, on the CPU."""
    import torch

    return max(2, torch.cuda.device_count())


def torchrun_arguments(
    nproc: int,
    nnodes: int,
    master_port: int | None,
    rdzv_endpoint: str | None,
    rdzv_id: str,
    rdzv_conf: str | None,
) -> list[str]:
    """torchrun's own flags. LaunchError where they do not fit together, or the port is taken."""
    if nproc < 1 or nnodes < 1:
        raise LaunchError(
            [f"error: {nproc} processes on {nnodes} hosts make no run; take 1 or more"], returncode=2
        )
    if nnodes == 1 and master_port is None:
        return ["--standalone", f"--nproc_per_node={nproc}"]
    if nnodes == 1:
        check_port(master_port)
        return [f"--nproc_per_node={nproc}", "--master-addr=127.0.0.1", f"--master-port={master_port}"]
    if not rdzv_endpoint:
        raise LaunchError(
            [f"error: {nnodes} hosts must find one another; give each the same --rdzv-endpoint HOST:PORT"],
            returncode=2,
        )
    conf = [f"--rdzv-conf={rdzv_conf}"] if rdzv_conf else []
    return [
        f"--nnodes={nnodes}", f"--nproc_per_node={nproc}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={rdzv_endpoint}", f"--rdzv-id={rdzv_id}", *conf,
    ]  # fmt: skip


def port_is_taken(port: int) -> LaunchError:
    return LaunchError(
        [f"error: port {port} is in use by another program; name another one, or leave --master-port out"],
        returncode=2,
    )


def check_port(port: int) -> None:
    """LaunchError where the port cannot be listened on."""
    if not 1 <= port <= 65535:
        raise LaunchError([f"error: there is no port {port}; take one from 1024 to 65535"], returncode=2)
    with socket.socket() as probe:
        # As torchrun does: a port of a run that has just ended is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except PermissionError:
            raise LaunchError([f"error: port {port} needs root; take one above 1023"], returncode=2) from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise port_is_taken(port) from None


# ----------------------------------------------------------------------------------------------------------
# Output of the ranks
# ----------------------------------------------------------------------------------------------------------


class Tail:
    """A file that grows: gives its new whole lines each time."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.rest = path, 0, b""

    def lines(self, *, is_last: bool = False) -> list[str]:
        """New lines since the last call; at the end also one that no newline closes."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                new = file.read()
        except OSError:
            new = b""
        self.offset += len(new)
        *whole, self.rest = (self.rest + new).split(b"\n")
        if is_last and self.rest:
            whole, self.rest = [*whole, self.rest], b""
        return [line.decode("utf-8", "replace").rstrip("\r") for line in whole]


class Bar:
    """Progress over the steps: on a terminal, or as an output of its own in a live notebook. Leaves nothing."""

    def __init__(self, total: int | None, quiet: bool) -> None:
        self.total, self.start, self.shown = total, 0.0, 0.0
        self.terminal = self.handle = None
        is_wanted = bool(total) and not quiet
        self.on_terminal = is_wanted and kernel() is None and sys.stderr is not None and sys.stderr.isatty()
        self.in_notebook = is_wanted and is_live_notebook()

    def begin(self) -> None:
        """Shows the bar. At the first step, not before: the time that processes take to start is no step's."""
        self.start = time.monotonic()
        if self.on_terminal:
            from tqdm import tqdm

            self.terminal = tqdm(total=self.total, unit="step", leave=False, dynamic_ncols=True)
        elif self.in_notebook:
            from IPython.display import display

            self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def reach(self, step: int) -> None:
        """The run is at this step."""
        if not self.start:
            self.begin()
        if self.terminal is not None:
            self.terminal.update(step - self.terminal.n)
        elif self.handle is not None and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            full, seconds = round(30 * step / self.total), self.shown - self.start
            text = f"|{'█' * full}{' ' * (30 - full)}| {step}/{self.total} steps, {seconds:.0f} s"
            self.handle.update({"text/plain": text}, raw=True)

    def print(self, line: str, stream: Any) -> None:
        """A line of output, above the bar."""
        if self.terminal is not None:
            self.terminal.write(line, file=stream)
        else:
            print(line, file=stream)
        with contextlib.suppress(AttributeError, ValueError):
            stream.flush()

    def close(self) -> None:
        if self.terminal is not None:
            self.terminal.close()
        if self.handle is not None:
            self.handle.update({"text/plain": ""}, raw=True)


class RankOutput:
    """Follows the files into which torchrun sends every rank's output; keeps them; shows what a reader needs."""

    def __init__(self, folder: Path, bar: Bar, quiet: bool) -> None:
        self.folder, self.bar, self.quiet = folder, bar, quiet
        self.tails: dict[tuple[int, str], Tail] = {}
        self.errors: dict[int, list[str]] = {}  # rank -> its lines on stderr
        self.first_error: tuple[int, str] | None = None
        self.in_report: set[int] = set()  # ranks that print a traceback: held back for the failure's message
        self.seen: set[str] = set()

    def poll(self, *, is_last: bool = False) -> None:
        """Reads what is new, and shows it."""
        for path in self.folder.glob("*/attempt_*/*/std*.log"):
            key = (int(path.parent.name), path.stem)
            self.tails.setdefault(key, Tail(path))
        for (rank, stream), tail in sorted(self.tails.items()):
            for line in tail.lines(is_last=is_last):
                line = RANK_PREFIX.sub("", line)
                self.take_stdout(rank, line) if stream == "stdout" else self.take_stderr(rank, line)

    def take_stdout(self, rank: int, line: str) -> None:
        step = re.match(r"\[step (\d+)\]", line) if rank == 0 else None
        if step:
            self.bar.reach(int(step[1]))
        elif rank == 0 and (end := re.match(r"task loss \S+ after (\d+) steps", line)):
            self.bar.reach(int(end[1]))
        if not self.quiet:
            self.bar.print(line if rank == 0 else f"rank {rank}: {line}", sys.stdout)

    def take_stderr(self, rank: int, line: str) -> None:
        self.errors.setdefault(rank, []).append(line)
        if line.startswith("Traceback (most recent call last)"):
            self.in_report.add(rank)
        if line.startswith("error: "):
            self.first_error = self.first_error or (rank, line)
            self.in_report.add(rank)
        is_new = line not in self.seen  # what every rank says is shown once
        self.seen.add(line)
        if (
            rank not in self.in_report
            and is_new
            and line.strip()
            and not LIBRARY_LOG.match(line)
            and not self.quiet
        ):
            self.bar.print(line.replace(*LOCAL_PATHS), sys.stderr)

    def settle(self) -> None:
        """Puts each rank's files where a person finds them: rank0.out, rank0.err; empty ones go."""
        for (rank, stream), tail in self.tails.items():
            with contextlib.suppress(OSError):
                if tail.path.stat().st_size:
                    tail.path.replace(self.folder.parent / f"rank{rank}.{stream[3:]}")
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)


# ----------------------------------------------------------------------------------------------------------
# What went wrong
# ----------------------------------------------------------------------------------------------------------


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def root_cause(torchrun_log: str) -> tuple[int, int] | None:
    """(rank, exit code, negative for a signal) of torchrun's first observed failure, from its own report."""
    block = torchrun_log.rpartition("Root Cause")[2] if "Root Cause" in torchrun_log else ""
    rank = re.search(r"^\s*rank\s*: (\d+)", block, re.MULTILINE)
    code = re.search(r"^\s*exitcode\s*: (-?\d+)", block, re.MULTILINE)
    return (int(rank[1]), int(code[1])) if rank and code else None


def cells_of_traceback(lines: list[str]) -> list[str]:
    """The frames of a rank's last traceback that come from cells: "notebooks/x.ipynb #id:12, in f: code"."""
    frame = re.compile(r'^\s*File ".+", line \d+, in (\S+) \((\S+ #[A-Za-z0-9_-]+:\d+)\)$')
    found = []
    for line, code in zip(lines, [*lines[1:], ""], strict=True):
        match = frame.match(line)
        if match:
            found.append(f"  {match[2]}, in {match[1]}: {code.strip()}")
    return found


def killed_line(rank: int, number: int) -> str:
    """One line on a rank that a signal ended."""
    why = {
        signal.SIGKILL: "somebody ended it, or the memory ran out: look at `dmesg`, or take fewer tokens or ranks",
        signal.SIGSEGV: "a fault in native code: run it again with PYTHONFAULTHANDLER=1 to see where",
        signal.SIGTERM: "somebody ended it; start the run again",
    }
    reason = why.get(number, "look at its log")
    return f"error: rank {rank} was ended by {signal_name(number)}; the other ranks were stopped ({reason})"


def failure_lines(output: RankOutput, torchrun_log: str, logs: str) -> tuple[int | None, list[str], bool]:
    """(rank, message, whether it is a refusal: one plain line that needs no log), at most 15 lines."""
    cause = root_cause(torchrun_log)
    if (
        cause
        and cause[1] < 0
        and -cause[1] in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
    ):
        rank, lines = cause[0], [killed_line(cause[0], -cause[1])]
        if output.first_error:
            lines.append(f"  then {output.first_error[1].removeprefix('error: ')}")
        return rank, [*lines, f"whole output: {logs}"], False
    if output.first_error:
        rank, line = output.first_error
        named = re.match(r"error: rank (\d+)[,:]", line)
        speaker, rank = rank, int(named[1]) if named else rank
        lines = output.errors[speaker]
        if rank not in output.in_report or not any(text.startswith("Traceback") for text in lines):
            is_refusal = bool(cause) and cause[1] == 2
            to_do = "to do: see what the ranks said last, in rank*.err and rank*.out there"
            return rank, [line] if is_refusal else [line, to_do, f"whole output: {logs}"], is_refusal
        frames = cells_of_traceback(lines)
        to_do = "to do: mend the last of these cells, save, `make launcher`, and launch again"
        if not frames:
            frames, to_do = [f"  {text}" for text in lines[:-1][-8:]], "to do: mend what the last lines name"
        return rank, [line, *frames[-8:], to_do, f"whole output: {logs}"], False
    if re.search(r"EADDRINUSE|[Aa]ddress already in use", torchrun_log):
        line = "error: the port for the rendezvous is in use by another program; name another one"
        return None, [line], True
    if cause:
        rank, code = cause
        last = [text for text in output.errors.get(rank, []) if not LIBRARY_LOG.match(text)][-8:]
        line = killed_line(rank, -code) if code < 0 else f"error: rank {rank} ended with exit code {code}"
        to_do = [
            "to do: see its last lines, and what ends a process without an error: sys.exit, a library's abort"
        ]
        lines = [line, *(f"  {text}" for text in last), *to_do * (code > 0)]
        return rank, [*lines, f"whole output: {logs}"], False
    said = [text for text in torchrun_log.splitlines() if text.strip()][-6:]
    return None, ["error: torchrun failed", *(f"  {text}" for text in said), f"whole output: {logs}"], False


# ----------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------


class Family:
    """A process with all its descendants, also those that others have adopted since."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process, self.members = process, {}
        self.checked = 0.0

    def note(self, every_s: float = 0.5) -> None:
        """Remembers the descendants; looking for them through all processes is dear, so not at each call."""
        if time.monotonic() - self.checked < every_s:
            return
        self.checked = time.monotonic()
        with contextlib.suppress(Exception):  # without psutil the processes still watch their parents
            import psutil

            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.members[child.pid] = child

    def running(self) -> list[Any]:
        """The remembered descendants that still live."""
        alive = []
        for member in self.members.values():
            with contextlib.suppress(Exception):
                if member.is_running() and member.status() != "zombie":
                    alive.append(member)
        return alive

    def end(self, patience_s: float = STOP_S) -> None:
        """SIGTERM to the process, which ends its ranks; after patience_s SIGKILL to all that is left."""
        self.note(every_s=0)
        with uninterrupted():
            with contextlib.suppress(OSError):
                self.process.terminate()
            deadline = time.monotonic() + patience_s
            while (self.process.poll() is None or self.running()) and time.monotonic() < deadline:
                self.note(every_s=0.2)
                time.sleep(0.05)
            for member in self.running():
                with contextlib.suppress(Exception):
                    member.kill()
            with contextlib.suppress(OSError):
                self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """While processes are being ended, a second Ctrl-C changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def make_log_folder(log_dir: str | None) -> tuple[Path, Path, bool]:
    """(the run's log folder, the folder for the ranks' output, whether the first is new and ours).

    The ranks' folder is a temporary one where the log folder cannot be written: the ranks then say so.
    """
    given = log_dir or os.environ.get("TB_LOGDIR")
    folder = Path(given) if given else LAUNCHER.parent / "runs" / time.strftime("%Y%m%d-%H%M%S")
    folder = ROOT / folder
    number, base = 2, folder
    while not given and folder.exists():  # two runs within a second
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    is_new = not folder.exists()
    try:
        (folder / "ranks" / "now").mkdir(parents=True, exist_ok=True)
        probe = folder / "ranks" / "now" / "probe"
        probe.touch()
        probe.unlink()
        return folder, folder / "ranks" / "now", is_new
    except OSError:
        return folder, Path(tempfile.mkdtemp(prefix="ep-ranks-")) / "now", False


def run_torchrun(
    command: list[str], environment: dict[str, str], output: RankOutput, limit_s: float | None
) -> tuple[int, str]:
    """Runs torchrun until it ends -> (exit code, its own stderr). Ends everything on any exception."""
    with tempfile.TemporaryFile() as own:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), "torchrun", str(os.getpid()), *command],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=own, stderr=own, start_new_session=True,
        )  # fmt: skip
        family, start, failed_at = Family(process), time.monotonic(), None
        try:
            while process.poll() is None:
                family.note()
                output.poll()
                now = time.monotonic()
                if limit_s is not None and now - start > limit_s:
                    raise TimeoutError
                if output.first_error and len(family.running()) < len(family.members):
                    failed_at = failed_at or now
                    if now - failed_at > FAILED_S:
                        family.end()
                time.sleep(0.05)
            if family.running():
                family.end(patience_s=0)
        except BaseException:
            family.end()
            raise
        finally:
            output.poll(is_last=True)
            own.seek(0)
            text = own.read().decode("utf-8", "replace")
            if text.strip():
                with contextlib.suppress(OSError):
                    (output.folder.parent / "torchrun.log").write_text(text)
        return process.returncode, text


def read_summary(path: Path, *, is_asked_for: bool) -> dict[str, Any]:
    """The summary that rank 0 wrote; {} where the script writes none."""
    if not path.exists():
        return {}
    summary = json.loads(path.read_text("utf-8"))
    if not is_asked_for:
        summary["config"]["summary"] = None  # the file was ours, and goes
    return summary


def run_command(
    torchrun_flags: list[str], arguments: list[str], script: Path, *, quiet: bool, limit_s: float | None
) -> dict[str, Any]:
    """One run, from checked flags to its summary. LaunchError where it fails."""
    arguments = place_paths(arguments)
    values = check_flags(arguments, script)
    if not quiet:
        print(shlex.join(["torchrun", *torchrun_flags, shown_path(script), *arguments]), flush=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if values.get("device") != "cuda":
        environment.setdefault("OMP_NUM_THREADS", "1")
    log_dir, ranks_dir, is_new = make_log_folder(values.get("log_dir"))
    if not values.get("log_dir"):
        environment["TB_LOGDIR"] = str(log_dir)
    scratch = Path(tempfile.mkdtemp(prefix="ep-launch-"))
    summary = ROOT / values["summary"] if values.get("summary") else scratch / "summary.json"
    wanted = [] if values.get("summary") or not values else ["--summary", str(summary)]
    command = [*torchrun_flags, "--redirects=3", f"--log-dir={ranks_dir}", str(script), *arguments, *wanted]
    bar = Bar(values.get("steps"), quiet)
    output = RankOutput(ranks_dir, bar, quiet)
    logs = shown_path(ranks_dir.parent)
    is_refusal = False
    try:
        code, text = run_torchrun(command, environment, output, limit_s)
        if code:
            rank, lines, is_refusal = failure_lines(output, text, logs)
            raise LaunchError(
                lines[:MOST_LINES], rank=rank, log_dir=ranks_dir.parent, returncode=max(code, 1)
            )
        return read_summary(summary, is_asked_for=not wanted)
    except TimeoutError:
        message = f"error: the run did not end within {limit_s:g} s and was stopped; whole output: {logs}"
        raise LaunchError([message], log_dir=ranks_dir.parent) from None
    except KeyboardInterrupt:
        raise Interrupted([f"every rank has ended; logs in {logs}"]) from None
    finally:
        bar.close()
        output.settle()
        shutil.rmtree(scratch, ignore_errors=True)
        if is_refusal and not (log_dir / "train.log").exists():
            shutil.rmtree(log_dir if is_new else ranks_dir.parent, ignore_errors=True)


def launch(
    nproc: int | None = None,
    *,
    nnodes: int = 1,
    master_port: int | None = None,
    rdzv_endpoint: str | None = None,
    rdzv_id: str = "ep",
    rdzv_conf: str | None = None,
    quiet: bool = False,
    limit_s: float | None = None,
    script: str | os.PathLike[str] = LAUNCHER,
    **flags: Any,
) -> dict[str, Any]:
    """Trains with torchrun, streams the output, returns the summary (DESIGN: `--summary`).

    nproc: processes on this host; None is one a GPU where there are two or more, else two, on the CPU.
    nnodes, rdzv_endpoint, rdzv_id, rdzv_conf: for several hosts; every host makes the same call.
    master_port: a fixed port in place of a free one. quiet: prints nothing. limit_s: ends the run after so long.
    script: another stitched launcher. flags: launcher.py's, `top_k=2` for `--top-k 2`, True and False for
    `--x` and `--no-x`, None for leaving it out; paths are relative to the current folder.

    Raises LaunchError, before anything starts, for a stale launcher, definitions that differ from the kernel's,
    flags that the launcher refuses, a taken port; and where the run fails, with the rank, its cells and its last
    lines. An interrupt ends every rank within 5 s. Costs about 5 s to start the processes.
    """
    script = Path(script).resolve()
    try:
        if script == LAUNCHER:
            assert_fresh()
            if kernel() is not None:
                check_kernel_definitions(kernel().user_ns)
    except RuntimeError as error:
        raise LaunchError([f"error: {error}"], returncode=2) from None
    arguments = flag_arguments(flags)
    check_flags(arguments, script)
    torchrun_flags = torchrun_arguments(
        default_nproc() if nproc is None else nproc, nnodes, master_port, rdzv_endpoint, rdzv_id, rdzv_conf
    )
    return run_command(torchrun_flags, arguments, script, quiet=quiet, limit_s=limit_s)


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext tools.launch`: registers %%ranks."""
    from tools.ranks import ranks_magic

    shell.register_magic_function(ranks_magic, "cell", "ranks")


# ----------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise LaunchError([f"error: {message}; --help lists the flags"], returncode=2)


def command_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launch.py", description="Trains with torchrun.", add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the flags of launcher.py")
    parser.add_argument("--nproc", "--nproc-per-node", "--nproc_per_node", type=int, metavar="N",
                        help="processes on this host (default: one a GPU if there are 2 or more, else 2)")  # fmt: skip
    parser.add_argument("--master-port", "--master_port", type=int, metavar="P", help="default: a free port")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the hosts meet, the same on each")
    parser.add_argument("--rdzv-id", default="ep", metavar="NAME", help="one name a run (default: ep)")
    parser.add_argument("--rdzv-conf", metavar="CONF", help="torchrun's, such as is_host=1 or is_host=0")
    return parser


def show_help() -> None:
    from ep_launcher import launcher

    print(command_parser().format_help())
    print("The flags of launcher.py:\n")
    print(launcher.make_parser().format_help())


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> exit code: 0, 2 for a refusal, 130 for an interrupt, else torchrun's."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
    try:
        options, rest = command_parser().parse_known_args(argv)
        assert_fresh()
        if options.help:
            show_help()
            return 0
        check_flags(rest, LAUNCHER)
        flags = torchrun_arguments(
            options.nproc if options.nproc is not None else default_nproc(), options.nnodes,
            options.master_port, options.rdzv_endpoint, options.rdzv_id, options.rdzv_conf,
        )  # fmt: skip
        run_command(flags, rest, LAUNCHER, quiet=False, limit_s=None)
        return 0
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.returncode
    except RuntimeError as error:  # a stale launcher
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"interrupted: {stopped}" if str(stopped) else "interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
