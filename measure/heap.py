"""A plugin of the launcher: tools/faulty.py's step, which can also print what malloc has given out ("heap").

No fault, but what a long run is asked for: measure/faults.py.
"""

import ctypes
import os

from tools import faulty


class HeapState(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def note_heap() -> None:
    """Prints what this process has from malloc, all arenas together."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = HeapState
    now = mallinfo2()
    print(f"heap of rank {os.environ['RANK']}: {now.uordblks + now.hblkhd} bytes", flush=True)


faulty.FAULTS["heap"] = note_heap
