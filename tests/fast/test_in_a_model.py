"""A layer in somebody's model, on one rank; on several tests/ranks/model_trials.py has it."""

import copy
import io

import model_trials
import pytest
import torch
import torch.nn.functional as F
from model_trials import EXPERTS, check_checkpoint, close, config, refused
from torch import nn
from torch.utils.checkpoint import checkpoint

import ep_launcher
from ep_launcher import launcher as ep

# ----------------------------------------------------------------------------------- the public names


def test_public_names():
    stable = {"EPMoE", "MoEConfig", "init_ep", "moe_layers", "aux_loss", "sync_gradients", "clip_grad_norm_",
              "full_state_dict", "load_full_state_dict", "after_step"}  # fmt: skip
    assert stable <= set(ep_launcher.__all__)
    assert all(getattr(ep_launcher, name) is getattr(ep, name) for name in ep_launcher.__all__)


def test_the_seed_has_no_default_and_layers_of_two_seeds_differ():
    with pytest.raises(TypeError, match="seed"):
        ep.EPMoE(config())
    one, other = (ep.EPMoE(config(), seed=seed) for seed in (0, 1))
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert not torch.equal(p, q), name


def test_a_communicator_before_the_ranks_have_met_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(ValueError, "torchrun started 2 ranks, which have not met; call init_ep() first"):
        ep.Communicator()


# ----------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("experts", EXPERTS)
def test_any_leading_shape(experts):
    layer = ep.EPMoE(config(experts=experts), seed=0)
    x = torch.randn(2, 3, 5, 16)
    y = layer(x)
    assert y.shape == x.shape
    close(y, layer(x.flatten(0, 2)).view_as(y), 1e-6)
    assert layer(torch.randn(0, 5, 16)).shape == (0, 5, 16)
    assert layer(x.transpose(0, 2)).shape == (5, 3, 2, 16)  # not contiguous


def test_checkpoint_keeps_the_input_alone():
    check_checkpoint(ep.init_ep(), "auto")


def test_a_reentrant_checkpoint_is_refused():
    layer = ep.EPMoE(config(), seed=0)
    y = checkpoint(layer, torch.randn(4, 16, requires_grad=True), use_reentrant=True)
    with refused(RuntimeError, "reentrant checkpoint", "use_reentrant=False"):
        y.sum().backward()
    y = layer(checkpoint(layer, torch.randn(4, 16, requires_grad=True), use_reentrant=True))  # and plainly
    with refused(RuntimeError, "reentrant checkpoint", "use_reentrant=False"):
        y.sum().backward()


def test_a_forward_without_gradients_between_a_checkpoint_and_its_backward_changes_nothing():
    layer, x = ep.EPMoE(config(), seed=0), torch.randn(4, 16, requires_grad=True)
    gradients = []
    for looks_on in (False, True):
        y, aux = checkpoint(layer, x, use_reentrant=False), ep.aux_loss(layer)
        if looks_on:
            with torch.no_grad():
                layer(x)
        (y.sum() + aux).backward()
        gradients.append(layer.router.gate.weight.grad)
        layer.zero_grad()
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0 and ep.aux_loss(layer) == 0


def test_aux_losses_that_nobody_takes_are_an_error(monkeypatch):
    monkeypatch.setattr(ep, "MAX_AUX_SHARES", 5)
    layer, x = ep.EPMoE(config(), seed=0), torch.randn(4, 16)
    with refused(RuntimeError, "nobody took their aux loss", "aux_loss(model)"):
        for _ in range(6):
            layer(x)
    ep.after_step(layer)
    layer(x)
    assert len(layer.aux_shares) == 1


def test_aux_loss_adds_up_layers_and_forwards_and_forgets():
    model = nn.Sequential(*(ep.EPMoE(config(), seed=n) for n in range(2)))
    assert ep.moe_layers(model) == list(model)
    x = torch.randn(6, 16)
    model(x)
    one = ep.aux_loss(model).item()
    assert one > 1.9  # each is near 1
    model(x)
    model(x)
    assert ep.aux_loss(model).item() == pytest.approx(2 * one)
    assert ep.aux_loss(model).item() == 0
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert ep.aux_loss(model).item() == 0


@pytest.mark.parametrize("experts", EXPERTS)
def test_copies_and_saved_layers(experts):
    layer = ep.EPMoE(config(experts=experts, balance="bias"), seed=0)
    x = torch.randn(4, 16)
    y = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert len(other.aux_shares) == 0 and torch.equal(other(x), y)
        with torch.no_grad():
            other.experts.w1.zero_()
        assert torch.equal(layer(x), y) and not torch.equal(other(x), y)


