"""A forward of a decoder with a memory: the facts of its tokens, read once, and the results of its layers.

B batch, T tokens, D hidden, N keys: those kept from earlier calls, then this call's.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from memlm.attached import window
from memlm.attached.cache import StateLayer, check, own, state_layer
from memlm.layers import RMSNorm
from memlm.memory.base import Dims, build_mixer, checked, initialize
from memlm.memory.rows import Padding, Rows
from memlm.memory.state import State
from memlm.settings import require
from memlm.versions import CACHES

# The keyword by which a call reaches the layers. A keyword is also held by the closures of gradient checkpointing,
# which run in another thread on a GPU.
KEY = "memlm_call"


@dataclass(frozen=True)
class Settings:
    """An attached memory.

    memory: the settings of its kind; layers: numbers of the layers that have it
    window, sinks: tokens that full attention sees, the latest and the first; None: all
    dtype: name of the memory's dtype
    """

    memory: dict[str, Any]
    layers: list[int]
    window: int | None
    sinks: int
    dtype: str


class Attached(nn.Module):
    """A memory of one layer, a child of its attention. norm: the memory's input has unit size in every family."""

    def __init__(self, settings: dict[str, Any], dims: Dims, layer: int, std: float) -> None:
        super().__init__()
        self.layer = layer
        self.norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.mixer = build_mixer(settings, dims, layer, "memory")
        # Closed: the model's outputs are those of the backbone, to the bit.
        self.gate = nn.Parameter(torch.zeros(dims.hidden_size))
        # Children come before their parents, so a mixer initialises its own parameters last.
        self.apply(lambda module: initialize(module, std))

    def forward(self, x_BTD: Tensor, call: "Call") -> Tensor:
        """gate * memory(norm(x)), [B, T, D]."""
        hook = getattr(self, "_hf_hook", None)
        require(
            not getattr(hook, "offload", False) or hook.place_submodules,
            "the memory was offloaded; offload the backbone before memlm.attach, or give preload_module_classes="
            f"[{type(self).__name__!r}]",
        )
        if x_BTD.shape[1] != call.rows.length:
            raise ValueError(
                f"layer {self.layer} runs {x_BTD.shape[1]} of {call.rows.length} tokens; a memory must see all"
            )
        x_BTD = x_BTD.to(self.gate.device, self.gate.dtype)
        rows, padding = call.rows.to(x_BTD.device), call.padding
        if padding is not None:
            padding = padding.to(x_BTD.device)
            x_BTD = padding.to_end(x_BTD)
        # All layers have one kind of memory, so they share the state before the first token.
        state = call.before.get(str(self.layer)) or rows.once(
            ("empty", x_BTD.dtype), lambda: self.mixer.init_state(len(x_BTD), x_BTD.device, x_BTD.dtype)
        )
        out = checked(self.mixer(self.norm(x_BTD), state, rows), self.mixer, x_BTD)
        call.after[str(self.layer)] = out.state
        call.aux_losses |= {f"layer{self.layer}/{name}": x for name, x in out.aux_losses.items()}
        y_BTD = self.gate * out.y_BTD
        return y_BTD if padding is None else padding.back(y_BTD)


