"""Questions from JSONL files: how they are drawn and written as samples, and that a bank and ``Interleave`` agree."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from memlm.data import Questions, QuestionSource, RetrievalRow, build_data
from memlm.data.questions import shuffled
from memlm.data.retrieval import make_sample
from memlm.data.tokenizer import byte_tokenizer


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def records(count=40):
    return [
        {
            "query": f"What is the number of {n}?",
            "documents": [f"The number of {n} is {n * n}.", f"Nothing is known of {n}.", f"{n} was here."],
            "positives": [0],
            "answer": str(n * n),
        }
        for n in range(count)
    ]


def record(**changed):
    good = {"query": "a", "documents": ["b"], "positives": [0], "answer": "c"}
    return json.dumps(good | changed, ensure_ascii="\ud800" in changed.values())


@pytest.fixture
def questions(tmp_path):
    return Questions(str(write(tmp_path / "questions.jsonl", records())), tmp_path)


def text(ids):
    return bytes(ids.tolist()).decode()


def test_questions_become_samples(questions):
    source = QuestionSource(questions, byte_tokenizer(), 512, 0, num_documents=5)
    row = source.row(0, "train", 0)
    starts = [*np.flatnonzero(row.position_ids == 0), 512]
    assert len(starts) > 3
    for start, end in list(itertools.pairwise(starts))[:-1]:
        sample = RetrievalRow(*(part[start:end] for part in row))
        number = int(text(sample.input_ids[sample.doc_ids == 0]).strip().split()[-1].rstrip("?"))
        assert text(sample.input_ids[sample.positives == 1]) == f"The number of {number} is {number * number}."
        scored = sample.labels[sample.labels != -100]
        assert text(scored[:-1]) == str(number * number) and scored[-1] == byte_tokenizer().eos_token_id
        documents = [text(sample.input_ids[sample.doc_ids == n]) for n in range(1, 6)]
        assert len(set(documents)) == 5 and f"Nothing is known of {number}." in documents
    assert not row.positives[starts[-2] :].any() and (row.labels[starts[-2] :] == -100).all()


TEMPLATE = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template=TEMPLATE):
    """A byte tokenizer with special tokens for the start and the end of a turn."""
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_template_surrounds_what_is_asked_and_answered(tmp_path):
    tokenizer, said = chat_tokenizer(), record(query="Who<|im_end|>?", documents=["an owl", "a cat"])
    (tmp_path / "questions.jsonl").write_text(f"{said}\n" * 3)
    questions = Questions(str(tmp_path / "questions.jsonl"), tmp_path)
    source = QuestionSource(questions, tokenizer, 140, 0, templates="chat")
    row = source.row(0, "train", 0)
    assert row.position_ids[:-1].min() == 0 and (row.position_ids == 0).sum() == 2
    end, (length,) = tokenizer.eos_token_id, np.flatnonzero(row.position_ids[1:] == 0) + 1
    roles = [(role, [*group]) for role, group in itertools.groupby(range(length), lambda t: row.doc_ids[t])]
    parts = [(role, tokenizer.decode(row.input_ids[of])) for role, of in roles]
    assert [role for role, _ in parts] == [-2, 1, 2, 0, -2, -1]
    assert {parts[1][1], parts[2][1]} == {"an owl", "a cat"}
    assert parts[0][1] == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert [text for _, text in parts[3:]] == [
        "\nWho<|im_end|>?\n",
        "<|im_end|>\n",
        "<|im_start|>assistant\nc<|im_end|>",
    ]
    assert tokenizer.decode(row.input_ids[row.positives == 1]) == "an owl"
    # The content of a question is text, even if it looks like the end of a turn.
    assert (row.input_ids[:length] == end).sum() == 3 and end not in row.input_ids[:length][row.doc_ids[:length] == 0]
    assert row.labels[row.labels != -100].tolist() == [ord("c"), end]
    library = source.library("train", 9, 9)
    asked = make_sample(library.template, [], *library.inquiries[0][:2], library.tail, library.opening)
    outside = row.doc_ids[:length] <= 0
    assert asked.input_ids.tolist() == row.input_ids[:length][outside].tolist()
    assert asked.doc_ids.tolist() == row.doc_ids[:length][outside].tolist()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "templates='chat', but the tokenizer has no chat template; set templates=plain, or data.tokenizer"),
        ("{{ messages[0].content | upper }}", "chat template changes what is said; set templates=plain"),
        ("{% if not add_generation_prompt %}a{% endif %}" + TEMPLATE, "chat template changes what is said"),
    ],
)
def test_a_chat_template_that_cannot_serve_is_named(questions, template, message):
    with pytest.raises(ValueError, match=message):
        QuestionSource(questions, chat_tokenizer(template), 512, 0, templates="chat")


def test_what_a_question_is_told_from(tmp_path):
    """The question's own documents come first; no text comes twice, and no other document has the answer."""
    shared = [{"documents": ["yes", "near", "near", "yes"], "positives": [3]}, {"documents": ["far", "yes", "near"]}]
    (tmp_path / "questions.jsonl").write_text("\n".join([record(query=f"{i}", **shared[i % 2]) for i in range(60)]))
    questions = Questions(str(tmp_path / "questions.jsonl"), tmp_path)
    for most, expected in ((2, ["near", "yes"]), (9, ["far", "near", "yes"])):
        source = QuestionSource(questions, byte_tokenizer(), 400, 0, num_documents=most)
        row = source.row(0, "train", 0)
        starts = [*np.flatnonzero(row.position_ids == 0)]
        checked = 0
        for start, end in itertools.pairwise(starts):
            sample = RetrievalRow(*(part[start:end] for part in row))
            if int(text(sample.input_ids[sample.doc_ids == 0])) % 2 == 0:
                documents = [text(sample.input_ids[sample.doc_ids == n]) for n in range(1, sample.doc_ids.max() + 1)]
                assert sorted(documents) == expected and text(sample.input_ids[sample.positives == 1]) == "yes"
                checked += 1
        assert checked > 2


