"""Two models are compared over the same texts: every measure yields figures with its texts, named by their content."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from memlm.data import MQAR, Chains, Facts, Passkey, RecallSource, build_data, byte_tokenizer
from memlm.data.recall import ZoologyMQAR
from memlm.evaluation.compare import compared
from memlm.evaluation.data import Examined
from memlm.evaluation.figures import identity, scored
from memlm.evaluation.measures import Measure, measures
from memlm.evaluation.measures.recall import Recall
from memlm.evaluation.runs import Runs
from tests.conftest import build

SETTINGS = {
    **{"factors": [1, 2], "recall_rows": 3, "depths": [0.0, 1.0], "needle_rows": 2},
    **{"text_documents": 2, "text_length": 40, "bank_documents": [4], "bank_questions": 2},
    **{"ask": {"mqar": {"num_pairs": 2}, "order": {"segment": 8, "distances": [8]}}, "lengths": [64], "rows": 2},
}
# Its own tests have its tasks.
ELSEWHERE = {"lm_eval"}
TASK = MQAR(length=32, num_pairs=2, gap=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(str(n) for n in np.random.default_rng(i).integers(999, size=60)))
    return folder


def examined(model, seed, corpus, **tasks):
    """A model beside rows that are drawn with a seed."""
    tasks = tasks or {
        "mqar": TASK,
        "passkey": Passkey(length=48, gap=8),
        "facts": Facts(key_length=2, digits=2, length=64, num_documents=5),
        "chains": Chains(length=105, num_documents=6),
    }
    sources = {name: RecallSource(task, seed, (0, 0)) for name, task in tasks.items()}
    if corpus:
        data = {"tokenizer": "byte", "seq_len": 32, "cache_dir": str(corpus / "cache")}
        data["sources"] = {"text": {"kind": "text", "weight": 1, "paths": str(corpus)}}
        sources |= build_data(data, seed=seed, batch_size=1)[1].sources
    subject = SimpleNamespace(model=model, name="a", memory_off=False, record=SimpleNamespace(config={}))
    return Examined(subject, byte_tokenizer(), sources, seed)


def figures_of(measure, one):
    """By place, as they are read from the files of an evaluation."""
    found = json.loads(json.dumps(measure.run(one, [one])))
    corpora = {name: "its fingerprint" for name in one.sources}
    about = {"seed": one.seed, "corpora": corpora, "tokenizer": "byte", "sources": {}}
    figures = [*measure.figures(found, about, lambda part: one.parts.records.get(part, []))]
    assert len({figure.place for figure in figures}) == len(figures)
    return {figure.place: figure for figure in figures}


def test_a_measure_yields_figures_or_states_why_not():
    for measure in measures(SETTINGS | {"tasks": []}):
        yields, states = type(measure).figures is not Measure.figures, measure.apart != Measure.apart
        assert yields != states, measure.name


def test_figures_of_every_measure_are_means_over_their_texts(corpus):
    """The same texts have equal names for all models, other texts never."""
    mine, theirs, others = (build("msa", chunk_size=4, top_k=2, seed=seed) for seed in (0, 1, 0))
    kept, wanted = set(), {one.name for one in measures(SETTINGS) if type(one).figures is not Measure.figures}
    for measure in measures(SETTINGS):
        if measure.name in wanted - ELSEWHERE:
            a, b, c = (
                figures_of(measure, examined(model, seed, corpus))
                for model, seed in ((mine, 0), (theirs, 0), (others, 1))
            )
            kept |= {measure.name} if a else set()
            assert a.keys() == b.keys() == c.keys()
            for place, figure in a.items():
                values, weights = zip(*figure.units.values(), strict=True)
                assert figure.n == len(figure.units) and figure.low <= figure.value <= figure.high, place
                assert np.average(values, weights=weights) == pytest.approx(figure.value, abs=1e-9), place
                assert figure.units.keys() == b[place].units.keys(), place
                assert not figure.units.keys() & c[place].units.keys(), place
    assert kept == wanted - ELSEWHERE


def recalled(model, task, seed=0, rows=6, records=True):
    figures = figures_of(Recall([1], rows), examined(model, seed, None, mqar=task))
    if not records:
        figures = {place: replace(figure, units={}) for place, figure in figures.items()}
    facts = {0: {"tokenizer": "byte", "state_bytes": 1}}
    return Runs("a", {}, facts, {0: figures}, {}, "a")


@pytest.mark.parametrize(
    ("other", "texts"),
    [
        ({}, 6),
        ({"rows": 4}, 4),
        ({"seed": 1}, 0),
        ({"task": replace(TASK, num_values=4)}, 0),
        ({"records": False}, 0),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_only_rows_that_are_equal_are_paired(other, texts):
    """Rows of another seed or task have the same numbers; results of earlier versions have no rows."""
    a, b = (build("gated_delta_net", seed=seed) for seed in (0, 1))
    _, found = compared([recalled(a, TASK), recalled(b, **{"task": TASK, **other})])["rows"]
    difference = found["cells"][0]["difference"]
    assert difference["paired"] == bool(texts)
    assert not texts or difference["texts"] == texts


def test_a_text_is_its_tokens_and_what_is_asked_and_equal_texts_are_counted_apart():
    row = ZoologyMQAR(length=32, num_pairs=2).sample(0, "test", 0, 1.0)
    # Labels alone differ where answers are not in the text.
    other = row._replace(labels=np.where(row.labels >= 0, row.labels ^ 1, row.labels))
    assert identity(*row) == identity(*row) != identity(*other)
    assert identity(np.array([1, 2]), np.array([3])) != identity(np.array([1]), np.array([2, 3]))
    record = {"factor": 1, "texts": ["x", "x", "y"], "right": [1, 0, 2], "asked": [2, 2, 4]}
    units = scored([record], {"factor": 1}, "right", "asked")
    assert [*units.values()] == [(0.5, 2.0), (0.0, 2.0), (0.5, 4.0)]
    assert scored([record], {"factor": 2}, "right", "asked") == scored([], {}, "right") == {}
