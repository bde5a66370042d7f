"""Facts written into weights: the closed form against its formula, one row at a time; which weights change."""

import pytest
import torch
from torch import nn

from memlm.editing import Editor
from tests.backbones import VOCAB, backbone
from tests.conftest import build

TOKENS, ANSWER = 7, 2


def facts(count, seed, vocab=VOCAB):
    ids = torch.randint(2, vocab, (count, TOKENS), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    return ids, labels


def nats(model, ids, labels):
    with torch.no_grad():
        return model(ids, labels=labels, use_cache=False).loss.item()


def rows(model, name, ids):
    """Keys and gradients of a layer at the tokens before an answer, fact by fact, by a zero added to its output."""
    layer, found, bias = model.get_submodule(name), [], []

    def add(module, inputs, output):
        bias.append(torch.zeros_like(output, requires_grad=True))
        found.append(inputs[0])
        return output + bias[-1]

    keys, gradients = [], []
    hook = layer.register_forward_hook(add)
    for text in ids:
        logits = model(text[None], use_cache=False).logits[0]
        loss = 0.0
        for t in range(TOKENS - ANSWER - 1, TOKENS - 1):
            loss = loss - logits[t].log_softmax(-1)[text[t + 1]]
        (g,) = torch.autograd.grad(loss, bias[-1])
        for t in range(TOKENS - ANSWER - 1, TOKENS - 1):
            keys.append(found[-1][0, t].detach())
            gradients.append(g[0, t])
    hook.remove()
    return torch.stack(keys), torch.stack(gradients)


@pytest.mark.parametrize("count", [3, 40], ids=["fewer rows than inputs", "more"])
def test_an_edit_is_the_formula_with_the_moments_of_all_edits(count):
    model = backbone("llama", exact=True)
    editor, seen, rate = Editor(model, rate=1e-3), {}, 1e-3
    assert [*editor.modules] == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up")] + [
        f"model.layers.2.mlp.{name}_proj" for name in ("gate", "up")
    ]
    for batch in range(2):
        ids, labels = facts(count, batch)
        expected = {}
        for name in editor.modules:
            keys, gradients = rows(model, name, ids)
            seen.setdefault(name, []).append(torch.cat([keys, gradients], 1))
            of_all = torch.cat(seen[name])
            mean, deviation = of_all.mean(0), of_all.std(0, correction=0)
            moves = []
            for h, g in zip(keys, gradients, strict=True):
                normal = (torch.cat([h, g]) - mean) / deviation
                size = sum(x * x for x in normal[: len(h)].tolist())
                moves.append(-rate * size * normal[len(h) :])
            system = keys.T @ keys + torch.eye(keys.shape[1], dtype=torch.float64)
            change = torch.linalg.inv(system) @ keys.T @ torch.stack(moves)
            expected[name] = model.get_submodule(name).weight + change.T
        before = {name: p.clone() for name, p in model.named_parameters()}
        editor(ids, labels)
        for name, p in model.named_parameters():
            layer = name.removesuffix(".weight")
            if layer in expected:
                change = expected[layer] - before[name]
                assert (p - expected[layer]).norm() < 1e-10 * change.norm(), name
            else:
                assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("family", ["llama", "qwen3", "titans_mag"])
def test_frozen_models_give_the_edited_answers(family):
    """Weights that ask for no gradient are edited too, and stay without one."""
    model = build(family).eval() if family == "titans_mag" else backbone(family)
    model.requires_grad_(False)
    ids, labels = facts(16, 0)
    before = nats(model, ids, labels)
    editor = Editor(model, rate=2e-2)
    for _ in range(4):
        editor(ids, labels)
    assert nats(model, ids, labels) < before - 1
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_padding_at_the_end_changes_no_edit():
    models = [backbone("llama", exact=True) for _ in range(2)]
    ids, labels = facts(8, 0)
    padded = [torch.nn.functional.pad(x, (0, 3), value=value) for x, value in ((ids, 5), (labels, -100))]
    for model, given in zip(models, [(ids, labels), padded], strict=True):
        Editor(model, rate=1e-2)(*given)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_mistakes_are_one_line():
    model = backbone("llama")
    with pytest.raises(ValueError, match=r"modules: 'model.layers.1.mlp.gate_prok' is no Linear layer.*did you mean"):
        Editor(model, ["model.layers.1.mlp.gate_prok"])
    with pytest.raises(ValueError, match=r"rate=0 must be above 0"):
        Editor(model, rate=0)
    with pytest.raises(ValueError, match=r"modules: the model has no mlp.gate_proj and mlp.up_proj; name Linear"):
        Editor(backbone("gpt2"))
    quantised = backbone("llama")
    quantised.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), False)
    with pytest.raises(ValueError, match=r"up_proj has weights of torch.int8; load the model unquantised"):
        Editor(quantised)
    ids, labels = facts(2, 0)
    with pytest.raises(ValueError, match="no token after the first is scored"):
        Editor(model)(ids, torch.full_like(labels, -100))
    with pytest.raises(ValueError, match=r"must both be \[facts, tokens\]"):
        Editor(model)(ids, labels[:, 1:])
