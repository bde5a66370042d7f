"""RetNet's retention (arXiv:2307.08621): a linear memory with a fixed decay per head."""

from memlm.memory import recurrence

Config = recurrence.Config


class Mixer(recurrence.Layer):
    rule = "retention"
