"""A small network beside a frozen decoder: it reads the decoder's activations, and it alone is trained.

h_0 is the embedding of a token, h_i the output of layer i of the L frozen layers, s_j that of side layer j. The frozen
layers run without gradients, so their activations are not kept. Embeddings, final norm and head serve both networks,
frozen too. ``form`` selects the network:

- "longmem" (arXiv:2306.07174), L / 2 layers of the decoder's width, which begin as copies of every second layer:

      s_0 = h_0        s_j+1 = side_j(s_j) + h_2j+2 - h_2j,  side_j a copy of layer 2j+1

  One of them, at 0.7 of the depth, also reads the past beyond its window: chunks of keys and values that the frozen
  layer of which it is a copy has made. These never age, because nothing trains that layer. A head mixes them with its
  own window by a gate, y = (1 - g) window + g chosen, g = 1/2 at first, as in the release. The paper's heads each
  choose their tokens; here a group of heads that share keys does, by the mean keys of chunks. The release also trains
  a final norm of the side network's own.
- "ladder" (LST, arXiv:2206.06522), L layers whose width, heads and MLP are ``reduction`` times smaller:

      s = W_0 h_0        s = side_i(g_i s + (1 - g_i) W_i+1 h_i+1),  g_i = sigmoid(a_i / 0.1)        h_L + W_up norm(s)

  with W_up = 0 at first, so it begins as the frozen decoder. The release has W_up norm(s) alone, or a gate between the
  two, and copies pruned weights; here the layers are new.

B batch, T tokens, D hidden, H query heads in G groups, K head dim, L keys, N chunks, J choices.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import RMSNorm
from memlm.memory import attention, chunk_sparse
from memlm.memory.base import Dims, MixerOutput
from memlm.memory.chunk_sparse.layout import Chunks, bounded, filled
from memlm.memory.kv import append
from memlm.memory.parts import ReadEntries, memory_share
from memlm.memory.rows import Rows
from memlm.memory.state import State
from memlm.settings import build_config, require
from memlm_kernels import chunk_topk
from memlm_kernels.segments import exact

# The depth of the layer that reads chunks, as a share.
_DEPTH = 0.7
# The temperature of the ladder's gates.
_TEMPERATURE = 0.1


@dataclass(frozen=True)
class LongMemConfig:
    """chunk_size: tokens of a chunk, at most the window of the layer that reads them.
    top_k: chunks that a token chooses; 0 for none: the network without its bank.
    max_chunks: the chunks that a token chooses from, the last ones; 0 for all. The state then has a fixed size.
    """

    chunk_size: int = 4
    top_k: int = 16
    max_chunks: int = 0

    def __post_init__(self) -> None:
        require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (no bank) or more")
        if self.top_k:
            self.reader(self.chunk_size)

    def reader(self, window_size: int) -> chunk_sparse.Config:
        """The settings of ``chunk_sparse`` that describe the choice. Raises ValueError if they do not fit a window."""
        values = {**dataclasses.asdict(self), "window_size": window_size}
        return chunk_sparse.Config(**values, fusion="head_gate", far_positions=False)


@dataclass(frozen=True)
class LadderConfig:
    """reduction: the decoder's width, head dim and MLP (rounded up) are this many times those of the ladder."""

    reduction: int = 8

    def __post_init__(self) -> None:
        require(self.reduction >= 1, f"reduction={self.reduction} must be at least 1")


_CONFIGS: dict[str, type] = {"longmem": LongMemConfig, "ladder": LadderConfig}


class Decoder(Protocol):
    """The call of the decoder in which a side network runs.

    layers: the frozen ones
    """

    layers: Sequence[Any]

    def frozen(self, i: int, h_BTD: Tensor) -> Tensor:
        """The output of frozen layer i, without gradients."""

    def keys_values(self, i: int, h_BTD: Tensor) -> dict[str, Tensor]:
        """Keys, before rotation, and values of frozen layer i, from its input: k and v [B, T, G, K]."""

    def side(self, j: int, s_BTD: Tensor, given: State | None = None) -> Tensor:
        """The output of side layer j, to whose state ``given`` is added."""


