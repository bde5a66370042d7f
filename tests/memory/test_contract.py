"""The contract of every memory: run on every YAML of configs/memory and every VARIANT.

All comparisons are between whole models in fp64, so that 1e-10 means equal.
"""

import copy

import pytest
import torch

from memlm import MemLMForCausalLM, MemoryCache
from memlm.memory import chunk_sparse, eidetic, parts
from memlm.memory.base import SequenceMixer
from memlm.memory.state import leaves, named
from memlm_kernels.testing import assert_close, relative_error
from tests.conftest import build, same_state, variants

pytestmark = pytest.mark.parametrize("variant", variants())
EXACT = 1e-10
VOCAB = 259
_MODELS: dict[str, MemLMForCausalLM] = {}


def model_of(variant) -> MemLMForCausalLM:
    """A model that the tests share: they do not change it."""
    name, settings = variant
    key = repr(variant)
    if key not in _MODELS:
        _MODELS[key] = build(name, **settings)
    return _MODELS[key]


def in_training(variant, dtype=torch.float64) -> MemLMForCausalLM:
    """A copy of that model in training mode, which a test may change."""
    return copy.deepcopy(model_of(variant)).to(dtype).train()


def tokens(batch, length, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def stream(model, ids, cuts, cache=None, **kwargs):
    """Feed a stream in pieces. Returns the joined outputs, and the memory after it."""
    cache = MemoryCache() if cache is None else cache
    with torch.no_grad():
        out = [model(piece, past_key_values=cache, **kwargs).logits for piece in ids.split(cuts, 1)]
    return torch.cat(out, 1), cache


def assert_same_memory(expected: MemoryCache, got: MemoryCache, tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(expected.states, got.states, strict=True)):
        a, b = named(a), named(b)
        assert a.keys() == b.keys()
        for name in a:
            if a[name].numel():
                assert_close(f"state {i}.{name}", a[name], b[name], tolerance)


@pytest.mark.parametrize(
    "cuts",
    [[5, 1, 1, 44, 24], pytest.param([16, 16, 32, 10, 1], marks=pytest.mark.kinds)],
    ids=str,
)
def test_streaming_any_division_of_the_stream_is_the_same(variant, cuts):
    model, ids = model_of(variant), tokens(2, sum(cuts))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    pieces, _ = stream(model, ids, cuts)
    assert_close("logits", whole, pieces, EXACT)


@pytest.mark.kinds
def test_streaming_token_by_token_is_the_same(variant):
    """From the start over the ends of the first chunks, and after many tokens over the end of a long chunk."""
    test_streaming_any_division_of_the_stream_is_the_same(variant, [*[1] * 18, 30, *[1] * 18])


@pytest.mark.kinds
def test_writes_stand_at_absolute_positions(variant):
    """The memory after a stream does not depend on how the stream was cut; nor do later outputs."""
    model, ids = model_of(variant), tokens(2, 60)
    _, one = stream(model, ids, [60])
    _, many = stream(model, ids, [7, 20, 1, 32])
    more = tokens(2, 40, seed=1)
    assert_close("what follows", stream(model, more, [40], one)[0], stream(model, more, [40], many)[0], EXACT)


def test_causality(variant):
    """Each row has another token changed."""
    model, places = in_training(variant), (0, 37, 73)
    ids = tokens(len(places), 74)
    edited = ids.clone()
    for row, place in enumerate(places):
        edited[row, place] = (edited[row, place] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(ids).logits, model(edited).logits
    for place, a, b in zip(places, before, after, strict=True):
        assert (a[:place] - b[:place]).abs().sum() == 0 or relative_error(a[:place], b[:place]) < 1e-14
        assert relative_error(a[place:], b[place:]) > 1e-6


@pytest.mark.kinds
def test_rows_are_isolated(variant):
    model, ids = model_of(variant), tokens(3, 50)
    other = ids.clone()
    other[1] = tokens(1, 50, seed=9)
    with torch.no_grad():
        a, b, alone = model(ids).logits, model(other).logits, model(ids[2:]).logits
    assert_close("row 0", a[0], b[0], EXACT)
    assert_close("row 2 alone", a[2:], alone, EXACT)


@pytest.mark.kinds
def test_packed_documents_equal_documents_alone(variant):
    model, lengths = model_of(variant), [[20, 1, 33, 6], [3, 17, 25, 15]]
    ids = tokens(2, 60)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        packed = model(ids, position_ids=positions, max_documents=4).logits
        counted = model(ids, position_ids=positions).logits
        assert_close("counted documents", packed, counted, EXACT)
        for row, sizes in enumerate(lengths):
            alone = [model(piece).logits for piece in ids[row : row + 1].split(sizes, 1)]
            assert_close(f"row {row}", torch.cat(alone, 1), packed[row : row + 1], EXACT)


@pytest.mark.kinds
def test_packed_documents_stream_over_any_cut(variant):
    model, ids = model_of(variant), tokens(1, 60)
    positions = torch.cat([torch.arange(n) for n in (20, 1, 33, 6)])[None]
    cache, out = MemoryCache(), []
    with torch.no_grad():
        whole = model(ids, position_ids=positions, max_documents=4).logits
        for piece, place in zip(ids.split([9, 11, 4, 1, 35], 1), positions.split([9, 11, 4, 1, 35], 1), strict=True):
            out.append(model(piece, position_ids=place, past_key_values=cache).logits)
    assert_close("logits", whole, torch.cat(out, 1), EXACT)


@pytest.mark.kinds
def test_a_stream_goes_on_from_the_last_packed_document(variant):
    """Tokens that follow without positions belong to the last document, however short it is."""
    model, tails = model_of(variant), (1, 2, 5)
    ids, more = tokens(3, 25), tokens(3, 30, seed=2)
    positions = torch.stack([torch.cat([torch.arange(25 - tail), torch.arange(tail)]) for tail in tails])
    cache = MemoryCache()
    with torch.no_grad():
        model(ids, position_ids=positions, past_key_values=cache)
        got = torch.cat([model(piece, past_key_values=cache).logits for piece in more.split([1, 29], 1)], 1)
        for row, tail in enumerate(tails):
            alone = model(torch.cat([ids[row, -tail:], more[row]])[None]).logits[0, tail:]
            assert_close(f"after {tail} tokens", alone, got[row], EXACT)


def test_rows_without_tokens_wait(variant):
    """A call does not change a row whose tokens are all padding in it."""
    model, ids = model_of(variant), tokens(2, 40)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1] = 0
    cache = MemoryCache()
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
        model(ids[:, 15:25], attention_mask=mask, past_key_values=cache)
        got = model(ids[:, 25:], past_key_values=cache).logits
        assert_close("row that went on", model(ids).logits[0, 25:], got[0], EXACT)
        waited = model(torch.cat([ids[1:, :15], ids[1:, 25:]], 1)).logits[0, 15:]
        assert_close("row that waited", waited, got[1], EXACT)


def test_padding_packing_hidden_states_and_metrics_together(variant):
    model, ids = model_of(variant), tokens(1, 30)
    mask = torch.ones(1, 34, dtype=torch.long)
    where = torch.tensor([0, 7, 8, 33])
    mask[:, where] = 0
    padded, places = torch.full((1, 34), 9), torch.zeros(1, 34, dtype=torch.long)
    padded[mask.bool()] = ids[0]
    places[mask.bool()] = torch.cat([torch.arange(12), torch.arange(18)])
    with torch.no_grad():
        out = model(padded, attention_mask=mask, position_ids=places, max_documents=4, output_hidden_states=True)
        alone = [model(piece, output_hidden_states=True) for piece in ids.split([12, 18], 1)]
    assert_close("logits", torch.cat([a.logits for a in alone], 1)[0], out.logits[mask.bool()], EXACT)
    for i, hidden in enumerate(out.hidden_states):
        expected = torch.cat([a.hidden_states[i] for a in alone], 1)[0]
        assert_close(f"hidden state {i}", expected, hidden[mask.bool()], EXACT)
    for name in (name for name, x in out.metrics.items() if x.ndim):
        expected = torch.cat([a.metrics[name] for a in alone], 1)[0]
        assert_close(name, expected, out.metrics[name][mask.bool()], EXACT)


@pytest.mark.kinds
def test_padding_leaves_no_trace(variant):
    """On the left, on the right and between tokens, in rows of one batch."""
    model, width = model_of(variant), 40
    places = [range(40), range(17, 40), range(23), torch.linspace(0, 39, 23).long(), [39], [0], [20]]
    ids, mask = torch.full((len(places), width), 7), torch.zeros(len(places), width, dtype=torch.long)
    rows = {n: tokens(1, n + 30, seed=n) for n in (40, 23, 1)}
    for b, where in enumerate(places):
        ids[b, torch.as_tensor(where)], mask[b, torch.as_tensor(where)] = rows[len(where)][0, :-30], 1
    cache = MemoryCache()
    more = torch.cat([rows[len(where)][:, -30:] for where in places])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, past_key_values=cache).logits
        longer = torch.cat([mask, torch.ones(len(places), 30, dtype=torch.long)], 1)
        first = model(more[:, :1], attention_mask=longer[:, :-29], past_key_values=cache).logits
        rest = model(more[:, 1:], attention_mask=longer, past_key_values=cache).logits
        alone = {n: model(row).logits[0] for n, row in rows.items()}
    for b, where in enumerate(places):
        before, after = alone[len(where)].split([len(where), 30])
        assert_close(f"row {b}", before, padded[b][mask[b].bool()], EXACT)
        assert_close(f"after row {b}", after, torch.cat([first[b], rest[b]]), EXACT)


