"""Documents that a layer holds: inserted from outside, chosen once, at no cost for later tokens."""

import pytest
import torch
import torch.nn.functional as F

from memlm import MemoryCache
from memlm.memory import msa
from memlm.memory.msa import held
from memlm.roles import Roles
from memlm_kernels.testing import assert_close, relative_error
from tests.conftest import step
from tests.memory.test_msa import EXACT, SAMPLES, context, ids_like, inputs, mixer_of, model_of, roles_of


def test_a_bank_from_elsewhere():
    """Documents that are read one by one, in any order, and then joined, equal documents read in one sample."""
    mixer, doc_ids = mixer_of(), roles_of(SAMPLES["usual"])
    x, parts = inputs(doc_ids.shape[1], batch=2), []
    x[1, 3:30] = x[0, 3:30]
    whole = step(mixer, x, **context(doc_ids.expand(2, -1))).y_BTD
    for number, (start, end) in enumerate([(3, 12), (12, 13), (13, 17), (17, 30)]):
        state = step(mixer, x[:1, start:end], **context(doc_ids[:, start:end])).state
        chunks = {name: state["bank"][name][:, : state["chunks"]] for name in ("k", "v", "router_k", "size")}
        parts.append({**chunks, "number": torch.full_like(chunks["size"], number)})
    bank = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    state = step(mixer, x[:, :3], **context(doc_ids[:, :3].expand(2, -1))).state
    state = state.like(held.with_documents(state, bank))
    for cuts in ([13], [1] * 13):
        got, after = [], state
        for piece, roles in zip(x[:, 30:].split(cuts, 1), doc_ids[:, 30:].split(cuts, 1), strict=True):
            y, after, *_ = step(mixer, piece, after, **context(roles.expand(2, -1)))
            got.append(y)
        assert_close("y", whole[:, 30:], torch.cat(got, 1), EXACT)
    with pytest.raises(ValueError, match="documents that were read in it"):
        held.with_documents(step(mixer, x[:, :12], **context(doc_ids[:, :12].expand(2, -1))).state, bank)


def test_documents_chosen_elsewhere_are_seen_without_a_query():
    mixer, doc_ids = mixer_of(), roles_of([(1, 8), (2, 8), (3, 4), (-1, 5)])
    x = inputs(doc_ids.shape[1])
    state = step(mixer, x[:, :20], **context(doc_ids[:, :20])).state
    unseen = step(mixer, x[:, 20:], state).y_BTD
    chosen_C = torch.arange(state["bank"]["size"].shape[1]) // 2 != 1
    state["bank"] |= {"asked": chosen_C.long()[None], "score": chosen_C.double()[None]}
    chosen = step(mixer, x[:, 20:], state).y_BTD
    assert relative_error(unseen, chosen) > 1e-3
    # Document 2, which was not chosen, does not change them.
    state["bank"]["k"] = state["bank"]["k"] + 9.0 * ~chosen_C[:, None, None]
    assert torch.equal(chosen, step(mixer, x[:, 20:], state).y_BTD)


def test_a_choice_that_stands_is_made_once(monkeypatch):
    """Rows with different pasts, responses alternately with and without roles, and a new question."""
    mixer, pieces = mixer_of(), [(-2, 2), (1, 9), (2, 5), (3, 6), (0, 4), (-1, 12), (0, 3), (-1, 4)]
    rows = [roles_of(pieces), roles_of([(1, 3), (2, 13), (0, 2), (-1, 10), (0, 1), (-1, 4)])]
    x, lengths = inputs(45, batch=2), [r.shape[1] for r in rows]
    expected = [step(mixer, x[b : b + 1, :n], **context(rows[b])).y_BTD for b, n in enumerate(lengths)]
    routed, route = [], msa.route_documents
    monkeypatch.setattr(
        msa, "route_documents", lambda *a, **options: routed.append(a[0] is None) or route(*a, **options)
    )
    # The first question to its last token; then responses, some with roles; then the second question.
    at, state, got = [0, 0], None, [[], []]
    for turn, (one, other) in enumerate(
        [(26, 18), (1, 1), (2, 1), (0, 1), (3, 2), (1, 1), (1, 0), (4, 4), (3, 1), (1, 1), (3, 3)]
    ):
        wide, taken = max(one, other), torch.tensor([one, other])
        piece, roles = torch.zeros(2, wide, 24, dtype=torch.float64), torch.full((2, wide), -1)
        for b, n in enumerate((one, other)):
            piece[b, :n], roles[b, :n] = x[b, at[b] : at[b] + n], rows[b][0, at[b] : at[b] + n]
        bare = turn not in (0, 4, 8)
        lengths_B = None if one == other else taken
        facts = {"lengths_B": lengths_B} if bare else context(roles, lengths=lengths_B)
        before = len(routed)
        y, state, *_ = step(mixer, piece, state, **facts)
        assert len(routed) - before == (turn in (0, 1, 4, 5, 8, 9)) and (not bare or state["front"].any(1).all())
        for b, n in enumerate((one, other)):
            got[b].append(y[b, :n])
            at[b] += n
    for b, n in enumerate(at):
        assert n == lengths[b]
        assert_close(f"row {b}", expected[b][0, :n], torch.cat(got[b]), EXACT)


@torch.no_grad()
def test_a_token_costs_no_copy_of_what_is_held():
    model, doc_ids, cache = model_of(), roles_of(SAMPLES["usual"]), MemoryCache()
    ids = torch.cat([ids_like(doc_ids), ids_like(torch.zeros(1, 90), 1)], 1)
    whole = model(ids, roles=Roles(F.pad(doc_ids, (0, 90), value=-1))).logits[:, -90:]
    model(ids[:, :-90], roles=Roles(doc_ids), past_key_values=cache)
    got, places = [], set()
    for t in range(90):
        if t in (20, 21, 40):
            # Others that continue from the same memory, and one that only asks.
            others = [cache.fork(), cache.fork()]
            for other in others:
                model(ids[:, :3], past_key_values=other)
            assert torch.equal(*(other.states[0]["k"] for other in others))
            model(ids[:, :2], past_key_values=cache, write=False)
        got.append(model(ids[:, t - 90][:, None], past_key_values=cache).logits)
        places |= {state["k"].data_ptr() for state in cache.states}
    assert_close("logits", whole, torch.cat(got, 1), EXACT)
    # Room grows by a quarter whenever it is full, from 43 tokens to 133, and after each continuation by others.
    assert len(places) <= (6 + 3) * len(cache.states)
