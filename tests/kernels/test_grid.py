"""Laying ragged rows on a grid, and keeping the last tokens of rows."""

import torch

from memlm_kernels.grid import aligned_grid, keep_last, ragged_grid


def test_rows_laid_on_a_grid_come_back():
    positions = torch.tensor([[5, 6, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 0, 7, 7]])
    lengths = torch.tensor([8, 6])
    grid = ragged_grid(positions, lengths, 4, max_documents=3)
    x = torch.arange(16.0).reshape(2, 8)
    laid = grid.lay(x, fill=-1.0)
    assert laid[0, :3].tolist() == [[-1, 0, 1, -1], [2, 3, 4, 5], [6, 7, -1, -1]]
    assert laid[1, :3].tolist() == [[8, 9, 10, 11], [12, -1, -1, -1], [13, -1, -1, -1]]
    assert (laid[:, 3:] == -1).all()
    assert grid.opens_document[:, :3].tolist() == [[False, True, False], [True, True, True]]
    assert grid.opens_chunk[:, :3].tolist() == [[False, True, True], [True, True, True]]
    real = torch.arange(8) < lengths[:, None]
    assert torch.equal(grid.take(laid), x * real)


def test_an_aligned_grid_is_a_view_of_whole_rows():
    x = torch.arange(14.0).reshape(2, 7)
    grid = aligned_grid(7, 4)
    assert grid.lay(x, fill=9.0)[1].tolist() == [[7, 8, 9, 10], [11, 12, 13, 9]]
    assert torch.equal(grid.take(grid.lay(x)), x)


def test_keep_last_takes_each_rows_own_last_entries():
    history = torch.arange(10).expand(3, -1)
    kept = keep_last(history, 4, new=6, lengths=torch.tensor([0, 2, 6]))
    assert kept.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [6, 7, 8, 9]]
