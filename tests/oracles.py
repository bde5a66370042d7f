"""Readers that stand for models: one knows every answer, one guesses, one only knows what was never asked."""

from collections import Counter

import numpy as np
import torch
from transformers import GenerationConfig

from memlm.evaluation.events import Ask, Elsewhere, Read, run


class _Stub:
    device = torch.device("cpu")
    generation_config = GenerationConfig(eos_token_id=None)


class Oracle:
    """Predicts, after a text and a question, the right answer; ``noise`` takes the text's place in a guesser.

    answers: {tokens so far: the next token}
    """

    model, tokens = _Stub(), 0

    def __init__(self, answers, vocabulary):
        self.answers, self.vocabulary, self.read = answers, vocabulary, []

    def __call__(self, ids_BT, keep=1):
        self.read = self.read or [b""] * len(ids_BT)
        logits = torch.zeros(*ids_BT.shape, self.vocabulary)
        for b, row in enumerate(ids_BT.numpy()):
            for t, token in enumerate(row):
                self.read[b] += np.int64(token).tobytes()
                logits[b, t] = self.after(self.read[b])
        self.tokens += ids_BT.shape[1]
        return logits[:, -keep:]

    def after(self, read):
        logits = torch.zeros(self.vocabulary)
        if read in self.answers:
            logits[self.answers[read]] = 30.0
        return logits

    def learn(self, ids_BT, rate):
        self.read = [read + stored(ids) for read, ids in zip(self.read or [b""], ids_BT.numpy(), strict=True)]

    def edit(self, ids_NT, answer, rate):
        self.learn(ids_NT[None], rate)

    def file(self, documents):
        self.learn(torch.stack([*documents.values()])[None], 0.0)

    def fork(self, rows=None, question_BT=None):
        other = type(self)(self.answers, self.vocabulary)
        other.read = [self.read[i] for i in rows.tolist()] if self.read and rows is not None else list(self.read)
        other.tokens = self.tokens
        return other

    def nbytes(self):
        return sum(map(len, self.read))


class Guesser(Oracle):
    """Draws its logits anew at every token, and knows nothing."""

    def after(self, read):
        return torch.randn(self.vocabulary)


def stored(ids):
    """Weights or a bank that hold an item are a place of their own."""
    return b"stored" + ids.astype(np.int64).tobytes()


def known(streams):
    """The answers of streams, as an ``Oracle`` takes them."""
    answers = {}
    for stream in streams:
        read = b""
        for event in stream:
            if isinstance(event, Read):
                read += event.ids.astype(np.int64).tobytes()
            if isinstance(event, Elsewhere):
                read += stored(event.ids)
            if isinstance(event, Ask) and event.at is not None:
                for place, token in zip(event.at, event.answers[0], strict=True):
                    answers[read + event.ids[: place + 1].astype(np.int64).tobytes()] = int(token)
            elif isinstance(event, Ask):
                so_far = read + event.ids.astype(np.int64).tobytes()
                for token in event.answers[0]:
                    answers[so_far] = int(token)
                    so_far += np.int64(token).tobytes()
    return answers


def guessed(streams, motifs=False):
    """The answers of the set guesser: it has all answers of a stream as a bag, and takes out those that a text shows.

    motifs: answers at neighbouring places are one answer of several tokens, which it has in order
    """
    rng, answers = np.random.default_rng(0), {}
    for stream in streams:
        parts = [_parts(event, motifs) for event in stream if isinstance(event, Ask)]
        bag, read = [answer for of_event in parts for answer, _ in of_event], b""
        for event in stream:
            ids = event.ids.astype(np.int64)
            if isinstance(event, Read):
                read += ids.tobytes()
                continue
            left, whole = list(bag), np.concatenate([ids, event.answers[0]]) if event.at is None else ids
            for answer, places in parts.pop(0):
                for i, place in enumerate(places):
                    counts = Counter(a[i] for a in left if len(a) > i and a[:i] == answer[:i])
                    most = max(counts.values())
                    guess = rng.choice([token for token, count in counts.items() if count == most])
                    answers[read + whole[: place + 1].tobytes()] = int(guess)
                if place + 1 < len(whole) and whole[place + 1] == answer[-1]:
                    left.remove(answer)
    return answers


def _parts(event, motifs):
    """An event's answers as tuples, and the places that predict their tokens."""
    answer = event.answers[0]
    at = np.arange(len(answer)) + len(event.ids) - 1 if event.at is None else event.at
    cuts = np.flatnonzero(np.diff(at) > 1) + 1 if motifs else np.arange(1, len(at))
    return [(tuple(a.tolist()), p) for a, p in zip(np.split(answer, cuts), np.split(at, cuts), strict=True)]


def scores(kind, streams, vocabulary, answers=None):
    """The records of a reader that stands for a model; answers: those that it gives, the right ones by default."""
    streams = list(streams)
    answers = known(streams) if answers is None else answers
    torch.manual_seed(0)
    return list(run(lambda: kind(answers, vocabulary), streams))
