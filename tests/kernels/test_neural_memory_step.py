"""The neural memory's step of one token against its chunks."""

import pytest
import torch

from memlm_kernels.testing import Watch, assert_close, grads_of
from tests.kernels.test_neural_memory import EACH_OPTION, OPTIONS, make, names, run


@EACH_OPTION
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("told", [True, False], ids=["place known to the host", "place on the device"])
def test_a_token_a_call_equals_one_call(depth, option, told):
    """Forward, state and gradients of the step, over ends of chunks."""
    options, sizes = OPTIONS[option]
    inputs = make(length=11, depth=depth, **sizes)
    options = {name: x[:, :11] if name == "weight" else x for name, x in options.items()}

    def tokens(*x):
        state, parts = None, []
        for t in range(11):
            of_token = {name: o[:, t : t + 1] if name == "weight" else o for name, o in options.items()}
            given = [*(y[:, t : t + 1] for y in x[:6]), *x[6:]]
            out = run(given, 4, state=state, start=t if told else None, **of_token)
            state = out.state
            parts.append(out)
        return torch.cat([x.o for x in parts], 1), torch.cat([x.surprise for x in parts], 1), state

    expected, (o, surprise, state) = run(inputs, 4, **options), tokens(*inputs)
    assert_close("o", expected.o, o, 1e-12)
    assert_close("surprise", expected.surprise, surprise, 1e-12)
    for name, e, g in zip(state._fields, expected.state, state, strict=True):
        for x, y in zip(e, g, strict=True):
            assert_close(name, x, y, 1e-12)
    at_once, streamed = (lambda *x: run(x, 4, **options).o), (lambda *x: tokens(*x)[0])
    gradients = zip(grads_of(at_once, inputs), grads_of(streamed, inputs), strict=True)
    for name, (e, g) in zip(names(inputs), gradients, strict=True):
        assert_close(f"gradient of {name}", e, g, 1e-12)


@pytest.mark.parametrize("absent", [(4,), (5,), (4, 5)], ids=["momentum", "decay", "both"])
def test_a_token_a_call_without_a_gate(absent):
    inputs = make(length=9, depth=2)
    for i in absent:
        inputs[i] = None
    state, parts = None, []
    for t in range(9):
        token = [None if x is None else x[:, t : t + 1] for x in inputs[:6]]
        o, state, _ = run([*token, *inputs[6:]], 4, state=state, start=t)
        parts.append(o)
    assert_close("o", run(inputs, 4).o, torch.cat(parts, 1), 1e-12)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("length", [1, 9])
def test_surprise_is_made_where_it_is_asked_for(depth, length):
    inputs = make(length=length, depth=depth)
    expected, got = run(inputs, 4), run(inputs, 4, with_surprise=False)
    assert got.surprise is None and torch.equal(expected.o, got.o)


@pytest.mark.parametrize("told", [True, False], ids=["place known to the host", "place on the device"])
def test_a_token_sees_no_recent_token_of_an_earlier_document(told):
    """A document of one token ends a packed call, so the state also holds the token before it."""
    inputs = make(batch=1, length=6)
    state = run(
        [*(x[:, :5] for x in inputs[:6]), *inputs[6:]], 4, window=3, cu_seqlens=torch.tensor([[0, 4, 5]])
    ).state
    token = [*(x[:, 5:] for x in inputs[:6]), *inputs[6:]]
    alone = run([*(x[:, 4:] for x in inputs[:6]), *inputs[6:]], 4, window=3)
    out = run(token, 4, window=3, state=state, start=1 if told else None)
    assert_close("o", alone.o[:, 1:], out.o, 1e-12)
    assert_close("memory", alone.state.weights[0], out.state.weights[0], 1e-12)


def test_a_token_starts_a_document_in_some_rows():
    """A row whose position is 0 starts at M_0, whatever its state holds, as in a call of two tokens."""
    inputs = make(length=7)
    state = run([*(x[:, :5] for x in inputs[:6]), *inputs[6:]], 4).state
    state = state._replace(position=torch.tensor([5, 0]))
    one, two = (run([*(x[:, 5 : 5 + n] for x in inputs[:6]), *inputs[6:]], 4, state=state) for n in (1, 2))
    assert_close("o", two.o[:, :1], one.o, 1e-12)


def test_a_token_takes_few_operations():
    """A linear memory takes nine kernels and a position, with views between [B, 1, H] and rows."""
    inputs = make(length=9, heads=1)
    state = run([*(x[:, :8] for x in inputs[:6]), *inputs[6:]], 4).state
    token = [*(x[:, 8:] for x in inputs[:6]), *inputs[6:]]
    with torch.no_grad(), Watch() as watch:
        run(token, 4, state=state, start=8, with_surprise=False)
    assert watch.operations <= 28


def test_a_chunk_takes_few_operations():
    """Forward and backward, a chunk of a linear memory takes seven operations more, and a call some three hundred."""

    def training(chunks):
        inputs = [x.requires_grad_() for x in make(batch=1, heads=1, key=4, length=32 * chunks)]
        with Watch() as watch:
            run(inputs, 32, with_surprise=False).o.sum().backward()
        return watch.operations

    assert training(16) - training(8) <= 8 * 8
    assert training(8) <= 360


def test_a_block_of_chunks_takes_few_operations():
    """Forward and backward, a block of 32 tokens takes eight products, however many chunks it has."""

    def training(blocks, chunk_size):
        inputs = [x.requires_grad_() for x in make(batch=1, heads=1, key=4, length=32 * blocks)]
        with Watch() as watch:
            run(inputs, chunk_size, with_surprise=False).o.sum().backward()
        return watch.operations

    assert training(16, 1) - training(8, 1) <= 8 * 8
    assert training(8, 1) <= 450
    # One expands the rates of its chunks.
    assert training(8, 4) - training(8, 1) <= 16
