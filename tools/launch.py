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

import argparse
import contextlib
import json
import os
import re
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

from tools.extract import assert_fresh, check_kernel_definitions  # noqa: E402
from tools.ranks.failures import HERE, Interrupted, LaunchError, describe_failure, without_root  # noqa: E402
from tools.ranks.flags import LAUNCHER, flag_arguments, torchrun_environment, torchrun_flags  # noqa: E402
from tools.ranks.output import Bar, RankOutput, is_live_notebook, kernel, new_folder  # noqa: E402
from tools.ranks.processes import Family, start_worker  # noqa: E402

__all__ = ["LaunchError", "is_live_notebook", "launch", "load_ipython_extension"]

RUNS = LAUNCHER.parent / "runs"
FAILED_S = 6.0  # what ranks get once one has failed; torchrun would wait 30 s for one that is stuck
WARNING_BYTES = 512  # of EP_STEPS, before the steps (launcher.py, StepNotes)
CHECK_S = 120.0  # what checking the flags may take: importing torch, and what a plugin does then
SILENT_S = 20.0  # so long without a first step, and a line says what is waited for


def watch(
    run: Family, output: RankOutput, steps: Path, of_torchrun: dict[str, Any], limit_s: float | None
) -> list[int]:
    """Shows a run until it ends -> the ranks that SIGSTOP held at the failure. Ends everything on any exception.

    steps: the file behind EP_STEPS. TimeoutError after limit_s.
    """
    start, failed_at, stopped, warning, is_silent = time.monotonic(), None, [], "", True
    try:
        while run.process.poll() is None:
            run.note()
            output.poll()
            now, notes = time.monotonic() - start, steps.read_bytes()
            if done := max(memoryview(notes[WARNING_BYTES:]).cast("q")):
                output.bar.reach(done)
            if not warning and (warning := notes[:WARNING_BYTES].rstrip(b"\0").decode(errors="replace")):
                output.show(warning, sys.stderr)
            if is_silent and not done and now > SILENT_S:
                is_silent, ranks = False, len(list(output.folder.glob("*/attempt_*/*")))
                held = [f"; SIGSTOP holds rank {rank}" for rank in run.stopped_ranks()]
                where = (
                    of_torchrun["rdzv_endpoint"]
                    and not ranks
                    and f"; waiting at {of_torchrun['rdzv_endpoint']}"
                )
                line = f"after {SILENT_S:g} s no first step yet: {ranks} ranks have started"
                output.show("".join([line, where or "", *held]), sys.stderr)
            if limit_s is not None and now > limit_s:
                raise TimeoutError
            if not of_torchrun["max_restarts"] and output.has_error and len(run.alive()) < len(run.members):
                if failed_at is None:
                    failed_at, stopped = now, run.stopped_ranks()
                if now - failed_at > FAILED_S:
                    run.end()
            time.sleep(0.05)
    finally:
        run.end(patience_s=0 if run.process.poll() is not None else 3.0)
        output.poll(is_last=True)
    return stopped


