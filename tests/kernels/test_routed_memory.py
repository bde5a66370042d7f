"""dispatch_tokens, combine_reads and MemoryRoutes against loops over tokens."""

import pytest
import torch

from memlm_kernels import MemoryRoutes, combine_reads, delta_rule, dispatch_tokens, linear_attention
from memlm_kernels.recurrence.naive import recurrence
from memlm_kernels.routed_memory import naive
from memlm_kernels.testing import Watch, assert_close, grads_of

MEMORIES = 4
# Documents of two rows of 11 tokens, 3 for padding.
DOCUMENTS = {
    "rows": None,
    "padding": [[0] * 11, [0] * 4 + [3] * 7],
    "documents": [[0] * 5 + [1] + [2] * 5, [0] * 2 + [2] * 6 + [3] * 3],
    "all_padding": [[3] * 11, [0] * 10 + [1]],
}
CHOICES = {"top_1": 1, "top_2": 2, "all_memories": 4, "one_has_all": 1, "nobody_chooses_two": 2}


@pytest.fixture(autouse=True)
def poisoned():
    """Fill unwritten memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def choices(name, batch=2, length=11):
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(batch, length, MEMORIES, generator=g)
    if name == "one_has_all":
        scores[..., 2] = 2
    if name == "nobody_chooses_two":
        scores[..., [0, 3]] = -1
    return scores.topk(CHOICES[name], -1).indices


def route(memory, documents=None):
    if documents is None:
        return MemoryRoutes.of(memory, MEMORIES)
    return MemoryRoutes.of(memory, MEMORIES, torch.tensor(documents), 3)


def loop(memory, documents):
    """For each row, the (token, choice) pairs of its segments, and those of padding."""
    count = 1 if documents is None else 3
    documents = [[0] * memory.shape[1]] * len(memory) if documents is None else documents
    rows = zip(memory.tolist(), documents, strict=True)
    return [naive.segments_of_row(*row, MEMORIES, count) for row in rows]


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name", CHOICES)
def test_routes_are_the_loop_over_documents_and_memories(name, documents):
    memory = choices(name)
    batch, length, top_k = memory.shape
    routes, rows = route(memory, DOCUMENTS[documents]), loop(memory, DOCUMENTS[documents])
    for b, (segments, padding) in enumerate(rows):
        order = [x for segment in segments for x in segment] + padding
        assert [routes.place[b, t, j].item() for t, j in order] == list(range(length * top_k))
        assert routes.cu_seqlens[b].diff().tolist() == [len(s) for s in segments] and routes.cu_seqlens[b, 0] == 0
    # Sorted by memory, then by row, then by document; padding comes last.
    whole = [
        (b, t, j)
        for m in range(MEMORIES)
        for b, (segments, _) in enumerate(rows)
        for s in segments[m::MEMORIES]
        for t, j in s
    ]
    padding = [(b, t, j) for b, (_, behind) in enumerate(rows) for t, j in behind]
    places = routes.grouped[0].view(batch, length, top_k)
    assert [places[x].item() for x in whole + padding] == list(range(batch * length * top_k))
    assert routes.ungrouped[0, :, 0].tolist() == [
        b * length * top_k + routes.place[b, t, j].item() for b, t, j in whole + padding
    ]
    sizes = [sum(len(s) for segments, _ in rows for s in segments[m::MEMORIES]) for m in range(MEMORIES)]
    sizes[-1] += len(padding)
    assert routes.sizes.tolist() == sizes


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name", CHOICES)
def test_a_shared_memory_is_the_last_of_each_document_and_stands_behind_the_batch(name, documents):
    memory, document = choices(name), DOCUMENTS[documents]
    facts = () if document is None else (torch.tensor(document), 3)
    plain, routes = MemoryRoutes.of(memory, MEMORIES, *facts), MemoryRoutes.of(memory, MEMORIES, *facts, shared=True)
    more = torch.cat([memory, torch.full_like(memory[..., :1], MEMORIES)], -1)
    as_chosen = MemoryRoutes.of(more, MEMORIES + 1, *facts)
    assert torch.equal(routes.place, as_chosen.place) and torch.equal(routes.cu_seqlens, as_chosen.cu_seqlens)
    assert torch.equal(routes.grouped, plain.grouped) and torch.equal(routes.sizes, plain.sizes)
    row = (torch.arange(len(more)) * more[0].numel())[:, None, None]
    routed, shared = (routes.place + row).split([memory.shape[-1], 1], -1)
    assert torch.equal(routes.ungrouped[0, memory.numel() :, 0], shared.flatten())
    assert torch.equal(routes.ungrouped[0, routes.grouped.flatten(), 0], routed.flatten())


def by_hand(q, k, v, weight, shared, memory, documents, op):
    """Each document's memories one after the other, one token at a time; padding reads zeros."""

    def read(q, k, v):
        beta = torch.ones_like(q[..., 0]) if op == "delta" else None
        return recurrence(*(x if x is None else x[None] for x in (q, k, v, beta)), None)[0][0]

    shared = torch.zeros_like(v) if shared is None else shared
    rows = zip(q, k, v, weight, shared, loop(memory, documents), strict=True)
    return torch.stack([naive.mixture(read, x[:3], *x[3:5], segments) for *x, (segments, _) in rows])


