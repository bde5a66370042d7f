"""A memory of one layer under the squared error by Triton kernels, as an op of torch; see ``block_kernels``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import asks_gradient, in_one_type
from memlm_kernels.launch import Kernel, Tiles, arguments_of, at_least_16, cdiv, laid, precision
from memlm_kernels.neural_memory.block_backward_kernels import (
    block_memory_backward,
    block_pairs_backward,
    block_reads_backward,
    block_states_backward,
)
from memlm_kernels.neural_memory.block_gates_kernels import block_decay_backward, block_gates_backward
from memlm_kernels.neural_memory.block_kernels import (
    RATES,
    block_reads,
    block_solutions,
    block_states,
    block_systems,
    block_table,
)
from memlm_kernels.neural_memory.reference import NeuralMemoryState, Tokens
from memlm_kernels.ops import kernel_op
from memlm_kernels.pieces import cut, in_pieces, pieces_of
from memlm_kernels.segments import chunk_width, next_position, segments_of, whole_rows

WIDTH = 64
_STATE = ("last_W", "last_S", "last_anchor")
# The arguments and results of ``forward`` that backward takes.
_SAVED = ("q", "k", "lr", "momentum", "decay", "cu_seqlens", "position", "anchor")
_KEPT = ("X", "R", "C", "rates", "d", "states_W", "states_S")

Named = dict[str, Any]


class _Call:
    """Sizes of a call and its blocks. Rows of q are [B, T, H, K]; with ``position``, chunks may begin anywhere."""

    def __init__(
        self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, position: Tensor | None, chunk_size: int
    ) -> None:
        self.q, self.v, self.ragged = q, v, cu_seqlens is not None
        self.batch, length, self.heads, self.keys = q.shape
        self.segments, self.values = segments_of(cu_seqlens), v.shape[-1]
        self.width = max(16, chunk_width(length, cu_seqlens, WIDTH))
        # Whole chunks come in periods, of chunks in a block or of blocks in a chunk.
        inner = cdiv(chunk_size, self.width)
        period = chunk_size if inner > 1 else self.width // chunk_size * chunk_size
        # Chunks of a block, as far as they change the code.
        self.chunks = next(most for most in (1, 2, 4, self.width) if most * chunk_size >= period)
        if cu_seqlens is None and position is None:
            last = (length - 1) // chunk_size * chunk_size
            self.count = cdiv(last, period) * inner + cdiv(length - last, self.width)
        else:
            # Each segment may begin inside a chunk, end inside a period, and has a last chunk.
            self.count = min(length, length * inner // period + 3 * min(self.segments, length))
        # Memories of wide keys take twice the registers.
        self.most_warps = 4 if self.keys * q.element_size() <= 128 else 8
        cu, position = laid(cu_seqlens, position)
        self.given: dict[str, Any] = {
            **{"cu": cu, "position": position, "F": 1 if position is None else position.shape[1]},
            **{"B": self.batch, "T": length, "N": self.count, "S": self.segments, "H": self.heads},
            **{"CHUNK": chunk_size, "PERIOD": period, "INNER": inner, "BT": self.width},
            **{"CHUNKS": self.chunks},
            **{"K": self.keys, "V": self.values, "BK": at_least_16(self.keys), "PRECISION": precision(q)},
        }

    def lay(self) -> None:
        """Compute the table of the blocks."""
        self.given["table"] = self.q.new_empty(self.batch, self.count, 4, dtype=torch.int32)
        self.given["first"] = self.q.new_empty(self.batch, self.segments + 1, dtype=torch.int32)
        self._launch(block_table, lambda _: self.batch * self.segments, {}, {"BS": 64})

    def blocks(self, *shape: int) -> Tensor:
        """[B, N, H, *shape], of the blocks; those without tokens stay unwritten."""
        return self.q.new_empty(self.batch, self.count, self.heads, *shape)

    def tokens(self, like: Tensor) -> Tensor:
        """A tensor like a given one; zeros if there may be padding, which no program writes."""
        make = torch.zeros_like if self.ragged else torch.empty_like
        return make(like, memory_format=torch.contiguous_format)

    def rates(self) -> Tensor:
        return self.q.new_empty(*self.q.shape[:3], RATES.value, dtype=torch.float32)

    def at_once(self, kernel: Kernel, there: Named, columns: int = 1, tile: str | None = None, **most: int) -> None:
        """A pass over all blocks, with a program for each ``tile`` of ``columns``; most: limits of tiles."""
        blocks = self.batch * self.count * self.heads
        limits = {"BK": at_least_16(self.keys), "BV": at_least_16(self.values), "BD": at_least_16(columns)}
        limits |= {name: min(size, limits.get(name, size)) for name, size in most.items()}
        self._launch(kernel, lambda tiles: blocks * (cdiv(columns, tiles[tile]) if tile else 1), limits, there)

    def along(self, kernel: Kernel, there: Named) -> None:
        """A pass along segments."""
        rows = self.batch * self.segments * self.heads
        most = 32 if self.most_warps == 4 else 16
        limits = {"BV": min(most, at_least_16(self.values)), "num_warps": self.most_warps}
        self._launch(kernel, lambda tiles: rows * cdiv(self.values, tiles["BV"]), limits, there)

    def products(self, inside: int, states: int) -> int:
        """FLOPs of ``states`` products of each token with a memory, and of products with a matrix of a block's pairs,
        whose other sizes add up to ``inside``.
        """
        slots = self.batch * self.count * self.heads * self.width
        return 2 * slots * (self.width * inside + states * self.keys * self.values)

    def _launch(self, kernel: Kernel, programs: Any, limits: Tiles, there: Named) -> None:
        """Launch a kernel with those arguments of the call and of ``there`` that it names."""
        there, (tiles, *_) = {**self.given, **there}, kernel.tiles["cuda"]
        names = [name for name in kernel.function.arg_names if name not in tiles]
        limits = {name: size for name, size in limits.items() if name in tiles}
        kernel(programs, limits, **{name: there[name] for name in names})

    def solve(self, x: Tensor, X: Tensor, rates: Tensor | None, has_S: bool, transposed: bool = False) -> Any:
        """X x or X^T x; with ``rates`` X (beta x) and X (f x), with the scalars of each token's anchor."""
        out, out_S = self.tokens(x), self.tokens(x) if has_S and rates is not None else None
        given = {"x": x, "X": X, "rates": rates, "out": out, "out_S": out_S, "D": x.shape[-1]}
        self.at_once(block_solutions, given | {"TRANSPOSED": transposed}, x.shape[-1], "BD")
        return out if rates is None else (out, out_S)


