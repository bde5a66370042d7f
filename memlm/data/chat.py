"""What a tokenizer's chat template puts around a question and its answer."""

from typing import NamedTuple, Self

import numpy as np
from transformers import PreTrainedTokenizerFast

from .tokenizer import encoder

_QUESTION, _ANSWER = "<the question>", "<the answer>"


class Chat(NamedTuple):
    """Token ids, in their order in a sample ``[head | documents | question | tail | opening | answer | closing]``.

    head, tail: of the template, as the user's turn begins and ends; opening: how a response begins, before anything
    of it is said; closing: how it ends, the last token of it that of the end of a text.
    """

    head: np.ndarray
    tail: np.ndarray
    opening: np.ndarray
    closing: np.ndarray

    @classmethod
    def none(cls, tokenizer: PreTrainedTokenizerFast) -> Self:
        """Nothing but the end of the text."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, nothing, np.array([tokenizer.eos_token_id]))

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Self:
        """Raises ValueError for a tokenizer without a template, or with one that does not tell the turns."""
        if not tokenizer.chat_template:
            raise ValueError("chat=true, but the tokenizer has no chat template; set chat=false, or data.tokenizer")
        user, assistant = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        asked = tokenizer.apply_chat_template([user], tokenize=False)
        opened = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template([user, assistant], tokenize=False)
        if asked.count(_QUESTION) != 1 or answered.count(_ANSWER) != 1 or not opened.startswith(asked):
            raise ValueError("chat=true, but the tokenizer's chat template changes what is said; set chat=false")
        encode, end = encoder(tokenizer, special=True), tokenizer.eos_token_id
        head, tail = asked.split(_QUESTION)
        closing = encode(answered.split(_ANSWER)[1]).astype(np.int64)
        ends = np.flatnonzero(closing == end)
        closing = closing[: ends[0] + 1] if len(ends) else np.append(closing, end)
        return cls(encode(head), encode(tail), encode(opened.removeprefix(asked)), closing)
