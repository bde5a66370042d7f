"""The bank: its documents act as documents in the context, whatever was added, deleted, saved or killed."""

import copy

import pytest
import torch

import memlm.bank
from memlm import MemLMForCausalLM, MemoryBank, MemoryCache
from memlm.fingerprint import fingerprint
from memlm.roles import Roles
from memlm_kernels.testing import assert_close, relative_error
from tests.conftest import build

EXACT = 1e-10
LENGTHS = (9, 1, 4, 13, 1, 30, 7, 12, 5, 8)


def model_of(seed: int = 0, **settings) -> MemLMForCausalLM:
    return build("msa", seed=seed, **{"chunk_size": 4, "top_k": 2, **settings})


def tokens(length: int, seed: int) -> torch.Tensor:
    return torch.randint(259, (length,), generator=torch.Generator().manual_seed(seed))


def library(lengths=LENGTHS) -> dict[str, torch.Tensor]:
    return {f"d{i}": tokens(n, i) for i, n in enumerate(lengths)}


def bank_of(model, documents, **options) -> MemoryBank:
    return MemoryBank.build(model, documents, progress=False, **options)


def in_context(model, documents, parts, **options):
    """Logits of ``parts``, (role, ids) each; the documents come behind the leading template."""
    pieces = list(parts)
    at = 1 if pieces and pieces[0][0] == -2 else 0
    pieces[at:at] = [(n + 1, ids) for n, ids in enumerate(documents.values())]
    ids, doc_ids = joined(pieces)
    skip = sum(len(x) for x in documents.values())
    logits = model(ids, roles=Roles(doc_ids), **options).logits
    before = len(parts[0][1]) if at else 0
    return torch.cat([logits[:, :before], logits[:, before + skip :]], 1)


def joined(pieces):
    ids = torch.cat([x for _, x in pieces])[None]
    return ids, torch.cat([torch.full((len(x),), role) for role, x in pieces])[None]


def asked(model, bank, parts, **options):
    ids, doc_ids = joined(parts)
    return model(ids, roles=Roles(doc_ids, bank=bank), **options).logits


QUESTION = [(-2, tokens(3, 50)), (0, tokens(5, 51)), (-2, tokens(2, 52)), (-1, tokens(6, 53))]


