"""The choice of chunks and its inverse by Triton kernels, as ops of torch; ``triton`` has attention itself."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.attention.choice_kernels import best_chunks, count_digits, place_by_digit
from memlm_kernels.launch import at_least_16, cdiv, laid, no_products, precision
from memlm_kernels.ops import kernel_op
from memlm_kernels.segments import power_of_two

# Entries that a program of the radix sort holds.
WIDTH = 512


@kernel_op("chunk_topk")
def choose_chunks(q: Tensor, k: Tensor, first: Tensor | None, end: Tensor | None, top_k: int) -> Tensor:
    """[B, T, G, top_k] int64; first, end: int32."""
    q, k, first, end = laid(q, k, first, end)
    (batch, length, heads, keys), groups = q.shape, k.shape[2]
    index = q.new_empty(batch, length, groups, top_k, dtype=torch.int64)
    best_chunks(
        lambda tiles: batch * groups * cdiv(length, tiles["BT"]),
        {},
        **{"q": q, "k": k, "first": first, "end": end, "index": index, "T": length, "N": k.shape[1], "H": heads},
        **{"G": groups, "K": keys, "J": top_k, "BJ": power_of_two(top_k), "BK": at_least_16(keys), "BN": 64},
        # Sums and pooled keys are fp32 for every type; for 16-bit tokens, NVIDIA's matrix units take them as tf32.
        PRECISION=precision(q),
    )
    return index


@choose_chunks.register_fake
def _(q: Tensor, k: Tensor, first: Tensor | None, end: Tensor | None, top_k: int) -> Tensor:
    return q.new_empty(*q.shape[:2], k.shape[2], top_k, dtype=torch.int64)


@register_flop_formula(torch.ops.memlm.chunk_topk)
def _flops(q: tuple[int, ...], k: tuple[int, ...], *_: object, **__: object) -> int:
    return 2 * q[0] * q[1] * k[1] * k[2] * k[3]


@kernel_op("invert_chunks")
def invert(index: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, G, T J] int32, and offsets [B, G, N + 1]."""
    keys, tokens = sort_choices(index.clamp(-1, num_chunks).to(torch.int32), num_chunks)
    return tokens, offsets_of(keys, num_chunks)


def sort_choices(index: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    """The choices int32 [B, T, G, J] of each row and group in ascending order, and their tokens, [B, G, T J]. A
    negative number, no choice, becomes num_chunks and comes last.
    """
    index = index.contiguous()
    batch, length, groups, chosen = index.shape
    entries = length * chosen
    tiles = cdiv(entries, WIDTH)
    keys, values = None, index
    for shift in range(0, max(1, num_chunks.bit_length()), 4):
        sizes = {"T": length, "N": num_chunks, "LENGTH": entries, "TILES": tiles, "G": groups, "J": chosen}
        given = {"keys": keys, "index": values, "SHIFT": shift, "W": WIDTH, **sizes}
        counts = index.new_empty(batch, groups, 16, tiles)
        count_digits(lambda _: batch * groups * tiles, {}, counts=counts, **given)
        before = counts.flatten(2).cumsum(2, dtype=torch.int32).view_as(counts) - counts
        new_keys, new_tokens = (index.new_empty(batch, groups, entries) for _ in "kt")
        arguments = {"before": before, "new_keys": new_keys, "new_tokens": new_tokens}
        place_by_digit(lambda _: batch * groups * tiles, {}, **arguments, **given)
        keys, values = new_keys, new_tokens
    assert keys is not None
    return keys, values


def offsets_of(keys: Tensor, num_chunks: int) -> Tensor:
    """The first entry of each number in ascending keys, [B, G, N + 1]."""
    number = torch.arange(num_chunks + 1, device=keys.device, dtype=torch.int32)
    return torch.searchsorted(keys, number.expand(*keys.shape[:2], -1).contiguous())


register_flop_formula(torch.ops.memlm.invert_chunks)(no_products)


@invert.register_fake
def _(index: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    batch, length, groups, chosen = index.shape
    tokens = index.new_empty(batch, groups, length * chosen, dtype=torch.int32)
    return tokens, index.new_empty(batch, groups, num_chunks + 1, dtype=torch.int64)
