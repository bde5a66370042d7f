"""Which part knows: the weights hold one value of a key, the memory has read another, and parts are patched in turn.

The question of PH3 (arXiv:2402.18154), put to memories and to edited layers instead of heads of attention.

N facts of a text, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.data import Source
from memlm.editing import Editor
from memlm.evaluation.ablation import long_term, patched, recorded
from memlm.evaluation.data import Examined
from memlm.evaluation.measures import Measure, Models, Table, check_range
from memlm.evaluation.report import Report
from memlm.evaluation.statistics import bootstrap
from memlm.evaluation.subject import Subject
from memlm.evaluation.tasks import Setting
from memlm.evaluation.tasks.symbols import signs
from memlm.reader import Reader, continues
from memlm.settings import require

NONE = "none"


@dataclass(frozen=True)
class Conflict(Measure):
    """conflict_facts: facts of a text, each edited into the weights and then read with another value; 0 for none
    conflict_rows: texts
    conflict_rate: of the edit (``memlm.editing``)
    conflict_keys, conflict_values: symbols to choose from
    """

    name = "conflict"
    conflict_facts: int = 0
    conflict_rows: int = 32
    conflict_rate: float = 3e-2
    conflict_keys: int = 32
    conflict_values: int = 32
    apart = "it compares the parts of one model"

    def __post_init__(self) -> None:
        check_range(self, conflict_facts=0, conflict_rows=1, conflict_keys=1, conflict_values=2)
        most = self.conflict_keys
        require(self.conflict_facts <= most, f"conflict_facts={self.conflict_facts} must be at most {most} keys")
        require(self.conflict_rate > 0, f"conflict_rate={self.conflict_rate} must be above 0")

    def measures(self, source: Source) -> bool:
        return False

    def applies(self, sources: Mapping[str, Source]) -> bool:
        return self.conflict_facts > 0

    def check_model(self, model: PreTrainedModel) -> None:
        continues(model)
        Editor(model)

    def cost(self, sources: Mapping[str, Source]) -> int:
        return 8 * self.conflict_rows * self.conflict_facts

    def run(self, one: Examined, examined: Sequence[Examined]) -> list[dict[str, Any]]:
        setting, found = Setting(one.tokenizer, one.seed), dict[str, list[np.ndarray]]()
        known = signs(setting, self.conflict_keys, self.conflict_values)
        for row in range(self.conflict_rows):
            rng = setting.rng(self.name, row)
            keys = rng.permutation(known.keys)[: self.conflict_facts]
            held = rng.integers(self.conflict_values, size=len(keys))
            told = (held + rng.integers(1, self.conflict_values, size=len(keys))) % self.conflict_values
            values = known.values[np.stack([told, held])]
            for part, scores in answers(one.subject.model, keys, *values, known.values, self.conflict_rate).items():
                found.setdefault(part, []).append(scores)
        whole = np.stack(found[NONE])
        return [self._of(part, np.stack(scores), whole) for part, scores in found.items()]

    def _of(self, part: str, scores: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
        """scores, whole: [rows, 3, N], see ``answers``, with the part patched and without."""
        shares, shift = scores[:, :2].mean((0, 2)), (whole - scores)[:, 2].mean(1)
        low, high = bootstrap(shift, draws=1000) if len(shift) > 1 else (None, None)
        return {
            **{"part": part, "told": float(shares[0]), "held": float(shares[1]), "rows": len(shift)},
            **{"facts": self.conflict_facts, "nats": float(shift.mean()), "low": low, "high": high},
        }

    def table(self, models: Models) -> Table:
        header = ["part patched", "answers: value read", "value held", "another", "nats toward the value read"]
        rows = []
        for name, measured in models.items():
            for cell in measured[self.name]:
                shares = [cell["told"], cell["held"], 1 - cell["told"] - cell["held"]]
                interval = "" if cell["low"] is None else f" ({cell['low']:.2f} to {cell['high']:.2f})"
                nats = "" if cell["part"] == NONE else f"{cell['nats']:.2f}{interval}"
                rows.append([f"{name}, {cell['part']}", *(f"{share:.3f}" for share in shares), nats])
        return header, rows

    def section(self, report: Report, models: Models, first: Subject) -> None:
        report.heading("Weights against memory")
        report.table(*self.table(models))
        report.note(
            "The weights hold one value of each key, by an edit; the memory then reads another. Each part in turn "
            "gives its output of a run without the conflict: a memory that of the edited weights that read nothing, "
            "an edited layer that of the weights before the edit. Nats: how far the part moves the odds toward the "
            "value read, against the one held. Intervals count texts."
        )


def answers(
    model: PreTrainedModel, keys: np.ndarray, told: np.ndarray, held: np.ndarray, values: np.ndarray, rate: float
) -> dict[str, np.ndarray]:
    """For no part and for each, patched: 1 where the value read is the likeliest of ``values``, 1 where the value held
    is, and log P(value read) - log P(value held); [3, N].

    keys, told, held: token ids [N] of the facts, with the values that are read and those that the weights hold
    """
    keys_N, told_N, held_N, values_V = (torch.from_numpy(x).to(model.device) for x in (keys, told, held, values))
    edited = Reader(model)
    edited.edit(torch.stack([keys_N, held_N], 1), 1, rate)
    # Readers of the given weights, and of the edited ones before they read.
    plain, empty = Reader(model), edited.fork()
    for reader in (plain, edited):
        reader(torch.stack([keys_N, told_N], 1).view(1, -1))
    own, parts = _parts(model), _parts(edited.model)
    with recorded(own) as of_plain:
        _asked(plain, keys_N)
    with recorded(parts) as of_empty:
        _asked(empty, keys_N)
    memories, found = long_term(edited.model), {}
    for name, part in {NONE: None, **parts}.items():
        other = of_empty if name in memories else of_plain
        with nullcontext() if part is None else patched(part, other[name]):
            logits_NV = _asked(edited, keys_N)
        odds_N = logits_NV.gather(1, told_N[:, None]) - logits_NV.gather(1, held_N[:, None])
        best_N = values_V[logits_NV[:, values_V].argmax(-1)]
        scores = [(best_N == told_N).double(), (best_N == held_N).double(), odds_N[:, 0].double()]
        found[name] = torch.stack(scores).cpu().numpy()
    return found


def _asked(reader: Reader, keys_N: Tensor) -> Tensor:
    """Logits [N, V] after each key alone."""
    rows_N = torch.zeros_like(keys_N)
    return reader.fork(rows_N)(keys_N[:, None])[:, -1].float()


def _parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The parts of the long-term memory, and the feed-forward layers that an edit changes."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in Editor(model).modules)
    return {**long_term(model), **{name: model.get_submodule(name) for name in layers}}
