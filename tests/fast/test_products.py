"""Products of chapter 14: eight bits, and quack-kernels' by a stand-in of its two functions, in PyTorch."""

import importlib.machinery
import sys
from types import ModuleType

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


@pytest.fixture
def quack(monkeypatch) -> list[str]:
    """A stand-in for the package; the calls that were made, each by what it did."""
    calls = []

    def gemm(a, b, out=None, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None, tuned=True):  # noqa: N803
        calls.append(("rows" if cu_seqlens_k is None else "weights") + " by index" * (A_idx is not None))
        if A_idx is not None:
            assert A_idx.dtype == torch.int32
            a = a[A_idx.long()] if cu_seqlens_k is None else a.t()[A_idx.long()].t()
        starts = cu_seqlens_m if cu_seqlens_k is None else cu_seqlens_k
        assert starts.dtype == torch.int32 and starts[0] == 0 and len(starts) == 9
        result = F.grouped_mm(a, b, offs=starts[1:])
        return result if out is None else out.copy_(result)

    def gemm_add(a, b, C, out, cu_seqlens_m, tuned=True):  # noqa: N803
        calls.append("rows added")
        return out.copy_(C + F.grouped_mm(a, b, offs=cu_seqlens_m[1:]))

    package, module = ModuleType("quack"), ModuleType("quack.gemm_interface")
    package.__spec__ = importlib.machinery.ModuleSpec("quack", None)
    module.gemm, module.gemm_add = gemm, gemm_add
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)
    return calls


def test_quack_reads_rows_by_index_and_copies_none(quack, monkeypatch):
    expected = passed("grouped")
    monkeypatch.setattr(ep, "copy_to_rows", None)
    found = passed("quack")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
        assert found[name].is_contiguous(), name
    by_index = ["rows by index"] * 2 + ["rows"] + ["rows by index"] + ["weights by index"] * 3
    assert quack == [*by_index, "rows", "rows added"]


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
