"""Mutated files: an error of one line that names the file or the key, or the right content.

Each kind of file is written, mutated, and loaded as a user loads it. JSON gets values of other types and sizes, lost
and added keys, and deep nesting; bytes get cuts, flips and splices. Loading may take neither gigabytes nor seconds. CI
tries few mutations, ``-m slow`` many; both are the same on each run.
"""

import contextlib
import copy
import io
import json
import resource
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from memlm import MemLMForCausalLM, MemoryBank, MemoryCache
from memlm.cli import user_errors
from memlm.data import build_data
from memlm.hub import load_model, load_tokenizer
from memlm.roles import Roles
from memlm.training.model import model_config
from memlm.training.settings import RunSettings
from memlm.training.tracking import read_metrics
from tests.conftest import ROOT, build

FEW, MANY = 9, 160
# Composing takes longer than to load any other file.
FEW_OF_YAML = 4
IDS = torch.arange(40)[None] % 200


# Files, as a user has them


class Checkpoint:
    """config.json and model.safetensors of a model."""

    mutated = "*"

    def make(self, folder):
        build("mom", dtype=torch.float32, num_memories=2).save_pretrained(folder)

    def load(self, folder):
        return load_model(folder)

    def right(self, model, folder, _):
        # The configuration may differ and still fit the weights; then it is the one in the file.
        assert isinstance(model, MemLMForCausalLM)
        held = json.loads((folder / "config.json").read_text())
        for name in ("hidden_size", "num_hidden_layers", "vocab_size", "mixer_pattern", "rope_theta"):
            if name in held and held[name] is not None:
                assert getattr(model.config, name) == held[name]
        with torch.no_grad():
            assert model(IDS[:, :2] % model.config.vocab_size).logits.shape == (1, 2, model.config.vocab_size)


class Vocabulary:
    """tokenizer.json and tokenizer_config.json."""

    mutated = "*"

    def make(self, folder):
        load_tokenizer(Path(__file__).parent / "reference" / "facts_alike").save_pretrained(folder)

    def load(self, folder):
        return load_tokenizer(folder)

    def right(self, tokenizer, folder, _):
        tokenizer("a text")


class Memory:
    """The file that MemoryCache.save writes."""

    mutated = "*"

    def make(self, folder):
        model, memory = _model("titans_mag"), MemoryCache()
        with torch.no_grad():
            model(IDS, past_key_values=memory)
        memory.save(folder)

    def load(self, folder):
        memory = MemoryCache.load(folder)
        with torch.no_grad():
            return _model("titans_mag")(IDS[:, :3], past_key_values=memory).logits

    def right(self, logits, folder, original):
        torch.testing.assert_close(logits, self.load(original), rtol=0, atol=0)


class Bank:
    """The files that MemoryBank.save writes."""

    mutated = "*"

    documents = staticmethod(lambda: {str(i): list(range(3 * i + 1)) for i in range(5)})

    def make(self, folder):
        MemoryBank.build(_model("msa"), self.documents(), progress=False).save(folder)

    def load(self, folder):
        bank = MemoryBank.load(folder, _model("msa"))
        with torch.no_grad():
            return _model("msa")(IDS[:, :3], roles=Roles.query(bank, IDS[:, :3])).logits

    def right(self, logits, folder, original):
        torch.testing.assert_close(logits, self.load(original), rtol=0, atol=0)


class Corpus:
    """The cache of an encoded corpus, which is built again if it is not as it was written."""

    mutated = "cache/**/*"

    def make(self, folder):
        lines = [json.dumps({"text": f"document {i} " * 20, "n": i}) for i in range(60)]
        (folder / "texts.jsonl").write_text("\n".join(lines))
        self.load(folder)

    def load(self, folder):
        source = {"kind": "text", "weight": 1.0, "paths": "texts.jsonl"}
        options = {"tokenizer": "byte", "seq_len": 96, "cache_dir": "cache", "sources": {"s": source}}
        with contextlib.chdir(folder):
            return build_data(options, seed=0, batch_size=2)[1].sources["s"].row(0, "train", 0).input_ids.tolist()

    def right(self, row, folder, original):
        assert row == self.load(original)


class Yaml:
    """Groups of the configuration, composed as ``python train.py`` does."""

    mutated = "*"

    def make(self, folder):
        for path in ("train", "data/mixture", "memory/titans_mag", "model/tiny", "optim/muon", "train/demo"):
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / "configs" / f"{path}.yaml", folder / f"{path}.yaml")

    def load(self, folder):
        configs = folder.with_name("configs")
        shutil.copytree(ROOT / "configs", configs, dirs_exist_ok=True)
        shutil.copytree(folder, configs, dirs_exist_ok=True)
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told), user_errors(configs, "train"):
                with initialize_config_dir(str(configs), version_base="1.3"):
                    config = compose("train")
                config.run_dir = "runs/x"
                config = OmegaConf.to_container(config, resolve=True)
                # Read before the settings of the run.
                for key in ("of_memory", "match"):
                    config.pop(key, None)
                settings = RunSettings.of(OmegaConf.create(config)).train
                data = {**config["data"], "cache_dir": str(folder.with_name("cache"))}
                tokenizer, _ = build_data(data, seed=0, batch_size=settings.batch_size)
                with torch.device("meta"):
                    return MemLMForCausalLM(model_config(config["model"], tokenizer)).config
        except SystemExit:
            raise ValueError(told.getvalue()) from None

    def right(self, config, folder, _):
        assert config


