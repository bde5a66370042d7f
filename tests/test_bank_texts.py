"""A bank of texts: the same answers as from tokens, the reader of the corpora, and the script for a person."""

import gzip
import json
import re
import runpy
import shlex
import shutil
import sys

import pytest
import torch
import transformers

import memlm.bank.shard
from memlm import MemoryBank, files
from memlm.bank import listed
from memlm.data import Documents, Templates, Texts, WholeText, byte_tokenizer
from tests.conftest import ROOT, build
from tests.test_bank import bank_of, interrupted, model_of
from tests.test_bank_folder import tensor_ranges

TEXTS = {"a": "It was the best of times.", "b": "ünïcode, 漢字", "c": "a"}
CHECKPOINT = ROOT / "tests" / "reference" / "facts_alike"


def bank_of_texts(texts=TEXTS, **options):
    return bank_of(model_of(), texts, tokenizer=byte_tokenizer(), **options)


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_texts_act_as_their_tokens_and_are_kept(tmp_path):
    bank, plain = bank_of_texts(), bank_of(model_of(), {name: ids(text) for name, text in TEXTS.items()})
    found = plain.search(torch.tensor([ids("best?")]))
    assert bank.search("best?") == found and len(found) == 2
    reply = bank.ask("best?", 5)
    bank.save(tmp_path)
    again = MemoryBank.load(tmp_path, model_of(), verify=True)
    assert again.ask("best?", 5)._replace(seconds=0, bank_bytes=0) == reply._replace(seconds=0, bank_bytes=0)
    with pytest.raises(ValueError, match="this bank has no tokenizer: build it with tokenizer="):
        plain.search("best?")
    question = torch.tensor([ids("best?")])
    mask = torch.ones_like(question)
    out = plain.model.generate(
        question, memory_bank=plain, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert reply.text == byte_tokenizer().decode(out[0, 5:], skip_special_tokens=True)
    for layer, readings in reply.read.items():
        assert {r.name: r.score for r in readings} == found[layer][0]
        assert all(reply.passages[r.name, r.chunk] == again.passage(r.name, r.chunk) for r in readings)
    # Two layers, keys and values, of the chunks of the documents read.
    chunks = sum(-(-len(ids(TEXTS[r.name])) // 4) for readings in reply.read.values() for r in readings)
    config = bank.model.config
    assert reply.read_bytes == chunks * 2 * config.num_key_value_heads * config.head_dim * 8
    assert {name: again.text(name) for name in again.documents()} == TEXTS
    assert again.passage("a", 1) == "as t" and "".join(again.passage("a", i) for i in range(7)) == TEXTS["a"]
    # The question is read with its templates.
    assert again.ask("best?", 5, Templates.plain()).text == again.ask("\nbest?\n", 5).text


def test_a_flipped_bit_of_a_text_is_seen(tmp_path):
    bank_of_texts().save(tmp_path)
    (shard,) = tmp_path.glob("shard-*")
    begin, end = tensor_ranges(shard)["text"]
    assert end - begin == sum(len(ids(text)) for text in TEXTS.values())
    changed = bytearray(shard.read_bytes())
    changed[begin] ^= 1
    shard.write_bytes(changed)
    with pytest.raises(ValueError, match="restore"):
        MemoryBank.load(tmp_path, model_of()).text("a")
    with pytest.raises(ValueError, match=shard.name):
        MemoryBank.load(tmp_path, model_of(), verify=True)


@torch.no_grad()
def test_the_passage_is_the_chunk_with_the_best_score():
    """Against scores of each chunk alone."""
    for settings in ({}, {"query_reduce": "mean", "chunk_reduce": "mean"}):
        model = model_of(top_k=3, **settings)
        bank = bank_of(model, TEXTS, tokenizer=byte_tokenizer())
        single = {f"{n} {i}": bank.passage(n, i) for n in TEXTS for i in range(-(-len(ids(TEXTS[n])) // 4))}
        read = bank.ask("times?", 1).read
        for layer, readings in read.items():
            router, content = {}, bank.shelf.shards[0]
            of_layer = content.router_LCGK[bank.layers.index(layer)]
            first = 0
            for name, text in TEXTS.items():
                count = -(-len(ids(text)) // 4)
                router[name], first = of_layer[first : first + count], first + count
            scores, original = {}, bank.candidates

            def keep(layer_idx, q_BAHK, asks_BA, held_BC, layer=layer, router=router, scores=scores, do=original):
                if layer_idx == layer:
                    q = torch.nn.functional.normalize(q_BAHK[0], dim=-1)
                    for name, k in router.items():
                        k = torch.nn.functional.normalize(k, dim=-1).repeat_interleave(q.shape[1] // k.shape[1], 1)
                        scores[name] = torch.einsum("ahk,chk->ac", q, k) / q.shape[1]
                return do(layer_idx, q_BAHK, asks_BA, held_BC)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(bank, "candidates", keep)
                bank.search("times?")
            assert len(readings) == 3 and len(single) == 13
            for reading in readings:
                of_chunks = scores[reading.name].mean(0) if settings else scores[reading.name].max(0).values
                assert reading.chunk == int(of_chunks.argmax())
                total = of_chunks.mean() if settings else of_chunks.max()
                assert reading.score == pytest.approx(float(total), abs=1e-9)


def test_any_change_of_texts(tmp_path):
    bank = bank_of_texts()
    bank.save(tmp_path)
    told = bank.put({"a": TEXTS["a"], "b": WholeText("new b", "b.txt"), "d": "new d"})
    assert told == {"added": 1, "updated": 1, "unchanged": 1}
    bank.add({"e": "e"})
    bank.update({"c": "another c"})
    bank.delete("a")
    with pytest.raises(ValueError, match=r"document 'bb' is not in the bank of 4; did you mean 'b'\?"):
        bank.text("bb")
    expected = {"b": "new b", "d": "new d", "e": "e", "c": "another c"}
    for it in (bank, [bank.save(tmp_path), MemoryBank.load(tmp_path, model_of(), verify=True)][1]):
        assert {name: it.text(name) for name in it.documents()} == expected
        assert set(it.ask("new?", 2).passages) <= {(name, i) for name in expected for i in range(3)}
    assert [(of.name, of.tokens, of.source) for of in listed(tmp_path)] == [
        (name, len(text), "b.txt" if name == "b" else "") for name, text in expected.items()
    ]
    # No file holds the text of a deleted document, and a new folder gets the tokenizer too.
    assert b"best of times" not in b"".join(path.read_bytes() for path in tmp_path.glob("shard-*"))
    bank.save(tmp_path / "copy")
    assert MemoryBank.load(tmp_path / "copy", model_of()).ask("new?", 2).text == bank.ask("new?", 2).text


@pytest.mark.parametrize("change", ["add", "put"])
def test_an_interrupted_change_changes_nothing(change, tmp_path):
    bank = bank_of_texts()
    bank.save(tmp_path)
    before, answer = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, bank.ask("?", 3).text
    with pytest.raises(KeyboardInterrupt):
        getattr(bank, change)(interrupted({f"new {i}": "text" * i for i in range(1, 9)}, 6))
    assert bank.documents() == list(TEXTS) and bank.ask("?", 3).text == answer
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_bad_texts_are_named(tmp_path):
    bank = bank_of_texts()
    with pytest.raises(ValueError, match=r"documents\['x'\] of shape \[0\] must be token ids \[T\], at least one"):
        bank.add({"x": ""})
    with pytest.raises(ValueError, match=r"questions: '' has no tokens; ask something"):
        bank.ask("")
    with pytest.raises(ValueError, match=r"documents\[3\]: a name must be a string"):
        bank.add({3: "text"})
    bank.save(tmp_path)
    (tokenizer,) = tmp_path.glob("tokenizer-*")
    (shard,) = tmp_path.glob("shard-*")
    whole = shard.read_bytes()
    at = whole.index(b"best")
    shard.write_bytes(whole[:at] + b"B" + whole[at + 1 :])
    # A small file is compared when it is opened, and a mapped one stays mapped.
    with pytest.raises(ValueError, match="torn or changed since it was saved"):
        MemoryBank.load(tmp_path, model_of())
    shard.write_bytes(whole)
    again = MemoryBank.load(tmp_path, model_of())
    again.shelf.shards[0].text_X = again.shelf.shards[0].text_X.clone()
    again.shelf.shards[0].text_X[3] ^= 1
    with pytest.raises(ValueError, match=r"shard-.*: the text of 'a' is not as it was saved; restore the file"):
        again.text("a")
    (tokenizer / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"tokenizer-\w+: not the bank's tokenizer \(.*damaged.*\); restore the folder"
    ):
        MemoryBank.load(tmp_path, model_of()).ask("?")


def test_a_bank_of_an_earlier_version_has_no_texts(tmp_path, monkeypatch):
    written = files.write_tensors

    def without_text(path, tensors, words):
        written(path, *({name: x for name, x in of.items() if name != "text"} for of in (tensors, words)))

    monkeypatch.setattr(memlm.bank.shard, "_TABLE", memlm.bank.shard._TABLE[:4])
    monkeypatch.setattr(files, "write_tensors", without_text)
    bank_of_texts().save(tmp_path)
    monkeypatch.undo()
    bank = MemoryBank.load(tmp_path, model_of(), verify=True)
    assert bank.text("a") is None and bank.ask("?", 1).passages.keys() and not any(bank.ask("?", 1).passages.values())
    bank.add({"d": "text"})
    bank.save(tmp_path)
    assert MemoryBank.load(tmp_path, model_of()).text("d") == "text"
    assert [of.added > 0 for of in listed(tmp_path)] == [False, False, False, True]


def test_files_are_read_as_those_of_a_corpus(tmp_path):
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.md").write_bytes(b"\xef\xbb\xbf# A\r\n\x0cpage")
    (folder / "sub" / "b.txt").write_text("line\n" * 400_000)
    (folder / "empty.txt").touch()
    (folder / "c.pdf").write_text("%PDF")
    (folder / ".hidden.txt").write_text("hidden")
    lines = [json.dumps({"text": text}) for text in ("one", "", "three")]
    (folder / "d.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    corpus, expected = Documents(str(folder), tmp_path / "cache"), {}
    for document in corpus:
        name = corpus.name(document.file, document.row)
        expected[name] = expected.get(name, "") + document.text
    texts = Texts(str(folder))
    assert {name: of.text for name, of in texts} == expected and len(texts) == len(expected) == 4
    assert [*expected] == ["notes/a.md", "notes/d.jsonl.gz:1", "notes/d.jsonl.gz:3", "notes/sub/b.txt"]
    assert dict(texts)["notes/a.md"].source == str(folder / "a.md") and texts.left_out == corpus.left_out
    assert sorted(texts.left_out.values()) == ["ending in .pdf", "hidden"]


def script(capsys, line: str) -> tuple[int, str]:
    """Exit code and output of a command, run in this process: another Python would take longer to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bank.py", *shlex.split(line, comments=True)])
        try:
            runpy.run_path(str(ROOT / "scripts" / "bank.py"), run_name="__main__")
            code = 0
        except SystemExit as done:
            code = done.code
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A folder with the documents of the README's example, and the run that it names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CHECKPOINT, tmp_path / "runs" / "facts_alike" / "msa-seed0")
    (tmp_path / "notes").mkdir()
    for name, text in {"a.txt": "!;$.ab3cX%(", "old.md": "+qxypY.:*", "c.txt": "%.,!dwp2W)-<"}.items():
        (tmp_path / "notes" / name).write_text(text)
    return tmp_path / "notes"


def test_the_commands_of_the_page(notes, capsys):
    (block,) = re.findall(r"```bash\n(python scripts/bank.*?)```", (ROOT / "memlm/bank/README.md").read_text(), re.S)
    said = {}
    for line in block.splitlines():
        words = line.removeprefix("python scripts/bank.py ")
        if words.startswith("add"):
            (notes / "new.md").write_text("another text")
        code, said[words.split()[0]] = script(capsys, words)
        assert code == 0, (line, said)
    assert [*said] == ["build", "ask", "add", "delete", "list"]
    assert "banks/notes: documents: 3, tokens: 32, " in said["build"]
    assert re.fullmatch(r"W\n\nlayer 1 read\n  0\.\d+  notes/c\.txt\n +W\)-<\n\n\d+\.\d\d s; .*\n", said["ask"])
    assert "1 added, 0 updated, 3 unchanged" in said["add"] and "documents: 3, tokens: 35" in said["delete"]
    names = re.findall(r" (\S+), (\S+)$", said["list"], re.M)
    assert names[1:] == [(f"notes/{n}", str(notes / n)) for n in ("a.txt", "c.txt", "new.md")]
    script(capsys, "delete banks/notes notes/c.txt")
    code, answer = script(capsys, "ask banks/notes '?dwp2' --max-new-tokens 1")
    assert code == 0 and not answer.startswith("W\n") and "c.txt" not in answer


def test_a_mistake_of_a_command_is_one_line(notes, capsys):
    checkpoint = "--checkpoint runs/facts_alike/msa-seed0"
    for kind, options in {"titans_mag": {}, "msa": {"seed": 5}}.items():
        build(kind, dtype=torch.float32, **options).save_pretrained(f"other/{kind}")
        byte_tokenizer().save_pretrained(f"other/{kind}")
    sizes = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained("other/llama")
    byte_tokenizer().save_pretrained("other/llama")
    for name, content in {
        "empty/.keep": b"",
        "blank/a.txt": b"",
        "bad/a.txt": b"a\xff\xfe",
        "bad/b.jsonl": b"{}",
    }.items():
        (notes.parent / name).parent.mkdir(exist_ok=True)
        (notes.parent / name).write_bytes(content)
    assert script(capsys, f"build notes {checkpoint} --out bank")[0] == 0
    for line, message in {
        f"build empty {checkpoint} --out new": r"paths: .*empty holds no text \(1 hidden\); supported are",
        f"build blank {checkpoint} --out new": r"paths: .*a\.txt and all other files are empty; give some text",
        f"build notes nowhere {checkpoint} --out new": "paths: .*nowhere does not exist; give a file, a folder",
        f"build notes bad/a.txt {checkpoint} --out new": r"bad/a\.txt is not UTF-8 text; convert it, or leave it out",
        f"build bad/b.jsonl {checkpoint} --out new": r"bad/b\.jsonl, line 1: no string \"text\" in JSON",
        "build notes --out new": "--checkpoint names the model that reads; give a run or a checkpoint",
        "build notes --checkpoint runs/none --out new": "--checkpoint=runs/none: there is no run; train it first",
        "build notes --checkpoint other/titans_mag --out new": "kind='titans_mag': a bank needs 'msa' in every layer",
        "build notes --checkpoint other/llama --out new": "model: a llama of transformers has no bank; use one with",
        f"build notes {checkpoint} --out bank": "directory=bank holds a finished bank; load it and add, or name",
        f"build notes {checkpoint} --out notes/a.txt": r"notes/a\.txt: a\.txt is a file; name another folder",
        "ask bank '?' --checkpoint other/msa": "a bank of the model of fingerprint",
        "ask bank ''": "questions: '' has no tokens; ask something",
        "ask bank '?' --max-new-tokens 0": "--max-new-tokens=0 must be at least 1",
        "ask bank '?' --templates chat": "templates='chat', but the tokenizer has no chat template",
        "ask notes '?'": r"notes/index\.json: no such file; a bank is written by MemoryBank\.save",
        "list notes": r"notes/index\.json: no such file; a bank is written by MemoryBank\.save",
        "delete bank notes/a.tx": r"document 'notes/a\.tx' is not in the bank of 3; did you mean 'notes/a\.txt'\?",
        "add bank empty": r"paths: .*empty holds no text \(1 hidden\)",
    }.items():
        code, said = script(capsys, line)
        errors = [part for part in said.splitlines() if not part.startswith("documents: 3")]
        assert code == 2 and len(errors) == 1 and re.search(message, errors[0]), (line, said)
    assert not (notes.parent / "new").exists()
    shutil.rmtree("runs")
    assert "there is no run" in script(capsys, "ask bank '?'")[1]
    code, said = script(capsys, f"ask bank '?dwp2' --max-new-tokens 1 --checkpoint {CHECKPOINT}")
    assert code == 0 and said.startswith("W\n")
