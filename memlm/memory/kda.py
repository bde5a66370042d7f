"""Kimi Delta Attention (KDA, arXiv:2510.26692): the delta rule with a decay for each channel of the key.

The paper's output gate is a sigmoid of low rank; the one here is that of all linear memories.
"""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "kda"
