"""Comba (arXiv:2506.02475): Gated DeltaNet whose corrections and queries have their own feedback."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "comba"
