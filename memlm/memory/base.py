"""The memory slot: what a mixer is given, what it returns, and how its configuration is read.

A memory is a module of this package with a dataclass ``Config`` and a ``Mixer(SequenceMixer)``; the
module's name is its ``kind``. Nothing else has to be told about it.
"""

import dataclasses
import importlib
import pkgutil
import types
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import GroupedLinear, RMSNorm, ShortConv
from memlm.settings import build_config, suggest
from memlm_kernels import grid

State = dict[str, Tensor]

# Without this line Hydra puts a memory's settings where nothing reads them.
PACKAGE = "a YAML of configs/memory begins with '# @package model.mixers.memory'"


@dataclass(frozen=True)
class Dims:
    """Sizes of the decoder that a mixer lives in."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    attn_implementation: str = "sdpa"


class RoleCounts(NamedTuple):
    """What is known of roles without the device.

    documents, longest: at most, documents that a row has tokens of, and tokens of one of them in this call
    within, outside: at most, tokens of a row within documents, and outside of any
    whole: whether some row may have all its tokens, or none, in one document
    sizes: of all rows together at most, documents of 1 token, of 2, of 3 or 4, of 5 to 8, ...
    """

    documents: int
    longest: int
    within: int
    outside: int
    whole: bool
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, doc_ids_BT: Tensor, positions_BT: Tensor | None, lengths_B: Tensor | None = None) -> "RoleCounts":
        """Counts, which asks the device once; the real tokens of a row stand first."""
        length = doc_ids_BT.shape[1]
        if length == 0:
            return cls(0, 0, 0, 0, True, ())
        place_T = torch.arange(length, device=doc_ids_BT.device)
        real_BT = torch.ones_like(doc_ids_BT, dtype=torch.bool)
        if lengths_B is not None:
            real_BT = place_T < lengths_B[:, None]
        within_BT = (doc_ids_BT > 0) & real_BT
        starts_BT = F.pad(doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1], (1, 0), value=True)
        if positions_BT is not None:
            starts_BT = starts_BT | (positions_BT == 0)
        ends_BT = within_BT & F.pad(starts_BT[:, 1:] | ~within_BT[:, 1:], (0, 1), value=True)
        size_BT = ends_BT * (place_T - (starts_BT * place_T).cummax(1).values + 1)
        documents_B, outside_B = ends_BT.sum(1), (real_BT & ~within_BT).sum(1)
        one_B = (documents_B <= 1) & (outside_B == 0)
        counts = [x.max() for x in (documents_B, size_BT, within_BT.sum(1), outside_B, one_B)]
        most = [2**i for i in range((length - 1).bit_length() + 1)]
        counts += [((size_BT > n // 2) & (size_BT <= n)).sum() for n in most]
        documents, longest, within, outside, one, *sizes = torch.stack([x.long() for x in counts]).tolist()
        return cls(documents, longest, within, outside, bool(one), tuple(sizes))


@dataclass(frozen=True)
class Roles:
    """What each token is to a memory of documents.

    of_BT: as in ``memlm.roles``; a document goes on as far as its number does
    found_BT: whether the query should find the document that a token is of; None: not known
    """

    of_BT: Tensor
    found_BT: Tensor | None
    counts: RoleCounts


class Retriever(Protocol):
    """Documents kept outside of a state, such as a ``MemoryBank``."""

    def candidates(self, layer_idx: int, q_BAHK: Tensor, asks_BA: Tensor, held_BC: Tensor) -> State:
        """A few documents that hold all that a layer's router can choose with these queries, without those of the
        numbers held (-1: none), as ``with_documents`` of ``memlm.memory.msa`` takes them. Asks the device.
        """


@dataclass(frozen=True)
class MixerContext:
    """Where the tokens of this call stand. Without a context every row goes on from its state, all tokens real.

    positions_BT: tokens before each one in its document; a 0 starts a document. None: go on from the state
    lengths_B: real tokens of each row; they come first (the decoder moves padding to the end). None: all
    max_documents: an upper bound on the documents that one row has tokens of, known without the device
    aligned: every row goes on from where a chunk of the memory ends, all tokens real, in the same document
    roles: for memories of documents, which are then parts of what is called a document here; None: all tokens
        are a response
    retriever: documents that stand, in the order of a sample, behind its leading template; None: no others
    """

    positions_BT: Tensor | None = None
    lengths_B: Tensor | None = None
    max_documents: int = 1
    aligned: bool = False
    roles: Roles | None = None
    retriever: Retriever | None = None

    @property
    def goes_on(self) -> bool:
        """Whether every token is of a response, in the document that its row is in."""
        return self.positions_BT is None and self.roles is None


class MixerOutput(NamedTuple):
    """What a mixer returns.

    y_BTD: the output; rows beyond ``lengths_B`` are unspecified
    state: where the next call goes on; batch-first tensors, ``position`` among them; never changed in place (keys that
        grow may have room behind them, which nobody sees: ``memlm.memory.kv``)
    aux_losses: already weighted, added to the training loss: [B], of each row, from its own tokens alone, so that a
        step's loss does not depend on how its rows are divided into calls and processes
    metrics: detached; scalars; or [B], a figure of each row, nan where it has none; or [B, T], of each token; the log
        shows their mean; of a call without tokens they mean nothing, and the decoder leaves them out
    """

    y_BTD: Tensor
    state: State
    aux_losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class SequenceMixer(nn.Module):
    """A token mixer with a state: attention, a memory, or both.

    long_term: True for a part that reads long-term memory; the memory-off ablation silences its output.
    starts_silent: parameters without which, as they are initialised, the mixer says the same: weights that lack them
        are a start for it (``train.init_from``).
    """

    long_term = False
    starts_silent: tuple[str, ...] = ()

    def forward(self, x_BTD: Tensor, state: State | None = None, ctx: MixerContext | None = None) -> MixerOutput:
        """Mix [B, T, D]; any division of a stream into calls gives the same outputs."""
        raise NotImplementedError

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before a document's first token; every tensor has ``batch_size`` rows."""
        raise NotImplementedError

    def idle_parameters(self) -> int:
        """How many of its parameters a token does not meet, where a router chooses among them."""
        return 0

    def reset_parameters(self) -> None:
        """Initialise what this module itself owns, with ``transformers.initialization`` only.

        Called after the children's; functions of that module leave loaded parameters alone.
        """


