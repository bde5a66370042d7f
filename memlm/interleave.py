"""Memory Interleave (arXiv:2603.23516): a model reads documents in rounds before it answers.

In each round the model asks a bank and names the documents that it wants to read; then their text is added to the
question. A question's transcript (``memlm.data.templates``) goes through one memory, each token once, and equals one
call with the same tokens and roles. Question and passages (role 0) choose documents together: the documents that the
question chose compete with those that a passage chooses, for top_k places. The released code reads the whole
transcript again in each round, and only the last passage chooses.

B rows, T tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from memlm.bank import MemoryBank
from memlm.cache import MemoryCache
from memlm.data.templates import CONTROLS, Templates, Writer
from memlm.roles import QUERY, RESPONSE, Roles
from memlm.settings import require


class Answer(NamedTuple):
    """text: the answer within the last output, or all of that output
    read: names of the documents given, round by round
    unknown: requested names that the bank does not have
    finished: whether the model ended its answer; otherwise ``max_new_tokens`` did
    input_ids, doc_ids: the transcript, as inputs of one call
    """

    text: str
    read: list[list[str]]
    unknown: list[str]
    finished: bool
    input_ids: list[int]
    doc_ids: list[int]


@dataclass(frozen=True)
class Interleave(Templates):
    """Questions answered by reading in a bank, with the texts of ``Templates``.

    >>> way = memlm.Interleave(max_rounds=4)
    >>> bank = memlm.MemoryBank.build(model, way.documents(texts, tokenizer))
    >>> way.answers(["Who wrote it?"], bank, texts, tokenizer)[0].text

    max_rounds: the most rounds of reading
    max_new_tokens: the most tokens that the model writes, over all rounds

    Reading ends after ``max_rounds``, or if a round names no document of the bank that is new. ``end_of_retrieval``,
    as if the model had written it, and ``restated`` are then added, and the model answers. The model may also answer
    at once; its end-of-text token always ends the transcript. Names of special tokens in documents, names and
    questions are plain text.
    """

    max_rounds: int = 8
    max_new_tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_rounds >= 0, f"max_rounds={self.max_rounds} must not be negative")
        require(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1")

    def documents(
        self, texts: Mapping[str, str], tokenizer: PreTrainedTokenizerFast
    ) -> Iterator[tuple[str, list[int]]]:
        """Names and token ids for a bank. Raises ValueError for a name that a model could not write."""
        write = Writer(self, tokenizer)
        for name, text in texts.items():
            self.check_name(name)
            yield name, write("document", name=name, text=text)

    @torch.no_grad()
    def answers(
        self,
        questions: Sequence[str],
        bank: MemoryBank,
        texts: Mapping[str, str],
        tokenizer: PreTrainedTokenizerFast,
    ) -> list[Answer]:
        """Greedy answers to questions, which are processed as one batch.

        bank: a bank of ``documents``; texts: the texts of its documents by name

        Raises ValueError if ``texts`` lacks a document of the bank that the model asks for.
        """
        transcripts = [_Transcript(self, question, tokenizer) for question in questions]
        memory, going = MemoryCache(), transcripts
        while going:
            while any(transcript.writing for transcript in going):
                _write(bank, memory, going)
            for transcript in going:
                transcript.go_on(bank, texts)
            kept = [i for i, transcript in enumerate(going) if transcript.writing]
            if 0 < len(kept) < len(going):
                memory.batch_select_indices(torch.tensor(kept))
            going = [going[i] for i in kept]
        return [transcript.answered() for transcript in transcripts]


@dataclass
class _Transcript:
    """A question in progress.

    ids, roles: the whole transcript; fed: how many of its tokens the memory has read; turn: the model's output since
        the last text was given
    """

    config: Interleave
    question: str
    tokenizer: PreTrainedTokenizerFast
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
        self.left, self._say = self.config.max_new_tokens, Writer(self.config, self.tokenizer)
        for ids, role in self._say.asked(self.question):
            self._give(ids, role)

    def _give(self, ids: list[int], role: int) -> None:
        self.ids += ids
        self.roles += [role] * len(ids)

    def take(self) -> tuple[list[int], list[int]]:
        """The ids and roles that the memory has not read yet."""
        first, self.fed = self.fed, len(self.ids)
        return self.ids[first:], self.roles[first:]

    def write(self, token: int) -> None:
        self.ids.append(token)
        self.roles.append(RESPONSE)
        self.turn.append(token)
        self.left -= 1
        self.finished = token == self.tokenizer.eos_token_id
        self.writing = not self.finished and self.left > 0 and self._ended() is None

    def _ended(self) -> str | None:
        """The control string that ends the turn, if any."""
        if self.answering:
            return None
        # A token has at least one byte.
        longest = max(len(getattr(self.config, key).encode()) for key in CONTROLS)
        text = self._said(self.turn[-longest:])
        return next((key for key in CONTROLS if getattr(self.config, key) in text), None)

    def go_on(self, bank: MemoryBank, texts: Mapping[str, str]) -> None:
        """Add the documents that the turn asks for."""
        ended = self._ended()
        if self.finished or self.left == 0 or ended is None:
            return
        names = self.config.named_in(self._said(self.turn)) if ended == "end_of_names" else []
        self.unknown += [name for name in names if name not in bank]
        given = {name for of_round in self.read for name in of_round}
        names = [name for name in names if name in bank and name not in given]
        self.writing, self.turn = True, []
        if names and len(self.read) < self.config.max_rounds:
            for name in names:
                require(name in texts, f"texts: {name!r} is in the bank, and has no text; give it")
            self.read.append(names)
            return self._give(self._say.passages({name: texts[name] for name in names}), QUERY)
        self.answering = True
        self._give(self._say.told_enough(self.question, said=ended == "end_of_retrieval"), RESPONSE)

    def _said(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def answered(self) -> Answer:
        text = self.config.answer_in(self._said(self.turn[: len(self.turn) - self.finished]))
        return Answer(text, self.read, self.unknown, self.finished, self.ids, self.roles)


def _write(bank: MemoryBank, memory: MemoryCache, transcripts: Sequence[_Transcript]) -> None:
    """Generate one token for each unfinished transcript."""
    fed = [transcript.take() if transcript.writing else ([], []) for transcript in transcripts]
    width, device = max(len(ids) for ids, _ in fed), bank.model.device
    # Aligned to the right, so that the last token is the last of every row.
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
        roles=None if width == 1 and said == {RESPONSE} else Roles(roles_BT, bank=bank if QUERY in said else None),
        past_key_values=memory,
        use_cache=True,
        logits_to_keep=1,
    )
    for transcript, token in zip(transcripts, _likeliest(out.logits[:, -1], transcripts), strict=True):
        if transcript.writing:
            transcript.write(token)


def _likeliest(logits_BV: Tensor, transcripts: Sequence[_Transcript]) -> list[int]:
    return logits_BV.argmax(-1).tolist()
