"""The contract of an attached memory, for families of transformers and kinds of memory.

Models run in fp64, in which only the families' own fp32 parts round.
"""

import copy
import io

import pytest
import torch

import memlm
from memlm.memory.base import kinds
from memlm_kernels.testing import assert_close
from tests.backbones import FAMILIES, VOCAB, backbone

EXACT = 1e-5
LENGTH = 23
# Small memories, so that 23 tokens fill several chunks.
KINDS = {
    "titans_lmm": dict(memory_heads=2, memory_head_dim=8, chunk_size=4),
    "omega": dict(
        kind="titans_lmm", memory_heads=2, memory_head_dim=8, chunk_size=4, omega_window=3, polynomial_degree=2
    ),
    "titans_tnt": dict(memory_head_dim=8, shard_size=8, chunk_size=8, local_chunk_sizes=[4]),
    "titans_mag": dict(memory_head_dim=8, chunk_size=4, window_size=5),
    "lact": dict(chunk_size=4, window_size=4),
    "mom": dict(head_dim=8, num_memories=3, top_k=2),
    "bmojo": dict(head_dim=8, chunk_size=4, window_size=5, eidetic_slots=3),
    "two_rate": dict(memory_head_dim=8, chunk_size=4, slow_ratio=2),
    **{
        rule: dict(head_dim=8, num_heads=2)
        for rule in ("linear_attention", "retention", "simple_gla", "gla", "delta_net", "gated_delta_net")
    },
}
# Families whose sliding windows count padding, also without a memory.
SLIDING = ("mistral", "gemma2", "gemma3_text")
# Each family once, each kind once; the rest is slow.
KIND_OF = dict(zip(FAMILIES, KINDS, strict=True))
PAIRS = [
    pytest.param(family, kind, marks=[] if KIND_OF[family] == kind else pytest.mark.slow)
    for family in FAMILIES
    for kind in KINDS
]
# The other kinds, tried briefly; the rest of the settings of a kind that has slots.
RULE = dict(head_dim=8, num_heads=2)
OTHERS = {
    "slots": dict(kind="titans_mal", memory_head_dim=8, chunk_size=4, window_size=5, eidetic_slots=3),
    "titans_mac": dict(memory_head_dim=8, chunk_size=4, segment_size=8),
    "chunk_sparse": dict(chunk_size=4, window_size=5, top_k=2),
    "msa": dict(),
    **{rule: RULE for rule in ("kda", "comba", "momentum_delta_net")},
}
# With the older checkpointing; the second has the losses of a mixture, which it refuses.
REENTRANT = ("llama", next(family for family, kind in KIND_OF.items() if kind == "mom"))
every_pair = pytest.mark.parametrize(("family", "kind"), PAIRS)


def settings(kind):
    return {"kind": kind, **KINDS[kind]}


