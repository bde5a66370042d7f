"""Launching Triton kernels: the tiles of each target, and code that all kernels share.

B batch, T tokens of a row, S segments of a row, N chunks of a row, BT tokens of a chunk, H heads, K key dim, V value
dim. Segment s of row b holds the tokens cu[b, s] to cu[b, s + 1] - 1; without cu a row is one segment.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlm_kernels import proof
from memlm_kernels.backend import exact_products
from memlm_kernels.segments import power_of_two

Tiles = dict[str, int]

# Triton warns where it is not set, because its default is about to change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


class Kernel:
    """A Triton function with the tiles it may be launched with, the best guess first.

    tiles: by "cuda" and "hip", and by an architecture with tiles of its own ("sm_90")

    ``MEMLM_AUTOTUNE=1`` times all of them, once for each kind of argument; otherwise the first is taken. Where the
    first failed its trial, ``proof.ways`` names a slower way.
    """

    def __init__(self, function: Any, tiles: Mapping[str, list[Tiles]]) -> None:
        self.function, self.tiles = function, tiles
        self.name = f"{function.fn.__module__}.{function.fn.__name__}"
        self.best: dict[tuple, Tiles] = {}
        self._fitting: dict[tuple, list[Tiles]] = {}

    def __call__(self, programs: Callable[[Tiles], int], limits: Tiles, **arguments: Any) -> None:
        """programs: the number of programs that a choice of tiles needs; limits: the largest size of each tile."""
        device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
        choices = self.choices(limits, device)
        tiles = choices[0]
        if proof.ways[self.name] != proof.FIRST:
            tiles = {**tiles, "num_warps": 4, "num_stages": 1}
        elif len(choices) > 1 and os.environ.get("MEMLM_AUTOTUNE") == "1":
            kinds = (x.dtype if isinstance(x, Tensor) else x is None for x in arguments.values())
            constants = (arguments.get(p.name) for p in self.function.params if p.is_constexpr)
            key = (*kinds, *limits.items(), *constants, torch.cuda.get_device_name(device))
            if key not in self.best:
                self.best[key] = min(choices, key=lambda tiles: self._seconds(programs, tiles, arguments, device))
            tiles = self.best[key]
        self._launch(programs, tiles, arguments, device)

    def choices(self, limits: Tiles, device: torch.device) -> list[Tiles]:
        """The tiles of a GPU that keep to the limits."""
        key = (device, *limits.items())
        if (found := self._fitting.get(key)) is None:
            found = self._fitting[key] = fitting(self.tiles_on(architecture(device)), limits)
        return found

    def tiles_on(self, architecture: str) -> list[Tiles]:
        return self.tiles.get(architecture, self.tiles["hip" if architecture[:3] in ("hip", "gfx") else "cuda"])

    def _launch(
        self, programs: Callable[[Tiles], int], tiles: Tiles, arguments: Mapping[str, Any], device: torch.device
    ) -> None:
        count = programs(tiles)
        if count == 0:
            return
        hip = target() == "hip"
        if count >= (2**32 // (64 * tiles["num_warps"]) if hip else 2**31):
            name = self.function.__name__
            raise ValueError(f"{name}: no GPU starts {count} programs at once; use backend='reference'")
        run = self.function[(count,)]
        if proof.ways[self.name] == proof.PLAIN:
            run = functools.partial(self._run_plain, count)
        # Triton launches on the current device, wherever the tensors are.
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                run(**arguments, **tiles)
        else:
            run(**arguments, **tiles)

    def _run_plain(self, count: int, **arguments: Any) -> None:
        """Launch code that was compiled in the environment of ``proof.PLAIN``."""
        before = {name: os.environ.get(name) for name in proof.WAYS[proof.PLAIN]}
        os.environ.update(proof.WAYS[proof.PLAIN])
        try:
            self._plain[(count,)](**arguments)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    @functools.cached_property
    def _plain(self) -> Any:
        """A function of its own, because Triton finds compiled code by its arguments, whatever the environment."""
        return triton.jit(self.function.fn)

    def _seconds(
        self, programs: Callable[[Tiles], int], tiles: Tiles, arguments: Mapping[str, Any], device: torch.device
    ) -> float:
        try:
            return triton.testing.do_bench(lambda: self._launch(programs, tiles, arguments, device))
        except triton.runtime.OutOfResources:
            return float("inf")


def tiled(cuda: list[Tiles], hip: list[Tiles] | None = None, **architectures: list[Tiles]) -> Callable[[Any], Kernel]:
    """Decorates a Triton function with its tiles on CUDA and on HIP (None: the same), and on architectures that hold
    other tiles.
    """
    return lambda function: Kernel(function, {"cuda": cuda, "hip": cuda if hip is None else hip, **architectures})


def fitting(choices: list[Tiles], limits: Tiles) -> list[Tiles]:
    """The choices with each tile cut to its limit, without repetition."""
    cut = [{name: min(size, limits.get(name, size)) for name, size in tiles.items()} for tiles in choices]
    return [tiles for i, tiles in enumerate(cut) if tiles not in cut[:i]]


def target() -> str:
    return "hip" if torch.version.hip else "cuda"


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture of a GPU as compilers name it; of a CPU, whose interpreter takes any tiles, the target."""
    if device.type != "cuda":
        return target()
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def precision(x: Tensor) -> str:
    """The precision of products of fp32 tiles, for tokens x. fp32 tokens get the precision of torch's own products.
    16-bit tokens lose nothing in tf32, which NVIDIA's matrix units take. AMD's units take fp32 as it is.
    """
    return "ieee" if target() == "hip" or exact_products(x) else "tf32"


