"""A router's choice and the order of rows, in us: PyTorch's top-k and sort beside the kernels of chapters 14 and 06.

    python measure/order.py                     into results/<device>_order.json, on one GPU
    python measure/order.py --before build/before.py   beside another commit's launcher.py (measure/before.py)
    python measure/order.py --device cpu --small       whether it runs, anywhere

Each is recorded as a CUDA graph, so that its kernels are timed and not their launches. On a GPU the two orders and the
two choices must be the same.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import record  # noqa: E402

CASES = {  # tokens, top-k, experts: measure/layer.py's sizes, DeepSeek-V3's experts on one card, the launcher's default
    "mixtral": (8192, 2, 8),
    "qwen": (16384, 8, 128),
    "deepseek": (8192, 8, 32),
    "deepseek, 256 experts": (8192, 8, 256),
    "default": (256, 2, 16),
}


def variants(num_tokens: int, top_k: int, num_experts: int, recorder: record.Recorder) -> dict[str, Callable]:
    """{name: what is timed}, on random scores."""
    torch.manual_seed(0)
    keys = torch.rand(num_tokens, num_experts, device=recorder.device)
    ids = ep.TopK.choose(keys, top_k)

    def sorted_order() -> ep.RowOrder:
        with mock.patch.object(ep, "uses_kernels", lambda x: False):
            return ep.order_rows(ids, num_experts)

    assert torch.equal(ep.OneLaunch.choose(keys, top_k), ids)
    for ours, right in zip(ep.order_rows(ids, num_experts).tensors, sorted_order().tensors, strict=True):
        assert torch.equal(ours, right)
    found = {
        "top-k, PyTorch": lambda: ep.TopK.choose(keys, top_k),
        "top-k, one launch": lambda: ep.OneLaunch.choose(keys, top_k),
        "order, sorted": sorted_order,
        "order, counted": lambda: ep.order_rows(ids, num_experts),
    }
    if recorder.before:
        found["order, before"] = lambda: recorder.launchers["before, "].ep.order_rows(ids, num_experts)
    return found


def measure(recorder: record.Recorder) -> None:
    """Every case."""
    result: dict = {"cases": {}}
    for name, (num_tokens, top_k, num_experts) in CASES.items():
        num_tokens = min(num_tokens, 64) if recorder.args.small else num_tokens
        runs = variants(num_tokens, top_k, num_experts, recorder)
        runs = {n: record.captured(run) if recorder.on_gpu else run for n, run in runs.items()}
        samples = recorder.alternate(runs, 20, recorder.event_ms, warm_up=2)
        samples = {n: [round(1e3 * ms, 2) for ms in values] for n, values in samples.items()}
        shape = {"tokens": num_tokens, "top_k": top_k, "num_experts": num_experts}
        result["cases"][name] = shape | {"samples_us": samples, "median_us": record.medians(samples)}
        recorder.say(
            f"  {name:22} " + "  ".join(f"{n} {us:.1f} us" for n, us in record.medians(samples).items())
        )
    recorder.write("order", result)


if __name__ == "__main__":
    record.main(measure, record.parser(__doc__, device="cuda", rounds=30, small=False, before=None))
