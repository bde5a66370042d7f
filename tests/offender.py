"""Kernels with the faults that scripts/predict_kernels.py reports, which it predicts when this file is run."""

import json

import torch
import triton
import triton.language as tl
from compile_kernels import Launch
from predict_kernels import Recorded, predict

from memlm_kernels.launch import tiled


@tiled([{"num_warps": 8, "num_stages": 1}, {"num_warps": 4, "num_stages": 1}])
@triton.jit(do_not_specialize=["N"])
def chained(x, out, N, AHEAD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """A state that each of N chunks reads and writes; AHEAD: the next chunk is loaded before one is in use."""
    places = tl.arange(0, BT)[:, None] * BK + tl.arange(0, BK)[None, :]
    b_state = tl.zeros([BK, BK], tl.float32)
    b_x = tl.load(x + places)
    for n in range(N):
        if AHEAD:
            b_next = tl.load(x + (n + 1) * BT * BK + places)
        else:
            b_x = tl.load(x + n * BT * BK + places)
        b_read = tl.dot(b_x, b_state.to(b_x.dtype))
        b_state += tl.dot(tl.trans(b_x), b_read.to(b_x.dtype))
        if AHEAD:
            b_x = b_next
    tl.store(out + tl.arange(0, BK)[:, None] * BK + tl.arange(0, BK)[None, :], b_state)


def predicted(choice: int, programs: int, ahead: bool) -> dict:
    x = torch.empty(1, dtype=torch.bfloat16, device="meta")
    given = {"x": x, "out": x.float(), "N": 40, "AHEAD": ahead, "BT": 64, "BK": 64}
    tiles = chained.tiles["cuda"]
    one = Recorded(Launch("", chained, {}, given, False), tiles, [programs] * len(tiles), 0.0)
    return predict([one], choice, [])._asdict()


if __name__ == "__main__":
    found = {"eight warps": (0, 10_000, False), "four warps": (1, 10_000, False), "ahead": (1, 10_000, True)}
    print(json.dumps({name: predicted(*given) for name, given in found.items()}))