def arguments_of(op: Any, given: Iterable[Any]) -> dict[str, Any]:
    """The arguments of a call of a torch op, by name; also for the shapes that a FLOP counter gives."""
    return {argument.name: x for argument, x in zip(op.default._schema.arguments, given, strict=True)}


def no_products(*_: Any, **__: Any) -> int:
    """FLOPs of an op that multiplies no matrices, as torch counts them."""
    return 0


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def at_least_16(size: int) -> int:
    """The smallest power of two that holds ``size`` and that a product can take."""
    return max(16, power_of_two(size))


def powers_of_two(**sizes: int) -> Tiles:
    """The smallest power of two that holds each size: the limit of its tile."""
    return {name: power_of_two(size) for name, size in sizes.items()}


def with_features(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B, T, F]"""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


def laid(*tensors: Tensor | None) -> list[Any]:
    """Contiguous; None stays None."""
    return [None if x is None else x.contiguous() for x in tensors]


def spans(cu_seqlens: Tensor | None, length: int, width: int) -> tuple[int, Tensor | None, Tensor | None]:
    """N, the chunks [B, N, 2] and the first chunk of each segment [B, S]; both tensors are None where each row is one
    segment. A chunk has its first token and its segment's end; in a chunk that is not used they hold no token.
    """
    if cu_seqlens is None:
        return cdiv(length, width), None, None
    cu = cu_seqlens.long()
    segments = cu.shape[1] - 1
    count = min(length, (length + min(segments, length) * (width - 1)) // width)
    ends = ((cu.diff(dim=1) + width - 1) // width).cumsum(1)
    first = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    chunk = torch.arange(count, device=cu.device).expand(len(cu), -1).contiguous()
    owner = torch.searchsorted(ends, chunk, right=True).clamp(max=segments - 1)
    start = cu.gather(1, owner) + (chunk - first.gather(1, owner)) * width
    return count, torch.stack([start, cu.gather(1, owner + 1)], -1), first


@triton.jit
def part_of(program, tiles: tl.constexpr, H: tl.constexpr, N):
    """A program's tile, head, chunk (or segment) and row, where a row has N of them."""
    return program % tiles, program // tiles % H, program // tiles // H % N, program // tiles // H // N


@triton.jit
def chunk_span(chunks, row, n, N, T, BT: tl.constexpr):
    """First token of chunk n of a row, and the end of its segment."""
    if chunks is None:
        start = n * BT
        end = start * 0 + T
    else:
        start = tl.load(chunks + (row * N + n) * 2)
        end = tl.load(chunks + (row * N + n) * 2 + 1)
    return start, end


@triton.jit
def segment_span(cu, first, row, s, S, T):
    """First token of segment s of a row, its end, and its first chunk; first: None where there are no chunks."""
    n = s * 0
    if cu is None:
        begin = s * 0
        end = s * 0 + T
    else:
        begin = tl.load(cu + row * (S + 1) + s)
        end = tl.load(cu + row * (S + 1) + s + 1)
        if first is not None:
            n += tl.load(first + row * S + s)
    return begin, end, n


