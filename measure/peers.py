"""torchtitan's mixture-of-experts layer on the weights of ours, for comparison; only where its package can be loaded.

    pip install --no-deps --target build/torchtitan torchtitan==0.2.2

Its MoE and its ExpertParallel are taken as they are, without its trainer. Its other dependencies (the parser of its
command line, tokenizers) play no part in a layer: the missing ones are replaced by empty stand-ins.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn

from ep_launcher import launcher as ep


def import_with_stand_ins(name: str, own: str, most: int = 40) -> ModuleType:
    """Imports a module; what is missing outside the package `own` becomes an empty stand-in."""
    for _ in range(most):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in (own, "torch", "triton"):
                raise
            sys.modules[error.name] = mock.MagicMock(name=error.name)
    raise ImportError(f"{name} misses more than {most} modules")


def torchtitan_layer(layer: ep.EPMoE, folder: Path, mesh: torch.distributed.DeviceMesh) -> nn.Module:
    """torchtitan's MoE over the ranks of a mesh ("ep",), with copies of the layer's weights in its layout.

    folder: where the package lies; ImportError where it does not. Scores are applied after the experts.
    """
    from torch.distributed.tensor import DTensor, Shard

    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    parallel = import_with_stand_ins("torchtitan.distributed.expert_parallel", "torchtitan")
    theirs = import_with_stand_ins("torchtitan.models.moe", "torchtitan")
    c, gate = layer.config, layer.router.gate
    options = theirs.MoEArgs(
        num_experts=c.num_experts, num_shared_experts=0, score_func="softmax", score_before_experts=False,
        top_k=c.top_k, load_balance_coeff=None,
    )  # fmt: skip
    with torch.device("meta"):
        moe = theirs.MoE(options, c.hidden_dim, c.ffn_dim)
    moe.tokens_per_expert = torch.zeros(c.num_experts, device=gate.weight.device)
    moe.router.gate.weight = nn.Parameter(gate.weight.detach().to(layer.experts.w1.dtype))
    for name in ("w1", "w2", "w3"):  # theirs are [L, out, in]
        own = getattr(layer.experts, name).detach().transpose(1, 2).contiguous()
        setattr(moe.experts, name, nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)])))

    class OwnedExperts(parallel.ExpertParallel):
        """Their dispatch and combine, for experts that every rank already holds its share of."""

        def _partition_fn(self, name: str, module: nn.Module, device_mesh: object) -> None:
            """Nothing is left to share out."""

    OwnedExperts()._apply(moe.experts, mesh)
    return moe


def forward_of(moe: nn.Module) -> Callable[[Tensor], Tensor]:
    """x [T, D] -> y [T, D]."""
    return lambda x: moe(x.unsqueeze(0)).squeeze(0)


def with_choices_of(moe: nn.Module, router: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same with our router in place of theirs, whose logits are bfloat16: for comparing results."""

    def route(x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        routing = router(x)
        counts = torch.bincount(routing.topk_ids.flatten(), minlength=len(router.gate.weight))
        return routing.topk_weights, routing.topk_ids, counts

    def forward(x: Tensor) -> Tensor:
        with mock.patch.object(moe.router, "forward", route):
            return forward_of(moe)(x)

    return forward