def test_full_state_dict_refuses_another_shape():
    mesh, layer = ep.init_ep(), ep.EPMoE(config(), seed=0)
    state = ep.full_state_dict(layer, mesh)
    ep.load_full_state_dict(ep.EPMoE(config(), seed=1), state, mesh)
    for changes in ({"num_experts": 4}, {"num_experts": 16}, {"ffn_dim": 16}, {"activation": "swiglu"}):
        with pytest.raises(RuntimeError, match="experts.w1|size mismatch|Missing"):
            ep.load_full_state_dict(ep.EPMoE(config(**changes), seed=1), state, mesh)


def losses(model, optimizer, dtype=torch.float32, steps=3) -> list[float]:
    """Of these steps, on the same tokens each time."""
    found, x = [], torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean() + ep.aux_loss(model)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_moments_that_a_full_state_does_not_have_are_forgotten(with_optimizer):
    mesh, layer = ep.init_ep(), ep.EPMoE(config(), seed=0)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    state = ep.full_state_dict(layer, mesh, optimizer if with_optimizer else None)
    first = losses(layer, optimizer)
    ep.load_full_state_dict(layer, state, mesh, optimizer)
    assert losses(layer, optimizer) == first


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_moments_take_the_dtype_of_their_parameters(dtype):
    mesh, layer = ep.init_ep(), ep.EPMoE(config(), seed=0)
    optimizer = torch.optim.NAdam(layer.parameters(), lr=0.01)
    losses(layer, optimizer)
    other = ep.EPMoE(config(dtype=dtype), seed=1)
    moved = torch.optim.NAdam(other.parameters(), lr=0.01)
    ep.load_full_state_dict(other, ep.full_state_dict(layer, mesh, optimizer), mesh, moved)
    assert all(moved.state[p]["exp_avg"].dtype == p.dtype for p in other.parameters())
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        kept, taken = optimizer.state[p]["mu_product"], moved.state[q]["mu_product"]
        assert taken.dtype == torch.float32 and taken == kept and taken is not kept, (
            "a number keeps its digits"
        )
    wanted, found = losses(layer, optimizer), losses(other, moved, ep.DTYPES[dtype])
    assert wanted == pytest.approx(found, rel=0.05 if dtype == "bfloat16" else 1e-5)


class Counting(torch.optim.SGD):
    """Keeps what optimizers of other packages keep: a number, or something that nobody can cut."""

    def __init__(self, parameters, kept) -> None:
        super().__init__(parameters, lr=0.1)
        self.kept = kept

    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["kept"] = self.kept(p)


def test_optimizer_state_is_carried_or_refused():
    mesh, layer = ep.init_ep(), ep.EPMoE(config(), seed=0)
    for kept in (lambda p: 7, lambda p: None, lambda p: torch.tensor(7.0)):
        optimizer = Counting(layer.parameters(), kept)
        losses(layer, optimizer, steps=1)
        state = ep.full_state_dict(layer, mesh, optimizer)
        optimizer.state.clear()
        ep.load_full_state_dict(layer, state, mesh, optimizer)
        assert all(optimizer.state[p]["kept"] == kept(p) for p in layer.parameters())
    optimizer = Counting(layer.parameters(), lambda p: [p])
    losses(layer, optimizer, steps=1)
    with refused(ValueError, "the optimizer's kept is a list"):
        ep.full_state_dict(layer, mesh, optimizer)
    optimizer = torch.optim.Adafactor(layer.parameters())
    losses(layer, optimizer, steps=1)
    with refused(ValueError, "of an expert's parameter [8, 16, 32]", "cannot be shared out"):
        ep.full_state_dict(layer, mesh, optimizer)
    state = ep.full_state_dict(layer, mesh) | {"optimizer": {"experts.w1": {"row_var": torch.ones(8, 16, 1)}}}
    with refused(ValueError, "row_var of experts.w1", "not cut by expert"):
        ep.load_full_state_dict(layer, state, mesh, optimizer)


@pytest.mark.parametrize("experts", EXPERTS)
def test_second_backwards_and_second_derivatives_are_right_or_refused(experts):
    """Against the dense reference, at world size 1; over an exchange tests/ranks/model_trials.py does it."""
    layer = ep.EPMoE(config(experts=experts, balance="none"), seed=0)
    x = torch.randn(6, 16, requires_grad=True)
    parameters = [x, layer.router.gate.weight, layer.experts.w1, layer.experts.b2]
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in parameters]
    if experts in ("blocks", "grouped"):
        with refused(RuntimeError, "a second backward", "take experts bmm or loop"):
            loss.backward()
    else:
        loss.backward()
        for p, wanted in zip(parameters, once, strict=True):
            close(p.grad, 2 * wanted, 1e-5, experts)

    def penalty(loss):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), parameters[1:3])

    # Of a loss that is linear in y, the gradient that comes to the experts is a constant, and theirs is none.
    for loss_of in (lambda y: y.square().sum(), torch.sum):
        if experts in ("blocks", "grouped"):
            with refused(RuntimeError, "no second derivative", "take experts bmm or loop"):
                penalty(loss_of(layer(x)))
            continue
        wanted = penalty(loss_of(ep.dense_moe(x, dict(layer.named_parameters()), 2)[0]))
        for grad, other in zip(penalty(loss_of(layer(x))), wanted, strict=True):
            close(grad, other, 1e-4, experts)


