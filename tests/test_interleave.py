"""Asking a bank again and again on one memory, and reading on until a question is answered."""

import pytest
import torch

from memlm import MemoryBank, MemoryCache
from memlm_kernels.testing import assert_close, relative_error
from tests.test_bank import EXACT, bank_of, in_context, joined, library, model_of, tokens

# A template, then three questions with what was said between them.
TALK = [(-2, tokens(3, 50)), *((role, tokens(n, 60 + i)) for i, (role, n) in enumerate([(0, 5), (-1, 3)] * 3))]
CUTS = {"each part": [3, 5, 3, 5, 3, 5, 3], "together": [11, 8, 8], "tokens": [3, *[1] * 24], "odd": [5, 4, 9, 2, 7]}


def talked(model, bank, parts, cuts, **options):
    """Logits of calls on one memory, each of which may ask the bank, and the memory."""
    cache, logits = MemoryCache(), []
    for ids, doc_ids in zip(*(x.split(cuts, 1) for x in joined(parts)), strict=True):
        asks = {"memory_bank": bank} if (doc_ids == 0).any() else {}
        logits.append(model(ids, doc_ids=doc_ids, past_key_values=cache, **asks, **options).logits)
    return torch.cat(logits, 1), cache


def twice() -> dict[str, torch.Tensor]:
    """Some documents stand in the bank again, so that scores are equal."""
    documents = library()
    return documents | {f"{name} again": documents[name] for name in ("d5", "d0", "d8")}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"similarity": "dot", "chunk_size": 1, "top_k": 1},
        {"head_reduce": "max", "top_k": 3},
        {"chunk_size": 64, "top_k": 16, "qk_norm": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_asked_again_a_bank_equals_documents_in_the_context(settings, cuts):
    model = model_of(**settings)
    for documents in (library(), twice()):
        bank = bank_of(model, documents, tokens_per_batch=20)
        assert_close("logits", in_context(model, documents, TALK), talked(model, bank, TALK, CUTS[cuts])[0], EXACT)


@torch.no_grad()
def test_choosing_by_all_of_a_call_is_asked_again_too():
    model, documents = model_of(routing="query"), library()
    cuts, cache, logits = CUTS["each part"], MemoryCache(), []
    pieces = [*((n + 1, ids) for n, ids in enumerate(documents.values())), *TALK[1:]]
    skip = sum(map(len, documents.values()))
    ids, doc_ids = joined([TALK[0], *pieces])
    for i, d in zip(*(x.split([3 + skip, *cuts[1:]], 1) for x in (ids, doc_ids)), strict=True):
        logits.append(model(i, doc_ids=d, past_key_values=cache).logits)
    expected = torch.cat(logits, 1)[:, 3 + skip :]
    assert_close("logits", expected, talked(model, bank_of(model, documents), TALK, cuts)[0][:, 3:], EXACT)


@torch.no_grad()
def test_rows_ask_when_they_will():
    """A row waits, goes on, or asks while others do: each is as alone."""
    model, documents = model_of(), twice()
    bank, cache = bank_of(model, documents), MemoryCache()
    # Of each call, a row's role and tokens.
    calls = [
        [(0, 4), (0, 2), (-1, 3)],
        [(-1, 2), None, (0, 3)],
        [(0, 3), (-1, 4), None],
        [None, (0, 2), (-1, 1)],
        [(0, 1), (0, 1), (0, 5)],
        [(-1, 2), (-1, 1), (-1, 2)],
    ]
    rows, got = [[], [], []], [[], [], []]
    for c, call in enumerate(calls):
        parts = [part and (part[0], tokens(part[1], 100 + 10 * c + b)) for b, part in enumerate(call)]
        width = max(len(ids) for _, ids in filter(None, parts))
        ids, doc_ids, mask = (torch.full((3, width), fill) for fill in (7, 0, 0))
        for b, part in enumerate(parts):
            if part:
                where = slice(width - len(part[1]), width) if c % 2 else slice(len(part[1]))
                ids[b, where], doc_ids[b, where], mask[b, where] = part[1], part[0], 1
                rows[b].append(part)
        asks = {"memory_bank": bank} if c < 5 else {}
        logits = model(ids, doc_ids=doc_ids, attention_mask=mask, past_key_values=cache, **asks).logits
        for b in range(3):
            got[b].append(logits[b][mask[b].bool()])
        if c == 2:
            order = torch.tensor([1, 2, 0])
            cache.reorder_cache(order)
            rows, got = ([x[i] for i in order] for x in (rows, got))
            calls[3:] = [[call[i] for i in order] for call in calls[3:]]
    for b in range(3):
        assert_close(f"row {b}", in_context(model, documents, rows[b])[0], torch.cat(got[b]), EXACT)


@torch.no_grad()
def test_a_bank_may_grow_between_questions_and_a_memory_be_saved(tmp_path):
    """What is added stands behind the first question; what is deleted stays where it was chosen."""
    model, old, new = model_of(), library(), {"new": tokens(9, 77), "newer": tokens(5, 78)}
    bank = bank_of(model, old)
    first, second = TALK[:3], TALK[3:5]
    _, cache = talked(model, bank, first, [3, 5, 3])
    pieces = [(n + 1, ids) for n, ids in enumerate(old.values())]
    ids, doc_ids = joined([first[0], *pieces, *first[1:], *((20 + n, x) for n, x in enumerate(new.values())), *second])
    expected = model(ids, doc_ids=doc_ids).logits[:, -8:]
    bank.add(new)
    cache.save(tmp_path / "memory")
    bank.save(tmp_path / "bank")
    for it, memory in (
        (bank, cache.fork()),
        (MemoryBank.load(tmp_path / "bank", model), MemoryCache.load(tmp_path / "memory")),
    ):
        ids, doc_ids = joined(second)
        got = model(ids, doc_ids=doc_ids, memory_bank=it, past_key_values=memory, write=False).logits
        assert_close("grown", expected, got, EXACT)
        held = set(memory.states[0]["bank.number"][0].tolist())
        it.delete(f"d{min(held)}")
        again = model(ids, doc_ids=doc_ids, memory_bank=it, past_key_values=memory).logits
        assert_close("deleted", expected, again, EXACT)


@torch.no_grad()
def test_generation_goes_on_from_an_answer():
    model, documents = model_of(), library()
    bank, (first, second) = bank_of(model, documents), (tokens(5, 3), tokens(4, 4))
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    cache = MemoryCache()
    said = model.generate(
        first[None], memory_bank=bank, past_key_values=cache, attention_mask=torch.ones(1, 5), **options
    )
    # What was generated last is not in the memory yet.
    question = torch.cat([said[0, -1:], second])
    doc_ids = torch.tensor([[-1, 0, 0, 0, 0]])
    options["attention_mask"] = torch.ones(1, 5)
    got = model.generate(question[None], doc_ids=doc_ids, memory_bank=bank, past_key_values=cache, **options)[0, -4:]
    parts = [(0, first), (-1, said[0, 5:]), (0, second), (-1, got)]
    assert torch.equal(in_context(model, documents, parts)[0, -5:-1].argmax(-1), got)
    assert relative_error(model(question[None]).logits, in_context(model, documents, parts)[:, 8:13]) > 1e-3


@torch.no_grad()
def test_memories_of_other_documents_are_refused():
    model, ids = model_of(), tokens(4, 1)[None]
    bank, question = bank_of(model, library()), dict(input_ids=ids, doc_ids=torch.zeros_like(ids))
    _, cache = talked(model, bank, TALK[:2], [3, 5])
    others = [bank_of(model, {}), bank_of(model, {"d0": tokens(9, 99)})]
    read = MemoryCache()
    model(ids, doc_ids=torch.ones_like(ids), past_key_values=read)
    for memory, it in ((cache, others[0]), (cache, others[1]), (read, bank), (read, others[0])):
        with pytest.raises(ValueError, match="documents that were read in it, or that the memory_bank has no more"):
            model(**question, memory_bank=it, past_key_values=memory)
    bank.delete([f"d{i}" for i in range(9)])
    with pytest.raises(ValueError, match="or under other numbers since it was tidied"):
        model(**question, memory_bank=bank, past_key_values=cache)
    for settings in ({"query_reduce": "mean"}, {"chunk_reduce": "mean"}):
        model = model_of(**settings)
        bank = bank_of(model, library())
        _, cache = talked(model, bank, TALK[:2], [3, 5])
        with pytest.raises(ValueError, match="let a memory ask a memory_bank once: a mean needs the scores of all"):
            model(**question, memory_bank=bank, past_key_values=cache)
