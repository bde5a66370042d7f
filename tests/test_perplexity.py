"""Text is scored as one plain forward scores it, in every way of reading."""

import functools
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import MistralConfig, MistralForCausalLM

from memlm.data import byte_tokenizer, token_bytes
from memlm.evaluation.measures.text import Text
from memlm.evaluation.perplexity import WAYS, read
from memlm.reader import Reader
from tests.conftest import ROOT, build
from tests.test_any_model import made

SIZES = torch.from_numpy(token_bytes(byte_tokenizer()))
SEGMENT, PREFIX = 32, 257


def window(name):
    """A model of transformers whose window of keys is shorter than a segment."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 259}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = MistralConfig(**sizes, **heads, sliding_window=12, initializer_range=0.2)
    return MistralForCausalLM(config).double().eval()


MODELS = {
    **{kind: build for kind in ("titans_mag", "titans_mac")},
    **{name: made for name in ("llama", "gpt2", "titans")},
    "mistral": window,
}


def texts():
    """Shorter and longer than a segment, a whole number of segments, and one with a token without text inside."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n) for n in (7, 100, 33, 64, 1, 97)]
    documents[1][50] = 258
    return documents


def plainly(model, ids, way, prefix):
    """{position: nats} by plain forwards of all that a token may depend on."""
    found = {}

    def score(context, targets, start):
        inputs = torch.tensor([[*context, *targets[:-1]]])
        logits = model(inputs, use_cache=False).logits[0, -len(targets) :].log_softmax(-1)
        found.update({start + i: -logits[i, t].item() for i, t in enumerate(targets)})

    ids, front = ids.tolist(), [] if prefix is None else [prefix]
    if way == "carried" and len(ids) > 1:
        score([*front, *ids[:1]], ids[1:], 1)
    for start in range(0, len(ids), SEGMENT):
        piece = ids[start : start + SEGMENT]
        if way == "reset" and len(piece) > 1:
            score([*front, *piece[:1]], piece[1:], start + 1)
        if way == "rolling" and start == 0:
            score(front, piece, 0)
        elif way == "rolling":
            # The last window begins earlier, so that it is as long as the others.
            score(ids[start + len(piece) - SEGMENT - 1 : start], piece, start)
    return {t: nats for t, nats in found.items() if ids[t] < 256}


READINGS = [("carried", None), ("carried", PREFIX), ("reset", None), ("reset", PREFIX), ("rolling", PREFIX)]


# By default, a model of each kind of cache is read in all ways, and the others in two.
@pytest.mark.parametrize(
    ("name", "way", "prefix"),
    [
        pytest.param(
            name, *of, marks=[] if name in ("titans_mag", "llama") or of in READINGS[::4] else pytest.mark.slow
        )
        for name in MODELS
        for of in READINGS
    ],
)
@torch.no_grad()
def test_nats_of_every_document_are_those_of_plain_forwards(name, way, prefix):
    model, documents = MODELS[name](name), texts()
    expected = [plainly(model, ids, way, prefix) for ids in documents]
    # Three documents a forward, with padding behind the shorter ones.
    make = functools.partial(Reader, model, with_metrics=True)
    got = read(make, way, documents, SIZES, SEGMENT, 100, prefix, tokens_at_once=3 * SEGMENT)
    assert got.all.tokens == got.all.bytes == [len(of) for of in expected]
    assert got.all.nats == pytest.approx([sum(of.values()) for of in expected], rel=1e-5)
    common = [{t: x for t, x in of.items() if t % SEGMENT} for of in expected]
    assert got.common.tokens == [len(of) for of in common]
    assert got.common.nats == pytest.approx([sum(of.values()) for of in common], rel=1e-5)
    assert got.edges == [0, 32, 64, 100]
    for (a, b), bits in zip(((0, 32), (32, 64), (64, 100)), got.by_position, strict=True):
        inside = [x for of in common for t, x in of.items() if a <= t < b]
        assert bits == pytest.approx(np.mean(inside) / math.log(2), rel=1e-5)
    low, high = got.intervals[2]
    assert low < got.by_position[2] < high and got.common.low < got.common.bits_per_byte < got.common.high
    if name == "titans_mag" and way == "carried" and prefix is None:
        told = [model(torch.from_numpy(ids)[None]).metrics["layer0/surprise"][0, :-1] for ids in documents]
        second = torch.cat([x[32:64] for x in told]).mean().item()
        assert got.of_tokens["layer0/surprise"][1] == pytest.approx(second, rel=1e-5)


