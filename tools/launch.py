"""Start torchrun from a cell, or from a shell.

    from tools.launch import launch
    summary = launch(nproc=2, steps=300)          in a notebook; any flag of launcher.py as a keyword

    %load_ext tools.launch                        then, on top of a cell:
    %%ranks 4 --collect rows                      runs the cell's body on 4 fresh ranks: tools/ranks/cells.py

    python tools/launch.py [--nproc N] [FLAG...]  in a shell: what `make train` does

A notebook kernel is one process; torchrun starts others, which cannot see its memory and do not end with it.
This command keeps the two together: output as it comes, one short message for a failure, no process left behind.
What it is made of lies in tools/ranks/.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works uninstalled, from any folder
if __name__ == "__main__":  # Ctrl-C while modules are read is one line, too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

from tools import commands  # noqa: E402
from tools.extract import assert_fresh, check_kernel_definitions  # noqa: E402
from tools.ranks.failures import HERE, Interrupted, LaunchError, describe_failure, read_report  # noqa: E402
from tools.ranks.output import NOTES_BYTES, RankOutput, is_live_notebook, kernel, read_notes  # noqa: E402
from tools.ranks.processes import Agent  # noqa: E402
from tools.stitch.reading import ROOT  # noqa: E402

__all__ = ["LaunchError", "is_live_notebook", "launch", "load_ipython_extension"]

LAUNCHER = ROOT / "ep_launcher" / "launcher.py"
RUNS = LAUNCHER.parent / "runs"
SILENT_S = 20.0  # so long without a first step, and a line says what is waited for


def flag_arguments(flags: dict[str, Any]) -> list[str]:
    """{"top_k": 2, "normalize_topk": True, "log_dir": None} -> ["--top-k", "2", "--normalize-topk"]."""
    arguments = []
    for name, value in flags.items():
        flag, text = name.replace("_", "-"), str(value)
        if value is True or value is False:
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            # A value that starts with a dash would pass for a flag, were it not tied to its own.
            arguments += [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]
    return arguments


def torchrun_flags(
    nproc: int | None, nnodes: int = 1, rdzv_endpoint: str | None = None, max_restarts: int = 0
) -> list[str]:
    """torchrun's own flags; nproc None: auto. LaunchError where they do not fit together."""
    for name, value, least in (("nproc", nproc, 1), ("nnodes", nnodes, 1), ("max_restarts", max_restarts, 0)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, Integral) or value < least
        ):
            raise LaunchError(f"{name} is {value!r}; take a whole number, {least} or more")
    flags = [f"--nproc_per_node={nproc or 'auto'}"] + [f"--max-restarts={max_restarts}"] * bool(max_restarts)
    if nnodes == 1:
        return flags
    if not rdzv_endpoint:
        raise LaunchError(
            f"{nnodes} hosts must find one another; give each the same --rdzv-endpoint HOST:PORT"
        )
    host = rdzv_endpoint.rpartition(":")[0].strip("[]") or rdzv_endpoint
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        mend = "give an --rdzv-endpoint that every host can reach"
        raise LaunchError(f"no address is known for {host}; {mend}") from None
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={rdzv_endpoint}", "--rdzv-id=ep"]
    return [f"--nnodes={nnodes}", *flags, *meeting]


def shown_command(words: Sequence[str], report: Path) -> str:
    """What a reader could type instead, with the number of processes where it was auto."""
    nproc = read_report(report)["nproc"]
    return shlex.join(words).replace(*HERE).replace("=auto", f"={nproc}", 1)


def watch(run: Agent, output: RankOutput, steps: Path, meeting: str | None, limit_s: float | None) -> bool:
    """Shows a run until it ends, or until limit_s are over -> whether they are. Ends everything on any exception.

    steps: the file behind EP_STEPS; meeting: where several hosts meet.
    """
    start, shown, is_silent = time.monotonic(), "", True
    try:
        while run.returncode is None:
            run.note()
            output.poll()
            now, (warning, num_steps, done) = time.monotonic() - start, read_notes(steps)
            if num_steps and output.bar.total is None:
                output.bar.reset(num_steps)
            if furthest := max(done):
                output.bar.update(furthest - output.bar.n)
            if warning != shown:
                shown = warning
                output.show(warning, sys.stderr)
            if is_silent and not furthest and now > SILENT_S:
                is_silent, ranks = False, len(list(output.folder.glob("*/attempt_*/*")))
                where = f"; waiting at {meeting}" if meeting and not ranks else ""
                line = f"after {SILENT_S:g} s no first step yet: {ranks} ranks have started{where}"
                output.show(line, sys.stderr)
            if limit_s is not None and now > limit_s:
                return True
            time.sleep(0.05)
        return False
    finally:
        run.end()
        output.poll(is_last=True)