def _gradients(momentum: Tensor | None, decay: Tensor | None, anchor: Tensor | None, documents: bool) -> list[str]:
    """The inputs of ``forward`` whose gradients ``backward`` returns."""
    optional = {"momentum": momentum is not None, "decay": decay is not None, "W": True, "S": momentum is not None}
    optional |= {"anchor": anchor is not None, "initial": documents}
    return ["q", "k", "v", "lr", *(name for name, there in optional.items() if there)]


def _outputs(has_S: bool, surprise: bool, keep: bool) -> list[str]:
    """The names of the tensors that ``forward`` returns."""
    state, states = ["last_W", "last_anchor"], ["states_W"]
    if has_S:
        state, states = [*state, "last_S"], [*states, "states_S"]
    return ["o", *state, *(["squares"] if surprise else []), *(["X", "R", "C", "rates", "d", *states] if keep else [])]


@kernel_op("neural_memory")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    position: Tensor | None,
    W: Tensor,
    S: Tensor | None,
    anchor: Tensor | None,
    initial: Tensor | None,
    chunk_size: int,
    surprise: bool,
    keep: bool,
) -> list[Tensor]:
    """The tensors that ``_outputs`` names: o [B, T, H, V]; W, the anchor and S after
    each segment; the squares of the
    errors' norms, [B, T, H], with ``surprise``; and with ``keep`` the tensors that backward needs.

    position: [B, S], tokens that each segment had in earlier calls; None: 0   W, S, anchor: [B, S, H, K, V]; no anchor
        if no segment continues a chunk
    initial: [B, H, K, V], the memory of a document that starts. The segments are then documents, W, S, the anchor and
        position are those of each row's first, [B, 1, ...], and those of the last with tokens are returned.
    """
    q, k, v, lr, momentum, decay, W, S, anchor, initial = laid(q, k, v, lr, momentum, decay, W, S, anchor, initial)
    call, has_S = _Call(q, v, cu_seqlens, position, chunk_size), S is not None
    call.lay()
    made = _room(call, W, S, surprise, True)
    if not keep:
        made["C"] = None
    there = {"q": q, "k": k, "lr": lr, "momentum": momentum, "decay": decay, "states_S": None, "last_S": None}
    there |= {"before_W": W, "before_S": S, "before_anchor": _carried(call, W, anchor), "initial": initial}
    there |= {"squares": None, **made}
    call.at_once(block_systems, there)
    there["Y"], there["Z"] = call.solve(k, made["X"], made["rates"], has_S)
    there["U"] = call.solve(v, made["X"], None, False)
    call.along(block_states, there)
    call.at_once(block_reads, there, call.values, "BV")
    if surprise:
        made["squares"] = made["squares"].sum(0)
    return [made[name] for name in _outputs(has_S, surprise, keep)]


