"""Attention against a loop over queries, in every backend that runs here."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch

from memlm.memory.attention import Config, Mixer
from memlm.memory.base import Dims
from memlm_kernels.testing import Watch, assert_close
from tests.conftest import step

VARIANTS = [
    ("none", {"window_size": 1}),
    ("none", {"window_size": 70, "conv_size": 0}),
    ("attention", {"conv_size": 3, "persistent_tokens": 2, "qk_norm": True}),
    ("attention", {"qk_norm": "all", "qkv_bias": True, "output_bias": True, "rotary": False}),
]
FOREIGN = [
    {"qk_norm": "all", "qkv_bias": True, "output_bias": True, "rotary": False, "persistent_tokens": 2},
    {"qkv_bias": True, "persistent_tokens": 1},
]
DIMS = Dims(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6)


def mixer(backend="eager", **settings):
    torch.manual_seed(0)
    return Mixer(Config(**settings), replace(DIMS, attn_implementation=backend), 0).double()


def loop(module, x):
    """One query at a time, rotary angles as complex numbers; no convolution. [T, D] -> [T, D]"""
    heads, groups, size = 4, 2, 6

    def turn(row, position):
        if not module.config.rotary:
            return row
        z = torch.complex(row[: size // 2], row[size // 2 :])
        angle = position * 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64) * 2 / size)
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag])

    def norm(rows, module):
        return rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    q, k, v = (p(x) for p in (module.q_proj, module.k_proj, module.v_proj))
    always = module.persistent if module.config.persistent_tokens else x[:0]
    fixed_k, fixed_v = (p(always) for p in (module.k_proj, module.v_proj))
    if module.config.qk_norm == "all":
        q, k, fixed_k = norm(q, module.q_norm), norm(k, module.k_norm), norm(fixed_k, module.k_norm)
    q, k, v, fixed_k, fixed_v = (z.unflatten(-1, (-1, size)) for z in (q, k, v, fixed_k, fixed_v))
    if module.config.qk_norm is True:
        q, k, fixed_k = norm(q, module.q_norm), norm(k, module.k_norm), norm(fixed_k, module.k_norm)
    out = []
    for t in range(len(x)):
        first = max(0, t - module.config.window_size + 1) if module.config.window_size else 0
        row = []
        for h in range(heads):
            g = h // (heads // groups)
            scores = [q[t, h] @ key for key in fixed_k[:, g]]
            scores += [turn(q[t, h], t) @ turn(k[s, g], s) for s in range(first, t + 1)]
            weights = (torch.stack(scores) * size**-0.5).softmax(0)
            row.append(weights @ torch.cat([fixed_v[:, g], v[first : t + 1, g]]))
        out.append(torch.cat(row))
    return module.o_proj(torch.stack(out))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"window_size": 3}, {"window_size": 20}, {"persistent_tokens": 2, "qk_norm": True}, *FOREIGN],
)
@pytest.mark.parametrize("length", [1, 17])
def test_equals_a_loop_over_queries(backend, settings, length):
    module = mixer(backend, **settings)
    if "qk_norm" in settings:
        for norm in (module.q_norm, module.k_norm):
            torch.nn.init.normal_(norm.weight)
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    x = torch.randn(2, length, 24, dtype=torch.float64)
    y = step(module, x).y_BTD
    for b in range(2):
        assert_close("y", loop(module, x[b]), y[b], 1e-10)


def test_low_precision_far_into_a_stream():
    """Positions are not rounded to the model's dtype: bf16 would keep 8 bits of them."""
    module = mixer("eager", window_size=8)
    low = copy.deepcopy(module).bfloat16()
    x = torch.randn(1, 20, 24).bfloat16()
    for start in (0, 100_001):
        state = low.init_state(1, torch.device("cpu"), torch.bfloat16)
        facts = {"before_B": torch.tensor([start]), "start": None, "given_BT": torch.arange(20)[None] + start}
        exact = {k: t.double() if t.is_floating_point() else t for k, t in state.items()}
        expected = step(copy.deepcopy(low).double(), x.double(), exact, **facts).y_BTD
        assert_close(f"from {start}", expected, step(low, x, state, **facts).y_BTD, 2e-2)


def test_window_cost_is_linear():
    """No tensor of the windowed form grows with the square of the length."""
    module = mixer("eager", window_size=16)
    sizes = []
    for length in (512, 1024):
        with Watch() as watch:
            step(module, torch.randn(1, length, 24, dtype=torch.float64))
        sizes.append(watch.largest)
    assert sizes[1] <= 2.2 * sizes[0]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles flex attention with a C++ compiler")
@pytest.mark.parametrize("persistent_tokens", [0, 3])
def test_flex_attention_forward(persistent_tokens):
    # After other shapes have been compiled, Inductor's C++ for dynamic shapes is not valid C++.
    torch.compiler.reset()
    dims = Dims(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    torch.manual_seed(0)
    module = Mixer(Config(window_size=5, persistent_tokens=persistent_tokens), dims, 0)
    x = torch.randn(2, 33, 32)
    packed = {"given_BT": torch.cat([torch.arange(20), torch.arange(13)]).repeat(2, 1), "max_documents": 2}
    with torch.no_grad():
        reference = step(module, x, **packed).y_BTD
        module.dims = replace(dims, attn_implementation="flex_attention")
        assert_close("y", reference, step(module, x, **packed).y_BTD, 1e-5)


def test_flash_attention_says_what_it_cannot_do():
    module = mixer("flash_attention_2", persistent_tokens=1)
    with pytest.raises(ValueError, match="without persistent tokens; use 'sdpa'"):
        step(module, torch.randn(1, 4, 24, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_size": 0}, "window_size=0 must be at least 1"),
        ({"conv_size": -1}, "conv_size=-1"),
        ({"persistent_tokens": -2}, "persistent_tokens=-2"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_full_attention_keeps_no_more_than_its_keys_and_values():
    state = step(mixer(conv_size=4), torch.randn(2, 10, 24).double()).state
    for name in ("k", "v"):
        assert state[name].untyped_storage().nbytes() == state[name].nbytes, name
