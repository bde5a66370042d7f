"""Chosen chunks: the union of a tile's choices, and chunks that gather the tokens that chose them.

A tile of queries goes through the union of its tokens' choices, which is as short as one choice if neighbours agree.
If they do not, a chunk gathers its readers. Each of them then has a partial result for each choice, which is written
and read again. So a tile is *gathered* if its union exceeds ``WORTH`` times the choices of a token. Each tile decides
on the device: nothing is read back, and the number of launches follows from shapes.

On an H200 with chunks of 64 keys and heads of 128 in 16 bits, a row and chunk cost 65 ps of products in forward and 98
in the gradients of queries. A partial result adds 512 bytes in either, 107 ps, and operands that are read again.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm_kernels.attention.choice_triton import offsets_of, sort_choices
from memlm_kernels.attention.chunk_kernels import (
    add_parts,
    chunk_queries_backward,
    chunks_backward,
    chunks_forward,
    join_parts,
    unite_chunks,
)
from memlm_kernels.attention.cut import AttentionCall
from memlm_kernels.launch import Tiles, at_least_16, cdiv
from memlm_kernels.segments import power_of_two

# The number of a chunk's readers that one program sums.
PER = 1024
# A larger union, in choices of a token, is worth the partial results.
WORTH = 3
# Elements of the partial results that are held at a time: 2 GB in 16 bits.
ROOM = 2**30


class Readers(NamedTuple):
    """The tokens that chose each chunk, sorted once a call.

    token: [B, G, T J], by chunks, then by classes, then ascending. The first classes are the stretches of tokens whose
        choices are gathered; the last class has all other tokens
    offsets: [B, G, N classes + 1], the first entry of each chunk and class
    """

    token: Tensor
    offsets: Tensor
    classes: int


class Union(NamedTuple):
    """given: arguments of the kernels that go through unions
    gathered: [B, T, G, J], the other choices, -1 elsewhere; None if there can be none
    """

    given: dict[str, Any]
    gathered: Tensor | None


def unite(call: AttentionCall, index: Tensor | None, starts: Tensor | None) -> Union:
    """The union of the chunks that the queries of each tile chose."""
    if index is None or starts is None:
        return Union({"united": None, "count": None, "U": 0}, None)
    tokens, chunks = call.rows // call.padded, starts.shape[1]
    if min(tokens, call.length) == 1:
        return Union({"united": index, "count": None, "U": call.chosen}, None)
    room = tokens * call.chosen
    united = index.new_empty(call.batch, call.tiles, call.groups, room)
    count = index.new_empty(united.shape[:3])
    unite_chunks(
        lambda _: count.numel(),
        {},
        **{"index": index, "united": united, "count": count, "T": call.length, "N": chunks, "U": room},
        **{"G": call.groups, "J": call.chosen, "BT": tokens, "W": power_of_two(room)},
    )
    gathered = None
    if min(chunks, room) > WORTH * call.chosen:
        many = count > WORTH * call.chosen
        count = count.masked_fill(many, 0)
        of_token = torch.arange(call.length, device=index.device) // tokens
        gathered = index.masked_fill(~many[:, of_token, :, None], -1)
    return Union({"united": united, "count": count, "U": room}, gathered)


def sort(call: AttentionCall, index: Tensor, gathered: Tensor | None, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks with classes, and the tokens, of which ``readers_of`` makes ``Readers``."""
    if gathered is None:
        return sort_choices(index, starts.shape[1])
    stretches = [*_stretches(call)]
    last, size = len(stretches), stretches[0].stop
    of_token = torch.arange(call.length, device=index.device, dtype=torch.int32)[:, None, None] // size
    number = torch.where(gathered < 0, last, of_token) + index * (last + 1)
    return sort_choices(torch.where(index < 0, -1, number), starts.shape[1] * (last + 1))


def readers_of(call: AttentionCall, keys: Tensor, token: Tensor, gathers: bool, starts: Tensor) -> Readers:
    classes = len([*_stretches(call)]) + 1 if gathers else 1
    return Readers(token, offsets_of(keys, starts.shape[1] * classes), classes)


def read_chunks(
    call: AttentionCall,
    given: dict[str, Any],
    gathered: Tensor,
    readers: Readers,
    starts: Tensor,
    window: int,
    o: Tensor,
    lse: Tensor,
) -> None:
    """Add the reads of gathered choices to o and lse, in one softmax."""
    sizes = _sizes(call, window)
    for number, tokens in enumerate(_stretches(call)):
        parts = _room(call, tokens, o)
        lse_parts = lse.new_empty(parts.shape[:-1])
        of_stretch, programs = _parts(call, readers, starts, number, tokens)
        chunks_forward(
            programs,
            {"BM": call.rows, "num_stages": call.most_stages},
            **{**given, **sizes, **of_stretch, "index": gathered, "parts": parts, "lse_parts": lse_parts},
        )
        _join(call, gathered, tokens, (parts, lse_parts), (o, lse))


