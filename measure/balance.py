"""Trains every way to balance the load on the skewed task of chapter 09, over several seeds, into results/.

    python measure/balance.py                     every method, 5 seeds: five minutes on one core
    python measure/balance.py --workers 8         the same numbers, sooner
    python measure/balance.py --methods none bias --seeds 2 --steps 300 --output build/study

World size 1: the methods' losses do not depend on the number of ranks (tests/ranks/test_balance.py shows
it), save `aux_local`, and that one on W ranks is the sequence-wise loss over 1 / W of the batch, as a test shows
too. Losses
and loads do not depend on the load of the machine; no times are taken.
"""

import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import (
    original,  # noqa: E402
    record,  # noqa: E402
)

NUM_TOKENS = 256
CAPACITY_FACTOR = 1.25
LEAST_CHOICES = 6400
SIZES = {"num_experts": 16, "top_k": 2, "hidden_dim": 32, "ffn_dim": 32, "max_num_tokens": NUM_TOKENS}
# Of the config, of RoutingOptions, of ClusterOptions and of the training, by field name; the rest are defaults.
METHODS: dict[str, dict[str, Any]] = {
    "none": {"balance": "none"},
    "seed": {"balance": "seed", "aux_alpha": 0.01},
    "aux, 0.01": {"balance": "aux", "aux_alpha": 0.01},
    "aux": {"balance": "aux", "aux_alpha": 0.1},
    "aux + z-loss": {"balance": "aux", "aux_alpha": 0.1, "z_alpha": 0.01},
    "aux_local on 8": {"balance": "none", "aux_alpha": 0.1, "sequence_alpha": 1.0, "sequence_length": 32},
    "aux_local on 8, topics": {
        "balance": "none", "aux_alpha": 0.1, "sequence_alpha": 1.0, "sequence_length": 32, "sort_tokens": True,
    },
    "aux, topics": {"balance": "aux", "aux_alpha": 0.1, "sort_tokens": True},
    "none, sigmoid": {"balance": "none", "router": "sigmoid"},
    "aux, sigmoid": {"balance": "aux", "router": "sigmoid", "aux_alpha": 0.1},
    "bias, 0.001": {"balance": "bias", "router": "sigmoid", "bias_speed": 0.001},
    "bias": {"balance": "bias", "router": "sigmoid", "bias_speed": 0.01},
    "bias + sequence": {
        "balance": "bias", "router": "sigmoid", "bias_speed": 0.01, "aux_alpha": 0.01, "sequence_alpha": 0.01,
    },
    "bias, normalised": {
        "balance": "bias", "router": "sigmoid", "bias_speed": 0.01, "normalize_topk": True,
    },
    "bias, 1 of 4 groups": {
        "balance": "bias", "router": "sigmoid", "bias_speed": 0.01, "num_groups": 4, "topk_groups": 1,
    },
}  # fmt: skip


def register_seed_loss() -> None:
    """The original's aux loss (chapter 03), from build/seed.py, as the balance `seed`, of this script alone."""
    seed_aux_loss = original.load().seed_aux_loss

    @ep.register("balance", "seed")
    class SeedBalance(ep.Balance):
        def forward(self, routing: ep.Routing) -> Tensor:
            return seed_aux_loss(routing.probs, routing.topk_ids)


def capacity() -> int:
    """Choices that an expert takes in a step (chapter 08), from one rank that holds the whole batch."""
    return ep.expert_capacity(NUM_TOKENS, ep.MoEConfig(**SIZES), CAPACITY_FACTOR)


def make_config(method: dict[str, Any]) -> tuple[ep.MoEConfig, float]:
    """A method's config and its aux_alpha."""
    values = dict(method)
    alpha = values.pop("aux_alpha", 0.0)
    groups = []
    for group in (ep.RoutingOptions, ep.ClusterOptions):
        names = {f.name for f in ep.fields(group)} & set(values)
        groups.append(group(**{name: values.pop(name) for name in names}))
    return ep.MoEConfig(**SIZES, **values, extras=tuple(groups)), alpha


def max_over_mean(loads: Tensor) -> float:
    """loads int64 [steps, E] -> the largest expert's choices over the mean."""
    total = loads.sum(0).double()
    return float(total.max() / total.mean())


