"""The chunked form against LaCT's update, one token at a time, with inner gradients by autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memlm_kernels import large_chunk_memory
from memlm_kernels.large_chunk_memory import MUON, naive
from memlm_kernels.large_chunk_memory.naive import swiglu
from memlm_kernels.testing import assert_close, grads_of

NAMES = ("q", "k", "v", "lr", "momentum", "W1", "W2", "W3")


def token_by_token(q, k, v, lr, momentum, *initial, **options):
    """The reads, and the weights, gradient and momentum after the last token, a list of [B, H, in, out] each."""
    out, after = torch.zeros_like(v), []
    for b, h in itertools.product(range(len(q)), range(q.shape[2])):
        tokens = [None if x is None else x[b, :, h] for x in (q, k, v, lr, momentum)]
        out[b, :, h], *states = naive.large_chunk_memory(tokens, [w[h] for w in initial], **options)
        after.append([w for state in states for w in state])
    parts = [torch.stack(x).unflatten(0, (len(q), -1)) for x in zip(*after, strict=True)]
    return out, parts[:3], parts[3:6], parts[6:]


def make(batch=2, length=23, heads=2, key=5, value=4, width=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k = (F.normalize(rand(batch, length, heads, key), dim=-1) for _ in range(2))
    v = rand(batch, length, heads, value)
    lr, momentum = F.softplus(rand(batch, length, heads, 3) - 1), torch.sigmoid(rand(batch, length, heads))
    weights = [rand(heads, i, o) * i**-0.5 for i, o in ((key, width), (width, value), (key, width))]
    return [x.to(dtype) for x in (q, k, v, lr, momentum, *weights)]


def run(inputs, chunk_size, **options):
    return large_chunk_memory(*inputs[:5], weights=inputs[5:], chunk_size=chunk_size, **options)


def assert_same_state(expected, got, tolerance=1e-12):
    for name, e, g in zip(got._fields[:4], expected, got, strict=False):
        assert len(e) == len(g), name
        for x, y in zip(e, g, strict=True):
            assert_close(name, x, y, tolerance)


EACH_RULE = pytest.mark.parametrize("muon_steps", [0, 5])


@EACH_RULE
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (1, 1), (12, 4), (23, 4), (7, 1), (9, 16)])
def test_equals_the_token_recurrence(length, chunk_size, muon_steps):
    inputs = make(length=length)
    expected, *states = token_by_token(*inputs, chunk_size=chunk_size, muon_steps=muon_steps)
    o, state = run(inputs, chunk_size, muon_steps=muon_steps)
    assert_close("o", expected, o, 1e-12)
    assert_same_state(states, state._replace(momentum_sum=()))
    assert_close(
        "momentum_sum", inputs[4][:, length - length % chunk_size :].sum(1), state.momentum_sum[0][..., 0, 0], 1e-12
    )
    assert state.position.tolist() == [length] * 2


def test_without_momentum_a_step_is_the_gradient_alone():
    inputs = make()
    inputs[4] = None
    expected, weights, *_ = token_by_token(*inputs, chunk_size=4)
    o, state = run(inputs, 4)
    assert_close("o", expected, o, 1e-12)
    assert_same_state([weights], state)


@EACH_RULE
@pytest.mark.parametrize("has_momentum", [True, False])
def test_gradients_equal_those_of_the_token_recurrence(muon_steps, has_momentum):
    inputs = make(length=14)
    kept = inputs if has_momentum else inputs[:4] + inputs[5:]
    back = lambda x: x if has_momentum else (*x[:4], None, *x[4:])  # noqa: E731
    rule = dict(chunk_size=4, muon_steps=muon_steps)
    expected = grads_of(lambda *x: token_by_token(*back(x), **rule)[0], kept)
    got = grads_of(lambda *x: run(back(x), **rule)[0], kept)
    names = NAMES if has_momentum else NAMES[:4] + NAMES[5:]
    for name, e, g in zip(names, expected, got, strict=True):
        assert e.any(), name
        assert_close(f"gradient of {name}", e, g, 1e-12)


@EACH_RULE
def test_gradcheck(muon_steps):
    inputs = [x.requires_grad_() for x in make(batch=1, length=7, heads=1, key=2, value=2, width=3)]
    assert torch.autograd.gradcheck(lambda *x: run(x, 3, muon_steps=muon_steps)[0], inputs)


@EACH_RULE
def test_gradients_through_the_state_equal_those_of_one_call(muon_steps):
    inputs = make(length=19)

    def pieces(*x):
        state, out = None, []
        for piece in zip(*(t.split([6, 1, 12], 1) for t in x[:5]), strict=True):
            o, state = run([*piece, *x[5:]], 4, state=state, muon_steps=muon_steps)
            out.append(o)
        return torch.cat(out, 1)

    expected = grads_of(lambda *x: run(x, 4, muon_steps=muon_steps)[0], inputs)
    for name, e, g in zip(NAMES, expected, grads_of(pieces, inputs), strict=True):
        assert_close(f"gradient of {name}", e, g, 1e-12)


@EACH_RULE
@pytest.mark.parametrize("cuts", [[1] * 23, [5, 1, 1, 9, 7], [4, 8, 11], [22, 1], [0, 23, 0]])
def test_any_division_into_calls_gives_the_same(cuts, muon_steps):
    inputs = make()
    expected, expected_state = run(inputs, 4, muon_steps=muon_steps)
    state, pieces = None, []
    for piece in zip(*(x.split(cuts, 1) for x in inputs[:5]), strict=True):
        o, state = run([*piece, *inputs[5:]], 4, state=state, muon_steps=muon_steps)
        pieces.append(o)
    assert_close("o", expected, torch.cat(pieces, 1), 1e-12)
    assert_same_state(expected_state, state)
    assert torch.equal(expected_state.position, state.position)


def in_calls(inputs, cuts, known, **options):
    """The reads of all calls and the state after them; known: whether calls get their ``start``."""
    state, out, start = None, [], 0
    for piece in zip(*(x.split(cuts, 1) for x in inputs[:5]), strict=True):
        o, state = run([*piece, *inputs[5:]], 4, state=state, start=start if known else None, **options)
        out.append(o)
        start += o.shape[1]
    return torch.cat(out, 1), state


@EACH_RULE
@pytest.mark.parametrize("cuts", [[1] * 23, [5, 1, 1, 9, 7], [4, 8, 11], [6, 2, 15]])
def test_a_start_that_the_host_knows_changes_nothing(cuts, muon_steps):
    inputs = make(key=4, value=5)
    expected, expected_state = in_calls(inputs, cuts, False, muon_steps=muon_steps)
    o, state = in_calls(inputs, cuts, True, muon_steps=muon_steps)
    assert_close("o", expected, o, 1e-12)
    assert_same_state(expected_state, state)
    assert_close("momentum_sum", expected_state.momentum_sum[0], state.momentum_sum[0], 1e-12)
    assert torch.equal(expected_state.position, state.position)
    expected, got = (
        grads_of(lambda *x, known=known: in_calls(x, cuts, known, muon_steps=muon_steps)[0], inputs)
        for known in (False, True)
    )
    for name, e, g in zip(NAMES, expected, got, strict=True):
        assert_close(f"gradient of {name}", e, g, 1e-12)


@pytest.mark.parametrize(
    ("packed", "muon_steps"),
    # Muon's gradient is one more function in the path without it.
    [(True, 5), *(pytest.param(*others, marks=pytest.mark.slow) for others in ((True, 0), (False, 0), (False, 5)))],
)
def test_gradcheck_of_the_state(packed, muon_steps):
    """All results of a call, in all its inputs, over a document's start and over a call that starts inside a chunk."""
    tokens = make(length=7, heads=1, key=2, value=3, width=2)
    first = make(length=3, heads=1, key=2, value=3, width=2, seed=1)
    first[5:] = tokens[5:]
    before, given = run(first, 3, muon_steps=muon_steps)[1], {"start": 3}
    if packed:
        # The second row's first document is new.
        given = {"cu_seqlens": torch.tensor([[0, 3, 7], [0, 6, 7]])}
        before = before._replace(position=torch.tensor([3, 0]))
    kept = [x.detach() for part in before[:4] for x in part]
    inputs = [x.requires_grad_() for x in (*tokens, *kept)]

    def call(*x):
        state = before._replace(weights=x[8:11], gradient=x[11:14], momentum=x[14:17], momentum_sum=x[17:])
        o, after = run(x[:8], 5, state=state, muon_steps=muon_steps, **given)
        return o, *(x for part in after[:4] for x in part)

    assert torch.autograd.gradcheck(call, inputs)