@pytest.mark.kinds
def test_a_place_in_the_stream_is_only_a_place_in_its_document(variant):
    """Stored keys do not depend on the place in the row: a document is the same wherever it begins."""
    model, ids = model_of(variant), tokens(1, 30)
    with torch.no_grad():
        alone = model(ids).logits
        for before in (1, 17, 200):
            row = torch.cat([tokens(1, before, seed=3), ids], 1)
            positions = torch.cat([torch.arange(before), torch.arange(30)])[None]
            shifted = model(row, position_ids=positions).logits[:, before:]
            assert_close(f"{before} tokens later", alone, shifted, EXACT)


@pytest.mark.kinds
def test_save_load_continue_is_exact(variant, tmp_path):
    model, ids = model_of(variant), tokens(2, 70)
    _, cache = stream(model, ids[:, :41], [41])
    cache.save(tmp_path)
    model.save_pretrained(tmp_path / "model")
    again = MemLMForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    for p in again.parameters():
        # Loaded weights lie unaligned in the mapped file; other SIMD paths then round differently.
        p.data = p.data.clone()
    expected, _ = stream(model, ids[:, 41:], [29], cache)
    got, _ = stream(again, ids[:, 41:], [29], MemoryCache.load(tmp_path))
    assert torch.equal(expected, got)


