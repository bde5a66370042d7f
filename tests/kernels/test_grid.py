"""Laying ragged rows on a grid, and keeping the last tokens of rows."""

import torch

from memlm_kernels.grid import keep_last
from memlm_kernels.segments import lay_out, next_position

# Rows of three documents; the third of the first row is empty.
CU = torch.tensor([[0, 2, 8, 8], [0, 4, 5, 6]])


def test_rows_laid_on_chunks_come_back():
    chunks = lay_out(CU, 8, 4, before=torch.tensor([[5], [0]]))
    x = torch.arange(16.0).reshape(2, 8)
    laid = chunks.grid.lay(x, fill=-1.0)
    assert laid[0, :3].tolist() == [[-1, 0, 1, -1], [2, 3, 4, 5], [6, 7, -1, -1]]
    assert laid[1, :3].tolist() == [[8, 9, 10, 11], [12, -1, -1, -1], [13, -1, -1, -1]]
    assert (laid[:, 3:] == -1).all()
    assert chunks.start[:, :4].tolist() == [[5, 0, 4, -1], [0, 0, 0, -1]]
    assert chunks.segment[:, :3].tolist() == [[0, 1, 1], [0, 1, 2]]
    assert chunks.enters[:, :4].tolist() == [[True, True, False, False], [True, True, True, False]]
    assert chunks.opens(4)[:, :4].tolist() == [[False, True, True, False], [True, True, True, False]]
    assert chunks.opens(8)[:, :4].tolist() == [[False, True, False, False], [True, True, True, False]]
    assert not lay_out(CU, 8, 1).opens(1)[1, 6:].any()
    assert chunks.positions.tolist()[0] == [5, 6, 0, 1, 2, 3, 4, 5]
    real = torch.arange(8) < CU[:, -1:]
    assert torch.equal(chunks.grid.take(laid), x * real)


def test_segments_fit_wherever_they_begin():
    """Each token has its own slot, in the chunk of its position in the segment, and there are enough chunks."""
    g = torch.Generator().manual_seed(0)
    for length in (1, 2, 7, 30):
        for width in (1, 2, 5, 16):
            cu = torch.randint(0, length + 1, (20, 5), generator=g).sort(1).values
            for before in (None, *(torch.randint(0, 40, (20, most), generator=g) for most in (1, 4))):
                chunks = lay_out(cu, length, width, before)
                x = torch.arange(length).expand(20, -1)
                real = (x >= cu[:, :1]) & (x < cu[:, -1:])
                assert torch.equal(chunks.grid.take(chunks.grid.lay(x + 1.0)), (x + 1.0) * real)
                first = chunks.grid.lay(chunks.positions.masked_fill(~real, 99), fill=99).amin(-1)
                assert torch.equal(chunks.start, first.masked_fill(first == 99, -1))


def test_an_aligned_grid_is_a_view_of_whole_rows():
    x = torch.arange(14.0).reshape(2, 7)
    grid = lay_out(None, 7, 4).grid
    assert grid.lay(x, fill=9.0)[1].tolist() == [[7, 8, 9, 10], [11, 12, 13, 9]]
    assert torch.equal(grid.take(grid.lay(x)), x)


def test_the_next_token_follows_the_last_one_in_its_segment():
    """Also with empty segments before or behind it; a row without tokens keeps its position."""
    cu = torch.tensor([[0, 2, 8, 8], [0, 4, 4, 4], [0, 0, 3, 3], [0, 0, 0, 0], [0, 1, 2, 6]])
    assert next_position(cu, torch.tensor([5, 6, 7, 8, 9])).tolist() == [6, 10, 3, 8, 4]


def test_keep_last_takes_each_rows_own_last_entries():
    history = torch.arange(10).expand(3, -1)
    kept = keep_last(history, 4, new=6, lengths=torch.tensor([0, 2, 6]))
    assert kept.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9]]
