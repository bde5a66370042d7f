"""Keys grow without copies of the past, and no reader sees keys that another has added behind it."""

import pytest
import torch

from memlm.memory import attention, chunk_sparse
from memlm.memory.base import Dims
from memlm.memory.kv import append
from memlm_kernels.testing import Watch, assert_close
from tests.conftest import step

DIMS = Dims(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
CHUNK = 64


def entries(length, seed, dtype=torch.float32):
    return torch.randn(2, length, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def test_it_is_concatenation_for_everyone_who_goes_on():
    """Two continue from each of many pasts, in pieces of any length. The first may write in place."""
    paths = [(entries(5, 0), entries(5, 0))]
    for turn in range(60):
        expected, past = paths[turn // 2]
        for twin in (0, 1):
            new = entries(turn % 4, 2 * turn + twin + 1)
            paths.append((torch.cat([expected, new], 1), append(past, new)[1]))
    for expected, got in paths:
        assert torch.equal(expected, got)


@torch.no_grad()
def test_places_stay_and_move_seldom():
    x, places = entries(20, 0), set()
    for turn in range(2000):
        x, _ = append(x, entries(1, turn))
        places.add(x.data_ptr())
    # From 20 to 2,020 in steps of a quarter, and no more room than that.
    assert len(places) < 25
    assert x.untyped_storage().nbytes() <= 1.25 * x.nbytes


def test_gradients_and_inference_mode_are_not_mixed_up():
    x = entries(8, 0)
    with torch.inference_mode():
        x, _ = append(x, entries(1, 1))
    with torch.no_grad():
        longer, _ = append(x, entries(1, 2))
        longest, _ = append(longer, entries(1, 3))
    new = entries(1, 4).requires_grad_()
    joined, _ = append(longest, new)
    loss = joined.square().sum()
    with torch.no_grad():
        append(longest, entries(1, 5))
    loss.backward()
    assert_close("gradient", 2 * new, new.grad, 1e-6)
    assert torch.equal(joined[:, :-1], torch.cat([entries(8, 0), *(entries(1, i) for i in (1, 2, 3))], 1))


@torch.no_grad()
def test_rows_keep_their_real_entries_last():
    past, new = entries(4, 0), entries(3, 1)
    joined, kept = append(past, new, torch.tensor([3, 1]))
    assert torch.equal(joined, torch.cat([past, new], 1)) and torch.equal(kept[0], joined[0])
    assert torch.equal(kept[1, -5:], joined[1, :5])
    assert append(past, new.double())[0].dtype == torch.float64


def written(mixer, past):
    """Elements that decoding one token writes, once there is room."""
    x = torch.randn(2, past + 4, 32)
    state = step(mixer, x[:, :past]).state
    for t in (past, past + 1):
        state = step(mixer, x[:, t : t + 1], state).state
    with Watch() as watch:
        step(mixer, x[:, -2:-1], state)
    return watch.written


@torch.no_grad()
@pytest.mark.parametrize("far_positions", [True, False])
@pytest.mark.parametrize("learning", chunk_sparse.LEARNING)
def test_a_token_of_chosen_chunks_copies_no_past(learning, far_positions):
    """Only the cost of each chunk remains: a copy of keys or of values would write 32,768 elements more."""
    settings = dict(chunk_size=CHUNK, window_size=CHUNK, top_k=2, learning=learning, far_positions=far_positions)
    mixer = chunk_sparse.Mixer(chunk_sparse.Config(**settings), DIMS, 0).eval()
    more = written(mixer, 2048) - written(mixer, 1024)
    assert 0 < more < 2 * 2 * 8 * 1024 / 2


@torch.no_grad()
def test_a_token_of_full_attention_copies_no_past():
    """Only the mask remains, with a few numbers per key; keys and values have 32 in each row."""
    mixer = attention.Mixer(attention.Config(), DIMS, 0)
    assert written(mixer, 2048) - written(mixer, 1024) < 2 * 2 * 8 * 1024
