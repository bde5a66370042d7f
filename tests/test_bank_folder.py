"""A bank's folder: one writer at a time, nothing lost to faults, damage detected and named in one line."""

import copy
import json
import random
import struct
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm.bank
from memlm import MemLMForCausalLM, MemoryBank, MemoryCache, files
from memlm.bank.folder import INDEX, read_index, write_index
from memlm.data import byte_tokenizer
from memlm_kernels.testing import assert_close
from tests.conftest import build, same_state
from tests.faults import every_fault
from tests.test_bank import EXACT, QUESTION, asked, bank_of, library, model_of, tokens


def shards(folder):
    return {path.name for path in folder.iterdir()} - {INDEX, ".lock"}


def named(folder):
    index = read_index(folder)
    return {entry["file"] for entry in index["shards"]} | {index["tokenizer"]} - {None}


class Saves:
    """A memory, a bank that is changed, and a bank that is built, each in its own folder."""

    def __init__(self, folder):
        # Every batch is a shard and is saved.
        memlm.bank.bank.AHEAD, memlm.bank.bank.COMMIT_SECONDS, memlm.bank.shelf.SHARD_BYTES = 1, 0, 2000
        self.model = model_of()
        self.memories = [MemoryCache(), MemoryCache()]
        with torch.no_grad():
            for length, memory in zip((3, 8), self.memories, strict=True):
                self.model(tokens(length, 1)[None], past_key_values=memory)
            self.memories[0].save(folder / "memory")
            before = bank_of(
                self.model, library() | {"text": "deleted"}, tokenizer=byte_tokenizer(), tokens_per_batch=16
            )
            before.save(folder / "changed")
            self.answers = {tuple(before.documents()): asked(self.model, before, QUESTION)}
            self.after = self.changed(before)
            self.answers[self.after] = asked(self.model, before, QUESTION)

    def changed(self, bank):
        bank.delete(["d1", "d3", "text"])
        bank.update({"d5": tokens(6, 78)})
        bank.add({"new": tokens(20, 77)})
        return tuple(bank.documents())

    @torch.no_grad()
    def save(self, folder):
        bank = MemoryBank.load(folder / "changed", self.model)
        self.changed(bank)
        bank.save(folder / "changed")
        self.memories[1].save(folder / "memory")
        bank_of(self.model, library((9, 1, 4, 13)), directory=folder / "built", tokens_per_batch=16)

    @torch.no_grad()
    def check(self, folder, done):
        memory = MemoryCache.load(folder / "memory")
        assert memory.seen == 8 or (memory.seen == 3 and not done)
        self.model(tokens(3, 2)[None], past_key_values=memory)
        bank = MemoryBank.load(folder / "changed", self.model, verify=True)
        assert tuple(bank.documents()) in self.answers and (tuple(bank.documents()) == self.after or not done)
        assert_close("answers", self.answers[tuple(bank.documents())], asked(self.model, bank, QUESTION), EXACT)
        # Leftovers of a dead process are removed, and no process waits for its lock.
        bank.save(folder / "changed")
        assert shards(folder / "changed") == named(folder / "changed"), shards(folder / "changed")
        if (folder / "built" / INDEX).exists() and read_index(folder / "built")["complete"]:
            built = MemoryBank.load(folder / "built", self.model, verify=True)
        else:
            assert not done
            built = bank_of(self.model, library((9, 1, 4, 13)), directory=folder / "built")
        assert built.documents() == ["d0", "d1", "d2", "d3"] and shards(folder / "built") == named(folder / "built")


