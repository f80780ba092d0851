"""What the exercises' checks play: ranks that are threads, and kernels without Triton."""

import pytest
import torch

from ep_launcher import launcher as ep
from tools.exercises import NotYet, play_kernel, play_ranks


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


def test_whoever_stays_away_or_raises_is_what_one_reads():
    with pytest.raises(
        NotYet, match="rank 0 of 2 comes to collective 1, an all_reduce, and rank 1 to the end"
    ):
        play_ranks(2, lambda comm: comm.rank or comm.all_reduce(torch.zeros(1)))
    with pytest.raises(
        NotYet, match="rank 0 of 2 comes to collective 1, an all_reduce, .* collective 1, an all_gather"
    ):
        play_ranks(
            2,
            lambda comm: (
                comm.all_gather(torch.zeros(1), "x") if comm.rank else comm.all_reduce(torch.zeros(1))
            ),
        )
    with pytest.raises(ZeroDivisionError):  # its own error, before those of the ranks that wait for it
        play_ranks(3, lambda comm: comm.all_reduce(torch.zeros(1)) if comm.rank < 2 else 1 / 0)
    splits = ([1, 1], [1, 1]), ([1, 1], [0, 2])
    with pytest.raises(NotYet, match=r"rank 1 of 2 expects \[0, 2\] rows of \w+, and \[1, 1\] come"):
        play_ranks(2, lambda comm: comm.all_to_all(torch.zeros(2), *splits[comm.rank], "x"))


tl = None  # a kernel finds the player's own


def shifted(x, y, count, BLOCK):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place + 1, mask=place + 1 < count, other=7.0), mask=place < count)


def unmasked(x, y, count, BLOCK):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place), mask=place < count)


def onto_one_place(x, y, count, BLOCK):
    tl.store(y, tl.load(x))


def test_a_played_kernel_does_what_its_text_says():
    x, y = torch.arange(10.0), torch.zeros(10)
    assert play_kernel(shifted, (3,), x, y, 10, 4) == 3
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 7]


@pytest.mark.parametrize(
    "kernel, block, words",
    [
        (unmasked, 4, r"program \(2,\) reads place 10 of x, which has 10: mask"),
        (shifted, 3, r"arange\(0, 3\): Triton wants a power of two"),
        (onto_one_place, 4, r"program \(1,\) writes place 0 of y, where another program has written"),
        (lambda x: None, 4, "takes other arguments"),
        (lambda x, y, count, BLOCK: 1 / 0, 4, "ZeroDivisionError"),
        ("shifted", 4, "wants a kernel, a function, and got str"),
    ],
)
def test_a_played_kernel_is_watched(kernel, block, words):
    with pytest.raises(NotYet, match=words):
        play_kernel(kernel, (3,), torch.arange(10.0), torch.zeros(10), 10, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_books_kernels_played(dtype):
    order, x = ep.order_rows(torch.tensor([[2, -1], [0, 2]]), 3), torch.randn(2, 100).to(dtype)
    rows, y = torch.zeros(4, 100, dtype=dtype), torch.zeros(2, 100, dtype=dtype)
    play_kernel(ep.copy_to_rows_kernel, (2, 2), x, order.row_of_choice, rows, 100, 100, 100, 2, 64)
    assert torch.equal(rows[:3], ep.copy_to_rows(x, order)[:3]) and not rows[3].any()
    play_kernel(ep.sum_rows_kernel, (2, 2), rows, rows, order.row_of_choice, y, 100, 100, False, 2, 64)
    assert torch.equal(y, torch.stack([x[0], 2 * x[1]]))


def place_of(block, size):
    return block * size + tl.arange(0, 4)


def number_kernel(out, size):
    tl.store(out + place_of(tl.program_id(0), size), tl.program_id(0) + tl.arange(0, 4))


def test_a_kernel_may_call_another():
    out = torch.zeros(8, dtype=torch.int64)
    assert play_kernel(number_kernel, (2,), out, 4) == 2
    assert out.tolist() == [0, 1, 2, 3, 1, 2, 3, 4]
