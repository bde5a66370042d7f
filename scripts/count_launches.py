"""Count the kernels that a GPU starts for one layer of a model, and the bytes that they read and write.

    python scripts/count_launches.py                                                the shipped 340M layers
    python scripts/count_launches.py --rows 1 --tokens 32768 "model=titans_340m memory=titans_mag"
    python scripts/count_launches.py --decode [--fixed] --rows 1 --tokens 257       a token after these

No GPU is needed and nothing is computed: the tensors have no data, and Triton's launches are recorded. An argument is
a set of overrides of configs/train.yaml. A layer's count is the count of a model of two layers minus that of a model
of one, in bf16 autocast on a GPU as in training, without metrics; of a decoded token with weights in bf16, in the
backends of ``auto``. An operation of torch counts as one launch, views as none. Bytes are those of all its inputs and
outputs; reads that a cache would save are counted. The least time on an H200 is that of each launch's bytes or
products at full rate, whichever is longer; products within an op of this package count together.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from memlm import MemLMConfig, MemLMForCausalLM, MemoryCache, cli, layers  # noqa: E402
from memlm_kernels import set_backend  # noqa: E402
from memlm_kernels.launch import Kernel  # noqa: E402
from memlm_kernels.testing import import_triton_ops  # noqa: E402

ONE_LAYER = "model.mixers.memory.memory_depth=1 model.mixers.memory.chunk_size=16"
# The decoder beside has the parameters of titans_mag in its MLPs.
SHIPPED = (
    f"model=titans_340m memory=titans_mag {ONE_LAYER}",
    "model=titans_340m memory=attention model.intermediate_size=3200",
)
# Bytes and FLOPs of an H200 in a ms.
BYTES, FLOPS = 4.8e9, 989e9
# Operations that only write, and those that start nothing.
WRITES, NOTHING = ("zeros", "ones", "full", "fill", "zero_", "new_"), ("empty", "_unsafe_view", "lift", "device")


class Cost(NamedTuple):
    launches: int
    bytes: int
    ms: float


def traffic(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors; an expanded dimension is read once."""
    found = 0
    for x in tensors:
        if isinstance(x, Tensor):
            sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n]
            found += x.element_size() * torch.Size(sizes).numel()
    return found


class Count(TorchDispatchMode):
    """Counts launches, bytes and least times in ms by the operation's name. An op of this package runs as its code,
    with its launches recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes, self.ms = Counter[str](), Counter[str](), Counter[str]()

    def add(self, name: str, tensors: Iterable[Any], flops: int = 0) -> None:
        moved = traffic(tensors)
        self.launches[name] += 1
        self.bytes[name] += moved
        self.ms[name] += max(moved / BYTES, flops / FLOPS)  # type: ignore[assignment]

    @staticmethod
    def now() -> "Count":
        mode: Any = _get_current_dispatch_mode()
        return mode

    def total(self) -> Cost:
        return Cost(self.launches.total(), self.bytes.total(), self.ms.total())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        products = flop_registry.get(func.overloadpacket, lambda *_, **__: 0)
        if func.namespace == "memlm":
            before = self.ms.total()
            with self:
                out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
            spent = self.ms.total() - before
            self.ms[name] += max(0.0, products(*args, **kwargs, out_val=out) / FLOPS - spent)  # type: ignore[assignment]
            return out
        out = func(*args, **kwargs)
        views = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if not views and not any(part in name for part in NOTHING):
            read = {key: x for key, x in kwargs.items() if key != "out"}
            reads = [] if name.startswith(WRITES) else tree_leaves((args, read))
            self.add(name, [*reads, *tree_leaves(out)], products(*args, **kwargs, out_val=out))
        return out


@contextmanager
def as_on_a_gpu(count: Count) -> Iterator[None]:
    """On the CPU, the code of a GPU: Triton's launches are counted and not made, and the norm is torch's."""

    def record(kernel: Kernel, programs: Any, limits: Any, **arguments: Any) -> None:
        Count.now().add(kernel.function.__name__, arguments.values())

    class Norm(torch.autograd.Function):
        """torch's fused norm, which a CPU has not."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            y = torch.empty_like(x)
            Count.now().add("rms_norm", (x, weight, y))
            return y

        @staticmethod
        def backward(ctx: Any, d_y: Tensor) -> Any:
            x, weight = ctx.saved_tensors
            d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
            Count.now().add("rms_norm_backward", (d_y, x, weight, d_x, d_weight))
            return d_x, d_weight

    with (
        patch.object(Kernel, "__call__", record),
        patch.object(layers, "norm", lambda x, weight, eps: Norm.apply(x, weight.to(x.dtype))),
        patch("memlm_kernels.backend.missing_triton", lambda device: None),
        count,
    ):
        yield


