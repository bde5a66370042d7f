"""The documents in a layer's state (``bank`` of ``msa``): insertion from a bank, pruning, and the final choice.

B batch, A tokens, C chunks, J documents chosen, S local keys, L = C + S.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.memory.state import State
from memlm.settings import require
from memlm_kernels.grid import pick


def with_documents(state: State, bank: State) -> State:
    """A state that also holds documents of a bank. Synchronises with the device.

    state: state of a routing layer; its documents, if any, came in this way
    bank: k, v, router_k [B or 1, C, G, K], means of chunks; size and number [B or 1, C], each chunk's tokens (0: no
        chunk) and document. Numbers are new to the state; equal scores choose the lowest number

    Raises ValueError if the state holds documents that were read in it.
    """
    old = state["bank"]
    require(
        not bool(((old["number"] < 0) & (old["size"] > 0)).any()),
        "past_key_values: this memory holds documents that were read in it; ask with a fork of it from before them",
    )
    zeros = torch.zeros_like(bank["size"])
    new = bank | dict.fromkeys(("score", "asked", "found", "document"), zeros)
    both = {n: torch.cat([x, new[n].to(x.dtype).expand(len(x), *new[n].shape[1:])], 1) for n, x in old.items()}
    return arranged(state, both, both["size"] > 0)


def arranged(state: State, bank: State, kept_BC: Tensor) -> State:
    """The state with only these chunks of a bank, sorted by document number. Synchronises with the device."""
    count_B, last = kept_BC.sum(1), torch.iinfo(torch.int64).max
    order_BC = bank["number"].masked_fill(~kept_BC, last).argsort(dim=1, stable=True)[:, : int(count_B.max())]
    bank, kept_BC = {name: pick(x, order_BC) for name, x in bank.items()}, kept_BC.gather(1, order_BC)
    number_BC = bank["number"]
    opens_BC = kept_BC & F.pad(number_BC[:, 1:] != number_BC[:, :-1], (1, 0), value=True)
    bank |= {"document": (opens_BC.cumsum(1) - 1).clamp(min=0), "size": bank["size"] * kept_BC}
    counters = {"chunks": count_B, "documents": opens_BC.sum(1)}
    return {**state, "bank": bank, **counters}


def documents_of(bank: State, chunks_B: Tensor) -> Tensor:
    """The document of each chunk of a row, [B, C]; C for unused chunks at the end."""
    count = bank["document"].shape[1]
    return torch.where(torch.arange(count, device=chunks_B.device) < chunks_B[:, None], bank["document"], count)


def chunks_of(document_BAJ: Tensor, document_BC: Tensor) -> Tensor:
    """Whether each chunk belongs to a chosen document (-1: none), [B, A, C]."""
    chunks = document_BC.shape[1]
    # One more document, for -1.
    index_BAJ = torch.where(document_BAJ < 0, chunks + 1, document_BAJ)
    is_BAN = torch.zeros(*index_BAJ.shape[:2], chunks + 2, device=index_BAJ.device, dtype=torch.bool)
    is_BAN = is_BAN.scatter(2, index_BAJ, True)
    return is_BAN.gather(2, document_BC[:, None].expand(-1, index_BAJ.shape[1], -1))


def settled(state: State, chosen_BC: Tensor) -> State:
    """The state with the chosen chunks before its local keys, in ``k`` and ``v``; ``front`` marks them."""
    (rows, chunks), local = chosen_BC.shape, state["k"].shape[1]
    # The chosen chunks move to the end, directly before the local keys, which are aligned to the right.
    order_BC = chosen_BC.long().argsort(dim=1, stable=True)
    local_BS = torch.arange(chunks, chunks + local, device=order_BC.device).expand(rows, -1)
    place_L = torch.arange(chunks + local, device=order_BC.device)
    gap_B1 = (local - state["outside"]).clamp(min=0)[:, None]
    place_BL = torch.where(place_L < chunks + gap_B1, (place_L - gap_B1).clamp(min=0), place_L)
    source_BL = torch.cat([order_BC, local_BS], 1).gather(1, place_BL)
    after = {**state, "front": chosen_BC.gather(1, order_BC)}
    for name in ("k", "v"):
        after[name] = pick(torch.cat([state["bank"][name].to(state[name].dtype), state[name]], 1), source_BL)
    return after


def unsettled(state: State) -> State:
    """The state before ``settled``."""
    width = state["front"].shape[1]
    return {**state, "front": state["front"][:, :0], "k": state["k"][:, width:], "v": state["v"][:, width:]}
