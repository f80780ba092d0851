"""What a rank of a %%ranks cell runs; cells.py has torchrun start it, and reads what it leaves in its folder.

body.py FOLDER      spec.json: what to run; rankN.json: its failure, "" for none; rankN.pickle: what it collected
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import json
import linecache
import os
import pickle
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # in the place of tools/ranks/

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.elastic.utils.store import barrier  # noqa: E402

from ep_launcher import launcher  # noqa: E402
from tools.ranks.failures import CELL_FILE, clean_message  # noqa: E402
from tools.stitch.reading import parse_leniently  # noqa: E402
from tools.stitch.trace import cell_of  # noqa: E402

CELL_MODULE = "ranks_cell"  # where a cell's classes live
GRACE_S = 1.0  # what the other ranks get, to fail or end by themselves, once one rank has failed
COLLECTIVES = ("Communicator.", "Pending.", "TrafficMeter.")  # whose frames are a collective's own


def describe_error(error: BaseException, sent: dict[str, Any]) -> str:
    """ ", line 4 of the cell: ValueError: no good (innermost cell of the launcher)", to stand behind "rank 1"."""
    line, where, message = "", "", clean_message(str(error))
    for frame, number in traceback.walk_tb(error.__traceback__):
        name, function = frame.f_code.co_filename, frame.f_code.co_qualname
        if name == CELL_FILE:
            line = f", line {number} of the cell"
        elif name in sent:
            where = f" ({name}, line {number}, in {function})"
        elif name == launcher.__file__ and not function.startswith(COLLECTIVES):
            where = f" ({cell_of(name, number) or 'launcher.py'}, in {function})"
    if isinstance(error, SyntaxError) and error.filename == CELL_FILE:
        line, where, message = f", line {error.lineno} of the cell", "", error.msg
    return f"{line}: {type(error).__name__}{': ' if message else ''}{message}{where}"


class CpuPickler(pickle.Pickler):
    """Pickles every tensor, wherever it is, as a detached copy on the CPU."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        return value.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def start_group(device: torch.device, limit_s: float) -> dist.Store | None:
    """Joins the other ranks -> a store of all of them; None at world size 1."""
    store = launcher.init_distributed(device, limit_s / 2)
    # A rank is through when its own connections stand. One that then dies at once, as a cell may want, would break
    # what its peers still do: nobody starts the cell before everybody is through.
    if store is not None:
        barrier(store, dist.get_world_size(), "connected", limit_s)
    return store


def run_source(source: str, filename: str, scope: dict[str, Any], only: Sequence[int] = ()) -> None:
    """Runs a cell's source, an await outside a function included; its lines show up in tracebacks.

    only: the first lines of the statements to run; none: all of them.
    """
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    tree = parse_leniently(source) if only else ast.parse(source, filename)
    tree.body = [part for part in tree.body if not only or part.lineno in only]
    # dont_inherit: this file's own `from __future__ import annotations` is none of the cell's.
    code = compile(tree, filename, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, scope))
    else:
        exec(code, scope)


def execute_cell(spec: dict[str, Any], device: torch.device, results: Path) -> None:
    """Runs the definitions sent along, then the body; saves CPU copies of the names to collect."""
    torch.manual_seed(0)
    group = dist.group.WORLD if dist.is_initialized() else None
    module = sys.modules[CELL_MODULE] = types.ModuleType(CELL_MODULE)  # dataclasses and pickle look there
    scope = vars(module)
    scope |= {name: value for name, value in vars(launcher).items() if not name.startswith("_")}
    scope |= {"rank": int(os.environ["RANK"]), "world_size": spec["nproc"], "device": device}
    scope |= {"ep_group": group, "comm": launcher.Communicator(group)}
    for filename, (source, lines) in spec["sent"].items():
        run_source(source, filename, scope, lines)
    run_source("\n" + spec["body"], CELL_FILE, scope)  # the magic's own line is line 1 of the cell
    missing = [name for name in spec["collect"] if name not in scope]
    if missing:
        raise NameError(f"the cell does not define `{missing[0]}`, which --collect names")
    del sys.modules[CELL_MODULE]  # the kernel has no such module: what needs it cannot be sent there
    try:
        with results.open("wb") as file:
            CpuPickler(file).dump([scope[name] for name in spec["collect"]])
    except Exception as error:
        raise TypeError(
            f"what --collect names cannot be sent to the kernel ({clean_message(str(error))}); "
            "collect tensors, numbers, strings, and lists, tuples or dicts of them"
        ) from None


def main(folder: Path) -> None:
    """One rank. Its process and its connections stay until all ranks have ended, or torchrun ends them."""
    spec, own = json.loads((folder / "spec.json").read_text()), folder / f"rank{os.environ['RANK']}.json"
    os.chdir(spec["cwd"])
    sys.stderr = sys.stdout  # what libraries log is shown nowhere
    # A warning as one line without paths: outputs are the same on every machine.
    warnings.showwarning = lambda message, category, *_, **__: print(f"{category.__name__}: {message}")
    store, failure = None, ""
    try:
        device = launcher.choose_device(spec["device"])
        store = start_group(device, spec["timeout_s"])
        execute_cell(spec, device, own.with_suffix(".pickle"))
    except BaseException as error:
        is_over = isinstance(error, SystemExit) and error.code in (None, 0) and not spec["collect"]
        failure = "" if is_over else describe_error(error, spec["sent"])
    own.write_text(json.dumps(failure))
    if store is not None:
        with contextlib.suppress(dist.DistError):
            barrier(store, spec["nproc"], "ended", GRACE_S if failure else 2 * spec["timeout_s"])
    if failure:
        os.kill(os.getppid(), signal.SIGTERM)  # torchrun ends all ranks
    while failure:
        signal.pause()
    os._exit(0)  # threads of a broken group may hold up a normal exit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
