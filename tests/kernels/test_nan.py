"""The reach of a NaN: never another row, never from padding, and earlier tokens only as kernels/README.md lists."""

import re

import pytest
import torch

from memlm_kernels.testing import assert_close
from tests.conftest import MEMORIES, ROOT, build
from tests.kernels.test_inputs import BOTH, DEVICE, OPS, rows

NAN = float("nan")
# The ops whose first output has tokens.
OF_TOKENS = [
    (name, by)
    for name, by in BOTH
    if name not in ("grouped_linear", "invert_chunks", "merge_topk", "segment_mean_pool", "dispatch_tokens")
]
BY_SEGMENTS = ("linear_attention", "delta_rule", "segmented_neural_memory")
BY_SEGMENTS += ("neural_memory", "neural_memory, two layers", "large_chunk_memory")


def sizes(name):
    """The number of tokens, and the token that is NaN or starts the padding; it is not the first of a chunk."""
    # A recurrence takes few tokens one by one, in another kernel.
    return (20, 17) if name in ("linear_attention", "delta_rule") else (12, 9)


def documented():
    text = (ROOT / "kernels" / "README.md").read_text().partition("\n## NaN\n")[2].partition("\n## ")[0]
    listed = {op: set(names.split(", ")) for op, names in re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", text, re.M)}
    return listed | {"neural_memory, two layers": listed["neural_memory"]}


@torch.no_grad()
@pytest.mark.parametrize(("name", "by"), OF_TOKENS)
def test_a_nan_reaches_what_is_documented(name, by):
    op, reached, (length, here) = OPS[name], set(), sizes(name)
    tensors = op.make(length)
    expected = op.run(tensors, backend=by)
    # One row of cosines may serve all.
    for changed in (n for n, shape in op.floats.items() if shape[:2] == (2, "T")):
        wrong = tensors[changed].clone()
        wrong[0, here] = NAN
        got = op.run(tensors | {changed: wrong}, backend=by)
        assert all(torch.equal(a[1], b[1]) for a, b in zip(expected, got, strict=True) if len(a) == 2)
        if not torch.equal(expected[0][0, :here], got[0][0, :here]):
            reached.add(changed)
    selected = {"k"} if (name, by) == ("linear_attention", "reference") else set()
    if by == "triton" and name in ("neural_memory", "segmented_neural_memory"):
        selected = {"momentum", "decay"}
    assert reached == documented().get(name, set()) - selected


@torch.no_grad()
@pytest.mark.parametrize("name", ["segment_mean_pool", "dispatch_tokens", "combine_reads"])
def test_a_nan_stays_where_it_is_sent(name):
    op = OPS[name]
    for by in ("reference", "triton"):
        tensors = op.make()
        first = next(iter(op.floats))
        expected = op.run(tensors, backend=by)[0]
        tensors[first][0, 0] = NAN
        got = op.run(tensors, backend=by)[0]
        touched = got.isnan().flatten(2).any(-1)
        assert touched.sum() == {"segment_mean_pool": 1, "dispatch_tokens": 2, "combine_reads": 1}[name]
        assert torch.equal(expected[~touched], got[~touched])


@torch.no_grad()
@pytest.mark.parametrize(("name", "by"), [(name, by) for name, by in BOTH if name in BY_SEGMENTS])
def test_padding_may_hold_nan(name, by):
    op, (length, here) = OPS[name], sizes(name)
    real = {"cu_seqlens": rows(0, here // 2, here)}
    tensors = op.make(length) | {n: x.to(DEVICE) for n, x in real.items()}
    wrong = {n: x.clone() for n, x in tensors.items()}
    for changed in (n for n, shape in op.floats.items() if shape[1] == "T"):
        wrong[changed][:, here:] = NAN
    windows = [{}, {"window": 3}] if name.startswith("neural_memory") and by == "reference" else [{}]
    for settings in windows:
        for a, b in zip(*(op.run(x, backend=by, **settings) for x in (tensors, wrong)), strict=True):
            if a.ndim > 1 and a.shape[1] == length:
                a, b = a[:, :here], b[:, :here]
            assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_nan_stays_in_its_row_and_padding_holds_any(memory):
    model = build(memory, torch.float32)
    ids = torch.randint(0, 200, (2, 37), generator=torch.Generator().manual_seed(0))
    left, right = (torch.ones_like(ids) for _ in "lr")
    left[0, :9], right[0, -9:] = 0, 0

    def run(wrong, mask=None):
        hook = model.get_input_embeddings().register_forward_hook(
            lambda _module, _inputs, x: x.masked_fill(wrong[..., None], NAN)
        )
        logits = model(ids, attention_mask=mask).logits
        hook.remove()
        return logits

    nothing, one = torch.zeros_like(ids).bool(), torch.zeros_like(ids).bool()
    one[0, 20] = True
    expected, got = run(nothing), run(one)
    # A row may round differently when other rows of the same product change.
    assert_close("other row", expected[1], got[1], 1e-6)
    assert got[0, 20:].isnan().all()
    # As kernels/README.md describes.
    assert got[0, :20].isnan().any()
    for mask in (left, right):
        assert torch.equal(run(nothing, mask)[mask > 0], run(mask == 0, mask)[mask > 0])