def test_a_token_that_ends_no_chunk_and_a_chunk_take_few_operations():
    inputs = [x.requires_grad_() for x in make(batch=1, length=32)]
    state = run([x[:, :5] for x in inputs[:5]] + inputs[5:], 4)[1]
    token = [x[:, :1] for x in inputs[:5]] + inputs[5:]
    with torch.no_grad():
        assert operations(lambda: run(token, 4, state=state, start=5)) <= 50

    def training(length):
        return operations(lambda: run([x[:, :length] for x in inputs[:5]] + inputs[5:], 4)[0].sum().backward())

    # The same number of groups of chunks, with one more chunk in each.
    assert training(4 * 6) - training(4 * 4) <= 2 * 110


def operations(call):
    class Count(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += 1
            return func(*args, **(kwargs or {}))

    with Count() as count:
        call()
    return count.found


def test_packed_documents_equal_documents_alone():
    inputs, lengths = make(batch=1), [3, 1, 8, 11]
    cu_seqlens = torch.tensor([[0, *itertools.accumulate(lengths)]])

    def alone(*x):
        parts = zip(*(t.split(lengths, 1) for t in x[:5]), strict=True)
        return torch.cat([run([*part, *x[5:]], 4)[0] for part in parts], 1)

    def packed(*x):
        return run(x, 4, cu_seqlens=cu_seqlens)[0]

    assert_close("o", alone(*inputs), packed(*inputs), 1e-12)
    for name, e, g in zip(NAMES, grads_of(alone, inputs), grads_of(packed, inputs), strict=True):
        assert_close(f"gradient of {name}", e, g, 1e-12)
    state = run(inputs, 4, cu_seqlens=cu_seqlens)[1]
    last = run([x[:, -11:] for x in inputs[:5]] + inputs[5:], 4)[1]
    assert_same_state(last, state)
    assert state.position.tolist() == [11]


def test_rows_of_different_length_stop_and_go_on_at_their_own_place():
    inputs = make(batch=3, length=20)
    lengths = torch.tensor([7, 0, 13])
    expected, expected_state = run(inputs, 4)
    ragged = [torch.full_like(x[:, :13], 9.0) for x in inputs[:5]]
    rest = [torch.full_like(x, 9.0) for x in inputs[:5]]
    for b, n in enumerate(lengths.tolist()):
        for x, start, end in zip(inputs[:5], ragged, rest, strict=True):
            start[b, :n], end[b, : 20 - n] = x[b, :n], x[b, n:]
    one, state = run([*ragged, *inputs[5:]], 4, cu_seqlens=F.pad(lengths[:, None], (1, 0)))
    two, state = run([*rest, *inputs[5:]], 4, cu_seqlens=F.pad(20 - lengths[:, None], (1, 0)), state=state)
    for b, n in enumerate(lengths.tolist()):
        assert_close(f"row {b}", expected[b], torch.cat([one[b, :n], two[b, : 20 - n]]), 1e-12)
    assert not one[1].any()
    assert_same_state(expected_state, state)
    assert state.position.tolist() == [20, 20, 20]


def test_a_written_column_keeps_the_norm_it_had():
    inputs = make()
    for muon_steps in (0, 5):
        for before, after in zip(inputs[5:], run(inputs, 4, muon_steps=muon_steps)[1].weights, strict=True):
            assert_close("norm", before.norm(dim=1).expand(2, -1, -1), after.norm(dim=2), 1e-12)
            assert not torch.allclose(before, after[0])


def test_muon_steps_draw_singular_values_to_one():
    """The first chunk's step has the gradient's singular vectors, and the polynomials give its singular values."""
    inputs = make(batch=1, length=4, heads=1, key=3, value=3, width=3)
    inputs[4] = None
    _, _, gradient, _ = token_by_token(
        *[x[:, :4] if i < 5 and x is not None else x for i, x in enumerate(inputs)], chunk_size=8
    )
    _, state = run(inputs, 4, muon_steps=5)
    for w, g, after in zip(inputs[5:], gradient, state.weights, strict=True):
        u, s, vh = torch.linalg.svd(g[0, 0])
        s = s / s.norm()
        for a, b, c in MUON:
            s = a * s + b * s**3 + c * s**5
        moved = w[0] + u @ s.diag() @ vh
        assert_close("written", moved / moved.norm(dim=0) * w[0].norm(dim=0), after[0, 0], 1e-12)
        assert (s[:2] - 1).abs().max() < 0.3


def test_an_update_descends_on_the_inner_loss():
    q, k, v, lr, _, *weights = make(batch=1, length=8)
    _, state = large_chunk_memory(q, k, v, 0.01 * lr, None, weights=weights, chunk_size=8)
    before, after = (
        (swiglu(k[0].transpose(0, 1), w) * v[0].transpose(0, 1)).sum((1, 2))
        for w in (weights, [w[0] for w in state.weights])
    )
    assert (after > before).all()


def test_a_state_is_no_view_of_the_parameters():
    inputs = make(batch=1, length=2, dtype=torch.float32)
    _, state = run(inputs, 4)
    kept = [w.clone() for w in state.weights]
    for w in inputs[5:]:
        w.zero_()
    assert all(torch.equal(a, b) for a, b in zip(kept, state.weights, strict=True))


def test_what_is_kept_for_backward_is_a_memory_for_each_group_of_chunks():
    """256 chunks have 256 memories. 16 of them (weights, gradient, momentum) are kept beside the tokens."""
    inputs = make(batch=1, length=1024, heads=1, key=64, value=64, width=64, dtype=torch.float32)
    kept = {}

    def count(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        run([x.requires_grad_() for x in inputs], 4)
    assert sum(kept.values()) < 16 * 3 * (3 * 64 * 64) + 1024 * 4 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_accumulate_in_fp32(dtype):
    rounded = [x.to(dtype) for x in make(length=75, key=16, value=16)]
    o, state = run(rounded, 16)
    assert o.dtype == dtype and all(x.dtype == torch.float32 for part in state[:4] for x in part)
    assert_close("o", run([x.float() for x in rounded], 16)[0].to(dtype), o, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(chunk_size=0), "chunk_size=0 must be at least 1"),
        (dict(muon_steps=-1), r"muon_steps=-1 must be 0 \(none\) to 5"),
        (dict(muon_steps=6), "muon_steps=6"),
        (dict(backend="triton"), "backend='triton' cannot run"),
        (dict(cu_seqlens=torch.zeros(2, 2)), "cu_seqlens is float32; give int64 or int32"),
        (dict(cu_seqlens=torch.tensor([[0, 3]])), r"cu_seqlens \[1, 2\] must be integers \[B, D \+ 1\] with B=2"),
        (dict(cu_seqlens=torch.tensor([[0, 3], [1, 3]])), "cu_seqlens must start at 0 in each row"),
        (dict(start=-1), "start=-1 must be at least 0"),
        (dict(start=0, cu_seqlens=torch.tensor([[0, 3]] * 2)), "start=0 must be .* None with cu_seqlens"),
    ],
)
def test_bad_options_are_named(change, message):
    inputs = make()
    with pytest.raises(ValueError, match=message):
        run(inputs, **{"chunk_size": 4, **change})


