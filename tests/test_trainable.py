"""``train.trainable``: the chosen parameters are trained, and no other."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import memlm
from memlm import MemLMConfig, MemLMForCausalLM
from memlm.hub import load_model
from memlm.training import checkpoint, loop, run
from memlm.training.trainable import choose, memory_names
from tests.conftest import build
from tests.runs import SMALLEST, config, figures, stopped, trainer
from tests.test_any_model import LLAMA, TITANS

TINY = (*SMALLEST, "memory=titans_mag", "train.steps=4")
WAYS = {"memory": "memory", "patterns": ["*.mlp.*", "lm_head.*"], "condition": {"condition": 3}}


def tiny(folder, trainable, *overrides):
    written = re.sub(r'"(\w+)":', r"\1:", json.dumps(trainable))
    return config(folder, f"train.trainable={written}", *overrides, small=TINY)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_only_the_chosen_parameters_have_gradients_state_and_changes(tmp_path, way, optim):
    made = trainer(tiny(tmp_path, WAYS[way], f"optim={optim}"))
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    chosen = choose(made.model, WAYS[way])
    assert 0 < len(chosen) < len(before)
    optimised = {id(p) for o in made.optimizers for group in o.param_groups for p in group["params"]}
    made._one_step(logged=False)
    for name, p in made.model.named_parameters():
        assert (id(p) in optimised) == p.requires_grad == (name in chosen), name
        assert torch.equal(p, before[name]) == (name not in chosen), name
    assert sum(len(o.state_dict()["state"]) for o in made.optimizers) == len(chosen)


def test_the_memory_is_the_mixers_with_long_term_memory():
    """Embeddings, norms and MLPs are not; nor are mixers of attention alone."""
    for memory in ("titans_mag", "lact", "mom", "gla", "msa", "chunk_sparse"):
        model = build(memory)
        found = memory_names(model)
        assert found == [name for name, _ in model.named_parameters() if ".mixer." in name], memory
    other = {"attention": {"kind": "attention"}, "memory": {"kind": "gla"}}
    hybrid = MemLMForCausalLM(
        MemLMConfig(
            num_hidden_layers=2, mixers=other, mixer_pattern=["attention", "memory"], hidden_size=64, vocab_size=8
        )
    )
    assert {name.split(".")[2] for name in memory_names(hybrid)} == {"1"}
    with pytest.raises(ValueError, match=r"train\.trainable=memory, but the model has no long-term memory"):
        choose(build("none"), "memory")


def test_a_matrix_of_zeros_is_the_worst_conditioned():
    model = build("gla")
    with torch.no_grad():
        first = next(name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear))
        model.get_submodule(first).weight.zero_()
        assert f"{first}.weight" not in choose(model, {"condition": 3})
        model.get_submodule(first).weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"train\.trainable\.condition: {first}\.weight is not finite"):
        choose(model, {"condition": 3})


def test_the_best_conditioned_matrices_are_chosen():
    """By the ratio of singular values; head, embeddings and single rows do not count."""
    model = build("gla")
    with torch.no_grad():
        for weight in (model.model.layers[1].mlp.up_proj.weight, model.lm_head.weight):
            torch.nn.init.orthogonal_(weight)
        second = model.model.layers[0].mlp.down_proj.weight
        torch.nn.init.orthogonal_(second)
        second[0] *= 1.001
    assert choose(model, {"condition": 1}) == ["model.layers.1.mlp.up_proj.weight"]
    assert choose(model, {"condition": 2}) == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    matrices = [
        name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and min(m.weight.shape) > 1
    ]
    with pytest.raises(ValueError, match=rf"condition=999 is more than the model's {len(matrices) - 1} weight mat"):
        choose(model, {"condition": 999})


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("memroy", r"train\.trainable='memroy' is unknown; use null, memory, a list"),
        ([], r"train\.trainable=\[\] must be patterns"),
        ([3], r"train\.trainable=\[3\] must be patterns"),
        ({"condition": 0}, r"train\.trainable=\{'condition': 0\} must be \{condition: N\}"),
        ({"conditions": 3}, r"train\.trainable=\{'conditions': 3\} must be \{condition: N\}"),
        (3, r"train\.trainable=3 must be str or list or dict or null"),
        (["*.mixr.*"], r"train\.trainable: '\*\.mixr\.\*' matches no parameter; did you mean 'mixer'\?"),
        (["*.mixer.*", "mixer.*"], r"'mixer\.\*' matches no parameter; names are model\.embed_tokens\.weight, "),
        ({"condition": 999}, r"train\.trainable\.condition=999 is more than the model's \d+ weight matrices"),
    ],
)
def test_mistakes_are_one_line(tmp_path, trainable, message):
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tiny(tmp_path, trainable))
    assert "\n" not in str(caught.value)


def test_parameters_without_an_effect_are_refused(tmp_path):
    """A router of documents, where rows have none; and a memory whose gate stays closed."""
    made = trainer(tiny(tmp_path, ["*.router_q_proj.*"], "memory=msa"))
    with pytest.raises(ValueError, match=r"train\.trainable: no trained parameter has an effect on the loss"):
        made._one_step(logged=False)
    model = memlm.attach(AutoModelForCausalLM.from_config(LLAMA), TITANS)
    for trainable in (["*.mlp.*", "*.memlm.mixer.*"], {"condition": 2}):
        with pytest.raises(ValueError, match=r"leaves the gates of the memory closed, .* add '\*\.memlm\.gate' to a"):
            choose(model, trainable)
    both = [*memory_names(model), "model.layers.1.mlp.up_proj.weight"]
    assert {*choose(model, ["*.memlm.*", "*.1.mlp.up_proj.*"])} == {*both}
    with torch.no_grad():
        model.model.layers[0].self_attn.memlm.gate += 1
    assert len(choose(model, {"condition": 2})) == 2


@pytest.mark.parametrize(
    "way", ["condition", *(pytest.param(way, marks=pytest.mark.slow) for way in ("memory", "patterns"))]
)
def test_a_stopped_run_trains_the_same_parameters_to_the_bit(tmp_path, monkeypatch, capsys, way):
    """Condition numbers change as the run trains; the choice of the first step stays."""
    run(tiny(tmp_path / "straight", WAYS[way]))
    stopped(tiny(tmp_path, WAYS[way]), 2)
    # By now another choice would be made.
    monkeypatch.setattr(loop.trainable, "choose", lambda *_: ["lm_head.weight"])
    run(tiny(tmp_path, WAYS[way]))
    assert figures(tmp_path) == figures(tmp_path / "straight")
    folders = [checkpoint.latest(folder / "run") for folder in (tmp_path, tmp_path / "straight")]
    ends = [dict(load_model(folder).named_parameters()) for folder in folders]
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())
    facts = json.loads((folders[0] / checkpoint.FACTS).read_text())
    assert 0 < facts["trained_parameters"] < facts["parameters"] == sum(p.numel() for p in ends[0].values())
    told = f"{facts['parameters']:,} parameters ({facts['trained_parameters']:,} trained)"
    assert told in capsys.readouterr().out


def test_another_choice_is_another_run(tmp_path):
    run(tiny(tmp_path, {"condition": 3}, "train.steps=1"))
    with pytest.raises(
        ValueError, match=r"train\.trainable\.condition=4, but .* has 3; set train.trainable.condition=3"
    ):
        run(tiny(tmp_path, {"condition": 4}, "train.steps=1"))
    with pytest.raises(ValueError, match=r"train\.trainable=null, but the run in .* has"):
        run(tiny(tmp_path, None, "train.steps=1"))
