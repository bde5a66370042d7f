"""Linear attention with one learned decay per head and token, as in Mamba-2 (arXiv:2405.21060)."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "simple_gla"
