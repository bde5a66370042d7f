"""Memory Interleave (arXiv:2603.23516): a model asks a bank, names the documents that it wants to read, is given their
text, asks again with it, and so on until it answers.

A question's transcript, in the texts and roles of ``Interleave``, with what the model writes in capitals::

    head | question | tail, response | NAME NAME END_OF_NAMES | passage passage end_of_passages | NAME END_OF_NAMES
    -2     0          -2, -1           -1                       0                                  -1
    | passage end_of_passages | END_OF_RETRIEVAL | restated | ANSWER <eos>
      0                         -1                 -1         -1

It goes through one memory, each token once, and equals the same tokens and roles in one call. Question and passages
(role 0) choose documents together: what the question chose stands beside what a passage chooses, as far as top_k goes.
(The released code reads the whole transcript again in each round, and all passages but the last choose no more.)

B rows, T tokens.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memlm.bank import MemoryBank
from memlm.cache import MemoryCache
from memlm.memory.base import require

_QUERY, _RESPONSE, _TEMPLATE = 0, -1, -2
# What may stand in a text, and whether it must.
_PLACES = {
    "document": {"name": False, "text": True},
    "question": {"question": True},
    "name": {"name": True},
    "passage": {"name": False, "text": True},
    "restated": {"question": False},
}
_CONTROLS = ("end_of_names", "end_of_retrieval")


class Answer(NamedTuple):
    """text: behind the last ``Interleave.answer`` of what was written last, or all of this
    read: names of the documents given, round by round; unknown: names written that the bank does not have
    finished: whether the model ended its answer; otherwise ``max_new_tokens`` did
    input_ids, doc_ids: the transcript, as one call takes it
    """

    text: str
    read: list[list[str]]
    unknown: list[str]
    finished: bool
    input_ids: list[int]
    doc_ids: list[int]


@dataclass(frozen=True)
class Interleave:
    """The texts around documents, questions and answers, as released with MSA-4B, and how far a question may go.

    document: what a bank reads of one, with {name} and {text}
    head, question ({question}), tail, response: what a model is asked
    name ({name}), end_of_names: how it asks to read, one or more
    passage ({name}, {text}) of each, end_of_passages: what it is then given
    end_of_retrieval: how it says that it has read enough; restated ({question}): what it is then given
    answer: what precedes its answer
    max_rounds: of reading; max_new_tokens: that it may write, all rounds together

    A round is the last if it names nothing that can be given: no document of the bank, or none that was not given
    already; so is one that comes when max_rounds have been. The model is then told ``end_of_retrieval``, as if it had
    written it, and ``restated``, and answers. It may also answer at once: its end-of-text token always ends.
    Raises ValueError where a text lacks what must stand in it, or holds what cannot.
    """

    document: str = "<|im_start|>[{name}]. {text}[{name}]<|im_end|>"
    head: str = "<|im_start|>user\n"
    question: str = (
        "\nPlease answer the question based on the above historical document information\n\n{question}\n"
        "Please return all documents related to the question\n"
    )
    tail: str = "<|im_end|>\n"
    response: str = "<|im_start|>"
    name: str = "[{name}]"
    end_of_names: str = "<|object_ref_end|>"
    passage: str = "[{name}]. {text}\n"
    end_of_passages: str = "<|object_ref_end|>"
    end_of_retrieval: str = "<End-of-Retrieve>"
    restated: str = "<|im_start|>The user's question is: {question}\n<|object_ref_end|>"
    answer: str = "The answer to the question is:"
    max_rounds: int = 8
    max_new_tokens: int = 2048

    def __post_init__(self) -> None:
        for key in (f.name for f in fields(self) if f.type is str):
            text, places = getattr(self, key), _PLACES.get(key, {})
            for place, needed in places.items():
                require(not needed or f"{{{place}}}" in text, f"{key}={text!r} must hold {{{place}}}")
            for other in re.findall(r"\{(\w*)\}", text):
                require(other in places, f"{key}={text!r} holds {{{other}}}, which it is not given; take it out")
        require(
            not self.name.endswith("{name}"), f"name={self.name!r} must hold something behind {{name}}, which ends it"
        )
        one, other = (getattr(self, key) for key in _CONTROLS)
        require(
            bool(one and other) and one not in other and other not in one,
            f"end_of_names={one!r} and end_of_retrieval={other!r} must be texts, and none stand in the other",
        )
        require(self.max_rounds >= 0, f"max_rounds={self.max_rounds} must not be negative")
        require(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1")

    def documents(
        self, texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[tuple[str, list[int]]]:
        """Names and token ids, as a bank reads them."""
        for name, text in texts.items():
            yield name, _encoded(tokenizer, self._filled("document", name=name, text=text))

    @torch.no_grad()
    def answers(
        self,
        questions: Sequence[str],
        bank: MemoryBank,
        texts: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Answer]:
        """Greedy answers to questions, which go through the rounds side by side.

        bank: of what ``documents`` says; texts: of its documents by name, to be read
        Raises ValueError if the texts lack a document that the model asks for and the bank has.
        """
        readings = [_Reading(self, question, tokenizer) for question in questions]
        memory, going = MemoryCache(), readings
        while going:
            while any(reading.writing for reading in going):
                _write(bank, memory, going)
            for reading in going:
                reading.go_on(bank, texts)
            kept = [i for i, reading in enumerate(going) if reading.writing]
            if 0 < len(kept) < len(going):
                memory.batch_select_indices(torch.tensor(kept))
            going = [going[i] for i in kept]
        return [reading.answered() for reading in readings]

    def _filled(self, key: str, **given: str) -> str:
        """The text, with what is given in its places, and as it is: a text may hold braces."""
        return re.sub(r"\{(\w+)\}", lambda place: given[place[1]], getattr(self, key))


@dataclass
class _Reading:
    """A question on its way.

    ids, roles: all of it; fed: how many of them the memory has; turn: what was written since text was given
    """

    config: Interleave
    question: str
    tokenizer: PreTrainedTokenizerBase
    ids: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    fed: int = 0
    turn: list[int] = field(default_factory=list)
    read: list[list[str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    writing: bool = True
    answering: bool = False
    finished: bool = False

    def __post_init__(self) -> None:
        self.left = self.config.max_new_tokens
        for key, role in (("head", _TEMPLATE), ("question", _QUERY), ("tail", _TEMPLATE), ("response", _RESPONSE)):
            self._give(self.config._filled(key, question=self.question), role)
        require(_QUERY in self.roles, f"questions: {self.question!r} has no tokens; ask something")

    def _give(self, text: str, role: int) -> None:
        ids = _encoded(self.tokenizer, text)
        self.ids += ids
        self.roles += [role] * len(ids)

    def take(self) -> tuple[list[int], list[int]]:
        """What the memory is to be fed."""
        first, self.fed = self.fed, len(self.ids)
        return self.ids[first:], self.roles[first:]

    def write(self, token: int) -> None:
        self.ids.append(token)
        self.roles.append(_RESPONSE)
        self.turn.append(token)
        self.left -= 1
        self.finished = token == self.tokenizer.eos_token_id
        self.writing = not self.finished and self.left > 0 and self._ended() is None

    def _ended(self) -> str | None:
        """Which control string the turn ends in, if any."""
        if self.answering:
            return None
        # A token has a byte at least.
        longest = max(len(getattr(self.config, key).encode()) for key in _CONTROLS)
        text = self._said(self.turn[-longest:])
        return next((key for key in _CONTROLS if getattr(self.config, key) in text), None)

    def go_on(self, bank: MemoryBank, texts: Mapping[str, str]) -> None:
        """Give what the turn asks for, so that the next one is written."""
        ended = self._ended()
        if self.finished or self.left == 0 or ended is None:
            return
        names = self._names() if ended == "end_of_names" else []
        self.unknown += [name for name in names if name not in bank]
        given = {name for of_round in self.read for name in of_round}
        names = [name for name in names if name in bank and name not in given]
        self.writing, self.turn = True, []
        if names and len(self.read) < self.config.max_rounds:
            for name in names:
                require(name in texts, f"texts: {name!r} is in the bank, and has no text; give it")
            self.read.append(names)
            passages = (self.config._filled("passage", name=name, text=texts[name]) for name in names)
            return self._give("".join(passages) + self.config.end_of_passages, _QUERY)
        self.answering = True
        told = self.config.end_of_retrieval if ended == "end_of_names" else ""
        self._give(told + self.config._filled("restated", question=self.question), _RESPONSE)

    def _names(self) -> list[str]:
        before, behind = map(re.escape, self.config.name.split("{name}", 1))
        text = self._said(self.turn).split(self.config.end_of_names)[0]
        return list(dict.fromkeys(re.findall(f"{before}(.+?){behind}", text, re.DOTALL)))

    def _said(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def answered(self) -> Answer:
        text = self._said(self.turn[: len(self.turn) - self.finished])
        text = text.rpartition(self.config.answer)[2] if self.config.answer else text
        return Answer(text.strip(), self.read, self.unknown, self.finished, self.ids, self.roles)


def _write(bank: MemoryBank, memory: MemoryCache, readings: Sequence[_Reading]) -> None:
    """A token of each that writes; the others wait."""
    fed = [reading.take() if reading.writing else ([], []) for reading in readings]
    width, device = max(len(ids) for ids, _ in fed), bank.model.device
    # To the right, so that the last token is everyone's last.
    ids_BT, roles_BT = (
        torch.tensor([[0] * (width - len(part)) + part for part in parts], device=device)
        for parts in zip(*fed, strict=True)
    )
    lengths_B = torch.tensor([len(ids) for ids, _ in fed], device=device)
    mask_BT = torch.arange(width, 0, -1, device=device) <= lengths_B[:, None]
    said = {role for _, roles in fed for role in roles}
    out = bank.model(
        ids_BT,
        attention_mask=None if all(len(ids) == width for ids, _ in fed) else mask_BT,
        doc_ids=None if width == 1 and said == {_RESPONSE} else roles_BT,
        memory_bank=bank if _QUERY in said else None,
        past_key_values=memory,
        use_cache=True,
        logits_to_keep=1,
    )
    for reading, token in zip(readings, _likeliest(out.logits[:, -1], readings), strict=True):
        if reading.writing:
            reading.write(token)


def _likeliest(logits_BV: Tensor, readings: Sequence[_Reading]) -> list[int]:
    return logits_BV.argmax(-1).tolist()


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