@pytest.mark.parametrize("at_most", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_saves_survive_any_fault(at_most, tmp_path):
    report = every_fault("tests.test_bank_folder:Saves", tmp_path, at_most)
    assert at_most or report["tried"] == 5 * report["operations"] + 1
    print(report)


def test_a_writer_that_does_not_know_what_is_there_is_refused(tmp_path):
    model = model_of()
    bank_of(model, library()).save(tmp_path)
    one, other = (MemoryBank.load(tmp_path, model) for _ in range(2))
    one.delete([f"d{i}" for i in range(9)])
    one.save(tmp_path)
    for bank in (other, bank_of(model, library())):
        with pytest.raises(ValueError, match="holds a bank that this one does not know, perhaps saved by another"):
            bank.save(tmp_path)
    assert MemoryBank.load(tmp_path, model).documents() == ["d9"] and shards(tmp_path) == named(tmp_path)
    # The files that it has mapped are still its own.
    other.save(tmp_path / "other")
    assert MemoryBank.load(tmp_path / "other", model, verify=True).documents() == list(library())
    one.add({"more": tokens(3, 1)})
    one.save(tmp_path)
    assert MemoryBank.load(tmp_path, model).documents() == ["d9", "more"]


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    model = model_of()
    bank = bank_of(model, library())
    (tmp_path / "shard-0123456789abcdef.safetensors").write_text("of a save that was killed")
    (tmp_path / "index.json.partial-0123456789ab").write_text("of a save that was killed")
    (tmp_path / "shard-00001-of-00002.safetensors").write_text("somebody's")
    with files.lock(tmp_path):
        for write in (lambda: bank.save(tmp_path), lambda: bank_of(model, library(), directory=tmp_path)):
            with pytest.raises(
                ValueError, match=r"process \d+ on .* writes there; wait for it to end, or name another"
            ):
                write()
    assert not (tmp_path / INDEX).exists() and len(shards(tmp_path)) == 3
    bank.save(tmp_path)
    assert shards(tmp_path) == named(tmp_path) | {"shard-00001-of-00002.safetensors"}


def test_who_loads_while_others_save_has_the_one_bank_or_the_other(tmp_path):
    model = model_of()
    bank = bank_of(model, library())
    bank.save(tmp_path)
    states, failed = [bank.documents()], []

    def work():
        try:
            for i in range(12):
                bank.delete(bank.documents()[0])
                bank.add({f"new{i}": tokens(30, i)})
                states.append(bank.documents())
                bank.save(tmp_path)
        except Exception as error:
            failed.append(error)

    with torch.no_grad():
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            assert MemoryBank.load(tmp_path, model, verify=True).documents() in states
    assert not failed


def test_a_file_that_another_save_removes_while_it_is_read_is_missing(tmp_path, monkeypatch):
    model = model_of()
    bank_of(model, library()).save(tmp_path)
    opened = Path.open

    def removed(path, *args, **kwargs):
        if path.suffix == ".safetensors":
            path.unlink(missing_ok=True)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", removed)
    with pytest.raises(ValueError, match="a part of the bank is missing"):
        MemoryBank.load(tmp_path, model)


def test_a_save_that_fails_leaves_no_files_and_can_be_tried_again(tmp_path, monkeypatch):
    model = model_of()
    bank = bank_of(model, library())
    bank.save(tmp_path)
    before = shards(tmp_path)
    bank.add({"new": tokens(9, 1)})

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("memlm.bank.folder.write_index", full)
        with pytest.raises(OSError, match="disk full"):
            bank.save(tmp_path)
    assert shards(tmp_path) == before and "new" not in MemoryBank.load(tmp_path, model)
    bank.save(tmp_path)
    assert "new" in MemoryBank.load(tmp_path, model)
    for name in shards(tmp_path) | {INDEX}:
        (tmp_path / name).unlink()
    bank.save(tmp_path)
    assert MemoryBank.load(tmp_path, model, verify=True).documents() == bank.documents()


def refused(load):
    with pytest.raises(ValueError) as caught:
        load()
    line = str(caught.value)
    assert "\n" not in line and ("index.json" in line or "shard-" in line), line


def tensor_ranges(path):
    head = path.read_bytes()
    start = 8 + struct.unpack("<Q", head[:8])[0]
    header = json.loads(head[8:start])
    return {name: [start + at for at in x["data_offsets"]] for name, x in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("key_dtype", ["auto", "float8_e4m3fn"])
@torch.no_grad()
def test_damage_of_files_is_seen(key_dtype, tmp_path):
    """Damage of an index or a table is seen at once, of keys on a query, of contents on a copy or by ``verify``."""
    model = model_of().float()
    bank_of(model, {f"{i}": tokens(150, i) for i in range(30)}, key_dtype=key_dtype).save(tmp_path)
    (shard,) = tmp_path.glob("shard-*")
    generator, index, whole = random.Random(0), tmp_path / INDEX, shard.read_bytes()
    ranges, text = tensor_ranges(shard), index.read_bytes()

    def flipped(path, content, start, end):
        changed, at = bytearray(content), generator.randrange(start, end)
        changed[at] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)

    for _ in range(30):
        flipped(index, text, 0, len(text))
        refused(lambda: MemoryBank.load(tmp_path, model))
    index.write_bytes(text)
    start = min(begin for begin, _ in ranges.values())
    for begin, end in [(0, start)] * 20 + [ranges["documents"]] * 20:
        flipped(shard, whole, begin, end)
        refused(lambda: MemoryBank.load(tmp_path, model))
    # A bank of token ids has no texts.
    for name in {name for name, (begin, end) in ranges.items() if begin < end} - {"documents", "content"}:
        for _ in range(4):
            flipped(shard, whole, *ranges[name])
            refused(lambda: MemoryBank.load(tmp_path, model, verify=True))
            refused(lambda: asked(model, MemoryBank.load(tmp_path, model), QUESTION))
    for _ in range(4):
        flipped(shard, whole, *ranges["content"])
        refused(lambda: MemoryBank.load(tmp_path, model, verify=True))
        refused(lambda: MemoryBank.load(tmp_path, model, content="host"))
        refused(lambda: MemoryBank.load(tmp_path, model).save(tmp_path / "other"))
        refused(lambda: MemoryBank.load(tmp_path, model).delete([f"{i}" for i in range(20)]))
    for path, content in ((shard, whole), (index, text)):
        for quarter in range(4):
            path.write_bytes(content[: len(content) * quarter // 4])
            refused(lambda: MemoryBank.load(tmp_path, model))
        path.write_bytes(content)
    assert len(MemoryBank.load(tmp_path, model, verify=True)) == 30


def test_a_damaged_shard_is_refused_again_and_again(tmp_path):
    model = model_of()
    bank_of(model, {"a": tokens(4000, 0)}).save(tmp_path)
    (path,) = tmp_path.glob("shard-*")
    changed, (begin, _) = bytearray(path.read_bytes()), tensor_ranges(path)["router"]
    # Between two pages that every load compares.
    changed[begin + 5000] ^= 1
    path.write_bytes(changed)
    bank = MemoryBank.load(tmp_path, model)
    for _ in range(2):
        refused(lambda: asked(model, bank, QUESTION))


@pytest.mark.parametrize("cases", [50, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_json_in_the_place_of_a_value_is_one_line_or_the_same_content(cases, tmp_path):
    """In an index, and in the header of a memory's or a shard's file, except for some words."""
    model, memory = model_of().float(), MemoryCache()
    bank_of(model, library()).save(tmp_path)
    model(tokens(5, 1)[None], past_key_values=memory)
    memory.save(tmp_path)
    (shard,) = tmp_path.glob("shard-*")
    paths = [tmp_path / INDEX, shard, tmp_path / "memory.safetensors"]
    whole = {path: path.read_bytes() for path in paths}
    numbers = st.integers() | st.floats() | st.sampled_from([10**12, -1, 1 << 63, 10**400])
    anything = st.recursive(
        st.none() | st.booleans() | numbers | st.text(max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["file", "shape", "x"]), x, max_size=3),
    )

    @settings(max_examples=cases, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(paths), st.data())
    def one(path, data):
        content, start = whole[path], 0 if path.name == INDEX else 8
        end = len(content) if not start else start + struct.unpack("<Q", content[:8])[0]
        place = header = json.loads(content[start:end])
        while True:
            key = data.draw(
                st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1)
            )
            if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        if data.draw(st.booleans()):
            place[key] = data.draw(anything)
        else:
            del place[key]
        text = json.dumps(header).encode()
        path.write_bytes((struct.pack("<Q", len(text)) if start else b"") + text + content[end:])
        try:
            if path.name == "memory.safetensors":
                loaded, expected = MemoryCache.load(tmp_path).states, memory.states
                assert all(map(same_state, loaded, expected)) and len(loaded) == len(expected)
            else:
                assert MemoryBank.load(tmp_path, model, verify=True).documents() == list(library())
        except ValueError as error:
            assert "\n" not in str(error) and path.name in str(error), error
        finally:
            path.write_bytes(content)

    one()


@pytest.mark.parametrize(
    "change",
    [
        {"shards": ""},
        {"shards": [{"file": "../x", "sample": "", "deleted": []}]},
        {"read": 10**12},
        {"read": "3"},
        {"key_dtype": "int8"},
        {"complete": 1.5},
        {"fingerprint": None},
        {"digest": None},
    ],
    ids=str,
)
def test_an_index_changed_by_hand_is_named(change, tmp_path):
    bank_of(model_of(), library()).save(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=r"index\.json: damaged, or changed by hand; restore it, or build"):
        MemoryBank.load(tmp_path, model_of())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ("[]", "must hold an object, not list"),
        ("{}", "not a bank's, or of an earlier version"),
        ('{"fingerprint": "0123", "shards": [], "read": 0}', "not a bank's, or of an earlier version"),
        ("\udcff", "cannot be read as JSON"),
    ],
    ids=["deep", "list", "empty", "earlier", "bytes"],
)
def test_an_index_that_is_none_is_named(text, message, tmp_path):
    model = model_of()
    (tmp_path / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    for use in (
        lambda: MemoryBank.load(tmp_path, model),
        lambda: bank_of(model, library()).save(tmp_path),
        lambda: bank_of(model, library(), directory=tmp_path),
    ):
        refused(use)
        with pytest.raises(ValueError, match=message):
            use()


def test_the_vocabulary_is_no_part_of_a_bank(tmp_path):
    model = model_of().float()
    bank = bank_of(model, library())
    bank.save(tmp_path)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "model")
    again = MemLMForCausalLM.from_pretrained(tmp_path / "model")
    for it, of in ((bank, model), (MemoryBank.load(tmp_path, again), again)):
        it.add({"new": [299, 280]})
        of.generate(tokens(4, 1)[None], memory_bank=it, max_new_tokens=2, pad_token_id=0)
    it.save(tmp_path)
    assert "new" in MemoryBank.load(tmp_path, again)
    small = copy.deepcopy(again)
    small.resize_token_embeddings(259)
    with pytest.raises(ValueError, match="a bank of the model of fingerprint 300-"):
        MemoryBank.load(tmp_path, small)


def test_a_bank_of_a_model_of_another_kind_is_one_line(tmp_path):
    bank_of(model_of(), library()).save(tmp_path)
    with pytest.raises(ValueError, match="a bank needs 'msa' in every layer"):
        MemoryBank.load(tmp_path, build("titans_mag"))
    write_index(tmp_path, read_index(tmp_path))
    assert MemoryBank.load(tmp_path, model_of()).documents() == list(library())
