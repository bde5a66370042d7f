"""Several queries of a bank on one memory, and reading in turns until a question is answered."""

import itertools
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import memlm.interleave
from memlm import Interleave, MemLMForCausalLM, MemoryBank, MemoryCache
from memlm.data import TEMPLATES, Questions, QuestionSource, RetrievalRow, byte_tokenizer
from memlm.roles import Roles
from memlm_kernels.testing import assert_close, relative_error
from tests.conftest import model_config
from tests.data.test_questions import records
from tests.test_bank import EXACT, bank_of, in_context, joined, library, model_of, tokens

# A template, then three questions with text between them.
TALK = [(-2, tokens(3, 50)), *((role, tokens(n, 60 + i)) for i, (role, n) in enumerate([(0, 5), (-1, 3)] * 3))]
CUTS = {"each part": [3, 5, 3, 5, 3, 5, 3], "together": [11, 8, 8], "tokens": [3, *[1] * 24], "odd": [5, 4, 9, 2, 7]}


def talked(model, bank, parts, cuts, **options):
    """The logits of calls on one memory, each of which may query the bank, and the memory."""
    cache, logits = MemoryCache(), []
    for ids, doc_ids in zip(*(x.split(cuts, 1) for x in joined(parts)), strict=True):
        roles = Roles(doc_ids, bank=bank if (doc_ids == 0).any() else None)
        logits.append(model(ids, roles=roles, past_key_values=cache, **options).logits)
    return torch.cat(logits, 1), cache


def twice() -> dict[str, torch.Tensor]:
    """Some documents are in the bank twice, so that scores are equal."""
    documents = library()
    return documents | {f"{name} again": documents[name] for name in ("d5", "d0", "d8")}


ROUTERS = [
    {},
    {"similarity": "dot", "chunk_size": 1, "top_k": 1},
    {"head_reduce": "max", "top_k": 3, "positions": "top_k"},
    {"chunk_size": 64, "top_k": 16, "qk_norm": False},
]