@pytest.mark.parametrize("batch", [20, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4096))])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"routing": "query"},
        {"similarity": "dot", "chunk_size": 1, "top_k": 1},
        {"head_reduce": "max"},
        {"head_reduce": "max", "query_reduce": "mean", "chunk_reduce": "mean"},
        {"routing": "query", "query_reduce": "mean"},
        {"chunk_size": 64, "top_k": 16, "qk_norm": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_bank_equals_documents_in_the_context(settings, batch):
    model, documents = model_of(**settings), library()
    bank = bank_of(model, documents, tokens_per_batch=batch)
    for parts in (QUESTION, QUESTION[1:], [(0, tokens(1, 7))], [(0, tokens(3, 8)), (-1, tokens(2, 9))]):
        expected, cache = in_context(model, documents, parts), MemoryCache()
        assert_close("logits", expected, asked(model, bank, parts), EXACT)
        # The chosen documents are in the memory: later calls need no bank.
        ids, doc_ids = joined(parts)
        cut = int((doc_ids == 0).nonzero()[-1, 1]) + 1
        got = [model(ids[:, :cut], roles=Roles(doc_ids[:, :cut], bank=bank), past_key_values=cache).logits]
        got += [
            model(i, roles=Roles(d), past_key_values=cache).logits
            for i, d in zip(ids[:, cut:].split(1, 1), doc_ids[:, cut:].split(1, 1), strict=True)
            if i.shape[1]
        ]
        assert_close("streamed", expected, torch.cat(got, 1), EXACT)


@torch.no_grad()
def test_generation():
    model, documents = model_of(), library()
    bank, question = bank_of(model, documents), tokens(5, 3)[None]
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    ids, doc_ids = joined([*((n + 1, x) for n, x in enumerate(documents.values())), (0, question[0])])
    # transformers treats ids that look like padding as padding, unless there is a mask.
    mask = torch.ones_like(ids)
    expected = model.generate(ids, doc_ids=doc_ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    options["attention_mask"] = torch.ones_like(question)
    for more in ({}, {"use_cache": False}, {"doc_ids": torch.zeros_like(question)}):
        got = model.generate(question, memory_bank=bank, **more, **options)
        assert torch.equal(expected, got[:, question.shape[1] :])
    options["attention_mask"] = torch.ones(2, 5, dtype=torch.long)
    beams = model.generate(question.expand(2, -1), memory_bank=bank, num_beams=2, **options)
    assert torch.equal(beams[0], beams[1])


@torch.no_grad()
def test_rows_ask_for_themselves_and_padding_leaves_no_trace():
    model, documents = model_of(), library()
    bank = bank_of(model, documents)
    rows = [QUESTION, [(0, tokens(2, 60)), (-1, tokens(3, 61))], [(-2, tokens(2, 62)), (-1, tokens(3, 63))]]
    for left in (True, False):
        ids, doc_ids, mask = (torch.full((3, 20), fill) for fill in (7, 0, 0))
        for b, parts in enumerate(rows):
            row, roles = joined(parts)
            n = row.shape[1]
            where = slice(20 - n, 20) if left else slice(0, n)
            ids[b, where], doc_ids[b, where], mask[b, where] = row[0], roles[0], 1
        cache = MemoryCache()
        got = model(ids, attention_mask=mask, roles=Roles(doc_ids, bank=bank), past_key_values=cache).logits
        more = tokens(4, 64).expand(3, -1)
        after = model(more, past_key_values=cache).logits
        for b, parts in enumerate(rows):
            expected = in_context(model, documents, [*parts, (-1, more[b])])[0]
            assert_close(f"row {b}", expected[:-4], got[b][mask[b].bool()], EXACT)
            assert_close(f"after row {b}", expected[-4:], after[b], EXACT)


@pytest.mark.parametrize(
    "lengths", [(), (1,), (5,), (1,) * 12, (3, 50)], ids=["empty", "one token", "one", "one token each", "long"]
)
@torch.no_grad()
def test_odd_libraries(lengths, tmp_path):
    model, documents = model_of(top_k=3), library(lengths)
    bank = bank_of(model, documents, tokens_per_batch=8)
    bank.save(tmp_path)
    for it in (bank, MemoryBank.load(tmp_path, model)):
        assert_close("logits", in_context(model, documents, QUESTION), asked(model, it, QUESTION), EXACT)
        assert it.documents() == list(documents) and it.stats()["tokens"] == sum(lengths)


@torch.no_grad()
def test_documents_of_one_text_stand_beside_each_other():
    model, documents = model_of(top_k=3), library()
    documents |= {"again": documents["d5"], "and again": documents["d5"], "d3 again": documents["d3"]}
    bank = bank_of(model, documents, tokens_per_batch=16)
    assert_close("logits", in_context(model, documents, QUESTION), asked(model, bank, QUESTION), EXACT)


@pytest.mark.parametrize("limit", [1 << 26, 2000], ids=["merging", "small shards"])
@torch.no_grad()
def test_any_history_equals_a_rebuild(limit, monkeypatch, tmp_path):
    monkeypatch.setattr(memlm.bank.shelf, "SHARD_BYTES", limit)
    model, documents = model_of(), library()
    bank = bank_of(model, {}, tokens_per_batch=16)
    generator = torch.Generator().manual_seed(0)
    for step in range(24):
        kind, seed = (int(torch.randint(n, (), generator=generator)) for n in (4, 1000))
        names = list(documents) if step else []
        if not step:
            bank.add(documents)
        elif kind == 0 and names:
            bank.delete(names[seed % len(names)])
            del documents[names[seed % len(names)]]
        elif kind == 1 and names:
            name = names[seed % len(names)]
            del documents[name]
            documents[name] = tokens(1 + seed % 17, seed)
            bank.update({name: documents[name]})
        elif kind == 2:
            bank.save(tmp_path)
            bank = MemoryBank.load(tmp_path, model)
        else:
            new = {f"{step}a": tokens(1 + seed % 23, seed), f"{step}b": tokens(3, seed)}
            bank.add(new)
            documents |= new
        assert bank.documents() == list(documents)
        assert_close(f"step {step}", in_context(model, documents, QUESTION), asked(model, bank, QUESTION), EXACT)
        stats = bank.stats()
        assert stats["dead_chunks"] <= stats["chunks"] and stats["tokens"] == sum(map(len, documents.values()))
    rebuilt = bank_of(model, documents)
    assert_close("rebuilt", asked(model, rebuilt, QUESTION), asked(model, bank, QUESTION), 1e-12)
    for layer, rows in bank.search(tokens(5, 3).repeat(2, 1)).items():
        again = rebuilt.search(tokens(5, 3)[None])[layer][0]
        assert all([*row] == [*again] and len(row) == 2 and set(row) <= set(documents) for row in rows)
        assert [*again.values()] == sorted(again.values(), reverse=True)


def test_an_update_that_changes_nothing_reads_nothing(monkeypatch):
    model, documents = model_of(), library()
    bank = bank_of(model, documents)
    monkeypatch.setattr(bank, "_shard", lambda pairs: pytest.fail("read"))
    bank.update(documents)


def test_adding_reads_and_writes_what_is_new(tmp_path):
    model = model_of()
    bank = bank_of(model, {f"{i}": tokens(40, i) for i in range(50)})
    bank.save(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    bank = MemoryBank.load(tmp_path, model)
    bank.add({"new": tokens(9, 99)})
    bank.delete("7")
    bank.save(tmp_path)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    (new,) = set(tmp_path.glob("shard-*")) - set(before)
    assert new.stat().st_size < next(iter(before)).stat().st_size / 10
    again = MemoryBank.load(tmp_path, model)
    assert again.documents() == bank.documents() and "7" not in again and "new" in again
    assert again.stats()["host_bytes"] == 0 and again.stats()["dead_chunks"] == 10


def interrupted(documents, after):
    """An iterator over documents that ends with a Ctrl-C."""
    yield from list(documents.items())[:after]
    raise KeyboardInterrupt


def stop_a_build(folder, monkeypatch):
    monkeypatch.setattr(memlm.bank.bank, "AHEAD", 1)
    monkeypatch.setattr(memlm.bank.bank, "COMMIT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        bank_of(model_of(), interrupted(library(), 7), directory=folder, tokens_per_batch=16)


@torch.no_grad()
def test_a_killed_build_goes_on(tmp_path, monkeypatch):
    model, documents = model_of(), library()
    stop_a_build(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="the build was not finished; run it again"):
        MemoryBank.load(tmp_path, model)
    read, shard = [], MemoryBank._shard
    monkeypatch.setattr(MemoryBank, "_shard", lambda self, x: read.extend(e.name for e in x) or shard(self, x))
    bank = bank_of(model, documents, directory=tmp_path)
    assert 0 < len(read) < len(documents)
    assert set(bank.documents()) == set(documents)
    assert_close("logits", in_context(model, documents, QUESTION), asked(model, bank, QUESTION), EXACT)
    assert MemoryBank.load(tmp_path, model).documents() == bank.documents()
    with pytest.raises(ValueError, match="holds a finished bank; load it and add"):
        bank_of(model, documents, directory=tmp_path)


def test_a_build_goes_on_with_other_documents(tmp_path, monkeypatch):
    stop_a_build(tmp_path, monkeypatch)
    model, documents = model_of(), library()
    del documents["d0"]
    documents["d1"] = tokens(11, 88)
    bank = bank_of(model, documents, directory=tmp_path)
    assert set(bank.documents()) == set(documents) and bank.stats()["tokens"] == sum(map(len, documents.values()))


def torn(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "hole":
        path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("pattern", "how", "message"),
    [
        ("shard-*", "cut", "torn or changed since it was saved; restore the file"),
        ("shard-*", "hole", "torn or changed since it was saved; restore the file"),
        ("shard-*", "gone", "a part of the bank is missing; restore the file"),
        ("index.json", "cut", "damaged or not a bank's"),
        ("index.json", "gone", "no such file; a bank is written by MemoryBank.save"),
    ],
)
def test_torn_files_are_named(tmp_path, pattern, how, message):
    model = model_of()
    bank_of(model, library()).save(tmp_path)
    (path,) = tmp_path.glob(pattern)
    torn(path, how)
    with pytest.raises(ValueError, match=message) as error:
        MemoryBank.load(tmp_path, model)
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_another_model_is_refused(tmp_path):
    model, question = model_of(), tokens(4, 1)[None]
    bank = bank_of(model, library())
    bank.save(tmp_path)
    for other in (model_of(seed=1), model_of(top_k=3), model_of().float()):
        with pytest.raises(ValueError, match="a bank of the model of fingerprint"):
            MemoryBank.load(tmp_path, other)
        with pytest.raises(ValueError, match="memory_bank: made by a model of fingerprint"):
            other.generate(question, memory_bank=bank, max_new_tokens=2)
        with pytest.raises(ValueError, match="a bank of the model of fingerprint"):
            bank_of(other, {}).save(tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="memory_bank: made by a model of fingerprint"):
        bank.add({"more": [1, 2]})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_a_model_with_adapters_has_a_bank_of_its_own(tmp_path):
    peft = pytest.importorskip("peft")
    model, question = model_of().float(), tokens(5, 3)[None]
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    bank_of(adapted, library()).save(tmp_path)
    bank = MemoryBank.load(tmp_path, adapted)
    assert bank.search(question) and adapted(question, roles=Roles.query(bank, question)).logits.isfinite().all()
    for other in (model, adapted.merge_and_unload()):
        with pytest.raises(ValueError, match="a bank of the model of fingerprint"):
            MemoryBank.load(tmp_path, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_weight_counts_and_is_counted_once(dtype, monkeypatch):
    model = model_of().to(dtype)
    weight, found, counted = model.model.embed_tokens.weight, fingerprint(model.model), []
    monkeypatch.setattr(memlm.fingerprint, "_AT_ONCE", 1000)
    checksum = memlm.fingerprint._checksum
    monkeypatch.setattr(memlm.fingerprint, "_checksum", lambda x: counted.append(x) or checksum(x))
    assert fingerprint(model.model) == found and not counted
    seen = {found}
    # One flipped bit, two swapped values, and values that move by one place.
    for row, others in ((7, weight[7] * (1 + torch.finfo(dtype).eps)), (2, weight[2].flip(0)), (5, weight[5].roll(1))):
        old = weight[row].clone()
        weight[row, 3:9] = others[3:9]
        seen.add(fingerprint(model.model))
        weight[row] = old
        assert fingerprint(model.model) == found
    assert len(seen) == 4
    model.model.embed_tokens.weight = torch.nn.Parameter(weight.clone())
    counted.clear()
    assert fingerprint(model.model) == found and counted
    assert fingerprint(copy.deepcopy(model.model)) == found


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ({"a": []}, r"documents\['a'\] of shape \[0\] must be token ids"),
        ({"a": "text"}, r"documents\['a'\]='text': this bank has no tokenizer: build it with tokenizer="),
        ({"a": [1.5]}, r"documents\['a'\] of shape \[1\] must be token ids"),
        ({"a": [[1]]}, r"documents\['a'\] of shape \[1, 1\] must be token ids"),
        ({"a": [3, 259]}, r"documents\['a'\] holds token 259; the model has tokens 0 to"),
        ({"a": [-1]}, r"documents\['a'\] holds token -1; the model has tokens 0 to"),
        ([("a", [1]), ("a", [2])], r"documents\['a'\]"),
        ({"d0": [1]}, r"documents\['d0'\] is in the bank already; update it"),
    ],
)
def test_bad_documents_are_named_and_change_nothing(documents, message):
    bank = bank_of(model_of(), library())
    with pytest.raises(ValueError, match=message):
        bank.add([("fine", [1, 2]), *(documents.items() if isinstance(documents, dict) else documents)])
    assert bank.documents() == list(library())


def test_bad_requests_are_named():
    model = model_of()
    bank, ids = bank_of(model, library()), torch.zeros(1, 4, dtype=torch.long)
    for change in (bank.delete, lambda name: bank.update({name: [1]})):
        with pytest.raises(ValueError, match="document 'x' is not in the bank of 10"):
            change("x")
    with pytest.raises(ValueError, match="documents in the input cannot be combined with a bank"):
        model(ids, roles=Roles(ids + 1, bank=bank))
    with pytest.raises(ValueError, match="packed rows cannot ask a bank"):
        model(ids, position_ids=torch.arange(4)[None], roles=Roles.query(bank, ids))
    for options, message in (
        ({"tokens_per_batch": 0}, "tokens_per_batch=0 must be at least 1"),
        ({"content": "tape"}, "content='tape' must be one of mapped, host, device"),
        ({"key_dtype": "int8"}, "key_dtype='int8' must be one of auto, float64, float32"),
    ):
        with pytest.raises(ValueError, match=message):
            bank_of(model, {}, **options)
    with pytest.raises(ValueError, match="a bank needs 'msa' in every layer"):
        bank_of(build("titans_mag"), {})
    with pytest.raises(ValueError, match="a bank needs one that routes"):
        bank_of(model_of(routes=False), {})


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_low_precision(autocast):
    # All documents are chosen, because rounding may change a close choice.
    model, documents = model_of(top_k=12), library()
    expected = in_context(model, documents, QUESTION)
    low = model.float() if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bank = bank_of(low, documents)
        got = asked(low, bank, QUESTION)
    assert bank.shelf.shards[0].router_LCGK.dtype == bank.shelf.shards[0].content_LC2GK.dtype == low.dtype
    assert_close("logits", expected, got.double(), 2e-2)


@torch.no_grad()
def test_what_was_chosen_is_all_that_decoding_sees():
    model = model_of()
    bank, cache = bank_of(model, {f"{i}": tokens(8, i) for i in range(300)}), MemoryCache()
    model(tokens(5, 1)[None], roles=Roles.query(bank, tokens(5, 1)[None]), past_key_values=cache)
    # Two documents of two chunks each, at the last token.
    assert all(state["bank"]["k"].shape[1] == 2 * 2 and state["k"].shape[1] == 5 for state in cache.states)
    assert relative_error(model(tokens(5, 1)[None]).logits, asked(model, bank, [(0, tokens(5, 1))])) > 1e-3
    for more in range(1, 4):
        model(tokens(1, more)[None], past_key_values=cache)
        assert all(state["front"].all() and state["k"].shape[1] == 4 + 5 + more for state in cache.states)
