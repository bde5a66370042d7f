"""The dual form against the paper's recurrence, one token at a time, with inner gradients by autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from memlm_kernels import neural_memory, read_memory
from memlm_kernels.neural_memory import dot_product, huber, lp, naive, reference, scan
from memlm_kernels.testing import Held, assert_close, grads_of

# Each loss as the number that is minimised; the op gets its gradient.
LOSSES = {
    None: naive.squared_error,
    dot_product: lambda y, v: -(y * v).sum(),
    (HUBER := huber(0.7)): lambda y, v: F.huber_loss((y - v).norm(), torch.zeros(()).to(v), delta=0.7),
    (L3 := lp(3.0)): lambda y, v: ((y - v).square() + 1e-6).pow(1.5).sum() / 3,
}


def token_by_token(q, k, v, lr, momentum, decay, *weights, chunk_size, norm=None, loss=None, weight=None, **options):
    tokens = (q, k, v, lr, momentum, decay, weight)
    out = torch.zeros_like(v)
    for b, h in itertools.product(range(len(q)), range(q.shape[2])):
        own = [None if x is None else x[b, :, h] for x in tokens]
        of_head = options if norm is None else {**options, "norm": [n[h] for n in norm]}
        memory = [w[h] for w in weights]
        out[b, :, h] = naive.neural_memory(own, memory, chunk_size, loss=LOSSES[loss], **of_head)
    return out


def make(batch=2, length=23, heads=2, key=5, value=4, depth=1, hidden=7, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, v = (F.normalize(rand(batch, length, heads, d), dim=-1) for d in (key, key, value))
    lr, momentum, decay = (torch.sigmoid(rand(batch, length, heads) - c) for c in (1.0, 0.5, 2.0))
    sizes = [key, *[hidden] * (depth - 1), value]
    weights = [rand(heads, i, o) * 0.5 for i, o in itertools.pairwise(sizes)]
    return [x.to(dtype) for x in (q, k, v, lr, momentum, decay, *weights)]


def make_norm(heads=2, value=5):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(heads, value, generator=g, dtype=torch.float64) for _ in range(2)]


def make_weight(batch=2, length=23, heads=2):
    # So small that six of them do not make the inner descent diverge, which would amplify rounding.
    return 0.3 * torch.rand(batch, length, heads, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# name: the op's settings, and how the tensors are made.
OPTIONS = {
    "plain": ({}, {}),
    "silu": (dict(activation="silu"), {}),
    "norm": (dict(norm=make_norm()), dict(value=5)),
    "norm_huber": (dict(norm=make_norm(), loss=HUBER), dict(value=5)),
    "huber": (dict(loss=HUBER), {}),
    "lp": (dict(loss=L3), {}),
    "dot_product": (dict(loss=dot_product), {}),
    "window": (dict(window=3), {}),
    "window_weighted": (dict(window=6, weight=make_weight(), norm=make_norm()), dict(value=5)),
    "weighted": (dict(weight=make_weight()), {}),
}
EACH_OPTION = pytest.mark.parametrize("option", OPTIONS)


def run(inputs, chunk_size, **kwargs):
    kwargs = {name: value for name, value in kwargs.items() if name != "loss" or value is not None}
    return neural_memory(*inputs[:6], weights=inputs[6:], chunk_size=chunk_size, **kwargs)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (12, 4), (23, 4), (23, 1), (9, 16)])
def test_equals_the_token_recurrence(depth, length, chunk_size):
    inputs = make(depth=depth, length=length)
    assert_close("o", token_by_token(*inputs, chunk_size=chunk_size), run(inputs, chunk_size).o, 1e-12)


@EACH_OPTION
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_option_equals_the_token_recurrence(depth, option):
    options, sizes = OPTIONS[option]
    inputs = make(depth=depth, **sizes)
    expected = token_by_token(*inputs, chunk_size=4, **options)
    assert_close("o", expected, run(inputs, 4, **options).o, 1e-12)


def test_fast_gates_leave_no_denormal_numbers():
    """A product of 64 gates of 0.25 is denormal; with such numbers, chunks of 64 take twice as long on CPUs."""
    inputs = [x.requires_grad_() for x in make(length=128, key=16, value=16, depth=2, dtype=torch.float32)]
    inputs[4] = torch.full_like(inputs[4], 0.25)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run(inputs, 64).o.sum().backward()
    tiny = torch.finfo(torch.float32).tiny
    assert saved and not any(((x != 0) & (x.abs() < tiny)).any() for x in saved if x.is_floating_point())


@pytest.mark.parametrize("gate", ["momentum", "decay"])
def test_a_gate_that_is_absent_is_a_gate_that_is_zero(gate):
    inputs = make(depth=2)
    inputs[{"momentum": 4, "decay": 5}[gate]] = None
    assert_close("o", token_by_token(*inputs, chunk_size=4), run(inputs, 4).o, 1e-12)


def names(inputs):
    return ("q", "k", "v", "lr", "momentum", "decay", *(f"w{i}" for i in range(len(inputs) - 6)))


@EACH_OPTION
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradients_equal_those_of_the_token_recurrence(depth, option):
    options, sizes = OPTIONS[option]
    inputs = make(depth=depth, length=11, **sizes)
    options = {name: x[:, :11] if name == "weight" else x for name, x in options.items()}
    extra = [name for name in ("norm", "weight") if name in options]
    tensors = [x for name in extra for x in (options[name] if name == "norm" else [options[name]])]

    def with_extra(function):
        def call(*x):
            own = list(x[len(inputs) :])
            changed = {name: [own.pop(0), own.pop(0)] if name == "norm" else own.pop(0) for name in extra}
            return function(x[: len(inputs)], **{**options, **changed})

        return call

    expected = grads_of(with_extra(lambda x, **o: token_by_token(*x, chunk_size=4, **o)), [*inputs, *tensors])
    got = grads_of(with_extra(lambda x, **o: run(x, 4, **o).o), [*inputs, *tensors])
    for name, e, g in zip([*names(inputs), *["extra"] * len(tensors)], expected, got, strict=True):
        assert_close(f"gradient of {name}", e, g, 1e-12)


@pytest.mark.parametrize("absent", [(4,), (5,), (4, 5)], ids=["momentum", "decay", "both"])
def test_gradients_without_a_gate(absent):
    inputs = make(depth=2, length=11)
    kept = [x for i, x in enumerate(inputs) if i not in absent]

    def put_back(x):
        x = list(x)
        for i in absent:
            x.insert(i, None)
        return x

    expected = grads_of(lambda *x: token_by_token(*put_back(x), chunk_size=4), kept)
    got = grads_of(lambda *x: run(put_back(x), 4).o, kept)
    for e, g in zip(expected, got, strict=True):
        assert_close("gradient", e, g, 1e-12)


@pytest.mark.parametrize(
    ("extra", "options"),
    [
        ([], lambda: {}),
        (make_norm(1, 3), lambda *norm: {"norm": norm, "loss": L3}),
        ([make_weight(1, 5, 1)], lambda weight: {"weight": weight, "window": 2, "loss": HUBER}),
    ],
    ids=["plain", "norm, lp", "window, huber"],
)
def test_gradcheck(extra, options):
    inputs = make(batch=1, length=5, heads=1, key=3, value=3, depth=2, hidden=2)
    tensors = [x.clone().requires_grad_() for x in (*inputs, *extra)]
    assert torch.autograd.gradcheck(lambda *x: run(x[:8], 2, **options(*x[8:])).o, tensors)


@pytest.mark.parametrize("option", ["plain", "window"])
def test_gradients_through_the_state_equal_those_of_one_call(option):
    """Through weights, momentum, anchor and recent tokens, with a cut inside a chunk and for packed, ragged rows."""
    options, sizes = OPTIONS[option]
    inputs = make(depth=2, length=19, **sizes)

    def pieces(*x):
        state, out = None, []
        for piece in zip(*(t.split([6, 1, 12], 1) for t in x[:6]), strict=True):
            o, state, _ = run([*piece, *x[6:]], 4, state=state, **options)
            out.append(o)
        return torch.cat(out, 1)

    expected = grads_of(lambda *x: run(x, 4, **options).o, inputs)
    for name, e, g in zip(names(inputs), expected, grads_of(pieces, inputs), strict=True):
        assert_close(f"gradient of {name}", e, g, 1e-12)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("part", ["weights", "momentum", "anchor"])
def test_gradients_of_one_result_alone(part, ragged):
    """An absent gradient counts as a zero."""
    inputs = make(depth=2, length=11)
    options = {"cu_seqlens": torch.tensor([[0, 5, 11], [0, 6, 11]])} if ragged else {}

    def alone(*x):
        return getattr(run(x, 4, **options).state, part)[1]

    def among_all(*x):
        out = run(x, 4, **options)
        others = sum(y.sum() for name in ("weights", "momentum", "anchor") for y in getattr(out.state, name))
        return getattr(out.state, part)[1] + 0 * (others + out.o.sum())

    for name, e, g in zip(names(inputs), grads_of(among_all, inputs), grads_of(alone, inputs), strict=True):
        assert_close(f"gradient of {name}", e, g, 1e-12)


def test_gradients_of_packed_documents_equal_those_of_documents_alone():
    inputs, lengths = make(batch=1, length=23, depth=2), [3, 1, 8, 11]
    cu_seqlens = torch.tensor([[0, *itertools.accumulate(lengths)]])

    def alone(*x):
        parts = zip(*(t.split(lengths, 1) for t in x[:6]), strict=True)
        return torch.cat([run([*part, *x[6:]], 4).o for part in parts], 1)

    expected = grads_of(alone, inputs)
    got = grads_of(lambda *x: run(x, 4, cu_seqlens=cu_seqlens).o, inputs)
    for name, e, g in zip(names(inputs), expected, got, strict=True):
        assert_close(f"gradient of {name}", e, g, 1e-12)


def test_a_linear_memory_without_momentum_is_the_gated_delta_rule():
    """M_t = (1 - decay_t) M_{t-1} - lr_t k_t (k_t M_{t-1} - v_t): one rank-one step per token, in closed form."""
    q, k, v, lr, _, decay, w = make(length=31)
    memory, out = w.expand(2, *w.shape), []
    for t in range(31):
        step = k[:, t, :, :, None] @ (k[:, t, :, None] @ memory - v[:, t, :, None])
        memory = (1 - decay[:, t, :, None, None]) * memory - lr[:, t, :, None, None] * step
        out.append((q[:, t, :, None] @ memory)[:, :, 0])
    got = neural_memory(q, k, v, lr, None, decay, weights=[w], chunk_size=1)
    assert_close("o", torch.stack(out, 1), got.o, 1e-12)
    assert_close("memory", memory, got.state.weights[0], 1e-12)


@pytest.mark.parametrize(("chunk_size", "length"), [(128, 300), (96, 200), (85, 210)])
def test_long_chunks_are_cut_into_blocks_that_share_an_anchor(chunk_size, length):
    """In one call, in several, packed, and in backward, the results equal those of chunks that are not cut."""
    inputs = make(batch=1, length=length, heads=1, depth=2)
    inputs[3] = inputs[3] / 30
    expected = grads_of(lambda *x: token_by_token(*x, chunk_size=chunk_size), inputs)

    def pieces(*x):
        state, out = None, []
        for piece in zip(*(t.split([77, length - 77], 1) for t in x[:6]), strict=True):
            o, state, _ = run([*piece, *x[6:]], chunk_size, state=state)
            out.append(o)
        return torch.cat(out, 1)

    assert_close("o", token_by_token(*inputs, chunk_size=chunk_size), run(inputs, chunk_size).o, 1e-12)
    assert_close("o of pieces", run(inputs, chunk_size).o, pieces(*inputs), 1e-12)
    for function in (lambda *x: run(x, chunk_size).o, pieces):
        for name, e, g in zip(names(inputs), expected, grads_of(function, inputs), strict=True):
            assert_close(f"gradient of {name}", e, g, 1e-12)


@EACH_OPTION
@pytest.mark.parametrize("cuts", [[1] * 23, [5, 1, 1, 9, 7], [4, 8, 11], [22, 1], [0, 23, 0]])
def test_any_division_into_calls_gives_the_same(option, cuts):
    options, sizes = OPTIONS[option]
    inputs = make(depth=2, **sizes)
    expected, expected_state, expected_surprise = run(inputs, 4, **options)
    weight = options.pop("weight", None) if (options := dict(options)) else None
    state, pieces, surprises = None, [], []
    streams = [*inputs[:6], torch.ones_like(inputs[3]) if weight is None else weight]
    for piece in zip(*(x.split(cuts, 1) for x in streams), strict=True):
        out, state, surprise = run([*piece[:6], *inputs[6:]], 4, state=state, weight=piece[6], **options)
        pieces.append(out)
        surprises.append(surprise)
    assert_close("o", expected, torch.cat(pieces, 1), 1e-12)
    assert_close("surprise", expected_surprise, torch.cat(surprises, 1), 1e-12)
    for name, e, g in zip(state._fields, expected_state, state, strict=True):
        for x, y in zip(e, g, strict=True):
            assert_close(name, x, y, 1e-12)


@EACH_OPTION
def test_packed_documents_equal_documents_alone(option):
    options, sizes = OPTIONS[option]
    inputs = make(batch=1, length=23, depth=2, **sizes)
    weight = options["weight"][:1] if "weight" in options else None
    options = {name: x for name, x in options.items() if name != "weight"}
    lengths = [3, 1, 8, 11]
    cu_seqlens = torch.tensor([[0, *itertools.accumulate(lengths)]])
    weights = weight.split(lengths, 1) if weight is not None else [None] * 4
    parts = zip(*(x.split(lengths, 1) for x in inputs[:6]), strict=True)
    expected = [run([*x, *inputs[6:]], 4, weight=w, **options) for x, w in zip(parts, weights, strict=True)]
    out, state, _ = run(inputs, 4, cu_seqlens=cu_seqlens, weight=weight, **options)
    assert_close("o", torch.cat([x.o for x in expected], 1), out, 1e-12)
    assert_close("last memory", expected[-1].state.weights[1], state.weights[1], 1e-12)
    assert state.position.tolist() == [11]


@pytest.mark.parametrize("option", ["plain", "window", "norm"])
def test_rows_of_different_length_stop_and_go_on_at_their_own_place(option):
    options, sizes = OPTIONS[option]
    inputs = make(batch=3, length=20, depth=2, **sizes)
    lengths, first = torch.tensor([7, 0, 13]), torch.tensor([7, 0, 13])
    expected = run(inputs, 4, **options).o
    ragged = [torch.full_like(x[:, :13], 9.0) for x in inputs[:6]]
    rest = [torch.full_like(x[:, :20], 9.0) for x in inputs[:6]]
    for b, n in enumerate(first.tolist()):
        for x, start, end in zip(inputs[:6], ragged, rest, strict=True):
            start[b, :n], end[b, : 20 - n] = x[b, :n], x[b, n:]
    one, state, _ = run([*ragged, *inputs[6:]], 4, cu_seqlens=F.pad(lengths[:, None], (1, 0)), **options)
    two, state, _ = run(
        [*rest, *inputs[6:]], 4, cu_seqlens=F.pad(20 - lengths[:, None], (1, 0)), state=state, **options
    )
    for b, n in enumerate(first.tolist()):
        assert_close(f"row {b}", expected[b], torch.cat([one[b, :n], two[b, : 20 - n]]), 1e-12)
    assert one[1].abs().sum() == 0
    assert state.position.tolist() == [20, 20, 20]


def test_surprise_is_the_norm_of_the_gradient():
    inputs = make(depth=2, length=1)
    _, k, v, *_ = inputs
    weights = [w.expand(2, *w.shape).clone().requires_grad_() for w in inputs[6:]]
    loss = 0.5 * (read_memory(k, weights) - v).square().sum()
    squares = [g.square().sum((-2, -1)) for g in torch.autograd.grad(loss, weights)]
    assert_close("surprise", sum(squares).sqrt()[:, None], run(inputs, 4).surprise, 1e-12)


@pytest.mark.parametrize("norm", [None, make_norm()])
def test_reading_a_memory_is_what_its_last_token_read(norm):
    inputs = make(depth=3, value=5)
    o, state, _ = run(inputs, 4, norm=norm)
    again = read_memory(inputs[0][:, -1:], state.weights, norm=norm)
    assert_close("read", o[:, -1:], again, 1e-12)


@pytest.mark.parametrize(
    "grouping", [(1, True, 1), (3, True, 2), (1, False, 1), (2, False, 1), (5, False, 3), (5, False, 9)], ids=str
)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("chunk_size", [32, 128])
def test_groups_change_nothing(monkeypatch, chunk_size, grouping, ragged):
    """Chunks of one block or four begin and end inside groups, whose memories are kept or computed again."""
    inputs = make(length=500, heads=1, depth=2)
    inputs[3] = inputs[3] / 30
    places = {"cu_seqlens": torch.tensor([[0, 500, 500, 500], [0, 230, 460, 500]])}

    def function(*x):
        out = run(x, chunk_size, **(places if ragged else {}))
        return torch.cat([out.o.flatten(), *(w.flatten() for part in out.state[:3] for w in part)])

    monkeypatch.setattr(reference, "block_size", lambda *_: 32)
    expected = [function(*inputs), *grads_of(function, inputs)]
    size, kept, span = grouping
    monkeypatch.setattr(scan, "group_size", lambda memories, k, keep: (size, kept and keep))
    monkeypatch.setattr(scan, "_span", lambda memories: span)
    with torch.no_grad():
        assert_close("without gradients", expected[0], function(*inputs), 1e-12)
    for name, e, g in zip(
        ("o", *names(inputs)), expected, [function(*inputs), *grads_of(function, inputs)], strict=True
    ):
        assert_close(name, e, g, 1e-12)


@pytest.mark.parametrize(("depth", "of_token"), [(1, 4 * 64), (2, 4 * 64 + 3 * 128)])
def test_what_backward_keeps_grows_with_tokens_not_with_memories(depth, of_token):
    """1024 tokens in chunks of 4 have 256 memories W and S: two million numbers, or eight million for two layers."""
    sizes = dict(length=1024, key=64, value=64, depth=depth, hidden=128)
    inputs = [x.requires_grad_() for x in make(batch=1, heads=1, dtype=torch.float32, **sizes)]
    kept = {}

    def count(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        run(inputs, 4)
    assert sum(kept.values()) < 3 * 1024 * (of_token + 64)


def large_memory(tokens):
    """A call in which W and S of two layers are 64 times as large as the activations of a chunk of one token."""
    sizes = dict(length=tokens, key=64, value=64, depth=2, hidden=256)
    return make(batch=1, heads=1, dtype=torch.float32, **sizes), 2 * 2 * 64 * 256


@pytest.mark.parametrize("chunks", [36, 144])
def test_memories_that_are_there_at_once_are_few(chunks):
    """A group of 64 chunks would hold all its memories at once, and those of the next group."""
    inputs, memory = large_memory(chunks)
    with Held() as held:
        grads_of(lambda *x: run(x, 1).o, inputs)
    assert held.most < (3 * chunks**0.5 + 8) * memory


def test_reading_without_gradients_keeps_nothing():
    """Four times the tokens need space for themselves, and not one memory more."""
    peaks = []
    for tokens in (36, 144):
        inputs, memory = large_memory(tokens)
        with Held() as held, torch.no_grad():
            run([x.requires_grad_() for x in inputs], 1)
        peaks.append(held.most)
    assert peaks[0] < 16 * memory and peaks[1] - peaks[0] < memory


def test_gates_at_their_ends_stay_finite():
    inputs = make(length=40, dtype=torch.float32)
    for gate, value in ((4, 0.0), (4, 1.0), (5, 0.0), (5, 1.0), (3, 0.0)):
        edge = list(inputs)
        edge[gate] = torch.full_like(edge[gate], value)
        assert all(torch.isfinite(g).all() for g in grads_of(lambda *x: run(x, 16).o, edge))


def test_full_decay_forgets_all_but_the_last_write():
    """A Hebbian write without momentum is lr k^T v, whatever the memory was before."""
    q, k, v, lr, _, decay, w = make(length=9)
    got = neural_memory(q, k, v, lr, None, torch.ones_like(decay), weights=[w], chunk_size=4, loss=dot_product).o
    assert_close("o", lr[..., None] * (q * k).sum(-1, keepdim=True) * v, got, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_accumulate_in_fp32(dtype):
    rounded = [x.to(dtype) for x in make(length=75, key=16, value=16)]
    out, state, _ = run(rounded, 16)
    expected = run([x.float() for x in rounded], 16).o
    assert out.dtype == dtype and state.weights[0].dtype == torch.float32
    assert_close("o", expected.to(dtype), out, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(chunk_size=0), "chunk_size=0"),
        (dict(chunk_size=101), "chunk_size=101 must be at most 64, or a multiple of a number from 16 to 64"),
        (dict(chunk_size=1018), "chunk_size=1018"),
        (dict(window=0), "window=0"),
        (dict(activation="relu"), "activation='relu' must be one of gelu, silu"),
        (dict(norm=make_norm(3, 4)), r"norm \[\[3, 4\], \[3, 4\]\] must be gain and bias \[H, V\] = \[2, 4\]"),
        (dict(norm=make_norm(2, 4)), r"norm needs K=5 equal to V=4"),
        (dict(backend="triton"), "backend='triton' cannot run"),
        (dict(backend="fast"), "backend='fast'"),
        (dict(start=4), "start=4 must be at least 0, 0 without a state"),
        (dict(start=0, cu_seqlens=torch.tensor([[0, 3]] * 2)), "start=0 must be .* None with cu_seqlens"),
    ],
)
def test_bad_options_are_named(change, message):
    inputs = make()
    with pytest.raises(ValueError, match=message):
        neural_memory(*inputs[:6], weights=inputs[6:], **{"chunk_size": 4, **change})


def test_bad_shapes_are_named():
    q, k, v, lr, momentum, decay, w = make()
    for bad, message in (
        ((q, k[:, 1:], v, lr, momentum, decay), r"k \[2, 22, 2, 5\]"),
        ((q, k, v, lr[..., 0], momentum, decay), r"lr \[2, 23\]"),
        ((q, k, v[..., :3], lr, momentum, decay), "weights"),
    ):
        with pytest.raises(ValueError, match=message):
            neural_memory(*bad, weights=[w], chunk_size=4)


def test_bad_places_are_named():
    inputs = make(batch=2, length=6)
    state = run(inputs, 4).state
    other = run(make(batch=3, length=6), 4).state
    for options, message in (
        (dict(cu_seqlens=torch.zeros(2, 2)), "cu_seqlens is float32; give int64 or int32"),
        (dict(cu_seqlens=torch.tensor([[0, 3]])), r"cu_seqlens \[1, 2\] must be integers \[B, D \+ 1\] with B=2"),
        (dict(cu_seqlens=torch.tensor([[0], [0]])), r"cu_seqlens \[2, 1\] must be integers"),
        (dict(cu_seqlens=torch.tensor([[0, 3], [1, 3]])), "cu_seqlens must start at 0 in each row"),
        (dict(state=other), r"state.weights holds \[\[3, 2, 5, 4\]\], expected \[\[2, 2, 5, 4\]\]"),
        (dict(state=state._replace(position=state.position[:1])), r"state.position \[1\] must be \[B\] = \[2\]"),
        (dict(state=state._replace(anchor=other.anchor)), r"state.anchor holds \[\[3, 2, 5, 4\]\]"),
        (dict(state=state._replace(momentum=other.momentum)), r"state.momentum holds \[\[3, 2, 5, 4\]\]"),
        (dict(state=state._replace(momentum=())), "state lacks momentum"),
        (dict(state=state, window=3), r"state.recent holds \[\], expected \[\[2, 2, 2, 5\]"),
        (dict(state=run(inputs, 4, window=2).state, window=3), r"state.recent holds \[\[2, 1, 2, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run(inputs, 4, **options)
