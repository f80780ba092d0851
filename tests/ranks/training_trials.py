"""Runs of the launcher on 1, 2 and 4 ranks, without its command line, for tests/ranks/test_training.py."""

from pathlib import Path

from trials import train, trial

from ep_launcher import launcher as ep

CURVE = ["--dtype", "float64", "--steps", "200", "--log-interval", "1", "--hidden-dim", "64", "--ffn-dim", "128",
         "--lr", "3e-3"]  # fmt: skip


@trial(1, 2, 4)
def even(mesh: ep.Mesh, folder: Path) -> dict:
    return train([*CURVE, "--tokens", "64"])


@trial(1, 2, 4)
def uneven_clipped_with_a_bias(mesh: ep.Mesh, folder: Path) -> dict:
    flags = ["--tokens", "9", "--max-grad-norm", "0.05", "--balance", "bias", "--bias-speed", "0.01"]
    return train([*CURVE, *flags])


@trial(2)
def a_rank_without_tokens(mesh: ep.Mesh, folder: Path) -> dict:
    return train(["--tokens", "1", "--steps", "5", "--hidden-dim", "32", "--ffn-dim", "32"])


PLUGIN = """
import torch
from ep_launcher.launcher import EPMoE, LoopExperts, Options, TokenStream, dataclass, option_group, register


@register("experts", "mine")
class MyExperts(LoopExperts):
    pass


@option_group
@dataclass(frozen=True)
class MyOptions(Options):
    "scale: of the tokens"

    scale: float = 1.0


@register("task", "scaled")
class Scaled(TokenStream):
    def __init__(self, config, *rest):
        super().__init__(config, *rest)
        self.scale = config.option(MyOptions).scale

    def next(self):
        x, target = super().next()
        return self.scale * x, self.scale * target


@register("model", "two")
def two_layers(config, mesh, seed, device=None):
    return torch.nn.Sequential(*(EPMoE(config, mesh, seed=seed + n, device=device) for n in range(2)))
"""


@trial(1, 2)
def plugin(mesh: ep.Mesh, folder: Path) -> dict:
    """The last of all: what it registers stays."""
    path = folder / f"plugin-{mesh.batch.rank}.py"
    path.write_text(PLUGIN)
    flags = f"--plugin {path} --experts mine --task scaled --model two --scale 1e-3".split()
    return train([*flags, "--steps", "5", "--hidden-dim", "16", "--ffn-dim", "16", "--log-interval", "1"])
