"""Memory Sparse Attention: a layer against loops over tokens, streams of documents, losses, state."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F

from memlm import MemLMForCausalLM, MemoryCache
from memlm.evaluation.ablation import memory_off
from memlm.memory import msa
from memlm.memory.base import Dims
from memlm.roles import RoleCounts, Roles
from memlm_kernels.testing import assert_close, relative_error
from tests.conftest import build, same_state, step

VARIANTS = [
    ("msa", {"routes": False, "qk_norm": False}),
    ("msa", {"router_loss": "bce", "routing": "query"}),
    ("msa", {"qk_norm": "all", "output_bias": True, "rotary": False}),
]
EXACT = 1e-10
SMALL = {"chunk_size": 4, "top_k": 2}
# Roles: (role, number of tokens) of each piece.
SAMPLES = {
    "usual": [(-2, 3), (1, 9), (2, 1), (3, 4), (4, 13), (0, 5), (-2, 2), (-1, 6)],
    "no template": [(1, 5), (2, 8), (3, 3), (0, 3), (-1, 4)],
    "fewer documents than top_k": [(-2, 1), (1, 7), (0, 2), (-1, 3)],
    "no documents": [(-2, 2), (0, 4), (-1, 5)],
    "no query": [(-2, 2), (1, 6), (2, 3), (-1, 5)],
    "documents between queries": [(1, 5), (0, 2), (2, 6), (3, 2), (0, 1), (-1, 2), (4, 9), (0, 2), (-1, 3)],
    "documents last": [(-2, 1), (0, 2), (1, 10)],
    "one long document": [(1, 2), (2, 1), (3, 25), (4, 2), (0, 3), (-1, 2)],
    "response before the query": [(1, 3), (2, 4), (-1, 3), (0, 2), (-1, 2)],
}


def mixer_of(**settings) -> msa.Mixer:
    torch.manual_seed(0)
    mixer = msa.Mixer(msa.Config(**{**SMALL, **settings}), Dims(24, 4, 2, 6), 0).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def roles_of(pieces) -> torch.Tensor:
    return torch.cat([torch.full((n,), role) for role, n in pieces])[None]


def inputs(length, batch=1, seed=0, size=24):
    return torch.randn(batch, length, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(doc_ids, positions=None, lengths=None, found=None, samples=1):
    counts = RoleCounts.of(doc_ids, positions, lengths)
    """Facts of ``Rows``."""
    roles = Roles(doc_ids, found, counts)
    return {"given_BT": positions, "lengths_B": lengths, "max_documents": samples, "roles": roles}


def loop(mixer, x, roles):
    """One token at a time, by the text of the paper: one sample, [T, D] and a list of roles -> [T, D]."""
    config, size = mixer.msa, 6

    def heads(projection, norm, position):
        z = torch.stack([projection(row).unflatten(-1, (-1, size)) for row in x])
        z = norm(z) if norm is not None else z
        angle = position[:, None, None] * 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64) * 2 / size)
        z = torch.complex(z[..., : size // 2], z[..., size // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1)

    documents, outside, place = [], [], []
    template, head = True, 0
    for t, role in enumerate(roles):
        template = template and role == -2
        head += template
        if role > 0:
            if t == 0 or roles[t - 1] != role:
                documents.append([])
            place.append(len(documents[-1]))
            documents[-1].append(t)
        else:
            skipped = config.top_k - (head if config.positions == "top_k" else 0)
            place.append(len(outside) + (0 if template else skipped))
            outside.append(t)
    position = torch.tensor(place, dtype=torch.float64)
    norms = (mixer.q_norm, mixer.k_norm) if config.qk_norm else (None, None)
    q, k = heads(mixer.q_proj, norms[0], position), heads(mixer.k_proj, norms[1], position)
    v = mixer.v_proj(x).unflatten(-1, (-1, size))

    def attend(t, keys, values):
        out = []
        for h in range(4):
            scores = torch.stack([q[t, h] @ key[h // 2] for key in keys]) * size**-0.5
            out.append(scores.softmax(0) @ torch.stack([value[h // 2] for value in values]))
        return torch.cat(out)

    y = torch.zeros(len(x), 4 * size, dtype=torch.float64)
    chunks = []
    for document in documents:
        for i, t in enumerate(document):
            y[t] = attend(t, k[document[: i + 1]], v[document[: i + 1]])
        pieces = [document[i : i + config.chunk_size] for i in range(0, len(document), config.chunk_size)]
        chunks.append([(k[piece].mean(0), v[piece].mean(0), x[piece]) for piece in pieces])
    reduce = {"mean": lambda z: sum(z) / len(z), "max": max}
    for i, t in enumerate(outside):
        keys, values = list(k[outside[: i + 1]]), list(v[outside[: i + 1]])
        scores = []
        for d, document in enumerate(documents if config.routes else []):
            asking = [u for u in outside if roles[u] == 0 and u > document[0]]
            asking = [u for u in asking if u <= t] if config.routing == "causal" else asking
            if asking and document[0] < t:
                of_chunks = []
                for _, _, rows in chunks[d]:
                    r = mixer.router_k_proj(rows).mean(0).unflatten(-1, (-1, size))
                    of_tokens = []
                    for u in asking:
                        rq = mixer.router_q_proj(x[u]).unflatten(-1, (-1, size))
                        dots = [rq[h] @ r[h // 2] for h in range(4)]
                        if config.similarity == "cosine":
                            dots = [dot / (rq[h].norm() * r[h // 2].norm()) for h, dot in enumerate(dots)]
                        of_tokens.append(reduce[config.head_reduce](dots))
                    of_chunks.append(reduce[config.query_reduce](of_tokens))
                scores.append((-reduce[config.chunk_reduce](of_chunks).item(), d))
        for _, d in sorted(scores)[: config.top_k]:
            keys += [chunk[0] for chunk in chunks[d]]
            values += [chunk[1] for chunk in chunks[d]]
        y[t] = attend(t, keys, values)
    return mixer.o_proj(y)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"routing": "query", "positions": "top_k"},
        {"routes": False},
        {"similarity": "dot", "chunk_size": 1, "top_k": 1},
        {"head_reduce": "max", "query_reduce": "mean", "chunk_reduce": "mean"},
        {"chunk_size": 64, "top_k": 16, "qk_norm": False},
    ],
    ids=str,
)
def test_equals_a_loop_over_tokens(name, settings):
    mixer, doc_ids = mixer_of(**settings), roles_of(SAMPLES[name])
    x = inputs(doc_ids.shape[1])
    assert_close("y", loop(mixer, x[0], doc_ids[0].tolist()), step(mixer, x, **context(doc_ids)).y_BTD[0], EXACT)


@pytest.mark.parametrize("name", ["usual", "documents between queries", "one long document"])
def test_gradients_equal_those_of_the_loop(name):
    doc_ids, gradients = roles_of(SAMPLES[name]), []
    for run in (
        lambda m, x: loop(m, x, doc_ids[0].tolist()),
        lambda m, x: step(m, x[None], **context(doc_ids)).y_BTD[0],
    ):
        mixer, x = mixer_of(), inputs(doc_ids.shape[1])[0].requires_grad_()
        (run(mixer, x) * inputs(doc_ids.shape[1], seed=1)[0]).sum().backward()
        gradients.append({"x": x.grad} | {n: p.grad for n, p in mixer.named_parameters() if "router" not in n})
    for n, expected in gradients[0].items():
        assert_close(n, expected, gradients[1][n], EXACT)


def streamed(mixer, x, doc_ids, cuts, positions=None):
    state, out = None, []
    pieces = [z.split(cuts, 1) if z is not None else [None] * len(cuts) for z in (x, doc_ids, positions)]
    for piece, roles, places in zip(*pieces, strict=True):
        y, state, *_ = step(mixer, piece, state, **context(roles, places, samples=4))
        out.append(y)
    return torch.cat(out, 1), state


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(
    "settings", [{}, {"query_reduce": "mean", "positions": "top_k"}, {"routes": False, "positions": "top_k"}], ids=str
)
def test_any_division_into_calls_is_the_same(name, settings):
    mixer = mixer_of(**settings)
    doc_ids = roles_of(SAMPLES[name])
    length = doc_ids.shape[1]
    x = inputs(length, batch=2)
    doc_ids = doc_ids.expand(2, -1)
    whole = step(mixer, x, **context(doc_ids)).y_BTD
    for cuts in ([1] * length, [2, 1, 4, length - 7], [length - 1, 1], [5, length - 5]):
        assert_close(str(cuts), whole, streamed(mixer, x, doc_ids, cuts)[0], EXACT)


def test_a_response_may_come_without_roles():
    mixer, doc_ids = mixer_of(), roles_of(SAMPLES["usual"])
    x = inputs(doc_ids.shape[1])
    whole = step(mixer, x, **context(doc_ids)).y_BTD
    state = step(mixer, x[:, :-6], **context(doc_ids[:, :-6])).state
    rest = []
    for t in range(6):
        y, state, *_ = step(mixer, x[:, t - 6 : x.shape[1] + t - 5], state)
        rest.append(y)
    assert_close("response", whole[:, -6:], torch.cat(rest, 1), EXACT)


def packed(names):
    doc_ids = [roles_of(SAMPLES[name]) for name in names]
    positions = torch.cat([torch.arange(r.shape[1]) for r in doc_ids])[None]
    return doc_ids, torch.cat(doc_ids, 1), positions


@pytest.mark.parametrize("routing", ["causal", "query"])
def test_packed_samples_are_samples_alone(routing):
    mixer = mixer_of(routing=routing)
    # The third begins in a document with the number in which the second ends.
    alone, doc_ids, positions = packed(["usual", "documents last", "no template", "documents between queries"])
    x = inputs(doc_ids.shape[1])
    got = step(mixer, x, **context(doc_ids, positions, samples=4)).y_BTD
    sizes = [r.shape[1] for r in alone]
    expected = [step(mixer, piece, **context(r)).y_BTD for piece, r in zip(x.split(sizes, 1), alone, strict=True)]
    assert_close("y", torch.cat(expected, 1), got, EXACT)
    if routing == "causal":
        for cuts in ([1] * x.shape[1], [50, 3, 17, x.shape[1] - 70]):
            assert_close(str(cuts), got, streamed(mixer, x, doc_ids, cuts, positions)[0], EXACT)


def model_of(**settings) -> MemLMForCausalLM:
    return build("msa", **{**SMALL, **settings})


def ids_like(doc_ids, seed=0):
    return torch.randint(259, doc_ids.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padding_leaves_no_trace(side):
    model, rows = model_of(), [roles_of(SAMPLES[name]) for name in ("usual", "no template", "no query")]
    width = 50
    ids, doc_ids, mask = (torch.full((3, width), fill) for fill in (7, 3, 0))
    for b, row in enumerate(rows):
        n = row.shape[1]
        where = {"left": torch.arange(width - n, width), "right": torch.arange(n)}.get(side)
        where = torch.linspace(0, width - 1, n).long() if where is None else where
        ids[b, where], doc_ids[b, where], mask[b, where] = ids_like(row, b)[0], row[0], 1
    more, cache = ids_like(torch.zeros(3, 5), 9), MemoryCache()
    with torch.no_grad():
        got = model(ids, attention_mask=mask, roles=Roles(doc_ids), past_key_values=cache).logits
        after = model(more, past_key_values=cache).logits
        for b, row in enumerate(rows):
            alone = F.pad(row, (0, 5), value=-1)
            expected = model(torch.cat([ids_like(row, b), more[b : b + 1]], 1), roles=Roles(alone)).logits[0]
            assert_close(f"row {b}", expected[:-5], got[b][mask[b].bool()], EXACT)
            assert_close(f"after row {b}", expected[-5:], after[b], EXACT)


def test_a_row_that_waits_stays_in_its_document():
    model, doc_ids = model_of(), roles_of([(1, 7), (2, 9), (0, 3), (-1, 2)]).expand(2, -1)
    ids, cache, mask = ids_like(doc_ids), MemoryCache(), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with torch.no_grad():
        whole = model(ids, roles=Roles(doc_ids)).logits
        model(ids[:, :10], roles=Roles(doc_ids[:, :10]), past_key_values=cache)
        model(ids[:, 10:13], attention_mask=mask, roles=Roles(doc_ids[:, 10:13]), past_key_values=cache)
        # A call without roles closes documents, except those of a row without a token in the call.
        model(ids[:, :3], attention_mask=mask, past_key_values=cache)
        got = model(ids[1:, 10:].expand(2, -1), roles=Roles(doc_ids[:, 10:]), past_key_values=cache).logits
    assert_close("row that waited", whole[1, 10:], got[1], EXACT)


def test_memory_of_documents_is_saved_moved_and_asked(tmp_path):
    model, doc_ids = model_of(), roles_of(SAMPLES["usual"]).expand(3, -1)
    ids, cache, cut = ids_like(doc_ids), MemoryCache(), 24
    with torch.no_grad():
        whole = model(ids, roles=Roles(doc_ids)).logits
        model(ids[:, :cut], roles=Roles(doc_ids[:, :cut]), past_key_values=cache)
        before = copy.deepcopy(cache.states)
        rest = dict(input_ids=ids[:, cut:], roles=Roles(doc_ids[:, cut:]))
        asked = model(**rest, past_key_values=cache, write=False).logits
        for a, b in zip(before, cache.states, strict=True):
            assert same_state(a, b)
        assert_close("asked", whole[:, cut:], asked, EXACT)
        cache.save(tmp_path)
        assert torch.equal(asked, model(**rest, past_key_values=MemoryCache.load(tmp_path)).logits)
        moved, order = cache.fork(), torch.tensor([2, 0, 0])
        moved.reorder_cache(order)
        rest = dict(input_ids=ids[order, cut:], roles=Roles(doc_ids[order, cut:]))
        assert_close("moved", whole[order, cut:], model(**rest, past_key_values=moved).logits, EXACT)
        cache.reset([1])
        got = model(ids, roles=Roles(doc_ids), past_key_values=cache).logits
        assert_close("forgotten", whole[1], got[1], EXACT)


@pytest.mark.parametrize("name", SAMPLES)
def test_causality(name):
    model, doc_ids = model_of().train(), roles_of(SAMPLES[name])
    ids = ids_like(doc_ids)
    length = ids.shape[1]
    edited = ids.repeat(length, 1)
    edited.diagonal().add_(1).remainder_(259)
    with torch.no_grad():
        before = model(ids, roles=Roles(doc_ids)).logits[0]
        after = model(edited, roles=Roles(doc_ids.expand(length, -1))).logits
    for t in range(length):
        assert relative_error(before[:t], after[t, :t]) < 1e-13, t
        assert relative_error(before[t:], after[t, t:]) > 1e-6, t


def test_choosing_by_the_whole_query_shows_its_end_to_its_start():
    """The option reproduces a leak; it must be exactly this leak, within the query."""
    doc_ids = roles_of([(1, 8), (2, 8), (3, 8), (0, 6), (-1, 4)])
    leaks = []
    for seed in range(8):
        x = inputs(doc_ids.shape[1], seed=seed)
        mixer, causal = mixer_of(routing="query"), mixer_of()
        other = x.clone()
        other[:, 29] += 3.0
        before, after = (step(mixer, z, **context(doc_ids)).y_BTD for z in (x, other))
        assert relative_error(before[:, :24], after[:, :24]) < 1e-13
        leaks.append(relative_error(before[:, :29], after[:, :29]) > 1e-6)
        # Tokens after the query see the same choice.
        assert_close("response", step(causal, x, **context(doc_ids)).y_BTD[:, 29:], before[:, 29:], EXACT)
    assert any(leaks)


def test_generation_from_documents():
    model, doc_ids = model_of(), roles_of([(-2, 2), (1, 9), (2, 5), (3, 6), (0, 4), (-2, 1)]).expand(2, -1).clone()
    ids, mask = ids_like(doc_ids), torch.ones_like(doc_ids)
    mask[1, :2] = 0
    options = dict(doc_ids=doc_ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    cache = MemoryCache()
    with torch.no_grad():
        model(ids[:, :-5], roles=Roles(doc_ids[:, :-5]), attention_mask=mask[:, :-5], past_key_values=cache)
    options |= dict(doc_ids=doc_ids[:, -5:], attention_mask=mask[:, -5:], past_key_values=cache)
    assert torch.equal(cached[:, -11:], model.generate(ids[:, -5:], **options))


def test_memory_off_is_a_model_that_does_not_route():
    model, doc_ids = model_of(), roles_of(SAMPLES["usual"])
    other, ids = model_of(routes=False), ids_like(doc_ids)
    other.load_state_dict({name: w for name, w in model.state_dict().items() if "router" not in name})
    with torch.no_grad():
        with memory_off(model):
            assert_close(
                "logits", other(ids, roles=Roles(doc_ids)).logits, model(ids, roles=Roles(doc_ids)).logits, EXACT
            )
            cache, states = MemoryCache(), []
            model(ids, roles=Roles(doc_ids), past_key_values=cache)
            for _ in range(2):
                # Keys that no token sees are still kept.
                got = model(ids[:, :3], past_key_values=cache).logits
                states += [state["front"].sum() for state in cache.states if "front" in state]
            assert all(n > 0 for n in states)
        both = F.pad(doc_ids, (0, 6), value=-1)
        ids = torch.cat([ids, ids[:, :3], ids[:, :3]], 1)
        assert_close("after", other(ids, roles=Roles(both)).logits[:, -3:], got, EXACT)
        ids = ids[:, :-6]
        assert relative_error(other(ids, roles=Roles(doc_ids)).logits, model(ids, roles=Roles(doc_ids)).logits) > 1e-3


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles flex attention with a C++ compiler")
@pytest.mark.parametrize("name", ["documents between queries"])
def test_flex_attention_forward(name):
    # After other shapes have been compiled, Inductor's C++ for dynamic shapes is not valid C++.
    torch.compiler.reset()
    doc_ids = roles_of(SAMPLES[name])
    torch.manual_seed(0)
    mixer = msa.Mixer(msa.Config(**SMALL), Dims(32, 4, 2, 16), 0)
    x = torch.randn(1, doc_ids.shape[1], 32)
    with torch.no_grad():
        reference = step(mixer, x, **context(doc_ids)).y_BTD
        mixer.dims = Dims(32, 4, 2, 16, attn_implementation="flex_attention")
        assert_close("y", reference, step(mixer, x, **context(doc_ids)).y_BTD, 1e-5)
    mixer.dims = Dims(32, 4, 2, 16, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="use 'sdpa' or 'flex_attention'"):
        step(mixer, x, **context(doc_ids))


def test_autocast_routes_in_fp32():
    model, doc_ids = model_of().float(), roles_of(SAMPLES["usual"])
    ids, cache = ids_like(doc_ids), MemoryCache()
    options = dict(roles=Roles(doc_ids, doc_ids == 2), labels=ids)
    expected = model(ids, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids, **options, past_key_values=cache)
    got.loss.backward()
    assert_close("logits", expected.logits, got.logits.float(), 5e-2)
    assert cache.states[0]["bank"]["k"].dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_documents_are_kept_as_chunks():
    model = model_of(chunk_size=16)
    doc_ids = roles_of([(n + 1, 100) for n in range(10)] + [(0, 10)])
    cache = MemoryCache()
    with torch.no_grad():
        model(ids_like(doc_ids), roles=Roles(doc_ids), past_key_values=cache)
        state = cache.states[0]
        assert state["bank"]["k"].shape[1] <= 1000 // 16 + 2 * 10 and state["k"].shape[1] == 10
        assert state["open"]["k"].shape[1] <= 100
        model(ids_like(doc_ids[:, :1]), past_key_values=cache)
    assert cache.states[0]["open"]["k"].shape[1] == 0
    assert state["chunks"].item() == 70 and state["documents"].item() == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_keeps_banks_and_scores_in_fp32(dtype):
    low = model_of(top_k=9).to(dtype)
    doc_ids = roles_of(SAMPLES["usual"])
    ids, cache = ids_like(doc_ids), MemoryCache()
    with torch.no_grad():
        # All documents are chosen, because rounding may change a close choice.
        got = low(ids, roles=Roles(doc_ids), past_key_values=cache).logits
        exact = copy.deepcopy(low).double()(ids, roles=Roles(doc_ids)).logits
    assert_close("logits", exact, got.double(), 1e-5 if dtype == torch.float32 else 2e-2)
    assert all(cache.states[0]["bank"][name].dtype == torch.float32 for name in ("k", "v", "router_k", "score"))


def test_gradient_checkpointing_with_documents_changes_nothing():
    model, doc_ids = model_of().train(), roles_of(SAMPLES["usual"])
    ids = ids_like(doc_ids)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, roles=Roles(doc_ids, doc_ids == 2), labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for a, b in zip(*gradients, strict=True):
        assert_close("gradient", a, b, EXACT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"routing": "all"}, "routing='all' must be one of causal, query"),
        ({"similarity": "angle"}, "similarity='angle' must be one of cosine, dot"),
        ({"chunk_reduce": "sum"}, "chunk_reduce='sum' must be one of mean, max"),
        ({"router_loss": "hinge"}, "router_loss='hinge' must be one of infonce_decouple"),
        ({"injection": "none"}, "injection='none' must be one of causal, bidirectional"),
        ({"positions": "k"}, "positions='k' must be one of template, top_k"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"loss_weight": -1.0}, "loss_weight=-1.0 must not be negative"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        msa.Config(**settings)


def test_bad_roles_are_named():
    model, ids = model_of(), torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"doc_ids \[1, 4\] must be \[batch, tokens\] = \[1, 5\]"):
        model(ids, roles=Roles(ids[:, :4]))
    with pytest.raises(ValueError, match=r"positives \[1, 4\] must be \[batch, tokens\] = \[1, 5\]"):
        model(ids, roles=Roles(ids, ids[:, :4]))
