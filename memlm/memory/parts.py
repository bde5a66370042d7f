"""Parts that several memories share.

B batch, T tokens, D hidden, C channels, W convolution width; H heads of size K, N streams of keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import RMSNorm, ShortConv, products
from memlm.memory.base import Dims
from memlm_kernels.segments import exact


class Recalled(nn.Module):
    """The identity on the memory's part of an output; the memory-off ablation replaces it by zeros."""

    long_term = True

    def forward(self, y_BTD: Tensor) -> Tensor:
        return y_BTD


class ReadEntries(nn.Module):
    """The identity on which entries a token reads: their numbers, counted from 1, or a mask. The memory-off ablation
    replaces them by zeros, which mean none.
    """

    long_term = True

    def forward(self, number: Tensor) -> Tensor:
        return number


class Parameters(nn.Module):
    """Parameters that other modules read. They are read by a call, so that tools that offload weights can load
    them.
    """

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = shapes
        for i, shape in enumerate(shapes):
            self.register_parameter(str(i), nn.Parameter(torch.empty(shape)))

    def forward(self) -> list[nn.Parameter]:
        return [getattr(self, str(i)) for i in range(len(self.shapes))]


class BranchGate(nn.Module):
    """g * norm(memory) + (1 - g) * norm(attention), g = sigmoid(W x + b), one per channel; 1/2 at first.

    The paper multiplies the two normalised branches. With the convex gate, either branch works if the other is zero.
    """

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.memory_norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.gate = nn.Linear(dims.hidden_size, dims.hidden_size)

    def reset_parameters(self) -> None:
        init.zeros_(self.gate.weight)
        init.zeros_(self.gate.bias)

    def forward(
        self, x_BTD: Tensor, seen_BTD: Tensor, recalled_BTD: Tensor, told: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the output, and metrics if ``told``."""
        logits_BTD, seen_BTD = self.gate(x_BTD), self.attention_norm(seen_BTD)
        if not told:
            return self.memory_norm(recalled_BTD, logits_BTD, seen_BTD), {}
        gate_BTD, recalled_BTD = torch.sigmoid(logits_BTD), self.memory_norm(recalled_BTD)
        share = memory_share(gate_BTD * recalled_BTD, (1 - gate_BTD) * seen_BTD)
        metrics = {"gate": gate_BTD.detach().mean(-1), "memory_share": share}
        return torch.lerp(seen_BTD, recalled_BTD, gate_BTD), metrics


def gate_logits(gates: nn.Module | None, x_BTD: Tensor) -> Tensor:
    """The output of an ``ExactLinear``, or of a module that replaces it, in fp32 or more. None: no gates."""
    return x_BTD.new_zeros(*x_BTD.shape[:-1], 0) if gates is None else exact(*products(x_BTD, gates))


@torch.no_grad()
def memory_share(recalled: Tensor, seen: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """The memory's share of a sum, |recalled| / (|recalled| + |seen|), 0 to 1; norms along ``dim`` (None: of all).

    It covers everything that the memory-off ablation removes, also the query that a memory with a norm passes through
    (``known_share`` of ``titans`` separates the two).
    """
    recalled, seen = (torch.linalg.vector_norm(x, dim=dim) for x in (recalled, seen))
    return recalled / (recalled + seen).clamp(min=torch.finfo(seen.dtype).tiny)


def join_softmax(streams: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of several streams, from the outputs o [B, T, H, K] and the log-sum-exps lse [B, T, H]
    of a softmax over each::

        share = softmax over the streams of lse        o = sum of share o

    A stream whose lse is -inf, or far below the others', has the share 0; one stream at least must have a key.
    Returns o in the type of the outputs and the shares [B, T, H, N]. FlashAttention joins its blocks of keys in this
    way (arXiv:2205.14135).
    """
    share_BTHN = torch.stack([exact(lse) for _, lse in streams], -1).softmax(-1)
    o_BTHNK = torch.stack([o for o, _ in streams], 3)
    return (share_BTHN[..., None] * o_BTHNK).sum(3).to(o_BTHNK.dtype), share_BTHN


def top_choices(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest along the last dimension; of equal values the first, in any call."""
    return scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]


def start_delayed(conv: ShortConv, queries: int, keys: int) -> None:
    """The engineered initialisation for associative recall: of channels [queries | keys | values], each key channel
    looks a random 0 to W - 1 tokens back, and the others at the token itself.
    """
    width = conv.width
    taps = torch.zeros(conv.channels, width)
    taps[:, -1] = 1.0
    delayed = slice(queries, queries + keys)
    taps[delayed] = 0.1 * torch.randn(keys, width)
    taps[queries + torch.arange(keys), torch.randint(width, (keys,))] += 1.0
    init.copy_(conv.weight, taps)
