import itertools
import json

import numpy as np
import pytest
import torch

from memlm import MemLMForCausalLM
from memlm.data import Facts, Mixture, QuestionSource, RecallSource, RetrievalRow, Row, build_data, load_questions
from memlm.data.recall import ASK, FILLER, KEYS, MARK, NOISE, VALUES
from memlm.data.retrieval import make_sample, pack
from memlm.data.tokenizer import byte_tokenizer
from memlm.training.objective import Objective, model_inputs
from tests.conftest import model_config

TASKS = [
    Facts(),
    Facts(length=63, num_documents=3, digits=4),
    Facts(length=6, num_documents=1),
    Facts(num_documents=32),
    Facts(length=80, key_length=4, digits=2),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_facts_can_be_answered_from_one_document(task):
    asked = []
    for index in range(50):
        row = task.sample(3, "test", index, 1.0)
        assert all(part.shape == (task.length,) and part.dtype == np.int64 for part in row)
        assert row.doc_ids[0] == -2 and row.input_ids[0] == MARK
        numbers = row.doc_ids[row.doc_ids > 0]
        assert np.array_equal(np.unique(numbers), np.arange(1, task.num_documents + 1))
        assert (np.diff(numbers) >= 0).all()
        question = row.input_ids[row.doc_ids == 0]
        assert question[0] == ASK and len(question) == 1 + task.key_length
        (scored,) = np.nonzero(row.labels != -100)
        assert np.array_equal(scored, np.arange(task.length - task.digits, task.length))
        found = np.unique(row.doc_ids[row.positives == 1])
        assert len(found) == 1
        document = row.input_ids[row.doc_ids == found[0]].tolist()
        fact = [*question[1:].tolist(), *row.labels[scored].tolist()]
        place = next(i for i in range(len(document)) if document[i : i + len(fact)] == fact)
        others = np.delete(document, slice(place, place + len(fact)))
        assert np.isin(others, NOISE).all()
        assert np.isin(row.input_ids[row.doc_ids > 0], np.concatenate([KEYS, VALUES, NOISE])).all()
        asked.append(found[0])
    assert len(set(asked)) > 1 or task.num_documents == 1


def test_facts_among_blanks_and_more_of_them():
    row = Facts().sample(0, "train", 0, 0.0)
    assert not np.isin(row.input_ids, NOISE).any() and (row.input_ids == FILLER).sum() == 128 - 2 - 1 - 1 - 16
    assert Facts().scaled(4) == Facts(length=512, num_documents=32) and Facts().scaled(8).num_documents == 32


def key_of(document):
    return tuple(document[np.isin(document, KEYS)].tolist())


def test_keys_of_several_symbols_are_distinct_and_of_one_split():
    task, keys = Facts(length=60, num_documents=8, key_length=2, num_keys=9), {}
    alike = Facts(length=60, num_documents=4, key_length=2, num_keys=9, alike=2)
    for split in ("train", "validation", "test"):
        keys[split] = set()
        for index in range(60):
            row = task.sample(0, split, index, 1.0)
            of_row = {key_of(row.input_ids[row.doc_ids == n]) for n in range(1, 9)}
            assert len(of_row) == 8 and all(len(key) == 2 for key in of_row)
            keys[split] |= of_row
            row = alike.sample(0, split, index, 1.0)
            of_row = {key_of(row.input_ids[row.doc_ids == n]) for n in range(1, 5)}
            assert len(of_row) == 4
            keys[split] |= of_row
    assert all(len(of_split) == 27 for of_split in keys.values()) and len(set.union(*keys.values())) == 81


def test_alike_keys_differ_in_one_symbol():
    task = Facts(length=80, key_length=4, alike=3)
    for index in range(30):
        row = task.sample(0, "test", index, 1.0)
        keys = [key_of(row.input_ids[row.doc_ids == n]) for n in range(1, 9)]
        asked = tuple(row.input_ids[row.doc_ids == 0][1:].tolist())
        differ = sorted(sum(a != b for a, b in zip(asked, key, strict=True)) for key in keys)
        assert differ[:4] == [0, 1, 1, 1] and differ[4] > 0 and len(set(keys)) == 8


def test_a_library_is_of_unseen_keys_and_its_questions_have_one_document_each():
    task = Facts(length=100, key_length=3, digits=2, alike=5)
    library = task.library(5, "test", 700, 900)
    assert (len(library.documents), len(library.inquiries), library.chance) == (700, 900, 1 / 1024)
    keys = [key_of(document) for document in library.documents]
    assert len(set(keys)) == 700
    assert abs(np.mean([len(d) for d in library.documents]) - (100 - 7) / 8) < 0.1
    for inquiry in library.inquiries:
        (number,) = inquiry.found
        assert tuple(inquiry.question.tolist()) == (ASK, *keys[number])
        assert (
            library.documents[number][np.isin(library.documents[number], VALUES)].tolist() == inquiry.answer.tolist()
        )
    assert len({inquiry.found for inquiry in library.inquiries}) == 700
    again = task.library(5, "test", 700, 900)
    assert all(np.array_equal(a, b) for a, b in zip(library.documents, again.documents, strict=True))
    with pytest.raises(ValueError, match="num_documents=20000 must lie between 1 and the 10922 keys"):
        task.library(5, "test", 20000, 1)


def test_a_library_of_questions(questions):
    library = QuestionSource(questions, byte_tokenizer(), 512, 0, document_length=20).library("validation", 5, 9)
    assert len(library.documents) == 5 and len(library.inquiries) == 2 and library.chance == 0.0
    for inquiry in library.inquiries:
        number = text(inquiry.question).strip().split()[-1].rstrip("?")
        (found,) = inquiry.found
        assert text(library.documents[found]) == f"The number of {number} is {int(number) ** 2}."[:20]
        assert text(inquiry.answer[:-1]) == str(int(number) ** 2)


def test_rows_are_pure_functions_of_their_number():
    source = RecallSource(Facts(), 5, (0, 0))
    for a, b in zip(source.row(3, "train", 0), source.row(3, "train", 9), strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(source.row(3, "train", 0).input_ids, source.row(3, "validation", 0).input_ids)


def test_samples_are_packed_and_padding_is_a_document_of_its_own():
    samples = [
        make_sample([7], [([1, 2], False), ([3], True)], [4], [5, 6]),
        make_sample([], [([8], True)], [9], [10]),
    ]
    row = pack(samples, 12, 99)
    assert row.input_ids.tolist() == [7, 1, 2, 3, 4, 5, 6, 8, 9, 10, 99, 99]
    assert row.labels.tolist() == [-100] * 5 + [5, 6, -100, -100, 10, -100, -100]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 1]
    assert row.doc_ids.tolist() == [-2, 1, 1, 2, 0, -1, -1, 1, 0, -1, -1, -1]
    assert row.positives.tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="samples have 10 tokens, more than a row of 9"):
        pack(samples, 9, 99)


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
    return load_questions(str(write(tmp_path / "questions.jsonl", records())))


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
    """Bytes, and tokens of their own for what begins and ends a turn."""
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_template_surrounds_what_is_asked_and_answered(tmp_path):
    tokenizer, said = chat_tokenizer(), record(query="Who<|im_end|>?", documents=["an owl", "a cat"])
    (tmp_path / "questions.jsonl").write_text(f"{said}\n" * 3)
    questions = load_questions(str(tmp_path / "questions.jsonl"))
    source = QuestionSource(questions, tokenizer, 140, 0, chat=True)
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
    # What stands in a question is text, even if it looks like the end of a turn.
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
        (None, "chat=true, but the tokenizer has no chat template; set chat=false, or data.tokenizer"),
        ("{{ messages[0].content | upper }}", "chat template changes what is said; set chat=false"),
        ("{% if not add_generation_prompt %}a{% endif %}" + TEMPLATE, "chat template changes what is said"),
    ],
)
def test_a_chat_template_that_cannot_serve_is_named(questions, template, message):
    with pytest.raises(ValueError, match=message):
        QuestionSource(questions, chat_tokenizer(template), 512, 0, chat=True)