@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_a_checkpoint_around_a_compiled_layer_counts_once(balance):
    torch._dynamo.reset()
    layer = ep.EPMoE(config(balance=balance), seed=0)
    compiled = torch.compile(layer, backend="eager")
    for _ in range(2):
        y = checkpoint(compiled, torch.randn(6, 16, requires_grad=True), use_reentrant=False)
        (y.square().sum() + ep.aux_loss(layer)).backward()
        assert not layer.aux_shares
    assert balance == "aux" or layer.balance.load.sum() == 2 * 6 * 2


def test_a_bias_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = ep.EPMoE(config(balance="bias"), seed=0)
        for _ in range(600):
            layer.balance.load[0] = 1
            ep.after_step(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    close(layer.balance.bias, torch.tensor([-0.6] + [0.6] * 7), 1e-5, "bias")


def test_compiled_model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = ep.EPMoE(config(), seed=0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), layer, nn.LayerNorm(16))
    x = torch.randn(6, 16)
    (model(x).square().sum() + ep.aux_loss(model)).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    y = torch.compile(model, backend="aot_eager")(x)  # the ranks' trial has the compiler's own
    (y.square().sum() + ep.aux_loss(model)).backward()
    for (name, p), grad in zip(model.named_parameters(), wanted, strict=True):
        close(p.grad, grad, 1e-4, name)


# ----------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("experts", EXPERTS)
def test_autocast_behind_a_linear(experts):
    torch.manual_seed(0)
    layer = ep.EPMoE(config(experts=experts, num_shared_experts=1), seed=0)
    model, seen = nn.Sequential(nn.Linear(16, 16), layer), []
    layer.router.register_forward_hook(
        lambda module, inputs, routing: seen.append((inputs[0], routing.logits))
    )
    x = torch.randn(32, 16)
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    inputs, logits = seen[-1]
    assert inputs.dtype == torch.bfloat16 and logits.dtype == torch.float32
    gate = layer.router.gate
    exact = F.linear(inputs.double(), gate.weight.double(), gate.bias.double())
    assert (logits - exact).abs().max() / exact.abs().max() < 1e-6
    assert y.dtype == torch.bfloat16
    same = (layer.topk_ids >= 0).all() and y.isfinite().all()
    assert same and (y.float() - wanted).norm() / wanted.norm() < 0.1
    (y.float().square().sum() + ep.aux_loss(model)).backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == p.dtype and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    "dtype, wider", [("float32", "float64"), ("bfloat16", "float32"), ("bfloat16", "float64")]
)
def test_tokens_may_be_wider_than_the_layer(experts, activation, dtype, wider):
    layer = ep.EPMoE(
        config(experts=experts, activation=activation, dtype=dtype, num_shared_experts=1), seed=0
    )
    torch.manual_seed(0)
    x = torch.randn(32, 16, dtype=ep.DTYPES[wider], requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    whole = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    z = x.detach().double().requires_grad_()
    wanted = ep.dense_moe(z, whole, 2, layer.topk_ids, activation)[0] + layer.shared.double()(z)
    wanted.square().sum().backward()
    assert y.dtype == x.grad.dtype == x.dtype
    close(y, wanted, 1e-6)  # the router computes in float32
    close(x.grad, z.grad, 1e-5)
    close(layer.experts.w1.grad, whole["experts.w1"].grad, 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(), (2048,)])
def test_the_inference_path_routes_under_autocast_as_the_layer_does(dtype, sizes):
    layer = ep.EPMoE(config(dtype=dtype), seed=0).eval()
    torch.manual_seed(0)
    for x in (torch.randn(2000, 16), torch.randn(2000, 16).bfloat16()):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y, fast = layer(x), ep.for_inference(layer, 2048, sizes)(x)
        assert y.dtype == fast.dtype == torch.bfloat16
        apart = (y.float() - fast.float()).norm(dim=1) / y.float().norm(dim=1)
        assert apart.max() < 0.1, f"{(apart > 0.1).sum()} tokens went elsewhere"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="floating-point"):
        ep.for_inference(layer, 8)(torch.ones(2, 16, dtype=torch.int64))


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("convert", ["bfloat16", "to"])
def test_bfloat16_leaves_router_and_statistics_wide(experts, convert):
    layer = ep.EPMoE(config(experts=experts, balance="bias"), seed=0)
    gate, bias = layer.router.gate.weight.clone(), torch.linspace(0.1, 0.8, 8)
    layer.balance.bias.copy_(bias)
    model = nn.Sequential(nn.Linear(16, 16), layer)
    model = model.bfloat16() if convert == "bfloat16" else model.to(dtype=torch.bfloat16)
    assert model[0].weight.dtype == layer.experts.w1.dtype == torch.bfloat16
    assert layer.router.gate.weight.dtype == torch.float32 and torch.equal(layer.router.gate.weight, gate)
    assert layer.balance.bias.dtype == torch.float32 and torch.equal(layer.balance.bias, bias)
    assert layer.balance.load.dtype == torch.int64
    x = torch.randn(300, 16).bfloat16()
    y = model(x)
    assert y.dtype == torch.bfloat16 and int(layer.balance.load.sum()) == 600
    y.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    layer.double()
    assert layer.router.gate.weight.dtype == torch.float64 == layer.experts.w1.dtype


