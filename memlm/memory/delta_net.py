"""DeltaNet (arXiv:2406.06484): a write corrects the value that the memory holds for its key."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "delta_net"
