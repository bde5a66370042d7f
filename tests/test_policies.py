"""Key-value policies: a cache that loses entries equals full attention that does not see them, at any cut."""

import shlex
from dataclasses import replace
from functools import cache as once
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import memlm
from memlm.cli import open_settings
from memlm.data import load_tokenizer
from memlm.evaluation import storage
from memlm.evaluation.data import Examined
from memlm.evaluation.measures import measures
from memlm.evaluation.measures.asked import Asked
from memlm.evaluation.subject import Subject
from memlm.policies import KINDS, EpisodeReader, PolicyReader, build_policies
from memlm.policies.episodes import clustered
from memlm.policies.kinds import Arrivals, Entries
from memlm.policies.queries import watched
from memlm.reader import Reader
from memlm.training.resume import Record
from tests.conftest import composed

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHARED = {**SIZES, "num_key_value_heads": 2}


def own(**memory):
    sizes = {**SHARED, "head_dim": 8}
    return memlm.MemLMForCausalLM(memlm.MemLMConfig(**sizes, mixers={"memory": memory or {"kind": "attention"}}))


# The policies of one cache.
PLAIN = [kind for kind in KINDS if kind != "epicache"]


def quick(kinds, names):
    """Each model with each policy; by default Llama with all, the others with those of keys, queries and episodes."""
    few = ("knorm", "snapkv", "epicache")
    return [
        pytest.param(name, kind, marks=[] if name == "llama" or kind in few else pytest.mark.slow)
        for name in names
        for kind in kinds
    ]


BUILD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHARED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHARED, head_dim=8)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "memlm": lambda: own(kind="attention", conv_size=3, qk_norm=True),
}


@once
def model(name):
    torch.manual_seed(0)
    built = BUILD[name]().double().eval()
    with torch.no_grad():
        for p in built.parameters():
            # Large enough for attention that prefers some keys.
            p.add_(torch.randn_like(p) * 0.3)
    return built


def entry(name):
    reader = Reader(model(name))
    reader(torch.zeros(1, 1, dtype=torch.int64))
    one = reader.nbytes()
    reader(torch.zeros(1, 1, dtype=torch.int64))
    return reader.nbytes() - one, 2 * one - reader.nbytes()


def policy(name, kind, entries=24, **settings):
    each, rest = entry(name)
    settings = {"period": 8, "sinks": 2, "recent": 1, **settings}
    return KINDS[kind](budget=entries * each + rest, **settings)


def ids(rows=3, length=70, seed=1):
    # Few tokens: many keys of the first layer have equal norms.
    return torch.randint(7, (rows, length), generator=torch.Generator().manual_seed(seed))


def cut(reader, ids_BT, sizes):
    return torch.cat([reader(part, keep=part.shape[1]) for part in ids_BT.split(sizes, 1)], 1)


class Watched(PolicyReader):
    """Notes which keys each query sees: of each layer [B, T, T]."""

    def _evict(self, kept):
        super()._evict(kept)
        self.left = getattr(self, "left", [])
        self.left.append((self.tokens, {i: x.clone() for i, x in self.held["places"].items()}))

    def seen(self, layer, rows, length):
        seen = torch.ones(length, length, dtype=torch.bool).tril().repeat(rows, 1, 1)
        for now, places in self.left:
            kept = torch.zeros(rows, length, dtype=torch.bool).scatter_(1, places[str(layer)], True)
            kept[:, now:] = True
            seen[:, now:] &= kept[:, None]
        return seen


def masked(name, ids_BT, seen):
    """The logits of one forward, whose layers see what ``seen(layer)`` allows."""
    reference = BUILD[name]().double().eval()
    reference.load_state_dict(model(name).state_dict())
    if name == "memlm":
        for i, layer in enumerate(reference.model.layers):
            allowed = seen(i)

            def attend(q, k, v, *_, mask=allowed):
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True).transpose(1, 2)

            layer.mixer._attend = attend
    else:
        for i, layer in enumerate(reference.base_model.layers):
            allowed = seen(i)

            def mask(module, args, words, mask=allowed):
                return args, {**words, "attention_mask": mask[:, None]}

            attention = layer.attention if name == "gpt_neox" else layer.self_attn
            attention.register_forward_pre_hook(mask, with_kwargs=True)
    with torch.no_grad():
        return reference(ids_BT, use_cache=False).logits