def checked(output: Any, mixer: nn.Module, x_BTD: Tensor) -> MixerOutput:
    """The output of a mixer for x. Raises ValueError where it is not what the slot takes."""
    wrong = None
    if not isinstance(output, MixerOutput):
        wrong = f"{type(output).__name__}; return MixerOutput(y_BTD, state, aux_losses, metrics) of memlm.memory.base"
    elif output.y_BTD.shape != x_BTD.shape:
        wrong = f"y_BTD {list(output.y_BTD.shape)}; make it {list(x_BTD.shape)}, as the input is"
    elif "position" not in output.state:
        wrong = f"a state of {', '.join(output.state) or 'nothing'}; add position, [B], of each row's next token"
    elif unlike := [name for name, x in output.aux_losses.items() if x.shape != x_BTD.shape[:1]]:
        wrong = f"aux_losses {unlike[0]} {list(output.aux_losses[unlike[0]].shape)}; make it [B], a loss of each row"
    if wrong is not None:
        raise ValueError(f"{type(mixer).__module__}.{type(mixer).__name__}.forward returned {wrong}")
    return output


@torch.no_grad()
def initialize(module: nn.Module, std: float) -> None:
    """Initialise what a module itself owns; called on children before their parents, so that a mixer comes last."""
    if isinstance(module, nn.Linear | nn.Embedding | GroupedLinear):
        init.normal_(module.weight, std=std)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            init.zeros_(bias)
    elif isinstance(module, RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, SequenceMixer | ShortConv):
        module.reset_parameters()


def token_positions(x_BTD: Tensor, state: State, ctx: MixerContext) -> Tensor:
    """Place of each token in its document, [B, T]."""
    if ctx.positions_BT is not None:
        return ctx.positions_BT
    return state["position"][:, None] + torch.arange(x_BTD.shape[1], device=x_BTD.device)


