"""Protocols on the state: their answers follow from their texts, and oracles and guessers score as they must."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memlm.data import byte_tokenizer
from memlm.evaluation.events import Ask, Edit, Learn, Read, Shelve, run
from memlm.evaluation.measures.asked import cells
from memlm.evaluation.statistics import wilson
from memlm.evaluation.tasks import Setting, tasks
from memlm.evaluation.tasks.invented import sentences
from memlm.evaluation.tasks.saturation import _crossing
from memlm.evaluation.tasks.sessions import _parsed
from memlm.reader import Reader
from tests.conftest import ROOT
from tests.oracles import Guesser, Oracle, scores

LINES = [
    {
        "session": ["Ann went to Rome.", "Bob has a dog.", "Ann went to Oslo."],
        "questions": [
            {"q": "Where is Ann?", "a": "Rome", "evidence": 0, "until": 2, "distractors": ["Bern"]},
            {"q": "Where is Ann?", "a": "Oslo", "old": ["Rome"], "evidence": [0, 2], "distractors": ["Bern"]},
            {"q": "What has Bob?", "a": "a dog"},
        ],
    }
]
SIZES = {
    "overwrite": {"rewrites": [0, 3], "others": 2, "gap": 8},
    "overwrite_text": {"rewrites": [0, 3], "others": 1, "sentences": 2},
    "saturation": {"pairs": [1, 4, 10], "asked": 6, "gap": 3, "num_keys": 8, "key_symbols": 2, "num_values": 4},
    "order": {"segment": 8, "distances": [8, 24]},
    "exposure": {"exposures": [1, 2], "others": [0, 2]},
    "while_constructing": {"sessions": 6, "every": 3, "noise": [0, 1], "questions": 3, "changes": 0.5},
    "sessions": {"every": 1},
    "stores": {
        **{"facts": 6, "rewritten": 2, "fresh": 2, "gap": 8, "num_keys": 8, "num_values": 4},
        "by": ["memory", "steps", "edit", "bank"],
    },
}
TASKS = pytest.mark.parametrize("name", SIZES)


def bpe_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    lines = sentences(np.random.default_rng(0))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator((next(lines) for _ in range(200)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


SETTINGS = {"byte": Setting(byte_tokenizer(), 0), "bpe": Setting(bpe_tokenizer(), 0)}


@pytest.fixture
def make(tmp_path):
    def task(name, rows=2, **given):
        if name == "sessions":
            (tmp_path / "sessions.jsonl").write_text("\n".join(map(json.dumps, LINES)))
            given = {"path": str(tmp_path / "sessions.jsonl"), **given}
        return tasks({name: {**SIZES[name], **given}}, [64], rows)[0]

    return task


def llama():
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, max_position_embeddings=2048)).eval()


@TASKS
@pytest.mark.parametrize("tokens", ["byte", "bpe"])
def test_an_oracle_is_always_right(name, tokens, make):
    task, setting = make(name), SETTINGS[tokens]
    task.check(setting)
    records = list(task.reduce(scores(Oracle, task.streams(setting), 400)))
    assert records and all(r["correct"] == 1.0 for r in records)
    # Every view has cells, and its floors belong to columns.
    for view in task.views():
        found = cells(view, records)
        assert found and {cell["view"] for cell in found} == {view.name}
        for floor in view.floors.values():
            assert not isinstance(floor, dict) or {*floor} >= {cell["across"] for cell in found}
    assert task.tokens() >= 1


@pytest.mark.parametrize("name", [name for name in SIZES if name != "sessions"])
def test_a_guesser_scores_the_chance(name, make):
    sizes: dict = {"exposure": {"by": ["state"], "others": [0]}, "overwrite": {"num_values": 8}}
    sizes = {**sizes, "stores": {"by": ["nothing"]}}.get(name, {})
    task = make(name, rows=24, **sizes)
    records = [r for r in task.reduce(scores(Guesser, task.streams(SETTINGS["byte"]), 259)) if len(r["shares"]) > 1]
    chance = task.views()[0].floors["chance"]
    low, high = wilson(np.mean([r["correct"] for r in records]), len(records))
    assert low <= chance <= high


@TASKS
def test_any_cut_of_the_reading_gives_the_same_answers(name, make):
    torch.manual_seed(0)
    model = llama()
    # Steps on weights read nothing.
    by = {"exposure": ["state"], "stores": ["memory"]}
    task = make(name, rows=1, **({"by": by[name]} if name in by else {}))
    streams = list(task.streams(SETTINGS["byte"]))
    whole, cut = ([r["nats"] for r in run(lambda n=n: Reader(model, n), streams)] for n in (2048, 23))
    assert cut == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("name", ["overwrite", "saturation"])
def test_the_answer_follows_the_latest_place_of_the_key(name, make):
    for stream in make(name, num_values=16, num_keys=8).streams(SETTINGS["byte"]):
        read = np.zeros(0, np.int64)
        for event in stream:
            if isinstance(event, Read):
                read = np.concatenate([read, event.ids])
                continue
            key = event.ids[SIZES[name]["gap"] :] if name == "saturation" else event.ids
            places = [i for i in range(len(read) - len(key)) if (read[i : i + len(key)] == key).all()]
            if name == "saturation":
                places = [i for i in places if i % 3 == 0]
                assert len(places) == 1
            values = [int(read[i + len(key)]) for i in places]
            assert event.answers[0].tolist() == values[-1:]
            assert sorted(map(int, np.concatenate(event.answers))) == sorted(
                {*map(int, np.concatenate(event.answers))}
            )
            if name == "overwrite":
                assert len(values) == event.tag["rewrites"] + 1 and places[-1] == 64 - 8 - 2
                stale = [
                    int(a[0]) for a, kind in zip(event.answers, event.tag["kinds"], strict=True) if kind == "stale"
                ]
                assert sorted(stale) == sorted(values[:-1])


@pytest.mark.parametrize("name", ["overwrite_text", "while_constructing"])
def test_the_answer_is_the_one_that_the_text_gives(name, make):
    setting, kinds = SETTINGS["byte"], set()
    for stream in make(name, rows=6).streams(setting):
        told = {}
        for event in stream:
            text = setting.decode(event.ids)
            if isinstance(event, Read):
                for attribute, who, value in re.findall(r"he (\w+) of (\w+) (?:is|was) (\w+)\.", text):
                    told.setdefault((attribute, who), []).append(value)
                continue
            values = told[re.search(r"the (\w+) of (\w+) ", text, re.IGNORECASE).groups()]
            answers = [setting.decode(a).strip() for a in event.answers]
            assert answers[0] == (values[0] if text.startswith("At first") else values[-1])
            assert len(answers) == len({*answers})
            for answer, kind in zip(answers, event.tag["kinds"], strict=True):
                kinds.add(kind)
                assert (kind == "stale") <= (answer in values[:-1])
                assert (kind in ("other", "fabricated", "omitted")) <= (answer not in values)
    expected = (
        {"latest", "stale", "other"} if name == "overwrite_text" else {"right", "stale", "fabricated", "omitted"}
    )
    assert kinds == expected


def test_an_age_counts_the_pairs_since_and_a_distance_the_tokens_between_starts(make):
    def place(ids, of, step=1):
        (found,) = (i for i in range(0, len(of) - len(ids) + 1, step) if (of[i : i + len(ids)] == ids).all())
        return found

    for stream in make("saturation", num_values=16, num_keys=8).streams(SETTINGS["byte"]):
        read = np.zeros(0, np.int64)
        for event in stream:
            if isinstance(event, Read):
                read = np.concatenate([read, event.ids])
                continue
            age = (len(read) - place(event.ids[SIZES["saturation"]["gap"] :], read, 3)) // 3 - 1
            first, _, last = event.tag["age in pairs"].partition("-")
            assert int(first) <= age <= int(last or first) and event.tag["pairs"] == len(read) // 3
    for read, *asks in [s for s in make("order", segment=16, distances=[16, 40]).streams(SETTINGS["byte"])][::2]:
        for ask in asks:
            a, b = np.split(ask.answers[0], 2)
            assert place(b, read.ids) - place(a, read.ids) == ask.tag["distance"]


def test_the_last_value_is_not_the_answer(make):
    """Neither that of the text, nor that of the sentences that have the question's form."""
    for read, ask in make("overwrite", rows=8).streams(SETTINGS["byte"]):
        (values,) = np.nonzero(np.isin(read.ids, np.concatenate(ask.answers)))
        assert read.ids[values[-1]] != ask.answers[0][0]
    for read, *asks in make("overwrite_text", rows=8, others=2, sentences=6).streams(SETTINGS["byte"]):
        text = SETTINGS["byte"].decode(read.ids)
        for ask, form in zip(
            asks, (r"Now the town of \w+ is (\w+)", r"At first, the town of \w+ was (\w+)"), strict=True
        ):
            assert re.findall(form, text)[-1] != SETTINGS["byte"].decode(ask.answers[0]).strip()


