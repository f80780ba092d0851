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
import shlex
import shutil
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
from tools.ranks.failures import Interrupted, LaunchError, describe_failure, shown_path  # noqa: E402
from tools.ranks.flags import (  # noqa: E402
    LAUNCHER,
    flag_arguments,
    place_paths,
    start_environment,
    torchrun_environment,
    torchrun_flags,
)
from tools.ranks.output import Bar, RankOutput, is_live_notebook, kernel  # noqa: E402
from tools.ranks.processes import ROOT, Family, interrupt, start_worker  # noqa: E402

__all__ = ["LaunchError", "is_live_notebook", "launch", "load_ipython_extension"]

FAILED_S = (
    6.0  # what ranks get once one has left with an error; torchrun would wait 30 s for one that is stuck
)
WARNING_BYTES = 512  # of EP_STEPS, before the steps (launcher.py, StepNotes)
SILENT_S = 20.0  # so long without a first step, and a line says what is waited for


def new_folder(path: Path) -> Path:
    """Makes a folder that was not there: path, or path-2, path-3, ..."""
    number, folder = 1, path
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}-{number}")


def make_log_folder(given: str | None) -> tuple[Path, Path, list[Path]]:
    """(the run's log folder, a new folder for the ranks' output in it, the folders made, innermost first).

    The ranks' folder is a temporary one where nothing can be written to the log folder: the ranks then say so.
    """
    runs = LAUNCHER.parent / "runs"
    folder = ROOT / given if given else runs / time.strftime("%Y%m%d-%H%M%S")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if given:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            runs.mkdir(exist_ok=True)
            folder = new_folder(folder)
            made = [folder]
        ranks = new_folder(folder / "ranks")
        (ranks / "try").write_bytes(bytes(2**16))  # the disk may be full
        (ranks / "try").unlink()
        return folder, ranks, made
    except OSError:
        return folder, Path(tempfile.mkdtemp(prefix="ep-ranks-")), made


def waited_for(output: RankOutput, family: Family, flags: list[str]) -> str:
    """One line on what a run waits for that has not taken a step; empty where another host knows."""
    ranks = list(output.folder.glob("*/attempt_*/*"))
    endpoint = next((flag.partition("=")[2] for flag in flags if flag.startswith("--rdzv-endpoint=")), "")
    if stopped := family.stopped_ranks():
        what = f"rank {stopped[0]} was stopped by SIGSTOP"
    elif ranks and endpoint:
        return ""
    elif ranks:
        what = f"{len(ranks)} ranks have started"
    else:
        what = f"waiting for the other hosts at {endpoint}" if endpoint else "torchrun has started no rank"
    return f"after {SILENT_S:g} s no first step yet: {what}"


def run_torchrun(
    family: Family,
    command: list[str],
    environment: dict[str, str],
    output: RankOutput,
    scratch: Path,
    limit_s: float | None,
) -> tuple[int, dict[str, Any], list[int]]:
    """Tells torchrun what to run, until it ends -> (exit code, worker.py's report, the ranks that SIGSTOP held at the
    failure). Ends everything on any exception.
    """
    report, steps, warning = scratch / "report.json", scratch / "steps", ""
    process, start, failed_at, stopped = family.process, time.monotonic(), None, []
    is_silent, restarts = "EP_STEPS" in environment, any("--max-restarts" in flag for flag in command)
    family.tell(command, environment)
    try:
        while process.poll() is None:
            family.note()
            output.poll()
            now, notes = time.monotonic() - start, steps.read_bytes()
            if done := int.from_bytes(notes[WARNING_BYTES:][:8], "little"):
                output.bar.reach(done)
            if not warning and (warning := notes[:WARNING_BYTES].rstrip(b"\0").decode(errors="replace")):
                output.bar.print(warning, sys.stderr)
            if is_silent and (done or now > SILENT_S):
                is_silent = False
                if not done and (line := waited_for(output, family, command)):
                    output.bar.print(line, sys.stderr)
            if limit_s is not None and now > limit_s:
                raise TimeoutError
            if not restarts and output.has_error and len(family.alive()) < len(family.members):
                if failed_at is None:
                    failed_at, stopped = now, family.stopped_ranks()
                if now - failed_at > FAILED_S:
                    family.end()
            time.sleep(0.05)
    finally:
        family.end(patience_s=0 if process.poll() is not None else 3.0)
        output.poll(is_last=True)
    said = json.loads(report.read_text()) if report.exists() else {"failures": [], "error": "it was killed"}
    return process.returncode, said, stopped


