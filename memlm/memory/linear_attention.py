"""Linear attention (arXiv:2006.16236): a memory that only adds."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "linear_attention"