def test_counts_pass_two_to_the_24():
    """Where float32 stops counting."""
    big = 2**24
    layer = ep.EPMoE(config(balance="bias", top_k=1), seed=0)
    layer.balance.load.fill_(big)
    layer(torch.randn(5, 16))
    assert int(layer.balance.load.sum()) == 8 * big + 5
    assert ep.count_choices(torch.tensor([[0], [-1], [2]]), 3).tolist() == [1, 0, 1]
    assert ep.count_choices(torch.tensor([[0]]), 3).dtype == torch.int64
    history = ep.LoadHistory(1, 2)
    history.interval[0, 0] = big
    history.add(0, torch.zeros(1, 1, dtype=torch.int64))
    history.end_interval(ep.Communicator())
    assert int(history.rows[-1][0, 0]) == big + 1


def test_a_skew_of_one_choice_in_2_to_the_24_moves_the_bias():
    layer = ep.EPMoE(config(balance="bias"), seed=0)
    layer.balance.load.fill_(2**26)
    layer.balance.load[3] += 8
    ep.after_step(layer)
    assert (layer.balance.bias > 0).sum() == 7 and layer.balance.bias[3] < 0
    assert int(layer.balance.load.sum()) == 0


# ----------------------------------------------------------------------------------- the meta device


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu", "num_shared_experts": 2, "balance": "bias"},
                                     {"dtype": "bfloat16", "experts": "grouped"}],
                         ids=["gelu", "swiglu, shared, bias", "bfloat16"])  # fmt: skip
@pytest.mark.parametrize("how", ["argument", "context"])
def test_meta_device(changes, how):
    plain = ep.EPMoE(config(**changes), seed=5)
    if how == "argument":
        layer = ep.EPMoE(config(**changes), seed=5, device="meta")
    else:
        with torch.device("meta"):
            layer = ep.EPMoE(config(**changes), seed=5)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer = nn.Sequential(layer).to_empty(device="cpu")[0]
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.fill_(7)
    layer.reset_parameters()
    assert layer.took == plain.took
    names = [*layer.named_parameters(), *layer.named_buffers()]
    for (name, t), wanted in zip(names, [*plain.parameters(), *plain.buffers()], strict=True):
        assert t.dtype == wanted.dtype and torch.equal(t, wanted), name
    x = torch.randn(4, 16, dtype=ep.DTYPES[plain.config.dtype])
    assert torch.equal(layer(x), plain(x))


# ----------------------------------------------------------------------------------- mesh, losses


def test_alone_everything_is_a_no_op():
    mesh = ep.init_ep()
    assert (mesh.ep.size, mesh.batch.size, mesh.replicas.size) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"ep_size is 2, and must divide the 1 rank"):
        ep.init_ep(ep_size=2)
    model = nn.Sequential(nn.Linear(16, 16), ep.EPMoE(config(), mesh, seed=0))
    (model(torch.randn(4, 16)).square().sum() + ep.aux_loss(model)).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    ep.sync_gradients(model, mesh)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    wanted = nn.utils.clip_grad_norm_([p.clone().requires_grad_() for p in grads], 1.0)  # no gradients: 0
    assert wanted == 0
    for p in model.parameters():
        p.grad = p.grad.clone()
    norm = ep.clip_grad_norm_(model, 0.25, mesh)
    close(norm, torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])), 1e-6)
    clipped = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert clipped.item() == pytest.approx(0.25, rel=1e-4)


def test_z_loss_meets_capacity():
    model_trials.z_loss_and_capacity(ep.init_ep(), None)


def test_a_parameter_without_a_gradient_counts_as_zeros():
    mesh = ep.init_ep()
    model = nn.ModuleList([nn.Linear(3, 3), ep.EPMoE(config(), mesh, seed=0)])
    model[1](torch.randn(4, 16)).sum().backward()
    ep.sync_gradients(model, mesh)
    assert model[0].weight.grad.abs().sum() == 0
