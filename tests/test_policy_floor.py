"""Key-value policies beside two floors: a budget for all tokens, and each policy by hand, in a few lines."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from memlm.policies import KINDS, EpisodeReader, PolicyReader
from memlm.policies.kinds import Arrivals
from memlm.reader import Reader
from tests.test_policies import BUILD, cut, entries, entry, ids, model, policy, quick


@pytest.mark.parametrize(("name", "kind"), quick(KINDS, BUILD))
def test_a_budget_for_all_tokens_equals_no_policy_at_any_cut(name, kind):
    ids_BT, question_BT, rows = ids(), ids(length=9, seed=2), torch.tensor([2, 0, 2])
    each, rest = entry(name)
    settings = {"caches": 2, "window": 16} if kind == "epicache" else {}
    chosen = KINDS[kind](budget=settings.get("caches", 1) * (80 * each + rest), period=8, **settings)
    for sizes in (70, [1] * 30 + [40], [3, 20, 1, 1, 39, 6]):
        reader = EpisodeReader(model(name), chosen) if settings else PolicyReader(model(name), chosen)
        plain = Reader(model(name))
        found, expected = ([one(part, keep=70) for part in ids_BT.split(sizes, 1)] for one in (reader, plain))
        # Episodes are read when a question comes.
        for one, other in zip(found, expected, strict=True) if not settings else ():
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        answer = reader.fork(rows, question_BT)(question_BT, keep=9)
        torch.testing.assert_close(answer, plain.fork(rows)(question_BT, keep=9), rtol=0, atol=1e-12)


SIZES = {"period": 8, "sinks": 2, "recent": 1}
SETTINGS = {"snapkv": {"queries": 12, "pool": 3}, "surprisal": {"decay": 0.8}}


class ByHand:
    """Llama reads one text by blocks of a period, and drops the entries of the smallest scores before one that does
    not fit. ``score(self, layer, j)`` is that of the j-th entry.
    """

    def __init__(self, score, capacity, ids_T, prompt_P):
        self.model = BUILD["llama"]().double().eval()
        self.model.load_state_dict(model("llama").state_dict())
        for i, layer in enumerate(self.model.model.layers):
            layer.self_attn.q_proj.register_forward_hook(lambda m, args, q, i=i: self.seen.__setitem__(i, q[0]))
        self.cache, self.queries, self.ids_T = DynamicCache(), [[], []], ids_T
        self.places, self.nats = [[], []], [torch.inf]
        for self.now in range(0, len(ids_T), 8):
            if len(self.places[0]) + 8 > capacity:
                self.prompt = self.read(prompt_P)[1]
                self.keep([[*range(len(places))] for places in self.places])
                self.keep([self.best(score, i, capacity - 8) for i in range(2)])
            block_T = ids_T[self.now : self.now + 8]
            logp_TV, queries = self.read(block_T)
            targets = ids_T[self.now + 1 : self.now + 1 + len(block_T)]
            self.nats += [-float(logp[target]) for logp, target in zip(logp_TV, targets, strict=False)]
            for i in range(2):
                self.places[i] += range(self.now, self.now + len(block_T))
                self.queries[i] += [*enumerate(queries[i], self.now)]

    def read(self, ids_T):
        """Log-probabilities [T, V], and the queries [T, H, K] of each layer at their places."""
        self.seen, places = {}, torch.arange(self.now, self.now + len(ids_T))[None]
        with torch.no_grad():
            logits = self.model(ids_T[None], past_key_values=self.cache, position_ids=places).logits[0]
        q_BHTK = [self.seen[i].unflatten(1, (4, 8)).transpose(0, 1)[None] for i in range(2)]
        angles = self.model.model.rotary_emb(logits, places)
        return logits.log_softmax(-1), [apply_rotary_pos_emb(q, q, *angles)[0][0].transpose(0, 1) for q in q_BHTK]

    def best(self, score, i, kept):
        """The entries with the largest scores; of equal ones, the later."""
        scores = [
            torch.inf if p < SIZES["sinks"] or p >= self.now - SIZES["recent"] else score(self, i, j)
            for j, p in enumerate(self.places[i])
        ]
        return sorted(sorted(range(len(scores)), key=lambda j: (scores[j], j))[-kept:])

    def keep(self, chosen):
        for i, (layer, best) in enumerate(zip(self.cache.layers, chosen, strict=True)):
            layer.keys, layer.values = layer.keys[:, :, best], layer.values[:, :, best]
            self.places[i] = [self.places[i][j] for j in best]

    def keys(self, i):
        """[S, G, K]"""
        return self.cache.layers[i].keys[0].transpose(0, 1)

    def weights(self, i, place, q_HK):
        """[H, S]: each query head sees the key head of its group, and no entry after it."""
        k_SHK = self.keys(i).repeat_interleave(2, 1)
        scores_HS = torch.stack([k_SHK[:, h] @ q_HK[h] / 8**0.5 for h in range(4)])
        return scores_HS.masked_fill(torch.tensor(self.places[i]) > place, -torch.inf).softmax(1)

    def attention(self, i):
        """The mean over heads and over the last queries [S]."""
        last = self.queries[i][-SETTINGS["snapkv"]["queries"] :]
        return torch.stack([self.weights(i, place, q_HK).mean(0) for place, q_HK in last]).mean(0)

    def asked(self, i):
        """The largest weight of a group of heads over the prompt, a mean over the key heads [S]."""
        of_prompt = torch.stack([self.weights(i, torch.inf, q_HK) for q_HK in self.prompt[i]]).amax(0)
        return torch.stack([of_prompt[:2].amax(0), of_prompt[2:].amax(0)]).mean(0)


def unlike(hand, i, j):
    directions = [k_GK / k_GK.norm(dim=1, keepdim=True) for k_GK in hand.keys(i)]
    mean_GK = torch.stack(directions).mean(0)
    return -sum(float(directions[j][g] @ mean_GK[g] / mean_GK[g].norm()) for g in range(2))


def draw(hand, i, j):
    place = hand.places[i][j]
    one = hand.ids_T[None, place : place + 1]
    return float(KINDS["random"](budget=1).mark(Arrivals(one, one, torch.tensor([place]), None)))


SCORES = {
    "recent": lambda hand, i, j: hand.places[i][j],
    "random": draw,
    "knorm": lambda hand, i, j: -sum(float(k_K.norm()) for k_K in hand.keys(i)[j]),
    "keydiff": unlike,
    "snapkv": lambda hand, i, j: float(hand.attention(i)[max(0, j - 1) : j + 2].max()),
    "surprisal": lambda hand, i, j: hand.nats[hand.places[i][j]] * 0.8 ** (hand.now // 8 - hand.places[i][j] // 8),
    "epicache": lambda hand, i, j: float(hand.asked(i)[j]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_entries_are_those_of_a_reference_by_hand(kind):
    # Different tokens: equal ones would have equal keys in the first layer.
    text_T = torch.randperm(61, generator=torch.Generator().manual_seed(5))
    prompt_P, capacity = text_T[20:26], 27
    settings = {**SIZES, **SETTINGS.get(kind, {})}
    chosen = policy("llama", kind, entries=capacity, **settings, **({"caches": 1} if kind == "epicache" else {}))
    reader = PolicyReader(model("llama"), chosen)
    assert reader.capacity == capacity
    reader.prompt_BP = prompt_P[None] if kind == "epicache" else None
    cut(reader, text_T[None], [5, 30, 1, 25])
    hand = ByHand(SCORES[kind], capacity, text_T, prompt_P)
    for i, layer in enumerate(hand.cache.layers):
        assert reader.held["places"][str(i)][0].tolist() == hand.places[i]
        for name in ("keys", "values"):
            found = getattr(reader.cache.layers[i], name)
            torch.testing.assert_close(found, getattr(layer, name), rtol=0, atol=1e-12)
    # A policy of keys or queries may keep other entries in each layer.
    assert (hand.places[0] == hand.places[1]) == (kind in ("recent", "random", "surprisal"))


def test_a_query_that_sees_no_entry_leaves_the_scores_finite():
    """Without sinks, all entries may be later than the first of the last queries."""
    k = [[4.0, 0.0], [0.0, 0.0], [0.0, 4.0]]
    given = entries(k, q=[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], places=[8, 9, 10], now=10)
    # The queries stand at 7, 8 and 9.
    seen = [torch.tensor(x).softmax(0) for x in ([8.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf])]
    found = KINDS["snapkv"](budget=1, queries=3, pool=1).score(given)[0]
    torch.testing.assert_close(found.float(), sum(seen) / 3)
