"""The storage of a bank: routers' keys in low precision, contents in tiers, and nominated documents."""

import functools
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import memlm.bank
from memlm import MemoryBank
from memlm_kernels.route_documents import RouterShard, bank_keys, nominate_documents, route_documents
from memlm_kernels.testing import assert_close
from tests.test_bank import EXACT, QUESTION, asked, bank_of, library, model_of, tokens


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("reduce", [("mean", "max", "max"), ("max", "max", "max"), ("mean", "mean", "max")], ids=str)
def test_nominations_hold_every_choice(running, reduce):
    generator = torch.Generator().manual_seed(0)
    settings = dict(zip(("head_reduce", "query_reduce", "chunk_reduce"), reduce, strict=True))
    q = torch.randn(3, 7, 4, 6, generator=generator)
    asks = torch.rand(3, 7, generator=generator) < 0.6
    asks[2] = False
    sizes = torch.randint(1, 60, (90,), generator=generator)
    document = torch.arange(90).repeat_interleave(sizes)
    document = torch.where(document % 5 == 3, -1, document)
    k, _ = bank_keys(torch.randn(len(document), 2, 6, generator=generator), "cosine")
    expected = route_documents(
        q, k[None], document[None], top_k=4, num_documents=90, asks=asks, running=running, **settings
    )
    ends = [0, *F.pad(sizes.cumsum(0), (1, 0))[[20, 21, 60, 90]].tolist()]
    starts = [0, 20, 21, 60, 90]
    shards = [
        RouterShard(k[a:b], torch.where(document[a:b] < 0, -1, document[a:b] - first), torch.arange(first, end))
        for a, b, first, end in zip(ends[:-1], ends[1:], starts[:-1], starts[1:], strict=True)
    ]
    for options in ({"held": 32 * 21}, {"backend": "reference"}):
        got, scores = nominate_documents(q, shards, top_k=4, asks=asks, running=running, **options, **settings)
        assert got.shape == scores.shape == (3, 7 if running else 1, 4)
        assert ((got < 0) == (scores == float("-inf"))).all() and (got[2] < 0).all()
        for numbers, row in zip(got, expected.document, strict=True):
            wanted, offered = (set(x.flatten().tolist()) - {-1} for x in (row, numbers))
            assert wanted <= offered and not any(n % 5 == 3 for n in offered)
        if not running or options.keys() == {"backend"}:
            assert torch.equal(got, expected.document)
            assert_close("scores", *(x.masked_fill(got < 0, 0.0) for x in (expected.score, scores)), 1e-6)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("bfloat16", 4e-3), ("float8_e4m3fn", 4e-2)])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_keys_in_low_precision_find_what_is_clear(dtype, most, similarity, backend):
    """Errors of the scores stay below ``most`` of the largest, and a document that stands out is found."""
    generator, sizes = torch.Generator().manual_seed(0), torch.tensor([5, 1, 40, 3, 17] * 20)
    document, q = torch.arange(100).repeat_interleave(sizes), torch.randn(2, 5, 4, 32, generator=generator)
    # Norms differ much, as those of pooled keys may.
    k = torch.randn(len(document), 2, 32, generator=generator) * torch.rand(len(document), 1, 1, generator=generator)
    k[700] = 3 * q[0, 2].unflatten(0, (2, 2)).sum(1)
    exact = route_documents(q, k[None], document[None], top_k=100, num_documents=100, similarity=similarity)
    keys, scale = bank_keys(k, similarity, getattr(torch, dtype))
    assert keys.dtype == getattr(torch, dtype) and (scale is not None) == (dtype == "float8_e4m3fn")
    number = torch.arange(100) * 7
    shards = [RouterShard(keys, document, number, scale)]
    got, scores = nominate_documents(q, shards, top_k=100, similarity=similarity, held=500, backend=backend)
    assert got[0, 0, 0] == document[700] * 7
    for b in range(2):
        wanted = exact.score[b, 0][exact.document[b, 0].argsort()]
        error = (scores[b, 0][got[b, 0].argsort()] - wanted).abs().max()
        assert (dtype == "float32" or error > 1e-5) and error <= most * exact.score.abs().max()