def failure(run: Family, output: RankOutput, report: Path, log_dir: Path, stopped: list[int]) -> LaunchError:
    """What to raise for a run that failed. A refusal, of one line, leaves nothing to look at."""
    said = json.loads(report.read_text()) if report.exists() else {"failures": [], "error": "it was killed"}
    rank, lines = describe_failure(said, output.errors, stopped)
    logs = output.keep(log_dir) if len(lines) > 1 else None
    lines = lines[:14] + [f"whole output: {without_root(logs)}"] * bool(logs)
    return LaunchError(*lines, rank=rank, log_dir=logs, returncode=max(run.process.returncode, 1))


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


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
    flags = torchrun_flags(**of_torchrun)
    environment = torchrun_environment(flags)
    with contextlib.ExitStack() as at_end:
        try:
            folder = tempfile.TemporaryDirectory(prefix="ep-launch-", ignore_cleanup_errors=True)
            scratch = Path(at_end.enter_context(folder))
            is_given = environment.get("TB_LOGDIR") or any(word.startswith("--log-dir") for word in arguments)
            if not is_given:
                environment["TB_LOGDIR"] = str(new_folder(RUNS / time.strftime("%Y%m%d-%H%M%S")))
                at_end.callback(remove_if_empty, Path(environment["TB_LOGDIR"]))  # after a refusal
            steps, report, summary = scratch / "steps", scratch / "report.json", scratch / "summary.json"
            steps.write_bytes(bytes(2**13))  # for 960 ranks
            environment["EP_STEPS"] = str(steps)
            output = RankOutput(scratch / "ranks", quiet)
            ahead = ["--check", *flags, "--redirects=3", f"--log-dir={output.folder}"]
            program = [script, "--summary", summary, *arguments]  # the last --summary counts
            with open(output.folder / "torchrun.log", "wb") as log:
                run = start_worker("torchrun", report, *ahead, *program, output=log, environment=environment)
            at_end.callback(run.end, patience_s=0)
        except OSError as error:
            message = f"cannot write {error.filename} ({error.strerror}); set TMPDIR, or --log-dir"
            raise LaunchError(message, returncode=2) from None
        check_s = CHECK_S if limit_s is None else limit_s
        try:
            checked = run.wait_for(report.with_suffix(".flags"), check_s)
        except TimeoutError:
            plugin = re.search(r"--plugin[= ](.+?)(?= --|$)", " ".join(map(str, arguments)))
            why = f": the plugin {plugin[1]} has not been read to its end" if plugin else ""
            raise LaunchError(f"the flags were not checked within {check_s:g} s{why}", returncode=2) from None
        if "error" in checked:
            raise LaunchError(*checked["error"], returncode=2)
        shown = shlex.join(["torchrun", *flags, str(script), *arguments]).replace(*HERE)
        output.show(shown.replace("=auto", f"={checked['nproc']}"), sys.stdout)
        output.bar, log_dir = Bar(checked["values"]["steps"], quiet), checked["values"]["log_dir"]
        log_dir = Path(log_dir or environment.get("TB_LOGDIR") or RUNS).expanduser()
        try:
            stopped = watch(run, output, steps, of_torchrun, limit_s)
        except TimeoutError:
            logs = output.keep(log_dir)
            message = f"the run did not end within {limit_s:g} s and was stopped; whole output: {without_root(logs)}"
            raise LaunchError(message, log_dir=logs) from None
        except KeyboardInterrupt:
            logs = without_root(output.keep(log_dir))
            raise Interrupted([f"every rank has ended; logs in {logs}"]) from None
        finally:
            output.bar.close()
        if run.process.returncode:
            raise failure(run, output, report, log_dir, stopped)
        output.keep(log_dir)
        given = Path(checked["values"]["summary"] or summary)
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
    limit_s: ends the run after so long, or what checks the flags before it. script: another stitched launcher.
    flags: launcher.py's, `top_k=2` for `--top-k 2`, True and False for `--x` and `--no-x`, None for leaving it out.

    Raises LaunchError, before anything starts, for a stale launcher, definitions that differ from the kernel's,
    flags that the launcher refuses; and where the run fails, with the rank, its cells and its last lines. An
    interrupt ends every rank within 5 s. Costs about 2 s to start the processes.
    """
    hosts = {"nnodes": nnodes, "rdzv_endpoint": rdzv_endpoint}
    of_torchrun, script = {"nproc": nproc, "max_restarts": max_restarts} | hosts, Path(script).resolve()
    return run_command(of_torchrun, flag_arguments(flags), script, quiet=quiet, limit_s=limit_s)


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext tools.launch`: registers %%ranks."""
    from tools.ranks.cells import ranks_magic

    shell.register_magic_function(ranks_magic, "cell", "ranks")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise LaunchError(f"{message}; --help lists the flags", returncode=2)


def command_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launch.py", description="Trains with torchrun.", add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the flags of launcher.py")
    parser.add_argument("--nproc", "--nproc-per-node", "--nproc_per_node", type=int, metavar="N",
                        help="processes on this host (default: one a GPU if there are 2 or more, else 2)")  # fmt: skip
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the hosts meet, the same on each")
    parser.add_argument("--max-restarts", "--max_restarts", type=int, default=0, metavar="N",
                        help="how often all ranks start again once one has ended (default: 0)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> exit code: 0, 2 for a refusal, 130 for an interrupt, else torchrun's."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
    try:
        options, rest = command_parser().parse_known_args(argv)
        of_torchrun = vars(options)
        if of_torchrun.pop("help"):
            from ep_launcher import launcher

            print(command_parser().format_help(), "\nThe flags of launcher.py:\n", sep="\n")
            print(launcher.make_parser().format_help())
        else:
            run_command(of_torchrun, rest, LAUNCHER, quiet=False, limit_s=None)
        return 0
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.returncode
    except KeyboardInterrupt as stopped:
        print(f"interrupted: {stopped}" if str(stopped) else "interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
