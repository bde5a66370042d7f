"""How a call of attention is cut into programs, see ``kernels``."""

from typing import Any

from torch import Tensor

from memlm_kernels.launch import Tiles, at_least_16, cdiv, precision
from memlm_kernels.segments import power_of_two

# The number of programs that keeps a GPU busy.
ENOUGH = 256


class AttentionCall:
    """Sizes of a call, and how it is cut; see ``kernels``."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None,
        far_k: Tensor | None,
        index: Tensor | None,
        chunk: int,
    ):
        self.batch, self.length, self.heads, self.keys = q.shape
        self.groups, self.values = k.shape[2], v.shape[-1]
        self.padded = power_of_two(self.heads // self.groups)
        wide = max(at_least_16(self.keys), at_least_16(self.values)) * q.element_size()
        # As large as registers can hold; fp32 takes twice as many.
        most = 64 if wide <= 256 and q.element_size() == 2 else 32
        self.rows = min(most, max(self.padded, at_least_16(self.length * self.padded)))
        self.tiles = cdiv(self.length, self.rows // self.padded)
        crowded = wide > 512 or (wide > 256 and q.element_size() == 4 and self.rows > 16)
        self.most_keys = 16 if crowded else most
        self.most_stages = 2 if wide <= 256 else 1
        self.stages_of_keys = self.most_stages if q.element_size() == 2 else 1
        self.prefix = 0 if prefix_k is None else prefix_k.shape[1]
        self.chosen = 0 if index is None else index.shape[3]
        self.chunk = chunk
        self.limits = self.limit(k.shape[1])
        sizes: dict[str, Any] = {
            "T": self.length,
            "LK": k.shape[1],
            "L": v.shape[1],
            "H": self.heads,
            "G": self.groups,
        }
        sizes |= {"K": self.keys, "V": self.values, "PRECISION": precision(q), "RP": self.padded}
        self.sizes = sizes | {"BK": at_least_16(self.keys), "BV": at_least_16(self.values)}
        # Beside a second set of keys, and in few rows, registers hold fewer chosen keys.
        most_chosen = 32 if far_k is not None or self.rows < 64 else 64
        self.of_choice = {"J": self.chosen, "C": chunk, "BJ": power_of_two(max(1, self.chosen))}
        self.of_choice["BC"] = min(most_chosen, self.limit(chunk)["BN"])
        self.tiles_of_chunk = cdiv(chunk, self.of_choice["BC"])

    def limit(self, keys: int) -> Tiles:
        return {"BN": min(self.most_keys, at_least_16(keys)), "num_stages": self.most_stages}

    def splits(self, most: int) -> int:
        """The number of splits of the keys (at most ``most``) of a program, a power of two: more than 1 where there
        are too few programs.
        """
        if self.tiles > 1:
            return 1
        programs, tile = self.batch * self.groups, self.limits["BN"]
        items = cdiv(most, tile) + cdiv(self.prefix, tile) + self.chosen * cdiv(self.chunk, self.of_choice["BC"])
        return 1 << max(0, min(ENOUGH // programs, items, 32).bit_length() - 1)

    def parts(self, keys: int, tiles: Tiles) -> int:
        """The number of parts of the queries, a power of two: more than 1 where there are few keys."""
        programs = max(1, self.batch * self.groups * cdiv(keys, tiles["BN"]))
        return 1 << max(0, min(ENOUGH // programs, cdiv(self.tiles, 8)).bit_length() - 1)