@pytest.mark.kinds
def test_rows_of_a_memory_can_be_moved(variant):
    model, ids, more = model_of(variant), tokens(3, 37), tokens(6, 21, seed=1)
    _, cache = stream(model, ids, [37])

    def follow(cache, rows, start):
        got, _ = stream(model, more[: len(start)], [21], cache)
        expected, _ = stream(model, torch.cat([start, more[: len(start)]], 1), [start.shape[1] + 21])
        assert_close(rows, expected[:, -21:], got, EXACT)

    moved = cache.fork()
    moved.reorder_cache(torch.tensor([2, 0, 0]))
    follow(moved, "reordered", ids[[2, 0, 0]])
    chosen = cache.fork()
    chosen.batch_select_indices(torch.tensor([1]))
    follow(chosen, "selected", ids[[1]])
    repeated = cache.fork()
    repeated.batch_repeat_interleave(2)
    follow(repeated, "repeated", ids.repeat_interleave(2, 0))
    partly = cache.fork()
    partly.reset(torch.tensor([1]))
    got, _ = stream(model, more[:3], [21], partly)
    expected, _ = stream(model, more[1:2], [21])
    assert_close("reset row", expected[0], got[1], EXACT)
    untouched, _ = stream(model, torch.cat([ids, more[:3]], 1), [58])
    assert_close("row beside it", untouched[0, -21:], got[0], EXACT)


def test_a_pure_query_changes_nothing(variant):
    model, ids, probe = model_of(variant), tokens(2, 37), tokens(2, 9, seed=1)
    _, cache = stream(model, ids, [37])
    before = copy.deepcopy(cache.states)
    with torch.no_grad():
        asked = model(probe, past_key_values=cache, write=False).logits
    for a, b in zip(before, cache.states, strict=True):
        assert same_state(a, b)
    assert cache.get_seq_length() == 37
    written, _ = stream(model, probe, [9], cache)
    assert_close("answer", written, asked, EXACT)


def test_every_parameter_gets_a_gradient(variant):
    model, ids = in_training(variant), tokens(1, 75)
    model(ids, labels=ids).loss.backward()
    excused = {
        id(p)
        for module in model.modules()
        if isinstance(module, SequenceMixer)
        for name, p in module.named_parameters()
        if name in getattr(module, "without_gradient", {})
    }
    missing = [
        name for name, p in model.named_parameters() if id(p) not in excused and (p.grad is None or not p.grad.any())
    ]
    assert not missing


