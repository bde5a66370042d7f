"""RetNet's retention (arXiv:2307.08621): each head forgets at a pace of its own, fixed."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "retention"
