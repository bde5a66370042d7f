"""Linear recurrences over segments: linear attention, which adds, and the delta rule, which corrects.

``linear`` and ``delta`` hold the ops, ``*_reference`` their chunked form in plain PyTorch, ``*_kernels`` and
``*_triton`` the same in Triton (``channel_kernels``: a decay for each channel). ``step`` decodes a few tokens,
``fla`` calls the kernels of flash-linear-attention.
"""

from memlm_kernels.recurrence.delta import delta_rule
from memlm_kernels.recurrence.linear import linear_attention

__all__ = ["delta_rule", "linear_attention"]
