"""Capacity against a dense reference that drops, or reroutes, the same choices; on real ranks.

    torchrun --standalone --nproc_per_node=2 tests/ranks/capacity_parity.py

Who keeps a place is worked out a second time here, token by token in plain Python. Exit code 1 where an error is over
its limit.
"""

import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ep_launcher.launcher import (  # noqa: E402
    REGISTRIES,
    CapacityOptions,
    EPMoE,
    Mesh,
    MoEConfig,
    dense_moe,
)
from tools.parity import (  # noqa: E402
    BASE,
    begin,
    collect,
    everyones_rows,
    finish,
    limit_of,
    over_the_limit,
    plain_cases,
    run_case,
)

FACTORS = {"drop": 0.8, "reroute": 1.1}
SPARSE = (
    "uneven",
    "rank_without_tokens",
    "all_to_one_expert",
)  # where rows differ most; all that low precision runs


def slow_capacity(num_tokens: int, config: MoEConfig, factor: str) -> int:
    """The smallest whole number that is not below num_tokens * K * factor / E."""
    exact = Fraction(factor) * num_tokens * config.top_k / config.num_experts
    return exact.numerator // exact.denominator + (exact.denominator != 1)


def admit(claims: list[tuple], room: int, order: str) -> list[tuple]:
    """claims (probability, token, k) for one expert -> those that it has room for."""
    key = (lambda c: (-c[0], c[1])) if order == "probs" else (lambda c: c[1])
    return sorted(claims, key=key)[:room]


def slow_overflow(ids: list, probs: list, capacity: int, policy: str, order: str) -> list:
    """ids [N][K], probs [N][E] -> ids with the choices that found no place moved, or -1. One token at a time."""
    num_experts = len(probs[0]) if probs else 0
    placed, room = [[-1] * len(line) for line in ids], [capacity] * num_experts
    for e in range(num_experts):
        claims = [(probs[t][e], t, line.index(e)) for t, line in enumerate(ids) if e in line]
        for _, t, k in admit(claims, room[e], order):
            placed[t][k] = e
            room[e] -= 1
    others = [
        sorted((e for e in range(num_experts) if e not in ids[t]), key=lambda e: -probs[t][e])  # noqa: B023
        for t in range(len(ids))
    ]
    rounds = max(map(len, others), default=0) if policy == "reroute" else 0
    for j in range(rounds):
        claims = {}
        for t, line in enumerate(placed):
            if -1 in line and j < len(others[t]):
                claims.setdefault(others[t][j], []).append((probs[t][others[t][j]], t, line.index(-1)))
        for e, waiting in claims.items():
            for _, t, k in admit(waiting, room[e], order):
                placed[t][k] = e
                room[e] -= 1
    return placed


