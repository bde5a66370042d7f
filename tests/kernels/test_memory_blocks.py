"""The memory of one layer in blocks, for every chunk size, against the paper's recurrence and the loop over chunks."""

import itertools

import pytest
import torch
from torch.utils._pytree import tree_map

from memlm_kernels.neural_memory import (
    SegmentedMemoryState,
    blocks,
    reference,
    scan,
    segmented,
    segmented_neural_memory,
)
from memlm_kernels.neural_memory.chunk import Plan
from memlm_kernels.testing import assert_close, grads_of, relative_error
from tests.kernels.test_neural_memory import make, make_weight, names, run, token_by_token

# Chunks in blocks, blocks in chunks, and chunks that lie across the ends of blocks.
CHUNKS = [1, 2, 3, 4, 8, 16, 20, 32, 48, 64, 96, 128]


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch):
    """Blocks of 16 slots for each chunk size, so that short rows have several."""
    monkeypatch.setattr(reference, "in_blocks", lambda *_: True)
    monkeypatch.setattr(reference, "block_width", lambda *_: 16)
    monkeypatch.setattr(reference, "scan_in_torch", None)


def make_stable(length, chunk_size, seed=0, **sizes):
    """Rates at which the inner descent does not diverge, which would amplify rounding."""
    inputs = make(length=length, seed=seed, **sizes)
    inputs[3] = inputs[3] * min(1.0, 4 / chunk_size)
    return inputs


def everything(out):
    return torch.cat([out.o.flatten(), *(w.flatten() for part in out.state[:3] for w in part)])


def in_pieces(inputs, cuts, chunk_size, **options):
    """The outputs of one call for each cut, and the state after the last."""
    state, out, surprise = None, [], []
    for piece in zip(*(x.split(cuts, 1) for x in inputs[:6]), strict=True):
        o, state, of_piece = run([*piece, *inputs[6:]], chunk_size, state=state, **options)
        out.append(o)
        surprise.append(of_piece)
    return torch.cat(out, 1), state, torch.cat(surprise, 1)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_equals_the_token_recurrence(chunk_size):
    inputs = make_stable(70, chunk_size, batch=1)
    expected = token_by_token(*inputs, chunk_size=chunk_size)
    assert_close("o", expected, run(inputs, chunk_size).o, 1e-12)
    found = grads_of(lambda *x: run(x, chunk_size).o, inputs)
    for name, e, g in zip(
        names(inputs), grads_of(lambda *x: token_by_token(*x, chunk_size=chunk_size), inputs), found, strict=True
    ):
        assert_close(f"gradient of {name}", e, g, 1e-12)