@pytest.mark.parametrize(
    ("content", "key_dtype"),
    [
        pytest.param(*pair, marks=[] if i % 4 == 0 else pytest.mark.slow)
        for i, pair in enumerate(product(["mapped", "host", "device"], ["auto", "bfloat16", "float8_e4m3fn"]))
    ],
)
@torch.no_grad()
def test_contents_live_where_they_are_told_to(content, key_dtype, tmp_path, monkeypatch):
    """The bank is saved, loaded, grown and pruned; its answers are those of a bank that was never saved."""
    monkeypatch.setattr(memlm.bank.shelf, "SHARD_BYTES", 4000)
    model, documents = model_of().float(), library()
    bank = bank_of(model, documents, tokens_per_batch=16, content=content, key_dtype=key_dtype)
    plain = bank_of(model, documents, key_dtype=key_dtype)
    for step in range(3):
        assert_close(f"step {step}", asked(model, plain, QUESTION), asked(model, bank, QUESTION), 1e-6)
        bank.save(tmp_path)
        if step == 1:
            bank = MemoryBank.load(tmp_path, model, content=content)
        stats = bank.stats()
        heads = len(bank.layers) * model.config.num_key_value_heads
        per_chunk, all_chunks = heads * model.config.head_dim, stats["chunks"] + stats["dead_chunks"]
        scales = heads * 4 if key_dtype == "float8_e4m3fn" else 0
        keys = all_chunks * (per_chunk * bank.shelf.shards[0].router_LCGK.element_size() + scales)
        kept = {"mapped": stats["disk_bytes"], "host": stats["host_bytes"], "device": stats["device_bytes"] - keys}
        assert kept[content] == sum(kept.values()) == 2 * 4 * per_chunk * all_chunks
        assert stats["key_dtype"] == ("float32" if key_dtype == "auto" else key_dtype)
        for it in (bank, plain):
            it.delete([f"d{step}", f"d{step + 5}"])
            it.add({f"new{step}": tokens(11, 60 + step)})
    if content != "mapped":
        bank.save(tmp_path)
        for path in tmp_path.glob("*"):
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
        assert_close("without files", asked(model, plain, QUESTION), asked(model, bank, QUESTION), 1e-6)


@torch.no_grad()
def test_a_device_of_its_own_has_the_keys_side_by_side(monkeypatch, tmp_path):
    """As on a GPU: routing reads slabs of keys, which grow, are marked and cleaned up, independently of the shards."""
    monkeypatch.setattr(memlm.bank.shelf, "SHARD_BYTES", 2000)
    monkeypatch.setattr(memlm.bank.resident, "_LEAST", 8)
    made, nominate = MemoryBank.__init__, memlm.bank.bank.nominate_documents

    def init(self, *args, **options):
        made(self, *args, **options)
        self.shelf.resident = memlm.bank.resident.Resident(self.model.device)

    for key_dtype in ("auto", "float8_e4m3fn"):
        model, documents = model_of(), library()
        plain = bank_of(model, documents, tokens_per_batch=16, key_dtype=key_dtype)
        with monkeypatch.context() as patched:
            patched.setattr(MemoryBank, "__init__", init)
            by_reference = functools.partial(nominate, backend="reference")
            patched.setattr(memlm.bank.bank, "nominate_documents", by_reference)
            bank = bank_of(model, documents, tokens_per_batch=16, key_dtype=key_dtype)
            for step in range(14):
                expected = asked(model, plain, QUESTION)
                assert_close(f"step {step}", expected, asked(model, bank, QUESTION), EXACT)
                live = sum(slab.used - slab.dead for slab in bank.shelf.resident.slabs)
                assert live == bank.stats()["chunks"] and all(s.dead * 2 <= s.used for s in bank.shelf.resident.slabs)
                names = bank.documents()
                for it in (bank, plain):
                    it.delete(names[step % 3 :: 3] if step % 4 else names[:1])
                    it.add({f"{step}a": tokens(1 + 7 * step % 23, step), f"{step}b": tokens(9, 40 + step)})
                if step % 5 == 4:
                    folder = tmp_path / key_dtype
                    bank.save(folder)
                    bank = MemoryBank.load(folder, model)
                    assert len(bank.shelf.resident.slabs) == 1