def _carried(call: _Call, W: Tensor, anchor: Tensor | None) -> Tensor | None:
    """The anchors before the first blocks, if chunks may go beyond a block."""
    return W if anchor is None and call.given["INNER"] > 1 else anchor


def _room(call: _Call, W: Tensor, S: Tensor | None, surprise: bool, keep: bool) -> Named:
    made = {"o": call.tokens(call.v), "last_W": torch.empty_like(W), "last_anchor": torch.empty_like(W)}
    if surprise:
        # One for each tile of values.
        tiles = cdiv(call.values, 64)
        made["squares"] = call.tokens(call.q.new_empty(tiles, *call.q.shape[:3], dtype=torch.float32))
    if keep:
        made |= {name: call.blocks(call.width, call.width) for name in "XRC"}
        made |= {"rates": call.rates(), "d": call.tokens(call.v), "states_W": call.blocks(call.keys, call.values)}
    if S is not None:
        made["last_S"] = torch.empty_like(W)
        if keep:
            made["states_S"] = call.blocks(call.keys, call.values)
    return made


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    position: Tensor | None,
    W: Tensor,
    S: Tensor | None,
    anchor: Tensor | None,
    initial: Tensor | None,
    chunk_size: int,
    surprise: bool,
    keep: bool,
) -> list[Tensor]:
    made = _room(_Call(q, v, cu_seqlens, position, chunk_size), W.contiguous(), S, surprise, keep)
    if surprise:
        made["squares"] = made["squares"].sum(0)
    return [made[name] for name in _outputs(S is not None, surprise, keep)]