def ids(batch=3, length=LENGTH, seed=3):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def opened(model):
    """The model with gates and memories that matter, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("memlm.gate"):
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
            elif ".memlm." in name and ".memory." in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def attached(family, kind="titans_lmm", **options):
    torch.manual_seed(0)
    return opened(memlm.attach(backbone(family, exact=True), settings(kind), [0, 2], **options)).eval()


def padded(where):
    """The rows of ``ids`` with seven pads in one place; their mask; and the positions of the real tokens."""
    pads = 7
    text, mask = torch.zeros(2, 3, LENGTH + pads, dtype=torch.long)
    for row in range(3):
        first = {"left": 0, "right": LENGTH, "middle": 5 + row}[where]
        place = [*range(first), *range(first + pads, LENGTH + pads)]
        text[row, place], mask[row, place] = ids()[row], 1
    return text, mask, (mask.cumsum(1) - 1).clamp(min=0)


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, use_cache=False, **kwargs).logits


def streamed(model, text, cuts, cache=None):
    out = []
    with torch.no_grad():
        for piece in text.split(cuts, 1):
            result = model(piece, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            out.append(result.logits)
    return torch.cat(out, 1), cache


@every_pair
def test_a_closed_gate_leaves_the_backbone_as_it_is(family, kind):
    bare = backbone(family)
    model = memlm.attach(backbone(family), settings(kind))
    assert type(model) is type(bare) and model.config.to_dict() == bare.config.to_dict()
    extra = set(model.state_dict()) - set(bare.state_dict())
    assert extra and all(".memlm." in name for name in extra) and set(bare.state_dict()) < set(model.state_dict())
    for kwargs in ({}, {"use_cache": False}, {"attention_mask": torch.ones(3, LENGTH)}):
        assert torch.equal(model(ids(), **kwargs).logits, bare(ids(), **kwargs).logits)
    assert torch.equal(memlm.detach(opened(model))(ids()).logits, bare(ids()).logits)
    assert list(model.state_dict()) == list(bare.state_dict()) and vars(model).keys() == vars(bare).keys()


def test_every_kind_but_attention_attaches():
    known = {settings.get("kind", name) for name, settings in (KINDS | OTHERS).items()}
    assert known == {*kinds()} - {"attention"}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_attach(kind):
    bare = backbone("llama", exact=True)
    torch.manual_seed(0)
    model = memlm.attach(backbone("llama", exact=True), {"kind": kind, **OTHERS[kind]}, [1]).eval()
    assert torch.equal(model(ids()).logits, bare(ids()).logits)
    whole = logits(opened(model), ids())
    assert (whole - bare(ids()).logits).abs().max() > 0.1
    assert_close("cut", whole, streamed(model, ids(), [1, 3, 5, 1, 13])[0], EXACT)


@every_pair
def test_any_division_of_a_stream_gives_the_same_outputs(family, kind):
    model = attached(family, kind)
    whole = logits(model, ids())
    assert (whole - logits(backbone(family, exact=True), ids())).abs().max() > 0.1
    for cuts in ([1, 3, 5, 1, 13], [12, 11], [1] * LENGTH):
        assert_close(f"cut at {cuts}", whole, streamed(model, ids(), cuts)[0], EXACT)


@every_pair
def test_no_output_depends_on_a_later_token_or_another_row(family, kind):
    model = attached(family, kind)
    whole, other = logits(model, ids()), ids()
    other[:, 15:], other[1] = 5, 7
    assert_close("earlier", whole[[0, 2], :15], logits(model, other)[[0, 2], :15], EXACT)


@every_pair
@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_padding_has_no_effect(family, kind, where):
    if where == "middle" and family in SLIDING:
        pytest.skip("the family's own window counts padding")
    model, (text, mask, places) = attached(family, kind), padded(where)
    whole = logits(model, ids())
    out = logits(model, text, attention_mask=mask, position_ids=places)
    assert_close(where, whole.flatten(0, 1), out[mask.bool()], EXACT)


@every_pair
@pytest.mark.parametrize("training", [False, True])
def test_packed_documents_are_independent(family, kind, training):
    model = attached(family, kind).train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    sizes = [9, 6, 8]
    alone = [logits(model, ids()[i : i + 1, :n]) for i, n in enumerate(sizes)]
    row = torch.cat([ids()[i, :n] for i, n in enumerate(sizes)])[None]
    places = torch.cat([torch.arange(n) for n in sizes])[None]
    with torch.no_grad():
        out = model(row, position_ids=places)
    assert out.past_key_values is None
    assert_close("documents", torch.cat(alone, 1), out.logits, EXACT)


@every_pair
def test_generate_with_a_cache_is_generate_without(family, kind):
    model = attached(family, kind)
    text, mask = ids(length=12), torch.ones(3, 12, dtype=torch.long)
    for row, pads in enumerate((0, 2, 5)):
        text[row, :pads], mask[row, :pads] = 0, 0
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        options |= dict(attention_mask=mask, max_new_tokens=4, do_sample=False)
        expected = model.generate(text, use_cache=False, **options)
        assert torch.equal(model.generate(text, **options), expected)
        if "num_beams" not in options:
            assert torch.equal(model.generate(text, prefill_chunk_size=5, **options), expected)


@every_pair
def test_a_fork_leaves_its_cache_unchanged(family, kind):
    model = attached(family, kind)
    whole = logits(model, ids())
    _, cache = streamed(model, ids()[:, :10], [10])
    for other in (memlm.fork(cache), memlm.fork(cache), copy.deepcopy(cache)):
        out, _ = streamed(model, ids()[:, 10:], [LENGTH - 10], other)
        assert_close("a fork", whole[:, 10:], out, EXACT)
        assert cache.get_seq_length() == 10 and other.get_seq_length() == LENGTH


@every_pair
def test_rows_of_a_cache_are_repeated_selected_and_saved(family, kind):
    model = attached(family, kind)
    whole = logits(model, ids())
    _, cache = streamed(model, ids()[:, :10], [10])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([4, 1, 0, 0, 3, 5]))
    cache.batch_select_indices(torch.tensor([0, 2, 5]))
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    cache = torch.load(file, weights_only=False)
    rows = [2, 0, 2]
    out, _ = streamed(model, ids()[rows, 10:], [1, 12], cache)
    assert_close("rows", whole[rows, 10:], out, EXACT)
    cache.reset()
    if any(layer.keys is not None and layer.keys.numel() for layer in cache.layers):
        # transformers 5.17 leaves zeros as keys, for all models.
        return
    assert_close("after a reset", whole, streamed(model, ids(), [9, 14], cache)[0], EXACT)


@every_pair
def test_a_memory_is_saved_alone_and_with_its_model(family, kind, tmp_path):
    torch.manual_seed(0)
    model = opened(memlm.attach(backbone(family), settings(kind), [0, 2])).eval()
    expected = logits(model, ids())
    memlm.save_memory(model, tmp_path / "memory")
    again = memlm.load_memory(backbone(family), tmp_path / "memory")
    assert torch.equal(logits(again, ids()), expected)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    loaded = memlm.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model) and torch.equal(logits(loaded, ids()), expected)
    for other in (again, loaded):
        assert {n: p.dtype for n, p in other.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


@every_pair
def test_copies_have_their_own_memory(family, kind):
    model = attached(family, kind)
    expected, file = logits(model, ids()), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for name, p in other.named_parameters():
                if name.endswith("memlm.gate"):
                    p.zero_()
        assert torch.equal(logits(model, ids()), expected)
        assert not torch.equal(logits(other, ids()), expected)


@every_pair
def test_gradients_reach_the_memory_alone(family, kind):
    torch.manual_seed(0)
    model = backbone(family).requires_grad_(False)
    memlm.attach(model, settings(kind), [0, 2]).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    # In the second step the gate is open, and in the third so are parts that start at zero.
    for step in range(3):
        model(ids(), labels=ids()).loss.backward()
        has = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        gates = {name for name, _ in model.named_parameters() if name.endswith("memlm.gate")}
        if step == 0:
            # Auxiliary losses do not pass the gate.
            assert gates <= has and (has == gates or kind == "mom")
        optimizer.step()
        optimizer.zero_grad()
    wanted = {name for name, _ in model.named_parameters() if ".memlm." in name}
    assert has == wanted, wanted - has


@pytest.mark.parametrize(
    ("family", "kind", "reentrant"),
    [
        *(pytest.param(*pair.values, False, marks=pair.marks) for pair in PAIRS),
        *(
            pytest.param(*x.values, True, marks=x.marks if x.values[0] in REENTRANT else pytest.mark.slow)
            for x in PAIRS
        ),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(family, kind, reentrant):
    found = []
    for checkpointed in (False, True):
        model = attached(family, kind).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            # Renamed in transformers 5.23.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        if checkpointed and reentrant and kind == "mom":
            with pytest.raises(ValueError, match="use_reentrant=True loses the memory's auxiliary losses"):
                model(ids(), labels=ids())
            return
        model(ids(), labels=ids()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert_close(name, grad, found[1][name], EXACT)
