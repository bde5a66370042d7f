"""The choice of a backend: by a call, by ``set_backend``, and the refusals."""

import logging
from typing import NamedTuple

import pytest
import torch

from memlm_kernels import (
    backend,
    choose,
    chunk_mean_attention,
    delta_rule,
    linear_attention,
    neural_memory,
    prefix_window_attention,
    set_backend,
)
from tests.conftest import MEMORIES, build

ABLE, UNABLE = ("triton", "reference"), {"triton": "there is no GPU"}


@pytest.mark.parametrize(
    ("asked", "called", "available", "refused", "expected"),
    [
        ("auto", "auto", ("reference", "triton"), {}, "reference"),
        ("auto", "triton", ("reference", "triton"), {}, "triton"),
        ("triton", "auto", ("reference", "triton"), {}, "triton"),
        ("triton", "reference", ABLE, {}, "reference"),
        ("triton", "auto", ("by_group", "reference"), {}, "by_group"),
        ("reference", "auto", ABLE, {}, "reference"),
        ("reference", "auto", ("triton", "sdpa", "reference"), {}, "sdpa"),
        ("reference", "triton", ABLE, {}, "triton"),
        ("fla", "auto", ABLE, {}, "triton"),
        ("fla", "auto", (*ABLE, "fla"), {}, "fla"),
    ],
)
def test_a_call_goes_before_the_setting(asked, called, available, refused, expected):
    with set_backend(asked):
        assert choose("op", called, available, refused) == expected
    assert choose("op", "auto", available, refused) == available[0]


def test_what_is_asked_for_and_cannot_run_is_one_line():
    message = r"op: hardware.kernels='triton' cannot run here: there is no GPU; use one of auto, reference$"
    with set_backend("triton", "hardware.kernels"), pytest.raises(ValueError, match=message):
        choose("op", "auto", ("reference",), UNABLE)
    with set_backend("triton", "hardware.kernels"), pytest.raises(ValueError, match="op: backend='fla' cannot run"):
        choose("op", "fla", ("reference",), UNABLE)
    with pytest.raises(ValueError, match=r"backend='trition' is unknown; use one of auto, reference, triton, fla"):
        set_backend("trition")
    assert choose("op", "auto", ("reference",), UNABLE) == "reference"


def test_the_setting_stays_until_the_next_or_the_end_of_a_context():
    try:
        set_backend("triton")
        with set_backend("reference"):
            assert choose("op", "auto", ABLE) == "reference"
        assert choose("op", "auto", ("reference", "triton")) == "triton"
    finally:
        set_backend("auto")


