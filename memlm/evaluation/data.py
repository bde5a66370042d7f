"""The data of an evaluation, in the tokens of each model.

T tokens of a document.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerFast

from memlm.data import (
    TEMPLATES,
    Chains,
    Facts,
    Library,
    Linked,
    QuestionSource,
    RecallSource,
    Source,
    TextSource,
    build_data,
    check_manifest,
    fingerprint,
    load_tokenizer,
    token_bytes,
)
from memlm.evaluation.parts import Parts
from memlm.evaluation.subject import Subject, differences, flat
from memlm.hub.causal import check_vocabulary
from memlm.interleave import Interleave
from memlm.settings import check_type


@dataclass
class Examined:
    """A subject, and the data in its tokens.

    sources: by name; none if no measure needs any
    seed: of all draws
    parts: of its evaluation
    """

    subject: Subject
    tokenizer: PreTrainedTokenizerFast
    sources: Mapping[str, Source]
    seed: int
    parts: Parts = field(default_factory=Parts)


def data_config(given: DictConfig, subject: Subject, needed: bool = True) -> dict[str, Any]:
    """The evaluation data: named sources, or those of the run; none if they are not needed and not named. Tokenizer
    and row length are the checkpoint's unless set.
    """
    named = OmegaConf.to_container(given, resolve=True)
    trained = subject.record.config.get("data")
    trained = trained if isinstance(trained, dict) else {}
    data = named if "sources" in named else {**trained, **{k: v for k, v in named.items() if v is not None}}
    data["tokenizer"] = subject.place_of_tokenizer if named["tokenizer"] is None else named["tokenizer"]
    if "sources" not in data and not needed:
        return {"sources": {}, "seq_len": None, **data}
    if "sources" not in data:
        raise ValueError(
            f"{subject.folder}: no readable config.yaml names its data; add data=... and data.seq_len=..."
        )
    data["seq_len"] = trained.get("seq_len") if named["seq_len"] is None else named["seq_len"]
    if data["seq_len"] is None:
        raise ValueError(f"{subject.folder}: no readable config.yaml has its data.seq_len; add data.seq_len=...")
    check_type(data["seq_len"], int, "data.seq_len")
    return data


def examine(subject: Subject, data: dict[str, Any], seed: int) -> Examined:
    """The data in a subject's tokens. Raises ValueError if the model cannot read it."""
    sources, rows = data["sources"], 1
    if not sources:
        tokenizer = load_tokenizer(data["tokenizer"])
        check_vocabulary(subject.model, tokenizer, str(subject.folder))
        return Examined(subject, tokenizer, {}, seed)
    if isinstance(sources, dict):
        # Sources are measured one by one, so their weights have no effect.
        sources = {name: {**o, "weight": 1} if isinstance(o, dict) else o for name, o in sources.items()}
        rows = max(1, len(sources))
    try:
        tokenizer, mixture = build_data({**data, "sources": sources}, seed=seed, batch_size=rows)
    except ValueError as error:
        told = " (data.seq_len, as trained unless it is set)" if "length=" in str(error) else ""
        raise ValueError(f"{error}{told}") from None
    check_vocabulary(subject.model, tokenizer, str(subject.folder))
    return Examined(subject, tokenizer, mixture.sources, seed)


def untrained(data: dict[str, Any], subject: Subject) -> dict[str, list[Any]]:
    """Data settings that differ from the training's: key -> [value here, value in training]."""
    trained = subject.record.config.get("data")
    if not isinstance(trained, dict):
        return {}
    apart = {"tokenizer", "cache_dir", "noise_ramp"}
    here, there = (flat({k: v for k, v in d.items() if k not in apart}, "data.") for d in (data, trained))
    return {k: values for k, values in differences([here, there]).items() if not k.endswith(".weight")}


def changed_files(one: Examined) -> list[str]:
    """A line for each source whose files differ from those of the training."""
    changed = []
    for name, source in one.sources.items():
        manifest = getattr(source, "manifest", None)
        try:
            if manifest is not None and name in one.subject.record.manifests:
                check_manifest(name, one.subject.record.manifests[name], manifest)
        except ValueError as error:
            changed.append(str(error))
    return changed


def texts(
    examined: Sequence[Examined], documents: int, length: int, joined: bool = False
) -> list[dict[str, list[np.ndarray]]]:
    """Tokens [T] of test documents of each source of text, for each model; joined: of documents that are joined until
    they have ``length`` tokens.

    Models with different tokenizers read the same bytes: those within the first ``length`` tokens of every model.
    """
    names = [name for name, source in examined[0].sources.items() if isinstance(source, TextSource)]
    sizes = {fingerprint(one.tokenizer): token_bytes(one.tokenizer) for one in examined} if names else {}
    found: list[dict[str, list[np.ndarray]]] = [{name: [] for name in names} for _ in examined]
    for name in names:
        corpora = [one.sources[name].corpus.documents("test") for one in examined]
        whole = ([document for _, document in versions] for versions in zip(*corpora, strict=True))
        for versions in islice(_joined(whole, length) if joined else whole, documents):
            tokens = [document[:length] for document in versions]
            if len(sizes) > 1:
                ends = [sizes[fingerprint(o.tokenizer)][t].cumsum() for o, t in zip(examined, tokens, strict=True)]
                last = min(end[-1] for end in ends)
                tokens = [t[: np.searchsorted(end, last, "right")] for t, end in zip(tokens, ends, strict=True)]
            for of_model, piece in zip(found, tokens, strict=True):
                of_model[name].append(piece)
    return found


def _joined(documents: Iterable[list[np.ndarray]], length: int) -> Iterator[list[np.ndarray]]:
    """Documents one behind the other, with their ends, until every model has ``length`` tokens; a shorter rest only if
    there is nothing else.
    """
    held: list[list[np.ndarray]] = []
    counts, full = 0, False
    for versions in documents:
        held.append(versions)
        counts = counts + np.array([len(ids) for ids in versions])
        if counts.min() >= length:
            yield [np.concatenate(of_model) for of_model in zip(*held, strict=True)]
            held, counts, full = [], 0, True
    if held and not full:
        yield [np.concatenate(of_model) for of_model in zip(*held, strict=True)]


def has_documents(source: Source) -> bool:
    """Whether a source has test documents with questions."""
    task = source.task if isinstance(source, RecallSource) else source
    return isinstance(task, Facts | Chains | QuestionSource)


def library(source: Source, documents: int, questions: int) -> Library | None:
    """Test documents of a source, with questions; None if it has none."""
    if isinstance(source, RecallSource) and isinstance(source.task, Facts):
        return source.task.library(source.seed, "test", documents, questions)
    return source.library("test", documents, questions) if isinstance(source, QuestionSource) else None


def read_on(source: Source, documents: int, questions: int) -> tuple[Interleave, Iterable[Linked]] | None:
    """The ``Interleave`` of a source whose questions are answered by reading on, and its test documents; else None."""
    if isinstance(source, RecallSource) and isinstance(task := source.task, Chains):
        way = Interleave(**TEMPLATES, max_rounds=task.hops, max_new_tokens=task.length)
        return way, (task.linked(source.seed, "test", index, documents) for index in count())
    if isinstance(source, QuestionSource) and source.templates.named:
        linked = source.linked("test", documents, questions)
        answered = linked._replace(chains=[chain for chain in linked.chains if chain.answer])
        way = Interleave(**asdict(source.templates), max_rounds=1, max_new_tokens=min(source.seq_len, 2048))
        return (way, [answered]) if answered.chains else None
    return None