@pytest.mark.parametrize("chunk_size", [64, 96])
def test_small_memories_take_long_chunks_in_narrow_blocks(monkeypatch, chunk_size):
    inputs = make_stable(140, chunk_size, batch=1)
    widths = []
    monkeypatch.setattr(reference, "Plan", lambda *plan: widths.append(chunk_size // plan[1]) or Plan(*plan))
    found = by_chunks(monkeypatch, lambda: run(inputs, chunk_size).o)
    assert_close("o", token_by_token(*inputs, chunk_size=chunk_size), found, 1e-12)
    assert widths == [32]


def by_chunks(monkeypatch, function, *inputs):
    """The same by the loop over chunks."""
    with monkeypatch.context() as m:
        m.setattr(reference, "in_blocks", lambda *_: False)
        m.setattr(reference, "scan_in_torch", scan.scan)
        return function(*inputs)


@pytest.mark.parametrize("chunk_size", [1, 20, 64])
@pytest.mark.parametrize("options", ["plain", "weighted", "no momentum", "no decay", "no gate"])
def test_equals_the_loop_over_chunks(monkeypatch, chunk_size, options):
    """Outputs, surprise, state, and the gradients of all of them."""
    inputs = make_stable(70, chunk_size, batch=2)
    absent = {"no momentum": [4], "no decay": [5], "no gate": [4, 5]}.get(options, [])
    given = [x for i, x in enumerate(inputs) if i not in absent]
    given += [make_weight(length=70)] if options == "weighted" else []

    def call(*x):
        x, more = list(x), {}
        if options == "weighted":
            more["weight"] = x.pop()
        for i in absent:
            x.insert(i, None)
        return run(x, chunk_size, **more)

    expected = by_chunks(monkeypatch, call, *given)
    found = call(*given)
    assert_close("surprise", expected.surprise, found.surprise, 1e-12)
    for name, e, g in zip(found.state._fields, expected.state, found.state, strict=True):
        for x, y in zip(e, g, strict=True):
            assert_close(name, x, y, 1e-12)
    expected = by_chunks(monkeypatch, grads_of, lambda *x: everything(call(*x)), given)
    for i, (e, g) in enumerate(zip(expected, grads_of(lambda *x: everything(call(*x)), given), strict=True)):
        assert_close(f"gradient {i}", e, g, 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 20, 128])
@pytest.mark.parametrize("cuts", [[37, 33], [1, 9, 22, 3, 1, 33, 1], [0, 70, 0]], ids=str)
def test_any_division_into_calls_gives_the_same(chunk_size, cuts):
    """Also where a call starts inside a chunk: it goes on with the state's anchor."""
    inputs = make_stable(70, chunk_size)
    whole, state, surprise = run(inputs, chunk_size)
    found, last, of_pieces = in_pieces(inputs, cuts, chunk_size)
    assert_close("o", whole, found, 1e-12)
    assert_close("surprise", surprise, of_pieces, 1e-12)
    for name, e, g in zip(state._fields, state, last, strict=True):
        for x, y in zip(e, g, strict=True):
            assert_close(name, x, y, 1e-12)
    if cuts[0]:
        expected = grads_of(lambda *x: everything(run(x, chunk_size)), inputs)

        def call(*x):
            o, state, _ = in_pieces(x, cuts, chunk_size)
            return torch.cat([o.flatten(), *(w.flatten() for part in state[:3] for w in part)])

        for name, e, g in zip(names(inputs), expected, grads_of(call, inputs), strict=True):
            assert_close(f"gradient of {name}", e, g, 1e-12)


@pytest.mark.parametrize("start", [64, 69])
def test_a_promised_start_gives_the_same(start):
    inputs = make_stable(130, 16)
    expected = run(inputs, 16).o[:, start:]
    first, rest = ([x[:, part] for x in inputs[:6]] for part in (slice(start), slice(start, None)))
    state = run([*first, *inputs[6:]], 16).state
    assert_close("o", expected, run([*rest, *inputs[6:]], 16, state=state, start=start).o, 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 20, 128])
def test_packed_rows_equal_documents_alone_and_padding_changes_nothing(chunk_size):
    """Two rows go on inside a chunk, with several documents, some empty, and padding that is NaN."""
    inputs, before = make_stable(60, chunk_size), make_stable(29, chunk_size, seed=1)
    cu_seqlens = torch.tensor([[0, 13, 13, 52, 57], [0, 0, 31, 32, 60]])
    real = (torch.arange(60) < cu_seqlens[:, -1:])[..., None]

    def packed(*x):
        now, past = [*x[:6], x[-1]], [*x[6:12], x[-1]]
        now[:6] = [torch.where(real[..., None] if t.ndim == 4 else real, t, torch.nan) for t in now[:6]]
        out = run(now, chunk_size, state=run(past, chunk_size).state, cu_seqlens=cu_seqlens)
        return torch.cat([everything(out), (out.surprise * 0).flatten()])

    def alone(*x):
        state, outputs, last = run([*x[6:12], x[-1]], chunk_size).state, [], []
        for b, ends in enumerate(cu_seqlens.tolist()):
            of_row = tree_map(lambda t: t[b : b + 1], state)  # noqa: B023
            o = []
            for d, (begin, end) in enumerate(itertools.pairwise(ends)):
                document = [t[b : b + 1, begin:end] for t in x[:6]]
                out = run([*document, x[-1]], chunk_size, state=None if d else of_row)
                # An empty document behind others leaves their state.
                of_row = of_row if d and begin == end else out.state
                o.append(out.o)
            outputs.append(torch.nn.functional.pad(torch.cat(o, 1), (0, 0, 0, 0, 0, 60 - ends[-1])))
            last.append(of_row)
        parts = [torch.cat([getattr(s, name)[0] for s in last]) for name in ("weights", "momentum", "anchor")]
        return torch.cat([torch.cat(outputs).flatten(), *(p.flatten() for p in parts), torch.zeros(240).double()])

    given = [*inputs[:6], *before[:6], inputs[6]]
    expected, found = alone(*given), packed(*given)
    assert_close("outputs", expected[:480], found[:480], 1e-12)
    assert_close("all", expected, found, 1e-12)
    for i, (e, g) in enumerate(zip(grads_of(alone, given), grads_of(packed, given), strict=True)):
        assert_close(f"gradient {i}", e, g, 1e-12)


