"""Triton's kernels of attention and of the choice of chunks against the references; see ``test_triton``."""

import itertools

import pytest
import torch

from memlm_kernels import (
    chunk_mean_attention,
    chunk_sparse_attention,
    chunk_topk,
    document_attention,
    invert_chunks,
    prefix_window_attention,
)
from memlm_kernels.attention import gathering
from memlm_kernels.testing import assert_close
from tests.kernels.test_chunk_sparse_attention import choices, heads_of, spans_of
from tests.kernels.test_document_attention import made
from tests.kernels.test_document_attention import tensors as of_documents
from tests.kernels.test_triton import BFLOAT16, DEVICE, compare, poisoned  # noqa: F401

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")


def finite(attended):
    """Outputs for ``compare``: -inf, the lse of a token without keys, is replaced."""
    return attended.o, attended.lse.masked_fill(attended.lse == float("-inf"), 0.0)


def chosen(tokens, keys, chunk_size, window, count, groups=2, batch=1, documents=False, kept=None):
    """A call; with ``documents`` a row has two, with ``kept`` k has only the last keys and chunks have their own."""
    chunks = keys // chunk_size
    index = choices(batch, tokens, groups, chunks, count).to(DEVICE)
    # The first chunk of the second row starts before the first key.
    starts = torch.stack([torch.arange(chunks) * chunk_size - row for row in range(batch)]).to(DEVICE)
    row = torch.cat([torch.arange(5, 5 + tokens // 2), torch.arange(tokens - tokens // 2)])
    positions = row.expand(batch, -1).to(DEVICE) if documents else None

    def call(x, backend):
        q, k, v = x
        near = k if kept is None else k[:, keys - kept :]
        far = None if kept is None else (q.flip(1), k.flip(1))
        options = dict(chunk_size=chunk_size, window=window, positions=positions, far=far, backend=backend)
        return finite(chunk_sparse_attention(q, near, v, index, starts, **options))

    return call


# Heads, groups, sizes of keys and values; then the arguments of ``chosen``.
CHOSEN = {
    "one_token": ((6, 1, 20, 7), dict(tokens=1, keys=40, chunk_size=3, window=4, count=3, groups=1)),
    "odd": ((3, 1, 60, 100), dict(tokens=63, keys=75, chunk_size=16, window=17, count=2, groups=1)),
    "chunks_of_tiles": ((2, 2, 6, 5), dict(tokens=20, keys=230, chunk_size=70, window=3, count=2)),
    "two_rows_of_documents": ((4, 2, 6, 5), dict(tokens=20, keys=30, chunk_size=4, window=7, count=3, batch=2)),
}


# The largest union that a tile goes through, in choices of a token: all tiles do, some do, the others gather.
UNIONS = {"all": 100, "some": 1.6, "none": 0}
QUICK = {("one_token", "all"), ("odd", "all"), ("chunks_of_tiles", "none"), ("two_rows_of_documents", "some")}


@pytest.mark.parametrize(
    ("name", "unions"),
    [pytest.param(*x, marks=[pytest.mark.slow] * (x not in QUICK)) for x in itertools.product(CHOSEN, UNIONS)],
)
def test_attention_to_chosen_chunks(name, unions, monkeypatch):
    monkeypatch.setattr(gathering, "WORTH", UNIONS[unions])
    monkeypatch.setattr(
        gathering, "_stretches", lambda call: (slice(i, min(i + 7, call.length)) for i in range(0, call.length, 7))
    )
    (heads, groups, dim, value_dim), settings = CHOSEN[name]
    rows = settings.get("batch", 1)
    tensors = heads_of(rows, settings["tokens"], settings["keys"], heads, groups, dim, value_dim)
    extra = dict(documents=True, kept=26) if rows == 2 else {}
    compare(chosen(**settings, **extra), tensors, torch.float32)


@pytest.mark.parametrize("unions", ["all", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_attention_to_chosen_chunks_in_16_bits(dtype, unions, monkeypatch):
    monkeypatch.setattr(gathering, "WORTH", UNIONS[unions])
    tensors = heads_of(1, 40, 40, 4, 2, 16, 16)
    compare(chosen(40, 40, 4, 6, 3), tensors, dtype)


def test_partial_results_of_a_few_tokens_at_a_time(monkeypatch):
    """Calls with little room hold few of them and return the same; the same call again returns the same bits."""
    monkeypatch.setattr(gathering, "WORTH", 0)
    tensors, call = heads_of(1, 9, 12, 2, 1), chosen(9, 12, 3, 2, 2, groups=1)
    results = []
    # The results of five tokens, and of all.
    for room in (5 * 2 * 2 * 6, 2**30, 2**30):
        monkeypatch.setattr(gathering, "ROOM", room)
        leaves = [x.float().to(DEVICE).requires_grad_() for x in tensors]
        out = call(leaves, "triton")
        (out[0].square().sum() + out[1].sum()).backward()
        results.append([*out, *(x.grad for x in leaves)])
    for few, whole, again in zip(*results, strict=True):
        assert_close("in stretches", whole, few, 1e-6)
        assert torch.equal(whole, again)


@pytest.mark.parametrize("unions", ["all", "some", "none"])
def test_choices_are_sorted_once_a_call(unions, monkeypatch):
    """Forward, the gradients of queries and those of keys take the same order, whatever the tiles and stretches."""
    sorts, sort = [], gathering.sort_choices
    monkeypatch.setattr(gathering, "sort_choices", lambda *x: sorts.append(x[0].shape) or sort(*x))
    monkeypatch.setattr(gathering, "WORTH", UNIONS[unions])
    monkeypatch.setattr(gathering, "ROOM", 5 * 2 * 2 * 6)
    q, k, v = (x.float().to(DEVICE).requires_grad_() for x in heads_of(1, 9, 12, 2, 1))
    out = chosen(9, 12, 3, 2, 2, groups=1)((q, k, v), "triton")
    assert len(sorts) == (unions != "all")
    out[0].sum().backward()
    assert sorts == [(1, 9, 1, 2)]


@torch.no_grad()
def test_a_chunk_read_by_more_than_a_part_holds(monkeypatch):
    """Its parts are summed. All splits of keys are one softmax, also with chunks that no token chose."""
    monkeypatch.setattr(gathering, "PER", 5)
    with torch.enable_grad():
        compare(chosen(30, 30, 6, 3, 2), heads_of(1, 30, 30, 4, 2), torch.float32)
    q, k, v = (x.float().to(DEVICE) for x in heads_of(1, 1, 300, 4, 2))
    index, starts = torch.tensor([[[[5, -1], [-1, -1]]]], device=DEVICE), torch.arange(0, 300, 32, device=DEVICE)[None]
    options = dict(chunk_size=32, window=70)
    outputs = (chunk_sparse_attention(q, k, v, index, starts, **options, backend=b) for b in ("reference", "triton"))
    for expected, got in zip(*outputs, strict=True):
        assert_close("output or lse", expected, got, 1e-6)


# Heads, groups, sizes of keys and values; tokens, keys, window, prefix; rows of two documents.
WINDOWS = {
    "one_token": ((6, 2, 20, 20), (1, 80, 40, 70), False),
    "all_of_an_odd_row": ((3, 1, 60, 100), (63, 63, None, 0), False),
    "documents": ((4, 2, 6, 5), (20, 30, 5, 3), True),
}


def windowed(tokens, window, prefix, documents=False, own=False):
    """A call; the prefix is the first keys: those of the first row for all rows, or each row's own."""
    row = torch.cat([torch.arange(5, 5 + tokens // 2), torch.arange(tokens - tokens // 2)]).to(DEVICE)

    def call(x, backend):
        q, k, v = x
        always = (q.flip(1), *(y[: len(y) if own else 1, :prefix] for y in (k, v))) if prefix else None
        positions = row.expand(len(q), -1) if documents else None
        options = dict(window=window, positions=positions, prefix=always, with_lse=True, backend=backend)
        return finite(prefix_window_attention(q, k, v, **options))

    return call


@pytest.mark.parametrize("name", WINDOWS)
def test_attention_to_a_window_and_a_prefix(name):
    sizes, (tokens, keys, window, prefix), documents = WINDOWS[name]
    tensors = heads_of(2 if documents else 1, tokens, keys, *sizes)
    for own in {False, documents}:
        compare(windowed(tokens, window, prefix, documents, own), tensors, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_attention_to_a_window_in_16_bits(dtype):
    compare(windowed(70, 17, 3), heads_of(1, 70, 80, 4, 2, 20, 20), dtype)


# Tokens, keys, chunks, rows of the chunks.
@pytest.mark.parametrize("sizes", [(1, 70, 75, 1), (37, 40, 75, 2), (5, 5, 0, 2)])
def test_attention_to_documents(sizes):
    """Tiles that nobody chose are skipped; a step of decoding splits the keys; few keys take parts of the queries."""
    document, chosen, spans = made(*sizes)
    # Neighbours agree, so that some tiles of chunks are chosen by none.
    chosen = torch.where(torch.arange(sizes[0])[:, None] // 16 % 2 == 0, chosen.clamp(max=4), chosen)
    placed = [x.to(DEVICE) for x in (document, chosen)], [x.to(DEVICE) for x in spans]

    def call(x, backend):
        return document_attention(*x, *placed[0], spans=placed[1], backend=backend)

    compare(call, of_documents(*sizes), torch.float32)
    if sizes[0] == 37:
        compare(call, of_documents(*sizes), torch.float16)


@pytest.mark.parametrize("tokens", [1, 75])
def test_attention_to_means(tokens):
    """A token without chunks reads zeros; few keys are handled in several parts of the queries."""
    first, end = spans_of(1, tokens, 6)
    spans = (first.to(DEVICE), (end * 0 if tokens == 1 else end).to(DEVICE))

    def call(x, backend):
        return finite(chunk_mean_attention(*x, spans=spans, backend=backend))

    compare(call, heads_of(1, tokens, 6), torch.float32)


@pytest.mark.parametrize(
    ("tokens", "chunks", "top_k"), [(1, 3, 12), (11, 10, 1), pytest.param(40, 150, 5, id="tiles"), (5, 70, 70)]
)
def test_choice(tokens, chunks, top_k):
    # Products and sums of small integers are exact in any order: equal keys have equal scores.
    q, k, _ = ((8 * x).round().float().to(DEVICE) for x in heads_of(2, tokens, chunks))
    # Among equal scores the lowest chunk is the best.
    k[:, chunks // 2 :] = k[:, :1]
    spans = tuple(x.to(DEVICE) - 1 for x in spans_of(2, tokens, chunks))
    for known in (spans, None):
        expected, got = (chunk_topk(q, k, top_k=top_k, spans=known, backend=b) for b in ("reference", "triton"))
        assert torch.equal(expected, got)


def test_choice_among_equal_scores_of_both_signs():
    """Zeros of both signs are equal, and so are equal scores below zero."""
    q, k = torch.zeros(1, 3, 4, 6, device=DEVICE), torch.ones(1, 9, 2, 6, device=DEVICE)
    k[:, ::2] = -1
    for scale in (0.0, 1.0, -1.0):
        expected, got = (chunk_topk(q + scale, k, top_k=7, backend=b) for b in ("reference", "triton"))
        assert torch.equal(expected, got)


# One digit of four bits, several tiles of entries, three digits, five.
@pytest.mark.parametrize(("tokens", "chunks"), [(9, 7), (600, 5), (500, 300), (3, 70_000)])
def test_inverse(tokens, chunks):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-chunks // 3, chunks, (2, tokens, 2, 3), generator=generator).clamp(min=-1).to(DEVICE)
    expected, got = (invert_chunks(index, num_chunks=chunks, backend=b) for b in ("reference", "triton"))
    assert torch.equal(expected.offsets, got.offsets)
    real = torch.arange(index[0, :, 0].numel(), device=DEVICE) < expected.offsets[..., -1:]
    assert torch.equal(expected.token[real], got.token[real].long())


def test_the_choice_keeps_the_rules_of_torch():
    import memlm_kernels.attention.choice_triton  # noqa: F401

    q, k, _ = (x.float().to(DEVICE) for x in heads_of(1, 5, 9))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.memlm.chunk_topk, (q, k, None, None, 3), test_utils=tests)
    torch.library.opcheck(torch.ops.memlm.invert_chunks, (chunk_topk(q, k, top_k=3), 9), test_utils=tests)


def test_attention_keeps_the_rules_of_torch():
    import memlm_kernels.attention.triton  # noqa: F401

    q, k, v = (x.float().to(DEVICE).requires_grad_() for x in heads_of(1, 5, 9))
    first, end = (torch.full((1, 5), n, dtype=torch.int32, device=DEVICE) for n in (2, 6))
    index, starts = (torch.zeros(shape, dtype=torch.int32, device=DEVICE) for shape in ((1, 5, 2, 1), (1, 2)))
    others = (*[None] * 6, index, starts, 2, 3, 4, 0.5)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.memlm.attention, (q, k, v, first, end, *others), test_utils=tests)
    call = chosen(5, 9, 2, 3, 2)
    compiled = torch.compile(lambda *x: call(x, "triton")[0], fullgraph=True, backend="aot_eager")
    assert_close("output", call((q, k, v), "reference")[0], compiled(q, k, v), 1e-6)


def test_work_of_attention_is_counted():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (x.float().to(DEVICE).requires_grad_() for x in heads_of(1, 5, 9, dim=6, value_dim=5))
    with FlopCounterMode(display=False) as counter:
        chosen(5, 9, 2, 3, 2)((q, k, v), "triton")[0].sum().backward()
    # Seven keys per token and head: one product with keys, one with values; in backward three and two.
    assert counter.get_total_flops() == 2 * 5 * 4 * 7 * ((6 + 5) + (3 * 6 + 2 * 5))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 5, 2, 300), "heads of at most 256, not K=300"), ((1, 5, 40, 6), "at most 32 heads that share keys, not 40")],
)
def test_what_attention_does_not_take_is_named(shape, message):
    q = torch.zeros(shape, device=DEVICE)
    k = q[:, :, :1]
    index, starts = (torch.zeros(size, dtype=torch.int64, device=DEVICE) for size in ((1, 5, 1, 1), (1, 1)))
    with pytest.raises(ValueError, match=f"backend='triton' cannot run here: .*{message}"):
        chunk_sparse_attention(q, k, k, index, starts, chunk_size=2, window=2, backend="triton")
