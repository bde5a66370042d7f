"""The memory slot: the inputs and outputs of a mixer, and its configuration.

A memory is a module of this package with a dataclass ``Config`` and a ``Mixer(SequenceMixer)``. The module's name is
its ``kind``; nothing else registers it. An installed package adds a memory by an entry point (``memlm.plugins``).
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
from memlm.layers import GroupedLinear, RMSNorm, Rope, ShortConv
from memlm.memory.rows import Rows
from memlm.memory.state import State
from memlm.settings import build_config, require

# Without this line Hydra puts a memory's settings into an unused key.
PACKAGE = "a YAML of configs/memory begins with '# @package model.mixers.memory'"


@dataclass(frozen=True)
class Dims:
    """Sizes of the decoder around a mixer.

    rope_frequencies, rope_scale: of an extended context, see ``Rope``
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    attn_implementation: str = "sdpa"
    rope_frequencies: tuple[float, ...] | None = None
    rope_scale: float = 1.0

    @property
    def rope(self) -> Rope:
        return Rope(self.head_dim, self.rope_theta, self.rope_frequencies, self.rope_scale)


class MixerOutput(NamedTuple):
    """The result of a mixer.

    y_BTD: the output; tokens from ``lengths_B`` on are unspecified
    state: the state for the next call (``memlm.memory.state``), never changed in place (room after keys that grow is
        invisible: ``memlm.memory.kv``)
    aux_losses: losses [B], already weighted, added to the training loss. Each entry depends on its own row alone, so a
        step's loss does not depend on how its rows are divided into calls and processes. With ``rows.stretches``, the
        mean over their processes is the row's loss
    metrics: detached; only if ``rows.metrics``. A scalar, [B] (nan where a row has none) or [B, T]; logs show the
        mean. The decoder drops the metrics of a call without tokens
    reads: those that ``SequenceMixer.publishes`` names, in its order, shaped as the output
    """

    y_BTD: Tensor
    state: State
    aux_losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    reads: tuple[Tensor, ...] = ()


class SequenceMixer(nn.Module):
    """A token mixer with a state: attention, a memory, or both.

    long_term: true for a part that reads long-term memory; the memory-off ablation replaces its output by zeros.
    any_length: true if torch.export can leave the number of tokens open; others loop over chunks in Python.
    at_once: true if the mixer itself exchanges all it needs with the processes that hold the rest of a row
        (``rows.stretches``); for others the decoder hands the state on, from process to process.
    grows: true if the state keeps every token.
    has_room: true if it then has ``rows.room`` places, filled or not, where that is given.
    starts_silent: names of parameters that have no effect at initialisation; ``train.init_from`` accepts weights
        without them.
    publishes: names of the reads of its memory that later layers may add (``model.taps``). They must be tensors that
        exist anyway, and zeros where parts with ``long_term`` give zeros.
    """

    long_term = False
    any_length = False
    at_once = False
    grows = False
    has_room = False
    starts_silent: tuple[str, ...] = ()
    publishes: tuple[str, ...] = ()

    def forward(self, x_BTD: Tensor, state: State, rows: Rows) -> MixerOutput:
        """Mix x [B, T, D]. Outputs must not depend on how a stream is divided into calls.

        state: from ``init_state`` or the last call; never None
        rows: positions, padding, documents and roles of this call's tokens
        """
        raise NotImplementedError

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before a document's first token; every tensor has ``batch_size`` rows."""
        raise NotImplementedError

    def idle_parameters(self) -> int:
        """The number of parameters that a token does not use, if a router chooses among them."""
        return 0

    def reset_parameters(self) -> None:
        """Initialise the parameters that this module itself owns, with ``transformers.initialization`` only.

        Runs after the children's. The functions of ``transformers.initialization`` leave loaded parameters alone.
        """


def checked(output: Any, mixer: nn.Module, x_BTD: Tensor) -> MixerOutput:
    """The output of a mixer for x. Raises ValueError if it does not fit the slot."""
    wrong, publishes = None, getattr(mixer, "publishes", ())
    if not isinstance(output, MixerOutput):
        wrong = f"{type(output).__name__}; return MixerOutput(y_BTD, state, aux_losses, metrics) of memlm.memory.base"
    elif output.y_BTD.shape != x_BTD.shape:
        wrong = f"y_BTD {list(output.y_BTD.shape)}; make it {list(x_BTD.shape)}, as the input is"
    elif not isinstance(output.state, dict):
        wrong = f"a state that is a {type(output.state).__name__}; make it a dict of tensors with a row for each of x"
    elif unlike := [name for name, x in output.aux_losses.items() if x.shape != x_BTD.shape[:1]]:
        wrong = f"aux_losses {unlike[0]} {list(output.aux_losses[unlike[0]].shape)}; make it [B], a loss of each row"
    elif [x.shape for x in output.reads] != [x_BTD.shape] * len(publishes):
        given = [list(x.shape) for x in output.reads]
        wrong = f"reads {given}; make it {list(x_BTD.shape)} for each of publishes={publishes}"
    if wrong is not None:
        raise ValueError(f"{type(mixer).__module__}.{type(mixer).__name__}.forward returned {wrong}")
    return output


@torch.no_grad()
def initialize(module: nn.Module, std: float) -> None:
    """Initialise a module's own parameters. Children come before their parents, so a mixer comes last."""
    if isinstance(module, nn.Linear | nn.Embedding | GroupedLinear):
        init.normal_(module.weight, std=std)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            init.zeros_(bias)
    elif isinstance(module, RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, SequenceMixer | ShortConv):
        module.reset_parameters()


def kinds() -> list[str]:
    """Names of all memories: modules of this package that hold one, and those of installed packages."""
    return [*_own_kinds(), *plugins.names("memlm.memory")]


def _own_kinds() -> list[str]:
    package = importlib.import_module(__package__ or "memlm.memory")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "Mixer")]


def load_kind(kind: str, key: str) -> types.ModuleType:
    """The module of a kind, from this package or an installed one (``memlm.plugins``).

    key: the configuration key that named it

    Raises ValueError with the key if the kind cannot be loaded.
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
    """The mixer described by ``{kind: ..., **settings}``. Raises ValueError with the key, the value and a fix."""
    module = load_kind(settings["kind"], key)
    config = build_config(module.Config, {k: v for k, v in settings.items() if k != "kind"}, key)
    try:
        return module.Mixer(config, dims, layer_idx)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None


def complete_settings(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """The settings with every default written out, so a checkpoint does not depend on defaults."""
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
