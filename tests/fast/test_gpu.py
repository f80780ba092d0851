"""What only a GPU can show: no question to the host, and a recorded step that equals the eager one bit for bit."""

import pytest
import torch

from ep_launcher import launcher as ep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")

SMALL = {"num_experts": 8, "top_k": 2, "hidden_dim": 64, "ffn_dim": 128}


@pytest.mark.parametrize(
    ("experts", "dtype", "activation"),
    [("grouped", "bfloat16", "swiglu"), ("grouped", "bfloat16", "gelu"),
     ("bmm", "float32", "gelu"), ("bmm", "bfloat16", "swiglu")],
)  # fmt: skip
def test_nothing_asks_the_host(experts, dtype, activation):
    config = ep.MoEConfig(**SMALL, experts=experts, dtype=dtype, activation=activation, dispatcher="local")
    layer = ep.EPMoE(config, seed=0, device="cuda")
    assert type(layer.experts) is ep.REGISTRIES["experts"][experts]
    x = torch.randn(64, 64, device="cuda", dtype=ep.DTYPES[dtype], requires_grad=True)
    for is_watched in (False, True):  # the first time, libraries make their handles
        torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
        try:
            (layer(x).float().square().sum() + ep.aux_loss(layer)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("experts", "dtype", "activation", "limit"),
    [
        ("bmm", "float32", "gelu", 1e-5),
        ("blocks", "float32", "swiglu", 1e-5),
        ("grouped", "bfloat16", "swiglu", 2e-2),
    ],
)
def test_a_compiled_model_is_the_model(experts, dtype, activation, limit):
    """The compiler writes the kernels down anew, and has to find whatever their source names."""
    torch._dynamo.reset()
    config = ep.MoEConfig(**SMALL, experts=experts, dtype=dtype, activation=activation)
    layer, x = (
        ep.EPMoE(config, seed=0, device="cuda"),
        torch.randn(64, 64, device="cuda", dtype=ep.DTYPES[dtype]),
    )
    found = []
    for model in (layer, torch.compile(layer)):
        layer.zero_grad()
        y = model(x)
        (y.float().square().sum() + ep.aux_loss(layer)).backward()
        found.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for plain, compiled in zip(*found, strict=True):
        assert (plain.float() - compiled.float()).norm() <= limit * plain.float().norm()


def make_run(config: ep.MoEConfig, steps: int, folder) -> ep.Run:
    """A run on one GPU, by hand."""
    mesh = ep.init_ep()
    options = ep.TrainingOptions(steps=steps, tokens=64, lr=1e-3)
    log = ep.RunLog(folder, steps, rank=1)
    return ep.Run(config, options, mesh, torch.device("cuda"), log)


@pytest.mark.parametrize(
    ("experts", "dtype", "activation", "dispatcher"),
    [("bmm", "float32", "gelu", "local"), ("grouped", "bfloat16", "swiglu", "local"),
     ("bmm", "float32", "gelu", "capacity"), ("blocks", "float32", "swiglu", "capacity")],
)  # fmt: skip
def test_the_recorded_step_is_the_eager_step(experts, dtype, activation, dispatcher, tmp_path):
    extras = (ep.CapacityOptions(1.0),) if dispatcher == "capacity" else ()
    config = ep.MoEConfig(**SMALL, max_num_tokens=64, experts=experts, dtype=dtype, activation=activation,
                          dispatcher=dispatcher, extras=extras)  # fmt: skip
    found = {}
    for kind in ("eager", "graph"):
        run = make_run(config, 100, tmp_path)
        model = ep.EPMoE(run.config, run.mesh, seed=0, device=run.device)
        stream = ep.TokenStream(config, 0, 64, run.mesh.batch, run.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)
        assert ep.REGISTRIES["step"][kind].preference(run, model) > 0
        advance = ep.REGISTRIES["step"][kind](run, model, stream, optimizer)
        losses = torch.stack([advance() for _ in range(100)])
        found[kind] = [losses, *model.state_dict().values(), model.topk_ids]
    assert found["eager"][0][0, 0] > found["eager"][0][-1, 0]
    for eager, graph in zip(found["eager"], found["graph"], strict=True):
        assert torch.equal(eager, graph)
