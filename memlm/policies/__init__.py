"""Key-value policies: baselines without training. A full-attention cache keeps a part of its entries, within a budget
of bytes.

Files:

    kinds               the policies: which entries are kept
    entries             the entries of a cache, of a model of memlm or of transformers
    queries             the queries of a forward, for policies that need them
    reader              ``PolicyReader``, which reads with a policy, exact at any division of a text into calls
"""

from memlm.policies.kinds import KINDS, Policy, build_policies
from memlm.policies.reader import PolicyReader

__all__ = ["KINDS", "Policy", "PolicyReader", "build_policies"]
