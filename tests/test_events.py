"""The runner of tasks: what it reads, asks and scores equals plain forwards over the whole text."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memlm
from memlm.evaluation import events
from memlm.evaluation.events import Ask, Edit, Learn, Read, Shelve, run
from memlm.evaluation.statistics import bootstrap, wilson
from memlm.reader import Reader
from memlm.roles import QUERY, RESPONSE, Roles
from tests.conftest import build
from tests.oracles import Guesser, Oracle, scores

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def attached():
    model = memlm.attach(llama(), {"kind": "gated_delta_net", "num_heads": 2, "head_dim": 8})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.memlm.gate.fill_(0.5)
    return model.eval()


def own():
    torch.manual_seed(0)
    memory = {"kind": "gated_delta_net", "num_heads": 2, "head_dim": 8}
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": None, "eos_token_id": None}
    return memlm.MemLMForCausalLM(memlm.MemLMConfig(**sizes, mixers={"memory": memory})).eval()


MODELS = pytest.mark.parametrize("model", [llama(), attached(), own()], ids=["llama", "attached", "memlm"])


def streams(number=5, candidates=1, seed=0, uneven=2, **words):
    rng = np.random.default_rng(seed)

    def ids(length):
        return rng.integers(64, size=length)

    return [
        [
            Read(ids(9 + i % 2)),
            Ask(ids(3), [ids(3 - c % uneven) for c in range(candidates)], {"place": "first"}, **words),
            Read(ids(4)),
            Ask(ids(2), [ids(3) for _ in range(candidates)], {"place": "second"}, **words),
        ]
        for i in range(number)
    ]


def plainly(model, stream):
    """The nats of each candidate of each question, by one forward without a memory."""
    read, found = np.zeros(0, np.int64), []
    for event in stream:
        if isinstance(event, Read):
            read = np.concatenate([read, event.ids])
            continue
        nats = []
        for answer in event.answers:
            ids = torch.from_numpy(np.concatenate([read, event.ids, answer]))[None]
            with torch.no_grad():
                logp = model(ids, use_cache=False).logits[0].log_softmax(-1)
            at = torch.arange(ids.shape[1] - len(answer) - 1, ids.shape[1] - 1)
            nats.append(-float(logp[at, ids[0, at + 1]].sum()))
        found.append(nats)
    return found


@MODELS
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("segment", [3, 2048])
def test_scores_equal_those_of_plain_forwards(model, candidates, segment):
    asked = streams(candidates=candidates)
    records = sorted(run(lambda: Reader(model, segment), asked), key=lambda r: (r["stream"], r["place"]))
    expected = [nats for stream in asked for nats in plainly(model, stream)]
    assert len(records) == len(expected) == 10
    for record, nats in zip(records, expected, strict=True):
        assert record["nats"] == pytest.approx(nats[0], rel=1e-4)
        assert record["rank"] == sum(x < nats[0] for x in nats[1:])
        assert record["read"] in (9, 10, 13, 14) and record["bytes"] > 0


@MODELS
@pytest.mark.parametrize("at_once", [2, 2048])
def test_answers_at_places_are_read_in_one_question(model, at_once, monkeypatch):
    """Rows of several places, in one question, equal the questions one by one."""
    monkeypatch.setattr(events, "_LOGITS_AT_ONCE", at_once)
    rng, together, alone = np.random.default_rng(0), [], []
    for count in (1, 3, 2):
        read, ids, answer = rng.integers(64, size=5), rng.integers(64, size=7), rng.integers(64, size=count)
        at = np.sort(rng.permutation(7)[:count])
        together.append([Read(read), Ask(ids, [answer], at=at)])
        alone.append([Read(read), *(Ask(ids[: t + 1], [answer[i : i + 1]]) for i, t in enumerate(at))])
    found = list(run(lambda: Reader(model), together))
    singly = sorted(run(lambda: Reader(model), alone), key=lambda r: r["stream"])
    for i, record in enumerate(found):
        mine = [r for r in singly if r["stream"] == i]
        assert record["nats"] == pytest.approx(sum(r["nats"] for r in mine), rel=1e-4)
        assert record["correct"] == np.mean([r["correct"] for r in mine])
    assert all(r["exact"] for r in scores(Oracle, together, 64))


@MODELS
def test_a_judge_sees_greedy_tokens(model):
    seen = []
    asked = streams(3, judge=lambda ids: seen.append(ids) or 1.0, tokens=4)
    records = list(run(lambda: Reader(model), asked))
    assert len(records) == len(seen) == 6 and all(r["correct"] == 1.0 and r["nats"] is None for r in records)
    # The group of even streams is asked first; its first stream is number 0.
    read = np.concatenate([asked[0][0].ids, asked[0][1].ids])
    for token in seen[0]:
        with torch.no_grad():
            assert model(torch.from_numpy(read)[None], use_cache=False).logits[0, -1].argmax() == token
        read = np.append(read, token)


@MODELS
def test_a_question_leaves_the_memory_as_it_was(model):
    asked = streams(2)
    unasked = [[event for event in stream if isinstance(event, Read)] + stream[-1:] for stream in asked]
    first = {r["stream"]: r["nats"] for r in run(lambda: Reader(model), asked) if r["place"] == "second"}
    second = {r["stream"]: r["nats"] for r in run(lambda: Reader(model), unasked)}
    assert first == pytest.approx(second, rel=1e-6)


@MODELS
@pytest.mark.parametrize(("tokens", "forwards"), [(1, [2, 4, 4]), (2, [2, 4, 4, 4, 4])])
def test_questions_that_follow_each_other_share_forwards(model, monkeypatch, tokens, forwards):
    """The logits after a question serve all of its answers of one token."""

    class Counting(Reader):
        def _read(self, ids_BT, keep):
            calls.append(len(ids_BT))
            return super()._read(ids_BT, keep)

    rng, calls = np.random.default_rng(0), []
    monkeypatch.setattr("memlm.evaluation.events._COPIES", 4)
    asked = [
        [Read(rng.integers(64, size=9))]
        + [Ask(rng.integers(64, size=2), [*rng.integers(64, size=(2, tokens))], {"place": i}) for i in range(4)]
        for _ in range(2)
    ]
    records = sorted(run(lambda: Counting(model), asked), key=lambda r: (r["stream"], r["place"]))
    assert calls == forwards
    expected = [nats for stream in asked for nats in plainly(model, stream)]
    for record, nats in zip(records, expected, strict=True):
        assert record["nats"] == pytest.approx(nats[0], rel=1e-4)
        assert record["shares"] == [float(n == min(nats)) for n in nats]


@MODELS
def test_learning_changes_a_copy_of_the_weights(model):
    """Steps make the learnt text likelier, in their own stream alone, and the model stays as it was."""
    rng = np.random.default_rng(0)
    start, item = rng.integers(64, size=1), rng.integers(64, size=6)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    steps = [Learn(np.concatenate([start, item]), 1e-2)] * 3
    asked = [[Ask(start, [item])], [*steps, Ask(start, [item])], [Ask(start, [item])]]
    first, learnt, last = (r["nats"] for r in sorted(run(lambda: Reader(model), asked), key=lambda r: r["stream"]))
    assert learnt < first - 1 and first == last
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@MODELS
def test_an_edit_changes_a_copy_of_the_weights(model):
    rng = np.random.default_rng(0)
    facts = np.stack([rng.permutation(64)[:16], rng.integers(64, size=16)], 1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    asks = [Ask(fact[:1], [fact[1:]]) for fact in facts]
    found = sorted(run(lambda: Reader(model), [asks, [Edit(facts, 1, 0.05), *asks], asks]), key=lambda r: r["stream"])
    first, edited, last = ([r["nats"] for r in found[i : i + 16]] for i in (0, 16, 32))
    assert np.mean(edited) < np.mean(first) - 0.03 and first == last
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert found[16]["bytes"] > found[0]["bytes"]


def test_a_question_is_put_to_the_bank_of_its_own_stream():
    """As by ``MemoryBank`` itself; a document of a known name replaces it, and a model without a bank is told."""
    torch.manual_seed(0)
    model, rng = build("msa").eval(), np.random.default_rng(0)
    texts, question, answer = rng.integers(259, size=(5, 6)), rng.integers(259, size=3), rng.integers(259, size=2)
    names, ask = [*"abcd"], Ask(question, [answer])
    streams = [[ask], [Shelve(texts[:4], names), ask, Shelve(texts[4:], ["b"]), ask], [ask]]
    found = [r["nats"] for r in sorted(run(lambda: Reader(model), streams), key=lambda r: r["stream"])]
    expected = []
    for documents in (
        {},
        dict(zip(names, texts[:4], strict=True)),
        dict(zip("acdb", texts[[0, 2, 3, 4]], strict=True)),
    ):
        bank = memlm.MemoryBank.build(model, {name: ids.tolist() for name, ids in documents.items()}, progress=False)
        ids = torch.tensor([[*question, *answer[:1]]])
        roles = Roles(torch.tensor([[QUERY] * 3 + [RESPONSE]]), bank=bank)
        with torch.no_grad():
            logits = (model(ids, roles=roles) if documents else model(ids)).logits[0, -2:]
        expected.append(-float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()))
    assert found == pytest.approx([expected[0], *expected[1:], expected[0]], rel=1e-5)
    assert len({round(x, 4) for x in found}) == 3
    with pytest.raises(ValueError, match="a bank needs 'msa' in every layer"):
        list(run(lambda: Reader(own()), streams))


@pytest.mark.parametrize("words", [{}, {"judge": lambda ids: float(len(ids) == 4), "tokens": 4}])
def test_an_oracle_is_right_and_a_guesser_is_not(words):
    for candidates in (1, 4):
        # A guesser finds the shortest of several answers the likeliest.
        asked = streams(60, candidates, uneven=1, **words)
        assert all(r["exact"] for r in scores(Oracle, asked, 64)) or words
        if not words:
            share = np.mean([r["correct"] for r in scores(Guesser, asked, 64)])
            assert share == pytest.approx(1 / 64 if candidates == 1 else 1 / 4, abs=0.09)


def test_equal_candidates_are_right_by_chance():
    class Flat(Oracle):
        def after(self, read):
            return torch.zeros(self.vocabulary)

    asked = [[Ask(np.array([1]), [np.array([i]) for i in range(4)])]]
    assert [r["correct"] for r in scores(Flat, asked, 64)] == [0.25]


def test_bad_logits_end_in_a_line():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite after 9 tokens"):
        list(run(lambda: Reader(model), streams(1)))


def test_a_fork_keeps_the_settings_of_its_reader():
    reader = Reader(own(), segment=7)
    reader(torch.arange(5)[None])
    assert {**vars(reader.fork()), "cache": None} == {**vars(reader), "cache": None}


def test_intervals():
    # Published values of Wilson's interval, and the bootstrap of a normal mean.
    assert wilson(0.9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(0.0, 256)[0] == 0.0 and wilson(0.0, 256)[1] == pytest.approx(0.0148, abs=1e-4)
    assert wilson(0.5, 0) == (0.0, 1.0)
    assert all(wilson(x / n, n)[0] <= x / n <= wilson(x / n, n)[1] for n in range(1, 200) for x in (0, 1, n - 1, n))
    x = np.random.default_rng(1).normal(3.0, 1.0, 400)
    low, high = bootstrap(x)
    assert low < x.mean() < high and high - low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.1)
    weights = np.random.default_rng(2).integers(1, 9, 400)
    low, high = bootstrap(x, weights)
    assert low < np.average(x, weights=weights) < high and bootstrap(x, weights) == (low, high)


def test_questions_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ask(np.array([1]), []).tokens = 3
