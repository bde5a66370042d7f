import numpy as np
import pytest
import torch

from memlm import MemLMForCausalLM
from memlm.data import Facts, Mixture, RecallSource, Row
from memlm.data.recall import ASK, FILLER, KEYS, MARK, NOISE, VALUES
from memlm.data.retrieval import make_sample, pack
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
    assert (len(library.documents), len(library.inquiries), library.chance) == (700, 700, 1 / 1024)
    keys = [key_of(document) for document in library.documents]
    assert len(set(keys)) == 700
    assert abs(np.mean([len(d) for d in library.documents]) - (100 - 7) / 8) < 0.1
    for inquiry in library.inquiries:
        (number,) = inquiry.found
        assert tuple(inquiry.question.tolist()) == (ASK, *keys[number])
        assert (
            library.documents[number][np.isin(library.documents[number], VALUES)].tolist() == inquiry.answer.tolist()
        )
    # A question that is asked twice would count twice in the interval.
    assert len({inquiry.found for inquiry in library.inquiries}) == 700
    again = task.library(5, "test", 700, 900)
    assert all(np.array_equal(a, b) for a, b in zip(library.documents, again.documents, strict=True))
    with pytest.raises(ValueError, match="num_documents=20000 must lie between 1 and the 10922 keys"):
        task.library(5, "test", 20000, 1)


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


def test_sizes_that_do_not_fit_are_named():
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


class Numbers:
    def row(self, index, split, step):
        return Row(np.arange(128), np.arange(128), np.arange(128))


def test_rows_of_text_beside_documents_are_responses():
    mixture = Mixture({"facts": RecallSource(Facts(), 0, (0, 0)), "text": Numbers()}, {"facts": 1, "text": 1}, 4)
    batch = mixture.batch(0)
    doc_ids, positives = batch.roles.doc_ids, batch.roles.positives
    assert (doc_ids[2:] == -1).all() and not positives[2:].any() and positives[:2].any()
    assert batch.to("cpu").roles is not None
    plain = Mixture({"text": Numbers()}, {"text": 1}, 4).batch(0)
    assert plain.roles is None and model_inputs(plain, "cpu")["roles"] is None


def test_a_router_learns_which_document_to_read():
    """Chance finds one of eight."""
    torch.manual_seed(0)
    model = MemLMForCausalLM(model_config("msa", chunk_size=4, top_k=1, loss_weight=1.0))
    objective, optimizer = Objective(model).train(), torch.optim.AdamW(model.parameters(), lr=3e-3)
    mixture = Mixture({"facts": RecallSource(Facts(length=64), 0, (0, 0))}, {"facts": 1}, 16)
    hits, losses = [], []
    for step in range(60):
        loss, _, metrics = objective(**model_inputs(mixture.batch(step), "cpu"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits.append(metrics["layer1/hit@1"].item())
        losses.append(metrics["layer1/router"].item())
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert np.mean(hits[:5]) < 0.35 and np.mean(hits[-10:]) > 0.45
