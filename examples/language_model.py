"""A language model over bytes, with an expert-parallel layer in each block; any number of ranks, the same losses.

Run it with `python`, or `torchrun --standalone --nproc_per_node=4 examples/language_model.py --ep-size 2`.
"""

import argparse
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # not needed after `pip install .`
import ep_launcher as ep  # noqa: E402

NUM_LAYERS, WIDTH, NUM_HEADS, CONTEXT, BATCH = 4, 32, 4, 32, 6  # BATCH: sequences a step, over all ranks


class Block(nn.Module):
    """Attention, then experts, each beside a residual: [B, S, D] -> [B, S, D]."""

    def __init__(self, config: ep.MoEConfig, mesh: ep.Mesh, seed: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moe = ep.EPMoE(config, mesh, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.moe(self.norms[1](x))


def main(args: argparse.Namespace) -> None:
    mesh, device, dtype = ep.init_ep(args.ep_size), ep.choose_device(), getattr(torch, args.dtype)
    config = ep.MoEConfig(8, top_k=2, hidden_dim=WIDTH, ffn_dim=64, activation="swiglu", dtype=args.dtype)
    torch.manual_seed(0)  # whatever is not an expert begins alike on every rank
    with device:  # made where it will run, so that a layer takes what suits it; each has a seed of its own
        blocks = [Block(config, mesh, seed) for seed in range(NUM_LAYERS)]
        model = nn.Sequential(nn.Embedding(256, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))
    optimizer = torch.optim.AdamW(model.to(dtype).parameters(), lr=3e-3)
    text, losses = torch.tensor(list("\n".join(topics.values()).encode())), []  # Python's own manual
    if args.load:
        saved = torch.load(args.load, map_location=device)
        losses = saved["losses"]
        ep.load_full_state_dict(model, saved["model"], mesh, optimizer)
    for step in range(len(losses), args.steps):
        start = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=torch.Generator().manual_seed(step))
        mine = start.tensor_split(mesh.batch.size)[mesh.batch.rank]  # all ranks draw alike, each takes a part
        ids = text[mine + torch.arange(CONTEXT + 1)].to(device)
        logits, targets = model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
        mean = F.cross_entropy(logits.to(torch.promote_types(dtype, torch.float32)), targets)
        loss = ep.share_of_mean(mean, len(targets), mesh)  # the ranks' shares add up to the global mean
        (loss + 0.01 * ep.aux_loss(model)).backward()
        ep.sync_gradients(model, mesh, total := loss.detach())  # shares ride along: total is the global mean
        ep.clip_grad_norm_(model, 1.0, mesh)
        optimizer.step()
        optimizer.zero_grad()
        ep.after_step(model)
        losses.append(total.item())
        if step % 20 == 0 and mesh.batch.rank == 0:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
    state = {"model": ep.full_state_dict(model, mesh, optimizer), "losses": losses}  # all ranks enter
    if args.save and mesh.batch.rank == 0:
        torch.save(state, args.save)
    if args.losses and mesh.batch.rank == 0:
        Path(args.losses).write_text(json.dumps(losses))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ep-size", type=int)
    parser.add_argument("--dtype", default="float32")
    for flag in ("--save", "--load", "--losses"):
        parser.add_argument(flag, metavar="FILE")
    main(parser.parse_args())
