"""One token of each of many memories: no chunk around it.

Z memories, of rows and heads alike. A router's memories are rows here: with the states that the token writes gathered,
``linear_attention`` and ``delta_rule`` on rows of one token take them all at once.
"""

import torch
from torch import Tensor

from memlm_kernels.segments import exact


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k: [Z, 1, K]   v: [Z, 1, V]   beta: [Z, 1, 1], None for linear attention   log_decay: [Z, 1 or K, 1]
    state: [Z, K, V]

    Returns reads [Z, 1, V] and the new state.
    """
    if log_decay is not None:
        state = state * log_decay.exp()
    if beta is not None:
        v = torch.baddbmm(v, k, state, alpha=-1) * beta
    state = torch.baddbmm(state, k.mT, v)
    return torch.bmm(q, state), state


def of_rows(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same on what the ops take, rows of one segment and one token; all in one type."""
    keys, values = state.shape[3:]
    of_beta = None if beta is None else exact(beta).reshape(-1, 1, 1)
    decay = None
    if log_decay is not None:
        decay = exact(log_decay).reshape(-1, keys if log_decay.ndim == 4 else 1, 1)
    q_Z, k_Z, v_Z = (x.reshape(-1, 1, x.shape[-1]) for x in (q, k, v))
    o, after = step(q_Z, k_Z, v_Z, of_beta, decay, state.reshape(-1, keys, values))
    return o.view(*q.shape[:3], values), after.view(state.shape)
