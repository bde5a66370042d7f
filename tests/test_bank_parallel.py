"""A bank divided among several processes equals the bank of one: routes, contents, tokens, folders."""

import contextlib

import torch
import torch.distributed as dist

import memlm.bank
from memlm import MemoryBank, files
from memlm.bank.ranks import Ranks
from memlm.bank.shard import Shard
from memlm_kernels.testing import assert_close
from tests import ranks
from tests.test_bank import EXACT, LENGTHS, QUESTION, asked, joined, library, model_of, tokens

SIZES = (1, 3)
SETTINGS = [
    {},
    {"similarity": "dot", "routing": "query", "top_k": 3},
    {"head_reduce": "max", "query_reduce": "mean", "chunk_reduce": "mean"},
]
# How each of these banks keeps its keys and contents.
KEPT = [{}, {"key_dtype": "float8_e4m3fn"}, {"key_dtype": "bfloat16", "content": "host"}]


def told(bank):
    """Everything of a bank that a user can see."""
    ids, doc_ids = joined(QUESTION[:-1])
    rows = [tokens(5, 3), tokens(5, 4)]
    found = bank.search(torch.stack(rows))
    options = dict(max_new_tokens=2, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
    return {
        "names": [bank.documents(), *([list(row) for row in found[layer]] for layer in bank.layers)],
        "counts": {k: n for k, n in bank.stats().items() if not k.endswith("bytes")},
        "scores": torch.tensor([s for layer in bank.layers for row in found[layer] for s in row.values()]),
        "logits": asked(bank.model, bank, QUESTION),
        "generated": bank.model.generate(ids, doc_ids=doc_ids, memory_bank=bank, **options),
    }


@torch.no_grad()
def story(group, folder, banks=3):
    """Build, change, save and load banks."""
    said = []
    for i, (settings, kept) in enumerate(zip(SETTINGS[:banks], KEPT, strict=False)):
        model, where = model_of(**settings), folder / f"{i}"
        bank = MemoryBank.build(model, library(), where, tokens_per_batch=16, progress=False, group=group, **kept)
        said.append(told(bank))
        bank.delete(["d1", "d5"])
        bank.update({"d2": tokens(6, 71)})
        bank.add({"new": tokens(9, 72), "d5": tokens(5, 73)})
        said.append(told(bank))
        bank.save(where)
        said.append(told(bank))
        said.append(told(MemoryBank.load(where, model, group)))
    return said


@torch.no_grad()
def few(group):
    """Banks of fewer documents than processes."""
    said, model = [], model_of(top_k=3)
    for lengths in ((), (5, 9)):
        bank = MemoryBank.build(model, library(lengths), progress=False, group=group)
        said.append(told(bank))
        bank.add({"more": tokens(7, 1)})
        said.append(told(bank))
        bank.delete(bank.documents())
        said.append(told(bank))
    return said


def work(rank, size, folder):
    """Its results by the size of the group."""
    results, groups = {}, {of: dist.new_group(range(of)) for of in SIZES}
    for of, group in groups.items():
        if rank < of:
            # A group of one process has no way of its own.
            where = folder / f"of {of}"
            said = {"story": story(group, where, 1) if of == 1 else story(group, where) + few(group)}
            said["loaded"] = told(MemoryBank.load(folder / "of one" / "0", model_of(), group))
            results[of] = said | alone(rank, group) | failing(rank, group, folder / f"failing {of}")
    return results


def alone(rank, group):
    """The share of each process, ties, differing models, and the number of collectives per layer."""
    bank = MemoryBank.build(model_of(), library(), progress=False, group=group)
    group_of, said = Ranks(group), {"kept": sum(shard.router_LCGK.shape[1] for shard in bank.shelf.shards)}
    mine = torch.tensor([[9 - rank, 20 + rank, -1]]), torch.tensor([[0.5, 0.25, float("-inf")]])
    said["ties"] = group_of.best(*mine, 3)
    try:
        MemoryBank(model_of(seed=rank), group=group)
        said["refused"] = ""
    except ValueError as error:
        said["refused"] = str(error)
    counts = {}
    originals = dist.all_gather, dist.all_reduce

    def counted(op):
        def call(*args, **kwargs):
            counts[op.__name__] = counts.get(op.__name__, 0) + 1
            return op(*args, **kwargs)

        return call

    dist.all_gather, dist.all_reduce = map(counted, originals)
    asked(bank.model, bank, QUESTION)
    dist.all_gather, dist.all_reduce = originals
    return said | {"collectives": counts}


def failing(rank, group, folder):
    """The errors of all processes when one of them fails to save, load or lock."""
    bank = MemoryBank.build(model_of(), library(), progress=False, group=group)
    errors, write, read = [], Shard.write, memlm.bank.folder.read_shard

    def fail(*_):
        raise OSError("disk full")

    def attempt(do):
        try:
            do()
        except (OSError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}")

    Shard.write = fail if rank == 0 else write
    attempt(lambda: bank.save(folder))
    Shard.write = write
    bank.save(folder)
    memlm.bank.folder.read_shard = fail if rank == dist.get_world_size(group) - 1 else read
    attempt(lambda: MemoryBank.load(folder, bank.model, group))
    memlm.bank.folder.read_shard = read
    with files.lock(folder) if rank == 0 else contextlib.nullcontext():
        dist.barrier(group)
        attempt(lambda: bank.save(folder))
        dist.barrier(group)
    bank.save(folder)
    return {"errors": errors}


def same(expected, got, where):
    assert got["names"] == expected["names"] and got["counts"] == expected["counts"], where
    assert torch.equal(got["generated"], expected["generated"]), where
    for name in ("logits", "scores"):
        if expected[name].numel():
            assert_close(f"{where} {name}", expected[name], got[name], EXACT)


def test_any_number_of_processes_is_one(tmp_path):
    expected = story(None, tmp_path / "of one") + few(None)
    loaded = told(MemoryBank.load(tmp_path / "of one" / "0", model_of()))
    results = ranks.run(work, max(SIZES), tmp_path, tmp_path)
    for size in SIZES:
        said = [results[rank][size] for rank in range(size)]
        for rank, of_rank in enumerate(said):
            for step, (a, b) in enumerate(zip(expected, of_rank["story"], strict=size > 1)):
                same(a, b, f"rank {rank} of {size}, step {step}")
            same(loaded, of_rank["loaded"], f"rank {rank} of {size}, loaded")
            assert of_rank["collectives"] == ({"all_gather": 2, "all_reduce": 2} if size > 1 else {})
            assert of_rank["ties"].tolist() == {1: [[9, 20, -1]], 3: [[7, 8, 9]]}[size]
            assert ("models of" in of_rank["refused"]) == (size > 1)
            full, other, locked = of_rank["errors"]
            assert full == other == "OSError: disk full" and "writes there; wait for it to end" in locked
        kept = [of_rank["kept"] for of_rank in said]
        assert (sum(kept) == sum(-(-n // 4) for n in LENGTHS) and max(kept) < sum(kept)) or size == 1
        # One process reads what several saved.
        one = MemoryBank.load(tmp_path / f"of {size}" / "0", model_of())
        with torch.no_grad():
            same(expected[3], told(one), f"saved by {size}")
