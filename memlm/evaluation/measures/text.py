"""Perplexity of held-out text: with the memory carried on, reset, in rolling windows, and silenced."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from memlm.data import Source, TextSource, first_token, token_bytes
from memlm.evaluation import plots
from memlm.evaluation.ablation import long_term, memory_off
from memlm.evaluation.data import Examined, texts
from memlm.evaluation.figures import Figure, Records, Topic
from memlm.evaluation.measures import Measure, Models, Table, by_source, check_range
from memlm.evaluation.perplexity import WAYS, bits, interval, read
from memlm.evaluation.report import Report
from memlm.evaluation.subject import Subject
from memlm.reader import Reader, continues
from memlm.settings import require

_OFF = "_memory_off"
_TOLD = {"carried": "memory carried", "reset": "reset each segment", "rolling": "rolling windows"}
_COVERS = {
    "carried": "all tokens of a document but the first",
    "reset": "all but the first of each segment",
    "rolling": "all tokens, by lm-eval's definition of rolling windows",
}


@dataclass(frozen=True)
class Text(Measure):
    """text_documents: held-out documents; 0 for no text
    text_length: tokens of each, at most
    text_ways: of reading, in segments of data.seq_len tokens: "carried", one memory for a document; "reset", a new one
        for each segment; "rolling", lm-eval's windows of as many tokens
    text_memory_off: whether models with a long-term memory also read without it, in the same ways
    text_joined: whether documents are joined, with their ends, into texts of text_length tokens

    Results of a source: ``documents``, the tokens, bytes and words of each; under each way, also with
    ``_memory_off`` at its end, ``bits_per_byte`` of the tokens that all ways predict, and a ``Reading``.
    """

    name = "text"
    nothing = {}  # noqa: RUF012
    text_documents: int
    text_length: int
    text_ways: list = field(default_factory=lambda: ["carried", "reset"])
    text_memory_off: bool = False
    text_joined: bool = False

    def __post_init__(self) -> None:
        check_range(self, text_documents=0, text_length=2)
        known = [way for way in WAYS if way in self.text_ways]
        require(
            bool(known) and sorted(known) == sorted(map(str, self.text_ways)),
            f"text_ways={self.text_ways} must be some of {', '.join(WAYS)}, each once",
        )

    def measures(self, source: Source) -> bool:
        return self.text_documents > 0 and isinstance(source, TextSource)

    def check_model(self, model: PreTrainedModel) -> None:
        continues(model)

    def tokens(self, sources: Mapping[str, Source]) -> int:
        lengths = [source.seq_len for source in sources.values() if self.measures(source)]
        longest = self.text_length if "carried" in self.text_ways else max(lengths, default=0)
        return longest if lengths else 0

    def cost(self, sources: Mapping[str, Source]) -> int:
        tokens = 0
        for source in sources.values():
            if isinstance(source, TextSource) and self.measures(source):
                lengths = np.diff(source.corpus.spans("test"))
                if not self.text_joined:
                    lengths = lengths[: self.text_documents].clip(max=self.text_length)
                tokens += min(self.text_documents * self.text_length, int(lengths.sum()))
        return tokens * len(self.text_ways) * (1 + self.text_memory_off)

    def run(self, one: Examined, examined: Sequence[Examined]) -> dict[str, Any]:
        found = texts(examined, self.text_documents, self.text_length, self.text_joined)
        of_sources = next(read for other, read in zip(examined, found, strict=True) if other is one)
        return {name: self.source(one, one.sources[name].seq_len, texts) for name, texts in of_sources.items()}

    def source(self, one: Examined, segment: int, documents: list[np.ndarray]) -> dict[str, Any]:
        """The results of one source."""
        model, tokenizer, sizes = one.subject.model, one.tokenizer, token_bytes(one.tokenizer)
        # Nothing follows a document's end. Empty ones stay, so that all models have the same documents.
        documents = [ids[:-1] if len(ids) and not sizes[ids[-1]] else ids for ids in documents]
        require(any(len(ids) > 1 for ids in documents), "no document has two tokens; raise eval.text_length")
        words = [len(re.split(r"\s+", tokenizer.decode(ids, skip_special_tokens=True))) for ids in documents]
        num_bytes = [int(sizes[ids].sum()) for ids in documents]
        a_word = sum(num_bytes) / max(1, sum(words))
        # A model that was trained with a first token reads with it.
        first = first_token(tokenizer)
        rolling = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        sizes_V = torch.from_numpy(sizes).to(model.device)
        results: dict[str, Any] = {
            "documents": {"tokens": [len(ids) for ids in documents], "bytes": num_bytes, "words": words}
        }
        both = self.text_memory_off and not one.subject.memory_off and long_term(model)
        for silent in (False, True) if both else (False,):
            for way in self.text_ways:
                # The memory's surprise is shown where it is carried on.
                reader = partial(Reader, model, with_metrics=way == "carried" and not silent)
                prefix = rolling if way == "rolling" else first
                with memory_off(model) if silent else nullcontext():
                    reading = asdict(read(reader, way, documents, sizes_V, segment, self.text_length, prefix))
                of_byte = reading["all"]["bits_per_byte"] * math.log(2)
                reading["all"] |= {"byte_perplexity": _exp(of_byte), "word_perplexity": _exp(of_byte * a_word)}
                results[way + _OFF * silent] = {"bits_per_byte": reading["common"]["bits_per_byte"], **reading}
        return results

    def tables(self, models: Models) -> dict[str, Table]:
        return {"text": self.table(models), "perplexity": self._perplexity(models)}

    def table(self, models: Models) -> Table:
        columns = [_TOLD[way] for way in self.text_ways]
        rows = []
        for name, found, suffix in self._readings(models):
            readings = [found[way + suffix] for way in self.text_ways]
            row = [_label(name, suffix), *(f"{r['bits_per_byte']:.4f}" for r in readings)]
            rows.append([*row, _carrying(found, suffix).told()] if self._gains else row)
        for other, found, theirs, suffix in self._pairs(models):
            saved = [(_bits(theirs, way + suffix) - _bits(found, way)).told() for way in self.text_ways]
            gain = [_more(found, theirs, suffix).told()] if self._gains else []
            rows.append([f"saved against {other}", *saved, *gain])
        header = ["bits per byte of text (95 % intervals)", *columns]
        return [*header, *(["saved by carrying"] if self._gains else [])], rows

    def _perplexity(self, models: Models) -> Table:
        rows = []
        for name, found, suffix in self._readings(models):
            for way in self.text_ways:
                read = found[way + suffix]["all"]
                value = _with_interval(read["bits_per_byte"], read["low"], read["high"])
                perplexities = (f"{read[f'{unit}_perplexity']:.4g}" for unit in ("byte", "word"))
                rows.append([_label(name, suffix, way), f"{sum(read['tokens']):,}", value, *perplexities])
        header = ["all tokens that a way of reading predicts", "tokens", "bits per byte (95 % interval)"]
        return [*header, "byte perplexity", "word perplexity"], rows

    @property
    def _gains(self) -> bool:
        return {"carried", "reset"} <= set(self.text_ways)

    @staticmethod
    def _readings(models: Models) -> Iterator[tuple[str, Mapping[str, Any], str]]:
        """The name of each model and source, its results, and the suffix of its ways with the memory on and off."""
        for name, found in by_source(models, "text").items():
            for suffix in ("", _OFF) if any(way.endswith(_OFF) for way in found) else ("",):
                yield name, found, suffix

    def _lines(self, models: Models) -> dict[str, Any]:
        """The readings in the picture: without rolling windows if there are others, and memory off carried alone."""
        ways = [way for way in self.text_ways if way != "rolling"] or self.text_ways
        return {
            _label(name, suffix, way): found[way + suffix]
            for name, found, suffix in self._readings(models)
            for way in (ways[:1] if suffix else ways)
        }

    @staticmethod
    def _pairs(models: Models) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any], str]]:
        """The first model's results beside those of itself without its long-term memory, and of each control: their
        name, both results, and the suffix of the ways of the latter.
        """
        first, *controls = models
        for source, found in models[first]["text"].items():
            here = f" in {source}" if len(models[first]["text"]) > 1 else ""
            if any(way.endswith(_OFF) for way in found):
                yield f"itself with memory off{here}", found, found, _OFF
            for other in controls:
                yield other + here, found, models[other]["text"][source], ""

    def figures(self, found: Any, about: Mapping[str, Any], records: Records) -> Iterator[Figure]:
        for source, of_source in found.items():
            sizes = ("text_documents", "text_length", "text_joined")
            settings = {"corpus": about["corpora"].get(source), **{size: getattr(self, size) for size in sizes}}
            title = f"Held-out text: {source}"
            topic = Topic(f"text-{source}", title, "bits per byte", "reading", share=False, settings=settings)
            num_bytes = of_source["documents"]["bytes"]
            for way, reading in of_source.items():
                if way == "documents":
                    continue
                part = reading["common"]
                # Documents of equal bytes are the same in all tokenizers.
                units = {
                    (settings["corpus"], about["seed"], i, size): (bits(nats, scored), scored)
                    for i, (size, nats, scored) in enumerate(zip(num_bytes, part["nats"], part["bytes"], strict=True))
                    if scored
                }
                mean = (part["bits_per_byte"], part["low"], part["high"])
                yield Figure(topic, None, way.replace("_", " "), *mean, len(units), units)

    def section(self, report: Report, models: Models, first: Subject) -> None:
        lines = self._lines(models)
        read = next(iter(lines.values()))
        report.heading("Held-out text by position")
        report.table(*self.table(models))
        means = {f"{name}: {t['bits_per_byte']:.3f}": t["by_position"] for name, t in lines.items()}
        intervals = [t["intervals"] for t in lines.values()]
        picture = plots.by_position(means, read["edges"], "bits per byte", "over all positions", intervals)
        report.picture("text", picture, "bits per byte by position")
        of_first = models[first.name]["text"]
        for source, found in of_first.items():
            common = found[self.text_ways[0]]["common"]
            report.note(
                f"{source}: {len(common['tokens'])} documents, {sum(common['tokens']):,} tokens, "
                f"{sum(common['bytes']):,} bytes, read in segments of {read['segment']}."
            )
        report.note(
            "Carried: one memory for a document; reset: a new one each segment. Same tokens scored either way: all "
            "but the first of each segment. Bands and brackets are 95 % intervals, of documents drawn anew."
        )
        if self._gains:
            for other, found, theirs, suffix in self._pairs(models):
                report.note(_sentence(first.name, other, found, theirs, suffix))
        report.table(*self._perplexity(models))
        counts = [found["documents"] for found in of_first.values()]
        num_bytes, words = (sum(sum(count[unit]) for count in counts) for unit in ("bytes", "words"))
        report.note(
            f"Tokens that are predicted: {'; '.join(f'{way}, {_COVERS[way]}' for way in self.text_ways)}. Ends of "
            "documents are not scored. Perplexities are e to the nats of a byte, and of a word, which has "
            f"{num_bytes / max(1, words):.2f} bytes with the white space around it."
        )
        if len({m["tokenizer"] for m in models.values()}) > 1:
            report.note("Tokens are not the same for all models: each was given the same bytes of every document.")
        surprises = {
            f"{n}, {name.removesuffix('/surprise')}": values
            for n, of_model in by_source(models, "text").items()
            for name, values in of_model.get("carried", {"of_tokens": {}})["of_tokens"].items()
            if name.endswith("/surprise")
        }
        if surprises:
            picture = plots.by_position(surprises, read["edges"], "surprise")
            report.picture("surprise", picture, "surprise by position")
            report.note(
                "Surprise: the norm of the gradient of the inner loss, a mean over tokens and heads; memory carried."
            )


def _label(name: str, suffix: str, *way: str) -> str:
    return ", ".join([name, *(["memory off"] if suffix else []), *way])


class _PerDocument(NamedTuple):
    """Bits per byte of each document, and its bytes, of the tokens that all ways predict."""

    values: np.ndarray
    num_bytes: np.ndarray

    def __sub__(self, other: "_PerDocument") -> "_PerDocument":
        return _PerDocument(self.values - other.values, self.num_bytes)

    def told(self) -> str:
        mean = np.average(self.values, weights=self.num_bytes) if self.num_bytes.any() else math.nan
        return _with_interval(mean, *self.interval())

    def interval(self) -> tuple[float, float]:
        return interval(self.values.tolist(), self.num_bytes.tolist())


def _bits(found: Mapping[str, Any], way: str) -> _PerDocument:
    common = found[way]["common"]
    values = [bits(*x) if x[1] else 0.0 for x in zip(common["nats"], common["bytes"], strict=True)]
    return _PerDocument(np.array(values), np.array(common["bytes"]))


def _carrying(found: Mapping[str, Any], suffix: str = "") -> _PerDocument:
    """Bits per byte that carrying the memory saves."""
    return _bits(found, f"reset{suffix}") - _bits(found, f"carried{suffix}")


def _more(found: Mapping[str, Any], theirs: Mapping[str, Any], suffix: str) -> _PerDocument:
    """How much more it saves one model than another: a difference of differences."""
    return _carrying(found) - _carrying(theirs, suffix)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.4f}" + (f" ({low:.4f} to {high:.4f})" if math.isfinite(low) else "")


def _sentence(name: str, other: str, found: Mapping[str, Any], theirs: Mapping[str, Any], suffix: str) -> str:
    saved = _bits(theirs, f"carried{suffix}") - _bits(found, "carried")
    more = _more(found, theirs, suffix)
    told = (
        f"{name} beside {other}: with the memory carried, it saves {saved.told()} bits per byte; carrying the memory "
        f"saves it {more.told()} more"
    )
    low, high = more.interval()
    if not math.isfinite(low):
        return f"{told}. One document gives no interval."
    seen = "the interval holds 0, so no difference is seen" if low <= 0 <= high else "the interval does not hold 0"
    return f"{told}; {seen}."
