"""Chains of facts: every step of a sample follows from the tokens before it and from the documents alone."""

import numpy as np
import pytest

from memlm import Interleave
from memlm.data import TEMPLATES, Chains, Facts, RecallSource, build_data, byte_tokenizer
from memlm.roles import QUERY, TEMPLATE

TASKS = [
    Chains(length=105, num_documents=6, min_documents=4),
    Chains(length=60, num_documents=2, hops=1, key_length=1, document_length=3),
    Chains(length=300, num_documents=9, hops=3, document_length=12, name_length=2, key_length=3),
]


def text(ids):
    return bytes(ids.tolist()).decode()


def fact(document):
    """The text of a document, and the texts on both sides of its arrow."""
    document = document[document.index("]") + 1 :]
    keys, values = (set("abcdefghijklmnopqrstuvwxyz012345"), set("ABCDEFGHIJKLMNOPQRSTUVWXYZ6789@&"))
    before, behind = document.split(">")
    key = "".join(sign for sign in before if sign in keys)
    return document, key, "".join(sign for sign in behind if sign in keys | values)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_sample_is_written_as_a_reader_of_the_documents_would(task):
    steps, counts = set(), set()
    for index in range(60):
        row = task.sample(3, "test", index, 1.0)
        assert all(part.shape == (task.length,) and part.dtype == np.int64 for part in row)
        (starts,) = np.nonzero(row.position_ids == 0)
        end = starts[1] if len(starts) > 1 else task.length
        assert (row.labels[end:] == -100).all() and (row.doc_ids[end:] == -1).all() and not row.positives[end:].any()
        ids, roles = row.input_ids[:end], row.doc_ids[:end]
        numbers = [n for n in np.unique(roles) if n > 0]
        documents = [text(ids[roles == n]) for n in numbers]
        counts.add(len(documents))
        named = {d[1 : d.index("]")]: d for d in documents}
        assert len(named) == len(documents) and text(ids[roles == TEMPLATE]) == "#"
        by_key = {fact(d)[1]: name for name, d in named.items()}
        assert len(by_key) == len(documents)
        first = int((roles == QUERY).argmax())
        rest, said = ids[first:].tolist(), row.labels[first:end]
        question = "?" + fact(named[by_key["".join(map(chr, rest[1 : 1 + task.key_length]))]])[1]
        # The tokens that a reader writes are scored; the tokens that it is given are not.
        expected, scored, key = list(question.encode()), [False] * len(question), question[1:]
        step, wanted = 0, by_key[key]
        while len(expected) < len(rest):
            if step < task.hops:
                wanted = by_key[key]
                turns = [(f"[{wanted}]|", True), (f"{named[wanted]}|", False)]
                key = fact(named[wanted])[2]
                if len(expected) + len(turns[0][0]) == len(rest):
                    turns = turns[:1]
                step += len(turns) == 2
            else:
                turns, wanted = [(f"={key}~", True)], None
            for turn, is_scored in turns:
                expected += [258 if sign == "~" else ord(sign) for sign in turn]
                scored += [is_scored] * len(turn)
        assert (
            expected == rest
            and (said != -100).tolist() == scored
            and (said[said != -100] == ids[first:][scored]).all()
        )
        steps.add(step)
        found = {int(n) for n in np.unique(row.doc_ids[row.positives == 1])}
        assert found == ({[*named].index(wanted) + 1} if wanted else set())
    assert steps == set(range(task.hops + 1))
    assert counts == set(range(task._fewest // task.hops * task.hops, task.num_documents + 1, task.hops))


@pytest.mark.parametrize("task", [TASKS[0], TASKS[2]], ids=str)
def test_chains_through_a_library(task):
    linked = task.linked(5, "test", 4, 31)
    assert len(linked.chains) == 31 // task.hops and len(linked.texts) == 31 // task.hops * task.hops
    assert linked.chance == 1 / 32 and task.linked(5, "test", 3, 31).texts != linked.texts
    for question, answer, rounds in linked.chains:
        for (name,) in rounds:
            _, key, question_or_answer = fact(f"[{name}]{linked.texts[name]}")
            assert key == question
            question = question_or_answer
        assert question == answer
    keys = {fact(f"[]{x}")[1] for x in task.linked(5, "train", 4, 30).texts.values()}
    assert not keys & {fact(f"[]{x}")[1] for x in linked.texts.values()}
    documents = dict(Interleave(**TEMPLATES).documents({"a": "x"}, byte_tokenizer()))
    assert documents == {"a": list(b"[a]x")}


def test_sizes_that_do_not_fit_are_named():
    for settings, message in (
        (dict(length=104, num_documents=6), "length=104 is too short for .*; make it at least 105"),
        (dict(hops=0), "hops=0 must lie between 1 and the fewest documents, 8"),
        (dict(min_documents=1), "hops=2 must lie between 1 and the fewest documents, 1"),
        (dict(min_documents=9), "min_documents=9 must lie between 1 and num_documents=8"),
        (dict(document_length=4), "document_length=4 must be at least 5, a fact"),
        (dict(num_documents=33, length=1000), "name_length=1 must .* names of num_documents=33 of num_values=32"),
        (dict(num_keys=40), "num_keys=40 must lie between 1 and 32"),
    ):
        with pytest.raises(ValueError, match=message):
            Chains(**{"length": 200, **settings})
    assert Chains(length=105, num_documents=6, min_documents=4).scaled(2).min_documents == 8


def test_rows_of_different_numbers_of_documents():
    """The number of documents varies from row to row; a library may have any number."""
    task = Facts(length=80, num_documents=8, min_documents=3, key_length=2, alike=2)
    counts = [int(task.sample(0, "train", i, 1.0).doc_ids.max()) for i in range(60)]
    assert set(counts) == set(range(3, 9))
    assert len(task.library(0, "test", 20, 5).documents) == 20
    with pytest.raises(ValueError, match="alike=3 must lie between 0 and min_documents - 1 = 2"):
        Facts(num_documents=8, min_documents=3, alike=3, key_length=2)


def test_built_from_a_config(tmp_path):
    source = {"kind": "chains", "weight": 1.0, "num_documents": 4, "hops": 2, "name_length": 2}
    cfg = {
        "tokenizer": "byte",
        "noise_ramp": [0, 0],
        "seq_len": 120,
        "cache_dir": str(tmp_path),
        "sources": {"c": source},
    }
    _, mixture = build_data(cfg, seed=0, batch_size=4)
    assert mixture.batch(0).roles.doc_ids.shape == (4, 120)
    (built,) = mixture.sources.values()
    assert built == RecallSource(Chains(120, 4, name_length=2), built.seed, (0, 0))