@pytest.mark.parametrize("name", ["saturation", "while_constructing"])
def test_guessers_have_the_values_that_the_text_tells(name, make):
    setting, scored = SETTINGS["byte"], []
    for stream in make(name, rows=6).streams(setting):
        text = ""
        for event in stream:
            if isinstance(event, Read):
                text += setting.decode(event.ids)
                continue
            answers = [setting.decode(a).strip() for a in event.answers]
            values = list(text)[2::3] if name == "saturation" else re.findall(r"The \w+ of \w+ is (\w+)\.", text)
            known = [value for value in values if value in answers]
            share = {answer: known.count(answer) for answer in answers}
            best = [answer for answer in answers if share[answer] == max(share.values())]
            expected = {"values told": (answers[0] in best) / len(best), "last value": known[-1] == answers[0]}
            assert event.tag["guesses"] == expected
            scored.append(expected["last value"])
    # More than the chance of one who has nothing.
    assert np.mean(scored) > 0.25


def test_the_clauses_that_were_read_have_the_floor_of_recall(make):
    task = make("exposure", rows=4, exposures=[1], others=[0, 3], by=["state"])
    floor = task.views()[1].floors["has those that were read"]
    for stream in task.streams(SETTINGS["byte"]):
        read = set()
        for event in stream:
            if isinstance(event, Read):
                read.add(event.ids.tobytes())
            elif event.tag["test"] == "recall":
                assert floor[event.tag["other items"]] == 1 / len(read)
                assert np.concatenate([event.ids, event.answers[0]]).tobytes() in read