def loss_with_capacity(model: ep.EPMoE, stream: Any, num_batches: int = 20) -> float:
    """The trained layer's task loss on fresh batches, each expert keeping its most probable choices (chapter 08)."""
    whole = model.config
    limit = ep.CapacityOptions(capacity_factor=CAPACITY_FACTOR)
    model.config = ep.replace(whole, extras=(*whole.extras, limit))
    with torch.no_grad():
        pairs = [stream.next() for _ in range(num_batches)]
        losses = [(model(x) - target).square().mean() for x, target, _ in pairs]
    model.config = whole
    return float(torch.stack(losses).mean())


def train(method: dict[str, Any], seed: int, steps: int, lr: float) -> dict[str, Any]:
    """One run -> what is kept of it."""
    config, alpha = make_config(method)
    mesh, options = ep.init_ep(), ep.TrainingOptions(aux_alpha=alpha, lr=lr, tokens=NUM_TOKENS)
    model, stream = ep.EPMoE(config, mesh, seed=seed), ep.ClusterStream(config, seed, NUM_TOKENS, mesh.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    losses, loads, biases = [], [], []
    for _ in range(steps):
        batch = stream.next()
        optimizer.zero_grad()
        losses.append(ep.train_step(model, mesh, stream, [batch], options)[0])
        optimizer.step()
        ep.after_step(model)
        loads.append(ep.count_choices(model.topk_ids, config.num_experts))
        if model.balance.bias is not None:
            biases.append(model.balance.bias.clone())
    losses, loads = torch.stack(losses), torch.stack(loads)
    tail = max(1, steps // 10)
    newest = -(-LEAST_CHOICES // (NUM_TOKENS * config.top_k))
    every = max(1, steps // 40)
    with torch.no_grad():
        z_loss = model.router(batch[0]).logits.logsumexp(-1).square().mean()
    over = (loads[-tail:] - capacity()).clamp(min=0).sum() / loads[-tail:].sum()
    kept = {
        "seed": seed,
        "task_loss": float(losses[-tail:].mean()),
        "max_over_mean": max_over_mean(loads[-newest:]),
        "max_over_mean_tail": max_over_mean(loads[-tail:]),
        "dropped_fraction": float(over),
        "entropy": float(torch.special.entr(model.probs).sum(1).mean()) / math.log(config.num_experts),
        "z_loss": float(z_loss),
        "task_loss_with_capacity": loss_with_capacity(model, stream),
    }
    if seed == 0:
        whole = steps // every * every
        kept["load_over_time"] = loads[:whole].view(-1, every, loads.shape[1]).sum(1).int().tolist()
        curve = losses[:whole].view(-1, every).mean(1)
        kept["task_loss_over_time"] = [round(value, 5) for value in curve.tolist()]
        if biases:
            history = torch.stack(biases)[every - 1 :: every]
            kept["bias_over_time"] = [[round(value, 4) for value in row] for row in history.tolist()]
    return kept


def run_job(job: tuple[str, int, int, float]) -> tuple[str, dict[str, Any]]:
    """(method, seed, steps, lr) -> the method and what is kept of its run; in any process."""
    name, seed, steps, lr = job
    torch.set_num_threads(1)
    if "seed" not in ep.REGISTRIES["balance"]:
        register_seed_loss()
    return name, train(METHODS[name], seed, steps, lr)


def main() -> None:
    """The runs, over some processes."""
    parser = record.parser(__doc__, steps=800)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the runs")
    args = parser.parse_args()
    original.extract()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.methods}
    jobs = [(name, seed, args.steps, args.lr) for seed in range(args.seeds) for name in args.methods]
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, kept in pool.map(run_job, jobs):
            runs[name].append(kept)
            print(
                f"seed {kept['seed']}, {name:22} task loss {kept['task_loss']:.4f}, max / mean "
                f"{kept['max_over_mean']:.2f}, dropped {kept['dropped_fraction']:.3f}, "
                f"task loss so {kept['task_loss_with_capacity']:.4f}",
                flush=True,
            )
    result = {
        "sizes": SIZES, "tokens": NUM_TOKENS, "steps": args.steps, "lr": args.lr, "task": "clusters",
        "num_clusters": ep.ClusterOptions().num_clusters, "zipf": ep.ClusterOptions().zipf,
        "capacity_factor": CAPACITY_FACTOR, "capacity": capacity(),
        "settings": {name: METHODS[name] for name in args.methods}, "runs": runs,
    }  # fmt: skip
    record.write(args.output, "balance", torch.device("cpu"), result)


if __name__ == "__main__":
    main()
