"""The texts around names, documents, questions and answers. Training samples, banks and ``memlm.Interleave`` use them.

The transcript of a question, with the roles of ``doc_ids`` below; capitals mark the model's output::

    head | question | tail, response | NAME NAME END_OF_NAMES | passage passage end_of_passages | NAME END_OF_NAMES
    -2     0          -2, -1           -1                       0                                  -1
    | passage end_of_passages | END_OF_RETRIEVAL | restated | ANSWER <eos>
      0                         -1                 -1         -1
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Self

from transformers import PreTrainedTokenizerFast

from memlm.roles import QUERY, RESPONSE, TEMPLATE

from .tokenizer import Piece, piece_encoder

# Fields that a template may have, and whether it must.
_PLACES = {
    "document": {"name": False, "text": True},
    "question": {"question": True},
    "name": {"name": True},
    "passage": {"name": False, "text": True},
    "restated": {"question": False},
    "answer": {"answer": True},
}
CONTROLS = ("end_of_names", "end_of_retrieval")
_QUESTION, _ANSWER = "<the question>", "<the answer>"


@dataclass(frozen=True)
class Templates:
    """The texts of the released MSA-4B, which adds no token to Qwen3's vocabulary.

    document: a document in the bank, with {name} and {text}
    head, question ({question}), tail, response: the question to the model
    name ({name}), end_of_names: the model's request for one or more documents
    passage ({name}, {text}) for each, end_of_passages: the documents that are then given
    end_of_retrieval: the model's signal that it has read enough; restated ({question}): the text that is then given
    answer ({answer}): the answer; an end-of-text token follows

    Raises ValueError if a text lacks a required field or has an unknown one.
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
    answer: str = "The answer to the question is: {answer}"

    def __post_init__(self) -> None:
        for key in (f.name for f in fields(self) if f.type is str):
            text, places = getattr(self, key), _PLACES.get(key, {})
            if not isinstance(text, str):
                raise ValueError(f"{key}={text!r} must be a text")
            for place, needed in places.items():
                if needed and text.count(f"{{{place}}}") == 0:
                    raise ValueError(f"{key}={text!r} must hold {{{place}}}")
            for other in re.findall(r"\{(\w*)\}", text):
                if other not in places:
                    raise ValueError(f"{key}={text!r} holds {{{other}}}, which it is not given; take it out")
        if self.name.endswith("{name}"):
            raise ValueError(f"name={self.name!r} must hold something after {{name}}, which ends it")
        one, other = (getattr(self, key) for key in CONTROLS)
        if not one or not other or one in other or other in one:
            raise ValueError(
                f"end_of_names={one!r} and end_of_retrieval={other!r} must be texts, and neither may contain the other"
            )

    @classmethod
    def plain(cls) -> Self:
        """Documents as they are, the question on its own line, and the answer directly after it."""
        return cls(document="{text}", head="", question="\n{question}\n", tail="", response="", answer="{answer}")

    @classmethod
    def chat(cls, tokenizer: PreTrainedTokenizerFast) -> Self:
        """The same inside the tokenizer's chat template: documents and question in the user's turn.

        Raises ValueError if the tokenizer has no template, or one that does not separate the turns.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                "templates='chat', but the tokenizer has no chat template; set templates=plain, or data.tokenizer"
            )
        user, assistant = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        asked = tokenizer.apply_chat_template([user], tokenize=False)
        opened = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template([user, assistant], tokenize=False)
        if asked.count(_QUESTION) != 1 or answered.count(_ANSWER) != 1 or not opened.startswith(asked):
            raise ValueError(
                "templates='chat', but the tokenizer's chat template changes what is said; set templates=plain"
            )
        head, tail = asked.split(_QUESTION)
        # The end of the turn, up to the token that ends a text.
        closing = answered.split(_ANSWER)[1].split(tokenizer.eos_token)[0]
        return cls(
            document="{text}",
            head=head,
            question="\n{question}\n",
            tail=tail,
            response=opened.removeprefix(asked),
            answer=f"{{answer}}{closing}",
        )

    @property
    def named(self) -> bool:
        """Whether documents show their names, so that a model can ask for them."""
        return "{name}" in self.document

    def pieces(self, key: str, **given: str) -> list[Piece]:
        """A template with its fields filled in. The given texts are inserted literally: braces and names of special
        tokens in them are plain text.
        """
        parts = re.split(r"\{(\w+)\}", getattr(self, key))
        return [Piece(given[part], False) if i % 2 else Piece(part, True) for i, part in enumerate(parts)]

    def named_in(self, written: str) -> list[str]:
        """The names in a request that a model has written, each once."""
        before, behind = map(re.escape, self.name.split("{name}", 1))
        text = written.split(self.end_of_names)[0]
        return list(dict.fromkeys(re.findall(f"{before}(.+?){behind}", text, re.DOTALL)))

    def check_name(self, name: str) -> None:
        """Raise ValueError if a name cannot be told from the text around it."""
        written = self.name.replace("{name}", name)
        if self.named_in(written + self.end_of_names) != [name] or any(getattr(self, key) in name for key in CONTROLS):
            raise ValueError(
                f"documents: {name!r} cannot be a name, because it would not be read as one between the texts of "
                f"name={self.name!r} and {CONTROLS[0]}={self.end_of_names!r}; name it otherwise"
            )

    def answer_in(self, written: str) -> str:
        """The answer within a model's output, or all of the output if it has no marked answer."""
        before, behind = self.answer.split("{answer}", 1)
        text = written.rpartition(before.rstrip())[2] if before.strip() else written
        return text.strip().removesuffix(behind.strip()).rstrip()


class Writer:
    """Token ids of templates."""

    def __init__(self, templates: Templates, tokenizer: PreTrainedTokenizerFast) -> None:
        self.templates, self._encode = templates, piece_encoder(tokenizer)
        self._end: int = tokenizer.eos_token_id

    def __call__(self, key: str, **given: str) -> list[int]:
        return self._encode(self.templates.pieces(key, **given))

    def asked(self, question: str) -> Iterator[tuple[list[int], int]]:
        """A question with the texts around it: token ids and role of each part. Raises ValueError if it is empty."""
        parts = (("head", TEMPLATE), ("question", QUERY), ("tail", TEMPLATE), ("response", RESPONSE))
        for key, role in parts:
            ids = self(key, question=question)
            if role == QUERY and not ids:
                raise ValueError(f"questions: {question!r} has no tokens; ask something")
            yield ids, role

    def names(self, names: Iterable[str]) -> list[int]:
        """The request for these documents."""
        pieces = [piece for name in names for piece in self.templates.pieces("name", name=name)]
        return self._encode(pieces + self.templates.pieces("end_of_names"))

    def passages(self, texts: Mapping[str, str]) -> list[int]:
        """The passages that are given of documents, by name."""
        passages = (self.templates.pieces("passage", name=name, text=text) for name, text in texts.items())
        pieces = [piece for passage in passages for piece in passage]
        return self._encode(pieces + self.templates.pieces("end_of_passages"))

    def told_enough(self, question: str, said: bool) -> list[int]:
        """The text before an answer; said: whether the model itself wrote ``end_of_retrieval``."""
        pieces = [] if said else self.templates.pieces("end_of_retrieval")
        return self._encode(pieces + self.templates.pieces("restated", question=question))

    def answer(self, answer: str) -> list[int]:
        return [*self("answer", answer=answer), self._end]
