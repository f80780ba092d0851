"""What tools/extract.py is made of.

reading.py  notebooks as they are stored, and the Python in their cells
rules.py    the book's cell rules
program.py  cells -> the text of one file
trace.py    the functions at the end of that file, which name cells in tracebacks
fresh.py    for a running kernel: are launcher.py, the saved notebooks and the kernel's definitions the same?
"""
