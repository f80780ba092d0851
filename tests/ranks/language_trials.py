"""Chapter 16 on real ranks: the curve on every mesh, and published models. test_language.py reads it."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from trials import train, trial

from ep_launcher import launcher as ep

SMALL = (
    "--model lm --task text --dtype float64 --hidden-dim 16 --ffn-dim 16 --num-heads 2 --num-layers 2 --num-experts 8 "
    "--activation swiglu --context 16 --tokens 96 --max-num-tokens 96 --lr 3e-3 --log-interval 1 --eval-tokens 512"
)
KINDS = {
    "plain": "",
    "everything": "--dense-layers 1 --num-kv-heads 1 --qk-norm head --tie-embeddings --num-shared-experts 1 "
    "--recompute --max-grad-norm 0.1 --warmup-steps 3 --final-lr 0.1 --balance bias --router sigmoid --normalize-topk",
}
MESHES = {1: (1,), 2: (1, 2), 4: (2, 4)}
STEPS = 6


@trial(4, 2, 1)
def every_mesh(mesh: ep.Mesh, folder: Path) -> dict[str, dict]:
    """What each kind of run measures on each mesh."""
    found = {}
    for ep_size in MESHES[mesh.batch.size]:
        for name, flags in KINDS.items():
            found[f"{name}, ep {ep_size}"] = train(
                f"{SMALL} --steps {STEPS} {flags} --ep-size {ep_size}".split()
            )
    return found


@trial(4, 2)
def saved_and_resumed(mesh: ep.Mesh, folder: Path) -> dict[str, dict]:
    """Saved on 2 x 2, and gone on from there on the same mesh, and on two ranks."""
    size, flags = mesh.batch.size, f"{SMALL} --steps {STEPS} {KINDS['everything']} --ep-size 2"
    here, copy = folder / "lm", folder / f"lm-{size}"
    found = {}
    if size == 4:
        kept = f"--checkpoint-dir {here} --checkpoint-interval 3 --keep-checkpoints 9"
        found["never stopped"] = train(f"{flags} {kept}".split())
    if mesh.batch.rank == 0:
        shutil.copytree(here / "step-00000003", copy / "step-00000003")
    mesh.batch.all_reduce(torch.zeros(1))
    found["resumed"] = train(f"{flags} --resume --checkpoint-dir {copy}".split())
    return found


def transformers() -> Any:
    """The library, without its network and its talk; every expert by itself, as its reference does."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    return transformers


