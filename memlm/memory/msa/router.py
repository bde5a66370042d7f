"""The router's losses and metrics, from the scores of a sample's documents.

B rows, S samples of a row, N documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("infonce_decouple", "infonce", "infonce_focal", "infonce_decouple_focal", "bce")
# The exponent of Focal Loss (arXiv:1708.02002).
_GAMMA = 2.0


def router_loss(
    kind: str, scores_BSN: Tensor, found_BSN: Tensor, known_BSN: Tensor, temperature: float, bias: Tensor | None
) -> Tensor:
    """The loss of each sample, [B, S]; 0 if it has no positives (bce: no documents).

    With s = scores / temperature, P the positive documents and N the others, the loss is the mean over i in P of

        infonce                 - log p_i,   p_i = e^s_i / sum over P and N of e^s
        infonce_decouple        - log p_i,   p_i = e^s_i / (e^s_i + sum over N of e^s)      (arXiv:2603.23516, eq. 5)
        infonce_focal, infonce_decouple_focal        - (1 - p_i)^2 log p_i with the same p_i

    or, for bce, the mean over all documents of the logistic loss of score + bias, without the temperature.

    found: the positives, among the known documents; scores of other documents are ignored
    """
    scores_BSN = scores_BSN.masked_fill(~known_BSN, 0.0)
    if kind == "bce":
        assert bias is not None
        sign_BSN = found_BSN.to(scores_BSN.dtype) * 2 - 1
        nats_BSN = -F.logsigmoid((scores_BSN + bias) * sign_BSN) * known_BSN
        return nats_BSN.sum(-1) / known_BSN.sum(-1).clamp(min=1)
    logits_BSN = scores_BSN / temperature
    least = torch.finfo(logits_BSN.dtype).min
    if "decouple" in kind:
        others_BS1 = logits_BSN.masked_fill(~known_BSN | found_BSN, least).logsumexp(-1, keepdim=True)
        log_p_BSN = logits_BSN - torch.logaddexp(logits_BSN, others_BS1)
    else:
        log_p_BSN = logits_BSN.masked_fill(~known_BSN, least).log_softmax(-1)
    # Before the focal weight: its product with an infinite value would be nan.
    log_p_BSN = log_p_BSN.masked_fill(~found_BSN, 0.0)
    nats_BSN = -log_p_BSN
    if "focal" in kind:
        nats_BSN = nats_BSN * (1 - log_p_BSN.exp()) ** _GAMMA
    return nats_BSN.sum(-1) / found_BSN.sum(-1).clamp(min=1)


@torch.no_grad()
def router_metrics(scores_BSN: Tensor, found_BSN: Tensor, known_BSN: Tensor, top_k: int) -> dict[str, Tensor]:
    """Metrics of the top_k documents, means over each row's samples with positives, [B]; nan if a row has none.

    hit: whether one of them is positive; recall: the share of positives among them; precision: the positive share of
        them
    """
    scores_BSN = scores_BSN.masked_fill(~known_BSN, float("-inf"))
    # Stable: of equal scores the first one counts, as in the routing.
    best_BSJ = scores_BSN.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    right_BS = found_BSN.gather(2, best_BSJ).sum(-1)
    found_BS, chosen_BS = found_BSN.sum(-1), known_BSN.sum(-1).clamp(max=top_k)
    samples_B = (found_BS > 0).sum(1)
    of_samples = {
        f"hit@{top_k}": right_BS > 0,
        f"recall@{top_k}": right_BS / found_BS.clamp(min=1),
        "precision": right_BS / chosen_BS.clamp(min=1),
    }
    # Without positives nothing is right, and 0 / 0 is nan.
    return {name: x_BS.sum(1) / samples_B for name, x_BS in of_samples.items()}