def add_query_gradients(
    call: AttentionCall,
    given: dict[str, Any],
    gathered: Tensor,
    readers: Readers,
    starts: Tensor,
    window: int,
    d_q: Tensor,
) -> None:
    """Add the gradients of queries through gathered choices to d_q, in fp32."""
    sizes = _sizes(call, window)
    for number, tokens in enumerate(_stretches(call)):
        parts = _room(call, tokens, given["q"])
        of_stretch, programs = _parts(call, readers, starts, number, tokens)
        chunk_queries_backward(
            programs,
            {"BM": call.rows, "num_stages": call.most_stages},
            **{**given, **sizes, **of_stretch, "index": gathered, "parts": parts},
        )
        _join(call, gathered, tokens, (parts, None), (d_q, None))


def add_key_gradients(
    call: AttentionCall,
    given: dict[str, Any],
    readers: Readers,
    starts: Tensor,
    window: int,
    d_k: Tensor,
    d_v: Tensor,
) -> None:
    """Add the gradients of chosen keys and values to d_k and d_v."""
    chunks = starts.shape[1]
    of_all, programs = _parts(call, readers, starts)
    room = (call.batch, call.groups, of_all["PARTS"], call.chunk)
    parts_k, parts_v = (d_k.new_empty(*room, size) for size in (call.keys, call.values))
    sizes = {name: x for name, x in _sizes(call, window).items() if name not in ("B", "BJ")}
    chunks_backward(
        programs,
        {"BM": call.rows, "num_stages": call.stages_of_keys},
        **{**given, **of_all, **sizes, "d_k": parts_k, "d_v": parts_v},
    )
    for x, parts, size in ((d_k, parts_k, "BK"), (d_v, parts_v, "BV")):
        add_parts(
            lambda _: call.batch * call.groups * chunks * call.tiles_of_chunk,
            {},
            **{"parts": parts, "starts": starts, "first": of_all["first"], "d_x": x, "L": x.shape[1], "N": chunks},
            **{"PARTS": of_all["PARTS"], "G": call.groups, "K": x.shape[3], "C": call.chunk},
            **{"BC": call.of_choice["BC"], "BK": call.sizes[size]},
        )


def _stretches(call: AttentionCall) -> Iterator[slice]:
    """Tokens whose partial results fit into ``ROOM``."""
    of_token = call.chosen * call.tiles_of_chunk * call.batch * call.heads * max(call.keys, call.values)
    size = max(1, ROOM // of_token)
    return (slice(start, min(start + size, call.length)) for start in range(0, call.length, size))


def _room(call: AttentionCall, tokens: slice, x: Tensor) -> Tensor:
    """Room for partial results of the tokens of a stretch, in x's type and width."""
    slots = call.chosen * call.tiles_of_chunk
    return x.new_empty(slots, call.batch, tokens.stop - tokens.start, call.heads, x.shape[3])


def _join(
    call: AttentionCall,
    index: Tensor,
    tokens: slice,
    parts: tuple[Tensor, Tensor | None],
    sums: tuple[Tensor, Tensor | None],
) -> None:
    """Add the partial results of a stretch of tokens, and their lse, to x and lse of all tokens."""
    size, width = tokens.stop - tokens.start, sums[0].shape[3]
    join_parts(
        lambda tiles: call.batch * cdiv(size * call.heads, tiles["BM"]),
        {},
        **{"parts": parts[0], "lse_parts": parts[1], "index": index, "x": sums[0], "lse": sums[1]},
        **{"B": call.batch, "T": call.length, "S": size, "START": tokens.start, "H": call.heads, "G": call.groups},
        **{"J": call.chosen, "TILES": call.tiles_of_chunk, "V": width, "BJ": call.of_choice["BJ"]},
        BV=at_least_16(width),
    )


def _sizes(call: AttentionCall, window: int) -> dict[str, Any]:
    sizes = {name: x for name, x in call.sizes.items() if name != "LK"}
    return {**sizes, **call.of_choice, "window": window, "B": call.batch}


def _parts(
    call: AttentionCall, readers: Readers, starts: Tensor, number: int | None = None, tokens: slice | None = None
) -> tuple[dict[str, Any], Callable[[Tiles], int]]:
    """The readers of each chunk, cut into parts, as arguments of the kernels; and their number of programs.

    number: the stretch of the ``tokens`` that gather; None: all readers
    """
    chunks, entries = starts.shape[1], call.length * call.chosen
    begin, end = (0, readers.classes) if number is None else (number, number + 1)
    found: dict[str, Any] = {"starts": starts, "readers": readers.token, "offsets": readers.offsets}
    found |= {"N": chunks, "PER": PER, "CLASSES": readers.classes, "FROM": begin, "TO": end}
    if tokens is not None:
        size = tokens.stop - tokens.start
        entries, found = size * call.chosen, found | {"S": size, "START": tokens.start}
    of_chunks = readers.offsets[..., 1:].unflatten(-1, (chunks, readers.classes))
    last, before = of_chunks[..., end - 1], readers.offsets[..., begin : -1 : readers.classes]
    first = torch.nn.functional.pad(((last - before + PER - 1) // PER).cumsum(-1), (1, 0))
    count = (entries + min(chunks, entries) * (PER - 1)) // PER
    part = torch.arange(count, device=starts.device).expand(*first.shape[:2], -1).contiguous()
    owner = torch.searchsorted(first[..., 1:].contiguous(), part, right=True).clamp(max=chunks - 1)
    programs = call.batch * call.groups * count * call.tiles_of_chunk
    return found | {"owner": owner, "first": first, "PARTS": count}, lambda _: programs
