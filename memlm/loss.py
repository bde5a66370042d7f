"""The training loss of a language model whose mixers add losses. B rows, T tokens, D hidden."""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def auxiliary_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor | int:
    """The sum of the mixers' losses, to add to a loss computed from logits, as in a trainer's ``compute_loss_func``.

    >>> outputs = model(input_ids)
    >>> loss = my_loss(outputs.logits, labels) + memlm.auxiliary_loss(outputs, labels)

    outputs: of a ``MemLMForCausalLM`` called without labels; with labels its loss is already complete
    labels: [B, T], label t predicted from position t - 1; -100: not scored
    num_items_in_batch: scored tokens of the whole step, of which this call is a part; None: the call is the step
    """
    return sum(weighted(outputs["aux_losses"], labels, num_items_in_batch).values())


def weighted(
    aux_losses: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None
) -> dict[str, Tensor]:
    """Each loss [B] as a scalar part of the step's loss.

    A row's weight is its share of the scored tokens, so a step's sum does not depend on how rows are divided into
    calls. Labels [B], of a classifier, count equally in each call, as in transformers' own loss.
    """
    if labels.ndim == 1:
        return {name: x_B.mean() for name, x_B in aux_losses.items()}
    scored_B = (labels[:, 1:] != IGNORED).sum(1)
    whole = scored_B.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    whole = torch.as_tensor(whole, device=labels.device)
    return {name: (x_B * scored_B.to(x_B.device)).sum() / whole.to(x_B.device) for name, x_B in aux_losses.items()}


def bound(x_BTD: Tensor, aux_losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same tensors, tied together: a backward through ``x`` alone would lose the auxiliary losses, and is
    refused.
    """
    x_BTD, *losses = _Bound.apply(tuple(aux_losses), x_BTD, *aux_losses.values())
    return x_BTD, dict(zip(aux_losses, losses, strict=True))


class _Bound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.names = names
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        lost = [name for name, grad in zip(ctx.names, grads, strict=True) if grad is None]
        if grad_BTD is not None and lost:
            raise ValueError(
                f"aux_losses: the loss leaves out {', '.join(lost)}; give the model the labels, so that it makes the "
                "loss (TRL: a subclass with compute_loss = transformers.Trainer.compute_loss), add "
                "memlm.auxiliary_loss, or set the weights of these losses in model.mixers to 0"
            )
        return (None, grad_BTD, *grads)
