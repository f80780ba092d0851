"""On one GPU: a training step with fixed buffers as a CUDA graph, against the same step run eagerly, bit by bit.

    python measure/capacity.py                  into results/<device>_capacity.json, in less than a minute

For every size and every kind of experts: --steps steps of both from the same start, losses, parameters and optimiser
states compared bitwise; no host synchronisation in the eager step (CUDA's sync debug mode); then the milliseconds a
step of dropless, of fixed buffers, and of their graph, in alternation. Exit code 1 where something differs.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one workspace, in a graph or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import record  # noqa: E402

SIZES = {
    "seed": {"num_experts": 16, "top_k": 2, "hidden_dim": 256, "ffn_dim": 1024, "max_num_tokens": 128,
             "dtype": "float32"},
    "large": {"num_experts": 32, "top_k": 4, "hidden_dim": 1024, "ffn_dim": 1024, "max_num_tokens": 4096,
              "dtype": "bfloat16"},
}  # fmt: skip
FACTOR, NUM_WARM_UP, NUM_BATCHES = 1.25, 4, 8
Batch = tuple[Tensor, Tensor]


class BufferTask:
    """The loss of whatever lies in a trainer's buffers."""

    @staticmethod
    def loss(model: ep.EPMoE, batch: Batch) -> Tensor:
        """x and target [T, D] -> the mean squared error."""
        x, target = batch
        return torch.nn.functional.mse_loss(model(x).float(), target.float())


class Trainer:
    """One layer with its optimiser and its input buffers; step() trains on what lies in them -> losses [2]."""

    def __init__(self, config: ep.MoEConfig) -> None:
        self.mesh, self.options = ep.init_ep(), ep.TrainingOptions()
        self.model = ep.EPMoE(config, self.mesh, seed=0, device="cuda")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4, fused=True, capturable=True)
        dtype = next(self.model.experts.parameters()).dtype
        shape = config.max_num_tokens, config.hidden_dim
        self.buffers = tuple(torch.zeros(shape, device="cuda", dtype=dtype) for _ in range(2))
        self.step: Callable[[], Tensor] = self.work

    def work(self) -> Tensor:
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = ep.train_step(self.model, self.mesh, BufferTask, [self.buffers], self.options)
        self.optimizer.step()
        return losses

    def train_on(self, batch: Batch) -> Tensor:
        """Copies a batch into the buffers, and one step."""
        for buffer, tensor in zip(self.buffers, batch, strict=True):
            buffer.copy_(tensor)
        return self.step()

    def warm_up(self, batches: list[Batch]) -> None:
        """NUM_WARM_UP eager steps, as a capture wants them."""
        record.on_side_stream(lambda: [self.train_on(batch) for batch in batches[:NUM_WARM_UP]])

    def capture(self) -> None:
        """Records work(). Nothing is computed; the steps before it have warmed everything up."""
        self.step = record.captured(self.work, warm_up=0)

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes."""
        state = {name: p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            state |= {f"{name} {key}": value for key, value in self.optimizer.state[p].items()}
        return state


def step_without_sync(trainer: Trainer, batch: Batch) -> str:
    """One eager step in which CUDA refuses any wait for the device -> "none", or what asked for one."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_on(batch)
        return "none"
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compare_graph(
    config: ep.MoEConfig, batches: list[Batch], num_steps: int
) -> tuple[dict, Trainer, Trainer]:
    """num_steps eager steps and as many replayed ones, from the same start -> what differs, both trainers."""
    eager, graphed = Trainer(config), Trainer(config)
    for trainer in (eager, graphed):
        trainer.warm_up(batches)
    syncs = [step_without_sync(trainer, batches[0]) for trainer in (eager, graphed)]
    graphed.capture()
    different_steps, dropped = [], []
    for step in range(num_steps):
        losses = [trainer.train_on(batches[step % NUM_BATCHES]).clone() for trainer in (eager, graphed)]
        if not torch.equal(*losses):
            different_steps.append(step)
        dropped.append((eager.model.topk_ids < 0).float().mean())
    ours, theirs = eager.state(), graphed.state()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    facts = {
        "bitwise_equal": not different_steps and not different,
        "steps": num_steps,
        "different_losses": different_steps,
        "different_tensors": different,
        "tensors": len(ours),
        "task_loss": [round(float(values[0]), 6) for values in losses],
        "dropped_fraction": float(torch.stack(dropped).mean()),
        "host_syncs": syncs[0],
    }
    return facts, eager, graphed