def is_own(name: str) -> bool:
    """Whether a parameter of a model is the side network's, by its name."""
    return ".side." in f".{name}"


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with every default written out. Raises ValueError with the key for wrong ones."""
    form = settings.get("form")
    require(form in _CONFIGS, f"model.side.form={form!r} must be one of {', '.join(_CONFIGS)}")
    given = {name: value for name, value in settings.items() if name != "form"}
    return {"form": form, **dataclasses.asdict(build_config(_CONFIGS[form], given, "model.side"))}


class Side(nn.Module):
    """A side network; ``layers`` are decoder layers, each with a state."""

    layers: nn.ModuleList

    def forward(self, h_BTD: Tensor, call: Decoder) -> Tensor:
        """The final hidden state, from the embeddings h_0."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise the parameters that this module itself owns, after its children."""

    def copy_from(self, layers: Sequence[nn.Module]) -> None:
        """Begin with weights of the frozen layers."""


class LongMem(Side):
    def __init__(self, config: Any, settings: LongMemConfig, layer: Callable[[Any, int], nn.Module]) -> None:
        super().__init__()
        count, odd = divmod(config.num_hidden_layers, 2)
        fix = "longmem has a layer for every two; use form: ladder, or an even number"
        require(not odd, f"model.side: the decoder has {config.num_hidden_layers} layers; {fix}")
        self.layers = nn.ModuleList(layer(config, 2 * j + 1) for j in range(count))
        self.reads = int(_DEPTH * count) if settings.top_k else None
        if self.reads is None:
            return
        of, name = self.layers[self.reads], config.layer_mixers()[2 * self.reads + 1]
        kind = config.mixers[name]["kind"]
        fits = type(of.mixer) is attention.Mixer and of.mixer.config.window_size is not None
        fix = "a bank needs attention with a window there; use model.side.top_k=0"
        require(fits, f"model.side: layer {2 * self.reads + 1} of the decoder has mixer {name!r}, {kind}; {fix}")
        try:
            choice = settings.reader(of.mixer.config.window_size)
        except ValueError as error:
            raise ValueError(f"model.side: layer {2 * self.reads + 1} of the decoder: {error}") from None
        of.mixer = BankReader(of.mixer.config, choice, config.dims(), 2 * self.reads + 1)

    def forward(self, h_BTD: Tensor, call: Decoder) -> Tensor:
        s_BTD = h_BTD
        for j in range(len(self.layers)):
            middle_BTD = call.frozen(2 * j, h_BTD)
            given = {"given": call.keys_values(2 * j + 1, middle_BTD)} if j == self.reads else None
            after_BTD = call.frozen(2 * j + 1, middle_BTD)
            s_BTD = call.side(j, s_BTD, given) + (after_BTD - h_BTD)
            h_BTD = after_BTD
        return s_BTD

    def copy_from(self, layers: Sequence[nn.Module]) -> None:
        for j, layer in enumerate(self.layers):
            layer.load_state_dict(layers[2 * j + 1].state_dict(), strict=j != self.reads)


