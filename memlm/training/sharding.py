"""Parameters that processes share: torch's FSDP2 on each decoder layer, and on the model around the layers.

accelerate calls it on GPUs only, and elsewhere trains copies without a word, so it is called here directly.

In bf16 the matrices that autocast would round are gathered in bf16: a process then keeps no rounded copy of them from
a layer's forward to its backward. Stores, gates, norms and gradients' sums are in fp32, as without sharing.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from memlm.layers import GroupedLinear
from memlm.memory.base import MixerOutput, SequenceMixer
from memlm.modeling import MemLMForCausalLM, Tap
from memlm.settings import require


class Sharding:
    """A model whose parameters are divided among ``size`` processes; other groups of ``size`` hold copies.

    Raises ValueError, one line, if the model cannot be divided.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, size: int, compiled: bool) -> None:
        check_divisible(model)
        hooks = [(mixer, _Reached(names)) for mixer, names in _reached_in_some_rows(model)]
        for mixer, hook in hooks:
            mixer.register_forward_hook(hook)
        processes = accelerator.num_processes
        axes = ("copies", "sharers") if size < processes else ("sharers",)
        shape = (processes // size, size)[-len(axes) :]
        mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=axes)
        # Nothing changes a state in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in model.model.layers:
            if compiled:
                layer.compile()
            elif accelerator.mixed_precision == "bf16" and (rounded := matrices(layer)):
                fully_shard(rounded, mesh=mesh, mp_policy=policy)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.model = model
        self._sometimes = [(hook, [mixer.get_parameter(name) for name in hook.names]) for mixer, hook in hooks]
        # Between hosts, none of which then waits for its device.
        self._hosts = dist.new_group(backend="gloo") if hooks else None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in the block add to the gradients of this process alone."""
        self.model.set_requires_gradient_sync(False)
        yield
        self.model.set_requires_gradient_sync(True)

    def drop_unreached(self) -> None:
        """Take away gradients that no process has, so that optimisers leave these parameters as they are."""
        if self._hosts is None:
            return
        reached = torch.tensor([hook.reached for hook, _ in self._sometimes], dtype=torch.uint8)
        dist.all_reduce(reached, dist.ReduceOp.MAX, group=self._hosts)
        for (hook, parameters), is_reached in zip(self._sometimes, reached.tolist(), strict=True):
            hook.reached = False
            for parameter in () if is_reached else parameters:
                parameter.grad = None


def in_bf16(precision: str, compiled: bool) -> bool:
    """Whether processes gather ``matrices`` in bf16. Compiled layers round their own: hooks would cut their graphs."""
    return precision == "bf16" and not compiled


def matrices(layer: nn.Module) -> list[nn.Module]:
    """Modules of a layer whose parameters autocast rounds, and which every forward calls."""
    sometimes = {mixer.get_parameter(name) for mixer, names in _reached_in_some_rows(layer) for name in names}
    rounded = [module for module in layer.modules() if type(module) in (nn.Linear, Tap, GroupedLinear)]
    return [module for module in rounded if sometimes.isdisjoint(module.parameters())]


def check_divisible(model: PreTrainedModel) -> None:
    """Raise ValueError, one line, if the parameters of a model cannot be divided."""
    require(
        isinstance(model, MemLMForCausalLM),
        f"hardware.shard: a {type(model).__name__} cannot be divided, only memlm's own decoder; use hardware=auto",
    )
    require(model.config.side is None, "hardware.shard: a side network is not divided; use hardware=auto")
    for name, parameter in model.named_parameters():
        fix = "its memory has a setting without it, or use hardware=auto"
        require(parameter.ndim > 0, f"hardware.shard: {name} is a single number, which cannot be divided; {fix}")


def _reached_in_some_rows(model: nn.Module) -> list[tuple[SequenceMixer, list[str]]]:
    """Mixers, and their trained parameters that only losses of the mixer reach, which some rows have."""
    found = []
    for module in model.modules():
        if isinstance(module, SequenceMixer):
            named, trained = getattr(module, "without_gradient", ()), dict(module.named_parameters())
            names = [name for name in named if name in trained and trained[name].requires_grad]
            if names:
                found.append((module, names))
    return found


class _Reached:
    """A hook of a mixer: these parameters get a gradient in every backward, of zeros where there is none.

    FSDP2 sums the gradients that a process has. If another has others, sums do not match, or never end.

    reached: whether there was another gradient since this was last set to False
    """

    def __init__(self, names: list[str]) -> None:
        self.names, self.reached = names, False

    # Dynamo gives the function a wrong output.
    @torch.compiler.disable
    def __call__(self, mixer: nn.Module, inputs: Any, output: MixerOutput) -> MixerOutput:
        if any(loss.requires_grad for loss in output.aux_losses.values()):
            self.reached = True
        parameters = (mixer.get_parameter(name) for name in self.names)
        return output._replace(y_BTD=_ZeroGradients.apply(output.y_BTD, *parameters))


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BTD: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sizes = [(p.shape, p.dtype, p.device) for p in parameters]
        return y_BTD.view_as(y_BTD)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, ...]:
        return (d_y, *(torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.sizes))