@pytest.mark.parametrize(
    ("settings", "cuts"),
    [
        pytest.param(router, cut, marks=[] if not router or cut == "odd" else pytest.mark.slow)
        for router in ROUTERS
        for cut in CUTS
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
        logits.append(model(i, roles=Roles(d), past_key_values=cache).logits)
    expected = torch.cat(logits, 1)[:, 3 + skip :]
    assert_close("logits", expected, talked(model, bank_of(model, documents), TALK, cuts)[0][:, 3:], EXACT)


@torch.no_grad()
def test_rows_ask_when_they_will():
    """Rows wait, continue or query independently: each is as alone."""
    model, documents = model_of(), twice()
    bank, cache = bank_of(model, documents), MemoryCache()
    # For each call, the role and the tokens of each row.
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
        roles = Roles(doc_ids, bank=bank if c < 5 else None)
        logits = model(ids, roles=roles, attention_mask=mask, past_key_values=cache).logits
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
    """Added documents come behind the first question; deleted ones stay where they were chosen."""
    model, old, new = model_of(), library(), {"new": tokens(9, 77), "newer": tokens(5, 78)}
    bank = bank_of(model, old)
    first, second = TALK[:3], TALK[3:5]
    _, cache = talked(model, bank, first, [3, 5, 3])
    pieces = [(n + 1, ids) for n, ids in enumerate(old.values())]
    ids, doc_ids = joined([first[0], *pieces, *first[1:], *((20 + n, x) for n, x in enumerate(new.values())), *second])
    expected = model(ids, roles=Roles(doc_ids)).logits[:, -8:]
    bank.add(new)
    cache.save(tmp_path / "memory")
    bank.save(tmp_path / "bank")
    for it, memory in (
        (bank, cache.fork()),
        # The same documents in the same order have the same numbers.
        (bank_of(model, old | new), cache.fork()),
        (MemoryBank.load(tmp_path / "bank", model), MemoryCache.load(tmp_path / "memory")),
    ):
        ids, doc_ids = joined(second)
        got = model(ids, roles=Roles(doc_ids, bank=it), past_key_values=memory, write=False).logits
        assert_close("grown", expected, got, EXACT)
        held = [set(state["bank"]["number"][0].tolist()) for state in memory.states]
        it.delete(it.shelf.name(min(set.intersection(*held))))
        again = model(ids, roles=Roles(doc_ids, bank=it), past_key_values=memory).logits
        assert_close("deleted", expected, again, EXACT)


@torch.no_grad()
def test_what_was_chosen_stands_beside_another_bank():
    model, old, new = model_of(), library(), {"d0": tokens(9, 77), "newer": tokens(5, 78)}
    bank, (ids, doc_ids) = bank_of(model, old), joined(TALK[3:5])
    _, cache = talked(model, bank, TALK[:3], [3, 5, 3])
    held = cache.states[0]["bank"]["number"]
    bank.delete(bank.documents())
    bank.add(new)
    expected = model(ids, roles=Roles(doc_ids, bank=bank), past_key_values=cache.fork()).logits
    got = model(ids, roles=Roles(doc_ids, bank=bank_of(model, new)), past_key_values=cache).logits
    assert_close("both", expected, got, EXACT)
    after = set(cache.states[0]["bank"]["number"].flatten().tolist())
    assert after & set(held.flatten().tolist()) and len(after) == 2


@torch.no_grad()
def test_tidying_a_bank_changes_nothing_for_a_memory(monkeypatch):
    got, model = [], model_of()
    for tidies in (True, False):
        bank = bank_of(model, twice())
        _, cache = talked(model, bank, TALK[:3], [3, 5, 3])
        with monkeypatch.context() as patched:
            if not tidies:
                patched.setattr(bank.shelf, "_replace", lambda start, end: None)
            bank.delete([f"d{i}" for i in range(8)])
        assert (bank.stats()["dead_chunks"] == 0) == tidies
        bank.add({"new": tokens(9, 77)})
        ids, doc_ids = joined(TALK[3:5])
        got.append(model(ids, roles=Roles(doc_ids, bank=bank), past_key_values=cache).logits)
    assert torch.equal(*got)


@torch.no_grad()
def test_generation_goes_on_from_an_answer():
    model, documents = model_of(), library()
    bank, (first, second) = bank_of(model, documents), (tokens(5, 3), tokens(4, 4))
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    cache = MemoryCache()
    said = model.generate(
        first[None], memory_bank=bank, past_key_values=cache, attention_mask=torch.ones(1, 5), **options
    )
    # The last generated token is not in the memory yet.
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
    bank = bank_of(model, library())
    read = MemoryCache()
    model(ids, roles=Roles(torch.ones_like(ids)), past_key_values=read)
    for memory, it in ((read, bank), (read, bank_of(model, {}))):
        with pytest.raises(ValueError, match="this memory holds documents that were read in it; ask with a fork"):
            model(ids, roles=Roles.query(it, ids), past_key_values=memory)
    for settings in ({"query_reduce": "mean"}, {"chunk_reduce": "mean"}):
        model = model_of(**settings)
        bank = bank_of(model, library())
        _, cache = talked(model, bank, TALK[:2], [3, 5])
        with pytest.raises(ValueError, match="let a memory ask a memory_bank once: a mean needs the scores of all"):
            model(ids, roles=Roles.query(bank, ids), past_key_values=cache)


class Script:
    """Writes in place of the model, question by question, and keeps the model's own predictions."""

    def __init__(self, monkeypatch, written: dict[str, str]) -> None:
        end = byte_tokenizer().eos_token_id
        self.written = {q: [end if sign == "~" else ord(sign) for sign in text] for q, text in written.items()}
        self.logits, self.places = ({question: [] for question in written} for _ in range(2))
        monkeypatch.setattr(memlm.interleave, "_likeliest", self)

    def __call__(self, logits_BV, readings):
        tokens = []
        for logits_V, reading in zip(logits_BV, readings, strict=True):
            place = reading.config.max_new_tokens - reading.left
            tokens.append(self.written[reading.question][place] if reading.writing else 0)
            if reading.writing:
                self.logits[reading.question].append(logits_V)
                self.places[reading.question].append(len(reading.ids) - 1)
        return tokens


TEXTS = {"a": "one", "b": "some two", "c7": "{name}, or three", "d": "4", "e": "{5}"}
SHORT = Interleave(**TEMPLATES, max_rounds=3, max_new_tokens=30)
# For each question: the written text (~: the end of text), and its result.
WRITTEN = {
    "at once": ("42~", ("42", [], [], True)),
    "one round": ("[b]|=yes~", ("yes", [["b"]], [], True)),
    "two at once, then one": ("[a][c7]|[e]| and =it~", ("it", [["a", "c7"], ["e"]], [], True)),
    "the same again": ("[a]|[a]|so~", ("so", [["a"]], [], True)),
    "some unknown": ("[x][b][y]|=no~", ("no", [["b"]], ["x", "y"], True)),
    "only unknown": ("[x]|well~", ("well", [], ["x"], True)),
    "names nothing": ("hm|7~", ("7", [], [], True)),
    "malformed": ("[a b|[d]hm~", ("[d]hm", [], [], True)),
    "too many rounds": ("[a]|[b]|[d]|[e]|all~", ("all", [["a"], ["b"], ["d"]], [], True)),
    "no end": ("[a]|" + "." * 26, ("." * 26, [["a"]], [], False)),
    "no end of an answer": ("=" + "|" * 29, ("|" * 29, [], [], False)),
}


def checked(model, bank, templates, script, answers):
    """A transcript in one call has the same logits with the bank and with its documents in the context."""
    texts = {name: TEXTS[name] for name in bank.documents()}
    documents = {name: torch.tensor(ids) for name, ids in templates.documents(texts, byte_tokenizer())}
    for question, answer in zip(script.written, answers, strict=True):
        ids, roles = torch.tensor(answer.input_ids), torch.tensor(answer.doc_ids)
        cuts = [0, *((roles[1:] != roles[:-1]).nonzero()[:, 0] + 1).tolist(), len(roles)]
        parts = [(int(roles[a]), ids[a:b]) for a, b in itertools.pairwise(cuts)]
        logits, places = torch.stack(script.logits[question]), script.places[question]
        again = model(ids[None], roles=Roles(roles[None], bank=bank)).logits[0]
        assert_close(f"{question}, read again", again[places], logits, EXACT)
        in_one = in_context(model, documents, parts)[0]
        assert_close(f"{question}, in the context", in_one[places], logits, EXACT)


@torch.no_grad()
def test_reading_on_equals_reading_all_at_once(monkeypatch):
    model, tokenizer = model_of(), byte_tokenizer()
    bank = bank_of(model, SHORT.documents(TEXTS, tokenizer))
    script = Script(monkeypatch, {question: text for question, (text, _) in WRITTEN.items()})
    answers = SHORT.answers(list(WRITTEN), bank, TEXTS, tokenizer)
    for answer, (question, (_, expected)) in zip(answers, WRITTEN.items(), strict=True):
        assert answer[:4] == expected, question
    assert tokenizer.decode(answers[2].input_ids) == (
        "#?two at once, then one[a][c7]|[a]one[c7]{name}, or three|[e]|[e]{5}| and =it<eos>"
    )
    assert tokenizer.decode(answers[3].input_ids) == "#?the same again[a]|[a]one|[a]|=so<eos>"
    checked(model, bank, SHORT, script, answers)


@torch.no_grad()
def test_the_released_texts_and_an_empty_bank(monkeypatch):
    model, tokenizer, released = model_of(), byte_tokenizer(), Interleave()
    end = "<|object_ref_end|>"
    written = {
        "Who?": f"[a][d]{end}[b]{end}<End-of-Retrieve>The answer to the question is: 7.~",
        "And who?": f"[q]{end}Nobody.~",
        "Why?": "The answer to the question is: 8~",
    }
    for texts, read in ((TEXTS, [["a", "d"], ["b"]]), ({}, [])):
        bank = bank_of(model, released.documents(texts, tokenizer))
        if not texts:
            written["Who?"] = written["Who?"].replace(f"[b]{end}<End-of-Retrieve>", "")
        script = Script(monkeypatch, written)
        answers = released.answers(list(written), bank, texts, tokenizer)
        assert [(answer.text, answer.read) for answer in answers] == [("7.", read), ("Nobody.", []), ("8", [])]
        assert answers[0].unknown == ([] if texts else ["a", "d"]) and answers[1].unknown == ["q"]
        checked(model, bank, released, script, answers)
    text = tokenizer.decode(answers[1].input_ids)
    assert text.startswith("<|im_start|>user\n\nPlease answer the question") and "\nAnd who?\n" in text
    assert text.endswith(
        f"<|im_end|>\n<|im_start|>[q]{end}<End-of-Retrieve><|im_start|>The user's question is: And who?\n{end}"
        "Nobody.<eos>"
    )


def test_texts_that_cannot_be_are_named(monkeypatch):
    for settings, message in (
        ({"document": "[{name}]"}, r"document='\[\{name\}\]' must hold \{text\}"),
        ({"head": "{name}"}, r"head='\{name\}' holds \{name\}, which it is not given"),
        ({"name": "doc {name}"}, "must hold something after"),
        ({"answer": "yes"}, r"answer='yes' must hold \{answer\}"),
        ({"end_of_names": ""}, "end_of_names='' and end_of_retrieval='<End-of-Retrieve>' must be texts"),
        ({"end_of_names": "Retrieve"}, "and neither may contain the other"),
        ({"max_rounds": -1}, "max_rounds=-1 must not be negative"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Interleave(**settings)
    model, tokenizer = model_of(), byte_tokenizer()
    bank = bank_of(model, SHORT.documents(TEXTS, tokenizer))
    Script(monkeypatch, {"?": "[a]|"})
    with pytest.raises(ValueError, match="texts: 'a' is in the bank, and has no text; give it"):
        SHORT.answers(["?"], bank, {}, tokenizer)
    assert SHORT.answers([], bank, TEXTS, tokenizer) == []
    bare = Interleave(**TEMPLATES | {"question": "{question}"})
    with pytest.raises(ValueError, match="questions: '' has no tokens; ask something"):
        bare.answers([""], bank, TEXTS, tokenizer)


MARKS = ["<|im_start|>", "<|object_ref_end|>"]


def marked_tokenizer(merges):
    """A tokenizer with Qwen's special tokens; merges: with tokens of several bytes too."""
    tokenizer = byte_tokenizer()
    if merges:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        texts = ["]. The number of 12 is 144.[12]", "\n[12]. Nothing is known", "answer to the question is: 144"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(texts, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.split_special_tokens = False
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS, "eos_token": "<|im_end|>"})
    return tokenizer


@pytest.mark.parametrize("merges", [False, True])
def test_a_training_sample_is_what_a_reader_is_fed_and_writes(merges, tmp_path, monkeypatch):
    """Token by token, documents too; text that looks like a special token is text."""
    tokenizer, questions = marked_tokenizer(merges), records(30)
    for number, question in enumerate(questions):
        question["documents"][number % 3] += " x<|im_end|>[7]<|object_ref_end|>"
        question["query"] = f"<|im_start|>{number}<|im_end|>"
        question["positives"] = [0, 2] if number % 2 else [1]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    questions = Questions(str(tmp_path / "questions.jsonl"), tmp_path)
    source = QuestionSource(questions, tokenizer, 900, 0, 4, document_length=35, templates="interleave")
    way, kinds = Interleave(max_rounds=1), set()
    config = model_config("msa", chunk_size=4, top_k=2)
    config.vocab_size = 400
    model = MemLMForCausalLM(config).eval()
    for index in range(8):
        row = source.row(index, "train", 0)
        length = int(np.flatnonzero(row.position_ids[1:] == 0)[0]) + 1
        sample = RetrievalRow(*(part[:length] for part in row))
        texts, documents = {}, []
        for n in range(1, sample.doc_ids.max() + 1):
            documents.append(sample.input_ids[sample.doc_ids == n].tolist())
            said = tokenizer.decode(documents[-1])
            name = said[len("<|im_start|>[") : said.index("]")]
            texts[name] = said.removeprefix(f"<|im_start|>[{name}]. ").removesuffix(f"[{name}]<|im_end|>")
        assert [ids for _, ids in way.documents(texts, tokenizer)] == documents
        scored = sample.labels[sample.labels != -100].tolist()
        read = scored[-1] == tokenizer.eos_token_id
        kinds.add((read, int(sample.positives.any())))
        written = iter(scored if read else [*scored, *[tokenizer.eos_token_id] * 2])
        monkeypatch.setattr(memlm.interleave, "_likeliest", lambda *_, written=written: [next(written)])
        question = tokenizer.decode(sample.input_ids[sample.doc_ids == 0]).split("\n\n")[1].split("\nPlease")[0]
        bank = MemoryBank.build(model, way.documents(texts, tokenizer), progress=False)
        (answer,) = way.answers([question], bank, texts, tokenizer)
        outside = sample.doc_ids <= 0
        end = None if read else int(outside.sum())
        assert answer.input_ids[:end] == sample.input_ids[outside].tolist()
        assert answer.doc_ids[:end] == sample.doc_ids[outside].tolist()
        number = int(question.removeprefix("<|im_start|>").removesuffix("<|im_end|>"))
        assert not read or answer.text == str(number**2)
        assert answer.unknown == [] and len(answer.read[0]) == 1 + number % 2
    assert kinds == {(True, 0), (False, 1)}


def test_benign_texts_are_what_the_tokenizer_makes_of_them():
    for merges in (False, True):
        tokenizer, way = marked_tokenizer(merges), Interleave()
        ((_, ids),) = way.documents({"12": "The number of 12 is 144."}, tokenizer)
        text = "<|im_start|>[12]. The number of 12 is 144.[12]<|im_end|>"
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) < 26 if merges else len(ids) == 36
        ((_, ids),) = way.documents({"1": "a<|im_end|>{text}"}, tokenizer)
        assert ids.count(tokenizer.eos_token_id) == 1 and "a<|im_end|>{text}[1]" in tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["a]", "a]b", "", "a<|object_ref_end|>", "<End-of-Retrieve>"])
def test_names_that_a_model_could_not_write_are_refused(name):
    with pytest.raises(ValueError, match="cannot be a name, because it would not be read as one") as caught:
        [*Interleave().documents({"fine [": "x", name: "y"}, byte_tokenizer())]
    assert "\n" not in str(caught.value)
