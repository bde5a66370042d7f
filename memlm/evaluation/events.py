"""Tasks as events: a model reads text and is asked about it. One runner serves all tasks and all models.

B streams, C candidate answers, A tokens of the longest, V vocabulary.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.data import IGNORE_INDEX
from memlm.reader import Reader
from memlm.settings import require

# Tokens of a forward: enough to keep the processor busy, few enough for small memories.
TOKENS_AT_ONCE = 16384
# Copies of memories that answer questions in one forward, and their bytes.
_COPIES, _BYTES = 1024, 2**30
# Tokens whose logits are kept in one forward: a vocabulary is large.
_LOGITS_AT_ONCE = 2048
# Streams that wait for others of their shape.
_WAITING = 256


@dataclass(frozen=True)
class Read:
    """ids [T]: tokens that the model reads and keeps in its memory."""

    ids: np.ndarray


@dataclass(frozen=True)
class Ask:
    """A question about all that was read; the memory stays as it was.

    ids [Q]: the question, at least one token
    answers: a right answer [A], then the wrong candidates, if there are any; without ``judge``, a lone answer is right
        if greedy decoding gives it, and one of several if it is the likeliest
    tag: words for the record, such as length and depth; ``unit``, a number that texts share which are not independent
    at: places in ``ids`` after which the tokens of the lone answer are due, whether or not they stand in ``ids``;
        without it, the answer follows the question
    judge: the score in 0..1 of ``tokens`` tokens that the model generates greedily, up to its end of text; the score
        of ``answers[0]`` is 1
    """

    ids: np.ndarray
    answers: Sequence[np.ndarray]
    tag: Mapping[str, Any] = field(default_factory=dict)
    judge: Callable[[np.ndarray], float] | None = None
    tokens: int = 0
    at: np.ndarray | None = None


class Elsewhere:
    """An event that writes elsewhere than into the memory; later events of its stream alone find it."""

    ids: np.ndarray

    def write(self, reader: Reader, ids: Tensor) -> None:
        """ids: those of the event, on the model's device"""
        raise NotImplementedError


@dataclass(frozen=True)
class Learn(Elsewhere):
    """ids [T]: tokens of one optimiser step on a copy of the weights, from an empty memory; see ``Reader.learn``"""

    ids: np.ndarray
    rate: float

    def write(self, reader: Reader, ids: Tensor) -> None:
        reader.learn(ids[None], self.rate)


@dataclass(frozen=True)
class Edit(Elsewhere):
    """ids [N, T]: facts that are written into a copy of the weights at once, in closed form; see ``Reader.edit``

    answer: tokens at the end of each that are its answer
    """

    ids: np.ndarray
    answer: int
    rate: float

    def write(self, reader: Reader, ids: Tensor) -> None:
        reader.edit(ids, self.answer, self.rate)


@dataclass(frozen=True)
class Shelve(Elsewhere):
    """ids [N, T]: documents of a bank, to which later questions are put; see ``Reader.file``

    names: of the documents; one of a known name replaces it
    """

    ids: np.ndarray
    names: Sequence[str]

    def write(self, reader: Reader, ids: Tensor) -> None:
        reader.file(dict(zip(self.names, ids, strict=True)))


Event = Read | Ask | Elsewhere
# The events of one text, in their order.
Stream = Sequence[Event]
Record = dict[str, Any]


def run(
    make_reader: Callable[[], Reader],
    streams: Iterable[Stream],
    advance: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Record]:
    """Read the streams and ask their questions. Streams of the same shape share forwards, so no token is padded.

    advance: called with the number of tokens after each event

    A record holds the question's tag, and
        stream      the stream's number
        read        tokens that were read before the question
        correct     the score in 0..1: of the answer's tokens if it is alone, of the choice, or of the judge
        exact       whether all of it is right
        nats        of the right answer; None for a judge
        rank        of the right answer among the candidates, 0 is the likeliest; None for a judge
        shares      1 for the likeliest candidate, 0 for the others; equal ones share it; None for a judge
        seconds     of the question, a mean over questions that were asked together
        bytes       of the stream's memory

    Raises ValueError if the model's logits are not finite.
    """
    waiting: dict[tuple, list[tuple[int, Stream]]] = {}
    held = 0
    for number, stream in enumerate(streams):
        if any(isinstance(event, Elsewhere) for event in stream):
            yield from _together(make_reader(), [(number, stream)], advance)
            continue
        shape = tuple(_shape(event) for event in stream)
        group = waiting.setdefault(shape, [])
        group.append((number, stream))
        held += 1
        if len(group) * _longest(stream) >= TOKENS_AT_ONCE:
            held -= len(group)
            yield from _together(make_reader(), waiting.pop(shape), advance)
        elif held > _WAITING:
            fullest = max(waiting, key=lambda shape: len(waiting[shape]))
            held -= len(waiting[fullest])
            yield from _together(make_reader(), waiting.pop(fullest), advance)
    for group in waiting.values():
        yield from _together(make_reader(), group, advance)


