"""What tools/launch.py is made of, from the bottom up; nothing here imports it.

processes.py  starting, watching, ending a family of processes      failures.py  what went wrong, at which rank
flags.py      keywords and flags, checked early                     output.py    lines and the bar while a run goes on
agent.py      torchrun, and the ranks that it forks                 cells.py     %%ranks
worker.py     the process behind a run or a kernel's cells
"""

from tools.ranks.cells import ByRank, RanksError, run_cell_on_ranks

__all__ = ["ByRank", "RanksError", "run_cell_on_ranks"]