@pytest.mark.parametrize("op", ["linear", "delta"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name", CHOICES)
def test_a_mixture_is_its_memories_one_by_one(name, documents, op):
    torch.manual_seed(0)
    memory, documents = choices(name), DOCUMENTS[documents]
    q, k, v, shared = (torch.randn(2, 11, 2, n, dtype=torch.float64) for n in (3, 3, 5, 5))
    k, weight = k / k.norm(dim=-1, keepdim=True), torch.rand(memory.shape, dtype=torch.float64)

    def ours(q, k, v, weight, shared=None):
        routes = route(memory, documents)
        q, k, v = (dispatch_tokens(x, routes.place) for x in (q, k, v))
        if op == "linear":
            o, _ = linear_attention(q, k, v, cu_seqlens=routes.cu_seqlens)
        else:
            o, *_ = delta_rule(q, k, v, torch.ones_like(q[..., 0]), cu_seqlens=routes.cu_seqlens)
        return combine_reads(o, routes.place, weight, shared)

    def theirs(q, k, v, weight, shared=None):
        return by_hand(q, k, v, weight, shared, memory, documents, op)

    for given in ([q, k, v, weight], [q, k, v, weight, shared]):
        assert_close("y", theirs(*given), ours(*given), 1e-13)
        for i, (e, g) in enumerate(zip(grads_of(theirs, given), grads_of(ours, given), strict=True)):
            assert_close(f"gradient {i}", e, g, 1e-12)


@pytest.mark.parametrize("features", [(), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_both_are_products_with_a_permutation(top_k, features):
    """Bitwise equal where nothing is added. Gradients equal those of plain indexing by autograd."""
    torch.manual_seed(0)
    place = torch.stack([torch.randperm(7 * top_k) for _ in range(3)]).view(3, 7, top_k)
    row = torch.arange(3)[:, None, None]
    x, o = torch.randn(3, 7, *features, dtype=torch.float64), torch.randn(3, 7 * top_k, *features, dtype=torch.float64)
    weight = torch.randn(place.shape, dtype=torch.float64)
    token = place.flatten(1).argsort(1) // top_k

    def weighted(o, weight):
        return (weight.reshape(*place.shape, *[1] * len(features)) * o[row, place]).sum(2)

    assert torch.equal(x[row[..., 0], token], dispatch_tokens(x, place))
    assert_close("y", weighted(o, weight), combine_reads(o, place, weight), 1e-15)
    pairs = [
        (lambda x: x[row[..., 0], token], lambda x: dispatch_tokens(x, place), [x]),
        (weighted, lambda o, weight: combine_reads(o, place, weight), [o, weight]),
    ]
    for theirs, ours, given in pairs:
        for e, g in zip(grads_of(theirs, given), grads_of(ours, given), strict=True):
            assert_close("gradient", e, g, 1e-14)


def test_sums_are_fp32_whatever_is_summed():
    place, weight = torch.arange(256).view(1, 1, 256), torch.full((1, 1, 256), 2**-8)
    o = torch.full((1, 256, 1), 1 + 2**-7, dtype=torch.bfloat16)
    y = combine_reads(o, place, weight)
    assert y.dtype == torch.bfloat16 and y.item() == 1 + 2**-7


def test_no_tokens_and_no_rows():
    for batch, length in ((2, 0), (0, 3)):
        memory = torch.zeros(batch, length, 2, dtype=torch.long)
        routes = MemoryRoutes.of(memory, 3)
        assert routes.cu_seqlens.shape == (batch, 4) and routes.sizes.tolist() == [0, 0, 0]
        rows = dispatch_tokens(torch.zeros(batch, length, 5), routes.place)
        assert rows.shape == (batch, length * 2, 5)
        assert combine_reads(rows, routes.place, torch.zeros(memory.shape)).shape == (batch, length, 5)


def test_nothing_is_asked_of_the_device_and_nothing_is_padded():
    """One memory gets nearly all tokens: no tensor is larger than the routed rows."""
    memory = torch.zeros(1, 300, 2, dtype=torch.long)
    memory[..., 1] = 1 + torch.arange(300) % 3
    x, weight = torch.randn(1, 300, 8, requires_grad=True), torch.rand(memory.shape, requires_grad=True)
    with Watch() as watch:
        routes = MemoryRoutes.of(memory, MEMORIES)
        combine_reads(dispatch_tokens(x, routes.place), routes.place, weight).sum().backward()
    assert not watch.asked and watch.largest == 300 * 2 * 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda place: dispatch_tokens(torch.zeros(2, 4, 3), place),
            r"x \[2, 4, 3\] must be \[B, T, ...\] = \[2, 5\]",
        ),
        (
            lambda place: combine_reads(torch.zeros(2, 5, 3), place, torch.zeros(2, 5, 2)),
            r"o \[2, 5, 3\] must be \[B, T \* J, ...\] = \[2, 10\], because place is \[2, 5, 2\]",
        ),
        (lambda place: dispatch_tokens(torch.zeros(2, 5), place.int()), r"place \[2, 5, 2\] of torch.int32"),
        (lambda place: dispatch_tokens(torch.zeros(2, 5), place[0]), r"place \[5, 2\] of torch.int64 must be"),
        (
            lambda place: combine_reads(torch.zeros(2, 10, 3), place, torch.zeros(2, 5)),
            r"weight \[2, 5\] must be \[B, T, J\] = \[2, 5, 2\]",
        ),
        (
            lambda place: combine_reads(torch.zeros(2, 10, 3), place, torch.zeros(2, 5, 2), torch.zeros(2, 5)),
            r"shared \[2, 5\] must be \[B, T, ...\] = \[2, 5, 3\]",
        ),
        (lambda place: MemoryRoutes.of(place[0], 3), r"memory \[5, 2\] of torch.int64 must be integers \[B, T, J\]"),
        (lambda place: MemoryRoutes.of(place, 0), "num_memories=0 and num_documents=1 must be at least 1"),
        (lambda place: MemoryRoutes.of(place, 3, place), r"document \[2, 5, 2\] must be \[B, T\] = \[2, 5\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 5, 2, dtype=torch.long))