def most_documents(positions_BT: Tensor, lengths_B: Tensor | None, given: int | None, next_B: Tensor) -> int:
    """The most documents in a row, at most those given, or counted, which asks the device. Raises ValueError if there
    are more, and for places that neither start a document nor follow the one before, of the first next_B; where the
    device is not asked, the error is the device's.
    """
    length = positions_BT.shape[1]
    if positions_BT.numel() == 0:
        return 1
    starts_BT = positions_BT == 0
    follows_BT = torch.cat([next_B[:, None], positions_BT[:, :-1] + 1], 1)
    astray_BT = (positions_BT != follows_BT) & ~starts_BT
    if lengths_B is not None:
        real_BT = torch.arange(length, device=positions_BT.device) < lengths_B[:, None]
        starts_BT, astray_BT = starts_BT & real_BT, astray_BT & real_BT
    counted, astray = 1 + starts_BT[:, 1:].sum(1).max(), astray_BT.sum()
    few = f"max_documents={given} is less than the documents that position_ids start in a row; count them"
    if positions_BT.device.type != "cpu" and given is not None:
        torch._assert_async(astray == 0, "position_ids neither start a document at 0 nor go on from where it was")
        torch._assert_async(counted <= given, few)
        return min(given, length)
    most, strays = torch.stack([counted, astray]).tolist()
    if strays:
        row, t = astray_BT.nonzero()[0].tolist()
        found, follows = int(positions_BT[row, t]), int(follows_BT[row, t])
        raise ValueError(f"position_ids: {found} in row {row} must be {follows}, to go on, or 0, to start a document")
    if given is not None and given < most:
        raise ValueError(few)
    return most


def next_position(positions_BT: Tensor, state: State, ctx: MixerContext) -> Tensor:
    """Place of the token that follows each row's last real one, [B]."""
    return grid.next_position(positions_BT, ctx.lengths_B, state["position"])


def substate(state: State, name: str) -> State:
    """The part of a state that ``joined`` put under ``name``."""
    return {key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(f"{name}.")}


def joined(parts: dict[str, State]) -> State:
    """The states of a composed mixer's parts under their names, at the position of the first."""
    position = next(iter(parts.values()))["position"]
    return {"position": position} | {f"{name}.{key}": x for name, part in parts.items() for key, x in part.items()}


def kinds() -> list[str]:
    """Names of the modules of this package that hold a memory."""
    package = importlib.import_module(__package__ or "memlm.memory")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "Mixer")]


def load_kind(kind: str, key: str) -> types.ModuleType:
    """The module of a kind; ``key`` is the configuration key that named it, for the error."""
    if not isinstance(kind, str) or kind not in kinds():
        raise ValueError(f"{key}.kind={kind!r} is unknown; {suggest(str(kind), kinds())}")
    return importlib.import_module(f"memlm.memory.{kind}")


def build_mixer(settings: dict[str, Any], dims: Dims, layer_idx: int, key: str) -> SequenceMixer:
    """The mixer that ``{kind: ..., **settings}`` describes."""
    module = load_kind(settings["kind"], key)
    config = build_config(module.Config, {k: v for k, v in settings.items() if k != "kind"}, key)
    try:
        return module.Mixer(config, dims, layer_idx)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None


def complete_settings(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """The same settings with every default written out, so that a checkpoint does not depend on defaults."""
    if not isinstance(settings, dict):
        raise ValueError(f"{key}={settings!r} must be the settings of a mixer, {{kind: ..., ...}}; {PACKAGE}")
    if "kind" not in settings:
        raise ValueError(f"{key}.kind is missing; one of: {', '.join(kinds())}; {PACKAGE}")
    module = load_kind(settings["kind"], key)
    for name, value in settings.items():
        if isinstance(value, int | float) and not abs(value) < 2**31:
            raise ValueError(f"{key}.{name}={value!r:.80} must be a number below {2**31}")
    config = build_config(module.Config, {k: v for k, v in settings.items() if k != "kind"}, key)
    return {"kind": settings["kind"], **dataclasses.asdict(config)}