def slow_placement(probs: Tensor, sizes: list[int], config: MoEConfig) -> tuple[Tensor, Tensor]:
    """probs [N, E] of all ranks -> the router's choices [N, K], and where they end up."""
    options = config.option(CapacityOptions)
    chosen = probs.topk(config.top_k).indices
    whole = options.capacity_scope == "global"
    counted = sum(sizes) if whole else -(-sum(sizes) // len(sizes))
    capacity = slow_capacity(counted, config, str(options.capacity_factor))
    placed: list = []
    for ids, p in zip(*(t.split([sum(sizes)] if whole else sizes) for t in (chosen, probs)), strict=True):
        placed += slow_overflow(ids.tolist(), p.tolist(), capacity, options.overflow, options.drop_order)
    return chosen, torch.tensor(placed, dtype=torch.int64, device=probs.device).view_as(chosen)


class LimitedReference:
    """parity.run_case's reference, with the choices as slow_placement leaves them; notes whether ours are the same."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.is_same, self.num_lost, self.num_moved = sizes, False, 0, 0

    def __call__(self, layer: EPMoE, x: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(y, aux) of all ranks' tokens. In low precision the run's own probabilities choose."""
        config = layer.config
        gate = x @ parameters["router.gate.weight"].t() + parameters["router.gate.bias"]
        own = everyones_rows(layer.probs, layer.mesh.batch)
        probs = gate.softmax(dim=-1).detach() if config.dtype == "float64" else own
        chosen, placed = slow_placement(probs, self.sizes, config)
        self.is_same = torch.equal(placed, everyones_rows(layer.topk_ids, layer.mesh.batch))
        self.num_lost = int((placed < 0).sum())
        self.num_moved = int(((placed >= 0) & (placed != chosen)).sum())
        y, _ = dense_moe(x, parameters, config.top_k, placed)
        return y, dense_moe(x, parameters, config.top_k, chosen)[
            1
        ]  # the aux loss sees what the router wanted


def policies() -> Iterator[dict]:
    """Every overflow policy with every order and scope."""
    for overflow, order, scope in product(FACTORS, ("probs", "position"), ("local", "global")):
        yield {"capacity_factor": FACTORS[overflow], "overflow": overflow, "drop_order": order,
               "capacity_scope": scope}  # fmt: skip


def kinds(
    scope: str, device: torch.device, size: int, dtype: str, only: str | None = None
) -> list[tuple[str, str]]:
    """(dispatcher, experts) that can run here: the fixed buffers with all experts, the others with auto's.

    only: this dispatcher alone.
    """
    found, config = [], MoEConfig(**BASE, dtype=dtype)
    for name, kind in REGISTRIES["dispatcher"].items():
        fixed = kind.needs_capacity
        if only not in (None, name) or kind.preference(config, device, size) <= 0:
            continue
        if fixed and scope == "global":
            continue
        able = [n for n, e in REGISTRIES["experts"].items() if e.preference(config, device, size) > 0]
        found += [(name, experts) for experts in (sorted(able) if fixed else ["auto"])]
    return found


def kept_choices(mesh: Mesh, device: torch.device) -> dict[str, list]:
    """What global scope leaves of one batch of 41 tokens, shared out by tensor_split, for every policy."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(41, BASE["hidden_dim"], generator=generator, dtype=torch.float64)
    x[1::2] = x[::2][: len(x[1::2])]  # every token twice, so that equal probabilities meet
    kept = {}
    for policy in policies():
        if policy["capacity_scope"] == "global":
            options = CapacityOptions(**policy)
            config = MoEConfig(**BASE, dtype="float64", dispatcher="all_gather", extras=(options,))
            layer = EPMoE(config, mesh, seed=3, device=device)
            layer(x.tensor_split(mesh.batch.size)[mesh.batch.rank].to(device))
            kept[f"{options.overflow} {options.drop_order}"] = everyones_rows(
                layer.topk_ids, mesh.batch
            ).tolist()
    return kept


def limited_cases(world_size: int) -> dict[str, dict]:
    """parity's cases. Two experts that lose tokens pull their gate both ways, and in the sum over tokens all digits
    of low precision cancel; so there the gate leans."""
    found = plain_cases(world_size)
    found["one_expert_a_rank"]["bias"] = [1.0] + [0.0] * 7
    return found


def cases_of(is_first: bool, policy: dict, dtype: str, names: list[str]) -> list[str]:
    """The cases of a kind, the choices being the same for all: the first without fixed buffers and the first with them
    run all. The others, to whom order and scope are all one, run those that differ for them; low precision runs what
    rounding may change."""
    if not is_first and (policy["drop_order"], policy["capacity_scope"], dtype) != (
        "probs",
        "local",
        "float64",
    ):
        return []
    return [name for name in names if name in SPARSE or (is_first and dtype == "float64")]


def run_all(
    dtypes: list[str], names: list[str] | None, mesh: Mesh, device: torch.device, only: str | None = None
) -> list[dict]:
    """Every policy, kind, dtype and case -> results; only: of this dispatcher."""
    ran, comm = [], mesh.batch
    known = limited_cases(comm.size)
    for policy, dtype in product(policies(), dtypes):
        seen: set[bool] = set()
        for dispatcher, experts in kinds(policy["capacity_scope"], device, comm.size, dtype, only):
            is_fixed = REGISTRIES["dispatcher"][dispatcher].needs_capacity
            is_first = is_fixed not in seen
            seen.add(is_fixed)
            for name in cases_of(is_first, policy, dtype, names or list(known)):
                case = known[name]
                sizes = [case["tokens"][rank % len(case["tokens"])] for rank in range(comm.size)]
                # A run tells the share; a layer alone finds it out. Both are tried.
                share = -(-sum(sizes) // comm.size) if name in ("even", "one_expert_a_rank") else None
                options = CapacityOptions(**policy, capacity_share=share)
                changes = {k: case[k] for k in BASE if k in case}
                config = MoEConfig(**BASE | changes, dispatcher=dispatcher, experts=experts, dtype=dtype,
                                   max_num_tokens=128, extras=(options,))  # fmt: skip
                reference = LimitedReference(sizes)
                found = run_case(case, config, mesh, device, reference)
                ran.append(
                    policy
                    | {"case": name, "dtype": dtype, "dispatcher": dispatcher, "experts": experts}
                    | {"activation": config.activation, "limit": limit_of(experts, dtype)}
                    | {"world_size": comm.size, "same_choices": reference.is_same}
                    | {"lost": reference.num_lost, "moved": reference.num_moved}
                    | found
                )
    return collect(ran, mesh)


def main() -> int:
    args, device, mesh = begin()
    results = run_all(args.dtypes, args.cases, mesh, device, args.dispatcher)
    failed = [r for r in results if not r["same_choices"] or r in over_the_limit([r])]
    return finish("capacity", args, mesh.batch, results, failed)


if __name__ == "__main__":
    sys.exit(main())
