"""From the `data` config to the tokenizer and the batches.

A kind of source is one of `_OPTIONS`, or a module of an installed package (`memlm.plugins`). The module has a `Task`,
which derives from `RecallTask`, or a dataclass `Config` and a `Source(config, tokenizer, seq_len, seed)`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from memlm import plugins
from memlm.settings import build_config, named, require, suggest

from .chains import Chains
from .disk_cache import DiskCache
from .documents import Documents
from .encoding import QUIET, Preparation
from .injected import InjectedSource, Injection, invented, read_facts
from .mixture import Mixture
from .questions import Questions, QuestionSource
from .recall import MQAR, Copy, Passkey, RecallSource, RecallTask, StackedMQAR, ZoologyMQAR
from .recall_mad import FuzzyRecall, SelectiveCopy
from .retrieval import Facts
from .row import Source
from .streamed import HubSettings, Streamed
from .text import TextCorpus, TextSource
from .tokenizer import is_byte_tokenizer, load_tokenizer

_TASKS = {
    **{"mqar": MQAR, "mqar_zoology": ZoologyMQAR, "mqar_stacked": StackedMQAR},
    **{"passkey": Passkey, "copy": Copy, "selective_copy": SelectiveCopy, "fuzzy_recall": FuzzyRecall},
    **{"facts": Facts, "chains": Chains},
}
_MOST_TOKENS, _MOST_WEIGHT = 2**28, 1e15
_SIZES = ("gap", "num_keys", "num_values")
_OPTIONS = {
    "text": ("paths",),
    "hub": tuple(field.name for field in dataclasses.fields(HubSettings)),
    "mqar": ("num_pairs", *_SIZES),
    "mqar_zoology": ("num_pairs", *_SIZES),
    "mqar_stacked": ("num_pairs", *_SIZES),
    "passkey": ("digits", *_SIZES),
    "copy": ("num_symbols", *_SIZES),
    "selective_copy": ("num_symbols", "gap", "num_values"),
    "fuzzy_recall": ("num_pairs", "key_size", "value_size", *_SIZES),
    "facts": ("num_documents", "min_documents", "digits", "key_length", "alike", "num_keys", "num_values"),
    "chains": ("num_documents", "min_documents", "hops", "document_length", "key_length", "name_length", *_SIZES[1:]),
    "questions": ("paths", "num_documents", "document_length", "num_names", "templates"),
    "injected": tuple(field.name for field in dataclasses.fields(Injection)),
}


def build_data(
    cfg: Mapping[str, Any],
    *,
    seed: int,
    batch_size: int,
    preparation: Preparation = QUIET,
) -> tuple[PreTrainedTokenizerFast, Mixture]:
    """The tokenizer, and batches of `batch_size` rows over all processes, from a config like those in configs/data.

    Builds whatever the cache lacks. Processes that need the same data may call it together: one of them builds, and
    the others wait for its lock, however long. Each source has its own random stream, seeded by `seed` and its name.
    Raises ValueError with the key if a setting is unknown, missing or does not fit.
    """
    _check_keys(cfg, "data", ("tokenizer", "seq_len", "cache_dir", "sources"), ("noise_ramp",))
    _check_whole(cfg, "data", ("seq_len",))
    if cfg["seq_len"] < 2:
        raise ValueError(f"data.seq_len={cfg['seq_len']} is too short to predict a token; use 2 or more")
    if cfg["seq_len"] * batch_size > _MOST_TOKENS:
        raise ValueError(
            f"data.seq_len={cfg['seq_len']} in a batch of {batch_size} rows makes more than {_MOST_TOKENS} tokens a "
            "step; lower one"
        )
    if not isinstance(cfg["cache_dir"], str) or not cfg["cache_dir"].strip():
        raise ValueError(f"data.cache_dir={cfg['cache_dir']!r} names no folder; name one")
    if not isinstance(cfg["sources"], Mapping) or not cfg["sources"]:
        raise ValueError(f"data.sources={cfg['sources']!r} must name at least one source, and its kind and weight")
    outside = {}
    for name, options in cfg["sources"].items():
        # The name becomes part of file names and metric names.
        if not isinstance(name, str) or not name or {*"/\0"} & {*name}:
            raise ValueError(f"data.sources: {name!r} cannot be a name; use letters and digits")
        outside[name] = _check_source(options, f"data.sources.{name}", cfg["seq_len"])
    _check_injected(cfg["sources"])
    turn = DiskCache(cfg["cache_dir"]).turn([cfg["tokenizer"], cfg["sources"]], preparation.say)
    with nullcontext() if is_made_by_rule(cfg) else turn:
        return _build(cfg, outside, seed, batch_size, preparation)


def _build(
    cfg: Mapping[str, Any],
    outside: Mapping[str, RecallTask | Callable[..., Source] | None],
    seed: int,
    batch_size: int,
    preparation: Preparation,
) -> tuple[PreTrainedTokenizerFast, Mixture]:
    """outside: of each source, the result of `_check_source`"""
    corpora: dict[str, Documents | Streamed] = {}
    for name, options in cfg["sources"].items():
        if options["kind"] == "text":
            with named(f"data.sources.{name}"):
                corpora[name] = Documents(options.get("paths"), cfg["cache_dir"])
        elif options["kind"] == "hub":
            given = {key: options[key] for key in _OPTIONS["hub"] if key in options}
            settings = build_config(HubSettings, given, f"data.sources.{name}")
            corpora[name] = Streamed(settings, cfg["cache_dir"])
    tokenizer = load_tokenizer(cfg["tokenizer"], [*corpora.values()])
    tasks = [name for name, options in cfg["sources"].items() if options["kind"] in _TASKS]
    recall = [*tasks, *(name for name, config in outside.items() if isinstance(config, RecallTask))]
    if recall and not is_byte_tokenizer(tokenizer):
        raise ValueError(f"data.sources.{recall[0]} is made of bytes; set data.tokenizer to byte, or leave it out")

    def source(name: str, stream: str) -> Source:
        own_seed = _own_seed(seed, stream)
        return _build_source(name, cfg, tokenizer, corpora.get(name), outside[name], own_seed, preparation)

    sources, weights = dict[str, Source](), {}
    for name, options in cfg["sources"].items():
        with named(f"data.sources.{name}"):
            if options["kind"] == "injected":
                sources[name] = _build_injected(name, cfg, tokenizer, seed, source(options["of"], name))
            else:
                sources[name] = source(name, name)
        weights[name] = options["weight"]
    return tokenizer, Mixture(sources, weights, batch_size)


def is_made_by_rule(cfg: Mapping[str, Any]) -> bool:
    """Whether no source of a `data` config reads files."""
    sources = cfg.get("sources")
    options = sources.values() if isinstance(sources, Mapping) else []
    return all(isinstance(o, Mapping) and o.get("kind") in _TASKS for o in options)


def _build_source(
    name: str,
    cfg: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    documents: Documents | Streamed | None,
    outside: RecallTask | Callable[..., Source] | None,
    own_seed: int,
    preparation: Preparation,
) -> Source:
    """outside: the result of `_check_source`"""
    options = cfg["sources"][name]
    if isinstance(outside, RecallTask):
        return RecallSource(outside, own_seed, _read_ramp(cfg))
    if outside is not None:
        return outside(tokenizer, cfg["seq_len"], own_seed)
    if documents is not None:
        told = partial(preparation.advance, name)
        corpus = TextCorpus(documents, tokenizer, preparation.workers, told, preparation.say)
        return TextSource(corpus, cfg["seq_len"], own_seed)
    sizes = {key: options[key] for key in _OPTIONS[options["kind"]] if key in options and key != "paths"}
    if options["kind"] == "questions":
        questions = Questions(options["paths"], cfg["cache_dir"])
        return QuestionSource(questions, tokenizer, cfg["seq_len"], own_seed, **sizes)
    return RecallSource(_TASKS[options["kind"]](length=cfg["seq_len"], **sizes), own_seed, _read_ramp(cfg))


def _build_injected(
    name: str, cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int, base: Source
) -> InjectedSource:
    """base: a stream of the source's own of the rows that it has otherwise"""
    injection, manifest = _injection(cfg["sources"][name], name), None
    if injection.paths is not None:
        facts, manifest = read_facts(injection.paths, cfg["cache_dir"])
    else:
        again, of_facts = injection.contradicts is not None, _own_seed(seed, injection.contradicts or name)
        facts = invented(of_facts, injection.num_facts, again)
    return InjectedSource(base, facts, injection, tokenizer, cfg["seq_len"], manifest)


