"""All ops share one style: a reader who knows one call can write the next."""

import inspect

import pytest
from torch import Tensor

import memlm_kernels

# The arguments that ops share, in their order: inputs, settings, places of tokens, the state, the backend.
ORDER = (
    *("q", "k", "v", "beta", "lr", "log_decay", "momentum", "decay"),
    *("weights", "chunk_size", "window", "scale", "tile"),
    *("positions", "cu_seqlens", "start", "state", "backend"),
)
# These take a bank's parts, weights to read, or parts of channels.
LISTS = ("linears", "merge_topk", "nominate_documents", "read_memory", "short_convolution")
OPS = [name for name in memlm_kernels.__all__ if name.islower() and name not in ("choose", "set_backend")]


@pytest.mark.parametrize("op", OPS)
def test_arguments_have_one_order_and_settings_a_name(op):
    arguments = inspect.signature(getattr(memlm_kernels, op)).parameters
    shared = [name for name in arguments if name in ORDER]
    assert shared == sorted(shared, key=ORDER.index)
    assert list(arguments)[-1] == "backend" or op == "read_memory", "one backend, and no choice"
    by_place = [x for x in arguments.values() if x.kind != x.KEYWORD_ONLY]
    assert op in LISTS or all(x.annotation in (Tensor, Tensor | None) for x in by_place)


@pytest.mark.parametrize("op", OPS)
def test_several_results_have_names(op):
    returned = inspect.signature(getattr(memlm_kernels, op)).return_annotation
    assert returned is Tensor or returned._fields
