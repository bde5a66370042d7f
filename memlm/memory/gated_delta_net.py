"""Gated DeltaNet (arXiv:2412.06464): the delta rule on a memory with decay."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "gated_delta_net"
