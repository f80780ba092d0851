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
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works uninstalled, from any folder
if __name__ == "__main__":  # Ctrl-C while modules are read is one line, too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

from tools import commands  # noqa: E402
from tools.extract import assert_fresh, check_kernel_definitions  # noqa: E402
from tools.ranks.failures import HERE, Interrupted, LaunchError, describe_failure, without_root  # noqa: E402
from tools.ranks.flags import LAUNCHER, flag_arguments, torchrun_environment, torchrun_flags  # noqa: E402
from tools.ranks.output import RankOutput, is_live_notebook, kernel  # noqa: E402
from tools.ranks.processes import Family, start_agent  # noqa: E402

__all__ = ["LaunchError", "is_live_notebook", "launch", "load_ipython_extension"]

RUNS = LAUNCHER.parent / "runs"
WARNING_BYTES = 512  # of EP_STEPS, before the steps (launcher.py, StepNotes)
SILENT_S = 20.0  # so long without a first step, and a line says what is waited for


def watch(run: Family, output: RankOutput, steps: Path, meeting: str | None, limit_s: float | None) -> None:
    """Shows a run until it ends. Ends everything on any exception; TimeoutError after limit_s.

    steps: the file behind EP_STEPS; meeting: where several hosts meet.
    """
    start, warning, is_silent = time.monotonic(), "", True
    try:
        while run.process.poll() is None:
            run.note()
            output.poll()
            now, notes = time.monotonic() - start, steps.read_bytes()
            if done := max(memoryview(notes[WARNING_BYTES:]).cast("q")):
                output.bar.update(done - output.bar.n)
            if not warning and (warning := notes[:WARNING_BYTES].rstrip(b"\0").decode(errors="replace")):
                output.show(warning, sys.stderr)
            if is_silent and not done and now > SILENT_S:
                is_silent, ranks = False, len(list(output.folder.glob("*/attempt_*/*")))
                where = f"; waiting at {meeting}" if meeting and not ranks else ""
                line = f"after {SILENT_S:g} s no first step yet: {ranks} ranks have started{where}"
                output.show(line, sys.stderr)
            if limit_s is not None and now > limit_s:
                raise TimeoutError
            time.sleep(0.05)
    finally:
        run.end(patience_s=0 if run.process.poll() is not None else 3.0)
        output.poll(is_last=True)


def failure(run: Family, output: RankOutput, report: Path, log_dir: Path) -> LaunchError:
    """What to raise for a run that failed. A refusal, of one line, leaves nothing to look at."""
    said = json.loads(report.read_text()) if report.exists() else {"ranks": [], "error": "it was killed"}
    rank, lines = describe_failure(said, output.errors)
    if len(lines) == 1:
        return LaunchError(*lines, rank=rank, returncode=2)
    logs = output.keep(log_dir)
    lines = [*lines[:14], f"whole output: {without_root(logs)}"]
    return LaunchError(*lines, rank=rank, log_dir=logs, returncode=max(run.process.returncode, 1))


def run_command(
    of_torchrun: dict[str, Any], arguments: list[str], script: Path, *, quiet: bool, limit_s: float | None
) -> dict[str, Any]:
    """One run, from flags to its summary. LaunchError where it fails."""
    try:
        if script == LAUNCHER:
            assert_fresh()
            if kernel() is not None:
                check_kernel_definitions(kernel().user_ns)
    except RuntimeError as error:
        raise LaunchError(str(error), returncode=2) from None
    flags, parser = torchrun_flags(**of_torchrun), commands.Parser(add_help=False, allow_abbrev=False)
    for name in ("--steps", "--log-dir", "--summary"):
        parser.add_argument(name)
    asked = parser.parse_known_args(arguments)[0]
    with contextlib.ExitStack() as at_end:
        try:
            folder = tempfile.TemporaryDirectory(prefix="ep-launch-", ignore_cleanup_errors=True)
            scratch = Path(at_end.enter_context(folder))
            steps, report, summary = scratch / "steps", scratch / "report.json", scratch / "summary.json"
            options = report.with_suffix(".options")  # what the agent has found out
            steps.write_bytes(bytes(2**13))  # for 960 ranks
            own_folder = RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            log_dir = Path(asked.log_dir or os.environ.get("TB_LOGDIR") or own_folder).expanduser()
            output = RankOutput(scratch / "ranks", quiet)
            at_end.callback(output.bar.close)
            program = [script, "--summary", summary, *arguments]  # the last --summary counts
            words = [*flags, "--redirects=3", f"--log-dir={output.folder}", *program]
            environment = torchrun_environment(TB_LOGDIR=log_dir, EP_STEPS=steps)
            with open(output.folder / "torchrun.log", "wb") as log:
                run = start_agent("torchrun", report, *words, stdout=log, environment=environment)
            at_end.callback(run.end, patience_s=0)
        except OSError as error:
            message = f"cannot write {error.filename} ({error.strerror}); set TMPDIR, or --log-dir"
            raise LaunchError(message, returncode=2) from None
        try:
            while run.process.poll() is None and not options.exists():
                time.sleep(0.005)
            told = json.loads(options.read_text()) if options.exists() else {"nproc": "auto", "steps": None}
            shown = shlex.join(["torchrun", *flags, str(script), *arguments]).replace(*HERE)
            output.show(shown.replace("=auto", f"={told['nproc']}"), sys.stdout)
            output.bar.reset(int(asked.steps) if (asked.steps or "").isdigit() else told["steps"])
            watch(run, output, steps, of_torchrun["rdzv_endpoint"], limit_s)
        except TimeoutError:
            logs = output.keep(log_dir)
            message = f"the run did not end within {limit_s:g} s and was stopped; whole output: {without_root(logs)}"
            raise LaunchError(message, log_dir=logs) from None
        except KeyboardInterrupt:
            logs = without_root(output.keep(log_dir))
            raise Interrupted([f"every rank has ended; logs in {logs}"]) from None
        if run.process.returncode:
            raise failure(run, output, report, log_dir)
        output.keep(log_dir)
        given = Path(asked.summary or summary).expanduser()
        found = json.loads(given.read_text("utf-8")) if given.exists() else {}
        if found and given == summary:
            found["config"]["summary"] = None  # the file was ours, and goes
        return found


