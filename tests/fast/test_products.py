"""Products of chapter 14: eight bits, and quack-kernels' by a stand-in of what is called of them, in PyTorch."""

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ep_launcher import launcher as ep


def passed(kind: str, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """y and every gradient of a layer with the products of this experts kind, 37 tokens, some choices not sent."""
    config = ep.MoEConfig(
        num_experts=8,
        top_k=3,
        hidden_dim=64,
        ffn_dim=128,
        activation="swiglu",
        experts="grouped",
        dtype=dtype,
    )
    experts = ep.EPMoE(config, seed=0).experts
    experts.products = ep.REGISTRIES["experts"][kind].products
    torch.manual_seed(0)
    x = torch.randn(37, 64, dtype=ep.DTYPES[dtype], requires_grad=True)
    ids, weights = torch.rand(37, 8).argsort(1)[:, :3], torch.rand(37, 3, requires_grad=True)
    ids[::5, 0], ids[3], ids[ids == 6] = -1, -1, -1
    y = experts(ep.Arrived(x, ids, weights))
    (y * torch.randn_like(y)).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    return found | {name: p.grad for name, p in experts.named_parameters()}


class Lane(torch.Tensor):
    """What an epilogue of the package computes with, here for all places at once."""

    def bitcast(self, dtype: torch.dtype) -> torch.Tensor:
        return self.view(dtype)


@pytest.fixture
def quack(monkeypatch) -> list[str]:
    """A stand-in for the package; the calls that were made, each by what it did."""
    calls = []

    def gemm(a, b, out, c, semaphore, *tile, pingpong, cu_seqlens_m=None, cu_seqlens_k=None):
        calls.append("rows" if cu_seqlens_k is None else "weights")
        starts = cu_seqlens_m if cu_seqlens_k is None else cu_seqlens_k
        assert starts.dtype == torch.int32 and starts[0] == 0 and len(starts) == 9 and c is semaphore is None
        out.copy_(F.grouped_mm(a, b.mT, offs=starts[1:]))

    def gemm_epilogue(outputs, ops, reduces=None):
        def made(function):
            def run(a, b, c, *, out=None, tuned, config, cu_seqlens_m, weight):
                calls.append(f"{function.__name__} in {config.tile_n} columns")
                acc = F.grouped_mm(a.float(), b.float(), offs=cu_seqlens_m[1:])
                given = (t.float().as_subclass(Lane) for t in (acc, c, weight[:, None]))
                found = {n: v for n, v in function(*given).items() if n in ("D", *outputs, *(reduces or {}))}
                found = {n: v.as_subclass(torch.Tensor) if n not in (reduces or {}) else (v[0] * v[1]).sum(1)
                         for n, v in found.items()}  # fmt: skip
                if out:
                    out["D"].view(torch.int32).copy_(found["D"].view(torch.int32))
                return {n: v if v.ndim == 1 or n in (out or ()) else v.to(a.dtype) for n, v in found.items()}

            return run

        return made

    def dswiglu(gate, up, grad):
        silu, s = F.silu(gate), gate.sigmoid()
        return grad * up * (s + silu * (1 - s)), grad * silu, silu * up

    parts = {
        "cutlass": {"BFloat16": torch.bfloat16, "Float32": torch.float32, "Int32": torch.int32},
        "quack": {}, "quack.gemm": {"gemm": gemm}, "quack.gemm_config": {"GemmConfig": SimpleNamespace},
        "quack.activation": {"swiglu": lambda gate, up: F.silu(gate) * up, "dswiglu": dswiglu},
        "quack.epilogue": {}, "quack.epilogue.frontend": {"gemm_epilogue": gemm_epilogue},
        "quack.epilogue.ops": dict.fromkeys(("ColVecLoad", "ColVecReduce"), lambda name, **_: name),
    }  # fmt: skip
    for name, holds in parts.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("times", "gated", "x_gradient"):  # the chapter's own kernels need a GPU
        monkeypatch.setattr(ep.FusedProducts, name, getattr(ep.GroupedProducts, name))
    monkeypatch.setattr(ep.FusedProducts, "fits", lambda self, rows, *sizes: len(rows) > 0)
    ep.swiglu_epilogues.cache_clear()
    yield calls
    ep.swiglu_epilogues.cache_clear()


@pytest.mark.parametrize(
    ("widest", "calls"),
    [(0, ["activation in 192 columns", "gradient in 208 columns"]),
     (1024, ["rows"] * 6 + ["weights"] * 3)],
)  # fmt: skip
def test_quack_computes_what_grouped_does(quack, monkeypatch, widest, calls):
    """Both epilogues, for wide experts; its plain products, for narrow ones, whose activation has a kernel of ours."""
    expected = passed("grouped", "bfloat16")
    monkeypatch.setattr(ep, "WIDEST_GATED", widest)
    found = passed("quack", "bfloat16")
    for name, value in expected.items():
        error = ((found[name] - value).float().norm() / value.float().norm()).item()
        assert error < 1e-2 and found[name].is_contiguous(), (name, error)
    assert sorted(quack) == calls


def test_gradients_of_pairs_that_were_moved_apart(quack, monkeypatch):
    """Tensors that a hook has copied lie in no pairs any more; what is computed is the same."""
    monkeypatch.setattr(ep, "WIDEST_GATED", 0)
    expected = passed("quack", "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        found = passed("quack", "bfloat16")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-2, rtol=2e-2, msg=name)
    assert quack == ["activation in 192 columns", "gradient in 208 columns", "activation in 192 columns"]


def test_quack_without_rows(quack):
    config = ep.MoEConfig(
        num_experts=8, top_k=2, hidden_dim=64, ffn_dim=128, activation="swiglu", experts="grouped"
    )
    experts = ep.EPMoE(config, seed=0).experts
    experts.products = ep.QuackProducts
    x, ids = torch.randn(0, 64, requires_grad=True), torch.zeros(0, 2, dtype=torch.int64)
    experts(ep.Arrived(x, ids, torch.rand(0, 2, requires_grad=True))).sum().backward()
    assert not quack and all(not p.grad.any() for p in experts.parameters())


def test_quack_wants_the_package_a_gated_activation_and_a_gpu(quack):
    kind, config = ep.REGISTRIES["experts"]["quack"], {"experts": "quack", "dtype": "bfloat16"}
    with pytest.raises(
        ep.CannotRun, match="quack cannot run in bfloat16 on 1 cpu rank, it needs the package quack-kernels"
    ):
        ep.pick("experts", ep.MoEConfig(**config, activation="swiglu"), "cpu")
    assert kind.preference(ep.MoEConfig(**config), torch.device("cuda"), 1) == 0  # gelu: no device is asked


def test_eight_bits_are_off_by_their_rounding_and_no_more():
    """Forward rounds to eight bits; the gradients of a product are those of the product that was meant."""
    expected, found = passed("grouped", "bfloat16"), passed("grouped_fp8", "bfloat16")
    for name, value in expected.items():
        error = ((found[name] - value).float().norm() / value.float().norm()).item()
        assert 1e-3 < error < ep.Float8Experts.parity_limit, (name, error)


@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e4])
def test_every_row_has_a_scale_of_its_own(largest):
    x = torch.randn(6, 32) * torch.logspace(-3, 3, 6)[:, None] * largest
    scaled = ep.scale_rows(x)
    assert torch.equal(scaled.values.float().abs().amax(1), torch.full((6,), 448.0))
    error = (scaled.meant(torch.float32) - x).abs() / x.abs()
    assert error[x.abs() > x.abs().amax(1, keepdim=True) / 1000].max() <= 2**-4  # three bits, to the nearest