def test_the_control_of_recognition_is_one_half(make):
    """Two texts exchange the sentence and its counterpart, so a preference for one of them cancels out."""
    torch.manual_seed(0)
    task, model = make("exposure", rows=6, exposures=[0], by=["state"]), llama()
    records = task.reduce(run(lambda: Reader(model), task.streams(SETTINGS["byte"])))
    found = cells(task.views()[0], list(records))
    assert [(cell["down"], cell["value"]) for cell in found] == [("0 by state", 0.5)] * 2


def test_state_and_weights_hold_the_same_items(make):
    task = make("exposure")
    by = {}
    for stream in task.streams(SETTINGS["byte"]):
        seen = [event.ids.tolist() for event in stream if not isinstance(event, Ask)]
        kind = {type(event) for event in stream} - {Ask}
        asks = [event for event in stream if isinstance(event, Ask)]
        assert kind <= ({Read} if asks[0].tag["by"] == "state" else {Learn})
        by.setdefault(asks[0].tag["by"], []).append((seen, [(a.ids.tolist(), a.answers[0].tolist()) for a in asks]))
        item, foil = asks[0].answers
        assert len(item) == len(foil) and not np.array_equal(item, foil)
    assert by["state"] == by["weights"]


def test_all_stores_get_the_same_facts_and_the_latest_value_is_right(make):
    kinds = {"memory": Read, "steps": Learn, "edit": Edit, "bank": Shelve, "nothing": Read}
    by = {}
    for stream in make("stores", by=[*kinds], rows=3).streams(SETTINGS["byte"]):
        asks = [event for event in stream if isinstance(event, Ask)]
        (store,) = {ask.tag["store"] for ask in asks}
        assert {type(event) for event in stream} == {Ask, kinds[store], Shelve if store == "bank" else Read}
        by.setdefault(store, []).append([(int(a.ids[-1]), int(a.answers[0][0]), a.tag["asked"]) for a in asks])
        if store == "nothing":
            assert sum(len(event.ids) for event in stream if isinstance(event, Read)) == 8 + 2 * 2
            continue
        told, noise = {}, 0
        for event in stream:
            if isinstance(event, Ask):
                key, value = int(event.ids[-1]), int(event.answers[0][0])
                assert told[key][-1] == value
                if event.tag["asked"] == "written again":
                    assert int(event.answers[event.tag["earlier"]][0]) == told[key][-2]
                assert len(event.answers) == 4 and len({int(a[0]) for a in event.answers}) == 4
            elif not isinstance(event, Edit) and event.ids.size == 8 and (event.ids < 97).all():
                noise += 1
            else:
                for key, value in event.ids.reshape(-1, 2).tolist():
                    told.setdefault(key, []).append(value)
        assert noise == 1 and len(told) == 8
    assert by["memory"] == by["steps"] == by["edit"] == by["bank"] == by["nothing"]


def test_an_order_of_passages_is_scored_with_the_symmetrised_gain(make):
    """log P(AB) - log P(BA) is the gain of B after A, less that of A after B."""
    torch.manual_seed(0)
    table = torch.randn(259, 259).log_softmax(-1).double()

    def nats(ids):
        return -float(table[ids[:-1], ids[1:]].sum())

    for stream in make("order", rows=1).streams(SETTINGS["byte"]):
        for event in stream[-2:]:
            (ab, ba), size, front = event.answers, 8, int(event.ids[-1])
            a, b = ab[:size], ab[size:]
            assert np.array_equal(ba, np.concatenate([b, a]))
            alone = {name: nats([front, *x]) for name, x in (("a", a), ("b", b))}
            gain_b = alone["b"] - (nats([front, *a, *b]) - alone["a"])
            gain_a = alone["a"] - (nats([front, *b, *a]) - alone["b"])
            assert gain_b - gain_a == pytest.approx(nats([front, *ba]) - nats([front, *ab]))