def _injection(options: Mapping[str, Any], where: str) -> Injection:
    given = {key: options[key] for key in _OPTIONS["injected"] if key in options}
    return build_config(Injection, given, where)


def _check_injected(sources: Mapping[str, Any]) -> None:
    """Raise ValueError unless each source of facts fits the others."""
    found = {name: _injection(o, f"data.sources.{name}") for name, o in sources.items() if o["kind"] == "injected"}
    others = [name for name in sources if name not in found]
    for name, injection in found.items():
        where, of, contradicts = f"data.sources.{name}", injection.of, injection.contradicts
        require(of in others, f"{where}.of={of} must name a source of another kind; {suggest(of, others)}")
        if contradicts is None:
            continue
        own = [key for key, other in found.items() if other.paths is None and other.contradicts is None]
        known = suggest(contradicts, own, "there is none")
        require(contradicts in own, f"{where}.contradicts={contradicts} has no invented facts of its own; {known}")
        most, asked = found[contradicts].num_facts, injection.num_facts
        require(asked <= most, f"{where}.num_facts={asked}, but {contradicts} has {most} facts; lower it")


def _own_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])


def _check_source(options: Mapping[str, Any], where: str, seq_len: int) -> RecallTask | Callable[..., Source] | None:
    """None for a kind of the project; else the task of an installed package, or its `Source` with its settings
    bound.
    """
    kind = options.get("kind") if isinstance(options, Mapping) else options
    module = plugins.load("memlm.data", kind, [*_OPTIONS], f"{where}.kind={kind!r}")
    if module is None:
        _check_keys(options, where, ("kind", "weight"), _OPTIONS[kind])
        _check_weight(options["weight"], where)
        if kind == "questions" and not options.get("paths"):
            raise ValueError(f"{where}.paths is missing; name JSONL files of questions")
        if kind not in ("hub", "injected"):
            _check_whole(options, where, (set(_OPTIONS[kind]) - {"paths", "templates"}) & options.keys())
        return None
    task = getattr(module, "Task", None)
    whole = task or (hasattr(module, "Config") and hasattr(module, "Source"))
    require(whole, f"{where}.kind={kind!r}: {module.__name__} must have Task, or Config and Source")
    settings = [field.name for field in dataclasses.fields(task or module.Config) if field.name != "length"]
    _check_keys(options, where, ("kind", "weight"), settings)
    _check_weight(options["weight"], where)
    given = {key: options[key] for key in settings if key in options}
    if task:
        return build_config(task, {"length": seq_len, **given}, where)
    return partial(module.Source, build_config(module.Config, given, where))


