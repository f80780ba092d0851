"""What tools/launch.py is made of, from the bottom up; nothing here imports it.

processes.py  starting, watching, ending a family of processes      failures.py  what went wrong, at which rank
output.py     lines and the bar while a run goes on                 flags.py     keywords and flags, checked early
worker.py     the process behind a run or a cell                    cells.py     %%ranks
"""

from tools.ranks.cells import ByRank, RanksError, run_cell_on_ranks

__all__ = ["ByRank", "RanksError", "run_cell_on_ranks"]
