"""RULER with any tokenizer: lengths, counts and scores as in its published generator, on every task."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memlm.data.tokenizer import byte_tokenizer
from memlm.evaluation.tasks import Setting, tasks, words
from memlm.evaluation.tasks.ruler import KINDS
from memlm.evaluation.tasks.ruler_lists import frequencies
from memlm.evaluation.tasks.ruler_prompt import string_match_all, string_match_part
from tests.oracles import Guesser, Oracle, scores


def _trained(model, trainer, pre_tokenizer, decoder, **special):
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    rng = np.random.default_rng(0)
    sentences = words.sentences(rng)
    text = [" ".join(next(sentences) for _ in range(20)) for _ in range(20)]
    text += [" ".join(words.numbers(rng, 99) + words.uuids(rng, 20) + words.ENGLISH) + "\n?,;'()!"]
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def bpe():
    """As GPT-2's."""
    special = {"eos_token": "<eos>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    return _trained(
        models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), **special
    )


def sentencepiece():
    """As Llama 2's: a space is put before a text, and a token before that."""
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*map(chr, range(33, 127)), "\n"],
        show_progress=False,
    )
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first")
    found = _trained(
        models.BPE(unk_token="<unk>"), trainer, metaspace, decoders.Metaspace(prepend_scheme="first"),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    return found


TOKENIZERS = {"byte": byte_tokenizer(), "bpe": bpe(), "sentencepiece": sentencepiece()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def asked(tokenizer, lengths, rows=1, seed=0, **settings):
    (task,) = tasks({"ruler": settings}, lengths, rows)
    setting = Setting(tokenizer, seed)
    task.check(setting)
    return setting, list(task.streams(setting))


def texts(setting, stream):
    read, ask = stream
    return setting.decode(read.ids), setting.decode(ask.ids), setting.decode(ask.answers[0])


@pytest.mark.parametrize("seed", [0, 7])
def test_every_text_has_the_asked_length(tokenizer, seed):
    setting, streams = asked(tokenizer, [4096 + seed], 1, seed)
    assert len(streams) == len(KINDS)
    for read, ask in streams:
        generated = KINDS[ask.tag["task"]].generated
        assert ask.tokens == generated
        assert len(read.ids) + len(ask.ids) + generated == ask.tag["length"]
        # The pieces are those of the text encoded at once, but where the last item is cut.
        whole = setting.encode(setting.decode(np.concatenate([read.ids, ask.ids])))
        assert abs(len(whole) - len(read.ids) - len(ask.ids)) <= 3, ask.tag


class Words(Setting):
    """Tokens are words, as str.split finds them: counts do not depend on the words drawn."""

    def __init__(self, seed):
        self.seed, self.ids, self._made = seed, {}, {}
        self.start = np.zeros(0, np.int64)

    def encode(self, text):
        return np.array([self.ids.setdefault(word, len(self.ids)) for word in text.split()], np.int64)

    def pieces(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        words = list(self.ids)
        return " ".join(words[i] for i in ids)


# Facts of texts that RULER's own generator makes at 4,096 words: complete items, and those of the example before.
NUMBERS, UUIDS = (rf"One of the special magic {kind} for \S+ is:" for kind in (r"numbers", "uuids"))
PUBLISHED = {
    "niah_single_1": (r"There and back again\.", 205),
    "niah_multikey_1": (NUMBERS + r" \d{7}\.", 4),
    "niah_multikey_2": (NUMBERS + r" \d{7}\.", 392),
    "niah_multikey_3": (UUIDS + r" [0-9a-f-]{36}\.", 392),
    "niah_multivalue": (NUMBERS + r" \d{7}\.", 4),
    "niah_multiquery": (NUMBERS + r" \d{7}\.", 4),
    "vt": (r"There and back again\.", 206),
    "cwe": (r"\d+\. \w+", 10 * 10 + 30 * 3 + 10 + 1740),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("seed", [0, 1])
def test_texts_hold_what_the_published_generator_puts_there(name, seed):
    setting = Words(seed)
    (task,) = tasks({"ruler": {"tasks": [name]}}, [4096], 1)
    text = texts(setting, *task.streams(setting))[0]
    pattern, count = PUBLISHED[name]
    # The room that it leaves may hold two more entries of a list, the last without its word.
    assert 0 <= len(re.findall(pattern, text)) - count <= (name == "cwe")


def test_frequencies_are_published_ones():
    # RULER's counts of the first eight words of 3,950.
    assert np.floor(3950 * frequencies(80))[:8].tolist() == [2401, 600, 266, 150, 96, 66, 49, 37]


def test_common_words_are_the_most_frequent():
    for length, times in ((3000, (6, 1)), (4096, (30, 3))):
        setting = Words(0)
        (task,) = tasks({"ruler": {"tasks": ["cwe", "fwe"]}}, [length], 1)
        for stream in task.streams(setting):
            text, _, reply = texts(setting, stream)
            if stream[1].tag["task"] == "cwe":
                counts = Counter(text.rpartition("appear most often. 1. ")[2].split()[0::2]).most_common(11)
                assert {n for _, n in counts[:10]} == {times[0]} and counts[10][1] in (times[1], times[1] + 1)
                assert sorted(reply.split()[1::2]) == sorted(word for word, _ in counts[:10])
            else:
                counts = Counter(text.split()).most_common(5)
                assert counts[0][0] == "..." and counts[3][1] > counts[4][1]
                assert reply.replace(",", "").rstrip(".").split() == [word for word, _ in counts[1:4]]


def test_needles_stand_at_drawn_depths_and_answers_are_of_their_keys():
    setting = Words(0)
    for name in ("niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multiquery", "niah_multivalue"):
        places = []
        (task,) = tasks({"ruler": {"tasks": [name]}}, [2000], 40)
        for stream in task.streams(setting):
            text, question, reply = texts(setting, stream)
            held = re.findall(NUMBERS.replace("S+", "S+").replace(r"\S+", r"(\S+)") + r" (\d{7})\.", text)
            asked_for = re.findall(r"[a-z]+-[a-z]+", question.partition(" mentioned ")[0])
            assert len(asked_for) == (4 if name == "niah_multiquery" else 1)
            expected = [value for key in asked_for for owner, value in held if owner == key]
            assert sorted(re.findall(r"\d{7}", reply)) == sorted(expected)
            assert len(expected) == {"niah_multiquery": 4, "niah_multivalue": 4}.get(name, 1)
            if len(held) == 1:
                places.append(1 - text.split()[::-1].index("magic") / len(text.split()))
        if places:
            assert min(places) < 0.1 and max(places) > 0.9 and 0.35 < np.mean(places) < 0.65


def test_a_chain_is_in_order():
    setting = Words(3)
    (task,) = tasks({"ruler": {"tasks": ["vt"]}}, [4096], 1)
    text, question, reply = texts(setting, *task.streams(setting))
    example, _, main = text.rpartition("Memorize and track")
    for part, names in ((example, r"they are: ((?: ?[A-Z]{3}){5})"), (main, None)):
        links = re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z0-9]+)", part)
        expected = (re.search(names, part)[1] if names else reply).split()
        assert [new for new, _ in links] == expected and [old for _, old in links[1:]] == expected[:-1]
    assert f"the value {links[0][1]} in" in question and "5 variables" in question


def test_scorers_are_published_ones():
    assert string_match_all("The Apple, and a pear", ["apple", "plum"]) == 0.5
    assert string_match_all("12345678", ["1234567"]) == 1.0
    assert string_match_part("It is Rome.", ["Paris", "rome"]) == 1.0 and string_match_part("", ["Rome"]) == 0.0


def test_an_oracle_is_right_and_a_guesser_is_not():
    _, streams = asked(TOKENIZERS["byte"], [2500], 1)
    assert all(r["exact"] for r in scores(Oracle, streams, 259)) and len(streams) == len(KINDS)
    assert np.mean([r["correct"] for r in scores(Guesser, streams, 259)]) < 0.05


def test_one_who_repeats_the_end_of_the_text_finds_frequent_words():
    setting, streams = asked(TOKENIZERS["byte"], [4096], 4, tasks=["cwe", "fwe"])
    shares = []
    for read, ask in streams:
        end, reply = read.ids[-ask.tokens :], setting.decode(ask.answers[0])
        words = re.findall(r"[a-z]{2,}", reply)
        found = sum(word in setting.decode(end) for word in words) / len(words)
        assert ask.tag["guesses"] == {"repeats the end": found}
        shares.append(found)
    assert np.mean(shares) > 0.2


def test_a_word_tokenizer_loses_the_text():
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>")
    with pytest.raises(ValueError, match="niah_single_1: the tokenizer does not keep the text, it loses"):
        asked(tokenizer, [4096])


@pytest.mark.parametrize(
    ("settings", "lengths", "line"),
    [
        ({}, [256, 4096], r"lengths=256 is too short for niah_single_1: with this tokenizer it needs \d+ tokens"),
        ({"tasks": ["cwe"]}, [900], "lengths=900 is too short for cwe"),
        ({"tasks": ["niah_single"]}, [900], "tasks: 'niah_single' is unknown; did you mean 'niah_single_"),
        ({"tasks": []}, [900], "tasks=\\[\\] is empty"),
        ({"haystack": "nowhere"}, [900], "haystack=nowhere: cannot be read"),
    ],
)
def test_mistakes_are_a_line(settings, lengths, line):
    with pytest.raises(ValueError, match=line):
        asked(TOKENIZERS["byte"], lengths, **settings)


def test_texts_that_are_too_short_are_left_out_alone():
    """The others are those of a task without them, in the order of the lengths."""
    chosen, setting = ["vt", "cwe", "niah_single_1"], Setting(TOKENIZERS["byte"], 0)
    (task,) = tasks({"ruler": {"tasks": chosen}}, [4096, 800], 1)
    streams, unfit = task.fitting(setting)
    found = [(ask.tag["length"], ask.tag["task"], read.ids.tolist()) for read, ask in streams]
    assert [cell[:2] for cell in found] == [*((4096, name) for name in chosen), (800, "niah_single_1")]
    _, whole = asked(TOKENIZERS["byte"], [4096], tasks=chosen)
    assert [cell[2] for cell in found[:3]] == [read.ids.tolist() for read, _ in whole]
    assert [*unfit] == ["vt, 800 tokens", "cwe, 800 tokens"]
    assert "lengths=800 is too short for cwe" in unfit["cwe, 800 tokens"]
    (task,) = tasks({"ruler": {"tasks": chosen}}, [8], 1)
    with pytest.raises(ValueError, match="lengths=8 is too short for vt"):
        task.fitting(setting)


def test_256_tokens_hold_a_needle():
    asked(TOKENIZERS["bpe"], [400], tasks=["niah_single_1"])


def test_files_are_a_haystack(tmp_path):
    (tmp_path / "one.txt").write_text("First sentence.\nIt goes on! A second one.\n\nThird?")
    (tmp_path / "two.txt").write_text("Fourth.")
    setting, streams = asked(TOKENIZERS["byte"], [2000], tasks=["niah_single_2"], haystack=str(tmp_path))
    text = texts(setting, streams[0])[0]
    text = re.sub(" One of the special [^.]*\\.", "", text)
    assert "afterwards.\n First sentence. It goes on! A second one. Third? Fourth. First sentence." in text
    (tmp_path / "one.txt").write_text(" \n")
    (tmp_path / "two.txt").unlink()
    with pytest.raises(ValueError, match="has no text"):
        asked(TOKENIZERS["byte"], [2000], haystack=str(tmp_path))


def _files(folder):
    paragraphs = [
        {
            "context": f"Paragraph {i} tells that town {i} has {i + 10} towers. It tells more.",
            "qas": [
                {"question": f"How many towers has town {i}?", "answers": [{"text": f"{i + 10} towers"}]},
                {"question": "Why?", "answers": [], "is_impossible": True},
            ],
        }
        for i in range(30)
    ]
    squad = {"data": [{"paragraphs": paragraphs[:15]}, {"paragraphs": paragraphs[15:]}]}
    hotpotqa = [
        {
            "question": f"Where is {i}?",
            "answer": f"Place {i}",
            "context": [[f"Title {i}{k}", ["One. ", "Two."]] for k in "ab"],
        }
        for i in range(9)
    ]
    for name, data in (("squad", squad), ("hotpotqa", hotpotqa)):
        (folder / name).write_text(json.dumps(data))
    return {name: str(folder / name) for name in ("squad", "hotpotqa")}


def test_questions_have_their_documents_among_others(tmp_path, tokenizer):
    setting, streams = asked(tokenizer, [1500, 4000], 2, tasks=["qa_1", "qa_2"], **_files(tmp_path))
    for read, ask in streams:
        assert len(read.ids) + len(ask.ids) + 32 == ask.tag["length"] and ask.tokens == 32
        text, question, reply = texts(setting, (read, ask))
        titles = [int(n) for n in re.findall(r"Document (\d+):", text)]
        assert titles == list(range(1, len(titles) + 1)) and len(titles) > 3
        number = int(re.search(r"(?:town|is) (\d+)\?", question)[1])
        if ask.tag["task"] == "qa_1":
            assert f"town {number} has {number + 10} towers. It tells more." in text
            assert ask.judge(ask.answers[0]) == 1.0 and f"{number + 10} towers" in reply
        else:
            assert f"Title {number}a" in text and f"Title {number}b" in text
    assert all(r["exact"] for r in scores(Oracle, streams[:4], len(tokenizer)))


def test_files_of_another_form_are_a_line(tmp_path):
    files = _files(tmp_path)
    with pytest.raises(ValueError, match=r"squad=null: qa_1 needs a file; name SQuAD's JSON"):
        asked(TOKENIZERS["byte"], [4096], tasks=["qa_1"])
    for path in (files["hotpotqa"], "nowhere", str(tmp_path)):
        with pytest.raises(ValueError, match=re.escape(f"eval.ask.ruler.squad={path}: is not SQuAD's JSON")):
            asked(TOKENIZERS["byte"], [4096], tasks=["qa_1"], squad=path)
    with pytest.raises(ValueError, match=r"has 30 questions; lower eval\.rows"):
        asked(TOKENIZERS["byte"], [4096], 31, tasks=["qa_1"], squad=files["squad"])
