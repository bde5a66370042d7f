"""One token for each of many memories, without a chunk around it.

Z memories, one for each row and head. The memories that a router chose are rows here: once the states that the token
writes are gathered, ``linear_attention`` and ``delta_rule`` take rows of one token and update all of them at once.
"""

import torch
from torch import Tensor

from memlm_kernels.segments import exact


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k: [Z, 1, K]   v: [Z, 1, V]   beta: [Z, 1, 1], None for linear attention   log_decay: [Z, 1 or K, 1]
    state: [Z, K, V]

    Returns reads [Z, 1, V], the new state, and the written values [Z, 1, V].
    """
    if log_decay is not None:
        state = state * log_decay.exp()
    if beta is not None:
        v = torch.baddbmm(v, k, state, alpha=-1) * beta
    state = torch.baddbmm(state, k.mT, v)
    return torch.bmm(q, state), state, v


def of_rows(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``step`` with the shapes of the ops: rows of one segment and one token, all in one type."""
    keys, values = state.shape[3:]
    of_beta = None if beta is None else exact(beta).reshape(-1, 1, 1)
    decay = None
    if log_decay is not None:
        decay = exact(log_decay).reshape(-1, keys if log_decay.ndim == 4 else 1, 1)
    q_Z, k_Z, v_Z = (x.reshape(-1, 1, x.shape[-1]) for x in (q, k, v))
    o, after, d = step(q_Z, k_Z, v_Z, of_beta, decay, state.reshape(-1, keys, values))
    return o.view(*q.shape[:3], values), after.view(state.shape), d.view(*q.shape[:3], values)
