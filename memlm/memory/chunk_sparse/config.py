"""The settings of ``chunk_sparse``."""

from dataclasses import dataclass

from memlm.memory import attention
from memlm.settings import require

LEARNING = ("compressed", "distilled")
GATES = ("sigmoid", "tanh")
INITIALIZATIONS = ("default", "recall")
FUSIONS = ("joint", "relevance", "head_gate")


@dataclass(frozen=True)
class Config(attention.Projections):
    """chunk_size: tokens of a chunk.
    window_size: last tokens that are always seen, at least chunk_size.
    top_k: chunks that a token chooses.
    max_chunks: the chunks that a token chooses from, the last ones; 0 for all. The state then has a fixed size.
    fusion: how the chosen chunks join the window: "joint", "relevance" or "head_gate".
    router_dim: size of the router's queries and keys, with fusion "relevance".
    learning: how the choice is trained: "compressed" or "distilled".
    loss_weight: weight of the distillation loss in each layer.
    gate: the gate of the read of means, or of the chosen chunks with fusion "head_gate": "sigmoid", 1/2 at first; or
        "tanh", 0 at first, for a trained backbone.
    far_positions: whether rotary positions encode the distance of chosen tokens, as in full attention. Without them,
        far tokens look as in training, however long the document.
    conv_size: width of a causal convolution with SiLU on q, k, v; 0 for none.
    initialization: "default", or "recall": an engineered prior for associative recall. Queries start equal to keys,
        and the convolution delays each channel of the keys by 0 to conv_size - 1 tokens.

    The rest is as in ``attention.Projections``.
    """

    chunk_size: int = 64
    window_size: int = 512
    top_k: int = 16
    max_chunks: int = 0
    fusion: str = "joint"
    router_dim: int = 0
    learning: str = "compressed"
    loss_weight: float = 0.1
    gate: str = "sigmoid"
    far_positions: bool = True
    conv_size: int = 0
    initialization: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk_size", "top_k"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(
            self.window_size >= self.chunk_size,
            f"window_size={self.window_size} must be chunk_size={self.chunk_size} at least, "
            "because nothing else sees the open chunk; raise it, or lower chunk_size",
        )
        require(self.loss_weight >= 0, f"loss_weight={self.loss_weight} must not be negative")
        require(self.conv_size >= 0, f"conv_size={self.conv_size} must be 0 (none) or more")
        choices = ("fusion", FUSIONS), ("learning", LEARNING), ("gate", GATES), ("initialization", INITIALIZATIONS)
        for name, known in choices:
            value = getattr(self, name)
            require(value in known, f"{name}={value!r} must be one of {', '.join(known)}")
        require(
            self.initialization == "default" or self.conv_size > 0,
            f"initialization={self.initialization!r} delays keys by a convolution; set conv_size, to 4 say",
        )
        require(self.max_chunks >= 0, f"max_chunks={self.max_chunks} must be 0 (all) or more")
        require(
            not self.max_chunks or self.max_chunks >= self.top_k,
            f"max_chunks={self.max_chunks} must be top_k={self.top_k} at least",
        )
        require(
            not self.max_chunks or self.learning != "distilled",
            f"max_chunks={self.max_chunks}: learning='distilled' compares with attention to all chunks; use 0",
        )
        self._check_fusion()

    def _check_fusion(self) -> None:
        if self.fusion != "joint":
            of = {"learning": "'joint'"} | ({} if self.fusion == "head_gate" else {"gate": "'joint' or 'head_gate'"})
            for name, fusions in of.items():
                value = getattr(self, name)
                require(
                    value == getattr(Config, name),
                    f"{name}={value!r} is of fusion={fusions}; leave it out with fusion={self.fusion!r}",
                )
        if self.fusion != "relevance":
            require(
                self.router_dim == 0,
                f"router_dim={self.router_dim} is of fusion='relevance'; leave it out with fusion={self.fusion!r}",
            )
            return
        require(
            self.router_dim >= 1, f"fusion='relevance' has a router, and router_dim={self.router_dim}; set 64, say"
        )
        require(
            self.top_k >= 2, f"top_k={self.top_k}: the router of fusion='relevance' learns from 2 or more; raise it"
        )
        require(
            not self.far_positions,
            "far_positions=True: fusion='relevance' encodes places in chunks instead; set far_positions=false",
        )

    @property
    def behind(self) -> int:
        """Positions between a token and the end of the chunks that it may choose, before rounding down to chunks."""
        return self.window_size - (self.chunk_size if self.fusion == "joint" else 1)

    @property
    def chunks_kept(self) -> int:
        """Chunks in the state with ``max_chunks``: also those that the next tokens will choose."""
        return self.max_chunks + (self.window_size - 1) // self.chunk_size + 1

    @property
    def tokens_kept(self) -> int:
        """Tokens in the state with ``max_chunks``."""
        return (self.chunks_kept + 1) * self.chunk_size - 1