@pytest.mark.parametrize(("name", "kind"), quick(PLAIN, BUILD))
def test_it_equals_masked_full_attention_at_any_cut(name, kind):
    chosen, ids_BT = policy(name, kind), ids()
    reader = Watched(model(name), chosen)
    logits = cut(reader, ids_BT, 70)
    assert len(reader.left) == 6
    torch.testing.assert_close(logits, masked(name, ids_BT, lambda i: reader.seen(i, 3, 70)), rtol=0, atol=1e-12)
    places = {i: x for i, x in reader.held["places"].items()}
    for sizes in ([1] * 30 + [40], [3, 20, 1, 1, 39, 6]):
        other = PolicyReader(model(name), chosen)
        torch.testing.assert_close(cut(other, ids_BT, sizes), logits, rtol=0, atol=1e-12)
        assert all(torch.equal(x, places[i]) for i, x in other.held["places"].items())
    alone = PolicyReader(model(name), chosen)
    torch.testing.assert_close(cut(alone, ids_BT[1:2], 13), logits[1:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "kind"), quick(PLAIN, ["llama", "memlm"]))
def test_a_fork_reads_on_and_leaves_its_reader_as_it_was(name, kind):
    ids_BT, chosen = ids(), policy(name, kind)
    whole = cut(PolicyReader(model(name), chosen), ids_BT, 70)
    reader = PolicyReader(model(name), chosen)
    cut(reader, ids_BT[:, :45], 45)
    cut(reader.fork(), ids(seed=2), 9)
    rows = torch.tensor([2, 0, 2])
    forked = cut(reader.fork(rows), ids_BT[rows, 45:], 25)
    torch.testing.assert_close(forked, whole[rows, 45:], rtol=0, atol=1e-12)
    torch.testing.assert_close(cut(reader, ids_BT[:, 45:], 25), whole[:, 45:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt_neox", "memlm"])
def test_the_budget_is_never_exceeded_and_sinks_and_recent_stay(name):
    for kind in PLAIN:
        chosen = policy(name, kind, entries=23, sinks=3, recent=5)
        reader = PolicyReader(model(name), chosen)
        for part in ids().split(5, 1):
            reader(part)
            assert reader.nbytes() <= 3 * chosen.budget
            for places_BS in reader.held["places"].values():
                must = {*range(min(3, reader.tokens)), *range(max(0, reader.tokens - 5), reader.tokens)}
                assert all(must <= set(row) and row == sorted(set(row)) for row in places_BS.tolist())


def entries(k, marks=None, q=None, places=None, now=None):
    k_BSGK = torch.tensor(k, dtype=torch.float64)[None, :, None]
    places_BS = torch.arange(len(k))[None] if places is None else torch.tensor([places])
    marks_BS = None if marks is None else torch.tensor([marks])
    q_BQHK = None if q is None else torch.tensor(q, dtype=torch.float64)[None, :, None]
    return Entries(k_BSGK, k_BSGK, places_BS, marks_BS, q_BQHK, len(k) if now is None else now)


def ranked(kind, given, **settings):
    """Entries from the first to go to the last."""
    return KINDS[kind](budget=1, **settings).score(given).argsort(dim=1, stable=True)[0].tolist()


def test_each_policy_keeps_what_its_definition_says():
    k = [[3.0, 0.0], [1.0, 0.1], [2.0, 0.0], [0.0, 0.5]]
    assert ranked("recent", entries(k)) == [0, 1, 2, 3]
    assert ranked("knorm", entries(k)) == [0, 2, 1, 3]
    # The fourth key points elsewhere, the second points to it a little and is the nearest to the mean.
    mean = sum(torch.tensor(x) / torch.tensor(x).norm() for x in k)
    cosines = [float(F.cosine_similarity(torch.tensor(x), mean, dim=0)) for x in k]
    assert ranked("keydiff", entries(k))[-1] == 3
    found = KINDS["keydiff"](budget=1).score(entries(k))[0].tolist()
    assert found == pytest.approx([-c for c in cosines], abs=1e-6)
    marks = [1.0, 5.0, 2.0, 3.0]
    assert ranked("surprisal", entries(k, marks)) == [0, 2, 3, 1]
    # Three periods have passed for the first two: 5 / 8 and 1 / 8, then 2 / 4, then 3 / 1.
    later = entries(k, marks, places=[0, 1, 4, 12], now=12)
    assert ranked("surprisal", later, decay=0.5, period=4) == [0, 2, 1, 3]
    assert ranked("random", entries(k, marks)) == [0, 2, 3, 1]


def test_snapkv_is_the_mean_attention_of_the_last_queries():
    k = [[4.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 4.0], [0.0, 0.0]]
    given = entries(k, q=[[2.0, 0.0], [0.0, 1.0]], places=[0, 5, 6, 8, 9], now=9 + 1)
    # The first query stands at place 8 and does not see the last key.
    first = [*torch.tensor([8.0, 0.0, 0.0, 0.0]).softmax(0).tolist(), 0.0]
    second = torch.tensor([0.0, 0.0, 0.0, 4.0, 0.0]).softmax(0).tolist()
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    found = KINDS["snapkv"](budget=1, pool=1).score(given)[0].tolist()
    assert found == pytest.approx(mean)
    pooled = [max(mean[max(0, i - 1) : i + 2]) for i in range(5)]
    assert KINDS["snapkv"](budget=1, pool=3).score(given)[0].tolist() == pytest.approx(pooled)


@pytest.mark.parametrize("name", ["llama", "memlm"])
def test_surprisal_is_that_of_a_plain_forward(name):
    ids_BT = ids(length=20)
    with torch.no_grad():
        logp = model(name)(ids_BT, use_cache=False).logits.log_softmax(-1)
    nats = -logp[:, :-1].gather(2, ids_BT[:, 1:, None])[..., 0]
    repeated = -logp[:, :-1].gather(2, ids_BT[:, :-1, None])[..., 0]
    for bug, expected in ((False, nats), (True, repeated)):
        reader = PolicyReader(model(name), policy(name, "surprisal", repeat_bug=bug))
        cut(reader, ids_BT, 7)
        marks = reader.held["marks"]["1"]
        torch.testing.assert_close(marks[:, 1:], expected, rtol=0, atol=1e-12)
        assert (marks[:, 0] > 1e30).all()


def test_random_draws_are_even_and_differ_by_text():
    ids_BT, places_T = torch.tensor([[3] * 4000, [4] * 4000]), torch.arange(4000)
    draws = KINDS["random"](budget=1).mark(Arrivals(ids_BT, ids_BT, places_T, None)) / 2**24
    assert draws.mean(1).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert draws.var(1).tolist() == pytest.approx([1 / 12, 1 / 12], abs=0.005)
    both = torch.stack([draws[0], draws[1]])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.05
    assert abs(float(torch.corrcoef(torch.stack([draws[0, 1:], draws[0, :-1]]))[0, 1])) < 0.05
    assert not torch.equal(KINDS["random"](budget=1, seed=1).mark(Arrivals(ids_BT, ids_BT, places_T, None)), draws)


def topics(*letters, size=16, seed=3):
    """A text of windows, each of tokens of one topic."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([10 * x + torch.randint(4, (2, size), generator=generator) for x in letters], 1)


@pytest.mark.parametrize("name", BUILD)
def test_episodes_are_the_same_at_any_cut_and_a_question_chooses_one(name):
    text, each = topics(0, 1, 0, 2, 1, 0, 2), entry(name)
    chosen = KINDS["epicache"](budget=3 * (40 * each[0] + each[1]), caches=3, window=16, period=8, nearest=1)
    reader = EpisodeReader(model(name), chosen)
    for part in text.split([5, 60, 47], 1):
        reader(part)
    assert reader.nbytes() <= 2 * chosen.budget and reader.tokens == 112
    questions = torch.cat([topics(2, size=5)[:1], topics(1, size=5)[:1], topics(0, size=5)[1:]])
    rows = torch.tensor([0, 0, 1])
    fork = reader.fork(rows, questions)
    logits = fork(questions, keep=5)
    # The prompt of the chosen episode is a window of the question's topic, and so is most of what its cache kept.
    assert (fork.prompt_BP // 10 == questions[:, :1] // 10).all()
    whole = EpisodeReader(model(name), chosen)
    whole(text[:1])
    again = whole.fork(None, questions[:1])(questions[:1], keep=5)
    torch.testing.assert_close(again, logits[:1], rtol=0, atol=1e-12)
    # One cache, read by hand with the prompt as its question.
    made = PolicyReader(model(name), replace(chosen, budget=chosen.budget // 3, caches=1))
    made.prompt_BP = fork.prompt_BP[1:2]
    cut(made, text[:1], 7)
    torch.testing.assert_close(made(questions[1:2], keep=5), logits[1:2], rtol=0, atol=1e-12)
    large = EpisodeReader(model(name), replace(chosen, budget=3 * (120 * each[0] + each[1])))
    large(text)
    plain = Reader(model(name))
    plain(text)
    found = large.fork(rows, questions)(questions, keep=5)
    torch.testing.assert_close(found, plain.fork(rows)(questions, keep=5), rtol=0, atol=1e-12)


def test_an_episode_keeps_what_its_prompt_attends_to():
    given = entries([[4.0, 0.0], [0.0, 0.0], [0.0, 2.0]], q=[[2.0, 0.0], [0.0, 1.0]], now=3 + 2)
    first, second = torch.tensor([8.0, 0.0, 0.0]).softmax(0), torch.tensor([0.0, 0.0, 2.0]).softmax(0)
    found = KINDS["epicache"](budget=1).score(given)[0]
    torch.testing.assert_close(found.float(), torch.maximum(first, second))


@pytest.mark.parametrize("name", BUILD)
def test_the_queries_of_a_prompt_are_those_of_a_text_that_ends_with_it(name):
    text_BT, prompt_BP = ids(length=20), ids(length=6, seed=2)
    reader = PolicyReader(model(name), policy(name, "recent"))
    reader(text_BT)
    found = reader._prompted(prompt_BP)
    with watched(model(name)) as expected, torch.no_grad():
        model(name)(torch.cat([text_BT, prompt_BP], 1), use_cache=False)
    for layer, q_BTHK in expected.items():
        torch.testing.assert_close(found[layer], q_BTHK[:, -6:], rtol=0, atol=1e-12)
    assert len(found) == 2 and reader.tokens == reader.held["places"]["0"].shape[1] == 20


def test_clusters_are_those_of_windows_alike():
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9], [-1.0, 0.0]]])
    found = clustered(vectors, 3)[0].tolist()
    assert sorted(found) == [[-1.0, 0.0], pytest.approx([0.05, 0.95]), pytest.approx([0.95, 0.05])]
    # More clusters than different windows: the rest stays where it began.
    assert clustered(vectors[:, :1].repeat(1, 2, 1), 3).tolist() == [[[1.0, 0.0]] * 3]


def attached():
    return memlm.attach(BUILD["llama"](), {"kind": "gated_delta_net", "num_heads": 2, "head_dim": 8})


def eager():
    return LlamaForCausalLM._from_config(LlamaConfig(**SHARED), attn_implementation="eager")


@pytest.mark.parametrize(
    ("build", "kind", "line"),
    [
        (lambda: own(kind="titans_mag"), "recent", "from kind 'titans_mag'"),
        (lambda: own(kind="gated_delta_net"), "recent", "from kind 'gated_delta_net'"),
        (lambda: own(kind="attention", window_size=8), "recent", "window_size=8 of mixer 'memory'"),
        (attached, "recent", "memory stands beside the cache of this llama"),
        (lambda: MistralForCausalLM(MistralConfig(**SHARED, sliding_window=8)), "recent", "DynamicSlidingWindowLayer"),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)), "recent", "bloom"),
        (eager, "snapkv", "attn_implementation='eager' cannot be seen"),
        (own, "recent", r"budget=1 bytes hold 0 entries; period, sinks and recent take 20.*budget=5120"),
    ],
)
def test_models_without_entries_to_lose_are_refused_in_a_line(build, kind, line):
    with pytest.raises(ValueError, match=line) as error:
        PolicyReader(build().eval(), KINDS[kind](budget=1))
    assert "\n" not in str(error.value)


def test_rounding_errors_do_not_choose():
    """Equal tokens may have equal scores, but for errors that depend on the call."""

    class Noisy(KINDS["recent"]):
        def score(self, entries):
            noise_BS = 1e-9 * torch.randn(entries.places_BS.shape, dtype=torch.float64)
            return (1 + entries.places_BS % 3) * (1 + noise_BS)

    chosen = Noisy(**vars(policy("llama", "recent")))
    readers = [PolicyReader(model("llama"), chosen) for _ in range(2)]
    for reader in readers:
        reader(ids(length=64))
    first, second = (reader.held["places"]["1"] for reader in readers)
    assert torch.equal(first, second)
    # Two sinks, a recent token; among equal scores, the later ones stay.
    assert first[0].tolist() == [0, 1, *range(17, 54, 3), *range(55, 64)]


def test_settings():
    found = build_policies({"kind": ["recent", "keydiff"], "budget": [100, 200], "sinks": 1}, "eval.policy")
    assert [p.label for p in found[:4]] == [
        f"{k} sinks=1, {b} bytes" for k in ("recent", "keydiff") for b in (100, 200)
    ]
    assert {(p.kind, p.budget, p.sinks) for p in found[4:]} == {("random", 100, 1), ("random", 200, 1)}
    assert build_policies(None, "eval.policy") == []
    named = build_policies({"kind": "surprisal", "budget": 9, "repeat_bug": True}, "eval.policy")
    assert [p.label for p in named] == ["surprisal repeat_bug=True, 9 bytes", "random, 9 bytes"]
    for settings, line in [
        ({"kind": "keydif", "budget": 9}, "did you mean 'keydiff'"),
        ({"kind": "keydiff"}, "eval.policy.budget is missing"),
        ({"kind": "keydiff", "budget": 0}, "eval.policy.budget=0 must be at least 1"),
        ({"kind": "snapkv", "budget": 9, "pool": 4}, "eval.policy.pool=4 must be odd"),
        ({"kind": "surprisal", "budget": 9, "decay": 2.0}, r"eval.policy.decay=2.0 must lie in \(0, 1\]"),
        ({"kind": "recent", "budget": 9, "decay": 0.5}, "eval.policy.decay=0.5 is not a setting"),
        (["keydiff"], "eval.policy='keydiff' must be settings"),
    ]:
        with pytest.raises(ValueError, match=line):
            build_policies(settings, "eval.policy")


def test_an_evaluation_names_its_policies_and_shows_scores_by_budget():
    torch.manual_seed(0)
    sizes = {**SHARED, "vocab_size": 256, "head_dim": 8}
    mixers = {"memory": {"kind": "attention"}}
    tokenizer, bare = load_tokenizer("byte", []), memlm.MemLMForCausalLM(memlm.MemLMConfig(**sizes, mixers=mixers))
    run = Record({"data": {"sources": {"mqar": {"kind": "mqar"}}}}, {}, {})
    subject = Subject("mine", "", None, bare.eval(), tokenizer, run, None, [])
    # 256 bytes an entry; the texts have 64 tokens.
    policy = [{"kind": ["recent", "surprisal"], "budget": [8192, 32768]}]
    policy += [{"kind": "epicache", "budget": 32768, "caches": 2, "window": 8}]
    ask = {"mqar": {"forms": ["own"], "num_pairs": 4}}
    measure = Asked(ask=ask, lengths=[64], rows=3, policy=policy)
    measure.check_model(subject.model)
    results = {"mine": {"asked": measure.run(Examined(subject, tokenizer, {}, 0), [])}}
    cells = results["mine"]["asked"]["mqar"]
    policies = [cell["policy"] for cell in cells if cell.get("policy")]
    assert {(p["kind"], p["budget"]) for p in policies} == {
        *product(("recent", "surprisal", "random"), (8192, 32768)),
        ("epicache", 32768),
    }
    assert all(("note" in p) == (p["kind"] == "surprisal") for p in policies)
    assert all(cell["bytes"] <= cell["policy"]["budget"] for cell in cells if cell.get("policy"))
    header, rows = measure.tables(results)["asked-mqar-policies"]
    assert header[1:] == ["all entries", "8,192 bytes", "32,768 bytes"]
    assert [row[0].split(", ")[-1] for row in rows[:5]] == [
        *("full cache", "recent", "surprisal", "epicache caches=2 window=8", "random")
    ]
    # A budget of more entries than the text has tokens changes nothing.
    nats = {cell["down"]: cell["nats"] for cell in cells if cell["across"] in ("all entries", "32,768 bytes")}
    assert all(x == pytest.approx(nats["full cache"], rel=1e-5) for x in nats.values())
    small = {cell["down"]: cell["nats"] for cell in cells if cell["across"] == "8,192 bytes"}
    assert all(abs(x - nats["full cache"]) > 1e-5 for x in small.values())
    assert any(row[0] == "mqar, mine, random, 8,192 bytes, own" for row in measure.tables(results)["asked-mqar"][1])
    with pytest.raises(ValueError, match=r"budget=9 bytes hold 0 entries"):
        Asked(ask=ask, policy={"kind": "recent", "budget": 9}).check_model(subject.model)


def test_the_command_of_an_evaluation_is_kept_as_it_was_typed(monkeypatch):
    typed = ["eval=policies", "eval.policy={kind: recent, budget: 9}", "+eval.ask.mqar.gap=0.5", "seed=1"]
    typed += ["eval.ask=null", "eval.lengths=[8]", "eval.ask={}", "memory.x={}", "eval.policy=null"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *open_settings(typed)])
    assert shlex.split(storage.command()) == ["python", "evaluate.py", *typed]


def test_eval_policies_is_a_choice_that_builds():
    settings = OmegaConf.to_container(composed("eval=policies", config="evaluate").eval)
    (measure,) = (m for m in measures(settings) if isinstance(m, Asked))
    assert len(measure.policies) == 15 and {p.kind for p in measure.policies} == {*PLAIN} - {"surprisal"}
