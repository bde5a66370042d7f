"""Malformed files and settings: an error of one line that names the file or the key, or the right content."""

import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from memlm import hub
from memlm.data import build_data, byte_tokenizer, save_tokenizer

QUESTION = {"query": "a", "documents": ["b", "c"], "positives": [0], "answer": "d"}
DEEP = "[" * 100_000
# Which of these the parser of JSON and repr() refuse depends on the remaining stack depth.
DEPTHS = (90, 300, 450, 700, 950, 1500, 20_000)
JUNK = [
    "",
    "{",
    "null",
    "3",
    "[]",
    '""',
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    DEEP,
    '{"a":' * 100_000,
    "\x00",
    "\ud800",
    '"\\ud800"',
    "\xff\xfe",
]


def config(tmp_path, **changed):
    sources = {"text": {"kind": "text", "weight": 1, "paths": str(tmp_path / "corpus")}}
    cfg = {"tokenizer": "byte", "seq_len": 8, "cache_dir": str(tmp_path / "cache"), "sources": sources}
    return cfg | {"noise_ramp": [0, 0]} | changed


def refused(cfg, *told):
    with pytest.raises(ValueError) as caught:
        build_data(cfg, seed=0, batch_size=2)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and all(word in message for word in told), message


def encoded(text):
    return text.encode("utf-8", "surrogatepass")


def lines(*texts):
    return encoded("\n".join(texts))


@pytest.mark.parametrize("junk", [j for j in JUNK if j.strip()], ids=lambda j: ascii(j[:9]))
@pytest.mark.parametrize("place", ["{}", '{{"text":{}}}', '{{"text":"a","b":{}'])
def test_lines_of_text(tmp_path, place, junk):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(lines(json.dumps({"text": "good"}), "", place.format(junk)))
    if place != '{{"text":{}}}' or junk != '""':
        refused(config(tmp_path), "data.sources.text", "a.jsonl, line 3")


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b'{"text": ""}\n', b"\xef\xbb\xbf"])
def test_a_file_without_text(tmp_path, content):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(content)
    refused(config(tmp_path), "data.sources.text", "a.jsonl and all other files are empty")


def questions(tmp_path, *texts, **options):
    (tmp_path / "q.jsonl").write_bytes(lines(*texts))
    source = {"kind": "questions", "weight": 1, "paths": str(tmp_path / "q.jsonl")} | options
    return config(tmp_path, sources={"asked": source}, seq_len=64)


@pytest.mark.parametrize("junk", [j for j in JUNK if j.strip()], ids=lambda j: ascii(j[:9]))
@pytest.mark.parametrize("key", [None, *QUESTION])
def test_lines_of_questions(tmp_path, key, junk):
    good = json.dumps(QUESTION)
    if key is None:
        line = junk
    else:
        line = good.replace(f'"{key}": {json.dumps(QUESTION[key])}', f'"{key}": {junk}')
    assert line != good
    if (key, junk) != ("answer", "null"):
        refused(questions(tmp_path, good, "", line), "data.sources.asked", "q.jsonl:3")


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("key", QUESTION)
def test_deep_questions(tmp_path, key, depth):
    line = json.dumps(QUESTION | {key: "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
    refused(questions(tmp_path, line), "data.sources.asked", "q.jsonl:1")


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"id": [*range(60)], "text": [f"row {i}" for i in range(60)]}), path)
    return path.read_bytes()


