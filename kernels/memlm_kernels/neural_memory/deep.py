"""The loop over chunks of a memory of two layers by Triton kernels, as an op of torch. It replaces ``scan.scan``. See
``deep_kernels``.

It works on a span of chunks at a time: the memories of all its chunks are computed and read. Only the memory before
the span is kept for backward, which computes the others again.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memlm_kernels.backend import outside_autocast
from memlm_kernels.checks import asks_gradient, in_one_type
from memlm_kernels.launch import Kernel, arguments_of, at_least_16, cdiv, laid, precision
from memlm_kernels.neural_memory.chunk import Plan
from memlm_kernels.neural_memory.deep_backward_kernels import deep_tokens_backward, deep_write_backward
from memlm_kernels.neural_memory.deep_kernels import deep_read, deep_write
from memlm_kernels.neural_memory.deep_read_backward_kernels import deep_read_backward_1, deep_read_backward_2
from memlm_kernels.neural_memory.network import ACTIVATIONS, EPS
from memlm_kernels.neural_memory.rates import Rates
from memlm_kernels.ops import kernel_op

# The number of chunks whose memories exist at once.
SPAN = 16

Named = dict[str, Tensor]


class _Call(NamedTuple):
    """The op's inputs, laid out; the layers' tensors end in _1 and _2. See ``scan.scan``; flags are int32 [N, G]."""

    q: Tensor
    k: Tensor
    v: Tensor
    C: Tensor
    beta: Tensor
    f: Tensor | None
    P: Tensor | None
    m: Tensor | None
    gain: Tensor | None
    bias: Tensor | None
    opens_document: Tensor | None
    opens_chunk: Tensor | None
    W_1: Tensor
    W_2: Tensor
    S_1: Tensor | None
    S_2: Tensor | None
    A_1: Tensor | None
    A_2: Tensor | None
    initial_1: Tensor | None
    initial_2: Tensor | None

    @staticmethod
    def of(*parts: list[Tensor]) -> "_Call":
        """Make it from the op's lists of tensors, each of which is complete or empty."""
        sizes = (5, 3, 2, 2, 4, 4)
        each = (x for part, size in zip(parts, sizes, strict=True) for x in [*part, *[None] * (size - len(part))])
        return _Call(*laid(*each))

    def state(self) -> list[str]:
        """The names of the state tensors that the op returns."""
        return ["W_1", "W_2", *(["S_1", "S_2"] if self.S_1 is not None else []), "A_1", "A_2"]

    def sizes(self, silu: bool) -> dict[str, Any]:
        count, rows, width, keys = self.q.shape
        hidden, values = self.W_2.shape[1:]
        tiles = {"BT": at_least_16(width), "BK": at_least_16(keys), "BV": at_least_16(values)}
        sizes = {"N": count, "G": rows, "K": keys, "X": hidden, "V": values, "W_C": width}
        return {**sizes, **tiles, "SILU": silu, "EPS": EPS, "PRECISION": precision(self.q)}

    def memory(self) -> Named:
        """The memory before the first chunk; A: the anchor, unless that chunk sets one."""
        names = ("W_1", "W_2", "S_1", "S_2", "A_1", "A_2")
        memory = {name: x for name in names if (x := getattr(self, name)) is not None}
        if self.opens_document is not None:
            new = (self.opens_document[0] != 0)[:, None, None]
            for name in ("W_1", "W_2"):
                memory[name] = torch.where(new, getattr(self, name.replace("W", "initial")), memory[name])
            memory |= {name: x.masked_fill(new, 0.0) for name, x in memory.items() if name[0] == "S"}
        return {"A_1": self.W_1, "A_2": self.W_2} | memory


