"""Recall as events: who has every answer scores 1, who has nothing scores chance, the set guesser scores its floor."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memlm.data import byte_tokenizer
from memlm.evaluation.events import Ask, run
from memlm.evaluation.measures import measures
from memlm.evaluation.tasks import Setting, tasks
from memlm.reader import Reader
from tests.oracles import Guesser, Oracle, guessed, scores

BYTES = Setting(byte_tokenizer(), 0)
ASKED = {
    "mqar": {"forms": ["own", "zoology", "stacked"], "num_pairs": 4},
    "selective_copying": {"num_symbols": 8},
    "fuzzy_recall": {"num_pairs": 3},
    "key_value_distance": {"num_pairs": 4},
}


def task(name, lengths=(64,), rows=100, **settings):
    (found,) = tasks({name: {**ASKED[name], **settings}}, [*lengths], rows)
    return found


def shares(records, key):
    values = {record[key] for record in records}
    return {value: [r["correct"] for r in records if r[key] == value] for value in values}


@pytest.mark.parametrize("name", ASKED)
def test_whoever_has_the_answers_is_right_and_whoever_has_nothing_is_at_chance(name):
    asked = task(name, rows=40)
    streams = list(asked.streams(BYTES))
    assert all(r["exact"] for r in scores(Oracle, streams, 256))
    # The guesser draws from all 256 bytes.
    assert np.mean([r["correct"] for r in scores(Guesser, streams, 256)]) == pytest.approx(1 / 256, abs=0.01)
    assert all(0 < floor < 1 for floor in asked.floors().values())


@pytest.mark.parametrize("name", ASKED)
def test_whoever_has_the_answers_without_their_keys_has_the_floor(name):
    asked = task(name)
    streams = list(asked.streams(BYTES))
    records = scores(Oracle, streams, 256, guessed(streams, motifs=name == "fuzzy_recall"))
    floors = asked.floors()
    for form, found in shares(records, "form" if name == "mqar" else asked.across).items():
        of_texts = np.array(found).reshape(asked.rows, -1).mean(1)
        floor = floors.get(f"set guesser, {form}", floors.get("set guesser"))
        # Four standard errors.
        assert np.mean(found) == pytest.approx(floor, abs=4 * of_texts.std() / asked.rows**0.5)


def bpe(words):
    """A tokenizer of whole words."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "</s>", *words])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Setting(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"), 0)


@pytest.mark.parametrize("name", ASKED)
def test_other_tokenizers_give_words_of_one_token(name):
    """A model reads the same rows in its own tokens, and its scores are those of plain forwards."""
    setting = bpe(["!!", *(f"w{i}" for i in range(300))])
    asked = task(name, rows=2)
    asked.check(setting)
    texts, plain = list(asked.streams(setting)), list(asked.streams(BYTES))
    used = np.unique(np.concatenate([event.ids for text in texts for event in text]))
    assert used.min() > 2 and all(setting.encode(setting.decode(np.array([i]))).tolist() == [i] for i in used)
    for text, other in zip(texts, plain, strict=True):
        for event, as_bytes in zip(text, other, strict=True):
            # The same word wherever the byte is the same.
            assert len({*zip(event.ids, as_bytes.ids, strict=True)}) == len({*as_bytes.ids}) == len({*event.ids})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=303, **sizes)).eval()
    records = list(run(lambda: Reader(model), texts))
    first = next(r for r in records if r["stream"] == 0)
    read, question = texts[0][0].ids, next(event for event in texts[0] if isinstance(event, Ask))
    if question.at is not None:
        with torch.no_grad():
            logp = model(torch.from_numpy(np.concatenate([read, question.ids]))[None]).logits[0].log_softmax(-1)
        nats = -logp[len(read) + question.at, question.answers[0]].sum()
        assert first["nats"] == pytest.approx(float(nats), rel=1e-4)
    assert all(r["bytes"] > 0 for r in records)


def test_what_does_not_fit_is_a_line():
    asked = task("mqar")
    with pytest.raises(
        ValueError, match=r"eval.ask.mqar: the tokenizer has 50 words of one token, .* 83 symbols; low"
    ):
        asked.check(bpe([f"w{i}" for i in range(50)]))
    wrongs = (
        ({"forms": ["own", "mine"]}, "forms='mine' is unknown; use own, zoology or stacked"),
        ({"gap": 1.5}, r"gap=1.5 must lie in 0\.\.1"),
        ({"num_pairs": 33}, "num_pairs=33 must lie between 1 and num_keys=32"),
    )
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=f"^eval.ask.mqar.{message}"):
            measures({"ask": {"mqar": wrong}, "lengths": [64], "rows": 2})
    # Texts that are too short are a line of their task, whose floors are known all the same.
    short = task("selective_copying", lengths=(128, 16))
    assert short.floors()["chance"] == 1 / 32
    with pytest.raises(ValueError, match=r"eval.ask.selective_copying: length=16 is too short"):
        short.check(BYTES)


def test_a_distance_is_the_tokens_since_the_pairs():
    (text, *_) = task("key_value_distance", lengths=(5, 0, 40, 5), rows=2).streams(BYTES)
    read, distances = 0, []
    for event in text:
        if isinstance(event, Ask):
            distances.append(event.tag["distance"])
            assert read - 8 == distances[-1]
        else:
            read += len(event.ids)
    assert distances == [0] * 4 + [5] * 4 + [40] * 4
