"""DeltaNet (arXiv:2406.06484): a memory that corrects what it holds for a key."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "delta_net"