class _Span:
    """Chunks ``begin`` to ``end`` with all their memories and the writes of their tokens."""

    def __init__(self, call: _Call, sizes: dict[str, Any], begin: int, blocks: int, memory: Named) -> None:
        self.call, self.sizes, self.begin, self.end = call, sizes, begin, min(begin + SPAN, sizes["N"])
        self.count = self.end - begin
        self.rooms = {name: x.new_empty(self.count + 2, *x.shape) for name, x in memory.items() if name[0] != "A"}
        for name, room in self.rooms.items():
            room[1] = memory[name]
            if name[0] == "W":
                room[0] = memory[name.replace("W", "A")]
        index = torch.arange(self.count, device=call.q.device)[:, None]
        widths = [at_least_16(sizes[name]) for name in "KXV"]
        # A warp of a product has 16 rows. Where several tiles of X follow each other, two warps may share them.
        self.limits = {"BX": widths[1], "num_warps": min(widths) // 16 * (2 if widths[1] > 64 else 1)}
        self.own = blocks == 1 and call.opens_chunk is None
        opens = (index + begin) % blocks == 0
        if call.opens_chunk is not None:
            opens = call.opens_chunk[begin : self.end] != 0
        self.anchors = torch.where(opens, index + 1, 0).expand(-1, sizes["G"]).cummax(0).values.contiguous()
        self.written = {
            **{name: self._of_slots(sizes["X"]) for name in ("hidden", "errors_1")},
            **{name: self._of_slots(sizes["V"]) for name in ("outputs", "errors_2")},
        }
        self._launch(deep_write, self.sizes["G"])

    def _of_slots(self, width: int) -> Tensor:
        call = self.call
        return call.W_1.new_empty(self.count, *call.q.shape[1:3], width)

    def _launch(self, kernel: Kernel, programs: int, **given: Tensor | None) -> None:
        """Launch a kernel with those tensors of the span and its call that the kernel names."""
        rooms: dict[str, Tensor | None] = {"S_1": None, "S_2": None, **self.rooms}
        tensors = {**self.call._asdict(), **rooms, **self.written, **given, "anchors": self.anchors}
        there = {**tensors, "begin": self.begin, "end": self.end, "OWN": self.own, **self.sizes}
        names = [name for name in kernel.function.arg_names if name in there]
        kernel(lambda _: programs, self.limits, **{name: there[name] for name in names})

    def read(self, out: Tensor) -> Tensor:
        """Write the reads into ``out``, [N, G, C, V]; return the norm of each token's gradient, [chunks, G, C]."""
        self._launch(deep_read, self.count * self.sizes["G"], out=out)
        a = ACTIVATIONS["silu" if self.sizes["SILU"] else "gelu"].value(self.written["hidden"])
        layers = ((self.call.k[self.begin : self.end].float(), "errors_1"), (a, "errors_2"))
        norms = [_norm(inputs) * _norm(self.written[errors]) for inputs, errors in layers]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def after(self) -> Named:
        """The memory after its last chunk; a copy, because a view would keep all rooms."""
        after = {name: room[-1].clone() for name, room in self.rooms.items()}
        anchors = {name.replace("W", "A"): self._at_anchor(self.rooms[name]) for name in ("W_1", "W_2")}
        return after | anchors

    def _at_anchor(self, room: Tensor) -> Tensor:
        return room[self.anchors[-1], torch.arange(room.shape[1], device=room.device)]

    def backward(self, d_out: Tensor, d_after: Named, d: Named) -> Named:
        """Gradients of the memory before the span, from those of the memory after it; those of tokens and scalars are
        written to ``d``.
        """
        d_rooms = {name: torch.empty_like(room) for name, room in self.rooms.items()}
        names = ("hidden", "errors_1", "errors_2")
        d_written = {f"d_{name}": torch.empty_like(self.written[name]) for name in names}
        of_rooms = {f"d_{name}": d_rooms.get(name) for name in ("W_1", "S_1", "W_2", "S_2")}
        tokens = ("q", "k", "v", "C", "beta", "f", "P", "m", "gain", "bias")
        given = {**d_written, **of_rooms, **{f"d_{name}": d.get(name) for name in tokens}}
        rows, chunks = self.sizes["G"], self.count * self.sizes["G"]
        of_reads = {**given, "d_out": d_out, "d_before": torch.empty_like(self.written["hidden"])}
        self._launch(deep_read_backward_2, chunks, **of_reads)
        self._launch(deep_read_backward_1, chunks, **of_reads)
        row = torch.arange(rows, device=d_out.device)
        for name, room in d_rooms.items():
            room[-1] = d_after[name]
            if name[0] == "W":
                room[0] = 0.0
                room[self.anchors[-1], row] = self._at_anchor(room) + d_after[name.replace("W", "A")]
        of_writes = given | {f"d_{name}": d.get(f"last_{name}") for name in ("c", "beta", "f")}
        self._launch(deep_write_backward, rows, **of_writes)
        self._launch(deep_tokens_backward, chunks, **of_writes)
        if self.call.opens_document is not None:
            # The gradients of documents that start behind the span's first chunk.
            new = self.call.opens_document[self.begin + 1 : self.end + 1, :, None, None]
            for i in ("1", "2"):
                d[f"initial_{i}"] += (d_rooms[f"W_{i}"][2 : 2 + len(new)] * new).sum(0)
        before = {name: room[1].clone() for name, room in d_rooms.items()}
        return before | {name.replace("W", "A"): d_rooms[name][0].clone() for name in ("W_1", "W_2")}


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


Tensors = list[Tensor]


@kernel_op("deep_memory")
def forward(
    tokens: Tensors,
    momentum: Tensors,
    tail: Tensors,
    flags: Tensors,
    memory: Tensors,
    ragged: Tensors,
    blocks: int,
    silu: bool,
    keep: bool,
) -> Tensors:
    """tokens: q, k, v, C, beta; momentum: f, P, m; tail: gain, bias; flags: opens_document, opens_chunk; memory: W
    and, with momentum, S; ragged: anchor and initial. A list that the call does not have is empty; there are two
    layers.

    Returns out [N, G, C, V], norms of the tokens' gradients [N, G, C], then W, S and the anchor; with ``keep`` also
    these three before each span.
    """
    call = _Call.of(tokens, momentum, tail, flags, memory, ragged)
    sizes = call.sizes(silu)
    out = _empty_out(call)
    current, kept, surprise = call.memory(), [], []
    for begin in range(0, sizes["N"], SPAN):
        if keep:
            kept.append(current)
        span = _Span(call, sizes, begin, blocks, current)
        surprise.append(span.read(out))
        current = span.after()
    names = call.state()
    starts = [torch.stack([x[name] for x in kept]) for name in names] if keep else []
    return [out, torch.cat(surprise), *(current[name] for name in names), *starts]


def _empty_out(call: _Call) -> Tensor:
    return call.W_1.new_empty(*call.q.shape[:3], call.v.shape[-1])


@forward.register_fake
def _(
    tokens: Tensors,
    momentum: Tensors,
    tail: Tensors,
    flags: Tensors,
    memory: Tensors,
    ragged: Tensors,
    blocks: int,
    silu: bool,
    keep: bool,
) -> Tensors:
    q, _, v, _, beta = tokens
    # The anchor has the shapes of W.
    last = [x.new_empty(x.shape) for x in (*memory, *memory[:2])]
    kept = [x.new_empty(cdiv(len(q), SPAN), *x.shape) for x in last] if keep else []
    return [beta.new_empty(*q.shape[:3], v.shape[-1]), beta.new_empty(beta.shape), *last, *kept]


@kernel_op("deep_memory_backward")
def backward(
    tokens: Tensors,
    momentum: Tensors,
    tail: Tensors,
    flags: Tensors,
    memory: Tensors,
    ragged: Tensors,
    kept: Tensors,
    d_out: Tensor,
    d_last: Tensors,
    blocks: int,
    silu: bool,
) -> Tensors:
    """Gradients of tokens, momentum, tail, memory and ragged, in this order."""
    call = _Call.of(tokens, momentum, tail, flags, memory, ragged)
    sizes, names = call.sizes(silu), call.state()
    d = {name: torch.empty_like(getattr(call, name), dtype=torch.float32) for name in ("q", "k", "v", "C", "beta")}
    d |= {name: torch.empty_like(getattr(call, name)) for name in ("f", "P", "m") if momentum}
    d |= {name: torch.zeros_like(getattr(call, name)) for name in ("gain", "bias") if tail}
    # The additional gradients of the last slot, whose scalars also write.
    d |= {"last_c": torch.empty_like(d["beta"]), "last_beta": torch.empty_like(call.beta[..., 0])}
    if momentum:
        d["last_f"] = torch.empty_like(d["last_beta"])
    if ragged:
        d |= {name: torch.zeros_like(getattr(call, name)) for name in ("initial_1", "initial_2")}
    d_memory = dict(zip(names, d_last, strict=True))
    d_out = d_out.contiguous()
    for s in reversed(range(cdiv(sizes["N"], SPAN))):
        current = {name: x[s] for name, x in zip(names, kept, strict=True)}
        d_memory = _Span(call, sizes, s * SPAN, blocks, current).backward(d_out, d_memory, d)
    d["C"][:, :, -1] += d.pop("last_c")
    d["beta"][..., -1] += d.pop("last_beta")
    if momentum:
        d["f"][..., -1] += d.pop("last_f")
    if flags:
        new = (flags[0][0] != 0)[:, None, None]
        for i in ("1", "2"):
            d[f"initial_{i}"] += torch.where(new, d_memory[f"W_{i}"], 0.0)
        d_memory |= {name: x.masked_fill(new, 0.0) for name, x in d_memory.items() if name[0] != "A"}
    given = ["q", "k", "v", "C", "beta", *(["f", "P", "m"] if momentum else []), *(["gain", "bias"] if tail else [])]
    of_memory = [name for name in names if name[0] != "A"]
    of_ragged = ["A_1", "A_2", "initial_1", "initial_2"] if ragged else []
    d |= d_memory
    return [d[name].to(getattr(call, name).dtype) for name in (*given, *of_memory, *of_ragged)]


@backward.register_fake
def _(
    tokens: Tensors,
    momentum: Tensors,
    tail: Tensors,
    flags: Tensors,
    memory: Tensors,
    ragged: Tensors,
    kept: Tensors,
    d_out: Tensor,
    d_last: Tensors,
    blocks: int,
    silu: bool,
) -> Tensors:
    return [x.new_empty(x.shape) for x in (*tokens, *momentum, *tail, *memory, *ragged)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *lists, ctx.blocks, ctx.silu, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.counts = [len(x) for x in lists]
    # The outputs with a gradient: out, then W, S and the anchor.
    _, _, _, _, memory, _ = lists
    ctx.returned = 2 + len(memory) + 2
    ctx.save_for_backward(*(x for part in lists for x in part), *output[ctx.returned :])


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Tensors]:
    ends = list(itertools.accumulate(counts))
    return [list(tensors[end - count : end]) for end, count in zip(ends, counts, strict=True)]


@outside_autocast
def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    parts = _split(saved, ctx.counts)
    kept = list(saved[sum(ctx.counts) :])
    d_out, _, *d_last = gradients[: ctx.returned]
    (_, _, v, *_), *_ = parts
    d_out = torch.zeros_like(v, dtype=torch.float32) if d_out is None else d_out
    d_last = [torch.zeros_like(k[0]) if x is None else x for x, k in zip(d_last, kept, strict=True)]
    found = backward(*parts, kept, d_out, d_last, ctx.blocks, ctx.silu)
    tokens, momentum, tail, flags, memory, ragged = ctx.counts
    d_tokens, d_momentum, d_tail, d_memory, d_ragged = _split(found, (tokens, momentum, tail, memory, ragged))
    return d_tokens, d_momentum, d_tail, [None] * flags, d_memory, d_ragged, None, None, None


forward.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.memlm.deep_memory)
def _forward_flops(*shapes: Any, **_: Any) -> int:
    """FLOPs of the products of ``deep_kernels``."""
    given = arguments_of(torch.ops.memlm.deep_memory, shapes)
    (count, rows, width, keys), (hidden, values) = given["tokens"][0], given["memory"][1][1:]
    of_layers = hidden * ((5 if given["momentum"] else 3) * (keys + values) + values)
    return 2 * count * rows * width * (of_layers + width * (keys + values + 2 * hidden))


