"""What the package does by itself: `python -m ep_launcher bench-inference`."""

import os
import signal
import sys

from ep_launcher.launcher import bench_inference, refuse

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))
    if sys.argv[1:] in (["-h"], ["--help"]):
        print("python -m ep_launcher bench-inference [FLAG...]; bench-inference --help lists the flags")
        sys.exit(0)
    if sys.argv[1:2] != ["bench-inference"]:
        sys.exit(
            refuse("python -m ep_launcher takes bench-inference, which stands before its flags; see --help")
        )
    sys.exit(bench_inference(sys.argv[2:]))
