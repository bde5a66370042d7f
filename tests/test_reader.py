"""``Reader`` on recurrent and hybrid models of transformers: as the model in one call, or refused in a line."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from memlm.reader import Reader
from tests.backbones import SIZES, VOCAB

_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_SSM = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_LAYERS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
# Configuration class, settings beside SIZES, and the bytes of the states of a row of 23 tokens.
FAMILIES = {
    # Keys and values of one layer; recurrent and convolution states of the others.
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {"head_dim": 8, **_DELTA, **_LAYERS},
        4 * (2 * 2 * 23 * 8 + 2 * (4 * 8 * 8 + 64 * 4)),
    ),
    # Both in each layer.
    "falcon_h1": ("FalconH1Config", {"mamba_d_ssm": 32, **_SSM}, 4 * 3 * (2 * 2 * 23 * 8 + 4 * 8 * 8 + 48 * 4)),
    # These begin anew if several tokens follow others; the second takes its memory under another name.
    "jamba": (
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
        None,
    ),
    "mamba": ("MambaConfig", {"state_size": 8}, 4 * 3 * 48 * (8 + 4)),
}


def made(name: str, settings: dict):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_recurrent_states_are_carried_on_copied_and_counted(family):
    name, settings, size = FAMILIES[family]
    model = made(name, settings)
    ids_BT = torch.randint(VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids_BT, use_cache=False).logits
    reader = Reader(model, segment=9)
    reader(ids_BT[:, :23])
    assert size is None or reader.nbytes() == 3 * size
    rows = torch.tensor([2, 0, 0, 1, 2])
    for _ in range(2):
        found = reader.fork(rows)(ids_BT[rows, 23:], keep=17)
        torch.testing.assert_close(found, expected[rows, 23:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reader(ids_BT[:, 23:], keep=17), expected[:, 23:], rtol=1e-3, atol=1e-3)


def test_a_model_with_a_memory_outside_its_cache_is_refused():
    model = made("RecurrentGemmaConfig", {"lru_width": 32, "attention_window_size": 16, "head_dim": 8})
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM predicts another text when its cache is carried"):
        Reader(model)
