"""Attention to a window and a prefix, in blocks of queries that see overlapping blocks of keys; and to documents.

B rows, T tokens, L keys, H query heads in G groups, K key dim, V value dim, P keys of the prefix, W window, N blocks
of Q queries, C chunks of documents, D documents chosen.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm_kernels.segments import exact

# q, k, v, mask [B, 1, T, L] (None: causal, if T is L or 1), scale -> output, lse
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor | None]]

# Blocks are this wide even for narrow windows, because small products are slow.
_MIN_BLOCK = 64
# Queries of a mask: without a bound, masks over a long past cost more than the products.
_MASKED = 256


def read_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    positions: Tensor | None,
    prefix: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
    attend: Attend,
) -> tuple[Tensor, Tensor | None]:
    """The arguments are those of ``prefix_window_attention``."""
    always = None
    if prefix is not None:
        # Keys of doubled size: tokens' keys meet one half of the queries, the prefix's keys the other half.
        own_q, own_k, own_v = prefix
        size = q.shape[3]
        q, k = torch.cat([q, own_q], -1), F.pad(k, (0, size))
        always = F.pad(own_k, (size, 0)), own_v
    length = q.shape[1]
    if window is None or window >= k.shape[1] or length == 0:
        if always is None and positions is None and length in (1, k.shape[1]):
            return attend(q, k, v, None, scale)
        if length <= _MASKED or torch.compiler.is_compiling():
            return _dense(q, k, v, window, positions, always, scale, attend)
        # A block of queries sees no key after its last.
        parts = []
        for begin in range(0, length, _MASKED):
            end = min(begin + _MASKED, length)
            keys = k.shape[1] - length + end
            places = None if positions is None else positions[:, begin:end]
            part = _dense(q[:, begin:end], k[:, :keys], v[:, :keys], window, places, always, scale, attend)
            parts.append(part)
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs, 1), None if lses[0] is None else torch.cat(lses, 1)
    block = min(length, max(window, _MIN_BLOCK))
    pad, missing = -length % block, window - 1 - (k.shape[1] - length)
    if positions is None or missing > 0:
        before = torch.arange(k.shape[1] - length, k.shape[1], device=q.device).expand(len(q), -1)
        # Keys that a document has before the call and the call has not are padding here.
        positions = before if positions is None else torch.minimum(positions, before)
    # Overlapping views: block n of queries sees its own keys and the W - 1 before them.
    # Padding by nothing would be a copy.
    q, positions = (q, positions) if pad == 0 else (F.pad(q, (0, 0, 0, 0, 0, pad)), F.pad(positions, (0, pad)))
    q_BNQ, positions_BNQ = q.unflatten(1, (-1, block)), positions.unflatten(1, (-1, block))
    k_BNL, v_BNL = (
        F.pad(x, (0, 0, 0, 0, missing, pad)).unfold(1, block + window - 1, block).movedim(-1, 2) for x in (k, v)
    )
    if always is not None and len(always[0]) > 1:
        always = always[0].repeat_interleave(q_BNQ.shape[1], 0), always[1].repeat_interleave(q_BNQ.shape[1], 0)
    q, k, v = (x.flatten(0, 1) for x in (q_BNQ, k_BNL, v_BNL))
    outputs = _dense(q, k, v, window, positions_BNQ.flatten(0, 1), always, scale, attend)
    output, lse = (None if x is None else x.unflatten(0, q_BNQ.shape[:2]).flatten(1, 2)[:, :length] for x in outputs)
    assert output is not None
    return output, lse


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    positions: Tensor | None,
    always: tuple[Tensor, Tensor] | None,
    scale: float,
    attend: Attend,
) -> tuple[Tensor, Tensor | None]:
    queries, keys = q.shape[1], k.shape[1]
    if queries == 1 and positions is None and (window is None or window >= keys):
        if always is not None:
            k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], 1) for p, x in zip(always, (k, v), strict=True))
        return attend(q, k, v, None, scale)
    kept = 0 if always is None else always[0].shape[1]
    if always is not None:
        k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], 1) for p, x in zip(always, (k, v), strict=True))
    if positions is None and (window is None or window >= keys):
        seen = torch.ones(queries, kept + keys, dtype=torch.bool, device=q.device).tril(kept + keys - queries)
        return attend(q, k, v, seen[None, None], scale)
    places = torch.arange(keys, device=q.device)
    own = places[keys - queries :]
    seen = (places <= own[:, None])[None]
    if positions is not None:
        reach = positions.clamp(max=window - 1) if window else positions
        seen = seen & (places >= (own - reach)[..., None])
    elif window:
        seen = seen & (places > own[:, None] - window)
    return attend(q, k, v, F.pad(seen, (kept, 0), value=True)[:, None] if kept else seen[:, None], scale)


def read_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    document: Tensor,
    chosen: Tensor,
    spans: tuple[Tensor, Tensor],
    scale: float,
    attend: Attend,
) -> Tensor:
    """The arguments are those of ``document_attention``."""
    length, number = q.shape[1], torch.arange(k.shape[1], device=q.device)
    if len(pooled_k) < len(k):
        pooled_k, pooled_v = (x.expand(len(k), -1, -1, -1) for x in (pooled_k, pooled_v))
    k, v = torch.cat([pooled_k, k], 1), torch.cat([pooled_v, v], 1)
    # No chunk has this number.
    chosen = chosen.masked_fill(chosen < 0, torch.iinfo(chosen.dtype).min)

    def read(q: Tensor, chosen: Tensor, first: Tensor, end: Tensor) -> Tensor:
        of_documents = (chosen[..., None] == document[:, None, None]).any(2)
        of_spans = (number >= first[..., None]) & (number < end[..., None])
        return attend(q, k, v, torch.cat([of_documents, of_spans], 2)[:, None], scale)[0]

    if length <= _MASKED or torch.compiler.is_compiling():
        return read(q, chosen, *spans)
    blocks = zip(*(x.split(_MASKED, 1) for x in (q, chosen, *spans)), strict=True)
    return torch.cat([read(*block) for block in blocks], 1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, None]:
    """torch's own attention; values are padded to the width of keys, which its fast kernels need."""
    size, heads = v.shape[3], q.shape[2]
    if q.shape[3] > size:
        v = F.pad(v, (0, q.shape[3] - size))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is None or heads == k.shape[1]:
        # Where sizes are symbols, a comparison is no bool, but a branch is one.
        causal = {"is_causal": True} if mask is None and q.shape[2] > 1 else {}
        output = F.scaled_dot_product_attention(q, k, v, mask, **causal, scale=scale, enable_gqa=mask is None)
    else:
        # With a mask, torch has no fast kernel for shared keys: heads that share keys become queries of one head.
        shared, length = heads // k.shape[1], q.shape[2]
        if shared > 1:
            mask = mask[:, :, None].expand(-1, -1, shared, -1, -1).flatten(2, 3)
            q = q.unflatten(1, (-1, shared)).flatten(2, 3)
        output = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        if shared > 1:
            output = output.unflatten(2, (shared, length)).flatten(1, 2)
    return output.transpose(1, 2)[..., :size], None


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Plain matrix products, with which tests compare the others."""
    (batch, length, heads, _), keys, groups = q.shape, k.shape[1], k.shape[2]
    # Heads that share keys are rows of one product.
    rows = exact(q).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)
    scores = torch.bmm(rows, exact(k).permute(0, 2, 3, 1).flatten(0, 1)) * scale
    scores = scores.view(batch, groups, heads // groups, length, keys)
    if mask is None and length > 1:
        ones = torch.ones(length, keys, dtype=torch.bool, device=q.device)
        mask = ones.tril(keys - length)[None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1)
    # The largest share is exp(max - lse). ``logsumexp`` takes exp of masked scores, ten times as long on a CPU.
    lse = scores.logsumexp(-1) if mask is None else scores.amax(-1) - shares.amax(-1).log()
    shares = shares.view(batch * groups, heads // groups * length, keys)
    output = torch.bmm(shares, exact(v).transpose(1, 2).flatten(0, 1)).view(*scores.shape[:4], v.shape[3])
    return output.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype), lse.permute(0, 3, 1, 2).flatten(2, 3)
