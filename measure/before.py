"""Layers and training steps of a launcher, ours or another commit's, called alike, so that one run can time both.

    git show COMMIT:ep_launcher/launcher.py > build/before.py
    python measure/step.py --before build/before.py

A launcher of the first design has a layer that returns (y, aux) and knows a communicator alone; `is_first` marks
the few places where that matters.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ep_launcher import launcher as ours
from measure import original
from measure.original import ROOT


class Launcher:
    """One launcher's layers and steps over all ranks. path: another commit's launcher.py; None is ours.

    Make it after the process group. ep: its module; mesh: what its layers take for their ranks.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.ep = ours if path is None else original.load_module(path, "ep_before")
        self.is_first = not hasattr(self.ep, "init_ep")
        self.mesh = self.ep.Communicator() if self.is_first else self.ep.init_ep()
        self.batch = self.mesh if self.is_first else self.mesh.batch

    def make(self, config: Any, device: torch.device, seed: int = 0) -> nn.Module:
        """A layer, config of its own MoEConfig."""
        if self.is_first:
            return self.ep.EPMoE(config, self.mesh, seed, device)
        return self.ep.EPMoE(config, self.mesh, seed=seed, device=device)

    def layer(self, config: ours.MoEConfig, device: torch.device, fill: Callable | None = None) -> nn.Module:
        """A layer of our config, without option groups. fill(parameter, fan_in, *seeds) in place of its own
        initialisation, which draws on the CPU, too slowly for large layers."""
        names = [f.name for f in fields(self.ep.MoEConfig) if f.name != "extras" and hasattr(config, f.name)]
        own = self.ep.MoEConfig(**{name: getattr(config, name) for name in names})
        if fill is None:
            return self.make(own, device)
        with mock.patch.object(self.ep, "seeded_uniform_", fill), device:
            return self.make(own, device)

    def sharing(self, layer: ours.EPMoE, **changes: Any) -> nn.Module:
        """A layer with the parameters of one of ours, and other kinds. A bias that ours has not is 0."""
        weights = dict(layer.named_parameters())
        other = self.layer(replace(layer.config, **changes), layer.experts.w1.device, fill=lambda *_: None)
        for name, own in list(other.named_parameters()):
            shared = weights.get(name, torch.zeros_like(own))
            if shared.dtype != own.dtype or name not in weights:
                shared = nn.Parameter(shared.detach().to(own.dtype))
            place, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(place), leaf, shared)
        return other

    def forward(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> y [T, D], this rank's share of the aux loss."""
        if self.is_first:
            return layer(x)
        y = layer(x)
        return y, self.ep.aux_loss(layer)

    def sync(self, layer: nn.Module) -> None:
        """Sums gradients over the ranks. Collective."""
        if self.is_first:
            self.ep.all_reduce_gradients(layer.replicated_parameters(), self.mesh)
        else:
            self.ep.sync_gradients(layer, self.mesh)

    def run(self, flags: list[str], device: torch.device) -> Any:
        """What the launcher runs with these flags, without logs."""
        config, options = self.ep.parse_flags(flags)
        for kind in ("dispatcher", "experts"):
            named = self.ep.REGISTRIES[kind].get(getattr(config, kind))
            if named and named.preference(config, device, self.batch.size) <= 0:
                raise ValueError(f"{kind} {getattr(config, kind)} cannot run here")
        log = self.ep.RunLog(ROOT / "build", options.steps, rank=1)  # a rank that writes nothing
        heartbeat = []  # a Run of an older commit has one before its log
        if "heartbeat" in self.ep.Run.__dataclass_fields__:
            heartbeat = [self.ep.Heartbeat(None, self.mesh if self.is_first else self.mesh.meter)]
        return self.ep.Run(config, options, self.mesh, device, *heartbeat, log)

    def step(self, flags: list[str], device: torch.device) -> Callable[[], Tensor]:
        """A function that does one training step of the launcher with these flags -> losses [2].

        ValueError where a kind that the flags name cannot run here.
        """
        run, registries = self.run(flags, device), self.ep.REGISTRIES
        options, model = run.options, self.make(run.config, device, run.options.seed)
        named = registries["step"].get(options.step)
        if named and named.preference(run, model) <= 0:
            raise ValueError(f"step {options.step} cannot run here")
        task = registries["task"][options.task]
        task = task(run.config, options.seed, run.num_global_tokens, self.batch, device)
        on_gpu = device.type == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True, capturable=on_gpu)
        kind = self.ep.pick_step(run, model)  # a name, or in the first design the class
        advance = registries["step"].get(kind, kind)(run, model, task, optimizer)

        def step() -> Tensor:
            losses = advance()
            if not on_gpu and not losses.isfinite().all():  # as the launcher does; on a GPU at log intervals
                raise RuntimeError(f"losses {losses.tolist()}")
            return losses

        return step


def original_step(
    config: ours.MoEConfig, batch: ours.Communicator, device: torch.device
) -> Callable[[], None]:
    """A training step of the original tutorial (build/seed.py), row by row in Python."""
    with device:
        training = original.load().SeedTraining(config, batch)

    def step() -> None:
        with device:
            float(training.step())

    return step
