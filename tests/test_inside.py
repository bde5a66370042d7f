"""The look inside: its figures are the model's, and its page shows any text as it is."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memlm import MemoryCache
from memlm.data import Batch, Facts, Passkey, byte_tokenizer
from memlm.evaluation.ablation import memory_off
from memlm.evaluation.insight import Insight
from memlm.evaluation.measures.inside import Inside, _chunks, _row, needle, spans
from memlm.evaluation.report import Report
from tests.conftest import build
from tests.test_events import llama

TEXT = '<script>alert("x")</script> & <b>café\n' * 3


def looked(model, batch):
    """The figures of one text, as they come back from the file of results."""
    subject = SimpleNamespace(model=model, memory_off=False)
    one = SimpleNamespace(subject=subject, tokenizer=byte_tokenizer())
    return json.loads(json.dumps(Inside(inside=1)._looked(one, "text", batch)))


def of_text():
    return Batch.from_rows([_row(np.frombuffer(TEXT.encode(), np.uint8))], [0])


def nats(model, ids_1T):
    with torch.no_grad():
        logp = model(ids_1T).logits[0, :-1].double().log_softmax(-1)
    return [0.0, *(-logp.gather(1, ids_1T[0, 1:, None])[:, 0]).tolist()]


@pytest.mark.parametrize("kind", ["mom", "titans_mag"])
def test_surprise_and_savings_equal_those_of_plain_forwards(kind):
    model, batch = build(kind), of_text()
    found = looked(model, batch)
    on = nats(model, batch.input_ids)
    with memory_off(model):
        off = nats(model, batch.input_ids)
    assert found["nats"] == pytest.approx(on, rel=1e-3) and len(found["tokens"]) == len(on)
    assert found["saved"] == pytest.approx([b - a for a, b in zip(on, off, strict=True)], abs=1e-3)
    assert all(len(x) == len(on) for x in found["outputs"].values()) and len(found["outputs"]) == 2
    assert found["answers"] == [] and found["needle"] is None
    if kind == "mom":
        with torch.no_grad():
            load = model(batch.input_ids, output_metrics=True).metrics["layer1/load_2"]
        chosen = [2 in row for row in found["memories"]["layer 1"]]
        assert np.mean(chosen) == pytest.approx(float(load), abs=1e-6)


def test_a_model_of_transformers_shows_its_surprise_alone():
    found = looked(llama(), Batch.from_rows([_row(np.arange(40))], [0]))
    assert found["saved"] is None and found["outputs"] == {} and found["nats"][0] == 0.0


def test_bad_logits_are_an_error():
    model = build("titans_mag", torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        looked(model, of_text())


def test_the_chunks_of_an_answer_and_its_place():
    """In one stream, and in documents, whose chunks begin with them."""
    assert needle([5, 7, 8, 5, 9, 7, 8], [5, 6]) == [1, 3]
    assert needle([7, 8, 7, 8, 9, 7, 8], [5, 6], positives=[0, 0, 1, 1, 0, 0, 0]) == [2, 4]
    assert needle([1, 2, 3], []) is None and needle([1, 2, 3], [2]) is None
    documents = [-2, 1, 1, 1, 2, 2, 0, -1]
    assert _chunks(8, 2, documents) == [(1, 3), (3, 4), (4, 6)] and _chunks(5, 2, None) == [(0, 2), (2, 4), (4, 5)]
    watch = Insight()
    watch.sizes["layer 0"], watch.chunks["layer 0"] = 2, [[], [1], [1, 2]]
    assert spans(watch, "layer 0", documents, [7], 8) == [(3, 4, 1.0)]
    assert spans(watch, "layer 0", None, [1, 2], 3) == [(2, 3, 0.5)]
    assert spans(watch, "layer 0", None, [1, 2], 4) == []


@pytest.mark.parametrize(
    ("kind", "task"),
    [("chunk_sparse", Passkey(length=64, gap=16)), ("msa", Facts(key_length=2, digits=2, length=90, num_documents=3))],
)
def test_choices_of_memories_of_chunks_are_shown(kind, task):
    settings = {"chunk_size": 4, "top_k": 2, **({"window_size": 8} if kind == "chunk_sparse" else {})}
    found = looked(build(kind, **settings), Batch.from_rows([task.sample(0, "test", 0, 1.0)], [0]))
    ids, (first, end) = found["tokens"], found["needle"]
    assert ids[first:end] == [ids[t] for t in found["answers"][: end - first]]
    for read in found["read"].values():
        assert read and all(0 <= a < b <= len(ids) and b - a <= 4 and 0 < share <= 1 for a, b, share in read)
        # Each answer chooses at most top_k chunks for each group of heads, or documents.
        assert sum(share for *_, share in read) <= (4 if kind == "chunk_sparse" else 2 * 90)


@pytest.mark.parametrize("fusion", [{}, {"fusion": "relevance", "router_dim": 4}], ids=str)
def test_chosen_chunks_have_their_numbers_in_the_text(fusion):
    """However the text is divided into calls, and also where the state keeps the last chunks alone."""
    size, window, ids = 4, 8, torch.arange(70)[None]
    settings = {"chunk_size": size, "window_size": window, "top_k": 3, **fusion}
    found = {}
    for limit in (0, 5):
        for cuts in ([70], [11, 1, 30, 28], [40, *[1] * 30]):
            model, watch, memory = build("chunk_sparse", max_chunks=limit, **settings), Insight(), MemoryCache()
            with watch.of(model), torch.no_grad():
                for piece in ids.split(cuts, 1):
                    model(piece, past_key_values=memory)
            found[limit, len(cuts)] = watch.chunks["layer 0"]
        assert found[limit, 1] == found[limit, 4] == found[limit, 31]
    for limit in (0, 5):
        for t, chosen in enumerate(found[limit, 1]):
            # Whole chunks before the window; a joint softmax sees the rest of the chunk that the window begins in.
            known = max(0, t - window + (1 if fusion else size)) // size
            first = max(0, known - limit) if limit else 0
            assert set(chosen) <= {*range(first, known)} and bool(chosen) == bool(known), t


def test_the_page_shows_any_text_as_it_is(tmp_path):
    report = Report("x")
    found = looked(build("mom", torch.float32), of_text())
    found["title"] = "<i>"
    Inside(inside=1).section(report, {"<u>": {"inside": [found]}}, None)
    page = report.write(tmp_path).read_text()
    assert not re.search(r"<(script|i|u|b>c)\b", page) and "http" not in page
    shown = re.findall(r'<span tabindex="-1"[^>]*>(.*?)</span>', page, re.DOTALL)
    assert len(shown) == len(TEXT.encode()) and "".join(shown).startswith("&lt;script&gt;")
    assert page.count('type="radio"') == 4 and "memory of layer 1" in page
    assert "memories" in page and "saved" in page and "prefers-color-scheme: dark" in page and "viewport" in page
