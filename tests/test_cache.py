"""Memories in files: bound to the weights that made them, complete or reported as damaged; calls without rows."""

import copy
import json
import pickle
import random
import re
import struct
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from memlm import MemLMForCausalLM, MemoryCache
from memlm.fingerprint import Snapshot, fingerprint
from memlm.memory.state import leaves, named
from tests.conftest import build, model_config, same_state


def ids(batch=1, length=20, seed=0):
    return torch.randint(259, (batch, length), generator=torch.Generator().manual_seed(seed))


def memory_of(model, batch=1, length=20):
    cache = MemoryCache()
    model(ids(batch, length), past_key_values=cache)
    return cache


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_memory_is_of_the_weights_that_made_it(name, tmp_path):
    model = build(dtype=torch.float32)
    before, memory = copy.deepcopy(model), memory_of(model)
    memory.save(tmp_path)
    x = ids(seed=1)
    optimiser = OPTIMISERS[name](model.parameters())
    model(x, labels=x).loss.backward()
    optimiser.step()
    for again in (MemoryCache.load(tmp_path), MemoryCache.load(tmp_path).fork()):
        with pytest.raises(ValueError, match=r"made by weights of fingerprint 259-\w+, not 259-\w+; load the model"):
            model(x, past_key_values=again)
    with pytest.raises(ValueError, match="trained or changed since this memory began"):
        memory.save(tmp_path / "more")
    expected = before(x, past_key_values=MemoryCache.load(tmp_path)).logits
    assert torch.equal(expected, before(x, past_key_values=memory_of(before)).logits)
    # A user may want it all the same.
    model(x, past_key_values=MemoryCache.load(tmp_path, strict=False))
    memory.save(tmp_path / "more", strict=False)
    model(x, past_key_values=MemoryCache.load(tmp_path / "more"))
    # Truncated backpropagation continues a memory that other weights began.
    model(x, past_key_values=memory.detach())


def test_what_was_loaded_and_goes_on_is_saved_as_its_models(tmp_path):
    model = build()
    memory_of(model).save(tmp_path)
    loaded, other = MemoryCache.load(tmp_path, strict=False), build(seed=1)
    with pytest.raises(ValueError, match="loaded with strict=False has no model yet"):
        loaded.save(tmp_path)
    other(ids(), past_key_values=loaded)
    loaded.save(tmp_path)
    other(ids(), past_key_values=MemoryCache.load(tmp_path))
    with pytest.raises(ValueError, match="made by weights of fingerprint"):
        model(ids(), past_key_values=MemoryCache.load(tmp_path))
    # Also a memory that was never in a file.
    with pytest.raises(ValueError, match="made by weights of fingerprint"):
        model(ids(), past_key_values=memory_of(other))
    model(ids(), past_key_values=memory_of(copy.deepcopy(model)))


def test_the_vocabulary_is_no_part_of_a_memory(tmp_path):
    model = build(dtype=torch.float32)
    memory = memory_of(model)
    memory.save(tmp_path / "a")
    model.resize_token_embeddings(300)
    memory.save(tmp_path / "b")
    memory_of(model).save(tmp_path / "c")
    model.save_pretrained(tmp_path / "model")
    again = MemLMForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        again.lm_head.weight.mul_(2)
    for name in "abc":
        again(ids(), past_key_values=MemoryCache.load(tmp_path / name))
    model.resize_token_embeddings(280)
    model(ids(), past_key_values=MemoryCache.load(tmp_path / "a"))
    with torch.no_grad():
        again.get_input_embeddings().weight[290] += 1
    again(ids(), past_key_values=MemoryCache.load(tmp_path / "a"))
    with torch.no_grad():
        again.get_input_embeddings().weight[258] += 1
    for wrong, name in ((again, "a"), (again, "c"), (model, "c")):
        with pytest.raises(ValueError, match="made by weights of fingerprint"):
            wrong(ids(), past_key_values=MemoryCache.load(tmp_path / name))
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    with pytest.raises(ValueError, match="trained or changed"):
        memory.save(tmp_path / "d")