def test_what_a_question_is_told_from(tmp_path):
    """Its own documents first; no text twice, and none that answers it."""
    shared = [{"documents": ["yes", "near", "near", "yes"], "positives": [3]}, {"documents": ["far", "yes", "near"]}]
    (tmp_path / "questions.jsonl").write_text("\n".join([record(query=f"{i}", **shared[i % 2]) for i in range(60)]))
    questions = load_questions(str(tmp_path / "questions.jsonl"))
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
        load_questions(str(file))
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_named(questions):
    with pytest.raises(ValueError, match="seq_len=20 is too short for the question"):
        QuestionSource(questions, byte_tokenizer(), 20, 0)
    with pytest.raises(ValueError, match="no question of 2 is left for the train split"):
        QuestionSource(questions[:2], byte_tokenizer(), 200, 0)
    with pytest.raises(ValueError, match="not a file"):
        load_questions("nowhere.jsonl")
    for settings, message in (
        (dict(length=10), "length=10 is too short"),
        (
            dict(num_documents=33),
            "num_documents=33 must lie between 1 and the 32 keys that num_keys=32 and key_length=1",
        ),
        (dict(key_length=9), "key_length=9 must lie between 1 and 8"),
        (dict(num_documents=22, num_keys=8, key_length=2), "must lie between 1 and the 21 keys"),
        (dict(digits=0), "digits=0"),
        (dict(key_length=4, alike=8), "alike=8 must lie between 0 and num_documents - 1 = 7"),
        (dict(num_values=97), "num_values=97"),
    ):
        with pytest.raises(ValueError, match=message):
            Facts(**settings)


