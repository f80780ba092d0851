"""Chapter 10 on one rank: which copies of a token are sent, slots of a fixed size."""

import pytest
import torch

from ep_launcher import launcher as ep


def test_copies_of_a_token_by_hand():
    topk_ids = torch.tensor(
        [[0, 5, 1, -1], [7, 6, 4, 5], [-1, -1, -1, -1], [2, 0, 3, 1]]
    )  # 2 ranks of 4 experts
    order = ep.order_copies(topk_ids, 4, 2)
    assert order.copies.counts.tolist() == [2, 2] and order.per_row == 4
    assert (order.copies.row_of_choice >= 0).sum(1).tolist() == [2, 1, 0, 1]
    ids = order.spread(torch.where(topk_ids < 0, -1, topk_ids % 4), -1)
    assert ids[:4].tolist() == [[0, -1, 1, -1], [2, 0, 3, 1], [-1, 1, -1, -1], [3, 2, 0, 1]]


def test_where_experts_are_fewer_than_choices_an_expert_has_a_place():
    topk_ids = torch.tensor([[3, 1, 4], [5, -1, 2]])  # 3 ranks of 2 experts
    order = ep.order_copies(topk_ids, 2, 3)
    assert order.copies.counts.tolist() == [1, 2, 2] and order.per_row == 2
    ids = order.spread(topk_ids, -1)
    assert ids.tolist() == [[-1, 1], [-1, 3], [2, -1], [4, -1], [-1, 5], [-1, -1]]


def test_slots_hold_the_share_of_a_run_or_the_largest_batch():
    comm = ep.Communicator.alone()
    gather = ep.REGISTRIES["dispatcher"]["gather_tokens"]
    config = ep.MoEConfig(num_experts=4)
    asks = gather.for_layer(config, comm)
    assert asks.syncs_host and not asks.records
    fixed = gather.for_layer(ep.replace(config, extras=(ep.TrafficOptions(slot_tokens=3),)), comm)
    assert fixed.records and not fixed.syncs_host and fixed.num_slots == 3
    with pytest.raises(ValueError, match="4 tokens on one rank, and its slots were made for 3"):
        fixed.dispatch(torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2))
    assert gather.for_layer(ep.replace(config, max_num_tokens=9), comm).num_slots == 9


def test_a_machine_without_ranks_is_refused():
    with pytest.raises(ValueError, match="ranks_per_host is 0, and must be at least 1"):
        ep.TrafficOptions(ranks_per_host=0)
