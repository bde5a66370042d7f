"""One memory as a layer of any PyTorch model: ``memlm.layer("titans_lmm", hidden_size=384)``.

B batch, T tokens, D hidden.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from memlm.memory.base import Dims, SequenceMixer, build_mixer, checked, complete_settings, initialize
from memlm.memory.rows import Rows, most_documents
from memlm.memory.state import State, mapped, named
from memlm.roles import Roles
from memlm.settings import check_type, require


class LayerState(dict[str, Any]):
    """The state of a layer between two calls: the mixer's (``memlm.memory.state``), and ``position`` [B] of each row's
    next token. Tensors are batch first. A mixer of several parts keeps a dict for each part.

    A call never changes it in place, so one state can be continued twice. ``torch.save(dict(state), path)`` saves it,
    and a layer accepts a plain dict.
    """

    def to(self, device: torch.device | str) -> Self:
        """The state on another device; dtypes do not change."""
        return type(self)(mapped(lambda x: x.to(device), self))

    def detach(self) -> Self:
        """The state without its gradient history, for truncated backpropagation."""
        return type(self)(mapped(Tensor.detach, self))


class MemoryLayer(nn.Module):
    """A memory that mixes the tokens of a stream, built by ``memlm.layer``."""

    def __init__(self, mixer: SequenceMixer, dims: Dims) -> None:
        super().__init__()
        self.mixer, self.hidden_size = mixer, dims.hidden_size
        self._state_keys = {"position", *named(mixer.init_state(1, torch.device("cpu"), torch.float32))}

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        position_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        max_documents: int | None = None,
        roles: Roles | None = None,
        return_aux: bool = False,
    ) -> tuple[Tensor, LayerState] | tuple[Tensor, LayerState, dict[str, Tensor]]:
        """Mix the next T tokens of each stream. Any division of a stream into calls gives the same outputs.

        x: [B, T, D], normalised, for example by RMSNorm
        state: the state that the last call returned; None before the first token
        position_ids: int [B, T], for packed rows: the position of each token in its document; a 0 starts a document,
            which is independent of those before it. None: each row continues its document
        lengths: int [B], real tokens of each row. They come first; padding follows and has no effect. None: all
        max_documents: the most documents in a row; counted on the device if not given
        roles: for msa: the role of each token (``memlm.roles``); None: all are responses
        return_aux: also return the auxiliary losses of this call, such as the load balance of mom

        Returns y [B, T, D], unspecified at padding; the state after the last token; and with return_aux a dict of
        weighted losses [B]: add the sum of their means to the model's loss. Raises ValueError for inputs that do not
        fit the layer or each other.
        """
        require(
            x.ndim == 3 and x.shape[2] == self.hidden_size and x.is_floating_point(),
            f"x {x.dtype} {list(x.shape)} must be floating, [batch, tokens, hidden_size={self.hidden_size}]",
        )
        if state is not None:
            names = named(state)
            require(names.keys() == self._state_keys, f"state of {', '.join(names)} is of another kind of layer")
            rows = len(state["position"])
            require(rows == len(x), f"state has {rows} rows, and x has {len(x)}; give the state of the same streams")
        if position_ids is not None:
            shape = list(position_ids.shape)
            require(shape == [*x.shape[:2]], f"position_ids {shape} must be {list(x.shape[:2])}, as x is")
        if roles is not None:
            roles.check(*x.shape[:2])
            require(roles.bank is None, "roles.bank: a layer alone asks no bank; ask it through the model")
        if lengths is not None:
            require(lengths.shape == x.shape[:1], f"lengths {list(lengths.shape)} must be [{len(x)}], one of each row")
            padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            # A NaN in padding would pass through a weight of 0.
            x = x.masked_fill(padding[..., None], 0.0)
        documents, start = 1, None if state is not None else 0
        if state is None:
            state = {"position": torch.zeros(len(x), dtype=torch.int64, device=x.device)}
            state |= self.mixer.init_state(len(x), x.device, x.dtype)
        before = state["position"]
        if position_ids is not None:
            documents = most_documents(position_ids, lengths, max_documents, before)
            # Positions of padding may be anything.
            position_ids = position_ids.clamp(min=0)
        roles = None if roles is None else roles.counted(position_ids, lengths)
        # A given state may have been cut or changed, so the host cannot know its positions.
        rows = Rows(x.shape[1], before, start, position_ids, lengths, documents, roles, metrics=False)
        own = {name: value for name, value in state.items() if name != "position"}
        out = checked(self.mixer(x, own, rows), self.mixer, x)
        after = LayerState({"position": rows.after_B, **out.state})
        return (out.y_BTD, after, out.aux_losses) if return_aux else (out.y_BTD, after)


def layer(
    kind: str,
    hidden_size: int,
    *,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    rope_theta: float = 10000.0,
    attn_implementation: str = "sdpa",
    initializer_range: float = 0.02,
    **settings: Any,
) -> MemoryLayer:
    """A memory as a layer for a model of your own.

    >>> import torch, memlm
    >>> layer = memlm.layer("titans_lmm", hidden_size=384)
    >>> x, x_next = torch.randn(2, 100, 384), torch.randn(2, 1, 384)
    >>> y, state = layer(x)
    >>> y_next, state = layer(x_next, state)  # equal to the last token of layer(torch.cat([x, x_next], 1))
    >>> y.shape, y_next.shape
    (torch.Size([2, 100, 384]), torch.Size([2, 1, 384]))

    It only mixes tokens. In a transformer it stands in place of attention: ``x = x + layer(norm(x))[0]``.

    kind: a memory of ``memlm.memory``, such as "titans_mag", "gated_delta_net", "mom" or "attention"
    hidden_size: channels of inputs and outputs, D
    num_attention_heads: for kinds with attention; None: heads of 64 channels, or one head if 64 does not divide
    num_key_value_heads: None: num_attention_heads
    rope_theta, attn_implementation: rotary base and backend ("sdpa", "flex_attention") of that attention
    initializer_range: standard deviation of the initial weights of projections
    settings: any setting of the kind, named as in ``configs/memory/*.yaml`` and with the defaults of its ``Config``

    Raises ValueError in one line, with the value and a fix, for an unknown kind or setting and sizes that do not fit.
    See ``MemoryLayer.forward`` for the arguments of a call: padding, packed rows, auxiliary losses.
    """
    given = {"hidden_size": hidden_size, "num_attention_heads": num_attention_heads}
    for name, value in (given | {"num_key_value_heads": num_key_value_heads}).items():
        check_type(value, int if name == "hidden_size" else int | None, f"layer.{name}")
        require(value is None or value >= 1, f"layer.{name}={value} must be at least 1")
    heads = num_attention_heads or (hidden_size // 64 if hidden_size % 64 == 0 else 1)
    groups = num_key_value_heads or heads
    require(
        hidden_size % (2 * heads) == 0,
        f"layer.hidden_size={hidden_size} does not divide into {heads} heads of an even size; change one of them",
    )
    require(heads % groups == 0, f"layer.num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    dims = Dims(hidden_size, heads, groups, hidden_size // heads, rope_theta, attn_implementation=attn_implementation)
    mixer = build_mixer(complete_settings({"kind": kind, **settings}, "layer"), dims, 0, "layer")
    # Children come before their parents, so a mixer initialises its own parameters last.
    mixer.apply(lambda module: initialize(module, initializer_range))
    return MemoryLayer(mixer, dims)
