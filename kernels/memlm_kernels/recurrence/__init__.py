"""Linear recurrences over segments: linear attention, which adds, and the delta rule, which corrects.

Files:

    naive               the op as its paper writes it, a token at a time, and why chunks give the same
    linear, delta       the ops
    linear_reference, delta_reference  their chunked form in plain PyTorch
    linear_kernels, linear_triton, delta_kernels, delta_triton  the same in Triton
    carry               the state from chunk to chunk, with gradients by hand
    decay               decays within a chunk, as the chunked forms take them
    channel_kernels     the Triton kernels of a decay per channel
    one_token           decoding: one token of rows of one segment, in plain PyTorch
    step                decoding: a few tokens, one after the other, in Triton
    fla                 the kernels of flash-linear-attention
"""

from memlm_kernels.recurrence.delta import delta_rule
from memlm_kernels.recurrence.linear import linear_attention
from memlm_kernels.segments import RecurrenceOutput

__all__ = ["RecurrenceOutput", "delta_rule", "linear_attention"]