def test_a_forward_makes_no_fingerprint(monkeypatch):
    model, memory = build(), MemoryCache()
    monkeypatch.setattr("memlm.fingerprint.digest_of", lambda *_: pytest.fail("weights were read"))
    for _ in range(2):
        model(ids(), past_key_values=memory)
    monkeypatch.setattr("memlm.cache.Snapshot", lambda *_: pytest.fail("weights were looked at"))
    model(ids(), past_key_values=memory.fork())


def test_weights_in_other_forms_have_a_fingerprint(tmp_path):
    model = build("attention", dtype=torch.float32)
    plain = fingerprint(model.model)
    with torch.ao.quantization.qconfig.warnings.catch_warnings():
        torch.ao.quantization.qconfig.warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})
    assert fingerprint(quantised.model) == fingerprint(copy.deepcopy(quantised).model) != plain
    from accelerate import cpu_offload, disk_offload

    for offload in (lambda it: cpu_offload(it, "cpu"), lambda it: disk_offload(it, tmp_path, "cpu")):
        away = copy.deepcopy(model)
        offload(away)
        memory = memory_of(away)
        assert all(p.is_meta for p in away.parameters()) and fingerprint(away.model) == plain
        memory.save(tmp_path / "memory")
        away(ids(), past_key_values=memory)
        model(ids(), past_key_values=MemoryCache.load(tmp_path / "memory"))


def test_snapshots_see_other_tensors():
    model = build().model
    now = Snapshot(model)
    assert now.holds(model)
    model.norm.weight = torch.nn.Parameter(model.norm.weight.detach().clone())
    assert not now.holds(model)
    now = Snapshot(model)
    assert now.holds(model) and not now.holds(copy.deepcopy(model)) and not now.holds(model.float())


def test_snapshots_ask_weights_without_data_for_no_address(monkeypatch):
    """As counts of operations do. torch warns of it once in a process, so the warning itself is no test."""
    with FakeTensorMode():
        model = MemLMForCausalLM(model_config("titans_mag")).model
        monkeypatch.setattr(torch.Tensor, "data_ptr", lambda _: pytest.fail("an address"))
        assert Snapshot(model).holds(model)


def one_line(load):
    with pytest.raises(ValueError) as caught:
        load()
    assert "\n" not in str(caught.value) and "memory.safetensors" in str(caught.value), caught.value


def test_every_damage_of_a_file_is_seen(tmp_path):
    path = tmp_path / "memory.safetensors"
    memory_of(build()).save(tmp_path)
    whole, generator = path.read_bytes(), random.Random(0)
    for quarter in range(4):
        path.write_bytes(whole[: len(whole) * quarter // 4])
        one_line(lambda: MemoryCache.load(tmp_path))
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for end in [header] * 100 + [len(whole)] * 100:
        at, changed = generator.randrange(end), bytearray(whole)
        changed[at] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        one_line(lambda: MemoryCache.load(tmp_path))
    path.write_bytes(whole)
    MemoryCache.load(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (None, "not a memory, or one of an earlier version"),
        ({"layers": "1000000000"}, "it has no fingerprint"),
        ({"seen": "-1"}, "its content is not what was saved"),
        ({"signature": "x"}, "its content is not what was saved"),
    ],
)
def test_files_that_are_no_memories_are_named(words, message, tmp_path):
    path = tmp_path / "memory.safetensors"
    memory_of(build()).save(tmp_path)
    if words is not None and "layers" not in words:
        whole = path.read_bytes()
        words = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])["__metadata__"] | words
    save_file(load_file(path), path, words)
    one_line(lambda: MemoryCache.load(tmp_path))
    with pytest.raises(ValueError, match=message):
        MemoryCache.load(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"0.a": (2, 3), "2.a": (2, 3)}, "its layers are 0, 2, not 0 to their number"),
        ({"-1.a": (2, 3)}, "its layers are -1"),
        ({"a": (2, 3)}, "its layers are a"),
        ({}, "its layers are none"),
        ({"0.a": (2, 3), "0.b": (3, 3)}, "states are of different numbers of rows"),
        ({"0.a": ()}, "states are of different numbers of rows"),
        ({"0.a": (2, 3), "0.a.b": (2, 3)}, "tensor 'a.b' begins with the name of another tensor"),
        ({"0.a.b": (2, 3), "0.a": (2, 3)}, "tensor 'a.b' begins with the name of another tensor"),
    ],
)
def test_files_of_wrong_states_are_named(names, message, tmp_path):
    from memlm.cache import _digest

    tensors = {name: torch.zeros(shape) for name, shape in names.items()}
    tensors["position"] = torch.zeros(2, dtype=torch.int64)
    words = {"fingerprint": "259-0", "signature": "s", "seen": "3", "start": "3"}
    save_file(tensors, tmp_path / "memory.safetensors", words | {"digest": _digest(tensors, words)})
    with pytest.raises(ValueError, match=re.escape(message)):
        MemoryCache.load(tmp_path)