def run_command(
    of_torchrun: dict[str, Any], arguments: list[str], script: Path, *, quiet: bool, limit_s: float | None
) -> dict[str, Any]:
    """One run, from flags to its summary. LaunchError where it fails."""
    try:
        scratch = Path(tempfile.mkdtemp(prefix="ep-launch-"))
        with open(scratch / "torchrun.log", "wb") as log:
            what = ("torchrun", scratch / "report.json", script, *place_paths(arguments))
            family = start_worker(*what, output=log, environment=start_environment())
    except OSError as error:
        raise LaunchError(
            f"cannot write temporary files ({error.strerror}); set TMPDIR", returncode=2
        ) from None
    try:
        return run_started(family, of_torchrun, place_paths(arguments), script, scratch, quiet, limit_s)
    finally:
        family.end(patience_s=0)
        shutil.rmtree(scratch, ignore_errors=True)


def run_started(
    family: Family,
    of_torchrun: dict[str, Any],
    arguments: list[str],
    script: Path,
    scratch: Path,
    quiet: bool,
    limit_s: float | None,
) -> dict[str, Any]:
    """run_command, once torchrun is on its way; scratch: a folder for what is only needed while it runs."""
    checked = family.checked_flags(scratch / "report.json")
    if "error" in checked:
        raise LaunchError(*checked["error"], returncode=2)
    values, nproc = checked["values"], of_torchrun.pop("nproc")
    flags = torchrun_flags(max(2, checked["num_gpus"]) if nproc is None else nproc, **of_torchrun)
    if not quiet:
        print(shlex.join(["torchrun", *flags, shown_path(script), *arguments]), flush=True)
    given = values.get("log_dir")
    if not given and os.environ.get("TB_LOGDIR"):
        given = os.path.abspath(os.path.expanduser(os.environ["TB_LOGDIR"]))
    log_dir, ranks_dir, made = make_log_folder(given)
    environment = torchrun_environment(flags)
    if not values.get("log_dir"):
        environment["TB_LOGDIR"] = str(log_dir)
    summary = ROOT / values["summary"] if values.get("summary") else scratch / "summary.json"
    wanted = ["--summary", str(summary)] if values and not values.get("summary") else []
    (scratch / "steps").write_bytes(bytes(2**13))  # for 960 ranks
    if values:
        environment["EP_STEPS"] = str(scratch / "steps")
    (ranks_dir / "now").mkdir()
    bar = Bar(values.get("steps"), quiet)
    output = RankOutput(ranks_dir / "now", bar, quiet)
    command = [*flags, "--redirects=3", f"--log-dir={output.folder}", str(script), *arguments, *wanted]
    logs, lines = shown_path(ranks_dir), []
    try:
        code, report, stopped = run_torchrun(family, command, environment, output, scratch, limit_s)
        if code:
            rank, lines = describe_failure(report, output.errors, stopped)
            where = [f"whole output: {logs}"] if len(lines) > 1 else []
            raise LaunchError(*lines[:14], *where, rank=rank, log_dir=ranks_dir, returncode=max(code, 1))
        if values.get("steps"):
            bar.reach(values["steps"])
        found = json.loads(summary.read_text("utf-8")) if summary.exists() else {}
        if wanted and found:
            found["config"]["summary"] = None  # the file was ours, and goes
        return found
    except TimeoutError:
        message = f"the run did not end within {limit_s:g} s and was stopped; whole output: {logs}"
        raise LaunchError(message, log_dir=ranks_dir) from None
    except KeyboardInterrupt:
        raise Interrupted([f"every rank has ended; logs in {logs}"]) from None
    finally:
        bar.close()
        output.settle()
        if (log := scratch / "torchrun.log").stat().st_size:
            with contextlib.suppress(OSError):
                shutil.copy(log, ranks_dir)
        if len(lines) == 1:  # a refusal: nothing to look at
            shutil.rmtree(ranks_dir, ignore_errors=True)
            for folder in made:
                with contextlib.suppress(OSError):  # not empty: not ours alone
                    folder.rmdir()