@dataclass
class Call:
    """outer: arguments of the model around the decoder, its ``attention_mask``; None: there is no such model
    rows, padding: of the tokens; before, after: states by layer; aux_losses: as in ``MixerOutput``
    cache: the cache that the model was given, or that a window needs
    mask: for attention with a window, as its implementation takes it
    places: the places of the keys that a window keeps for the next call
    """

    outer: dict[str, Any] | None = None
    rows: Any = None
    padding: Padding | None = None
    before: State = field(default_factory=dict)
    after: State = field(default_factory=dict)
    aux_losses: dict[str, Tensor] = field(default_factory=dict)
    cache: Cache | None = None
    mask: Tensor | None = None
    places: Tensor | None = None

    def begin(self, decoder: nn.Module, settings: Settings, kwargs: dict[str, Any]) -> None:
        """Read the arguments of the decoder, and set those that a memory needs."""
        given = kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        require(given is not None, "give input_ids or inputs_embeds")
        batch, length, device = *given.shape[:2], given.device
        self.cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        held = None if self.cache is None else check(self.cache, settings, batch)
        self.before = held.states if held else {}
        seen = self.cache.get_seq_length() if self.before else 0
        # A number in a message would be a constant of compiled code, so messages are made when they are needed.
        if seen and not length:
            raise ValueError(
                f"input_ids: the memory has read {seen} tokens, and nothing is left of these; give generate all ids, "
                f"read and new, or the new ones with an attention_mask [batch, {seen} + new]"
            )
        facts: dict[str, Any] = {"start": 0}
        if self.before:
            facts = {"start": held.start, "before_B": self.before["position"].to(device)}
        else:
            facts["before_B"] = torch.zeros(batch, dtype=torch.int64, device=device)
        mask = kwargs.get("attention_mask")
        made = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
        if made and self.outer is not None:
            # Models of images and text make the decoder's masks by that of the rows.
            mask = self.outer["attention_mask"]
        self.padding = _padding(mask, length, seen)
        # Some families run their last layers for these tokens alone; the head leaves out the others too.
        kwargs.pop("logits_to_keep", None)
        if self.padding is not None:
            facts["lengths_B"] = self.padding.lengths_B
        elif mask is None and self.cache is None and length > 1:
            facts |= _packed(kwargs, batch, length, device)
        self.rows = Rows(length, **facts, metrics=False)
        if settings.window is not None:
            require(not made, f"{type(decoder).__name__} gets masks of its own form, and window= replaces them")
            window.begin(self, decoder, settings, kwargs)

    def end(self, settings: Settings, output: Any) -> None:
        """Store the states in the cache, if there is one."""
        cache = self.cache
        if cache is None:
            found = output.values() if isinstance(output, dict) else output
            cache = next((x for x in found if isinstance(x, Cache)), None)
        if cache is None or not self.after:
            return
        held = state_layer(cache)
        if held is None:
            held = StateLayer(settings)
            own(cache).layers.append(held)
        held.start, held.length = self.rows.next_start, cache.get_seq_length()
        held.states = {"position": self.rows.after_B, **self.after}
        if self.places is not None:
            held.states["places"] = self.places


def _padding(mask: Any, length: int, seen: int) -> Padding | None:
    """The padding of an attention_mask; None if there is none, so that the fast paths are open. It waits for the
    device, as the masks of transformers do.
    """
    if mask is None:
        return None
    # Backbones read a narrower mask as that of their first tokens.
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != seen + length:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask {shape} must be [batch, {seen + length}], 0 for padding: all tokens so far")
    mask_BT = mask[:, seen:].bool()
    return None if bool(mask_BT.all()) else Padding.of(mask_BT)


def _packed(kwargs: dict[str, Any], batch: int, length: int, device: torch.device) -> dict[str, Any]:
    """The documents of packed rows, by the rule of transformers: without a mask and without a cache, one begins where
    a position is not the one before plus 1.
    """
    positions = kwargs.get("position_ids")
    if positions is None:
        return {}
    if positions.ndim == 3:
        # Positions in images; only if there are four of them, the first are those in the text.
        if len(positions) != 4:
            return {}
        positions = positions[0]
    positions_BT = positions.expand(batch, length)
    starts_BT = torch.ones(batch, length, dtype=torch.bool, device=device)
    starts_BT[:, 1:] = positions_BT[:, 1:] != positions_BT[:, :-1] + 1
    most = int(starts_BT.sum(1).max())
    if most == 1:
        return {}
    # With a cache, which evaluation mode makes by itself, transformers' masks do not separate documents.
    require(not kwargs.get("use_cache"), "position_ids: packed rows cannot fill a cache; give use_cache=False")
    kwargs["use_cache"] = False
    token_T = torch.arange(length, device=device)
    return {"given_BT": token_T - (starts_BT * token_T).cummax(1).values, "start": None, "max_documents": most}


def settings_of(values: dict[str, Any]) -> Settings:
    """From a JSON file. Raises ValueError for missing or unknown keys."""
    names = {f.name for f in dataclasses.fields(Settings)}
    require(values.keys() == names, f"attached: has {', '.join(sorted(values))}; must have {', '.join(sorted(names))}")
    return Settings(**values)
