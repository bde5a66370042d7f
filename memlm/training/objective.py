"""The training loss, and the scores of a batch. B rows, T tokens, S places that predict."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from memlm.cache import MemoryCache
from memlm.data import IGNORE_INDEX, Batch
from memlm.hub.causal import of_model
from memlm.memory.stretches import Stretches
from memlm.roles import Roles
from memlm.training.scores import Wanted, scored


class Objective(nn.Module):
    """The training loss around a model, so that a wrapped or compiled forward returns only small tensors.

    A row's loss is the mean over its scored tokens, and the batch's loss the mean over its rows. So a source's weight
    is its share of the loss, however few of its tokens are scored. ``lm_weight`` multiplies this loss; the mixers'
    losses have their own weights. ``z_loss`` is the weight of the squared log of the softmax's denominator, averaged
    in the same way, which keeps logits small (PaLM, arXiv:2204.02311).
    """

    def __init__(self, model: nn.Module, lm_weight: float = 1.0, z_loss: float = 0.0) -> None:
        super().__init__()
        self.model, self.lm_weight, self.z_loss = model, lm_weight, z_loss

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        max_documents: int,
        roles: Roles | None = None,
        places: Tensor | None = None,
        counts: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        output_metrics: bool = True,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns the loss with the auxiliary losses, each row's own loss [B], and, if asked for, the mixers' metrics:
        scalars, nan if no row has a value.

        labels: [B, T], not shifted; -100 is not scored
        counts: [B], the divisor of each row's sum of nats; None: its scored tokens

        past_key_values: the memory of the rows so far, which is written

        The other arguments are as in ``MemLMModel.forward`` and ``Batch``.
        """
        out, scores, targets = scored(
            self.model,
            labels,
            places,
            Wanted(norms=self.z_loss > 0),
            input_ids=input_ids,
            position_ids=position_ids,
            **({} if past_key_values is None else {"past_key_values": past_key_values}),
            **of_model(self.model, max_documents=max_documents, roles=roles, output_metrics=output_metrics),
        )
        nats, *norms = scores.unbind(-1)
        counted = targets != IGNORE_INDEX
        counts = counted.sum(1).clamp(min=1) if counts is None else counts
        rows = nats.sum(1) / counts
        aux_losses = {name: x.mean() for name, x in getattr(out, "aux_losses", {}).items()}
        if norms:
            squares = norms[0].square().masked_fill(~counted, 0.0)
            aux_losses["z_loss"] = self.z_loss * (squares.sum(1) / counts).mean()
        loss = self.lm_weight * rows.mean() + sum(aux_losses.values())
        metrics = {name: x.nanmean() if x.ndim == 1 else x.mean() for name, x in getattr(out, "metrics", {}).items()}
        return loss, rows.detach(), metrics | {name: x.detach() for name, x in aux_losses.items()}


def model_inputs(batch: Batch, device: torch.device | str, stretches: Stretches | None = None) -> dict:
    """A batch, or this process's stretch of it, as keyword arguments on a device; without positions if each row is one
    document.
    """
    batch = batch if stretches is None else batch.stretch(stretches.rank, stretches.size)
    batch = batch.to(device)
    positions = batch.position_ids if batch.max_documents > 1 else None
    return {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "position_ids": positions,
        "max_documents": batch.max_documents,
        "roles": batch.roles,
        "places": batch.places,
        "counts": batch.counts,
    }


@dataclass
class Score:
    """Sums over scored tokens of one source; told: for each metric of rows, such as the routers' hit rate, its sum and
    the number of rows.
    """

    nats: float = 0.0
    correct: int = 0
    tokens: int = 0
    bytes: int = 0
    rows: int = 0
    whole_rows: int = 0
    told: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __add__(self, other: "Score") -> "Score":
        mine, theirs = ((s.nats, s.correct, s.tokens, s.bytes, s.rows, s.whole_rows) for s in (self, other))
        told = {
            name: tuple(
                sum(parts) for parts in zip(self.told.get(name, (0, 0)), other.told.get(name, (0, 0)), strict=True)
            )
            for name in {**self.told, **other.told}
        }
        return Score(*(a + b for a, b in zip(mine, theirs, strict=True)), told)

    @property
    def loss(self) -> float:
        return self.nats / max(1, self.tokens)

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.tokens)

    @property
    def row_accuracy(self) -> float:
        """Share of rows with every scored token right."""
        return self.whole_rows / max(1, self.rows)

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the rows that have a value."""
        return {name: total / count for name, (total, count) in self.told.items() if count}

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else float("nan")


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[Batch],
    names: list[str],
    token_bytes: Tensor,
    device: torch.device,
    stretches: Stretches | None = None,
) -> dict[str, Score]:
    """Score every source of the batches; names: the sources, in the order of their ids. Runs in eval mode and restores
    the model's mode.

    stretches: the processes that share the rows: the sum of their scores is the rows' score
    """
    training = model.training
    model.eval()
    sums = torch.zeros(len(names), 6, dtype=torch.float64, device=device)
    token_bytes, told = token_bytes.to(device), dict[str, Tensor]()
    for batch in batches:
        inputs, source_ids = model_inputs(batch, device, stretches), batch.source_ids.to(device)
        labels, places, _ = (inputs.pop(name) for name in ("labels", "places", "counts"))
        own = of_model(model, max_documents=inputs.pop("max_documents"), roles=inputs.pop("roles"))
        out, scores, targets = scored(model, labels, places, Wanted(right=True), **inputs, **own)
        (nats, right), counted = scores.unbind(-1), targets != IGNORE_INDEX
        right = right.bool() & counted
        sizes = token_bytes[targets.clamp(min=0)] * counted
        whole = (right | ~counted).all(1)
        one = torch.ones_like(whole)
        if stretches is not None:
            one, whole = one & stretches.first, stretches.everywhere(whole) & stretches.first
        per_row = [nats.sum(1), right.sum(1), counted.sum(1), sizes.sum(1), one, whole]
        sums.index_add_(0, source_ids, torch.stack([x.double() for x in per_row], 1))
        for name, x in getattr(out, "metrics", {}).items():
            if x.ndim == 1:
                of_rows = torch.stack([x.double().nan_to_num(0.0), (~x.isnan()).double()], 1)
                told.setdefault(name, sums.new_zeros(len(names), 2)).index_add_(0, source_ids, of_rows)
    model.train(training)
    columns = sums.tolist()
    scores = {name: Score(row[0], *map(round, row[1:])) for name, row in zip(names, columns, strict=True)}
    for metric, of_sources in told.items():
        for name, (total, count) in zip(names, of_sources.tolist(), strict=True):
            scores[name].told[metric] = (total, count)
    return scores
