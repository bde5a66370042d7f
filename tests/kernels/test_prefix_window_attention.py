"""Attention to a window and a prefix against a loop over rows, tokens, heads and keys in fp64."""

import pytest
import torch

from memlm_kernels import prefix_window_attention
from memlm_kernels.attention import naive, window_reference
from memlm_kernels.testing import assert_close, grads_of
from tests.kernels.test_chunk_sparse_attention import heads_of


def oracle(q, k, v, window, positions, prefix):
    """Output and lse side by side, [B, T, H, V + 1]."""

    def sees(b, t, g):
        here = k.shape[1] - q.shape[1] + t
        near = naive.window_of(here, window, None if positions is None else positions[b, t].item())
        return [near, range(prefix[1].shape[1])] if prefix else [near]

    return naive.attend([(q, k, v), *([prefix] if prefix else [])], sees)


# Tokens, keys, window, rows of the prefix (0: none), documents; some blocks are not full, some history is longer.
CASES = [
    (1, 1, None, 0, False),
    (1, 9, 4, 1, False),
    (11, 11, None, 0, False),
    (11, 14, None, 2, True),
    (70, 70, 3, 0, True),
    (70, 80, 3, 2, False),
]


@pytest.mark.parametrize(("tokens", "keys", "window", "rows", "documents"), CASES)
def test_equals_a_loop_and_so_do_its_gradients(tokens, keys, window, rows, documents):
    q, k, v = heads_of(2, tokens, keys, 2, 1)
    own_q, own_k, own_v = heads_of(2, tokens, 3, 2, 1, seed=1)
    # The first document began three tokens before the call, which may have no keys of them.
    positions = ((torch.arange(tokens) + 3) % 7).expand(2, -1) if documents else None
    inputs = [q, k, v, *((own_q, own_k[:rows], own_v[:rows]) if rows else ())]

    def expected(q, k, v, *prefix):
        return oracle(q, k, v, window, positions, prefix)

    def got(q, k, v, *prefix, backend="reference"):
        options = dict(window=window, positions=positions, prefix=prefix or None, with_lse=backend == "reference")
        output, lse = prefix_window_attention(q, k, v, **options, backend=backend)
        return output if lse is None else torch.cat([output, lse[..., None]], -1)

    reads = expected(*inputs)
    assert_close("output and lse", reads, got(*inputs), 1e-12)
    assert_close("output", reads[..., :-1], got(*inputs, backend="sdpa"), 1e-12)
    for i, (a, b) in enumerate(zip(grads_of(expected, inputs), grads_of(got, inputs), strict=True)):
        assert_close(f"gradient {i}", a, b, 1e-11)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rows", [0, 2])
def test_blocks_of_queries_with_a_mask_of_their_own_change_nothing(monkeypatch, rows, documents, backend):
    q, k, v = heads_of(2, 11, 14, 2, 1)
    prefix = heads_of(2, 11, rows, 2, 1, seed=1) if rows else ()
    positions = (torch.arange(11) % 7).expand(2, -1) if documents else None

    def got(q, k, v, *prefix):
        out = prefix_window_attention(q, k, v, positions=positions, prefix=prefix or None, backend=backend)
        return torch.cat([x.flatten(2) for x in out if x is not None], -1)

    inputs = [q, k, v, *prefix]
    whole = got(*inputs), *grads_of(got, inputs)
    monkeypatch.setattr(window_reference, "_MASKED", 4)
    for i, (a, b) in enumerate(zip(whole, (got(*inputs), *grads_of(got, inputs)), strict=True)):
        assert_close(f"output or gradient {i}", a, b, 1e-12)


def test_auto_is_torchs_own_unless_lse_is_wanted():
    q, k, v = heads_of(1, 5, 5)
    assert prefix_window_attention(q, k, v).lse is None
    lse = prefix_window_attention(q, k, v, with_lse=True).lse
    assert lse is not None and lse.shape == (1, 5, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window=0), "window=0 must be at least 1"),
        (dict(positions=torch.zeros(1, 4, dtype=torch.int64)), r"positions \[1, 4\] must be integers"),
        (dict(k=torch.zeros(1, 4, 2, 6), v=torch.zeros(1, 4, 2, 5)), "L at least T=5"),
        (dict(v=torch.zeros(1, 5, 1, 5)), r"v \[1, 5, 1, 5\] must be"),
        (dict(q=torch.zeros(1, 5, 3, 6)), "3 heads, not a multiple of the 2"),
        (dict(prefix=[torch.zeros(1, 5, 4, 6)] + [torch.zeros(2, 3, 2, n) for n in (6, 5)]), "of the prefix must be"),
        (dict(with_lse=True, backend="sdpa"), "backend='sdpa' cannot run here: it gives no lse; use one of auto, ref"),
        (dict(backend="triton"), "backend='triton' cannot run here"),
    ],
)
def test_bad_inputs_are_named(settings, message):
    q, k, v = heads_of(1, 5, 5)
    with pytest.raises(ValueError, match=message):
        prefix_window_attention(**{"q": q, "k": k, "v": v, **settings})