class BankReader(attention.Mixer):
    """Attention to its own window, whose heads also read chosen chunks of another layer's keys and values.

    The state holds them under "bank"; those of the call's tokens come with it, under "given".
    """

    at_once = has_room = False

    def __init__(self, config: attention.Config, choice: chunk_sparse.Config, dims: Dims, layer_idx: int) -> None:
        super().__init__(config, dims, layer_idx)
        self.chosen, self.any_length, self.grows = choice, False, not choice.max_chunks
        self.choice = ReadEntries()
        self.head_gate = chunk_sparse.HeadGate(dims.num_attention_heads, "sigmoid")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # The constructor of attention calls this too.
        if hasattr(self, "head_gate"):
            init.zeros_(self.head_gate.bias)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = (batch_size, 0, self.dims.num_key_value_heads, self.dims.head_dim)
        none = torch.zeros(shape, device=device, dtype=dtype)
        bank: State = {"k": none, "v": none, "pooled": {"k": exact(none)}}
        bank = bounded(bank, self.chosen) if self.chosen.max_chunks else bank
        return super().init_state(batch_size, device, dtype) | {"bank": bank}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        window_BTHK, (q_BTHK, *_), after = self.heads(x_BTD, state, rows)
        if rows.length == 0:
            return MixerOutput(self.output(window_BTHK), {**after, "bank": state["bank"]}, {}, {})
        chosen_BTHK, knows_BTH, after["bank"] = self._read(q_BTHK, state["given"], state["bank"], rows)
        gate_BTH1 = (self.head_gate() * knows_BTH)[..., None].to(window_BTHK.dtype)
        metrics = {}
        if rows.metrics:
            share = memory_share(gate_BTH1 * chosen_BTHK, (1 - gate_BTH1) * window_BTHK)
            metrics = {"gate": gate_BTH1.detach().mean(), "memory_share": share}
        y_BTHK = torch.lerp(window_BTHK, chosen_BTHK, gate_BTH1)
        return MixerOutput(self.output(y_BTHK), after, {}, metrics)

    def _read(self, q_BTHK: Tensor, given: State, bank: State, rows: Rows) -> tuple[Tensor, Tensor, State]:
        """Attention to the chosen chunks, zeros for a token without; which have some, [B, T, H]; the bank after it.

        Nothing is rotated: far tokens have no place, as in LongMem.
        """
        config = self.chosen
        if config.max_chunks and rows.start is not None:
            bank = filled(bank, config, rows.start)
        means_BNGK, past = bank["pooled"]["k"], bank["v"].shape[1]
        kept = means_BNGK.shape[1]
        chunks = rows.once("side", lambda: Chunks.of(rows, past, kept, config))
        (k_BLGK, k), (v_BLGK, v) = (append(bank[name], given[name], rows.lengths_B) for name in ("k", "v"))
        means_BNGK, means = chunks.means(k_BLGK, means_BNGK, past, config.chunk_size)
        spans = chunks.first_BT, chunks.end_BT
        index_BTGJ = self.choice(chunk_topk(q_BTHK, means_BNGK, top_k=config.top_k, spans=spans) + 1) - 1
        read = chunks.read_alone((q_BTHK, k_BLGK), v_BLGK, index_BTGJ, rows, config.chunk_size)
        bank = {"k": k, "v": v, "pooled": {"k": means}}
        return *read, bounded(bank, config) if config.max_chunks else bank


class Rung(nn.Module):
    """The input of a ladder's layer: s and the narrowed h, mixed by a gate, 1/2 at first."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, narrow, bias=False)
        self.logit = nn.Parameter(torch.zeros(1))

    def forward(self, s_BTD: Tensor, h_BTD: Tensor) -> Tensor:
        return torch.lerp(self.down_proj(h_BTD), s_BTD, torch.sigmoid(self.logit / _TEMPERATURE).to(s_BTD.dtype))


class Ladder(Side):
    def __init__(self, config: Any, settings: LadderConfig, layer: Callable[[Any, int], nn.Module]) -> None:
        super().__init__()
        narrow, by = copy.copy(config), settings.reduction
        for name, into in (("hidden_size", ""), ("head_dim", " into an even number")):
            size, rest = divmod(whole := getattr(config, name), by)
            fits = not rest and not (into and size % 2)
            require(fits, f"model.side.reduction={by} must divide model.{name}={whole}{into}; choose another")
            setattr(narrow, name, size)
        narrow.intermediate_size = -(-config.intermediate_size // by)
        self.first_proj = nn.Linear(config.hidden_size, narrow.hidden_size, bias=False)
        count = config.num_hidden_layers
        self.rungs = nn.ModuleList(Rung(config.hidden_size, narrow.hidden_size) for _ in range(count))
        self.layers = nn.ModuleList(layer(narrow, i) for i in range(count))
        self.norm = RMSNorm(narrow.hidden_size, eps=config.rms_norm_eps)
        self.up_proj = nn.Linear(narrow.hidden_size, config.hidden_size, bias=False)

    def reset_parameters(self) -> None:
        init.zeros_(self.up_proj.weight)
        for rung in self.rungs:
            init.zeros_(rung.logit)

    def forward(self, h_BTD: Tensor, call: Decoder) -> Tensor:
        s_BTD = self.first_proj(h_BTD)
        for i, rung in enumerate(self.rungs):
            h_BTD = call.frozen(i, h_BTD)
            s_BTD = call.side(i, rung(s_BTD, h_BTD))
        return h_BTD + self.up_proj(self.norm(s_BTD))


def build(config: Any, layer: Callable[[Any, int], nn.Module]) -> Side:
    """The side network of a configuration with ``side``; layer: makes a decoder layer. Raises ValueError if they do
    not fit each other.
    """
    require(config.taps is None, f"model.side: the decoder has model.taps={config.taps}; name one without them")
    settings = {name: value for name, value in config.side.items() if name != "form"}
    form = {"longmem": LongMem, "ladder": Ladder}[config.side["form"]]
    return form(config, _CONFIGS[config.side["form"]](**settings), layer)