def test_of_several_who_save_one_whole_memory_stays(tmp_path):
    model = build(dtype=torch.float32)
    memories = [memory_of(model, length=length) for length in (5, 9)]
    memories[0].save(tmp_path)
    threads = [threading.Thread(target=lambda m=m: [m.save(tmp_path) for _ in range(20)]) for m in memories]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert MemoryCache.load(tmp_path).seen in (5, 9)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.safetensors"]


def test_copies_and_pickles_of_a_memory_with_gradients():
    model, x = build(), ids(seed=1)
    memory = memory_of(model)
    assert any(s.grad_fn is not None for state in memory.states for s in leaves(state))
    expected = model(x, past_key_values=memory.fork()).logits
    for it in (copy.deepcopy(memory), copy.copy(memory), pickle.loads(pickle.dumps(memory.detach()))):
        assert torch.equal(expected, model(x, past_key_values=it).logits)
    assert memory.seen == 20 and not any(p.requires_grad for s in copy.deepcopy(memory).states for p in leaves(s))
    size = len(pickle.dumps(memory))
    assert size < memory.nbytes() + 20_000, "the model is in it"


def test_rows_that_there_are_not_are_named():
    memory = memory_of(build(), batch=3)
    before = copy.deepcopy(memory).states
    for call, message in (
        (lambda: memory.reset([3]), "rows: there is no row 3 in a memory of 3 rows"),
        (
            lambda: memory.reset(torch.tensor([True, False])),
            r"rows: torch.bool \[2\] must be indices of the memory's 3",
        ),
        (lambda: memory.reset(torch.tensor(1)), r"rows: torch.int64 \[\] must be indices"),
        (lambda: memory.reset([0.5]), "rows: torch.float32"),
        (lambda: memory.reorder_cache(torch.tensor([0, -4])), "beam_idx: there is no row -4"),
        (lambda: memory.batch_select_indices(torch.tensor([[0]])), r"indices: torch.int64 \[1, 1\]"),
        (lambda: memory.batch_repeat_interleave(-1), "repeats=-1 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for a, b in zip(before, memory.states, strict=True):
        assert same_state(a, b)
    memory.reset(torch.tensor([False, True, False]))
    memory.reset([-1])
    assert memory.position.tolist() == [20, 0, 0]


def test_a_memory_of_no_rows(tmp_path):
    model = build()
    memory = memory_of(model, batch=2)
    memory.batch_select_indices(torch.tensor([], dtype=torch.int64))
    memory.reset([])
    memory.reorder_cache(torch.tensor([], dtype=torch.int64))
    memory.batch_repeat_interleave(2)
    memory.save(tmp_path)
    again = MemoryCache.load(tmp_path)
    assert again.batch_size == 0 and named(again.states[0]).keys() == named(memory.states[0]).keys()
    empty = MemoryCache()
    empty.batch_repeat_interleave(3)
    empty.reorder_cache(torch.tensor([], dtype=torch.int64))
    assert empty.batch_size == -1
