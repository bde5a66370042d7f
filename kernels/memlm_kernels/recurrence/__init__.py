"""Linear recurrences over segments: linear attention, which adds values, and the delta rule, which corrects them.

Files:

    naive               the paper's recurrences, one token at a time, and the derivation of the chunked form
    linear, delta       the ops
    linear_reference, delta_reference  their chunked form in plain PyTorch
    linear_kernels, linear_triton, delta_kernels, delta_triton  their chunked form in Triton
    carry               the loop that carries the state from chunk to chunk, with its own backward
    products            products of batched matrices, with a backward outside autocast
    decay               decays between the tokens of a chunk
    channel_kernels     the Triton kernels of a decay per channel
    one_token           decoding: one token per row, in plain PyTorch
    step                decoding: a few tokens, one after the other, in Triton
    fla                 the backend of flash-linear-attention's kernels
"""

from memlm_kernels.recurrence.delta import delta_rule
from memlm_kernels.recurrence.linear import linear_attention
from memlm_kernels.segments import DeltaOutput, RecurrenceOutput

__all__ = ["DeltaOutput", "RecurrenceOutput", "delta_rule", "linear_attention"]