@kernel_op("neural_memory_backward")
def backward(
    q: Tensor,
    k: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    position: Tensor | None,
    anchor: Tensor | None,
    X: Tensor,
    R: Tensor,
    C: Tensor,
    rates: Tensor,
    d: Tensor,
    states_W: Tensor,
    states_S: Tensor | None,
    d_o: Tensor,
    d_last_W: Tensor,
    d_last_anchor: Tensor,
    d_last_S: Tensor | None,
    documents: bool,
    chunk_size: int,
) -> list[Tensor]:
    """The gradients that ``_gradients`` names; that of a document's first memory is [B, S, H, K, V]."""
    q, k, lr, momentum, decay, anchor, d_o = laid(q, k, lr, momentum, decay, anchor, d_o)
    d_last_W, d_last_anchor, d_last_S = laid(d_last_W, d_last_anchor, d_last_S)
    call, has_S = _Call(q, d, cu_seqlens, position, chunk_size), states_S is not None
    call.lay()
    names, anchor = _gradients(momentum, decay, anchor, documents), _carried(call, d_last_W, anchor)
    like = {"q": q, "k": k, "lr": lr, "momentum": momentum, "decay": decay}
    made = {f"d_{name}": call.tokens(x) for name, x in like.items() if x is not None}
    of_memory = ("W", *(["S"] if has_S else []), *(["anchor"] if anchor is not None else []))
    made |= {f"d_{name}": torch.empty_like(d_last_W) for name in of_memory}
    if documents:
        made["d_initial"] = d_last_W.new_empty(call.batch, call.segments, *d_last_W.shape[2:])
    there: Named = {**like, "R": R, "C": C, "rates": rates, "d": d, "d_o": d_o, "before_anchor": anchor}
    there |= {"d_last_W": d_last_W, "d_last_anchor": d_last_anchor, "d_last_S": d_last_S}
    there |= dict.fromkeys(("d_S", "d_anchor", "d_initial", "d_momentum", "d_decay")) | made
    there |= {"states_W": states_W, "d_next_W": torch.empty_like(states_W)}
    there |= {"states_S": states_S, "d_next_S": torch.empty_like(states_W) if has_S else None}
    there |= {"d_local": call.tokens(d), "d_d": call.tokens(d), "d_rates": torch.empty_like(rates)}
    there["d_C"] = torch.empty_like(X, dtype=torch.float32)
    there["Y"], there["Z"] = call.solve(k, X, rates, has_S)
    call.at_once(block_reads_backward, there, call.values, "BV")
    call.along(block_states_backward, there)
    made["d_v"] = there["g"] = call.solve(there["d_d"], X, None, False, transposed=True)
    for kernel in (block_memory_backward, block_pairs_backward):
        call.at_once(kernel, there, BV=128 // q.element_size(), num_warps=call.most_warps)
    call.at_once(block_gates_backward, there)
    if decay is not None:
        call.at_once(block_decay_backward, there)
    return [made[f"d_{name}"] for name in names]


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    position: Tensor | None,
    anchor: Tensor | None,
    X: Tensor,
    R: Tensor,
    C: Tensor,
    rates: Tensor,
    d: Tensor,
    states_W: Tensor,
    states_S: Tensor | None,
    d_o: Tensor,
    d_last_W: Tensor,
    d_last_anchor: Tensor,
    d_last_S: Tensor | None,
    documents: bool,
    chunk_size: int,
) -> list[Tensor]:
    like = {"q": q, "k": k, "v": d, "lr": lr, "momentum": momentum, "decay": decay}
    like |= dict.fromkeys(("W", "S", "anchor"), d_last_W)
    like["initial"] = d_last_W[:, :1].expand(-1, segments_of(cu_seqlens), -1, -1, -1)
    found = (like[name] for name in _gradients(momentum, decay, anchor, documents))
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in found if x is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given = arguments_of(torch.ops.memlm.neural_memory, inputs)
    ctx.set_materialize_grads(False)
    ctx.chunk_size, ctx.documents, ctx.state = given["chunk_size"], given["initial"] is not None, given["W"].shape
    ctx.returned, ctx.given = _outputs(given["S"] is not None, given["surprise"], given["keep"]), tuple(given)
    made = dict(zip(ctx.returned, output, strict=True))
    ctx.save_for_backward(*(given[name] for name in _SAVED), *(made.get(name) for name in _KEPT))