def test_auto_says_its_choice_once(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_announced", set())
    with caplog.at_level(logging.INFO, logger=backend.logger.name):
        for _ in range(2):
            choose("some_op", "auto", ABLE)
    assert [record.getMessage() for record in caplog.records] == ["some_op: backend triton"]


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory_asks_through_the_setting(memory, monkeypatch):
    monkeypatch.setattr(backend, "missing_triton", lambda device_type: "there is no GPU")
    model, ids = build(memory), torch.zeros(1, 8, dtype=torch.int64)
    with set_backend("triton"), pytest.raises(ValueError, match="backend='triton' cannot run here: there is no GPU"):
        model(ids)
    with set_backend("reference"):
        model(ids)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled_code_follows_the_setting(monkeypatch):
    taken = []
    monkeypatch.setattr(backend, "missing_triton", lambda device_type: None)

    @torch.library.custom_op("memlm_test::seen", mutates_args=())
    def seen(x: torch.Tensor) -> torch.Tensor:
        taken.append("triton")
        return x.clone()

    seen.register_fake(torch.empty_like)

    def op(x):
        return seen(x) if choose("op", "auto", *backend.with_triton("op", "auto", x, None)) == "triton" else x * 1

    compiled, x = torch.compile(op, backend="aot_eager", fullgraph=True), torch.ones(3)
    compiled(x)
    with set_backend("triton"):
        compiled(x)
    compiled(x)
    assert taken == ["triton"]


def test_the_kernels_that_run_are_those_that_were_asked_for(monkeypatch):
    pytest.importorskip("triton")
    from memlm_kernels import launch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    launched, run = [], launch.Kernel.__call__
    monkeypatch.setattr(
        launch.Kernel, "__call__", lambda kernel, *x, **y: launched.append(kernel) or run(kernel, *x, **y)
    )
    q = torch.randn(1, 5, 1, 16, device=device)
    for op in (lambda: linear_attention(q, q, q)[0], lambda: prefix_window_attention(q, q, q, window=3).o):
        with set_backend("reference"):
            expected = op()
        assert not launched
        with set_backend("triton"):
            torch.testing.assert_close(op(), expected, atol=1e-5, rtol=1e-5)
        assert launched
        launched.clear()


def test_products_under_autocast_are_of_its_type():
    """As in torch's own products: a norm or a convolution may have turned a mixer's tensors into fp32."""
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in "qkv")
    gate, memory = torch.rand(1, 20, 2), [torch.randn(2, 16, 16)]
    ops = {
        "linear_attention": lambda q, k, v: linear_attention(q, k, v, -gate)[0],
        "delta_rule": lambda q, k, v: delta_rule(q, k, v, gate)[0],
        "neural_memory": lambda q, k, v: neural_memory(q, k, v, gate, gate, gate, weights=memory, chunk_size=4).o,
        "prefix_window_attention": lambda q, k, v: prefix_window_attention(q, k, v, window=4, with_lse=True).o,
        "chunk_mean_attention": lambda q, k, v: chunk_mean_attention(q, k, v).o,
    }
    for name, op in ops.items():
        with torch.autocast("cpu", torch.bfloat16):
            got = op(q, k, v)
        assert got.dtype == torch.bfloat16, name
        if name != "prefix_window_attention":
            torch.testing.assert_close(got, op(q.bfloat16(), k.bfloat16(), v.bfloat16()), atol=0, rtol=0)


def test_autocast_leaves_what_has_no_data_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert backend.as_autocast(torch.empty(2, device="meta"))[0].dtype == torch.float32


def test_auto_keeps_the_precision_of_products(monkeypatch):
    """fp32 stays fp32: NVIDIA's matrix units would round it."""
    monkeypatch.setattr(backend.proof, "against", lambda call, dtype, channels, device: None)

    class Somewhere(NamedTuple):
        device: torch.device
        dtype: torch.dtype
        shape: torch.Size = torch.Size([1])
        is_cpu: bool = False

        def is_floating_point(self):
            return True

    def reason(dtype, precision="highest", products=True):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return backend.against_triton("op", Somewhere(torch.device("cuda"), dtype), products=products)
        finally:
            torch.set_float32_matmul_precision(before)

    assert "float32_matmul_precision is 'highest'" in reason(torch.float32)
    assert reason(torch.float32, "high") is reason(torch.float32, products=False) is reason(torch.bfloat16) is None


def test_precision_of_products(monkeypatch):
    pytest.importorskip("triton")
    from memlm_kernels import launch

    before = torch.get_float32_matmul_precision()
    found = {}
    for target in ("cuda", "hip"):
        monkeypatch.setattr(launch, "target", lambda target=target: target)
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            try:
                found[target, precision] = [launch.precision(torch.empty(0, dtype=x)) for x in backend.DTYPES]
            finally:
                torch.set_float32_matmul_precision(before)
    assert found["cuda", "highest"] == ["ieee", "tf32", "tf32"] and found["cuda", "high"] == ["tf32"] * 3
    assert found["hip", "highest"] == found["hip", "high"] == ["ieee"] * 3


def test_a_set_backend_holds_for_plain_attention(monkeypatch):
    """``auto`` takes torch's own for it, without a look at Triton."""
    module = pytest.importorskip("memlm_kernels.attention.triton")
    q = torch.ones(1, 4, 1, 16)
    monkeypatch.setattr(module, "attend_triton", lambda *_, **__: (q, None))
    with set_backend("triton"):
        assert prefix_window_attention(q, q, q).o is q
    assert prefix_window_attention(q, q, q).o is not q
