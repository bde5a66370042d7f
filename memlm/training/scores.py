"""Scores of predicted tokens, with at most ``LOGITS`` logits at once.

B rows, T tokens, S places that predict, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memlm.data import IGNORE_INDEX
from memlm.modeling import MemLMPreTrainedModel

# 40 MB in fp32; 312 tokens of a vocabulary of 32,000.
LOGITS = 10**7


class Wanted(NamedTuple):
    """Scores beside the nats of each target. norms: log of the sum of exp(logits); right: 1 where the target has the
    highest logit.
    """

    norms: bool = False
    right: bool = False


def token_scores(logits_BSV: Tensor, targets_BS: Tensor, asked: Wanted) -> Tensor:
    """[B, S, 1 + number of scores asked for]: nats of each target, 0 where it is not scored; then those asked for."""
    logits_BSV = logits_BSV.float()
    nats_BS = F.cross_entropy(logits_BSV.transpose(1, 2), targets_BS, ignore_index=IGNORE_INDEX, reduction="none")
    columns = [nats_BS]
    if asked.norms:
        columns.append(logits_BSV.logsumexp(-1))
    if asked.right:
        columns.append((logits_BSV.argmax(-1) == targets_BS).to(nats_BS.dtype))
    return torch.stack(columns, -1)


def scored(
    model: nn.Module, labels_BT: Tensor, places_S: Tensor | None, asked: Wanted, **inputs: Any
) -> tuple[Any, Tensor, Tensor]:
    """Run a model on ``inputs``. Returns its outputs, the ``token_scores`` and the targets [B, S].

    places: positions whose next token may be scored; None: all

    If all logits are more than ``LOGITS``, the head runs on pieces of the tokens, and the backward computes the logits
    of a piece again. Outputs then have no logits. A model that changes its logits after the head makes all at once.
    """
    inputs |= {"use_cache": False, "logits_to_keep": 0 if places_S is None else places_S}
    if places_S is not None:
        targets_BS = labels_BT[:, places_S + 1]
    else:
        targets_BS = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    vocabulary = model.config.get_text_config().vocab_size
    if targets_BS.numel() * vocabulary > LOGITS:
        size = max(1, LOGITS // vocabulary)
        with _in_pieces(model.get_output_embeddings(), size, targets_BS, asked) as made:
            out = model(**inputs)
        # A wrapper may copy the outputs of the project's models, but nothing changes their logits.
        if isinstance(model, MemLMPreTrainedModel) or out.logits is made[0]:
            return out, out.logits, targets_BS
    out = model(**inputs)
    if places_S is not None:
        return out, token_scores(out.logits, targets_BS, asked), targets_BS
    targets_BS = labels_BT[:, 1:]
    return out, token_scores(out.logits[:, :-1], targets_BS, asked), targets_BS


@contextmanager
def _in_pieces(head: nn.Module, size: int, targets_BS: Tensor, asked: Wanted) -> Iterator[list[Tensor]]:
    """In the block, the head returns ``token_scores`` instead of logits, and adds them to the list; ``size`` tokens at
    once.
    """
    forward, made = head.forward, []

    def of_piece(x_PD: Tensor, targets_P: Tensor) -> Tensor:
        return token_scores(forward(x_PD[None]), targets_P[None], asked)[0]

    def of_all(x_BSD: Tensor) -> Tensor:
        pieces = zip(x_BSD.flatten(0, 1).split(size), targets_BS.flatten().split(size), strict=True)
        scores = [checkpoint(of_piece, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        made.append(torch.cat(scores).unflatten(0, targets_BS.shape))
        return made[-1]

    head.forward = of_all
    try:
        yield made
    finally:
        head.forward = forward
