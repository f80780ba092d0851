"""Chapter 10's exchange over a slow cable, two hosts (tools/hosts.py) of two ranks, into results/cpu_links.json.

    python measure/links.py                                  100 Mbit/s, 1 Gbit/s and no limit; four minutes
    python measure/links.py --rates 100 --rounds 2 --output build

Dispatch and combine, forward, float32. In one process group a rate, the dispatchers in turn, every sample that of the
slowest rank. Beside each, what its ranks handed over for the other machine, by the meter, and what went through the
cable. And the same rows across and back by themselves, in two plain exchanges: what the cable and TCP take. Needs Linux
and root.
"""

import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from ep_launcher import launcher as ep  # noqa: E402
from measure import record  # noqa: E402

NAMES = ("all_to_all", "dedup", "gather_tokens", "two_stage")
SHAPE = {"num_tokens": 256, "hidden_dim": 512, "num_experts": 16}
TOP_KS = (1, 4, 8)
MARK, ALONE = "links: ", ", rows alone"


def work(rounds: int) -> None:
    """One rank of four: prints the result, by rank 0, as a line that begins with MARK."""
    mesh, d, num_experts = init(), SHAPE["hidden_dim"], SHAPE["num_experts"]
    comm, found = mesh.ep, {}
    others = [r for r in range(4) if r // 2 != comm.rank // 2]
    for top_k in TOP_KS:
        x, ids, weights = tokens(comm.rank, top_k)
        config = ep.MoEConfig(num_experts, top_k, d, max_num_tokens=len(x))
        kinds = {name: ep.REGISTRIES["dispatcher"][name].for_layer(config, comm) for name in NAMES}

        def there_and_back(kind: ep.Dispatcher, x=x, ids=ids, weights=weights) -> None:
            arrived = kind.dispatch(x, ids, weights)
            kind.combine(arrived.x, arrived.handle)

        variants = {name: (lambda kind=kind: there_and_back(kind)) for name, kind in kinds.items()}
        if rounds > 1:
            variants |= {name + ALONE: rows_alone(comm, kind, top_k) for name, kind in kinds.items()}
        samples = {name: [] for name in variants}
        facts = {name: {} for name in NAMES}

        for turn in range(-1, rounds):
            for name, run in variants.items():
                comm.all_reduce(torch.zeros(1))
                before, meter = cable_bytes(), sent(comm, others)
                start = time.perf_counter()
                run()
                ms = (time.perf_counter() - start) * 1e3
                comm.all_reduce(torch.zeros(1))
                if turn >= 0:
                    samples[name].append(ms)
                elif name in facts:
                    pair = [sent(comm, others) - meter, cable_bytes() - before]
                    facts[name] = dict(zip(("metered_bytes", "cable_bytes"), gather(comm, pair), strict=True))
        slowest = {
            name: [max(s) for s in zip(*gather_lists(comm, own), strict=True)]
            for name, own in samples.items()
        }
        found[top_k] = {
            name: facts[name]
            | {"median_ms": statistics.median(own), "samples_ms": [round(ms, 3) for ms in own]}
            for name, own in slowest.items()
            if name in facts
        }
        for name, own in found[top_k].items():
            if name + ALONE in slowest:
                own["rows_alone_ms"] = statistics.median(slowest[name + ALONE])
    if comm.rank == 0:
        print(MARK + json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


def rows_alone(comm: ep.Communicator, kind: ep.Dispatcher, top_k: int) -> Callable[[], None]:
    """What sends the rows that cross, there and back again, as two plain exchanges."""
    d, ids = SHAPE["hidden_dim"], [tokens(rank, top_k)[1] for rank in range(4)]
    rows = kind.predict_bytes(ids, d, torch.float32)["combine"].t() // (4 * d)  # that went there
    machine = torch.arange(4) // 2
    rows = torch.where(machine[:, None] == machine, 0, rows)
    there, back = rows[comm.rank].tolist(), rows[:, comm.rank].tolist()
    x = torch.zeros(sum(there), d)

    def run() -> None:
        comm.all_to_all(comm.all_to_all(x, there, back, "alone"), back, there, "alone")

    return run


def tokens(rank: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, D], topk_ids and topk_weights [T, K] of one rank: random, the same in every run."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(SHAPE["num_tokens"], SHAPE["hidden_dim"], generator=generator)
    weights, ids = torch.rand(len(x), SHAPE["num_experts"], generator=generator).topk(top_k)
    return x, ids, weights


def init() -> ep.Mesh:
    """All four ranks."""
    return ep.init_ep(device="cpu", timeout_s=60)


def cable_bytes() -> int:
    """What has left this machine through its end of the cable so far."""
    (counts,) = re.findall(r"ep0:(.+)", Path("/proc/self/net/dev").read_text())
    return int(counts.split()[8])


def sent(comm: ep.Communicator, others: list[int]) -> int:
    """Bytes that this rank has handed over for the other machine so far, rows and counts."""
    return sum(by_rank[r] for by_rank in comm.meter.sent.values() for r in others)


def gather_lists(comm: ep.Communicator, own: list[float]) -> list[list[float]]:
    """Every rank's list, all of one length."""
    return comm.all_gather(torch.tensor(own, dtype=torch.float64), "samples").tolist()


def gather(comm: ep.Communicator, pair: list[int]) -> list[list[int]]:
    """[of the four ranks, the bytes handed over by each; of each machine, what went through its end of the cable]."""
    handed, cable = zip(*gather_lists(comm, pair), strict=True)
    return [[int(n) for n in handed], [int(cable[0]), int(cable[2])]]


def measure(mbit_per_s: float, rounds: int) -> dict:
    """{top_k: {dispatcher: bytes and times}} at one rate, 0 for no limit. HostsUnavailable where that is forbidden."""
    from tools.hosts import run_program  # which imports what the ranks do not need

    program = [str(Path(__file__).resolve()), "--work", "--rounds", str(rounds)]
    texts, _ = run_program(program, nproc=2, mbit_per_s=mbit_per_s or None, limit_s=300)
    (line,) = [line for text in texts for line in text.splitlines() if line.startswith(MARK)]
    return json.loads(line.removeprefix(MARK))


def main() -> int:
    parser = record.parser(__doc__, rounds=20)
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[100, 1000, 0], help="Mbit/s; 0 sets no limit"
    )
    parser.add_argument("--work", action="store_true", help="be one of the ranks")
    args = parser.parse_args()
    if args.work:
        work(args.rounds)
        return 0
    from tools.hosts import HostsUnavailable

    rates = {}
    for rate in args.rates:
        name = f"{rate:g} Mbit/s" if rate else "no limit"
        try:
            rates[name] = measure(rate, args.rounds)
        except HostsUnavailable as reason:
            print(f"no two hosts here: {reason}", file=sys.stderr)
            return 3
        for top_k, found in rates[name].items():
            times = ", ".join(f"{n} {f['median_ms']:.1f} ms" for n, f in found.items())
            print(name, f"top-{top_k}:", times, flush=True)
    facts = {"machines": 2, "ranks_per_host": 2, "rounds": args.rounds, **SHAPE, "dtype": "float32"}
    record.write(args.output, "links", torch.device("cpu"), facts | {"rates": rates})
    return 0


if __name__ == "__main__":
    sys.exit(main())
