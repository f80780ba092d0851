"""Chapter 07's exact all-to-all, on one rank: sealed counts, weights that ride, what auto takes."""

import pytest
import torch

from ep_launcher import launcher as ep


def sealed(counts: list, row_bytes: int = 64) -> torch.Tensor:
    """[2, W, L + 3]: the same counts [W, L] sent and received."""
    return ep.seal_counts(torch.tensor([counts, counts]), row_bytes)


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("half, text", [(0, "rank 3 sends"), (1, "rank 3 expects")])
def test_no_number_of_a_sealed_line_can_change_unseen(column, half, text):
    lines = sealed([[4, 0, 7], [2, 2, 2]])
    ep.check_seals(lines, 64, 3)
    for change in (1, -1, 5):
        broken = lines.clone()
        broken[half, 1, column] += change
        with pytest.raises(ep.CollectiveError, match=f"{text} .* rank 1") as refused:
            ep.check_seals(broken, 64, 3)
        assert "\n" not in str(refused.value)


def test_the_message_names_rank_sent_and_expected():
    lines = sealed([[4, 0, 7], [2, 2, 2]])
    lines[1, 0, 1] += 1
    with pytest.raises(ep.CollectiveError, match="rank 1 expects 12 rows from rank 0, which announced 11"):
        ep.check_seals(lines, 64, 1)
    swapped = sealed([[4, 0, 7], [2, 2, 2]])
    swapped[1, 0, :3] = torch.tensor([7, 0, 4])
    with pytest.raises(ep.CollectiveError, match=r"expects \[7, 0, 4\] rows .* from rank 0"):
        ep.check_seals(swapped, 64, 1)
    with pytest.raises(ep.CollectiveError, match="rows of 128 bytes .* announced rows of 64"):
        ep.check_seals(sealed([[1, 2]]), 128, 0)
    with pytest.raises(ep.CollectiveError):  # read before the copy arrived
        ep.check_seals(torch.zeros(2, 2, 6, dtype=torch.int64), 64, 0)


@pytest.mark.parametrize("dtype", list(ep.DTYPES.values()), ids=str)
@pytest.mark.parametrize("shape", [(5, 6, 1), (4, 7, 3), (0, 8, 1), (1, 1, 2)])
def test_weights_ride_bit_by_bit(dtype, shape):
    n, d, j = shape
    wide = torch.promote_types(dtype, torch.float32)
    packed = torch.randn(n, d + ep.rider_columns(d, dtype, j)).to(dtype)
    rows, weights = packed[:, :d].clone(), torch.rand(n, j, dtype=wide)
    ep.set_riders(packed, d, weights)
    assert torch.equal(ep.get_riders(packed, d, j), weights) and torch.equal(packed[:, :d], rows)
    assert packed.shape[1] * packed.element_size() % 16 == 0


def test_on_one_rank_it_is_right_too_and_sends_nothing():
    config = ep.MoEConfig(num_experts=4, hidden_dim=16, ffn_dim=16)
    one, other = (ep.EPMoE(ep.replace(config, dispatcher=name), seed=1) for name in ("all_to_all", "local"))
    x = torch.randn(6, 16)
    assert torch.allclose(one(x), other(x), atol=1e-6)
    predicted = one.dispatcher.predict_bytes([torch.tensor([[0, 1]])], 16, torch.float32)
    assert not any(sent.any() for sent in predicted.values()) and not one.mesh.meter.total(*ep.PASSES)


def test_auto_takes_it_where_there_are_ranks():
    config = ep.MoEConfig()
    assert ep.pick("dispatcher", config, "cpu", 2) == "all_to_all"
    assert ep.pick("dispatcher", config, "cpu", 1) == "local"