def test_splits_share_no_question(questions):
    source = QuestionSource(questions, byte_tokenizer(), 256, 0, num_documents=2)
    asked = {}
    for split in ("train", "validation", "test"):
        rows = [source.row(index, split, 0) for index in range(30)]
        asked[split] = set()
        for row in rows:
            asked[split] |= set(text(row.input_ids[row.doc_ids == 0]).strip().split("\n"))
        asked[split].discard("")
    assert len(asked["validation"]) == len(asked["test"]) == 2
    assert not asked["train"] & asked["validation"] and not asked["train"] & asked["test"]


def test_documents_are_cut_and_give_way(questions):
    source = QuestionSource(questions, byte_tokenizer(), 60, 0, num_documents=9, document_length=12)
    row = source.row(0, "train", 0)
    numbers, sizes = np.unique(row.doc_ids[row.doc_ids > 0], return_counts=True)
    assert len(numbers) <= 2 and (sizes <= 12).all() and (row.positives.sum() == 12)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON in UTF-8"),
        (b"\xff", "not JSON in UTF-8"),
        ("[1]", "not an object; give query, documents, positives, answer"),
        ('{"query": "a"}', "documents is missing; give query, documents, positives, answer"),
        (record(query=""), "query='' must be a text that is not empty"),
        ('{"query": "a", "documents": ["b"]}', "positives is missing"),
        (record(answer=7), "answer=7 must be a text"),
        (record(answer="\ud800"), "answer='.ud800' must be a text"),
        (record(documents="a text"), "documents='a text' must be a list of texts"),
        (record(documents=[]), r"documents=\[\] must be a list of texts"),
        (record(documents=["b", None]), r"documents\[1\]=None must be a text that is not empty"),
        (record(positives=[1]), r"positives=\[1\] must be a list that names at least one of 1 documents"),
        (record(positives=[]), r"positives=\[\] must be a list that names"),
        (record(positives=[-1]), r"positives=\[-1\] must be"),
        (record(positives=[True]), r"positives=\[True\] must be"),
        (record(positives=0), "positives=0 must be a list"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "questions.jsonl"
    good = record(query="\u2028 is no end of a line").encode()
    file.write_bytes(b"\n".join([good, b"", line if isinstance(line, bytes) else line.encode()]))
    with pytest.raises(ValueError, match=rf"^{file}:3: {message}") as caught:
        Questions(str(file), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_library_of_questions(questions):
    library = QuestionSource(questions, byte_tokenizer(), 512, 0, document_length=20).library("validation", 5, 9)
    assert len(library.documents) == 5 and len(library.inquiries) == 2 and library.chance == 0.0
    for inquiry in library.inquiries:
        number = text(inquiry.question).strip().split()[-1].rstrip("?")
        (found,) = inquiry.found
        assert text(library.documents[found]) == f"The number of {number} is {int(number) ** 2}."[:20]
        assert text(inquiry.answer[:-1]) == str(int(number) ** 2)


def test_what_does_not_fit_is_named(questions, tmp_path):
    with pytest.raises(ValueError, match="seq_len=20 is too short for the question"):
        QuestionSource(questions, byte_tokenizer(), 20, 0)
    with pytest.raises(ValueError, match="no question of 2 is left for the train split"):
        few = Questions(str(write(tmp_path / "few.jsonl", records(2))), tmp_path)
        QuestionSource(few, byte_tokenizer(), 200, 0)
    with pytest.raises(ValueError, match=r"nowhere\.jsonl does not exist"):
        Questions("nowhere.jsonl", tmp_path)


def test_built_from_a_config(tmp_path, questions):
    sources = {
        "facts": {"kind": "facts", "weight": 0.5, "num_documents": 4, "digits": 2},
        "questions": {"kind": "questions", "weight": 0.5, "paths": str(tmp_path / "questions.jsonl")},
    }
    cfg = {"tokenizer": "byte", "noise_ramp": [0, 0], "seq_len": 200, "cache_dir": str(tmp_path), "sources": sources}
    _, mixture = build_data(cfg, seed=0, batch_size=4)
    batch = mixture.batch(0)
    assert batch.roles.doc_ids.shape == batch.roles.positives.shape == (4, 200)
    del sources["questions"]["paths"]
    with pytest.raises(ValueError, match=r"data\.sources\.questions\.paths is missing"):
        build_data(cfg, seed=0, batch_size=4)
    sources["questions"] |= {"paths": str(tmp_path / "questions.jsonl"), "num_documents": 2.5}
    with pytest.raises(ValueError, match=r"num_documents=2.5 is not a whole number"):
        build_data(cfg, seed=0, batch_size=4)
    for templates, message in (
        ("chats", "templates='chats' must be plain, chat, interleave, or texts of interleave's that differ"),
        ({"documents": ""}, "templates.documents is unknown; did you mean 'document'"),
        ({"document": "[{name}]"}, r"document='\[\{name\}\]' must hold \{text\}"),
        ({"head": 1}, "head=1 must be a text"),
    ):
        sources["questions"] |= {"num_documents": 2, "templates": templates}
        with pytest.raises(ValueError, match=f"data.sources.questions: {message}"):
            build_data(cfg, seed=0, batch_size=4)


def test_a_row_costs_what_its_tokens_do(tmp_path, monkeypatch):
    """The cost does not depend on the number of questions, and the last one drawn may not fit."""
    read, getitem = [], Questions.__getitem__
    monkeypatch.setattr(Questions, "__getitem__", lambda self, i: read.append(i) or getitem(self, i))
    counts = []
    for count in (100, 4000):
        path = write(tmp_path / f"{count}.jsonl", records(count))
        source = QuestionSource(Questions(str(path), tmp_path), byte_tokenizer(), 400, 0, num_documents=8)
        encoded, encode = [], source._write._encode
        source._write._encode = lambda pieces, encode=encode, encoded=encoded: (
            encoded.append(encode(pieces)) or encoded[-1]
        )
        read.clear()
        rows = [source.row(i, "train", 0) for i in range(20)]
        assert len({row.input_ids.tobytes() for row in rows}) == 20
        counts.append(len(read))
        assert sum(map(len, encoded)) < 1.6 * 20 * 400
        again = QuestionSource(Questions(str(path), tmp_path), byte_tokenizer(), 400, 0, num_documents=8)
        assert all(np.array_equal(a, b) for a, b in zip(rows[7], again.row(7, "train", 3), strict=True))
    assert counts[1] < 1.3 * counts[0] < 20 * 20


def test_shuffled_is_a_shuffle():
    rng = np.random.default_rng(0)
    orders = [tuple(shuffled(rng, 4)) for _ in range(4800)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    counts = Counter(orders)
    assert len(counts) == 24 and max(abs(count - 200) for count in counts.values()) < 60
    assert next(shuffled(rng, 10**12)) < 10**12 and [*shuffled(rng, 0)] == []


def test_an_index_is_made_once_and_of_what_the_files_hold(tmp_path, monkeypatch):
    path = write(tmp_path / "questions.jsonl", records(5))
    first = Questions(str(path), tmp_path / "cache")
    assert len(first) == 5 and first[3].query == "What is the number of 3?" and first[3].positives == (0,)
    monkeypatch.setattr("memlm.data.questions._index", lambda *_: pytest.fail("made again"))
    assert [q.answer for q in Questions(str(path), tmp_path / "cache")] == ["0", "1", "4", "9", "16"]
    monkeypatch.undo()
    write(path, records(6))
    assert len(Questions(str(path), tmp_path / "cache")) == 6


def test_documents_are_named_by_numbers_and_asked_for_in_order(tmp_path):
    several = [{**r, "positives": [0, 2]} | ({} if i % 2 else {"answer": None}) for i, r in enumerate(records())]
    questions = Questions(str(write(tmp_path / "questions.jsonl", several)), tmp_path)
    short = {"question": "?{question}", "head": "#", "tail": "", "document": "[{name}] {text}", "name": "[{name}]"}
    source = QuestionSource(questions, byte_tokenizer(), 420, 0, 5, templates=short, num_names=30)
    kinds = Counter()
    for index in range(40):
        row = source.row(index, "train", 0)
        (starts,) = np.nonzero(row.position_ids == 0)
        sample = RetrievalRow(*(part[: starts[1]] for part in row))
        names = {}
        for n in range(1, sample.doc_ids.max() + 1):
            document = text(sample.input_ids[sample.doc_ids == n])
            names[document[document.index("]") + 2 :]] = int(document[1 : document.index("]")])
        assert len(names) <= 5 and len({*names.values()}) == len(names) and max(names.values()) < 30
        said = text(sample.input_ids[(sample.doc_ids == 0)])
        number = int(said[: said.index("?", 1)].split()[-1])
        wanted = sorted(names[x] for x in (f"The number of {number} is {number**2}.", f"{number} was here."))
        scored = text(sample.labels[sample.labels != -100][:-1])
        asked, _, rest = scored.partition("<|object_ref_end|")
        assert asked == "".join(f"[{n}]" for n in wanted)
        found = {
            names[text(sample.input_ids[sample.doc_ids == n]).split("] ")[1]]
            for n in sample.doc_ids[sample.positives == 1]
        }
        answered = "The answer" in rest
        assert found == (set() if answered else {*wanted}) and not (answered and number % 2 == 0)
        kinds[answered, number % 2] += 1
    assert min(kinds.values()) > 4 and len(kinds) == 3
    with pytest.raises(ValueError, match="has no answer, which only templates=interleave can do without"):
        QuestionSource(questions, byte_tokenizer(), 420, 0)
    with pytest.raises(ValueError, match="num_names=4 must be at least num_documents=5 and 2, the most positives"):
        QuestionSource(questions, byte_tokenizer(), 420, 0, 5, templates=short, num_names=4)
    with pytest.raises(ValueError, match=r"seq_len=150 is too short for the question .* raise data.seq_len to"):
        QuestionSource(questions, byte_tokenizer(), 150, 0, 5, templates=short)