def launch(
    nproc: int | None = None,
    *,
    nnodes: int = 1,
    rdzv_endpoint: str | None = None,
    max_restarts: int = 0,
    quiet: bool = False,
    limit_s: float | None = None,
    script: str | os.PathLike[str] = LAUNCHER,
    arguments: Sequence[str] = (),
    **flags: Any,
) -> dict[str, Any]:
    """Trains with torchrun, streams the output, returns the summary, a dictionary: what `--summary` writes.

    nproc: processes on this host; None is one a GPU where there are two or more, else two, on the CPU.
    nnodes, rdzv_endpoint: for several hosts; every host makes the same call. max_restarts: how often all ranks start
    again once one has ended, from the last checkpoint where there is one (chapter 15). quiet: prints nothing.
    limit_s: ends the run after so long. script: another stitched launcher.
    flags: launcher.py's, `top_k=2` for `--top-k 2`, True and False for `--x` and `--no-x`, None for leaving it out;
    arguments: more of them, as a command line has them.

    Raises LaunchError, before anything starts, for a stale launcher and for definitions that differ from the kernel's;
    in one line for flags that the ranks refuse; and where the run fails, with the rank, its cells and its last lines.
    An interrupt ends every rank within 5 s. Costs about 2 s to start the processes.
    """
    script = Path(script).resolve()
    try:
        if script == LAUNCHER:
            assert_fresh()
            if kernel() is not None:
                check_kernel_definitions(kernel().user_ns)
    except RuntimeError as error:
        raise LaunchError(str(error)) from None
    of_torchrun = torchrun_flags(nproc, nnodes, rdzv_endpoint, max_restarts)
    arguments = [*flag_arguments(flags), *arguments]
    parser = commands.Parser(add_help=False, allow_abbrev=False)
    for name in ("--log-dir", "--summary"):
        parser.add_argument(name)
    asked = parser.parse_known_args(arguments)[0]
    with contextlib.ExitStack() as at_end:
        try:
            folder = tempfile.TemporaryDirectory(prefix="ep-launch-", ignore_cleanup_errors=True)
            scratch = Path(at_end.enter_context(folder))
            steps, report, summary = scratch / "steps", scratch / "report.json", scratch / "summary.json"
            steps.write_bytes(bytes(NOTES_BYTES))
            own_folder = RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            log_dir = Path(asked.log_dir or os.environ.get("TB_LOGDIR") or own_folder).expanduser()
            typed = ["torchrun", *of_torchrun, str(script), *arguments]
            output = RankOutput(scratch / "ranks", quiet, lambda: shown_command(typed, report))
            at_end.callback(output.bar.close)
            program = [script, "--summary", summary, *arguments]  # the last --summary counts
            given = summary if asked.summary is None else Path(asked.summary).expanduser()
            before = given.stat().st_mtime_ns if given.is_file() else None  # of an earlier run
            words = [report, *of_torchrun, "--redirects=3", f"--log-dir={output.folder}", *program]
            with open(output.folder / "torchrun.log", "wb") as log:
                environment = {"TB_LOGDIR": log_dir, "EP_STEPS": steps}
                run = at_end.enter_context(Agent(*words, environment=environment, stdout=log))
        except OSError as error:
            mend = "set TMPDIR, or --log-dir"
            raise LaunchError(f"cannot write {error.filename} ({error.strerror}); {mend}") from None
        try:
            is_late = watch(run, output, steps, rdzv_endpoint, limit_s)
        except KeyboardInterrupt:
            raise Interrupted([f"every rank has ended; logs in {output.keep(log_dir)}"]) from None
        rank, lines = None, [f"the run did not end within {limit_s} s and was stopped"] * is_late
        if run.returncode and not is_late:
            rank, lines = describe_failure(read_report(report), output.error, output.errors)
            if len(lines) == 1:  # a refusal leaves nothing to look at
                raise LaunchError(*lines, rank=rank)
        logs = output.keep(log_dir)
        if lines:
            raise LaunchError(*lines[:14], f"whole output: {logs}", rank=rank)
        is_new = given.is_file() and given.stat().st_mtime_ns != before
        found = json.loads(given.read_text("utf-8")) if is_new else {}
        if not found and nnodes == 1 and asked.summary != "" and not {"-h", "--help"} & set(arguments):
            said = "the ranks ended with exit code 0 before the end of the run: something calls exit"
            raise LaunchError(said, f"whole output: {logs}")
        if found and given == summary:
            found["config"]["summary"] = None  # the file was ours, and goes
        return found


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext tools.launch`: registers %%ranks."""
    from tools.ranks.cells import ranks_magic

    shell.register_magic_function(ranks_magic, "cell", "ranks")


def train(argv: Sequence[str] | None) -> int:
    parser = commands.Parser(
        "launch.py", description="Trains with torchrun.", add_help=False, allow_abbrev=False
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this, and the flags of launcher.py")
    few = "processes on this host (default: one a GPU if there are 2 or more, else 2)"
    add("--nproc", "--nproc-per-node", "--nproc_per_node", type=int, metavar="N", help=few)
    add("--nnodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where the hosts meet, the same on each")
    again = "how often all ranks start again once one has ended (default: 0)"
    add("--max-restarts", "--max_restarts", type=int, default=0, metavar="N", help=again)
    options, rest = parser.parse_known_args(argv)
    given = vars(options)
    if given.pop("help"):
        print(parser.format_help(), "The flags of launcher.py:", sep="\n", flush=True)
        return subprocess.call([sys.executable, LAUNCHER, "--help"])
    try:
        launch(**given, arguments=rest)
        return 0
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.returncode


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> exit code: 0, 1 for a run that fails, 2 for a refusal, 130 for an interrupt."""
    return commands.run(lambda: train(argv))


if __name__ == "__main__":
    sys.exit(main())