def test_capacity_is_where_the_share_crosses_one_half(make):
    assert _crossing([2, 4, 8], np.array([1.0, 1.0, 0.6])) == 8
    assert _crossing([2, 4, 8], np.array([1.0, 0.75, 0.25])) == 6
    assert _crossing([2, 4], np.array([0.0, 0.0])) == 1
    task = make("saturation", pairs=[2, 4])
    about = {"bytes": 2048, "stream": 0}
    records = [{"pairs": n, "correct": c, **about} for n, c in ((2, 1.0), (2, 0.5), (4, 0.0), (4, 0.5))]
    totals = task.totals(records)
    assert totals["capacity, pairs"] == (3.0, 3.0, 3.0) and totals["capacity, pairs per KB of state"][0] == 1.5


def test_questions_of_a_file_are_asked_when_their_evidence_was_read(make):
    (stream,) = make("sessions").streams(SETTINGS["byte"])
    told = [SETTINGS["byte"].decode(event.ids if isinstance(event, Read) else event.answers[0]) for event in stream]
    assert told == [
        "Ann went to Rome.\n",
        " Rome",
        "Bob has a dog.\n",
        " Rome",
        "Ann went to Oslo.\n",
        " Oslo",
        " a dog",
    ]


def test_the_form_in_the_readme_is_read():
    text = (ROOT / "memlm" / "evaluation" / "README.md").read_text()
    (shown,) = re.findall(r"```json\n(.*?)```", text, flags=re.S)
    sessions, questions = _parsed(json.dumps(json.loads(shown)), "README.md:1")
    assert (sessions, [question.a for question in questions]) == (LINES[0]["session"], ["Rome", "Oslo", "a dog"])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", ":2: Expecting property name .* must be a JSON object"),
        ('{"session": []}', ":2: a line must have the form"),
        ('{"session": ["a"], "questions": [{"q": "b"}]}', r":2: questions\[0\]\.a is missing"),
        ('{"session": ["a"], "questions": [{"q": "b", "a": "c", "evidence": 1}]}', r"evidence=1 must be .* 0\.\.0"),
        ('{"session": ["a"], "questions": [{"q": "b", "a": "c", "until": 4}]}', r"until=4 must be"),
        ('{"session": ["a"], "questions": [{"q": "b", "a": "c", "old": [1]}]}', r"old=\[1\] must be a list of texts"),
        ('{"session": ["a"], "questions": [{"q": "b", "a": "c", "why": 1}]}', r"why=1 is not a setting"),
    ],
)
def test_a_broken_line_of_a_file_is_named(tmp_path, line, told):
    (tmp_path / "s.jsonl").write_text(json.dumps(LINES[0]) + "\n" + line)
    task = tasks({"sessions": {"path": str(tmp_path / "s.jsonl")}}, [64], 2)[0]
    with pytest.raises(ValueError, match=told):
        task.check(SETTINGS["byte"])


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("overwrite", {"rewrites": [40]}, r"rewrites=\[40\] must be whole numbers in 0\.\.29"),
        ("overwrite", {"gap": 60}, r"lengths=\[64\] must be at least 70"),
        ("overwrite", {"gap": 1}, "gap=1 must be at least 2, for half of others=2"),
        ("overwrite", {"num_keys": 200}, "num_keys=200 must lie between 1 and 96"),
        ("overwrite_text", {"others": 9}, "others=9 must be below 8"),
        ("saturation", {"pairs": [4, 2]}, r"pairs=\[4, 2\] must be rising"),
        ("order", {"distances": [60]}, r"lengths=\[64\] must be at least 68"),
        ("order", {"paths": ["/none.txt"]}, "/none.txt: No such file"),
        ("exposure", {"by": ["mind"]}, r"by=\['mind'\] must be a list of state and weights"),
        ("while_constructing", {"every": 9}, "sessions=6 must be at least"),
        ("sessions", {"path": "/none.jsonl"}, "path=/none.jsonl: No such file"),
    ],
)
def test_wrong_settings_are_one_line(name, given, told, make):
    with pytest.raises(ValueError, match=told):
        make(name, **given).check(SETTINGS["byte"])


def test_a_tokenizer_without_the_symbols_is_refused(make):
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0}, "<eos>")), eos_token="<eos>"
    )
    for name in ("overwrite", "saturation"):
        with pytest.raises(ValueError, match=r"eval\.ask.*the tokenizer has 0 words of one token"):
            make(name).check(Setting(words, 0))