def _check_weight(weight: Any, where: str) -> None:
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= _MOST_WEIGHT:
        raise ValueError(f"{where}.weight={weight!r} is not a number between 0 and {_MOST_WEIGHT:.0f}")


def _read_ramp(cfg: Mapping[str, Any]) -> tuple[int, int]:
    steps = cfg.get("noise_ramp", [])
    numbers = isinstance(steps, Sequence) and len(steps) == 2 and all(type(step) is int for step in steps)
    if not numbers or not 0 <= steps[0] <= steps[1]:
        raise ValueError(f"data.noise_ramp={steps!r} must be two steps, [start, end], such as [150, 300]")
    return steps[0], steps[1]


def _check_keys(cfg: Mapping[str, Any], where: str, required: Iterable[str], optional: Iterable[str]) -> None:
    known = [*required, *optional]
    for key in cfg:
        if key not in known:
            raise ValueError(f"{where}.{key} is unknown; {suggest(str(key), known)}")
    for key in required:
        if key not in cfg:
            raise ValueError(f"{where}.{key} is missing; set it")


def _check_whole(cfg: Mapping[str, Any], where: str, keys: Iterable[str]) -> None:
    for key in keys:
        if type(cfg[key]) is not int:
            raise ValueError(f"{where}.{key}={cfg[key]!r} is not a whole number")
