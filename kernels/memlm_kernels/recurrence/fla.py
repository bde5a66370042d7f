"""flash-linear-attention's kernels (fla, 0.6) behind our signatures: the backend ``fla`` of the linear recurrences.

Its tensors have our shapes, [B, T, H, K] and states [.., H, K, V], and its decays are logarithms too. It multiplies
queries by 1/sqrt(K) unless the scale is given as 1. It takes segments as one row without gaps: rows are laid one
behind the other, and the padding of a row becomes its last segment. It then reads the lengths from the device.

B rows, T tokens of a row, S segments of a row, H heads, K key dim, V value dim.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels import proof
from memlm_kernels.backend import DTYPES, asks_for, missing, missing_triton
from memlm_kernels.checks import in_one_type
from memlm_kernels.segments import segments_of


def with_fla(
    known: tuple[tuple[str, ...], dict[str, str]], backend: str, q: Tensor, limit: str | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """``available`` and ``refused`` of ``choose``, with the backend ``fla``; ``auto`` never takes it.

    known: the result of ``with_triton``; limit: the reason why fla does not take this call, None if it takes it
    """
    if not asks_for("fla", backend):
        # The import takes seconds.
        return known
    available, refused = known
    reason = _missing(q.device.type) or limit
    if q.dtype not in DTYPES:
        dtype = str(q.dtype).removeprefix("torch.")
        reason = reason or f"flash-linear-attention takes float32, float16 and bfloat16, not {dtype}"
    return (available, refused | {"fla": reason}) if reason else ((*available, "fla"), refused)


@torch.compiler.assume_constant_result
def _missing(device_type: str) -> str | None:
    reason = missing("flash-linear-attention", "fla.ops", "pip install 'memlm[fla]'") or missing_triton(device_type)
    if reason:
        return reason
    # A checkout on the path has no metadata, or that of another version.
    found = getattr(importlib.import_module("fla"), "__version__", None)
    try:
        found = found or importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        found = "of no version"
    return None if found.startswith("0.6.") else f"flash-linear-attention {found} has other signatures; use 0.6"


def limit_of(q: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> str | None:
    """The reason why fla does not take a call, None if it takes it."""
    keys, values = q.shape[-1], v.shape[-1]
    if q.dtype != torch.float32 and (keys % 2 or values % 2):
        return f"flash-linear-attention takes even heads in 16 bits, not K={keys}, V={values}"
    if beta is not None and keys > 256:
        return f"flash-linear-attention's delta rule takes keys of at most 256 channels, not K={keys}"
    if beta is not None and log_decay is None and q.dtype == torch.float32:
        return "flash-linear-attention's delta rule takes float16 and bfloat16, not float32"
    if log_decay is not None and log_decay.ndim == 3 and torch.is_grad_enabled() and _wrong_on(q.device):
        return "with Triton 3.4 to 3.7.0 flash-linear-attention's gradients through a decay are wrong on Hopper"
    return None


@torch.compiler.assume_constant_result
def _wrong_on(device: torch.device) -> bool:
    import triton

    return device.type == "cuda" and proof.wrong_on_hopper(proof.architecture(device), triton.__version__)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``delta_rule``, or ``linear_attention`` if beta is None, by fla."""
    op, gates = _op(beta, log_decay)
    tokens = {**dict(zip("qkv", in_one_type(q, k, v), strict=True)), **gates}
    batch, length, heads, keys = q.shape
    segments = segments_of(cu_seqlens)
    if state is None:
        state = q.new_zeros(batch, segments, heads, keys, v.shape[-1], dtype=torch.float32)
    state, options = state.float(), {"scale": 1.0, "output_final_state": True}
    if cu_seqlens is None:
        o, final = op(**tokens, initial_state=state[:, 0].contiguous(), **options)
        return o.to(v.dtype), final[:, None]
    tokens = {name: x.flatten(0, 1)[None] for name, x in tokens.items()}
    starts = torch.arange(batch, device=q.device)[:, None] * length
    cu = F.pad((cu_seqlens + starts).flatten(), (0, 1), value=batch * length)
    initial = F.pad(state, (0, 0, 0, 0, 0, 0, 0, 1)).flatten(0, 1)
    o, final = op(**tokens, initial_state=initial, cu_seqlens=cu, **options)
    token = torch.arange(length, device=q.device)
    real = (token >= cu_seqlens[:, :1]) & (token < cu_seqlens[:, -1:])
    o = o.view(v.shape).where(real[:, :, None, None], 0.0)
    return o.to(v.dtype), final.unflatten(0, (batch, segments + 1))[:, :-1]


def _op(beta: Tensor | None, log_decay: Tensor | None) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    decay = {} if log_decay is None else {"g": log_decay}
    if beta is None:
        if log_decay is not None and log_decay.ndim == 4:
            from fla.ops.gla import chunk_gla

            return chunk_gla, decay
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla, decay
    if log_decay is None:
        from fla.ops.delta_rule import chunk_delta_rule

        return chunk_delta_rule, {"beta": beta}
    if log_decay.ndim == 4:
        from fla.ops.kda import chunk_kda

        return chunk_kda, {"beta": beta, **decay}
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule, {"beta": beta, **decay}