def test_bad_shapes_are_named():
    q, k, v, lr, momentum, *weights = make()
    for bad, message in (
        ((q, k[:, 1:], v, lr, momentum, *weights), r"k \[2, 22, 2, 5\]"),
        ((q, k, v[:, 1:], lr, momentum, *weights), r"v \[2, 22, 2, 4\]"),
        ((q, k, v, lr[..., 0], momentum, *weights), r"lr \[2, 23, 2\] must be \[B, T, H, 3\] = \[2, 23, 2, 3\]"),
        ((q, k, v, lr, momentum[..., :1], *weights), r"momentum \[2, 23, 1\] must be \[B, T, H\] = \[2, 23, 2\]"),
        ((q, k, v[..., :3], lr, momentum, *weights), "with H=2, K=5, V=3 and one F"),
        ((q, k, v, lr, momentum, *weights[:2]), r"weights \[\[2, 5, 6\], \[2, 6, 4\]\] must be"),
        ((q, k, v, lr, momentum), r"weights \[\] must be"),
    ):
        with pytest.raises(ValueError, match=message):
            run(bad, 4)


def test_bad_states_are_named():
    inputs = make(length=6)
    state, other = run(inputs, 4)[1], run(make(batch=3), 4)[1]
    for changed, message in (
        (other, r"state.weights holds \[\[3, 2, 5, 6\]"),
        (state._replace(position=state.position[:1]), "position"),
        (state._replace(momentum=()), "state lacks momentum"),
        (state._replace(gradient=other.gradient), r"state.gradient holds \[\[3, 2, 5, 6\]"),
        (state._replace(momentum=other.momentum), r"state.momentum holds \[\[3, 2, 5, 6\]"),
        (state._replace(momentum_sum=other.momentum_sum), r"state.momentum_sum holds \[\[3, 2, 1, 1\]\], expected"),
    ):
        with pytest.raises(ValueError, match=message):
            run(inputs, 4, state=changed)
