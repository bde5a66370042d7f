"""Memory Sparse Attention against the outputs of its released code, and checkpoints in other formats."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from memlm import MemLMForCausalLM, MemoryCache
from memlm.hub import load_model, msa
from memlm.roles import Roles
from memlm_kernels.testing import assert_close, relative_error
from tests.conftest import ROOT, convert

FOLDER = ROOT / "tests" / "reference" / "msa_tiny"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# Our model in fp64 too: the difference is then the rounding of the released code, which is fp32.
FORWARD, GRADIENT = 1e-5, 1e-4


@pytest.fixture(scope="module")
def golden():
    return torch.load(FOLDER / "reference.pt", weights_only=True)


def released():
    theirs, weights = json.loads((FOLDER / "config.json").read_text()), load_file(FOLDER / "model.safetensors")
    return theirs, weights, msa.config_from_msa(theirs, weights)


def model_of(dtype, **settings) -> MemLMForCausalLM:
    _, weights, config = released()
    model = MemLMForCausalLM(config)
    missing, unexpected = model.load_state_dict(msa.weights_from_msa(weights, config), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    for layer in model.model.layers:
        layer.mixer.msa = dataclasses.replace(layer.mixer.msa, **settings)
    return model.to(dtype).eval()


def labels_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@DTYPES
def test_parity_in_training(golden, dtype):
    golden, inputs = golden["train"], golden["train"]["inputs"]
    # The model has no randomness; but in training mode a backward without the auxiliary losses is refused.
    model, doc_ids, real = model_of(dtype).eval(), inputs["doc_ids"], inputs["attention_mask"].bool()
    positives = torch.zeros_like(doc_ids)
    for row, labels in enumerate(inputs["batch_aux_labels"]):
        positives[row] = torch.tensor([0, *labels])[doc_ids[row].clamp(min=0)]
    seen: dict = {}
    for i, layer in enumerate(model.model.layers):
        layer.mixer.register_forward_hook(lambda _, x, out, i=i: seen.update({i: (x[0], out.y_BTD, out.state)}))
    out = model(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        roles=Roles(doc_ids, positives),
        output_hidden_states=True,
        use_cache=False,
    )
    assert_close("logits", golden["logits"][real], out.logits[real], FORWARD)
    for i, (expected, got) in enumerate(zip(golden["hidden_states"], out.hidden_states, strict=True)):
        assert_close(f"hidden state {i}", expected[real], got[real], FORWARD)
    for i, (x, y, _) in seen.items():
        assert_close(f"attention {i}, in", golden["layers"][i]["attn_in"][real], x[real], FORWARD)
        assert_close(f"attention {i}, out", golden["layers"][i]["attn_out"][real], y[real], FORWARD)
    for i, expected in golden["doc_scores"].items():
        state = seen[i][2]
        scores = torch.full((2, 7), -torch.inf, dtype=state["bank"]["score"].dtype)
        used = torch.arange(state["bank"]["score"].shape[1]) < state["chunks"][:, None]
        owner = torch.where(used, state["bank"]["document"] + 1, 6)
        scores = scores.scatter_reduce(1, owner, state["bank"]["score"].masked_fill(~used, -torch.inf), "amax")[:, :6]
        assert torch.equal(scores.isfinite(), expected.isfinite())
        assert_close(f"scores {i}", expected[expected.isfinite()], scores[expected.isfinite()], FORWARD)

    # The released loss is a mean over samples, one per row; a loss from labels weights rows by their scored tokens.
    aux = sum(x.mean() for x in out.aux_losses.values())
    lm, qa = labels_loss(out.logits, inputs["labels"]), inputs["train_qa_samples"].bool()
    answer = labels_loss(out.logits[qa], inputs["batch_answer_labels"][qa])
    for name, got in (("lm_loss", lm), ("aux_loss", aux / 0.1), ("answer_loss", answer), ("loss", lm + aux + answer)):
        assert_close(name, golden[name], got, FORWARD)
    (lm + answer).backward(retain_graph=True)
    assert all(p.grad is None for name, p in model.named_parameters() if "router" in name)
    assert all(x is None for x in golden["router_grad_from_lm_loss_only"].values())
    aux.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, expected in msa.weights_from_msa(golden["grads"], model.config).items():
        assert_close(f"gradient of {name}", expected, gradients[name], GRADIENT)


@DTYPES
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_parity_in_inference(golden, similarity, dtype):
    """Banks, prefill, decoding, and an inserted segment, to which the released code attends in both directions."""
    golden = golden["infer"][similarity]
    model, memory, cache = model_of(dtype, similarity=similarity), golden["memory"], MemoryCache()
    ids = torch.cat([memory["head_ids"], *memory["docs"]])[None]
    pieces = [(-2, 3), *((n + 1, len(document)) for n, document in enumerate(memory["docs"]))]
    doc_ids = torch.cat([torch.full((n,), role) for role, n in pieces])[None]
    with torch.no_grad():
        hidden = model.model(ids, roles=Roles(doc_ids), past_key_values=cache).last_hidden_state
    first, second = (stage["last_hidden_state"][0] for stage in memory["stage1"])
    assert_close("documents", torch.cat([first, second[3:]]), hidden[0], FORWARD)
    for i, state in enumerate(cache.states):
        for expected, name in zip(memory["template_kv"][i], ("k", "v"), strict=True):
            assert_close(f"template {name} {i}", expected, state[name].transpose(1, 2), FORWARD)
    for i, bank in memory["bank"].items():
        state, chunks = cache.states[i], len(memory["pool_doc_ids"])
        assert cache.states[i]["chunks"].item() == chunks
        assert torch.equal(state["bank"]["document"][0, :chunks] + 1, memory["pool_doc_ids"])
        for expected, name in ((bank["k"], "k"), (bank["v"], "v"), (bank["rk"], "router_k")):
            got = state["bank"][name][:, :chunks].transpose(1, 2)
            # For cosines the released code keeps normalised router keys.
            got = F.normalize(got, dim=-1) if name == "router_k" and similarity == "cosine" else got
            assert_close(f"bank {name} {i}", expected, got, FORWARD)

    cache.batch_repeat_interleave(2)
    inputs, real = golden["inputs"], golden["inputs"]["attention_mask"].bool()
    taken: dict = {}
    hooks = [
        layer.mixer.register_forward_hook(lambda _, x, out, i=i: taken.update({i: (x[0], out.y_BTD)}))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        prefill = model(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            roles=Roles(inputs["doc_ids"]),
            past_key_values=cache,
        ).logits
    assert_close("prefill", golden["prefill_logits"][real], prefill[real], FORWARD)
    order = (~real).long().argsort(dim=1, stable=True).argsort(dim=1)[..., None]
    for i, parts in taken.items():
        for name, got in zip(("attn_in", "attn_out"), parts, strict=True):
            got = got.gather(1, order.expand_as(got))
            assert_close(f"{name} {i}", golden["layers"][i][name][real], got[real], FORWARD)
    for hook in hooks:
        hook.remove()
    for i, routed in golden["routing"].items():
        scores = cache.states[i]["bank"]["score"][:, :13]
        of_documents = torch.stack([scores[:, memory["pool_doc_ids"] == n + 1].amax(1) for n in range(6)], 1)
        best = of_documents.sort(dim=1, descending=True)
        assert torch.equal(best.indices[:, :2], routed["doc_ids"])
        assert_close(f"routing {i}", routed["scores"], best.values[:, :2], FORWARD)

    tokens = golden["decode_tokens"]
    assert torch.equal(prefill[:, -1].argmax(-1), tokens[:, 0])
    with torch.no_grad():
        steps = torch.cat([model(t, past_key_values=cache).logits for t in tokens.split(1, 1)], 1)
        assert_close("decoding", golden["decode_logits"], steps, FORWARD)
        assert torch.equal(steps[:, :-1].argmax(-1), tokens[:, 1:])
        injected = golden["inject"]["input_ids"]
        causal = model(injected, past_key_values=cache.fork()).logits
        for layer in model.model.layers:
            layer.mixer.msa = dataclasses.replace(layer.mixer.msa, injection="bidirectional")
        assert_close("put in", golden["inject"]["logits"], model(injected, past_key_values=cache).logits, FORWARD)
    assert relative_error(golden["inject"]["logits"], causal) > 1e-3


def test_the_released_format_goes_there_and_back(tmp_path):
    code, said = convert("--from-format", "msa", "--source", FOLDER, "--target", tmp_path / "ours")
    assert code == 0, said
    code, said = convert("--to-format", "msa", "--source", tmp_path / "ours", "--target", tmp_path / "theirs")
    assert code == 0, said
    weights, back = (load_file(folder / "model.safetensors") for folder in (FOLDER, tmp_path / "theirs"))
    assert weights.keys() == back.keys() and all(torch.equal(back[name], w) for name, w in weights.items())
    theirs, written = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER, tmp_path / "theirs"))
    for found in (theirs, written):
        found |= {f"msa_config.{name}": value for name, value in found.pop("msa_config").items()}
    # The temperature, rounded to fp32.
    assert {name for name in theirs if theirs[name] != written.get(name)} == {"msa_config.infonce_loss_temp"}
    plain = msa.config_to_msa(load_model(tmp_path / "ours").config, {})
    assert plain["max_position_embeddings"] == 4096 and plain["msa_config"]["aux_loss"] is False
    assert plain.keys() | {"torch_dtype", "transformers_version", "max_window_layers"} >= released()[0].keys()
    assert load_model(tmp_path / "ours").config.mixer_pattern == ["documents", "documents", "memory", "memory"]


def test_the_loss_bce_has_a_bias_in_place_of_a_temperature():
    theirs, weights, _ = released()
    theirs["msa_config"]["aux_loss_method"] = "BCE"
    weights["b"] = torch.tensor(-20.5)
    del weights["temperature"]
    config = msa.config_from_msa(theirs, weights)
    assert config.mixers["memory"]["similarity"] == "dot"
    ours = msa.weights_from_msa(weights, config)
    back = msa.weights_to_msa(ours, config)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], w) for name, w in weights.items())
    assert msa.config_to_msa(config, {})["msa_config"]["aux_loss_method"] == "BCE"
    ours["model.layers.3.mixer.router_bias"] += 1
    with pytest.raises(ValueError, match="router_bias differs between layers"):
        msa.weights_to_msa(ours, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mom"}, "model_type='mom'; only 'msa' can be converted"),
        ({"attention_bias": True}, "attention_bias=True; only False can be converted"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling="),
        ({"msa_config": {"decouple_router": False}}, "msa_config.decouple_router=False; only True"),
        ({"msa_config": {"query_reduce_method": "last"}}, "query_reduce='last' must be one of mean, max"),
        ({"msa_config": {"pooling_kernel_size": 0}}, "chunk_size=0"),
    ],
)
def test_configurations_that_ours_cannot_be_are_refused(change, message):
    theirs, weights, _ = released()
    rules = {**theirs["msa_config"], **change.pop("msa_config", {})}
    with pytest.raises(ValueError, match=message):
        msa.config_from_msa({**theirs, **change, "msa_config": rules}, weights)


def test_weights_of_another_model_are_refused():
    theirs, weights, config = released()
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.router_q_proj\.0\.weight is missing"):
        rules = {**theirs["msa_config"], "router_layer_idx": "1,2,3"}
        msa.weights_from_msa(weights, msa.config_from_msa({**theirs, "msa_config": rules}, weights))
    with pytest.raises(ValueError, match="extra is not a weight of this configuration"):
        msa.weights_from_msa({**weights, "extra": torch.zeros(1)}, config)


def test_a_tied_head_that_is_saved_too_is_left_out():
    _, weights, config = released()
    ours = msa.weights_from_msa(weights, config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    assert msa.weights_from_msa(weights, config).keys() == ours.keys() and "lm_head.weight" not in ours


def test_what_theirs_serves_by_dot_goes_back():
    _, _, config = released()
    written = msa.config_to_msa(config, {})
    config.mixers["memory"]["similarity"] = "dot"
    assert msa.config_to_msa(config, {}) == written


def test_torn_folders_are_one_line(tmp_path):
    theirs, *_ = released()
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    (tmp_path / "model.safetensors").write_bytes((FOLDER / "model.safetensors").read_bytes()[:1000])
    code, said = convert("--from-format", "msa", "--source", tmp_path, "--target", tmp_path / "ours")
    assert code == 1 and said.count("\n") == 1 and "model.safetensors cannot be read (" in said
    for config, message in (
        ({**theirs, "msa_config": {}}, "config.json: msa_config.aux_loss_method is missing; the folder holds no"),
        ({name: x for name, x in theirs.items() if name != "msa_config"}, "config.json: msa_config is missing; the"),
        ({**theirs, "num_attention_heads": None}, "model.num_attention_heads=None must be int"),
    ):
        with pytest.raises(ValueError, match=message):
            msa.config_from_msa(config, {})


def test_models_that_theirs_cannot_be_are_refused():
    _, _, config = released()
    for mixer, message in (
        ({"chunk_size": 16}, "chunk_size is 8 and 16"),
        (
            {"similarity": "dot", "router_loss": "infonce"},
            "similarity='dot'; with router_loss='infonce' the release trains and serves by 'cosine'",
        ),
        ({"router_loss": "bce"}, "similarity='cosine'; with router_loss='bce' the release trains and serves by 'dot'"),
        ({"qk_norm": False}, "qk_norm must be True in every layer"),
        ({"qkv_bias": True}, "qkv_bias must be False in every layer"),
        ({"rotary": False}, "rotary must be True in every layer"),
        ({"routes": False}, "routes is false in every layer"),
    ):
        other = copy.deepcopy(config)
        other.mixers["memory"] |= mixer
        with pytest.raises(ValueError, match=message):
            msa.config_to_msa(other, {})
    config.norm_outputs = True
    with pytest.raises(ValueError, match=r"model\.norm_outputs=True; only False can be converted"):
        msa.config_to_msa(config, {})
