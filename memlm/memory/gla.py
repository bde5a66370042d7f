"""Gated linear attention (arXiv:2312.06635): a decay for each channel of the key."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "gla"
