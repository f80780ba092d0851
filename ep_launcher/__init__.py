"""The layer of the book, to build with: everything here comes from cells of notebooks/, by way of launcher.py."""

from ep_launcher.launcher import (
    Communicator,
    EPMoE,
    Mesh,
    MoEConfig,
    after_step,
    aux_loss,
    choose_device,
    clip_grad_norm_,
    for_inference,
    full_state_dict,
    init_ep,
    load_full_state_dict,
    moe_layers,
    share_of_mean,
    sync_gradients,
)

__all__ = [
    "Communicator",
    "EPMoE",
    "Mesh",
    "MoEConfig",
    "after_step",
    "aux_loss",
    "choose_device",
    "clip_grad_norm_",
    "for_inference",
    "full_state_dict",
    "init_ep",
    "load_full_state_dict",
    "moe_layers",
    "share_of_mean",
    "sync_gradients",
]
