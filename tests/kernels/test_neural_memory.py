"""The dual form against the paper's recurrence, one token at a time, its gradients taken by autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from memlm_kernels import neural_memory
from memlm_kernels.testing import assert_close, grads_of, relative_error


def forward(weights, x):
    for w in weights[:-1]:
        x = F.gelu(x @ w)
    return x @ weights[-1]


def token_by_token(q, k, v, lr, momentum, decay, *weights, chunk_size, positions=None):
    """S = momentum S - lr grad at the chunk's start; M = (1 - decay) M + S; read. One document a row."""
    batch, length, heads, _ = q.shape
    positions = torch.arange(length).expand(batch, length) if positions is None else positions
    out = torch.zeros_like(v)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                if positions[b, t] == 0:
                    memory = [w[h] for w in weights]
                    surprise = [torch.zeros_like(w) for w in memory]
                if positions[b, t] % chunk_size == 0:
                    anchor = memory
                with torch.enable_grad():
                    at = [w if w.requires_grad else w.clone().requires_grad_() for w in anchor]
                    loss = 0.5 * (forward(at, k[b, t, h]) - v[b, t, h]).square().sum()
                    grads = torch.autograd.grad(loss, at, create_graph=True)
                eta, theta, alpha = momentum[b, t, h], lr[b, t, h], decay[b, t, h]
                surprise = [eta * s - theta * g for s, g in zip(surprise, grads, strict=True)]
                memory = [(1 - alpha) * w + s for w, s in zip(memory, surprise, strict=True)]
                out[b, t, h] = forward(memory, q[b, t, h])
    return out


def make(batch=2, length=23, heads=2, key=5, value=4, depth=1, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, v = (F.normalize(rand(batch, length, heads, d), dim=-1) for d in (key, key, value))
    lr, momentum, decay = (torch.sigmoid(rand(batch, length, heads) - c) for c in (1.0, 0.5, 2.0))
    sizes = [key, *[7] * (depth - 1), value]
    weights = [rand(heads, i, o) * 0.5 for i, o in itertools.pairwise(sizes)]
    return [x.to(dtype) for x in (q, k, v, lr, momentum, decay, *weights)]


def run(inputs, chunk_size, **kwargs):
    return neural_memory(*inputs[:6], weights=inputs[6:], chunk_size=chunk_size, **kwargs)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (12, 4), (23, 4), (23, 1), (9, 16)])
def test_equals_the_token_recurrence(depth, length, chunk_size):
    inputs = make(depth=depth, length=length)
    assert_close("o", token_by_token(*inputs, chunk_size=chunk_size), run(inputs, chunk_size)[0], 1e-12)


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_equal_those_of_the_token_recurrence(depth):
    inputs = make(depth=depth, length=11)
    expected = grads_of(lambda *x: token_by_token(*x, chunk_size=4), inputs)
    got = grads_of(lambda *x: run(x, 4)[0], inputs)
    for name, e, g in zip(("q", "k", "v", "lr", "momentum", "decay", "w1", "w2"), expected, got, strict=False):
        assert_close(f"gradient of {name}", e, g, 1e-12)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make(batch=1, length=5, heads=1, key=2, value=2, depth=2)]
    assert torch.autograd.gradcheck(lambda *x: run(x, 2)[0], inputs)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("cuts", [[1] * 23, [5, 1, 1, 9, 7], [4, 8, 11], [22, 1], [0, 23, 0]])
def test_any_division_into_calls_gives_the_same(depth, cuts):
    inputs = make(depth=depth)
    expected, expected_state = run(inputs, 4)
    state, pieces = None, []
    for piece in zip(*(x.split(cuts, 1) for x in inputs[:6]), strict=True):
        out, state = run([*piece, *inputs[6:]], 4, state=state)
        pieces.append(out)
    assert_close("o", expected, torch.cat(pieces, 1), 1e-12)
    for name, e, g in zip(state._fields, expected_state, state, strict=True):
        for x, y in zip(e, g, strict=True):
            assert_close(name, x, y, 1e-12)


