"""Attached memories in other forms of models: classifiers, without a head, with images, hybrids, shared keys."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForSequenceClassification

import memlm
from memlm_kernels.testing import assert_close
from tests.backbones import SIZES, VOCAB, backbone
from tests.test_attached import EXACT, LENGTH, attached, ids, logits, opened, settings, streamed

IMAGE = VOCAB - 1
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
SHARED = dict(
    head_dim=8,
    global_head_dim=16,
    sliding_window=6,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=VOCAB,
)
LATENT = dict(
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_key_value_heads=4,
    first_k_dense_replace=1,
)
MAMBA = dict(head_dim=8, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_d_ssm=64)
FORMS = {
    "Qwen3NextConfig": dict(head_dim=8, num_experts=4, shared_expert_intermediate_size=16, **MOE, **LINEAR),
    "Gemma4TextConfig": SHARED,
    "DeepseekV3Config": LATENT | MOE,
    "MiniMaxConfig": dict(head_dim=8, num_local_experts=4, **MOE),
    "DeepseekV4Config": dict(head_dim=8, num_local_experts=4, sliding_window=6, index_topk=8, index_head_dim=8, **MOE),
    "FalconH1Config": dict(mamba_chunk_size=8, **MAMBA),
}


def form(name):
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, "num_hidden_layers": 4, **FORMS[name]})
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


@pytest.mark.parametrize("name", FORMS)
def test_a_memory_reads_all_tokens_in_every_form_of_decoder(name):
    model = form(name)
    expected = logits(model, ids())
    opened(memlm.attach(model, settings("gated_delta_net")))
    whole = logits(model, ids())
    assert (whole - expected).abs().max() > 0.1
    out = model.generate(ids(), max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for i, found in enumerate(out.logits):
        assert_close(f"token {i}", logits(model, out.sequences[:, : LENGTH + i])[:, -1], found, 1e-4)
    _, cache = streamed(model, ids()[:, :9], [9])
    # Other tokens in a copy, so that a shared tensor would be seen.
    cuts = [1, 1, 5, 1, 6]
    streamed(model, ids(seed=7)[:, 9:], cuts, memlm.fork(cache))
    assert_close("after a fork", whole[:, 9:], streamed(model, ids()[:, 9:], cuts, cache)[0], 1e-4)


@pytest.mark.parametrize("name", ["Qwen3NextConfig", "Gemma4TextConfig", "DeepseekV3Config"])
@pytest.mark.parametrize("made", [DynamicCache, lambda: None], ids=["lazily", "by the model"])
def test_a_window_in_other_forms_of_decoders(name, made):
    model = opened(memlm.attach(form(name), settings("gated_delta_net"), window=4, sinks=1))
    out, cache = streamed(model, ids(), [9, 1, 1, 12], made())
    assert_close("in parts", logits(model, ids()), out, 1e-4)
    assert any(type(layer).__name__ == "WindowLayer" for layer in cache.layers)


def test_a_window_takes_a_cache_that_was_made_without_the_configuration():
    model = attached("gemma2", window=4, sinks=1)
    assert_close("in parts", logits(model, ids()), streamed(model, ids(), [9, 14], DynamicCache())[0], EXACT)


def test_a_window_takes_a_model_with_a_setting_of_another_family():
    """transformers makes a cache by the setting, and masks without it."""
    model, other = (attached("llama", window=4, sinks=1) for _ in range(2))
    model.config.sliding_window = 6
    assert_close("whole", logits(other, ids()), logits(model, ids()), EXACT)
    assert_close("in parts", logits(other, ids()), streamed(model, ids(), [9, 14])[0], EXACT)
    model = backbone("llama")
    model.config.sliding_window = 6
    opened(memlm.attach(model, settings("titans_lmm"), [0, 2], window=4, sinks=1))
    assert_close("attached later", streamed(model, ids(), [9, 14])[0], logits(model, ids()), EXACT)
    assert any(type(x).__name__ == "WindowLayer" for x in streamed(model, ids(), [LENGTH])[1].layers)


def test_packed_rows_with_positions_in_images():
    """Packed rows are told by the first of four positions, as transformers does."""
    model = opened(memlm.attach(qwen2_vl()[0].eval(), settings("gated_delta_net")))
    places = torch.cat([torch.arange(9), torch.arange(14)]).expand(4, 1, LENGTH)
    alone = torch.cat([logits(model, ids()[:1, :9]), logits(model, ids()[:1, 9:])], 1)
    assert_close("documents", alone, logits(model, ids()[:1], position_ids=places), EXACT)
    row = torch.arange(LENGTH).expand(3, 1, LENGTH)
    assert_close("one document", logits(model, ids()[:1]), logits(model, ids()[:1], position_ids=row), EXACT)


def test_a_window_that_cannot_hold_is_refused():
    model = form("FalconH1Config")
    with pytest.raises(ValueError, match="window: layer 0 has 'hybrid', which cannot be cut; leave window out"):
        memlm.attach(model, "gated_delta_net", window=4)
    assert not any(".memlm." in name for name in model.state_dict())


def llava():
    eyes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES),
        vision_config=transformers.CLIPVisionConfig(**eyes, image_size=8, patch_size=4),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config), {"pixel_values": torch.ones(2, 3, 8, 8)}


def gemma3():
    eyes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=dict(**SIZES, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
        vision_config=dict(**eyes, image_size=8, patch_size=4),
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=1,
        eoi_token_index=2,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    return model, {"pixel_values": torch.ones(2, 3, 8, 8), "token_type_ids": None}


def qwen2_vl():
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    eyes = dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4, mlp_ratio=2)
    config = transformers.Qwen2VLConfig(
        text_config=dict(**SIZES, rope_parameters=rope),
        vision_config=dict(**eyes, spatial_merge_size=2, temporal_patch_size=2),
        image_token_id=IMAGE,
        video_token_id=1,
        vision_start_token_id=2,
    )
    grid = torch.tensor([[1, 4, 4]] * 2)
    given = {"pixel_values": torch.ones(32, 96), "image_grid_thw": grid, "mm_token_type_ids": None}
    return transformers.Qwen2VLForConditionalGeneration(config), given


@pytest.mark.parametrize("make", [llava, gemma3, qwen2_vl])
def test_a_memory_in_the_decoder_of_a_model_with_images(make, tmp_path):
    torch.manual_seed(0)
    model, given = make()
    text = torch.randint(3, IMAGE, (2, 20))
    text[:, 3:7] = IMAGE
    given = {name: (text == IMAGE).int() if x is None else x for name, x in given.items()} | {"input_ids": text}
    expected = logits(model.eval(), **given)
    opened(memlm.attach(model, settings("gated_delta_net")))
    whole = logits(model, **given)
    assert (whole - expected).abs().max() > 0.1
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :2] = 0
    options = dict(**given, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))
    model(**given, labels=text).loss.backward()
    # transformers saves some of these under other names.
    model.save_pretrained(tmp_path)
    again = memlm.from_pretrained(tmp_path)
    assert type(again) is type(model) and torch.equal(logits(again, **given), whole)
    if make is gemma3:
        with pytest.raises(ValueError, match="Gemma3TextModel gets masks of its own form, and window= replaces them"):
            memlm.attach(memlm.detach(model), "gated_delta_net", window=4)(**given)


def test_auxiliary_losses_of_a_classifier_and_of_a_decoder_alone():
    torch.manual_seed(0)
    config = backbone("llama").config
    config.num_labels = 3
    model = opened(memlm.attach(LlamaForSequenceClassification(config), settings("mom"))).train()
    labels = torch.tensor([0, 2, 1])
    out = model(ids())
    aux = sum(x.mean() for x in out.aux_losses.values())
    assert aux > 0
    assert_close("loss", F.cross_entropy(out.logits, labels) + aux, model(ids(), labels=labels).loss, EXACT)
    alone = model.model(ids())
    (alone.last_hidden_state.sum() + memlm.auxiliary_loss(alone, ids())).backward()


def test_a_memory_goes_from_a_model_with_a_head_to_one_without(tmp_path):
    model = opened(memlm.attach(backbone("llama"), settings("titans_lmm")))
    memlm.save_memory(model, tmp_path / "memory")
    decoder = memlm.load_memory(backbone("llama").model, tmp_path / "memory")
    assert torch.equal(decoder(ids())[0], model.model(ids())[0])
    decoder.save_pretrained(tmp_path / "decoder")
    again = memlm.from_pretrained(tmp_path / "decoder")
    assert type(again) is type(decoder) and torch.equal(again(ids())[0], decoder(ids())[0])


def test_a_memory_is_detached_by_the_model_that_got_it_or_one_around(tmp_path):
    model = memlm.attach(backbone("llama"), "mom")
    with pytest.raises(ValueError, match="LlamaModel is a part of the model that got the memory; detach it from that"):
        memlm.detach(model.model)
    memlm.detach(model)
    memlm.attach(model.model, "mom")
    memlm.detach(model)
    assert vars(model.model).keys() == vars(backbone("llama").model).keys()
    model.model.save_pretrained(tmp_path)
