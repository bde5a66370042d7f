"""Random calls of every op by Triton's kernels, against the reference in fp64 with the same rounded inputs.

    pytest -m slow tests/kernels/test_random_calls.py

Sizes, segments, padding, states, positions and settings are drawn. An error may be that of the reference in the same
types, twice, and some units of rounding (memlm_kernels.trial); where a result is worse conditioned, because its terms
cancel, also as much as the exact result moves when all inputs are rounded once more.
"""

import functools
import itertools
import random

import pytest
import torch

from memlm_kernels import trial
from memlm_kernels.calls import CALLS, DEVICE, GATES, RECURRENCE, OpCall
from memlm_kernels.neural_memory import block_size
from tests.kernels.test_triton import poisoned  # noqa: F401

NAMES = [name for name, call in CALLS.items() if call.triton]
MEMORIES = [name for name in NAMES if "neural_memory" in name]


class Drawn:
    """A random call of an op; call, tensors: of ``OpCall.run``"""

    def __init__(self, name: str, dtype: torch.dtype, seed: int) -> None:
        self.name, self.rng, self.settings = name, random.Random(f"{name} {dtype} {seed}"), {}
        single = dtype == torch.float32
        most = 64 if name.endswith("two layers") else 128 if "neural_memory" in name or single else 130
        keys, values = (self.one_of(1, 2, self.up_to(20), self.up_to(most)) for _ in "kv")
        if "neural_memory" in name and single:
            keys = min(keys, 64)
        # Most calls are small, because the interpreter takes milliseconds for each line of each program.
        self.T = self.one_of(1, 2, self.up_to(20), self.up_to(20), self.up_to(75), self.up_to(150))
        heads, chunk = self.up_to(5 if self.T < 10 else 2 if self.T < 80 else 1), self.up_to(16)
        sizes = {"T": self.T, "H": heads, "K": keys, "V": values, "C": chunk, "N": self.up_to(12)}
        self.call: OpCall = CALLS[name].of(**sizes)
        made = self.call.make(dtype=torch.float64, seed=seed)
        self.tensors = {n: x for n, x in made.items() if n not in self.call.integers}
        self.g = torch.Generator().manual_seed(seed)
        self.rounded: tuple[str, ...] = ()
        getattr(self, "draw_" + self.call.call.__name__)()
        # Both change what is drawn above, so the types come last.
        rounded = (*trial.TOKENS, *self.rounded)
        self.tensors = {
            n: x if not x.is_floating_point() else x.to(DEVICE, dtype if n in rounded else torch.float32)
            for n, x in self.tensors.items()
        }

    def up_to(self, most: int) -> int:
        return self.rng.randint(1, max(1, most))

    def one_of(self, *choices):
        return self.rng.choice(choices)

    def maybe(self) -> bool:
        return self.rng.random() < 0.5

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.g, dtype=torch.float64)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.g, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """From low to high - 1."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.g)

    def with_settings(self, **settings) -> None:
        before = self.call.settings
        self.call = self.call._replace(settings=lambda n: {**before(n), **settings})

    def segments(self, length: int, first: bool) -> torch.Tensor:
        """Ends of up to five segments, some empty, with padding behind; ``first``: none before."""
        cu = self.integers(0, length + 1, 2, self.up_to(5) + 1).sort(1).values
        if first:
            cu[:, 0] = 0
        if self.maybe():
            cu[0, -1] = length
        return cu

    def documents(self) -> torch.Tensor:
        """Positions of tokens; the first document may have begun before the call."""
        starts, token = self.uniform(2, self.T) < 3 / self.T, torch.arange(self.T)
        last = torch.where(starts, token, -1).cummax(1).values
        return torch.where(last < 0, token + self.integers(0, 9, 2, 1), token - last)

    def draw_linear_attention(self) -> None:
        del self.tensors["state"]
        segments = 1
        if self.maybe():
            cu = self.tensors["cu_seqlens"] = self.segments(self.T, False)
            segments = cu.shape[1] - 1
        if self.maybe():
            self.tensors["state"] = self.normal(2, segments, *self.call.n[1:4])

    draw_delta_rule = draw_linear_attention

    def rates(self, most: int) -> int:
        """A chunk size, with rates at which the memory does not diverge, even if all keys are one."""
        chunk = self.one_of(1, 2, self.up_to(20), self.up_to(70))
        while block_size(chunk, most) > most:
            chunk = self.up_to(70)
        shape, top = self.tensors["lr"].shape, self.one_of(0.3, 0.9)
        self.tensors["momentum"] = top * self.uniform(*shape)
        self.tensors["lr"] = self.uniform(*shape) * min(1.0, 1.5 * (1 - top) / chunk)
        for name in ("momentum", "decay"):
            if self.rng.random() < 0.25:
                del self.tensors[name]
        self.with_settings(chunk_size=chunk)
        return chunk

    def draw_titans(self, most: int = 64) -> None:
        two = "hidden" in self.tensors
        self.rates(16 if two else 64)
        if two:
            self.tensors["lr"] *= 0.2
            self.with_settings(activation=self.one_of("gelu", "silu"))
        if self.maybe():
            self.tensors["weight"] = self.uniform(*self.tensors["lr"].shape)
        self.draw_parts()

    def draw_parts(self) -> None:
        """Documents, or a call that goes on where an earlier one ended."""
        if self.T > 1 and self.maybe():
            at = self.up_to(self.T - 1)
            first = self.segments(at, True) if self.maybe() else None
            rest = self.segments(self.T - at, True) if self.maybe() else None
            start = at if first is None and rest is None and self.maybe() else None
            self.call = self.call._replace(call=functools.partial(in_two, self.call.call, at, first, rest, start))
        elif self.maybe():
            self.tensors["cu_seqlens"] = self.segments(self.T, True)

    def draw_lact(self) -> None:
        chunk = self.one_of(1, 2, self.up_to(20), self.up_to(70))
        # Orthogonalising one token's gradient divides by singular values of 0.
        self.with_settings(chunk_size=chunk, muon_steps=self.one_of(0, self.up_to(5)) if chunk > 1 else 0)
        if self.maybe():
            del self.tensors["momentum"]
        self.draw_parts()

    def draw_segmented(self) -> None:
        chunk, segments = self.rates(64), 1
        if self.maybe():
            cu = self.tensors["cu_seqlens"] = self.segments(self.T, False)
            segments = cu.shape[1] - 1
        parts = 3 if "momentum" in self.tensors else 2
        self.tensors["memory"] = 0.3 * self.normal(2, segments, parts, *self.call.n[1:4])
        self.tensors["position"] = self.integers(0, 2 * chunk, 2, segments)

    def spans(self, chunks: int) -> None:
        if self.maybe():
            first, end = self.integers(0, chunks + 1, 2, 2, self.T).sort(0).values
            self.with_settings(spans=(first, end))

    def draw_chunk_topk(self) -> None:
        self.with_settings(top_k=self.one_of(1, 2, self.up_to(20)))
        self.spans(self.call.n.N)

    def choices(self) -> torch.Tensor:
        """[B, T, G, J]: chunks of each token, none twice."""
        n = self.call.n
        order = self.uniform(2, n.T, n.H, n.N).argsort(-1)[..., : self.up_to(8)]
        return torch.where(self.uniform(*order.shape) < 0.2, -1, order)

    def draw_inverse(self) -> None:
        self.tensors["index"] = self.choices()

    def draw_chunk_sparse_attention(self) -> None:
        n = self.call.n
        past = self.one_of(0, 0, self.up_to(40))
        length = n.T + past
        chunk = self.one_of(self.up_to(5), self.up_to(40))
        self.call = self.call.of(N=-(-length // chunk))
        self.tensors |= {"k": self.normal(2, length, n.H, n.K), "v": self.normal(2, length, n.H, n.V)}
        self.tensors["index"] = self.choices()
        starts = (chunk * torch.arange(self.call.n.N)).expand(2, -1)
        self.with_settings(starts=starts if self.maybe() else None, chunk_size=chunk, window=self.up_to(length + 5))
        if self.maybe():
            self.tensors["positions"] = self.documents()

    def draw_chunk_mean_attention(self) -> None:
        self.spans(self.call.n.N)

    def draw_window(self) -> None:
        n, past, prefix = self.call.n, self.one_of(0, 0, self.up_to(40)), self.up_to(9)
        rows = self.one_of(1, 2)
        self.tensors |= {"k": self.normal(2, n.T + past, n.H, n.K), "v": self.normal(2, n.T + past, n.H, n.V)}
        self.tensors["prefix_k"], self.tensors["prefix_v"] = (self.normal(rows, prefix, n.H, x) for x in (n.K, n.V))
        self.with_settings(window=self.one_of(None, self.up_to(n.T + past + 5)))
        if self.maybe():
            self.tensors["positions"] = self.documents()

    def draw_document_attention(self) -> None:
        n, rows, documents = self.call.n, self.one_of(1, 2), self.up_to(9)
        length = n.T + self.one_of(0, self.up_to(40))
        self.tensors |= {"k": self.normal(2, length, n.H, n.K), "v": self.normal(2, length, n.H, n.V)}
        self.tensors |= {f"pooled_{name}": self.normal(rows, n.N, n.H, n[at]) for name, at in (("k", 2), ("v", 3))}
        self.tensors["document"] = self.integers(-1, documents, rows, n.N)
        order = self.uniform(2, n.T, documents).argsort(-1)[..., : self.up_to(5)]
        self.tensors["chosen"] = torch.where(self.uniform(*order.shape) < 0.2, -1, order)
        if self.maybe():
            end = self.integers(1, length + 1, 2, n.T)
            self.with_settings(spans=(torch.minimum(self.integers(0, length, 2, n.T), end - 1), end))

    def draw_maps(self) -> None:
        made = {name: self.normal(self.up_to(90), self.call.n.K) for name in ("weight", "other", "gates")}
        self.tensors |= made | {"bias": self.normal(len(made["weight"]))}
        # With matrices in the type of the rows, or in fp32.
        self.rounded = self.one_of((), ("weight", "gates"))

    def draw_route_documents(self) -> None:
        n, documents = self.call.n, self.up_to(9)
        self.tensors["document"] = self.integers(-1, documents + 1, 2, n.N + 2).sort(1).values
        self.with_settings(
            top_k=self.up_to(5),
            num_documents=documents,
            running=self.maybe(),
            similarity=self.one_of("cosine", "dot"),
            head_reduce=self.one_of("mean", "max"),
            query_reduce=self.one_of("mean", "max"),
        )
        if self.maybe():
            self.with_settings(asks=self.uniform(2, n.T) < 0.7)
        self.spans(documents)

    def draw_merge(self) -> None:
        rows, wide = self.up_to(9), self.up_to(40)
        self.tensors = {"score": self.normal(rows, wide), "index": self.integers(-1, 12, rows, wide)}
        self.with_settings(top_k=self.one_of(1, self.up_to(50)))

    def draw_segment_mean_pool(self) -> None:
        self.tensors["cu_seqlens"] = self.segments(self.T, False)

    def draw_convolve(self) -> None:
        n, taps = self.call.n, self.up_to(7)
        heads, size = self.one_of((1, n.K), (n.H, n.K))
        channels = heads * size
        self.tensors |= {"x": self.normal(2, n.T, channels), "weight": self.normal(channels, taps)}
        self.tensors["state"] = self.normal(2, taps - 1, channels)
        # The length of one channel has no gradient but rounding.
        unit = self.one_of(0, 1) if size > 1 else 0
        self.with_settings(head_dim=size, silu=self.maybe(), unit=unit, eps=1e-6, factor=self.one_of(1, 0.3))
        if self.maybe():
            self.tensors["positions"] = self.documents()
        if self.maybe():
            self.with_settings(lengths=self.integers(0, n.T + 1, 2))

    def draw_rms_norm(self) -> None:
        if self.call.n.V == 1:
            # A norm of one channel has no gradient but rounding.
            self.call = self.call.of(V=2)
            self.tensors = self.call.make(dtype=torch.float64, seed=self.T)
        for name in ("other", "gate"):
            if self.maybe():
                del self.tensors[name]
            else:
                break

    def draw_rotary(self) -> None:
        n, size = self.call.n, 2 * self.up_to(65)
        self.tensors = {name: self.normal(2, n.T, heads, size) for name, heads in (("q", 2 * n.H), ("k", n.H))}
        self.tensors |= {name: self.normal(self.one_of(1, 2), n.T, 1, size) for name in ("cos",)}
        self.tensors["sin"] = torch.randn(self.tensors["cos"].shape, generator=self.g, dtype=torch.float64)

    def routes(self) -> int:
        choices = self.up_to(4)
        order = [torch.randperm(self.T * choices, generator=self.g) for _ in range(2)]
        self.tensors["place"] = torch.stack(order).unflatten(1, (self.T, choices))
        return choices

    def draw_dispatch_tokens(self) -> None:
        self.routes()

    def draw_combine_reads(self) -> None:
        choices, n = self.routes(), self.call.n
        self.tensors |= {"o": self.normal(2, n.T * choices, n.H, n.V), "weight": self.uniform(2, n.T, choices)}
        if self.maybe():
            del self.tensors["shared"]

    def draw_grouped_linear(self) -> None:
        n, groups = self.call.n, self.up_to(6)
        ends = self.integers(0, n.T + 1, groups - 1).sort().values
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), n.T)])
        self.tensors |= {"weight": self.normal(groups, n.V, n.K), "sizes": ends.diff()}


def in_two(call, at, first, rest, start, **x):
    """A call in two parts, the second with the state of the first."""
    parts = [{n: t.split([at, t.shape[1] - at], 1)[i] for n, t in x.items() if n in TOKENS} for i in range(2)]
    others = {n: t for n, t in x.items() if n not in TOKENS}
    before = call(**others, **parts[0], cu_seqlens=first)
    after = call(**others, **parts[1], cu_seqlens=rest, start=start, state=before.state)
    return before, after


TOKENS = (*RECURRENCE, *GATES, "weight")


def moved(drawn: Drawn, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """The errors of the results in fp64, at most, for inputs that are up to one unit of the type off."""

    def results(by: float) -> dict[str, torch.Tensor]:
        def off(x: torch.Tensor) -> torch.Tensor:
            return x.double() * (1 + by * (2 * drawn.uniform(*x.shape).to(x.device) - 1))

        tensors = {n: off(x) if x.is_floating_point() else x for n, x in drawn.tensors.items()}
        return trial.results(drawn.call, tensors, True, "reference")

    exact, unit = results(0.0), torch.finfo(dtype).eps
    found = [{n: trial.errors(exact[n], x) for n, x in results(unit).items()} for _ in range(8)]
    return {n: tuple(map(max, zip(*(errors[n] for errors in found), strict=True))) for n in exact}


def check(name: str, dtype: torch.dtype, seed: int) -> float:
    drawn = Drawn(name, dtype, seed)
    unit = trial.unit_of(drawn.call, dtype, torch.device(DEVICE))
    found = trial.compared(drawn.call, drawn.tensors, True, unit, 1)
    if found.fault is not None:
        found = trial.compared(drawn.call, drawn.tensors, True, unit, 1, moved(drawn, dtype))
    sizes, settings = drawn.call.n._asdict(), drawn.call.settings(drawn.call.n)
    assert found.fault is None, f"{name}, {dtype}, seed {seed}: {found.fault} ({sizes}, {settings})"
    return found.error


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_calls(name):
    for dtype, seed in itertools.product((torch.float32, torch.float16), range(50)):
        check(name, dtype, seed)
