"""What the package does by itself: `python -m ep_launcher bench-inference`."""

import sys

from ep_launcher.launcher import bench_inference, refuse

if __name__ == "__main__":
    if sys.argv[1:2] != ["bench-inference"]:
        sys.exit(
            refuse("python -m ep_launcher takes bench-inference, and its flags behind it (--help lists them)")
        )
    sys.exit(bench_inference(sys.argv[2:]))
