"""A call of every op with every tensor that it takes, of any size: for tests, and for the trial of kernels on a GPU.

call = CALLS["delta_rule"].of(T=139, K=64)
o, state = call.run(call.make(), backend="reference")
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import memlm_kernels as ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Factors of what is drawn from (0, 1), with which long rows stay finite: a decay's logarithm is not positive, and a
# rate is small beside the tokens of its chunk.
FACTORS = {"log_decay": -0.2, "lr": 0.1, "momentum": 0.5, "decay": 0.1}
# Drawn from (0, 1) themselves.
SHARES = (*FACTORS, "beta", "weight", "score")

Shapes = dict[str, tuple[int | str, ...]]


class Sizes(NamedTuple):
    """T tokens of each of two rows, H heads of keys, K key dim, V value dim, C tokens of a chunk, N chunks."""

    T: int = 6
    H: int = 1
    K: int = 4
    V: int = 3
    C: int = 2
    N: int = 3


class OpCall(NamedTuple):
    """A kind of call of an op.

    call: tensors by name, and settings -> results
    floats: the shape of each float tensor, in sizes
    integers: each tensor of integers, by sizes
    settings: settings that depend on sizes
    triton: whether the op has kernels for it
    products: whether they multiply matrices
    optional: tensors that a call may leave out together
    step: tensors of which a decoding step has the last token alone; () if no kernel is for such a step
    """

    call: Callable[..., Any]
    floats: Shapes
    integers: Mapping[str, Callable[[Sizes], Tensor]]
    settings: Callable[[Sizes], dict[str, Any]] = lambda n: {}
    triton: bool = True
    products: bool = True
    optional: tuple[str, ...] = ()
    step: tuple[str, ...] = ()
    n: Sizes = Sizes()

    def of(self, **sizes: int) -> "OpCall":
        """The same call in other sizes."""
        return self._replace(n=self.n._replace(**sizes))

    def make(
        self,
        length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = DEVICE,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """The tensors by name, floats in dtype. Tokens and weights have unit length, shares lie in (0, 1).

        length: tokens of a row, or None
        """
        n = self.n if length is None else self.n._replace(T=length)
        named = n._asdict() | {"2T": 2 * n.T, "2H": 2 * n.H, "V+2": n.V + 2, "N+2": n.N + 2}
        g, made = torch.Generator().manual_seed(seed), {}
        for name, shape in self.floats.items():
            size = [named[x] if isinstance(x, str) else x for x in shape]
            if name in SHARES:
                x = torch.rand(size, generator=g) * FACTORS.get(name, 1.0)
            else:
                x = F.normalize(torch.randn(size, generator=g), dim=-1)
            made[name] = x.to(device, dtype)
        return made | {name: make(n).to(device) for name, make in self.integers.items()}

    def run(self, tensors: dict[str, Tensor], **settings: Any) -> list[Tensor]:
        """The results, with 0 in the place of minus infinity."""
        out: list[Tensor] = []
        _collect(self.call(**{**self.settings(self.n), **tensors, **settings}), out)
        return out


def _collect(x: Any, out: list[Tensor]) -> None:
    if isinstance(x, Tensor):
        out.append(x.masked_fill(x == float("-inf"), 0.0) if x.is_floating_point() else x)
    for part in x if isinstance(x, tuple) else ():
        _collect(part, out)


def cut(n: Sizes) -> Tensor:
    """The ends of two segments of each row; the second row ends in padding."""
    return torch.tensor([[0, n.T // 2, n.T], [0, n.T // 3, n.T - n.T // 8]])


def choices(n: Sizes) -> Tensor:
    """Two chunks that each token chose; every third has one. In the first half neighbours agree, then they do not."""
    token = torch.arange(n.T)
    chosen = torch.where(token < n.T // 2, token // 16, token)
    two = torch.stack([chosen % n.N, torch.where(token % 3 == 2, -1, (chosen + n.N // 2) % n.N)], -1)
    return two.expand(2, -1, -1)[:, :, None].expand(-1, -1, n.H, -1)


def places(n: Sizes) -> Tensor:
    return torch.arange(2 * n.T).flip(0).view(1, n.T, 2).repeat(2, 1, 1)


def segmented(memory: Tensor, position: Tensor, **x: Any) -> Any:
    return ops.segmented_neural_memory(**x, state=ops.SegmentedMemoryState(memory, position))


def titans(weights: Tensor, hidden: Tensor | None = None, **x: Any) -> Any:
    return ops.neural_memory(**x, weights=[weights] if hidden is None else [weights, hidden])


def lact(w1: Tensor, w2: Tensor, w3: Tensor, **x: Any) -> Any:
    return ops.large_chunk_memory(**x, weights=[w1, w2, w3])


def window(prefix_q: Tensor, prefix_k: Tensor, prefix_v: Tensor, **x: Any) -> Any:
    if x.get("backend") in ("reference", "triton"):
        x["with_lse"] = True
    return ops.prefix_window_attention(**x, prefix=(prefix_q, prefix_k, prefix_v))


def inverse(index: Tensor, **x: Any) -> Any:
    return ops.invert_chunks(index, **x).offsets


def nominate(q: Tensor, document: Tensor, number: Tensor, backend: str = "reference") -> Any:
    """By another backend than ``auto``, which reads scores on a CPU."""
    keys = q.detach().flatten(0, 1)[: len(document), :1]
    shard = ops.RouterShard(keys, document[: len(keys)], number)
    return ops.nominate_documents(q, [shard], top_k=2, running=True, backend=backend)


def read(q: Tensor, weights: Tensor, hidden: Tensor, norm: Tensor, backend: str | None = None) -> Any:
    """The only op without a backend."""
    return ops.read_memory(q, [weights, hidden], norm=(norm, norm))


def convolve(x: Tensor, weight: Tensor, state: Tensor, **rest: Any) -> Any:
    return ops.short_convolution([x], weight, state=state, **rest)


def maps(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor, gates: Tensor, **rest: Any) -> Any:
    return ops.linears(x, [weight, other, gates], [bias, None, None], [False, False, True], **rest)


def merge(index: Tensor, score: Tensor, top_k: int = 3, **x: Any) -> Any:
    return ops.merge_topk([(index, score), (index + 1, score)], top_k=top_k, **x)


def per_chunk(n: Sizes) -> dict[str, Any]:
    return {"chunk_size": 2 * n.C}


TOKEN, SHARED, QK = (2, "T", "2H", "K"), (2, "N", "H", "K"), (2, "T", "H", "K")
V, GATE = (2, "T", "H", "V"), (2, "T", "H")
RECURRENCE: Shapes = {"q": QK, "k": QK, "v": V}
STATE: Shapes = {"state": (2, 2, "H", "K", "V")}
GATES: Shapes = {"lr": GATE, "momentum": GATE, "decay": GATE}
SEGMENTS = {"cu_seqlens": cut}
PLACES = {"positions": lambda n: torch.arange(n.T).expand(2, -1)}
CHOICE = {"index": choices}
LINEAR = OpCall(
    ops.linear_attention,
    RECURRENCE | STATE,
    SEGMENTS,
    optional=("cu_seqlens", "state"),
    step=("q", "k", "v"),
)
DELTA = LINEAR._replace(call=ops.delta_rule, floats=RECURRENCE | {"beta": GATE} | STATE, step=("q", "k", "v", "beta"))
TITANS = OpCall(
    titans,
    RECURRENCE | GATES | {"weights": ("H", "K", "V")},
    SEGMENTS,
    per_chunk,
    optional=("cu_seqlens",),
    step=(*RECURRENCE, *GATES),
)


def also(call: OpCall, decay: tuple[int | str, ...]) -> OpCall:
    return call._replace(floats=call.floats | {"log_decay": decay}, step=(*call.step, "log_decay"))


CALLS = {
    "linear_attention": LINEAR,
    "linear_attention, decay": also(LINEAR, GATE),
    "linear_attention, channels": also(LINEAR, QK),
    "delta_rule": DELTA,
    "delta_rule, decay": also(DELTA, GATE),
    "delta_rule, channels": also(DELTA, QK),
    "neural_memory": TITANS,
    "neural_memory, two layers": TITANS._replace(
        floats=RECURRENCE | GATES | {"weights": ("H", "K", "V+2"), "hidden": ("H", "V+2", "V")}
    ),
    "segmented_neural_memory": OpCall(
        segmented, RECURRENCE | GATES | {"memory": (2, 2, 3, "H", "K", "V")},
        SEGMENTS | {"position": lambda n: torch.zeros(2, 2, dtype=torch.int64)}, per_chunk,
        step=(*RECURRENCE, *GATES),
    ),
    "large_chunk_memory": OpCall(
        lact,
        RECURRENCE | {"lr": (2, "T", "H", 3), "momentum": GATE}
        | {"w1": ("H", "K", "V+2"), "w2": ("H", "V+2", "V"), "w3": ("H", "K", "V+2")},
        SEGMENTS, per_chunk, products=False,
    ),
    "chunk_topk": OpCall(ops.chunk_topk, {"q": TOKEN, "k": SHARED}, {}, lambda n: {"top_k": 2}),
    "invert_chunks": OpCall(inverse, {}, CHOICE, lambda n: {"num_chunks": n.N}, products=False),
    "chunk_sparse_attention": OpCall(
        ops.chunk_sparse_attention, {"q": TOKEN, "k": QK, "v": V},
        CHOICE | {"starts": lambda n: (n.C * torch.arange(n.N)).expand(2, -1)} | PLACES,
        lambda n: {"chunk_size": n.C, "window": n.C},
        optional=("positions",), step=("q", "index"),
    ),
    "chunk_mean_attention": OpCall(
        ops.chunk_mean_attention, {"q": TOKEN, "k": SHARED, "v": (2, "N", "H", "V")}, {}, step=("q",)
    ),
    "prefix_window_attention": OpCall(
        window,
        {"q": TOKEN, "k": QK, "v": V, "prefix_q": TOKEN, "prefix_k": (1, 2, "H", "K"), "prefix_v": (1, 2, "H", "V")},
        PLACES, lambda n: {"window": 2 * n.C - 1},
        optional=("positions",), step=("q", "prefix_q"),
    ),
    "document_attention": OpCall(
        ops.document_attention,
        {"q": TOKEN, "k": QK, "v": V, "pooled_k": SHARED, "pooled_v": (2, "N", "H", "V")},
        {"document": lambda n: (torch.arange(n.N) // 2).expand(2, -1), "chosen": lambda n: choices(n)[:, :, 0]},
        step=("q", "chosen"),
    ),
    "route_documents": OpCall(
        ops.route_documents, {"q": TOKEN, "k": (2, "N+2", "H", "K")},
        {"document": lambda n: ((torch.arange(n.N + 2) + 1) // 2).expand(2, -1)},
        lambda n: {"top_k": 2, "num_documents": (n.N + 3) // 2, "running": True},
    ),
    "merge_topk": OpCall(
        merge, {"score": (2, 3)}, {"index": lambda n: torch.tensor([[5, -1, 2]] * 2)}, products=False
    ),
    "segment_mean_pool": OpCall(
        ops.segment_mean_pool, {"x": V}, SEGMENTS, lambda n: {"longest": n.T}, products=False
    ),
    "short_convolution": OpCall(
        convolve, {"x": (2, "T", "K"), "weight": ("K", 4), "state": (2, 3, "K")}, PLACES,
        lambda n: {"head_dim": n.K, "silu": True, "unit": 1}, products=False, optional=("positions",),
    ),
    "rms_norm": OpCall(
        ops.rms_norm, {"x": V, "weight": ("V",), "gate": V, "other": V}, {}, lambda n: {"eps": 1e-6},
        products=False, optional=("other",),
    ),
    "rotary": OpCall(
        ops.rotary, {"q": (2, "T", "2H", 4), "k": (2, "T", "H", 4), "cos": (1, "T", 1, 4), "sin": (1, "T", 1, 4)}, {},
        products=False,
    ),
    "dispatch_tokens": OpCall(ops.dispatch_tokens, {"x": V}, {"place": places}, products=False),
    "combine_reads": OpCall(
        ops.combine_reads, {"o": (2, "2T", "H", "V"), "weight": (2, "T", 2), "shared": V}, {"place": places},
        products=False, optional=("shared",),
    ),
    "grouped_linear": OpCall(
        ops.grouped_linear, {"x": ("T", "K"), "weight": (2, "V", "K")},
        {"sizes": lambda n: torch.tensor([n.T // 2, n.T - n.T // 2])},
    ),
    "linears": OpCall(
        maps,
        {"x": ("T", "K"), "weight": ("V", "K"), "bias": ("V",), "other": ("V+2", "K"), "gates": (1, "K")}, {},
        products=False,
    ),
    "read_memory": OpCall(
        read, {"q": QK, "weights": (2, "H", "K", 5), "hidden": (2, "H", 5, "K"), "norm": ("H", "K")}, {},
        triton=False,
    ),
    "nominate_documents": OpCall(
        nominate, {"q": TOKEN},
        {"document": lambda n: torch.tensor([0, 1, 1, 2, 2]), "number": lambda n: torch.arange(3)}, triton=False,
    ),
}  # fmt: skip
