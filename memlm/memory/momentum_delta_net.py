"""The delta rule with momentum (arXiv:2605.05838): Titans' linear memory with a gradient at every token."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "momentum_delta_net"
