"""From documents to a bank: check texts and token ids, and compute their kept chunks with the model."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memlm.cache import MemoryCache
from memlm.data import WholeText
from memlm.modeling import MemLMForCausalLM, MemLMModel
from memlm.roles import Roles
from memlm.settings import named

Given = Sequence[int] | str | WholeText
GivenDocuments = Mapping[str, Given] | Iterable[tuple[str, Given]]


class Entry(NamedTuple):
    """A document to read: token ids [T]; its text, None if only tokens were given; and the text's file."""

    name: str
    ids: Tensor
    text: str | None
    source: str


def decoder_of(model: nn.Module) -> MemLMModel:
    """The decoder in a model, also inside adapters."""
    return next(module for module in model.modules() if isinstance(module, MemLMModel))


def origin_of(model: MemLMForCausalLM) -> str | None:
    """The folder or hub name that a model was loaded from."""
    source = getattr(model.config, "_name_or_path", "")
    return str(Path(source).resolve()) if Path(source).is_dir() and source else source or None


def pairs_of(documents: GivenDocuments) -> Iterable[tuple[str, Given]]:
    return documents.items() if isinstance(documents, Mapping) else documents


def entry_of(name: str, given: Given, vocab_size: int, ids_of: Callable[[str], Tensor]) -> Entry:
    """A document as given, checked; ids_of: the tokens of a text."""
    if not isinstance(name, str):
        raise ValueError(f"documents[{name!r}]: a name must be a string")
    text, source = (given.text, given.source) if isinstance(given, WholeText) else (given, "")
    if not isinstance(text, str):
        return Entry(name, checked(name, text, vocab_size), None, "")
    with named(f"documents[{name!r}]={text!r:.40}"):
        ids = ids_of(text)
    return Entry(name, checked(name, ids, vocab_size), text, source)


def checked(name: str, tokens: Sequence[int], vocab_size: int) -> Tensor:
    ids = tokens if isinstance(tokens, Tensor) else torch.tensor(tokens)
    if ids.ndim != 1 or ids.is_floating_point() or not len(ids):
        raise ValueError(f"documents[{name!r}] of shape {list(ids.shape)} must be token ids [T], at least one")
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"documents[{name!r}] holds token {wrong}; the model has tokens 0 to vocab_size - 1")
    return ids.to("cpu", torch.int64)


def hash_of(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:32]


def number_of(count: int, tokens: str) -> int:
    """The permanent number of the document that is read after ``count`` others; tokens: the hash of its tokens.

    Numbers ascend in the order of reading and fit a float64. Documents of two banks almost never share one.
    """
    return count << 20 | int(tokens[:5], 16)


@torch.no_grad()
def read_batch(
    model: MemLMForCausalLM, layers: Sequence[int], documents: Sequence[Tensor], tokens_per_batch: int
) -> tuple[Tensor, Tensor]:
    """Means over documents' chunks, on the host, in the model's dtype.

    Returns router keys [L, C, G, K], not yet in the bank's form, and attention's keys and values [L, C, 2, G, K].
    """
    device, cache = model.device, MemoryCache()
    # Documents do not see each other, so they share one row.
    ids_BT = torch.cat([torch.zeros(0, dtype=torch.int64), *documents])[None].to(device)
    lengths_N = torch.tensor([len(ids) for ids in documents], dtype=torch.int64)
    doc_ids_BT = torch.arange(1, len(documents) + 1).repeat_interleave(lengths_N)[None].to(device)
    training = model.training
    model.eval()
    for ids, doc_ids in zip(*(x.split(tokens_per_batch, 1) for x in (ids_BT, doc_ids_BT)), strict=True):
        decoder_of(model)(ids, roles=Roles(doc_ids), past_key_values=cache)
    model.train(training)
    states = [cache.states[i] for i in layers]
    chunks = int(states[0]["chunks"])
    routers, contents = [], []
    for state in states:
        k, v, router_k = (state["bank"][name][0, :chunks] for name in ("k", "v", "router_k"))
        routers.append(router_k.cpu())
        contents.append(torch.stack([k, v], 1).to("cpu", model.dtype))
    return torch.stack(routers), torch.stack(contents)


@contextlib.contextmanager
def progress_bar(shown: bool, total: int | None) -> Iterator[Any]:
    """Yields a function that counts tokens read; total: the number of documents, if known."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("reading documents: {task.completed:,} of {task.fields[tokens]:,} tokens")
    with Progress(text, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), disable=not shown) as bar:
        task, count = bar.add_task("", total=total, tokens=0), 0

        def advance(tokens: int) -> None:
            nonlocal count
            count += tokens
            bar.update(task, advance=1, tokens=count)

        yield advance