def measure_one(recorder: record.Recorder, size: str, experts: str, overflow: str) -> dict:
    """One size with one kind of experts: the comparison, and the times of all ways."""
    options = ep.CapacityOptions(FACTOR, overflow=overflow, capacity_share=SIZES[size]["max_num_tokens"])
    fixed = ep.MoEConfig(**SIZES[size], dispatcher="capacity", experts=experts, extras=(options,))
    stream = ep.TokenStream(fixed, 0, fixed.max_num_tokens, recorder.comm, "cuda")
    batches = [stream.next() for _ in range(NUM_BATCHES)]
    facts, eager, graphed = compare_graph(fixed, batches, recorder.args.steps)
    dropless = ep.MoEConfig(**SIZES[size], dispatcher="auto", experts=experts)
    trainers = {"dropless": Trainer(dropless), "fixed": eager, "fixed, graph": graphed}
    trainers["dropless"].warm_up(batches)
    memory = {}
    for name in ("dropless", "fixed"):
        memory[name] = record.peak_bytes(lambda name=name: trainers[name].train_on(batches[0])) / 2**20
    variants = {}
    for name, trainer in trainers.items():
        turns = itertools.cycle(batches)
        variants[name] = lambda trainer=trainer, turns=turns: trainer.train_on(next(turns))
    samples = recorder.alternate(variants, 5, recorder.event_ms, warm_up=2)
    taken = ep.pick("dispatcher", dropless, "cuda", 1)
    return facts | {
        "dropless_dispatcher": taken, "ms_per_step": record.medians(samples), "samples_ms": samples,
        "peak_mib": memory,
    }  # fmt: skip


def measure(recorder: record.Recorder) -> None:
    """Every size with every kind of experts and overflow."""
    results = []
    for size in recorder.args.sizes:
        best = ep.pick("experts", ep.MoEConfig(**SIZES[size]), "cuda", 1)
        kinds = dict.fromkeys(recorder.args.experts or ["blocks", best])
        for experts, overflow in itertools.product(kinds, ("drop", "reroute")):
            name = f"{size:6} {experts:8} {overflow:8}"
            try:
                found = measure_one(recorder, size, experts, overflow)
                ms, peaks = (
                    {n: round(v, 3) for n, v in found[k].items()} for k in ("ms_per_step", "peak_mib")
                )
                facts = {k: found[k] for k in ("bitwise_equal", "host_syncs", "dropped_fraction")}
                recorder.say(f"{name} {facts}; ms a step {ms}; peak MiB {peaks}")
            except RuntimeError as error:  # a kind of experts that asks the device cannot be captured
                found = {"error": str(error).strip().splitlines()[0], "bitwise_equal": False}
                recorder.say(f"{name} failed: {found['error']}")
            recorder.failures += [] if found["bitwise_equal"] else [name]
            results.append({"size": size, "experts": experts, "overflow": overflow} | found)
    recorder.write("capacity", {"sizes": SIZES, "capacity_factor": FACTOR, "results": results})


def flags() -> argparse.ArgumentParser:
    """The flags."""
    parser = record.parser(__doc__, rounds=20, steps=100)
    parser.set_defaults(device="cuda")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--experts", nargs="+", help="kinds (default: blocks, and what auto takes)")
    return parser


if __name__ == "__main__":
    record.main(measure, flags())
