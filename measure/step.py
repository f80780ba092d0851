"""A training step at the original tutorial's sizes: ours with every dispatcher and experts, and the original's.

python measure/step.py                                two gloo ranks, into results/cpu_step.json
python measure/step.py --device cuda --ranks 1        into results/<device>_step.json
python measure/step.py --before build/before.py       beside another commit's launcher.py (measure/before.py)
"""

import contextlib
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ep_launcher import launcher as ep  # noqa: E402
from measure import before, record  # noqa: E402


def step_variants(recorder: record.Recorder) -> dict[str, Callable[[], object]]:
    """{name: one step}: 16 experts, top-2, hidden 256, 32 tokens a rank."""
    original = before.original_step(ep.MoEConfig(), recorder.comm, recorder.device)
    variants = {"seed": original} if recorder.on_gpu else {"seed": original, "seed in batches": original}
    kinds = product(*(sorted(ep.REGISTRIES[kind]) for kind in ("dispatcher", "experts")))
    wanted = [(*names, "eager") for names in kinds if names[0] != "capacity"]
    if recorder.on_gpu:
        wanted += [("local", "bmm", "graph"), ("local", "bmm", "compiled"), ("capacity", "bmm", "graph")]
    for prefix, launcher in recorder.launchers.items():
        for dispatcher, experts, step in wanted:
            flags = ["--dispatcher", dispatcher, "--experts", experts, "--step", step]
            flags += ["--capacity-factor", "8"] if dispatcher == "capacity" else []
            with contextlib.suppress(ValueError):  # what cannot run here
                name = f"{prefix}{dispatcher}+{experts}" + (f", {step}" if step != "eager" else "")
                variants[name] = launcher.step(flags, recorder.device)
    return variants


def measure(recorder: record.Recorder) -> None:
    """All variants, alternating."""
    recorder.extract_original()
    samples = recorder.alternate(step_variants(recorder), recorder.args.steps)
    found = record.medians(samples)
    result = {"steps_per_sample": recorder.args.steps, "median_ms": found, "samples_ms": samples}
    recorder.write("step", result)
    recorder.say_speeds(found)


if __name__ == "__main__":
    record.main(measure, record.parser(__doc__, ranks=2, device="cpu", rounds=20, steps=20, before=None))