class Metrics:
    """metrics.jsonl of a run."""

    mutated = "*"

    def make(self, folder):
        lines = [{"step": i, "loss": 3.0 - i, "layer0/memory": 0.5} for i in range(5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def load(self, folder):
        return read_metrics(folder / "metrics.jsonl")

    def right(self, lines, folder, _):
        assert all(
            isinstance(line["step"], int) and isinstance(value, float | int)
            for line in lines
            for value in line.values()
        )


KINDS = [Checkpoint, Vocabulary, Memory, Bank, Corpus, Metrics, Yaml]
_MODELS: dict[str, MemLMForCausalLM] = {}


def _model(name):
    return _MODELS.setdefault(name, build(name, dtype=torch.float32))


# Mutations

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 10**9, 10**12, 10**30, -(10**12), 2**63, 0.0, -0.5, 1e308, 1e-320]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.text(max_size=8),
    st.sampled_from(["", "/", "..", "../../x", "\x00", "org/name", "mom", "[markup]", "é\u2028"]),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-2, 3), max_size=3),
    st.builds(lambda depth: _nested(depth), st.sampled_from([50, 5000])),
)


def _nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    if len(path) == 30:
        return
    for key, item in items:
        yield from _places(item, (*path, key))


@st.composite
def mutated_json(draw, value):
    """The value with one or two entries replaced, lost, added, or repeated."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(value))
        path = draw(st.sampled_from(places))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(ODD)
            if isinstance(value, dict):
                value[draw(st.sampled_from(["extra", "kind", "", "_attn_implementation"]))] = draw(ODD)
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()) or not isinstance(parent, dict):
            parent[path[-1]] = draw(ODD)
        else:
            del parent[path[-1]]
    return value


def _text(value) -> bytes:
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 100_000


@st.composite
def mutated_bytes(draw, content):
    """The content cut, with flipped bits, or with foreign bytes inserted."""
    # Most faults are possible in headers.
    where = st.integers(0, max(0, min(len(content), draw(st.sampled_from([64, 4096, 2**40]))) - 1))
    at = draw(where)
    kind = draw(st.sampled_from(["cut", "flip", "splice", "empty", "garbage"]))
    if kind == "cut":
        return content[:at]
    if kind == "flip" and content:
        return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
    if kind == "splice":
        foreign = draw(
            st.sampled_from([b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000, b"\n", b'"', b"{}", b"\r\n"])
        )
        return content[:at] + foreign + content[at:]
    return b"" if kind == "empty" else draw(st.binary(max_size=64))


@st.composite
def mutated_file(draw, path):
    content = path.read_bytes()
    structured = draw(st.booleans())
    if structured and path.suffix == ".json":
        return _text(draw(mutated_json(json.loads(content))))
    if structured and path.suffix == ".yaml":
        value = draw(mutated_json(yaml.safe_load(content)))
        return _text(value) if _deep(value) else yaml.safe_dump(value).encode("utf-8", "surrogatepass")
    if structured and path.suffix == ".jsonl":
        lines = content.split(b"\n")
        at = draw(st.integers(0, len(lines) - 1))
        if lines[at]:
            lines[at] = _text(draw(mutated_json(json.loads(lines[at]))))
        return b"\n".join(lines)
    if structured and path.suffix == ".safetensors":
        size = struct.unpack("<Q", content[:8])[0]
        header = _text(draw(mutated_json(json.loads(content[8 : 8 + size]))))
        return struct.pack("<Q", len(header)) + header + content[8 + size :]
    return draw(mutated_bytes(content))


def _deep(value):
    try:
        json.dumps(value)
    except RecursionError:
        return True
    return max(len(path) for path in _places(value)) == 30


@contextlib.contextmanager
def _bounded(seconds=20, gigabytes=3):
    """Fail before a load takes all of the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)

    def late(*_):
        raise AssertionError(f"still not loaded after {seconds} seconds")

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + (gigabytes << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def _fuzz(kind, tmp_path_factory, examples):
    case, original = kind(), tmp_path_factory.mktemp("original")
    work = tmp_path_factory.mktemp("work") / "files"
    case.make(original)
    files = [path for path in sorted(original.rglob(case.mutated)) if path.is_file() and path.name != ".lock"]
    shutil.copytree(original, work)
    case.right(case.load(work), work, original)
    wrong, refused = [], 0

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.data())
    def mutate(data):
        nonlocal refused
        name = data.draw(st.sampled_from(files)).relative_to(original)
        content = data.draw(mutated_file(original / name))
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(original, work)
        (work / name).write_bytes(content)
        reason = None
        try:
            with _bounded():
                case.right(case.load(work), work, original)
        except (ValueError, OSError) as error:
            refused += 1
            raw = isinstance(error, json.JSONDecodeError | UnicodeError)
            reason = error if raw or len(str(error).strip().splitlines()) != 1 else None
        except Exception as error:
            reason = error
        if reason is not None:
            wrong.append(f"{name} = {content[:300]!r}: {reason!r:.300}")

    mutate()
    print(f"{kind.__name__}: {examples} files, {refused} refused in one line, {len(wrong)} wrong")
    assert not wrong, f"{len(wrong)} of {examples}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_one_line_or_right(kind, tmp_path_factory):
    _fuzz(kind, tmp_path_factory, FEW_OF_YAML if kind is Yaml else FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files_are_one_line_or_right(kind, tmp_path_factory):
    _fuzz(kind, tmp_path_factory, MANY)
