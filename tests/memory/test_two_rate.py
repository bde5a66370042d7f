"""Tests of two stores at two rates beside the contract: the layer token by token, and what the slow store sees."""

import pytest
import torch

from memlm.memory import two_rate
from memlm.memory.state import leaves
from memlm_kernels.testing import assert_close
from tests.conftest import build, step
from tests.kernels.test_neural_memory import token_by_token
from tests.memory.test_titans_lmm import written_out

VARIANTS = [
    ("two_rate", {"chunk_size": 3, "slow_ratio": 2, "memory_depth": 2, "memory_head_dim": 16}),
    ("two_rate", {"chunk_size": 5, "slow_ratio": 1, "memory_heads": 2, "memory_head_dim": 8, "omega_window": 3}),
]


def mixer_of(**settings):
    return build("two_rate", **settings).model.layers[0].mixer


def silu(x):
    return x * torch.sigmoid(x)


def slow_reads(slow, s, u, size, options):
    """The slow store written out: token t reads after the writes of all chunks that ended before it."""
    config, inner = slow.config, slow.q_proj.out_features
    streams = []
    scales = slow.conv.weight[:, 0].split(inner)
    for x, proj, scale in zip((s, u, u), (slow.q_proj, slow.k_proj, slow.v_proj), scales, strict=True):
        streams.append(silu(proj(x) * scale).unflatten(-1, (config.memory_heads, -1)))
    q, k, v = streams
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    if config.memory_norm:
        v = v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        options = {**options, "norm": slow.store.memory_norm()}
    gates = torch.sigmoid(slow.store.gates(u)).unflatten(-1, (3, -1))
    weights, reads = [*slow.store.memory()], []
    for t in range(s.shape[1]):
        count = t // size
        if count:
            asked = q[:, t : t + 1].expand(-1, count, -1, -1)
            of_writes = [x[:, :count] for x in (k, v, *gates.unbind(-2))]
            reads.append(token_by_token(asked, *of_writes, *weights, chunk_size=config.chunk_size, **options)[:, -1:])
        else:
            # A write without lr and decay changes nothing.
            nothing = torch.zeros_like(q[:, :1, :, 0])
            at = slice(t, t + 1)
            still = (q[:, at], q[:, at], torch.zeros_like(q[:, at]), nothing, nothing, nothing)
            reads.append(token_by_token(*still, *weights, chunk_size=config.chunk_size, **options))
    o = torch.cat(reads, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * slow.norm.weight
    gate = silu(slow.output_gate_proj(s)).unflatten(-1, (config.memory_heads, -1))
    return slow.o_proj((o * gate).flatten(2))


@pytest.mark.parametrize("settings", [{}, {"memory_depth": 2}], ids=str)
def test_the_layer_is_its_equations(settings):
    size = 3
    mixer = mixer_of(chunk_size=size, slow_ratio=2, memory_heads=2, memory_head_dim=6, **settings)
    x = torch.randn(2, 20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fast = {"norm": mixer.fast.store.memory_norm()} if settings else {}
    z = written_out(mixer.fast, x, **fast)
    s = x + z
    u = torch.stack([s[:, first : first + size].mean(1) for first in range(0, 20 - size + 1, size)], 1)
    w = slow_reads(mixer.slow, s, u, size, {})
    g = torch.sigmoid(mixer.gate(torch.cat([x, z, w], -1)))
    got = step(mixer, x)
    assert_close("layer", g * z + (1 - g) * w, got.y_BTD, 1e-10)
    assert_close("open chunk", s[:, 18:].sum(1), got.state["open"], 1e-10)
    # The slow store matters here: its reads are as large as the fast one's.
    assert got.metrics["slow_share"][:, size:].min() > 0.05


def test_the_slow_store_changes_at_the_ends_of_chunks_alone():
    mixer = mixer_of(chunk_size=4)
    x = torch.randn(1, 12, 64, dtype=torch.float64)
    out = step(mixer, x[:, :1])
    for t in range(1, 12):
        before = out.state
        out = step(mixer, x[:, t : t + 1], before)
        pairs = zip(leaves(before["slow"]), leaves(out.state["slow"]), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs) == (t % 4 == 3), t
        assert out.state["open"].any() == (t % 4 != 3), t


def test_a_chunk_that_its_document_leaves_open_is_not_written():
    """Documents of 6 and 9 tokens in a row, chunks of 4: one write, then two."""
    mixer = mixer_of(chunk_size=4)
    x, other = torch.randn(2, 1, 15, 64, dtype=torch.float64)
    places = {"given_BT": torch.cat([torch.arange(6), torch.arange(9)])[None], "max_documents": 2}
    other[:, 6:] = x[:, 6:]
    for a, b in zip(leaves(step(mixer, x, **places).state), leaves(step(mixer, other, **places).state), strict=True):
        assert_close("state", a, b, 1e-12)


def test_long_chunks_of_the_slow_store_start_with_smaller_steps():
    for ratio, lr in ((8, 0.047), (16, 0.047), (32, 0.0235)):
        slow = two_rate.Config(chunk_size=16, slow_ratio=ratio).slow()
        assert (slow.chunk_size, slow.conv_size) == (ratio, 1) and slow.initial_lr == pytest.approx(lr)


@pytest.mark.parametrize("ratio", [0, 1018])
def test_bad_settings_are_named(ratio):
    with pytest.raises(ValueError, match=f"slow_ratio={ratio} must be at "):
        two_rate.Config(slow_ratio=ratio)