@register_flop_formula(torch.ops.memlm.deep_memory_backward)
def _backward_flops(*shapes: Any, **_: Any) -> int:
    """FLOPs of ``deep_read_backward_kernels`` and ``deep_backward_kernels``, and of the repeated writes."""
    given = arguments_of(torch.ops.memlm.deep_memory_backward, shapes)
    (count, rows, width, keys), (hidden, values) = given["tokens"][0], given["memory"][1][1:]
    of_layers = hidden * (15 * keys + 19 * values)
    return 2 * count * rows * width * (of_layers + width * (4 * keys + 2 * values + 6 * hidden))


def scan_deep(plan: Plan, q: Tensor, k: Tensor, v: Tensor, rates: Rates, *rest: Tensor | None) -> tuple[Any, ...]:
    """``scan.scan`` for a plan of two layers."""
    gain, bias, opens_document, opens_chunk, *weights = rest
    C, beta, *of_momentum = rates.apart()
    tail, weights_of = ([x for x in part if x is not None] for part in ((gain, bias), weights))
    momentum = [x for x in of_momentum if x is not None]
    flags = [x.flatten(1).to(torch.int32) for x in (opens_document, opens_chunk) if x is not None]
    size = 4 if momentum else 2
    tokens = [*in_one_type(q, k, v), C, beta]
    tail = [x.flatten(1) for x in tail]
    memory, ragged = weights_of[:size], weights_of[size:]
    tensors = (*tokens, *momentum, *tail, *memory, *ragged)
    keep = asks_gradient(*tensors)
    silu = plan.activation is ACTIVATIONS["silu"]
    out, surprise, *after = forward(tokens, momentum, tail, flags, memory, ragged, plan.blocks, silu, keep)
    return out, surprise.detach() if plan.surprise else None, *after[: size + 2]
