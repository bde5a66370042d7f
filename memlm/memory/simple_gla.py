"""Linear attention with one learned decay a head and token, Mamba-2's (arXiv:2405.21060)."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "simple_gla"
