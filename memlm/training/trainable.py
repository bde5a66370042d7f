"""``train.trainable``: which parameters a run trains. The others get no gradient and no optimiser state."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from memlm.attached.call import Attached
from memlm.attached.save import MEMORY as ATTACHED
from memlm.memory.base import SequenceMixer
from memlm.modeling import Tap
from memlm.settings import require, suggest
from memlm.side import is_own

MEMORY = "memory"
CONDITION = "condition"


def check(trainable: Any) -> None:
    """Raise ValueError unless the setting is null, ``memory``, a list of patterns or ``{condition: N}``."""
    if isinstance(trainable, dict):
        count = trainable.get(CONDITION)
        whole = [*trainable] == [CONDITION] and type(count) is int and count >= 1
        require(whole, f"trainable={trainable} must be {{{CONDITION}: N}}, N matrices, 1 or more")
    elif isinstance(trainable, list):
        words = bool(trainable) and all(isinstance(pattern, str) for pattern in trainable)
        require(words, f"trainable={trainable} must be patterns of parameter names, such as ['*.q_proj.*']")
    else:
        known = trainable in (None, MEMORY)
        require(
            known,
            f"trainable={trainable!r} is unknown; use null, {MEMORY}, a list of name patterns, or {{{CONDITION}: N}}",
        )


def choose(model: PreTrainedModel, trainable: str | list | dict | None) -> list[str]:
    """The names of the parameters to train.

    trainable: null, all; ``memory``, see ``memory_names``; patterns of names, with ``*`` and ``?``; or
        ``{condition: N}``, see ``well_conditioned``

    Raises ValueError with the setting if it selects nothing, or leaves all gates of a new attached memory closed.
    """
    chosen = _selected(model, trainable)
    gates = {f"{path}.gate": module.gate for path, module in model.named_modules() if isinstance(module, Attached)}
    if gates and not gates.keys() & {*chosen} and not any(gate.any() for gate in gates.values()):
        raise ValueError(
            f"train.trainable={trainable} leaves the gates of the memory closed, so it stays without effect; add "
            "'*.memlm.gate' to a list of patterns, or train without it: memory=none"
        )
    return chosen


def _names(model: nn.Module) -> list[str]:
    """The parameters that may be trained: beside a side network, the decoder is frozen."""
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if is_own(name)] or names


def _selected(model: PreTrainedModel, trainable: str | list | dict | None) -> list[str]:
    names = _names(model)
    if trainable is None:
        return names
    if isinstance(trainable, dict):
        return well_conditioned(model, trainable[CONDITION])
    if isinstance(trainable, str):
        found = memory_names(model)
        require(
            bool(found),
            f"train.trainable={MEMORY}, but the model has no long-term memory; choose another memory=..., or null",
        )
        return found
    for pattern in trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"train.trainable: {pattern!r} matches no parameter; {_nearest(pattern, names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in trainable)]


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Give gradients to these parameters alone."""
    chosen = {*names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def memory_names(model: nn.Module) -> list[str]:
    """The parameters of an attached memory; without one, those of taps, and of each mixer that has a part with
    long-term memory.

    Such a mixer counts as a whole, because attention and memory share projections in some.
    """
    names = _names(model)
    parts = [
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, Tap)
        or (isinstance(module, SequenceMixer) and any(getattr(part, "long_term", False) for part in module.modules()))
    ]
    attached = [name for name in names if ATTACHED in name]
    return attached or [name for name in names if name.startswith(tuple(parts))]


@torch.no_grad()
def well_conditioned(model: PreTrainedModel, count: int) -> list[str]:
    """The ``count`` weight matrices of the smallest condition number, by KappaTune (arXiv:2506.16289).

    The condition number is the ratio of the largest to the smallest singular value. Where it is small, a matrix has
    specialised least, so training it forgets least. Matrices are the weights of linear layers; embeddings, the output
    head and single rows, whose ratio is always 1, are none.

    Raises ValueError if there are fewer, or one is not finite.
    """
    outer = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    owners = {
        f"{path}.weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    names = {*_names(model)}
    matrices = {
        name: weight
        for name, weight in owners.items()
        if name in names and id(weight) not in outer and weight.is_floating_point() and min(weight.shape) > 1
    }
    require(
        count <= len(matrices),
        f"train.trainable.{CONDITION}={count} is more than the model's {len(matrices)} weight matrices; lower it",
    )
    for name, weight in matrices.items():
        require(
            bool(weight.isfinite().all()),
            f"train.trainable.{CONDITION}: {name} is not finite; give other weights, or another train.trainable",
        )
    conditions = {name: _condition(weight) for name, weight in matrices.items()}
    chosen = {*sorted(conditions, key=conditions.__getitem__)[:count]}
    return [name for name, _ in model.named_parameters() if name in chosen]


def _condition(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight.float())
    # A matrix of zeros gives 0 / 0.
    return (values[0] / values[-1]).nan_to_num(nan=torch.inf, posinf=torch.inf).item()


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """A hint at the first word of a pattern that is in no name; otherwise some names."""
    words = sorted({word for name in names for word in name.split(".")})
    wrong = next((w for w in pattern.split(".") if not any(fnmatchcase(word, w) for word in words)), None)
    some = f"names are {', '.join(names[:: max(1, len(names) // 4)][:4])}"
    return some if wrong is None else suggest(wrong, words, some)