@triton.jit
def load_tile(x, base, rows, columns, mask, width: tl.constexpr):
    """Rows base + ``rows`` of a matrix of ``width``, in its own type; 0 where ``mask`` (of rows) or the width ends.

    base is one int64 for all elements; offsets between elements are int32, because pointers take many registers.
    """
    inside = mask[:, None] & (columns < width)[None, :]
    return tl.load(x + base * width + (rows[:, None] * width + columns[None, :]), mask=inside, other=0.0)


@triton.jit
def store_tile(x, value, base, rows, columns, mask, width: tl.constexpr):
    inside = mask[:, None] & (columns < width)[None, :]
    place = x + base * width + (rows[:, None] * width + columns[None, :])
    tl.store(place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def decay_between(b_g, BT: tl.constexpr):
    """[BT] -> [BT, BT]: exp of the sum of b_g over j < l <= i, 0 above the diagonal. Nothing cancels."""
    i = tl.arange(0, BT)
    sums = tl.cumsum(tl.where(i[:, None] > i[None, :], b_g[:, None], 0.0), 0)
    return tl.where(i[:, None] >= i[None, :], tl.exp(sums), 0.0)


@triton.jit
def decay_behind(log_decay, base, start, end, H: tl.constexpr, BT: tl.constexpr):
    """[BT]: for each token of a chunk that begins at ``start``, the sum of the log decays behind it."""
    i = tl.arange(0, BT)
    follows = (i + 1 < BT) & (start + i + 1 < end)
    b_after = tl.load(log_decay + base + H + i * H, mask=follows, other=0.0).to(tl.float32)
    return tl.cumsum(b_after, 0, reverse=True)


@triton.jit
def channels_behind(log_decay, base, start, end, i_k, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """[BT, BK]: the same for some channels of a decay per channel."""
    i = tl.arange(0, BT)
    follows = (i + 1 < BT) & (start + i + 1 < end)
    return tl.cumsum(load_tile(log_decay, base + H, i * H, i_k, follows, K).to(tl.float32), 0, reverse=True)


@triton.jit
def lower(BT: tl.constexpr):
    """[BT, BT]: 1 on and below the diagonal."""
    i = tl.arange(0, BT)
    return tl.where(i[:, None] >= i[None, :], 1.0, 0.0)


@triton.jit
def invert(b_A, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 for [BT, BT] below the diagonal: row by row in blocks of 16, all at once, then between blocks.

    With D the inverse of the blocks on the diagonal and L the blocks left of them, it is (I + D L)^-1 D. D L to the
    power of the number of blocks, which is at most four, is 0.
    """
    blocks: tl.constexpr = BT // 16
    i_b, i_r = tl.arange(0, blocks), tl.arange(0, 16)
    own = i_b[:, None, None, None] == i_b[None, None, :, None]
    b_A4 = tl.reshape(b_A, [blocks, 16, blocks, 16])
    b_own = tl.sum(tl.where(own, b_A4, 0.0), 2)
    b_D = tl.zeros([blocks, 16, 16], tl.float32) + tl.where(i_r[:, None] == i_r[None, :], 1.0, 0.0)[None, :, :]
    for r in range(1, 16):
        b_row = tl.sum(tl.where(i_r[None, :, None] == r, b_own, 0.0), 1)
        b_new = tl.sum(b_row[:, :, None] * b_D, 1)
        b_D = tl.where(i_r[None, :, None] == r, b_D - b_new[:, None, :], b_D)
    b_D2 = tl.reshape(tl.where(own, b_D[:, :, None, :], 0.0), [BT, BT])
    if blocks == 1:
        return b_D2
    b_L = tl.reshape(tl.where(own, 0.0, b_A4), [BT, BT])
    b_X = tl.dot(b_D2, b_L, input_precision=PRECISION)
    b_X2 = tl.dot(b_X, b_X, input_precision=PRECISION)
    b_Y = b_X2 - b_X - tl.dot(b_X, b_X2, input_precision=PRECISION)
    return b_D2 + tl.dot(b_Y, b_D2, input_precision=PRECISION)
