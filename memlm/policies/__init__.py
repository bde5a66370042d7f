"""Key-value policies: baselines without training. A full-attention cache keeps a part of its entries, within a budget
of bytes.

Files:

    kinds               the policies: which entries are kept
    entries             the entries of a cache, of a model of memlm or of transformers
    queries             the queries of a forward, for policies that need them
    reader              ``PolicyReader``, which reads with a policy, exact at any division of a text into calls
    episodes            EpiCache: several caches of a text, of which a question chooses one
"""

from transformers import PreTrainedModel

from memlm.policies.episodes import EpisodeReader
from memlm.policies.kinds import KINDS, EpiCache, Policy, build_policies
from memlm.policies.reader import PolicyReader
from memlm.reader import Reader

__all__ = ["KINDS", "EpisodeReader", "Policy", "PolicyReader", "build_policies", "reader_of"]


def reader_of(model: PreTrainedModel, policy: Policy | None) -> Reader:
    """A reader of a model with a policy, or without."""
    if policy is None:
        return Reader(model)
    return EpisodeReader(model, policy) if isinstance(policy, EpiCache) else PolicyReader(model, policy)
