"""What the package does by itself: `python -m ep_launcher bench-inference`."""

import os
import signal
import sys

from ep_launcher.launcher import bench_inference, refuse

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))
    if sys.argv[1:2] != ["bench-inference"]:
        sys.exit(
            refuse("python -m ep_launcher takes bench-inference, and its flags behind it (--help lists them)")
        )
    sys.exit(bench_inference(sys.argv[2:]))
