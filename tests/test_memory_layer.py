"""``memlm.layer``: every memory as a layer of a user's own model."""

import copy
import doctest

import pytest
import torch

import memlm
import memlm.memory_layer
from memlm.memory.state import mapped
from memlm.roles import Roles
from memlm_kernels.testing import assert_close
from tests.conftest import MEMORIES, model_config

EXACT = 1e-10


def layer_of(memory, **changed):
    """The layer of a YAML of configs/memory, moved off its initialisation, where gates are symmetric."""
    torch.manual_seed(0)
    settings = model_config(memory).mixers["memory"] | changed
    layer = memlm.layer(settings.pop("kind"), hidden_size=32, num_attention_heads=2, **settings).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return layer


def inputs(rows=2, tokens=44):
    return torch.randn(rows, tokens, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("memory", MEMORIES)
def test_any_division_of_a_stream_is_the_same(memory):
    layer, x, pieces, state = layer_of(memory).eval(), inputs(), [], None
    with torch.no_grad():
        y, after = layer(x)
        for piece in x.split([16, 1, 20, 1, 6], 1):
            out, state = layer(piece, None if state is None else state.to("cpu").detach())
            pieces.append(out)
    assert_close("outputs", y, torch.cat(pieces, 1), EXACT)
    assert isinstance(after, dict) and after["position"].tolist() == [44, 44]
    assert y[:, :3].abs().sum() > 0 and not y.isnan().any()


@pytest.mark.parametrize("memory", MEMORIES)
def test_gradients_reach_parameters_and_the_past(memory):
    layer, x = layer_of(memory).train(), inputs(tokens=30).requires_grad_()
    first, state, aux = layer(x[:, :20], return_aux=True)
    second, detached = layer(x[:, 20:], state)[0], layer(x[:, 20:], state.detach())[0]
    (past,) = torch.autograd.grad(second.square().sum(), x, retain_graph=True)
    (cut,) = torch.autograd.grad(detached.square().sum(), x, retain_graph=True)
    assert past[:, :20].abs().sum() > 0 and cut[:, :20].abs().sum() == 0
    loss = first.square().sum() + second.square().sum() + sum(x.mean() for x in aux.values())
    loss.backward()
    reasons = getattr(layer.mixer, "without_gradient", {})
    assert [n for n, p in layer.mixer.named_parameters() if p.grad is None and n not in reasons] == []


@pytest.mark.parametrize(("memory", "name"), [("mom", "balance"), ("chunk_sparse", None), ("titans_mag", None)])
def test_auxiliary_losses_come_with_the_call_that_asks(memory, name):
    layer, x = layer_of(memory).train(), inputs(rows=3)
    y, _, aux = layer(x, return_aux=True)
    assert len(layer(x)) == 2 and torch.equal(layer(x)[0], y)
    assert name in {None, *aux} and all(loss.shape == (3,) for loss in aux.values())


@pytest.mark.parametrize("memory", ["titans_mag", "gated_delta_net", "mom", "msa", "none"])
def test_packed_rows_and_padding(memory):
    layer, x = layer_of(memory).eval(), inputs(rows=1)
    with torch.no_grad():
        alone = [layer(piece)[0] for piece in x.split([20, 24], 1)]
        places = torch.cat([torch.arange(20), torch.arange(24)])[None]
        assert_close("packed", torch.cat(alone, 1), layer(x, position_ids=places)[0], EXACT)
        both = torch.cat([x, x.flip(1)])
        both[1, 20:] = float("nan")
        y, state = layer(both, lengths=torch.tensor([44, 20]))
        short, after = layer(x.flip(1)[:, :20])
        assert_close("padded", short, y[1:, :20], EXACT)
        more = inputs(rows=1, tokens=5)
        rows = type(state)(mapped(lambda v: v[1:], state))
        assert_close("what follows", layer(more, after)[0], layer(more, rows)[0], EXACT)


def test_documents_of_memory_sparse_attention():
    layer, x = layer_of("msa").train(), inputs(rows=1)
    doc_ids = torch.tensor([1] * 16 + [2] * 16 + [memlm.roles.QUERY] * 6 + [memlm.roles.RESPONSE] * 6)[None]
    y, state, aux = layer(x, roles=Roles(doc_ids, doc_ids == 2), return_aux=True)
    assert aux["router"].shape == (1,) and state["documents"].tolist() == [2]
    assert (y[:, 38:] - layer(x)[0][:, 38:]).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kind="titan_lmm"), "layer.kind='titan_lmm' is unknown; did you mean 'titans_lmm'?"),
        (dict(kind=None), "layer.kind=None is unknown; one of: "),
        (dict(chunk_sise=4), "layer.chunk_sise=4 is not a setting; did you mean 'chunk_size'?"),
        (dict(chunk_size="4"), "layer.chunk_size='4' must be int"),
        (dict(chunk_size=0), "layer.chunk_size=0 must be at least 1"),
        (dict(hidden_size=0), "layer.hidden_size=0 must be at least 1"),
        (dict(hidden_size=3.5), "layer.hidden_size=3.5 must be int"),
        (dict(num_attention_heads=5), "layer.hidden_size=32 does not divide into 5 heads"),
        (dict(num_attention_heads=4, num_key_value_heads=3), "layer.num_key_value_heads=3 does not divide"),
    ],
)
def test_a_wrong_layer_is_one_line(arguments, message):
    with pytest.raises(ValueError) as error:
        memlm.layer(**dict(kind="titans_lmm", hidden_size=32) | arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=torch.zeros(2, 5, 31)), "must be floating, [batch, tokens, hidden_size=32]"),
        (dict(x=torch.zeros(5, 32)), "torch.float32 [5, 32] must be floating"),
        (dict(x=torch.zeros(2, 5, 32).long()), "torch.int64"),
        (dict(state={"position": torch.zeros(2)}), "state of position is of another kind of layer"),
        (dict(x=torch.zeros(3, 5, 32)), "state has 2 rows, and x has 3"),
        (dict(position_ids=torch.arange(5)), "position_ids [5] must be [2, 5]"),
        (dict(position_ids=torch.full((2, 5), 9)), "position_ids: 9 in row 0 must be 4, to continue"),
        (dict(lengths=torch.tensor([5])), "lengths [1] must be [2]"),
        (dict(roles=Roles(torch.ones(2, 4))), "roles.doc_ids [2, 4] must be [batch, tokens] = [2, 5]"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, message):
    layer = memlm.layer("titans_lmm", hidden_size=32)
    _, state = layer(torch.zeros(2, 4, 32))
    with pytest.raises(ValueError) as error:
        layer(**dict(x=torch.zeros(2, 5, 32), state=state) | arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_layer_is_initialised_as_in_the_decoder():
    """Its engineered start, its zeros and its norms; the same numbers from the same seed."""
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(memlm.layer("titans_mag", hidden_size=384).state_dict())
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    projections = [x for name, x in weights[0].items() if name.endswith("q_proj.weight")]
    assert projections and all(0.015 < x.std() < 0.025 for x in projections)
    assert all((x == 1).all() for name, x in weights[0].items() if name.endswith("norm.weight"))


@pytest.mark.parametrize("memory", ["titans_mag", "mom", "msa"])
def test_a_layer_is_copied_and_saved_as_any_module(memory, tmp_path):
    layer, x = layer_of(memory).eval(), inputs()
    y, state = layer(x[:, :20])
    torch.save({"layer": layer.state_dict(), "state": dict(state)}, tmp_path / "layer.pt")
    saved, other = torch.load(tmp_path / "layer.pt", weights_only=True), copy.deepcopy(layer)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(saved["layer"])
    assert torch.equal(other(x[:, :20])[0], y)
    assert torch.equal(other(x[:, 20:], saved["state"])[0], layer(x[:, 20:], state)[0])


def test_the_example_of_the_docstring_runs():
    assert doctest.testmod(memlm.memory_layer).attempted > 0 == doctest.testmod(memlm.memory_layer).failed
