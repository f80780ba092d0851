"""What tools/launch.py is made of, from the bottom up; nothing here imports it.

failures.py   what went wrong, at which rank              processes.py  starting, watching, ending a family of processes
output.py     lines and the bar while a run goes on       agent.py      torchrun, and the ranks that it forks
cells.py      %%ranks; body.py is what its ranks run
"""