def launch(
    nproc: int | None = None,
    *,
    nnodes: int = 1,
    rdzv_endpoint: str | None = None,
    max_restarts: int = 0,
    quiet: bool = False,
    limit_s: float | None = None,
    script: str | os.PathLike[str] = LAUNCHER,
    **flags: Any,
) -> dict[str, Any]:
    """Trains with torchrun, streams the output, returns the summary (DESIGN: `--summary`).

    nproc: processes on this host; None is one a GPU where there are two or more, else two, on the CPU.
    nnodes, rdzv_endpoint: for several hosts; every host makes the same call. max_restarts: how often all ranks start
    again once one has ended, from the last checkpoint where there is one (chapter 15). quiet: prints nothing.
    limit_s: ends the run after so long. script: another stitched launcher.
    flags: launcher.py's, `top_k=2` for `--top-k 2`, True and False for `--x` and `--no-x`, None for leaving it out.

    Raises LaunchError, before anything starts, for a stale launcher and for definitions that differ from the kernel's;
    in one line for flags that the ranks refuse; and where the run fails, with the rank, its cells and its last lines.
    An interrupt ends every rank within 5 s. Costs about 2 s to start the processes.
    """
    hosts = {"nnodes": nnodes, "rdzv_endpoint": rdzv_endpoint}
    of_torchrun, script = {"nproc": nproc, "max_restarts": max_restarts} | hosts, Path(script).resolve()
    return run_command(of_torchrun, flag_arguments(flags), script, quiet=quiet, limit_s=limit_s)


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext tools.launch`: registers %%ranks."""
    from tools.ranks.cells import ranks_magic

    shell.register_magic_function(ranks_magic, "cell", "ranks")


def command_line(argv: Sequence[str] | None) -> int:
    """Does what the command line asks for -> 0. Refused or LaunchError where that cannot be."""
    parser = commands.Parser(
        prog="launch.py", description="Trains with torchrun.", add_help=False, allow_abbrev=False
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this, and the flags of launcher.py")
    add("--nproc", "--nproc-per-node", "--nproc_per_node", type=int, metavar="N",
        help="processes on this host (default: one a GPU if there are 2 or more, else 2)")  # fmt: skip
    add("--nnodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where the hosts meet, the same on each")
    add("--max-restarts", "--max_restarts", type=int, default=0, metavar="N",
        help="how often all ranks start again once one has ended (default: 0)")  # fmt: skip
    options, rest = parser.parse_known_args(argv)
    of_torchrun = vars(options)
    if of_torchrun.pop("help"):
        from ep_launcher import launcher

        print(
            parser.format_help(),
            "\nThe flags of launcher.py:\n",
            launcher.make_parser().format_help(),
            sep="\n",
        )
    else:
        run_command(of_torchrun, rest, LAUNCHER, quiet=False, limit_s=None)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> exit code: 0, 2 for a refusal, 130 for an interrupt, else torchrun's."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
    try:
        return commands.run(lambda: command_line(argv))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.returncode
    except KeyboardInterrupt as stopped:
        print(f"interrupted: {stopped}" if str(stopped) else "interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