def test_packed_documents_equal_documents_alone():
    inputs = make(batch=1, length=23, depth=2)
    lengths = [3, 1, 8, 11]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = [run([*x, *inputs[6:]], 4) for x in zip(*(x.split(lengths, 1) for x in inputs[:6]), strict=True)]
    out, state = run(inputs, 4, positions=positions, max_documents=4)
    assert_close("o", torch.cat([o for o, _ in expected], 1), out, 1e-12)
    assert_close("last memory", expected[-1][1].weights[1], state.weights[1], 1e-12)
    assert state.position.tolist() == [11]


def test_rows_of_different_length_stop_and_go_on_at_their_own_place():
    inputs = make(batch=3, length=20, depth=2)
    lengths, first = torch.tensor([7, 0, 13]), torch.tensor([7, 0, 13])
    expected, _ = run(inputs, 4)
    ragged = [torch.full_like(x[:, :13], 9.0) for x in inputs[:6]]
    rest = [torch.full_like(x[:, :20], 9.0) for x in inputs[:6]]
    for b, n in enumerate(first.tolist()):
        for x, start, end in zip(inputs[:6], ragged, rest, strict=True):
            start[b, :n], end[b, : 20 - n] = x[b, :n], x[b, n:]
    one, state = run([*ragged, *inputs[6:]], 4, lengths=lengths)
    two, state = run([*rest, *inputs[6:]], 4, lengths=20 - lengths, state=state)
    for b, n in enumerate(first.tolist()):
        assert_close(f"row {b}", expected[b], torch.cat([one[b, :n], two[b, : 20 - n]]), 1e-12)
        assert one[b, n:].abs().sum() == 0
    assert state.position.tolist() == [20, 20, 20]


def test_gates_at_their_ends_stay_finite():
    inputs = make(length=40, dtype=torch.float32)
    for gate, value in ((4, 0.0), (4, 1.0), (5, 0.0), (5, 1.0), (3, 0.0)):
        edge = list(inputs)
        edge[gate] = torch.full_like(edge[gate], value)
        assert all(torch.isfinite(g).all() for g in grads_of(lambda *x: run(x, 16)[0], edge))


def test_full_decay_forgets_all_but_the_last_write():
    inputs = make(length=9)
    inputs[5] = torch.ones_like(inputs[5])
    changed = [x.clone() for x in inputs]
    changed[1][:, 0] += 1.0
    one, two = (run(x, 1)[0] for x in (inputs, changed))
    assert relative_error(one[:, 0], two[:, 0]) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_accumulate_in_fp32(dtype):
    rounded = [x.to(dtype) for x in make(length=75, key=16, value=16)]
    out, state = run(rounded, 16)
    expected, _ = run([x.float() for x in rounded], 16)
    assert out.dtype == dtype and state.weights[0].dtype == torch.float32
    assert_close("o", expected.to(dtype), out, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(chunk_size=0), "chunk_size=0"),
        (dict(backend="triton"), "backend='triton' cannot run"),
        (dict(backend="fast"), "backend='fast'"),
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
    state = run(inputs, 4)[1]
    other = run(make(batch=3, length=6), 4)[1]
    for options, message in (
        (dict(positions=torch.arange(6)[None]), r"positions \[1, 6\] must be integers \[B, T\] = \[2, 6\]"),
        (dict(positions=torch.zeros(2, 6)), "positions"),
        (dict(lengths=torch.tensor([3])), r"lengths \[1\] must be integers \[B\] = \[2\]"),
        (dict(max_documents=0), "max_documents=0"),
        (dict(state=other), r"state holds weights \[\[3, 2, 5, 4\]\]"),
        (dict(state=state._replace(position=state.position[:1])), "position"),
    ):
        with pytest.raises(ValueError, match=message):
            run(inputs, 4, **options)