def test_built_from_a_config(tmp_path, questions):
    sources = {
        "facts": {"kind": "facts", "weight": 0.5, "num_documents": 4, "digits": 2},
        "questions": {"kind": "questions", "weight": 0.5, "paths": str(tmp_path / "questions.jsonl")},
    }
    cfg = {"tokenizer": "byte", "noise_ramp": [0, 0], "seq_len": 200, "cache_dir": str(tmp_path), "sources": sources}
    _, mixture = build_data(cfg, seed=0, batch_size=4)
    batch = mixture.batch(0)
    assert batch.doc_ids.shape == batch.positives.shape == (4, 200)
    del sources["questions"]["paths"]
    with pytest.raises(ValueError, match=r"data\.sources\.questions\.paths is missing"):
        build_data(cfg, seed=0, batch_size=4)
    sources["questions"] |= {"paths": str(tmp_path / "questions.jsonl"), "num_documents": 2.5}
    with pytest.raises(ValueError, match=r"num_documents=2.5 is not a whole number"):
        build_data(cfg, seed=0, batch_size=4)
    sources["questions"] |= {"num_documents": 2, "chat": 1}
    with pytest.raises(ValueError, match=r"data\.sources\.questions\.chat=1 must be true or false"):
        build_data(cfg, seed=0, batch_size=4)


class Numbers:
    def row(self, index, split, step):
        return Row(np.arange(128), np.arange(128), np.arange(128))


def test_rows_of_text_beside_documents_are_responses():
    mixture = Mixture({"facts": RecallSource(Facts(), 0, (0, 0)), "text": Numbers()}, {"facts": 1, "text": 1}, 4)
    batch = mixture.batch(0)
    assert (batch.doc_ids[2:] == -1).all() and not batch.positives[2:].any() and batch.positives[:2].any()
    assert batch.to("cpu").doc_ids is not None
    plain = Mixture({"text": Numbers()}, {"text": 1}, 4).batch(0)
    assert plain.doc_ids is None and model_inputs(plain)["doc_ids"] is None


def test_a_router_learns_which_document_to_read():
    """Chance finds one of eight."""
    torch.manual_seed(0)
    model = MemLMForCausalLM(model_config("msa", chunk_size=4, top_k=1, loss_weight=1.0))
    objective, optimizer = Objective(model).train(), torch.optim.AdamW(model.parameters(), lr=3e-3)
    mixture = Mixture({"facts": RecallSource(Facts(length=64), 0, (0, 0))}, {"facts": 1}, 16)
    hits, losses = [], []
    for step in range(60):
        loss, _, metrics = objective(**model_inputs(mixture.batch(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits.append(metrics["layer1/hit@1"].item())
        losses.append(metrics["layer1/router"].item())
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert np.mean(hits[:5]) < 0.35 and np.mean(hits[-10:]) > 0.45