def of_model(config: MemLMConfig, rows: int, tokens: int) -> tuple[Count, Count]:
    """Forward and backward of a training step, without its loss."""
    forward, backward = Count(), Count()
    with FakeTensorMode():
        model, ids = MemLMForCausalLM(config).train().model, torch.zeros(rows, tokens, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16), as_on_a_gpu(forward):
            out = model(ids, use_cache=False, output_metrics=False)
        outputs = [out.last_hidden_state, *out.aux_losses.values()]
        with as_on_a_gpu(backward):
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    return forward, backward


def of_token(config: MemLMConfig, rows: int, tokens: int, fixed: bool) -> tuple[Count]:
    """One token after others, into an ordinary or a fixed memory."""
    count = Count()
    # Tensors without data have a type of their own, which no layer takes for plain.
    as_with_data = patch.object(layers, "_is_plain", lambda *_: True), patch.object(layers, "_joins", layers.is_few)
    with (
        FakeTensorMode(),
        torch.no_grad(),
        as_with_data[0],
        as_with_data[1],
        patch("memlm_kernels.backend.against_triton", lambda *_, **__: None),
    ):
        model = MemLMForCausalLM._from_config(config, dtype=torch.bfloat16).eval().model
        ids, memory = torch.zeros(rows, tokens, dtype=torch.int64), MemoryCache(fixed, tokens + 2 if fixed else None)
        with set_backend("triton"), as_on_a_gpu(Count()):
            model(ids, past_key_values=memory, output_metrics=False)
        # The first token may make room for later ones.
        for counted in (Count(), count):
            with set_backend("auto"), as_on_a_gpu(counted):
                model(ids[:, :1], past_key_values=memory, output_metrics=False)
    return (count,)


def of_layer(overrides: str, count: Callable[[MemLMConfig], tuple[Count, ...]]) -> list[Count]:
    """The counts of one layer."""
    settings = cli.composed(ROOT / "configs", "train", overrides.split())
    found = []
    for number in (1, 2):
        given: Any = {**OmegaConf.to_container(settings.model, resolve=True), "num_hidden_layers": number}  # type: ignore[dict-item]
        found.append(count(MemLMConfig.from_hydra(given)))
    both = []
    for one, two in zip(*found, strict=True):
        layer = Count()
        layer.launches, layer.bytes, layer.ms = two.launches - one.launches, two.bytes - one.bytes, two.ms - one.ms
        both.append(layer)
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=SHIPPED)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--decode", action="store_true", help="a token after --tokens others, without gradients")
    parser.add_argument("--fixed", action="store_true", help="--decode into a fixed memory")
    parser.add_argument("--names", action="store_true", help="also each operation's launches, MB and ms")
    given = parser.parse_args()
    import_triton_ops()
    which = ("forward",) if given.decode else ("forward", "backward")
    columns = [f"{what} {name}" for what in ("launches", "MB", "ms") for name in which]
    print(f"| one layer | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")

    def count(config: MemLMConfig) -> tuple[Count, ...]:
        if given.decode:
            return of_token(config, given.rows, given.tokens, given.fixed)
        return of_model(config, given.rows, given.tokens)

    for overrides in given.overrides:
        with set_backend(given.backend):
            counts = of_layer(overrides, count)
        numbers = [str(c.total().launches) for c in counts] + [f"{c.total().bytes / 1e6:,.1f}" for c in counts]
        numbers += [f"{c.total().ms:.3f}" for c in counts]
        print(f"| {overrides} | " + " | ".join(numbers) + " |", flush=True)
        for pass_, of_pass in zip(which, counts, strict=True) if given.names else ():
            for name, ms in of_pass.ms.most_common():
                size = of_pass.bytes[name] / 1e6
                print(f"    {pass_} {name}: {of_pass.launches[name]}, {size:,.2f} MB, {ms:.3f} ms")


if __name__ == "__main__":
    main()
