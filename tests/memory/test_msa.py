"""Memory Sparse Attention."""

VARIANTS = [
    ("msa", {"routes": False, "qk_norm": False}),
]