@pytest.mark.parametrize("seed", range(25))
def test_damaged_parquet(tmp_path, seed):
    """Cut anywhere, or 8 bytes changed: refused, or read as other strings, because the format has no checksums."""
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / "a.parquet"
    data, rng = bytearray(parquet(path)), np.random.default_rng(seed)
    if seed % 2:
        data = data[: rng.integers(len(data))]
    else:
        for place in rng.integers(len(data) * (seed % 4 == 0) // 2, len(data), size=8):
            data[place] = rng.integers(256)
    path.write_bytes(data)
    try:
        build_data(config(tmp_path), seed=0, batch_size=2)
    except ValueError as error:
        assert "a.parquet" in str(error) and "\n" not in str(error)
    else:
        assert not seed % 2


TOKENIZER_JUNK = {
    "vocab": {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1, "<eos>": 0}, "merges": []}},
    "vocab-type": {"model": {"type": "BPE", "vocab": ["a"], "merges": []}},
    "vocab-number": {"model": {"type": "BPE", "vocab": {"a": -1, "b": 2**70}, "merges": []}},
    "merges": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b", "c"]}},
    "model": {"model": {"type": "GPT9"}},
    "no-model": {"model": None},
    "added": {"added_tokens": [{"id": -3, "content": 5}]},
    "normalizer": {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
    "decoder": {"decoder": {"type": "Sequence", "decoders": 3}},
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("junk", [*JUNK, *TOKENIZER_JUNK], ids=lambda j: ascii(j[:9]))
def test_a_broken_tokenizer(tmp_path, name, junk):
    folder, file = tmp_path / "tokenizer", tmp_path / "tokenizer" / name
    byte_tokenizer().save_pretrained(folder)
    (tmp_path / "corpus").mkdir()
    for i in range(6):
        (tmp_path / "corpus" / f"{i}.txt").write_text("some text")
    if junk in TOKENIZER_JUNK:
        junk = json.dumps(json.loads(file.read_text()) | TOKENIZER_JUNK[junk])
    file.write_bytes(encoded(junk))
    try:
        hub.load_tokenizer(folder)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    if name == "tokenizer.json" or not junk.startswith("{"):
        refused(config(tmp_path, tokenizer=str(folder)), "data.tokenizer", str(folder))
        return
    try:
        tokenizer, _ = build_data(config(tmp_path, tokenizer=str(folder)), seed=0, batch_size=2)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        # If this file has no usable settings, the other file has all of them.
        assert tokenizer("ab")["input_ids"] == [97, 98]


def test_a_tokenizer_that_is_not_there(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("some text")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    refused(config(tmp_path, tokenizer=str(tmp_path / "tokenizer")), "data.tokenizer")
    shutil.rmtree(tmp_path / "tokenizer")
    refused(config(tmp_path, tokenizer=str(tmp_path / "tokenizer")), "data.tokenizer")
    refused(config(tmp_path, tokenizer=""), "data.tokenizer: ''")


def test_a_tokenizer_for_which_there_is_no_room(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save_tokenizer(byte_tokenizer(), tmp_path)


HUGE = (10**12, 10**30, 2**63)


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *[("mqar", key) for key in ("num_pairs", "gap", "num_keys", "num_values")],
        *[("passkey", key) for key in ("digits", "gap", "num_keys", "num_values")],
        *[("copy", key) for key in ("num_symbols", "gap", "num_keys", "num_values")],
        *[("facts", k) for k in ("num_documents", "min_documents", "digits", "key_length", "alike", "num_keys")],
        *[("chains", k) for k in ("num_documents", "min_documents", "hops", "document_length", "name_length")],
        *[("questions", key) for key in ("num_documents", "document_length", "num_names")],
        (None, "seq_len"),
    ],
)
def test_sizes_without_measure(tmp_path, kind, key, value):
    """An error comes before anything of that size is allocated."""
    if kind == "questions":
        cfg = questions(tmp_path, *[json.dumps(QUESTION | {"query": f"{i}"}) for i in range(40)])
    elif kind is None:
        cfg = config(tmp_path, sources={"task": {"kind": "passkey", "weight": 1}})
    else:
        cfg = config(tmp_path, sources={"task": {"kind": kind, "weight": 1}}, seq_len=128)
    for number in (value, -value):
        refused(cfg | {key: number} if kind is None else _with(cfg, key, number), key, str(number))


def _with(cfg, key, value):
    ((name, source),) = cfg["sources"].items()
    return cfg | {"sources": {name: source | {key: value}}}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tokenizer": {"bpe": 10**12}}, "bpe=1000000000000 must be a number of entries"),
        ({"tokenizer": {"bpe": True}}, "bpe=True must be a number of entries"),
        ({"tokenizer": {"bpe": 300, "x": 1}}, "is not 'byte'"),
        ({"tokenizer": None}, "None is not 'byte'"),
        ({"tokenizer": ["byte"]}, "['byte'] is not 'byte'"),
        ({"sources": []}, "data.sources=[] must name at least one source"),
        ({"sources": "text"}, "data.sources='text' must name"),
        ({"sources": None}, "data.sources=None must name"),
        ({"sources": {3: {"kind": "passkey", "weight": 1}}}, "data.sources: 3 cannot be a name"),
        ({"sources": {"../x": {"kind": "passkey", "weight": 1}}}, "data.sources: '../x' cannot be a name"),
        ({"sources": {"a": None}}, "data.sources.a.kind=None is unknown"),
        ({"sources": {"a": {"kind": ["text"], "weight": 1}}}, "data.sources.a.kind=['text'] is unknown"),
        ({"sources": {"a": {"kind": "passkey", "weight": 1, 3: 4}}}, "data.sources.a.3 is unknown"),
        ({"sources": {"a": {"kind": "passkey", "weight": True}}}, "data.sources.a.weight=True is not a number"),
        ({"sources": {"a": {"kind": "passkey", "weight": float("nan")}}}, "data.sources.a.weight=nan"),
        ({"sources": {"a": {"kind": "passkey", "weight": float("inf")}}}, "data.sources.a.weight=inf"),
        ({"sources": {"a": {"kind": "passkey", "weight": 10**400}}}, "data.sources.a.weight=1000"),
        ({"sources": {"a": {"kind": "passkey", "weight": -1}}}, "data.sources.a.weight=-1"),
        ({"sources": {"a": {"kind": "text", "weight": 1, "paths": ""}}}, "data.sources.a: paths='' must name"),
        ({"sources": {"a": {"kind": "text", "weight": 1, "paths": 5}}}, "data.sources.a: paths=5 must name"),
        ({"sources": {"a": {"kind": "questions", "weight": 1, "paths": [None]}}}, "data.sources.a: paths=[None] must"),
        ({"cache_dir": ""}, "data.cache_dir='' names no folder"),
        ({"cache_dir": None}, "data.cache_dir=None names no folder"),
        ({"cache_dir": "/dev/null/x"}, "data.cache_dir: /dev/null/x"),
        ({"noise_ramp": 5}, "data.noise_ramp=5 must be two steps"),
        ({"noise_ramp": "ab"}, "data.noise_ramp='ab' must be two steps"),
        ({"noise_ramp": None}, "data.noise_ramp=None must be two steps"),
        ({"seq_len": True}, "data.seq_len=True is not a whole number"),
    ],
)
def test_settings_of_another_kind(tmp_path, changed, told):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("some text " * 99)
    if "noise_ramp" in changed:
        changed = {"sources": {"a": {"kind": "passkey", "weight": 1}}, "seq_len": 128} | changed
    refused(config(tmp_path, **changed), told)