@pytest.mark.kinds
@pytest.mark.parametrize(
    ("length", "dtype", "repeated"),
    [
        pytest.param(
            length,
            dtype,
            repeated,
            id=f"{length}-{'one token' if repeated else 'random'}-{dtype}",
            marks=[pytest.mark.slow] if length > 1024 or repeated == (dtype == torch.float32) else [],
        )
        for length in (1024, 16384)
        for repeated in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_finite_at_initialisation(variant, length, dtype, repeated):
    """By default random tokens in fp32, and one token repeated in bf16."""
    model = in_training(variant, dtype)
    ids = torch.zeros(1, length, dtype=torch.long) if repeated else tokens(1, length)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert torch.isfinite(out.logits).all() and torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.kinds
def test_low_precision_models_accumulate_in_fp32(variant, monkeypatch):
    """With the same choices of memories and chunks, because rounding may change a close choice."""
    low = in_training(variant, torch.bfloat16).eval()
    ids = tokens(1, 500)
    chosen, choices = [], ((parts, "top_choices"), (chunk_sparse, "chunk_topk"), (eidetic, "slot_choices"))
    with torch.no_grad():
        for module, name in choices:
            choose = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *x, c=choose, **kw: chosen.append(c(*x, **kw)) or chosen[-1])
        reference = copy.deepcopy(low).float()(ids).logits
        for module, name in choices:
            monkeypatch.setattr(module, name, lambda *x, **kw: chosen.pop(0))
        got = low(ids).logits
    assert got.dtype == torch.bfloat16
    assert_close("bf16", reference, got.float(), 2e-2)


@pytest.mark.kinds
def test_gradient_checkpointing_changes_nothing(variant):
    model, ids = in_training(variant), tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert model.model.gradient_checkpointing
    model(ids, labels=ids).loss.backward()
    for (name, p), expected in zip(model.named_parameters(), plain, strict=True):
        assert (expected is None) == (p.grad is None)
        if expected is not None:
            assert_close(name, expected, p.grad, EXACT)


@pytest.mark.kinds
def test_generate_with_memory_equals_without(variant):
    model = model_of(variant)
    ids, mask = tokens(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[1, :8] = 0
    options = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    alone = model.generate(ids[1:, 8:], **{**options, "attention_mask": mask[1:, 8:]})
    assert torch.equal(cached[1, 21:], alone[0, 13:])
    options |= {"num_beams": 3, "max_new_tokens": 3}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.kinds
def test_generate_goes_on_from_a_memory(variant):
    """Reading first and asking later equals one prompt, and a fork can be asked again."""
    model, book, question = model_of(variant), tokens(2, 50), tokens(2, 6, seed=1)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = model.generate(torch.cat([book, question], 1), **options)[:, 50:]
    _, cache = stream(model, book, [50])
    for _ in range(2):
        assert torch.equal(expected, model.generate(question, past_key_values=cache.fork(), **options))
    _, short = stream(model, book[:, :3], [3])
    mask = torch.ones_like(question)
    expected = model.generate(torch.cat([book[:, :3], question], 1), **options)[:, 3:]
    assert torch.equal(expected, model.generate(question, attention_mask=mask, past_key_values=short, **options))


def test_no_tokens_and_one_token(variant):
    model = model_of(variant)
    cache = MemoryCache()
    with torch.no_grad():
        nothing = model(tokens(2, 0), past_key_values=cache)
        one = model(tokens(2, 1), past_key_values=cache)
        assert nothing.logits.shape == (2, 0, VOCAB) and not nothing.metrics
        # A row may lack a figure that other rows have.
        assert all(torch.isfinite(x).all() for x in one.metrics.values() if x.ndim != 1)
        assert_close("first token", model(tokens(2, 1)).logits, one.logits, EXACT)
    # Views of parameters ask for gradients under no_grad too; compiled code would need a graph more.
    assert not any(x.requires_grad for state in cache.states for x in leaves(state))


def test_state_is_bounded_or_says_so(variant):
    """Except for full attention and chunks without a limit, the state after 100 tokens is as large as after 30. Its
    keys are those of ``init_state``.
    """
    model = model_of(variant)
    _, short = stream(model, tokens(1, 30), [30])
    _, long = stream(model, tokens(1, 100), [100])
    for layer, state in zip(model.model.layers, long.states, strict=True):
        start = layer.mixer.init_state(1, torch.device("cpu"), torch.float64)
        assert named(state).keys() == named(start).keys() and all(len(x) == 1 for x in leaves(state))
    held = sum(x.untyped_storage().nbytes() for state in long.states for x in leaves(state))
    assert held == long.nbytes(), "a state is a view that keeps a longer tensor alive"
    grows = variant[0] in ("attention", "chunk_sparse", "msa") and not variant[1].get("max_chunks")
    assert (long.nbytes() > short.nbytes()) == grows == model.model.layers[0].mixer.grows