SIZES = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
WHOLE = {
    "Mixtral": {"num_local_experts": 8, "intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 8, "intermediate_size": 40, "moe_intermediate_size": 24, "mlp_only_layers": [0],
                 "head_dim": 12, "norm_topk_prob": True},
    "Olmoe": {"num_experts": 8, "intermediate_size": 24, "norm_topk_prob": False, "tie_word_embeddings": True},
}  # fmt: skip
BLOCKS = {  # transformers' model, where its block of experts is, our config, and our option groups
    "DeepseekV3": (
        {"n_routed_experts": 8, "num_local_experts": 8, "intermediate_size": 40, "moe_intermediate_size": 24,
         "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 2, "first_k_dense_replace": 1,
         "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
         "num_key_value_heads": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
        {"router": "sigmoid", "balance": "bias", "activation": "swiglu", "num_shared_experts": 2, "top_k": 4},
        {"normalize_topk": True, "routed_scaling_factor": 2.5, "num_groups": 4, "topk_groups": 2},
    ),
    "GptOss": (
        {"num_local_experts": 8, "intermediate_size": 24, "head_dim": 8},
        {"activation": "clamped_swiglu", "router_bias": True, "top_k": 2, "balance": "none"},
        {"normalize_topk": True},
    ),
}  # fmt: skip


def published(family: str, sizes: dict) -> nn.Module:
    """A tiny model of transformers with random weights, large enough that activations are clamped and norms do work."""
    library = transformers()
    config = getattr(library, f"{family}Config")(**SIZES | sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = getattr(library, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "e_score_correction_bias" in name:
                tensor.uniform_(-0.3, 0.3)
            elif "inv_freq" not in name:
                tensor.normal_(0, 2.0 if "GptOssExperts" in name or "gate_up_proj_bias" in name else 0.2)
    return model


def batch_of(size: int, rank: int, number: int) -> tuple[Tensor, Tensor]:
    """(the whole batch of so many sequences, this rank's)."""
    ids = torch.randint(0, 48, (number, 17), generator=torch.Generator().manual_seed(1))
    return ids, ids.tensor_split(size)[rank]


def loss_sum(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def apart(ours: Tensor, right: Tensor) -> float:
    """The relative error, by norms; absolute where the reference is 0."""
    error, norm = (ours.double() - right.double()).norm(), right.double().norm()
    return float(error / norm if norm > 0 else error)


def compare(
    model: nn.Module,
    ours: nn.Module,
    logits_of: Callable,
    gradients_of: Callable,
    mesh: ep.Mesh,
    number: int = 3,
) -> dict[str, float]:
    """Relative errors of logits, loss and every gradient of ours on all ranks, against transformers' on one.

    number: of sequences. With 3 one of four ranks has none, which transformers' own attention cannot reshape.
    """
    ids, own = batch_of(mesh.batch.size, mesh.batch.rank, number)
    right = model(ids[:, :-1]).logits
    right_loss = loss_sum(right, ids) / ids[:, 1:].numel()
    right_loss.backward()
    logits = logits_of(own[:, :-1])
    loss = loss_sum(logits, own) / ids[:, 1:].numel()
    (loss + 0 * ep.aux_loss(ours)).backward()
    total = loss.detach().clone()
    ep.sync_gradients(ours, mesh, total)
    errors = {
        "logits": apart(logits.detach(), right.detach().tensor_split(mesh.batch.size)[mesh.batch.rank]),
        "loss": apart(total, right_loss.detach()),
    }
    found, wanted = gradients_of()
    assert set(found) == set(wanted), sorted(set(found) ^ set(wanted))
    return errors | {name: apart(found[name], wanted[name]) for name in wanted}


def gathered_gradients(model: nn.Module, mesh: ep.Mesh) -> dict[str, Tensor]:
    """{name: gradient}, the experts' of all ranks."""
    local = ep.owners(model, mesh)
    return {
        name: mesh.ep.all_gather(p.grad, "check").flatten(0, 1) if id(p) in local else p.grad
        for name, p in model.named_parameters()
    }


def written(model: nn.Module, folder: Path, mesh: ep.Mesh) -> Path:
    """The model's folder, as transformers saves it, by rank 0."""
    if mesh.batch.rank == 0:
        model.save_pretrained(folder)
    mesh.batch.all_reduce(torch.zeros(1))
    return folder


@trial(4, 2, 1)
def whole_models(mesh: ep.Mesh, folder: Path) -> dict[str, dict[str, float]]:
    """Each family read from its folder, compared, and written back as transformers has it."""
    found = {}
    for family, sizes in WHOLE.items():
        model = published(family, sizes)
        ours = ep.from_pretrained(written(model, folder / f"{family}-{mesh.batch.size}", mesh), mesh)

        def gradients(model: nn.Module = model, ours: nn.Module = ours) -> tuple[dict, dict]:
            wanted = {name: p.grad for name, p in model.named_parameters()}
            return gathered_gradients(ours, mesh), ep.state_from_hf(wanted)

        found[family] = compare(model, ours, ours, gradients, mesh)
        back = ep.state_to_hf(ep.full_state_dict(ours, mesh))
        state = model.state_dict()
        assert set(back) == set(state), sorted(set(back) ^ set(state))
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
        if mesh.batch.rank == 0:  # and transformers reads it as a file
            copy = folder / f"{family}-{mesh.batch.size}-back"
            shutil.copytree(folder / f"{family}-{mesh.batch.size}", copy)
            save_file(back, copy / "model.safetensors", metadata={"format": "pt"})
            read = transformers().AutoModelForCausalLM.from_pretrained(copy).state_dict()
            assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    return found


class Instead(nn.Module):
    """An EPMoE where transformers' model has its block; some of its blocks return their scores besides."""

    def __init__(self, layer: ep.EPMoE, returns_pair: bool) -> None:
        super().__init__()
        self.layer, self.returns_pair = layer, returns_pair

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        y = self.layer(x)
        return (y, None) if self.returns_pair else y


@trial(4, 2, 1)
def layers_inside(mesh: ep.Mesh, folder: Path) -> dict[str, dict[str, float]]:
    """EPMoE inside transformers' model, in the place of every block of experts."""
    found = {}
    for family, (sizes, ours, routing) in BLOCKS.items():
        model, changed = published(family, sizes), published(family, sizes)
        own = {"router_bias": False, "num_experts": 8, "hidden_dim": 32, "ffn_dim": 24} | ours
        config = ep.MoEConfig(**own, extras=(ep.RoutingOptions(**routing),))
        replaced = {}
        for number, block in enumerate(changed.model.layers):
            if hasattr(block.mlp, "experts"):
                layer = ep.EPMoE(config, mesh, seed=number)
                ep.load_full_state_dict(layer, ep.layer_from_hf(block.mlp.state_dict()), mesh)
                block.mlp = Instead(layer, family == "GptOss")
                replaced[f"model.layers.{number}.mlp"] = layer

        def gradients(
            model: nn.Module = model, changed: nn.Module = changed, replaced: dict = replaced
        ) -> tuple[dict, dict]:
            wanted, grads = {}, {name: p.grad for name, p in model.named_parameters()}
            for name, grad in grads.items():
                if not any(name.startswith(prefix) for prefix in replaced):
                    wanted[name] = grad
            for prefix in replaced:
                block = {n.removeprefix(f"{prefix}."): g for n, g in grads.items() if n.startswith(prefix)}
                wanted |= {f"{prefix}.layer.{n}": g for n, g in ep.layer_from_hf(block).items()}
            return gathered_gradients(changed, mesh), wanted

        assert len(replaced) >= 2
        found[family] = compare(model, changed, lambda ids, m=changed: m(ids).logits, gradients, mesh, 5)
    return found


@trial(1)
def aux_losses(mesh: ep.Mesh, folder: Path) -> dict[str, float]:
    """Ours and transformers' balancing loss, of one layer and of three."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(3))

    def ours(layer_logits: Tensor) -> float:
        probs = layer_logits.softmax(-1)
        config = ep.MoEConfig(8, 2, 16, 16)
        routing = ep.Routing(probs.topk(2).indices, probs.topk(2).values, probs)
        return float(ep.SwitchAuxLoss(config, mesh.batch)(routing))

    return {
        "ours, one": ours(logits[0]),
        "theirs, one": float(load_balancing_loss_func((logits[0],), 8, 2)),
        "ours, three": sum(ours(layer) for layer in logits),
        "theirs, three": float(load_balancing_loss_func(tuple(logits), 8, 2)),
    }


if __name__ == "__main__":
    print(json.dumps({name: list(sizes) for name, sizes in WHOLE.items()}))