@pytest.mark.parametrize("kept_whole", [True, False])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_groups_change_nothing(monkeypatch, size, ragged, kept_whole):
    """Memories are kept, or computed again from those at the starts of groups."""
    inputs = make_stable(70, 4)
    options = {"cu_seqlens": torch.tensor([[0, 70, 70], [0, 33, 65]])} if ragged else {}
    function = lambda *x: everything(run(x, 4, **options))  # noqa: E731
    expected = [function(*inputs), *grads_of(function, inputs)]
    monkeypatch.setattr(blocks, "group_size", lambda memories, k, keep: (size, kept_whole and keep))
    with torch.no_grad():
        assert_close("without gradients", expected[0], function(*inputs), 1e-12)
    for name, e, g in zip(
        ("all", *names(inputs)), expected, [function(*inputs), *grads_of(function, inputs)], strict=True
    ):
        assert_close(name, e, g, 1e-12)


@pytest.mark.parametrize("part", ["weights", "momentum", "anchor"])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_of_one_result_alone(part, ragged):
    inputs = make(length=21)
    options = {"cu_seqlens": torch.tensor([[0, 5, 21], [0, 6, 17]])} if ragged else {}
    expected = grads_of(
        lambda *x: getattr((out := run(x, 4, **options)).state, part)[0] + 0 * everything(out).sum(), inputs
    )
    found = grads_of(lambda *x: getattr(run(x, 4, **options).state, part)[0], inputs)
    for name, e, g in zip(names(inputs), expected, found, strict=True):
        assert_close(f"gradient of {name}", e, g, 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@pytest.mark.parametrize("keys", ["random", "alike", "one"])
def test_rounding_is_that_of_the_loop_over_chunks(monkeypatch, keys, chunk_size):
    """Against fp64 in blocks of 32 with the rates of a new memory, also where all keys are one and N is dense."""
    monkeypatch.setattr(reference, "block_width", lambda *_: 32)
    inputs = make(length=256, key=16, value=16, dtype=torch.float32)
    keep = {"random": 1.0, "alike": 0.1, "one": 0.0}[keys]
    inputs[1] = torch.nn.functional.normalize(inputs[1][:, :1] + keep * (inputs[1] - inputs[1][:, :1]), dim=-1)
    inputs[0] = inputs[1]
    for i, scale in ((3, 0.1), (4, 0.3), (5, 0.01)):
        inputs[i] = inputs[i] * scale
    function = lambda *x: everything(run(x, chunk_size))  # noqa: E731

    def found(*x):
        return [function(*x), *grads_of(function, x)]

    exact = found(*(x.double() for x in inputs))
    chunks, of_blocks = by_chunks(monkeypatch, found, *inputs), found(*inputs)
    for name, e, c, b in zip(("all", *names(inputs)), exact, chunks, of_blocks, strict=True):
        assert relative_error(e, b) <= max(2 * relative_error(e, c), 2e-6), name


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 20])
def test_segments_in_blocks_equal_segments_in_chunks(monkeypatch, chunk_size, momentum):
    """Memories that go on inside a chunk, an empty one, and padding; all gradients."""
    q, k, v, lr, *gates, w = make(length=70)
    gates = gates if momentum else [None, gates[1]]
    memory = w.expand(2, 4, 3 if momentum else 2, *w.shape).clone() * torch.rand(2, 4, 1, 1, 1, 1)
    position, cu_seqlens = torch.tensor([[0, 5, 1, 2]] * 2), torch.tensor([[0, 33, 33, 60, 66], [0, 1, 40, 41, 70]])
    given = [x for x in (q, k, v, lr, *gates, memory) if x is not None]

    def call(*x):
        *tokens, memory = x
        tokens = tokens if momentum else [*tokens[:4], None, tokens[4]]
        state = SegmentedMemoryState(memory, position)
        o, after = segmented_neural_memory(*tokens, chunk_size=chunk_size, cu_seqlens=cu_seqlens, state=state)
        return torch.cat([o.flatten(), after.memory.flatten()])

    made = []
    for short in (False, True):
        monkeypatch.setattr(segmented, "in_blocks", lambda *_: short)  # noqa: B023
        made.append([call(*given), *grads_of(call, given)])
    for i, (e, g) in enumerate(zip(*made, strict=True)):
        assert_close(f"{i}", e, g, 1e-12)
