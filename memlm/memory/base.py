"""The memory slot: what a mixer is given, what it returns, and how its configuration is read.

A memory is a module of this package with a dataclass ``Config`` and a ``Mixer(SequenceMixer)``; the
module's name is its ``kind``. Nothing else has to be told about it. An installed package adds a memory by an entry
point (``memlm.plugins``).
"""

import dataclasses
import importlib
import pkgutil
import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memlm import plugins
from memlm.layers import GroupedLinear, RMSNorm, ShortConv
from memlm.memory.rows import Rows, State
from memlm.settings import build_config, require

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


class MixerOutput(NamedTuple):
    """What a mixer returns.

    y_BTD: the output; rows beyond ``lengths_B`` are unspecified
    state: from which the next call goes on; batch-first tensors, never changed in place (keys that grow may have room
        behind them, which nobody sees: ``memlm.memory.kv``)
    aux_losses: already weighted, added to the training loss: [B], of each row, from its own tokens alone, so that a
        step's loss does not depend on how its rows are divided into calls and processes
    metrics: made where ``rows.metrics`` asks; detached; scalars; or [B], a figure of each row, nan where it has none;
        or [B, T], of each token; the log shows their mean; of a call without tokens they mean nothing, and the
        decoder leaves them out
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

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        """Mix [B, T, D]; any division of a stream into calls gives the same outputs.

        state: as ``init_state`` or an earlier call returned it; rows: where the tokens of this call stand
        """
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
    elif not isinstance(output.state, dict):
        wrong = f"a state that is a {type(output.state).__name__}; make it a dict of tensors with a row for each of x"
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


def substate(state: State, name: str) -> State:
    """The part of a state that ``joined`` put under ``name``."""
    return {key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(f"{name}.")}


def joined(parts: dict[str, State]) -> State:
    """The states of a composed mixer's parts, under their names."""
    return {f"{name}.{key}": x for name, part in parts.items() for key, x in part.items()}


def kinds() -> list[str]:
    """Names of all memories: modules of this package that hold one, and those of installed packages."""
    return [*_own_kinds(), *plugins.names("memlm.memory")]


def _own_kinds() -> list[str]:
    package = importlib.import_module(__package__ or "memlm.memory")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "Mixer")]


def load_kind(kind: str, key: str) -> types.ModuleType:
    """The module of a kind, from here or from an installed package (``memlm.plugins``).

    key: the configuration key that named it. Raises ValueError, naming it, for a kind that cannot be loaded.
    """
    module = plugins.load("memlm.memory", kind, _own_kinds(), f"{key}.kind={kind!r}")
    if module is None:
        return importlib.import_module(f"memlm.memory.{kind}")
    whole = hasattr(module, "Config") and hasattr(module, "Mixer")
    require(
        whole, f"{key}.kind={kind!r}: {module.__name__} must have Config and Mixer, as a module of memlm.memory has"
    )
    return module


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