def launch(
    nproc: int | None = None,
    *,
    nnodes: int = 1,
    master_port: int | None = None,
    rdzv_endpoint: str | None = None,
    rdzv_id: str = "ep",
    rdzv_conf: str | None = None,
    max_restarts: int = 0,
    quiet: bool = False,
    limit_s: float | None = None,
    script: str | os.PathLike[str] = LAUNCHER,
    **flags: Any,
) -> dict[str, Any]:
    """Trains with torchrun, streams the output, returns the summary (DESIGN: `--summary`).

    nproc: processes on this host; None is one a GPU where there are two or more, else two, on the CPU.
    nnodes, rdzv_endpoint, rdzv_id, rdzv_conf: for several hosts; every host makes the same call.
    master_port: a fixed port in place of a free one. max_restarts: how often all ranks start again once one has
    ended, from the last checkpoint where there is one (chapter 15). quiet: prints nothing. limit_s: ends the run
    after so long.
    script: another stitched launcher. flags: launcher.py's, `top_k=2` for `--top-k 2`, True and False for
    `--x` and `--no-x`, None for leaving it out; paths are relative to the current folder.

    Raises LaunchError, before anything starts, for a stale launcher, definitions that differ from the kernel's,
    flags that the launcher refuses, a taken port; and where the run fails, with the rank, its cells and its last
    lines. An interrupt ends every rank within 5 s. Costs about 2 s to start the processes.
    """
    script = Path(script).resolve()
    try:
        if script == LAUNCHER:
            assert_fresh()
            if kernel() is not None:
                check_kernel_definitions(kernel().user_ns)
    except RuntimeError as error:
        raise LaunchError(str(error), returncode=2) from None
    of_torchrun = {"nproc": nproc, "nnodes": nnodes, "master_port": master_port, "rdzv_endpoint": rdzv_endpoint,
                   "rdzv_id": rdzv_id, "rdzv_conf": rdzv_conf, "max_restarts": max_restarts}  # fmt: skip
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
    parser.add_argument("--master-port", "--master_port", type=int, metavar="P", help="default: a free port")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the hosts meet, the same on each")
    parser.add_argument("--rdzv-id", default="ep", metavar="NAME", help="one name a run (default: ep)")
    parser.add_argument("--rdzv-conf", metavar="CONF", help="torchrun's, such as is_host=1 or is_host=0")
    parser.add_argument("--max-restarts", "--max_restarts", type=int, default=0, metavar="N",
                        help="how often all ranks start again once one has ended (default: 0)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> exit code: 0, 2 for a refusal, 130 for an interrupt, else torchrun's."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
        signal.signal(signal.SIGINT, interrupt)
    try:
        options, rest = command_parser().parse_known_args(argv)
        assert_fresh()
        of_torchrun = vars(options)
        if of_torchrun.pop("help"):
            from ep_launcher import launcher

            print(command_parser().format_help(), "\nThe flags of launcher.py:\n", sep="\n")
            print(launcher.make_parser().format_help())
            return 0
        run_command(of_torchrun, rest, LAUNCHER, quiet=False, limit_s=None)
        return 0
    except (LaunchError, RuntimeError) as error:  # RuntimeError: a stale launcher
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "returncode", 2)
    except KeyboardInterrupt as stopped:
        print(f"interrupted: {stopped}" if str(stopped) else "interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
