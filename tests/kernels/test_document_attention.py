"""Attention to a span and to chosen documents against a loop over rows, tokens, heads and keys in fp64."""

import pytest
import torch

from memlm_kernels import document_attention
from memlm_kernels.attention import naive, window_reference
from memlm_kernels.testing import Watch, assert_close, grads_of
from tests.kernels.test_chunk_sparse_attention import heads_of


def made(tokens, keys, chunks, rows=2, seed=0):
    """Documents of one to three chunks, with chunks of none at either end; every third token chose only what is no
    document, and tokens look ahead by up to two keys.
    """
    generator = torch.Generator().manual_seed(seed)
    document = (torch.arange(chunks) * 2 // 5 - 1).repeat(rows, 1)
    document[:, chunks - 1 :] = 10**6
    chosen = torch.randint(-1, max(1, chunks // 2), (2, tokens, 3), generator=generator)
    chosen[:, ::3] = torch.tensor([-1, chunks, -7])
    here = torch.arange(keys - tokens, keys).expand(2, -1)
    back = torch.randint(0, keys, here.shape, generator=generator)
    return document, chosen, ((here - back).clamp(min=0), (here + 1 + back % 3).clamp(max=keys))


def tensors(tokens, keys, chunks, rows=2):
    q, k, v = heads_of(2, tokens, keys)
    _, pooled_k, pooled_v = heads_of(2, tokens, chunks, seed=1)
    return [q, k, v, pooled_k[:rows], pooled_v[:rows]]


def oracle(document, chosen, spans):
    def run(q, k, v, pooled_k, pooled_v):
        def sees(b, t, g):
            of_row, wanted = document[b % len(document)].tolist(), set(chosen[b, t].tolist())
            first, end = (x[b, t].item() for x in spans)
            return [range(first, end), [c for c, n in enumerate(of_row) if n >= 0 and n in wanted]]

        return naive.attend([(q, k, v), (q, pooled_k, pooled_v)], sees)[..., :-1]

    return run


# Tokens, keys, chunks, rows of the chunks.
CASES = [(1, 1, 5, 2), (1, 9, 12, 1), (11, 14, 7, 2), (11, 11, 0, 2)]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(("tokens", "keys", "chunks", "rows"), CASES)
def test_equals_a_loop_and_so_do_its_gradients(tokens, keys, chunks, rows, backend, monkeypatch):
    document, chosen, spans = made(tokens, keys, chunks, rows)
    inputs, expected = tensors(tokens, keys, chunks, rows), oracle(document, chosen, spans)

    def got(*x):
        return document_attention(*x, document, chosen, spans=spans, backend=backend)

    reads, gradients = expected(*inputs), grads_of(expected, inputs)
    for size in (256, 4):
        # Blocks of queries with masks of their own.
        monkeypatch.setattr(window_reference, "_MASKED", size)
        assert_close("output", reads, got(*inputs), 1e-12)
        for i, (a, b) in enumerate(zip(gradients, grads_of(got, inputs), strict=True)):
            assert_close(f"gradient {i}", a, b, 1e-11)


def test_without_spans_a_token_sees_the_keys_up_to_itself():
    document, chosen, _ = made(5, 9, 6)
    inputs, here = tensors(5, 9, 6), torch.arange(4, 9).expand(2, -1)
    expected = oracle(document, chosen, (here * 0, here + 1))(*inputs)
    assert_close("output", expected, document_attention(*inputs, document, chosen), 1e-12)


def test_masks_are_those_of_a_block_of_tokens():
    """No tensor has all tokens times all keys."""
    sizes = []
    for tokens in (1024, 2048):
        document, chosen, spans = made(tokens, tokens, 64)
        with Watch() as watch:
            document_attention(*tensors(tokens, tokens, 64), document, chosen, spans=spans)
        sizes.append(watch.largest)
    assert sizes[1] <= 2.1 * sizes[0]


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(k=zeros(1, 4, 2, 6), v=zeros(1, 4, 2, 5)), "L at least T=5"),
        (dict(q=zeros(1, 5, 3, 6)), "3 heads, not a multiple of the 2"),
        (dict(pooled_k=zeros(1, 4, 2, 6)), r"pooled_k \[1, 4, 2, 6\], pooled_v \[1, 3, 2, 5\] and document"),
        (dict(document=zeros(1, 2, dtype=torch.int64)), r"document \[1, 2\] must be"),
        (dict(chosen=zeros(1, 4, 2, dtype=torch.int64)), r"chosen \[1, 4, 2\] must be integers"),
        (dict(spans=[zeros(1, 4, dtype=torch.int64)] * 2), r"spans\[0\] \[1, 4\] must be integers"),
        (dict(backend="triton"), "backend='triton' cannot run here"),
    ],
)
def test_bad_inputs_are_named(settings, message):
    q, k, v, pooled_k, pooled_v = (x[:1] for x in tensors(5, 6, 3))
    document, chosen = zeros(1, 3, dtype=torch.int64), zeros(1, 5, 2, dtype=torch.int64)
    given = dict(q=q, k=k, v=v, pooled_k=pooled_k, pooled_v=pooled_v, document=document, chosen=chosen)
    with pytest.raises(ValueError, match=message):
        document_attention(**{**given, **settings})
