"""On one GPU: a training step with fixed buffers as a CUDA graph, against the same step run eagerly, bit by bit.

    python measure/capacity.py --output results/h100_capacity.json

Not collected by pytest. For every size and every kind of experts: 100 steps of both from the same start, losses,
parameters and optimiser states compared bitwise; no host synchronisation in the eager step (CUDA's sync debug
mode); then the milliseconds a step of dropless, of fixed buffers, and of their graph, in alternation. Exit code 1
where something differs. Takes less than a minute.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one workspace, in a graph or not
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ep_launcher.launcher import (  # noqa: E402
    CapacityOptions,
    Communicator,
    EPMoE,
    MoEConfig,
    TokenStream,
    TrainingOptions,
    device_model,
    init_ep,
    mean_squared_error,
    pick,
    train_step,
)

SIZES = {
    "seed": {"num_experts": 16, "top_k": 2, "hidden_dim": 256, "ffn_dim": 1024, "max_num_tokens": 128,
             "dtype": "float32"},
    "large": {"num_experts": 32, "top_k": 4, "hidden_dim": 1024, "ffn_dim": 1024, "max_num_tokens": 4096,
              "dtype": "bfloat16"},
}  # fmt: skip
NUM_WARM_UP, NUM_BATCHES = 4, 8


class BufferTask:
    """The loss of whatever lies in a trainer's buffers."""

    @staticmethod
    def loss(model: EPMoE, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = batch
        return mean_squared_error(model(x), target, len(x))


class Trainer:
    """One layer with its optimiser and its input buffers; step() trains on what lies in them."""

    def __init__(self, config: MoEConfig) -> None:
        self.mesh = init_ep()
        self.model = EPMoE(config, self.mesh, seed=0, device="cuda")
        self.options = TrainingOptions()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4, fused=True, capturable=True)
        self.x = torch.zeros(config.max_num_tokens, config.hidden_dim, device="cuda", dtype=self.dtype)
        self.target = torch.zeros_like(self.x)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.losses: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.experts.parameters()).dtype

    def take(self, batch: tuple[Tensor, Tensor]) -> None:
        """Copies a batch into the buffers."""
        self.x.copy_(batch[0])
        self.target.copy_(batch[1])

    def work(self) -> Tensor:
        """Forward, backward, update -> losses [2]."""
        losses = train_step(self.model, self.mesh, BufferTask, [(self.x, self.target)], self.options)
        self.optimizer.step()
        return losses

    def step(self) -> Tensor:
        """One step, eagerly or by replay."""
        if self.graph is not None:
            self.graph.replay()
            return self.losses
        self.optimizer.zero_grad(set_to_none=True)
        return self.work()

    def capture(self) -> None:
        """Records work(). Nothing is computed; the steps before it have warmed everything up."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = self.work()
        self.graph, self.losses = graph, losses

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes."""
        state = {name: p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            state |= {f"{name} {key}": value for key, value in self.optimizer.state[p].items()}
        return state


def draw_batches(config: MoEConfig, number: int) -> list[tuple[Tensor, Tensor]]:
    stream = TokenStream(config, 0, config.max_num_tokens, Communicator(), "cuda")
    return [stream.next() for _ in range(number)]


def warm_up(trainer: Trainer, batches: list[tuple[Tensor, Tensor]]) -> None:
    """NUM_WARM_UP eager steps on a side stream, as a capture wants them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches[:NUM_WARM_UP]:
            trainer.take(batch)
            trainer.step()
    torch.cuda.current_stream().wait_stream(side)


def step_without_sync(trainer: Trainer, batch: tuple[Tensor, Tensor]) -> str:
    """One eager step in which CUDA refuses any wait for the device -> "none", or what asked for one."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.take(batch)
        trainer.step()
        return "none"
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compare_graph(config: MoEConfig, num_steps: int) -> tuple[dict, Trainer, Trainer]:
    """num_steps eager steps and as many replayed ones, from the same start -> what differs, both trainers."""
    batches = draw_batches(config, NUM_BATCHES)
    eager, graphed = Trainer(config), Trainer(config)
    for trainer in (eager, graphed):
        warm_up(trainer, batches)
    syncs = [step_without_sync(trainer, batches[0]) for trainer in (eager, graphed)]
    graphed.capture()
    different_steps, dropped = [], []
    for step in range(num_steps):
        losses = []
        for trainer in (eager, graphed):
            trainer.take(batches[step % NUM_BATCHES])
            losses.append(trainer.step().clone())
        if not torch.equal(*losses):
            different_steps.append(step)
        dropped.append((eager.model.topk_ids < 0).float().mean())
    ours, theirs = eager.state(), graphed.state()
    facts = {
        "steps": num_steps,
        "different_losses": different_steps,
        "different_tensors": [name for name in ours if not torch.equal(ours[name], theirs[name])],
        "tensors": len(ours),
        "task_loss": [round(float(losses[0][0]), 6), round(float(losses[1][0]), 6)],
        "dropped_fraction": float(torch.stack(dropped).mean()),
        "host_syncs": syncs[0],
    }
    return facts, eager, graphed


def peak_mib(trainer: Trainer, batch: tuple[Tensor, Tensor]) -> float:
    """Memory that one step takes at its peak, beyond what is held between steps."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.take(batch)
    trainer.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def time_steps(
    trainers: dict[str, Trainer], batches: list, rounds: int, inner: int = 5
) -> dict[str, list[float]]:
    """{name: ms a step, one number a round}; the trainers take turns."""
    samples: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(rounds + 2):
        for name, trainer in trainers.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for i in range(inner):
                trainer.take(batches[(number + i) % len(batches)])
                trainer.step()
            end.record()
            torch.cuda.synchronize()
            if number >= 2:
                samples[name].append(start.elapsed_time(end) / inner)
    return samples


def measure(size: str, experts: str, overflow: str, num_steps: int, say: Callable[[str], None]) -> dict:
    """One size with one kind of experts: the comparison, and the times of all ways."""
    sizes = SIZES[size]
    options = CapacityOptions(1.25, overflow=overflow, capacity_share=sizes["max_num_tokens"])
    fixed = MoEConfig(**sizes, dispatcher="capacity", experts=experts, extras=(options,))
    facts, eager, graphed = compare_graph(fixed, num_steps)
    dropless = MoEConfig(**sizes, dispatcher="auto", experts=experts)
    taken = pick("dispatcher", dropless, "cuda", 1)
    trainers = {"dropless": Trainer(dropless), "fixed": eager, "fixed, graph": graphed}
    batches = draw_batches(fixed, NUM_BATCHES)
    warm_up(trainers["dropless"], batches)
    memory = {name: peak_mib(trainers[name], batches[0]) for name in ("dropless", "fixed")}
    samples = time_steps(trainers, batches, rounds=20)
    ms = {name: statistics.median(values) for name, values in samples.items()}
    name = taken
    is_equal = not facts["different_losses"] and not facts["different_tensors"]
    say(
        f"{size:6} {experts:8} {overflow:8} graph = eager: {str(is_equal):5} host syncs: {facts['host_syncs']}; "
        f"dropped {facts['dropped_fraction']:.3f}; ms a step: "
        + ", ".join(f"{n} {value:.3f}" for n, value in ms.items())
        + f" (dropless: {name}); peak MiB {memory['dropless']:.0f} and {memory['fixed']:.0f}"
    )
    return {"size": size, "experts": experts, "overflow": overflow, "dropless_dispatcher": name,
            "bitwise_equal": is_equal, "ms_per_step": ms, "samples_ms": samples, "peak_mib": memory,
            **facts}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="JSON with machine, versions, command and all samples")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--experts", nargs="+", help="kinds (default: blocks, and what auto takes)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU here; this script needs one", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    results, failed = [], False
    for size in args.sizes:
        best = pick("experts", MoEConfig(**SIZES[size]), "cuda", 1)
        for experts in dict.fromkeys(args.experts or ["blocks", best]):
            for overflow in ("drop", "reroute"):
                try:
                    results.append(
                        measure(size, experts, overflow, args.steps, lambda line: print(line, flush=True))
                    )
                except RuntimeError as error:  # a kind of experts that asks the device cannot be captured
                    line = str(error).strip().splitlines()[0]
                    print(f"{size:6} {experts:8} {overflow:8} failed: {line}", flush=True)
                    results.append({"size": size, "experts": experts, "overflow": overflow, "error": line,
                                    "bitwise_equal": False})  # fmt: skip
                failed |= not results[-1]["bitwise_equal"]
    if args.output:
        report = {
            "device": device_model(torch.device("cuda")),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "command": "python measure/capacity.py " + " ".join(sys.argv[1:]),
            "sizes": SIZES,
            "capacity_factor": 1.25,
            "results": results,
        }
        Path(args.output).parent.mkdir(exist_ok=True)
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