@outside_autocast
def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = dict(zip((*_SAVED, *_KEPT), ctx.saved_tensors, strict=True))
    given, rates = dict(zip(ctx.returned, gradients, strict=True)), saved["rates"]
    d_o = torch.zeros_like(saved["d"]) if given["o"] is None else given["o"]
    d_last = {f"d_{name}": rates.new_zeros(ctx.state) if given.get(name) is None else given[name] for name in _STATE}
    if saved["momentum"] is None:
        d_last["d_last_S"] = None
    found = backward(**saved, **d_last, d_o=d_o, documents=ctx.documents, chunk_size=ctx.chunk_size)
    names = _gradients(saved["momentum"], saved["decay"], saved["anchor"], ctx.documents)
    d = dict(zip(names, found, strict=True))
    if ctx.documents:
        d["initial"] = d["initial"].sum(1)
    return tuple(d.get(name) for name in ctx.given)


forward.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.memlm.neural_memory)
def _forward_flops(*shapes: Any, **_: Any) -> int:
    """The products of ``block_kernels``."""
    call, S = _shaped(torch.ops.memlm.neural_memory, shapes)
    solves = 0 if call.chunks <= 2 else 2 if call.chunks <= 4 else 4 if call.width > 16 else 0
    pairs = int(call.chunks > 1)
    inside = call.width * (S + pairs + solves) + call.keys * (2 + pairs + S) + call.values * 2
    return call.products(inside, 3 + 3 * S)


@register_flop_formula(torch.ops.memlm.neural_memory_backward)
def _backward_flops(*shapes: Any, **_: Any) -> int:
    call, S = _shaped(torch.ops.memlm.neural_memory_backward, shapes)
    pairs = int(call.chunks > 1)
    inside = call.width * (2 * S + pairs) + call.keys * (4 + 2 * pairs + S) + call.values * (3 + pairs)
    return call.products(inside, 6 + 6 * S)


def _shaped(op: Any, shapes: Any) -> tuple[_Call, int]:
    """A call of the given shapes, and the parts of its memory beside W."""
    given = arguments_of(op, shapes)
    names = ("q", "v" if "v" in given else "d", "cu_seqlens", "position")
    shapes_of = (given[name] for name in names)
    tensors: list[Any] = [None if shape is None else torch.empty(shape, device="meta") for shape in shapes_of]
    q, v, cu_seqlens, position = tensors
    return _Call(q, v, cu_seqlens, position, given["chunk_size"]), int(given["momentum"] is not None)


def _run(surprise: bool, *arguments: Any) -> Named:
    """The results of ``forward``, by name. arguments: those before ``surprise``"""
    *tensors, _chunk_size = arguments
    keep = asks_gradient(*tensors)
    names = _outputs(arguments[9] is not None, surprise, keep)
    return dict(zip(names, forward(*arguments, surprise, keep), strict=True))


def memory_triton(
    tokens: Tokens,
    state: NeuralMemoryState,
    initial: Tensor,
    chunk_size: int,
    cu_seqlens: Tensor | None,
    start: int | None,
    with_surprise: bool,
) -> tuple[Tensor, NeuralMemoryState, Tensor | None]:
    """``reference._blocks``"""
    q, k, v = in_one_type(*tokens[:3])
    tokens = Tokens(q, k, v, *tokens[3:])
    position = state.position + q.shape[1] if cu_seqlens is None else next_position(cu_seqlens, state.position)
    if (count := _pieces_of(tokens, segments_of(cu_seqlens))) > 1:
        cu = whole_rows(q) if cu_seqlens is None else cu_seqlens.long()
        memory, before = _of_documents(state, initial, cu)
        o, after, squares = _in_pieces(count, with_surprise, tokens, chunk_size, cu, memory, before)
        last = torch.where(cu.diff(dim=1) > 0, torch.arange(cu.shape[1] - 1, device=cu.device), 0).amax(1)
        parts = after[torch.arange(len(after), device=cu.device), last].unbind(1)
        return o, NeuralMemoryState(parts[:1], parts[1:-1], parts[-1:], position), _surprise(k, squares)
    W, S, anchor = (x[0].float()[:, None] if x else None for x in state[:3])
    places: tuple[Any, ...] = (state.position[:, None], W, S, anchor, initial)
    if start is not None and start % chunk_size == 0:
        places = (None, W, S, None, None)
    made = _run(with_surprise, q, k, v, *tokens[3:6], cu_seqlens, *places, chunk_size)
    weights, momentum, anchors = ((made[name][:, 0],) if name in made else () for name in _STATE)
    return made["o"], NeuralMemoryState(weights, momentum, anchors, position), _surprise(k, made.get("squares"))