def test_a_tokenizer_that_begins_texts_does_so_in_every_way_of_reading():
    model, tokenizer = made("llama"), byte_tokenizer()
    for begins in (False, True):
        if begins:
            front = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", PREFIX)])
            tokenizer.backend_tokenizer.post_processor = front
        one = SimpleNamespace(subject=SimpleNamespace(model=model, memory_off=False), tokenizer=tokenizer)
        found = Text(text_documents=6, text_length=100, text_ways=[*WAYS]).source(one, SEGMENT, texts())
        for way in WAYS:
            prefix = PREFIX if begins or way == "rolling" else None
            expected = [sum(plainly(model, ids, way, prefix).values()) for ids in texts()]
            assert found[way]["all"]["nats"] == pytest.approx(expected, rel=1e-4), (way, begins)


def test_logits_that_are_not_finite_and_windows_without_a_prefix_are_errors():
    model = build("none")
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    with pytest.raises(ValueError, match="logits are not finite in text, carried: 5 of 6 documents"):
        read(functools.partial(Reader, model), "carried", texts(), SIZES, SEGMENT, 100)
    with pytest.raises(ValueError, match="rolling windows begin with the tokenizer's bos_token or eos_token"):
        read(functools.partial(Reader, model), "rolling", texts(), SIZES, SEGMENT, 100)


def results(model, ways=("carried", "reset")):
    made = (read(functools.partial(Reader, model), way, texts(), SIZES, SEGMENT, 100) for way in ways)
    return {
        way: {"bits_per_byte": r.common.bits_per_byte, "common": vars(r.common)}
        for way, r in zip(ways, made, strict=True)
    }


def test_gains_are_differences_of_differences_over_the_same_documents():
    one, other = results(build("titans_mag")), results(build("none"))
    measure = Text(text_documents=6, text_length=100)
    models = {"a": {"text": {"text": one}}, "same": {"text": {"text": one}}, "b": {"text": {"text": other}}}
    header, (a, same, b, against_same, against_b) = measure.table(models)
    assert header[1:3] == ["memory carried", "reset each segment"] and same[1:] == a[1:]
    assert against_same == ["saved against same", *["0.0000 (0.0000 to 0.0000)"] * 3]
    saved = [float(row[2]) - float(row[1]) for row in (a, b)]
    assert [float(row[3].split()[0]) for row in (a, b)] == pytest.approx(saved, abs=2e-4)
    expected = [float(b[1]) - float(a[1]), float(b[2]) - float(a[2]), saved[0] - saved[1]]
    for cell, difference in zip(against_b[1:], expected, strict=True):
        value, low, high = map(float, re.findall(r"-?\d+\.\d+", cell))
        assert value == pytest.approx(difference, abs=2e-4) and low < value < high


@pytest.mark.parametrize("ways", [[], ["carried", "carried"], ["other"], [1]])
def test_other_ways_of_reading_are_refused(ways):
    with pytest.raises(ValueError, match=r"text_ways=.* must be some of carried, reset, rolling, each once"):
        Text(text_documents=1, text_length=2, text_ways=ways)


LONG = """
import functools, resource, sys
import numpy as np, torch
from memlm.data import byte_tokenizer, token_bytes
from memlm.evaluation.perplexity import WAYS, read
from memlm.reader import Reader
from tests.conftest import build
ids = np.random.default_rng(0).integers(0, 256, int(sys.argv[1]), np.uint16)
sizes = torch.from_numpy(token_bytes(byte_tokenizer()))
reader = functools.partial(Reader, build("titans_mag", dtype=torch.float32), with_metrics=True)
read(reader, "carried", [ids], sizes, 512, len(ids))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_million_tokens_take_the_memory_of_sixteen_thousand():
    def peak(tokens):
        command = [sys.executable, "-c", LONG, str(tokens)]
        return int(subprocess.run(command, cwd=ROOT, env=os.environ, check=True, capture_output=True).stdout)

    assert peak(2**20) <= 1.1 * peak(2**14)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["titans_mag", "none"])
@torch.no_grad()
def test_reading_is_nearly_as_fast_as_plain_forwards(kind):
    """Text in segments, carried on, beside the same forwards alone; both of one row, in turns."""
    model = build(kind, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 256, 2**15)

    def plain():
        cache = None
        for piece in torch.from_numpy(ids)[None].split(128, 1):
            cache = model(piece, past_key_values=cache, use_cache=True).past_key_values

    ways = (
        plain,
        lambda: read(functools.partial(Reader, model, with_metrics=True), "carried", [ids], SIZES, 128, 2**15),
    )
    seconds = ([], [])
    for _ in range(5):
        for way, taken in zip(ways, seconds, strict=True):
            start = time.process_time()
            way()
            taken.append(time.process_time() - start)
    assert min(seconds[0]) / min(seconds[1]) > 0.9
