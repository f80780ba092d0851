"""Ranks that are threads, for the exercises' checks: the collectives, the meter, and who stays away."""

import pytest
import torch

from tools.exercises import NotYet, play_ranks, played


def test_played_ranks_exchange_and_count_as_real_ones():
    def play(comm):
        gathered = comm.all_gather(torch.tensor([float(comm.rank)]), "gathered").flatten().tolist()
        pieces = torch.arange(3) + 10 * comm.rank
        received = comm.all_to_all(pieces, [1] * 3, [1] * 3, "exchanged").tolist()
        total = comm.all_reduce(own := torch.tensor(comm.rank))
        assert total is own
        return (
            gathered,
            received,
            total.item(),
            comm.meter.sent,
            comm.meter.num_collectives,
            comm.num_all_reduces,
        )

    for rank, found in enumerate(play_ranks(3, play)):
        sent = {"gathered": [4] * 3, "exchanged": [8] * 3}
        for to_each in sent.values():
            to_each[rank] = 0
        assert found == ([0, 1, 2], [rank, 10 + rank, 20 + rank], 3, sent, 3, 1)


def test_whoever_stays_away_or_raises_is_what_one_reads(monkeypatch):
    monkeypatch.setattr(played, "PATIENCE_S", 0.3)
    with pytest.raises(NotYet, match="rank 0 of 2 waits in collective 1, which another rank never enters"):
        play_ranks(2, lambda comm: comm.rank or comm.all_reduce(torch.zeros(1)))
    with pytest.raises(ZeroDivisionError):  # its own error, before those of the ranks that wait for it
        play_ranks(3, lambda comm: comm.all_reduce(torch.zeros(1)) if comm.rank < 2 else 1 / 0)
    splits = ([1, 1], [1, 1]), ([1, 1], [0, 2])
    with pytest.raises(NotYet, match=r"rank 1 of 2 expects \[0, 2\] rows, and \[1, 1\] come"):
        play_ranks(2, lambda comm: comm.all_to_all(torch.zeros(2), *splits[comm.rank], "x"))