def _shape(event: Event) -> tuple:
    if not isinstance(event, Ask):
        return (type(event), len(event.ids))
    require(len(event.ids) > 0, "a question needs at least one token")
    if event.at is not None:
        require(len(event.answers) == 1 and len(event.at) == len(event.answers[0]), "each place needs an answer")
        return (Ask, len(event.ids), "at")
    # A judge sees generated tokens alone.
    return (Ask, len(event.ids), event.tokens, *(() if event.judge else map(len, event.answers)))


def _longest(stream: Stream) -> int:
    """Tokens of a stream's longest event; a question counts with all of its answers."""
    return max(
        sum(len(e.ids) + len(a) for a in e.answers) + len(e.ids) + e.tokens
        if isinstance(e, Ask) and e.at is None
        else len(e.ids)
        for e in stream
    )


def _together(reader: Reader, group: list[tuple[int, Stream]], advance: Callable[[int], None]) -> Iterator[Record]:
    device = reader.model.device
    for _, steps in groupby(enumerate(zip(*(stream for _, stream in group), strict=True)), key=_step):
        events = [event for _, of_streams in steps for event in of_streams]
        ids_BT = _stacked([event.ids for event in events], device)
        if isinstance(events[0], Read) and ids_BT.numel():
            reader(ids_BT)
        if isinstance(events[0], Elsewhere):
            events[0].write(reader, ids_BT[0])
        advance(ids_BT.numel())
        if not isinstance(events[0], Ask):
            continue
        numbers = [number for number, _ in group] * (len(events) // len(group))
        started, memory = time.perf_counter(), reader.nbytes() // len(group)
        of_answers = partial(
            _scored if events[0].at is None else _placed, streams=len(group), most=_BYTES // max(1, memory)
        )
        scored = _generated if events[0].judge else of_answers
        found = scored(reader, ids_BT, events)
        seconds = (time.perf_counter() - started) / len(events)
        about = {"read": reader.tokens, "seconds": seconds, "bytes": memory}
        for number, event, result in zip(numbers, events, found, strict=True):
            yield {**event.tag, "stream": number, **result, **about}


def _step(numbered: tuple[int, Sequence[Event]]) -> tuple:
    """The same for questions that follow each other and share a forward."""
    number, (event, *_) = numbered
    return _shape(event) if isinstance(event, Ask) and not event.judge else (number,)


def _stacked(rows: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)


def _scored(reader: Reader, ids_BT: Tensor, events: Sequence[Ask], streams: int, most: int) -> list[Record]:
    """Nats and choices of the candidate answers. The events are those of all streams, once or several times.

    most: copies of a stream's memory that there may be at a time
    """
    candidates, sizes = len(events[0].answers), [len(a) for a in events[0].answers]
    longest = max(sizes)
    # The logits after the question serve all answers of one token.
    asked = 1 if longest == 1 else candidates
    padded = [np.pad(a, (0, longest - len(a))) for event in events for a in event.answers]
    answers_NCA = _stacked(padded, ids_BT.device).view(len(events) * asked, -1, longest)
    real_CA = torch.arange(longest) < torch.tensor(sizes)[:, None]
    events_N = torch.arange(len(events), device=ids_BT.device).repeat_interleave(asked)
    # Padding behind an answer's end does not change its logits.
    inputs_NT = torch.cat([ids_BT[events_N], answers_NCA[:, 0, :-1]], 1)
    nats, right = [], []
    at_once = max(1, min(TOKENS_AT_ONCE // inputs_NT.shape[1], _COPIES, most))
    for part_N in torch.arange(len(inputs_NT), device=ids_BT.device).split(at_once):
        logits_NAV = reader.fork(events_N[part_N] % streams, ids_BT[events_N[part_N]])(
            inputs_NT[part_N], keep=longest
        ).float()
        if not torch.isfinite(logits_NAV).all():
            raise ValueError(f"the model's logits are not finite after {reader.tokens:,} tokens")
        logp_NAC = logits_NAV.log_softmax(-1).gather(2, answers_NCA[part_N].transpose(1, 2))
        nats.append(-logp_NAC.transpose(1, 2).double().cpu())
        right.append((logits_NAV.argmax(-1)[:, None] == answers_NCA[part_N]).cpu())
    nats_BC = (torch.cat(nats).view(-1, candidates, longest) * real_CA).sum(-1)
    least_BC = nats_BC == nats_BC.amin(1, keepdim=True)
    right_BA = torch.cat(right).view(-1, candidates, longest)[:, 0, : sizes[0]]
    # Equally likely answers share the places: a model that tells nothing apart is right by chance.
    shares_BC = least_BC.double() / least_BC.sum(1, keepdim=True)
    before_B = (nats_BC[:, 1:] < nats_BC[:, :1]).sum(1)
    found = []
    for i in range(len(events)):
        if candidates == 1:
            result = {"correct": float(right_BA[i].double().mean()), "exact": bool(right_BA[i].all())}
        else:
            share = float(shares_BC[i, 0])
            result = {"correct": share, "exact": share == 1.0}
        about = {"nats": float(nats_BC[i, 0]), "rank": int(before_B[i]), "shares": shares_BC[i].tolist()}
        found.append({**result, **about})
    return found


def _placed(reader: Reader, ids_BT: Tensor, events: Sequence[Ask], streams: int, most: int) -> list[Record]:
    """Nats and accuracy of answers at places of the question, which is read once; arguments as in ``_scored``."""
    labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
    for b, event in enumerate(events):
        labels_BT[b, event.at] = _stacked(event.answers, ids_BT.device)[0]
    nats_BT = torch.zeros(ids_BT.shape, dtype=torch.float64, device=ids_BT.device)
    right_BT = torch.zeros_like(nats_BT)
    rows = torch.arange(len(events), device=ids_BT.device)
    for part in rows.split(max(1, min(_LOGITS_AT_ONCE // ids_BT.shape[1], most))):
        fork = reader.fork(part % streams, ids_BT[part])
        for places in torch.arange(ids_BT.shape[1], device=rows.device).split(_LOGITS_AT_ONCE):
            labels = labels_BT[part][:, places]
            asked = labels != IGNORE_INDEX
            logits_NV = fork(ids_BT[part][:, places], keep=len(places))[asked].float()
            if not torch.isfinite(logits_NV).all():
                raise ValueError(f"the model's logits are not finite after {fork.tokens:,} tokens")
            b, t = asked.nonzero(as_tuple=True)
            nats_BT[part[b], places[t]] = F.cross_entropy(logits_NV, labels[asked], reduction="none").double()
            right_BT[part[b], places[t]] = (logits_NV.argmax(-1) == labels[asked]).double()
    shares = right_BT.sum(1) / (labels_BT != IGNORE_INDEX).sum(1)
    return [
        {"correct": share, "exact": share == 1.0, "nats": nats, "rank": 0, "shares": [1.0]}
        for share, nats in zip(shares.tolist(), nats_BT.sum(1).tolist(), strict=True)
    ]


def _generated(reader: Reader, ids_BT: Tensor, events: Sequence[Ask]) -> list[Record]:
    """Scores of generated text by the questions' judges."""
    fork, ids = reader.fork(None, ids_BT), ids_BT
    ends = reader.model.generation_config.eos_token_id
    ends_E = torch.tensor([ends] if isinstance(ends, int) else ends or [], device=ids_BT.device)
    made, ended_B = [], torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
    for _ in range(events[0].tokens):
        logits_BV = fork(ids)[:, -1].float()
        if not torch.isfinite(logits_BV).all():
            raise ValueError(f"the model's logits are not finite after {fork.tokens:,} tokens")
        ids = logits_BV.argmax(-1, keepdim=True)
        ended_B |= torch.isin(ids[:, 0], ends_E)
        made.append(torch.where(ended_B, -1, ids[:, 0]))
        if bool(ended_B.all()):
            break
    made_BA = torch.stack(made, 1).cpu().numpy()
    found = []
    for event, row in zip(events, made_BA, strict=True):
        score = event.judge(row[row >= 0]) if event.judge else 0.0
        found.append({"correct": score, "exact": score == 1.0, "nats": None, "rank": None, "shares": None})
    return found