def _surprise(k: Tensor, squares: Tensor | None) -> Tensor | None:
    """The norms of the tokens' gradients k^T e. squares: |e|^2"""
    return None if squares is None else torch.linalg.vector_norm(k.detach().float(), dim=-1) * squares.detach().sqrt()


def _of_documents(state: NeuralMemoryState, initial: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
    """The memory before each document, [B, S, 3, H, K, V], and the tokens that it had in earlier calls, [B, S]."""
    fresh = torch.stack([initial, *(torch.zeros_like(initial) for _ in state.momentum), initial], 1)
    kept = torch.stack([part[0].float() for part in state[:3] if part], 1)
    goes_on = (state.position > 0)[:, None, None, None, None]
    others = fresh[:, None].expand(-1, cu.shape[1] - 2, *fresh.shape[1:])
    memory = torch.cat([torch.where(goes_on, kept, fresh)[:, None], others], 1)
    return memory, F.pad(state.position[:, None], (0, cu.shape[1] - 2))


def segments_triton(
    tokens: Tokens, chunk_size: int, cu_seqlens: Tensor | None, memory: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """The reads [B, T, H, V], and the memory after each segment.

    memory: [B, S, 3, H, K, V], W, S and the anchor of each segment; 2 without S   position: [B, S]
    """
    if (count := _pieces_of(tokens, memory.shape[1])) == 1:
        return _segments(False, tokens, chunk_size, cu_seqlens, memory, position)[:2]
    cu = whole_rows(tokens.q) if cu_seqlens is None else cu_seqlens.long()
    return _in_pieces(count, False, tokens, chunk_size, cu, memory, position)[:2]


def _segments(
    with_surprise: bool,
    tokens: Tokens,
    chunk_size: int,
    cu_seqlens: Tensor | None,
    memory: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The results of ``segments_triton``, and the squares of the errors' norms."""
    W, *S, anchor = memory.unbind(2)
    places = (cu_seqlens, position, W, S[0] if S else None, anchor, None)
    made = _run(with_surprise, *tokens[:6], *places, chunk_size)
    return made["o"], torch.stack([made[name] for name in _STATE if name in made], 2), made.get("squares")


def _pieces_of(tokens: Tokens, segments: int) -> int:
    (batch, length, heads, keys), columns = tokens.q.shape, tokens.v.shape[-1]
    parts = 1 if tokens.momentum is None else 2
    return pieces_of(tokens.q, length, batch * segments * heads * cdiv(columns, 64), parts * keys, columns)


def _in_pieces(
    count: int, with_surprise: bool, tokens: Tokens, chunk_size: int, cu: Tensor, memory: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``_segments``, each row in ``count`` pieces, which begin with chunks: the anchor before them has no effect."""
    of = cut(cu, tokens.q.shape[1], count, chunk_size, position)
    before = of.cu[:, :-1] - cu.gather(1, of.owner) + position.gather(1, of.owner)
    sizes, squares = memory.shape, None

    def op(v: Tensor, cu: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal squares
        rows = state.unflatten(3, (sizes[2], -1)).transpose(2, 3)
        o, after, squares = _segments(with_surprise, tokens._replace(v=v), chunk_size, cu, rows, before)
        return o, after.transpose(2, 3).flatten(3, 4)

    rows = sizes[2] * sizes[4]
    unit = torch.eye(rows, rows - sizes[4], device=memory.device)
    o, after = in_pieces(op, tokens.v, of, memory.transpose(2, 3).flatten(3, 4), unit)
    return o, after.unflatten(3, (sizes[2], -1)).transpose(2, 3), squares
