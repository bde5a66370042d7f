import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memlm.data import documents, reading
from memlm.data.documents import Documents
from memlm.data.tokenizer import byte_tokenizer, encoder, fingerprint, load_tokenizer, shortener, token_bytes

TEXTS = [
    "plain text",
    "  spaces , and . dots  ",
    "tabs\tand\r\nlines\n\n",
    "Grüße, 世界, Ελλάδα, 🧠👩‍🚀",
    "é is not é",
    "\x00\x7f\x80ÿ\ufeff",
    "<pad><bos><eos> are text",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"the cat and the hat number {i} sat on the mat, that is that\n" * 3)
    return Documents([str(folder)], tmp_path / "cache")


def plain(folder):
    """The text of a BPE's cache folder, to compare two folders."""
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_byte_ids(tokenizer):
    assert len(tokenizer) == 259
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert tokenizer.convert_ids_to_tokens([256, 257, 258]) == ["<pad>", "<bos>", "<eos>"]
    assert {len(tokenizer.convert_ids_to_tokens(i)) for i in range(256)} == {1}


@pytest.mark.parametrize("text", TEXTS)
def test_byte_round_trip(tokenizer, tmp_path, text):
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = one(text)["input_ids"]
        assert ids == list(text.encode())
        assert one.decode(ids) == text
        assert one.decode([*ids, 258], skip_special_tokens=True) == text


def test_byte_tokenizer_pads_and_saves(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(["abc", "a"], padding=True)["input_ids"] == [[97, 98, 99], [97, 256, 256]]
    # Padding leaves a setting in the backend, which is not part of the tokenizer's identity.
    assert fingerprint(loaded) == fingerprint(tokenizer) == fingerprint(load_tokenizer("byte"))


@pytest.mark.parametrize("text", TEXTS)
def test_encoder_agrees_with_the_tokenizer(tokenizer, corpus, text):
    for one in (tokenizer, load_tokenizer({"bpe": 270}, [corpus])):
        ids = encoder(one)(text)
        assert ids.tolist() == one(text, add_special_tokens=False)["input_ids"]
        assert one.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes(tokenizer, corpus, text):
    for one in (tokenizer, load_tokenizer({"bpe": 270}, [corpus])):
        counts = token_bytes(one)
        assert counts.shape == (len(one),)
        assert counts[encoder(one)(text)].sum() == len(text.encode())
        assert counts[one.all_special_ids].tolist() == [0, 0, 0]


def sentencepiece_like(decoder):
    tokens = ["<unk>", "</s>", "▁", "▁wörld", "<0xE4>", "hello", "🧠"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoder
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_tokens(["käse"])
    return tokenizer


def test_token_bytes_of_sentencepiece():
    assert token_bytes(sentencepiece_like(decoders.Metaspace())).tolist() == [0, 0, 1, 7, 1, 5, 4, 5]
    with pytest.raises(ValueError, match="byte-level or SentencePiece"):
        token_bytes(sentencepiece_like(decoders.WordPiece()))


def test_bpe_is_deterministic_and_cached(corpus, tmp_path, monkeypatch):
    tokenizer = load_tokenizer({"bpe": 280}, [corpus])
    assert len(tokenizer) == 280
    assert len(tokenizer("the cat and the hat")["input_ids"]) < len("the cat and the hat")
    again = Documents([str(tmp_path / "words")], tmp_path / "other")
    load_tokenizer({"bpe": 280}, [again])
    (first,), (second,) = ((c.cache.root / "tokenizers").iterdir() for c in (corpus, again))
    assert first.name == second.name and plain(first) == plain(second)
    monkeypatch.setitem(reading._READERS, ".txt", None)
    assert fingerprint(load_tokenizer({"bpe": 280}, [corpus])) == fingerprint(tokenizer)


def test_bpe_sees_the_training_split_only(tmp_path):
    names = [f"held/{i}.txt" for i in range(40)]
    splits = documents.assign_splits(names)
    (tmp_path / "held").mkdir()
    for name, split in zip(names, splits, strict=True):
        (tmp_path / name).write_text("the cat sat on the mat " * 3 if split == 0 else "zq " * 1000)
    tokenizer = load_tokenizer({"bpe": 270}, [Documents([str(tmp_path / "held")], tmp_path / "cache")])
    assert len(tokenizer("zqzq")["input_ids"]) == 4
    assert len(tokenizer("the")["input_ids"]) < 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no/such/folder/at/all", "'no/such/folder/at/all' is not 'byte', a tokenizer's folder"),
        ({"bpe": 258}, "bpe=258 must be a number of entries, at least 259"),
        ({"bpe": "many"}, "bpe='many' must be"),
        ({"bpe": 300}, "bpe=300 has no text to train on; add a text source"),
        ({"bpee": 300}, "is not 'byte', a path or name, or {bpe: vocab_size}"),
        (5, "5 is not 'byte'"),
    ],
)
def test_spec_errors(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(spec)
    assert "\n" not in str(caught.value)


def test_bpe_larger_than_its_text(corpus):
    with pytest.raises(ValueError, match=r"bpe=5000 is more than .* ask for at most \d+"):
        load_tokenizer({"bpe": 5000}, [corpus])
    assert not [*(corpus.cache.root / "tokenizers").iterdir()]


def test_tokenizer_without_end_of_text(tmp_path):
    backend = Tokenizer(models.BPE({"a": 0}, []))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_encoder_gives_arrays(tokenizer):
    assert isinstance(encoder(tokenizer)("abc"), np.ndarray)


@pytest.mark.parametrize("limit", [1, 2, 7, 30, 1000])
def test_texts_are_shortened_to_so_many_tokens(limit, tmp_path):
    """Texts have at most so many tokens, and hardly fewer."""
    corpus = tmp_path / "a.txt"
    corpus.write_text("the owl and the cat and the owl " * 40)
    bpe = load_tokenizer({"bpe": 270}, [Documents([str(corpus)], tmp_path / "cache")])
    text = "the owl <eos> and ünïcödé cats, the 漢字 owl " * 4
    for tokenizer in (byte_tokenizer(), bpe):
        encode, short = encoder(tokenizer), shortener(tokenizer)(text, limit)
        assert text.startswith(short) and short and (len(encode(short)) <= limit or len(short) == 1)
        assert short == text or len(encode(text[: len(short) + 1])) >= limit
