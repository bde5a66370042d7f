"""A reader: any causal language model reads streams of any length into its memory, and answers from copies of it.

B streams, T tokens, S tokens whose logits are kept, V vocabulary.
"""

import copy
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedModel

from memlm.attached.cache import fork, own, state_layer
from memlm.bank import MemoryBank
from memlm.cache import MemoryCache
from memlm.data.row import IGNORE_INDEX
from memlm.editing import Editor
from memlm.hub.causal import new_memory, of_model
from memlm.memory.state import leaves
from memlm.modeling import MemLMPreTrainedModel
from memlm.roles import QUERY, RESPONSE, Roles
from memlm.settings import require
from memlm.versions import CACHE

# Tokens of a trial, and of its first call.
_TRIED, _FIRST = 24, 9
# Models that were tried, and the result.
_continue: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


class Reader:
    """Streams of equal length that a model reads into one memory.

    >>> reader = Reader(model)
    >>> reader(book_ids)
    >>> logits = reader.fork()(question_ids, keep=1)

    model: any causal language model of transformers or of memlm, in evaluation mode; segment: tokens of a forward
    cache: its memory; tokens: those that each stream has read
    with_metrics: whether ``metrics`` holds those of the last forward's mixers

    Raises ValueError if the model's memory cannot be carried on and copied.
    """

    def __init__(self, model: PreTrainedModel, segment: int = 2048, with_metrics: bool = False) -> None:
        self.model, self.segment = model, segment
        self._behind = segment if continues(model) else 1
        self.cache, self.tokens = new_memory(model), 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._editor: Editor | None = None
        self.bank: MemoryBank | None = None
        # Places of the question that is put to the bank.
        self._question = range(0)
        # Bytes of the weights that differ from the given model's.
        self._learnt = 0
        self.metrics: dict[str, Tensor] = {}
        self._options = of_model(model, output_metrics=with_metrics)
        self._keeps, self._word = "logits_to_keep" in _words(model), _cache_word(model)

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor, keep: int = 1) -> Tensor:
        """Read on. Returns the logits [B, S, V] of the last ``keep`` tokens, all if there are fewer."""
        found, left = [], ids_BT.shape[1]
        while left:
            piece_BT = ids_BT[:, ids_BT.shape[1] - left :][:, : self._next()]
            left -= piece_BT.shape[1]
            wanted = min(piece_BT.shape[1], keep - left)
            logits_BSV = self._read(piece_BT, max(wanted, 1))
            if wanted > 0:
                found.append(logits_BSV[:, -wanted:])
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _next(self) -> int:
        """The most tokens of the next forward."""
        return self._behind if self.tokens else self.segment

    def _read(self, ids_BT: Tensor, keep: int, **words: Any) -> Tensor:
        """The logits of at least the last ``keep`` tokens of a forward; words: further ones of the model."""
        kept = {"logits_to_keep": keep} if self._keeps else {}
        if self.bank is not None:
            places = range(self.tokens, self.tokens + ids_BT.shape[1])
            roles_T = [QUERY if place in self._question else RESPONSE for place in places]
            words["roles"] = Roles(ids_BT.new_tensor(roles_T).expand_as(ids_BT), bank=self.bank)
        out = self.model(ids_BT, use_cache=True, **{self._word: self.cache}, **kept, **self._options, **words)
        self.tokens += ids_BT.shape[1]
        self.metrics = getattr(out, "metrics", None) or {}
        return out.logits

    def learn(self, ids_BT: Tensor, rate: float) -> None:
        """One step of AdamW on the loss of the tokens after the first, read with an empty memory.

        The first call copies the model: later reading uses the copy, and the given model keeps its weights.
        """
        if self._optimizer is None:
            self.model = copy.deepcopy(self.model)
            weights = [p.requires_grad_() for p in self.model.parameters() if p.is_floating_point()]
            self._optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.0)
            self._learnt = sum(p.nbytes for p in weights)
        with torch.enable_grad():
            logits_BTV = self.model(ids_BT[:, :-1], use_cache=False, **self._options).logits
            cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten()).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def edit(self, ids_NT: Tensor, answer: int, rate: float) -> None:
        """Write facts into the weights at once, in closed form; see ``memlm.editing.Editor``.

        answer: tokens at the end of each fact that are its answer

        The first call copies the model: later reading uses the copy, and the given model keeps its weights.
        """
        if self._editor is None:
            self.model = copy.deepcopy(self.model)
            self._editor = Editor(self.model, rate=rate)
            self._learnt = sum(module.weight.nbytes for module in self._editor.modules.values())
        labels_NT = ids_NT.clone()
        labels_NT[:, : ids_NT.shape[1] - answer] = IGNORE_INDEX
        self._editor(ids_NT, labels_NT)

    def file(self, documents: Mapping[str, Tensor]) -> None:
        """Put documents [T] into a bank, by name; a known name's is replaced. Questions of copies are put to the bank.

        Raises ValueError if the model supports no bank.
        """
        if self.bank is None:
            self.bank = MemoryBank(self.model)
        known = {name: ids for name, ids in documents.items() if name in self.bank}
        self.bank.update(known)
        self.bank.add({name: ids for name, ids in documents.items() if name not in known})

    def fork(self, rows: Tensor | None = None, question_BT: Tensor | None = None) -> Self:
        """A copy with the streams of the given indices, which may repeat; its reading leaves this one unchanged.

        question_BT: the question that each stream of the copy answers, for readers that choose what they recall
        """
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.cache = fork(self.cache)
        if question_BT is not None:
            other._question = range(self.tokens, self.tokens + question_BT.shape[1])
        if rows is not None and self.tokens:
            # Recurrent layers of transformers have no ``batch_select_indices``.
            other.cache.reorder_cache(rows)
        return other

    def nbytes(self) -> int:
        """Bytes of all that the streams left: the memory, the bank and changed weights."""
        bank = {} if self.bank is None else self.bank.stats()
        return nbytes(self.cache) + self._learnt + sum(bank[name] for name in bank if name.endswith("_bytes"))


def bytes_after(model: PreTrainedModel, tokens: int) -> int | None:
    """Bytes of the memory of one stream after so many tokens; None if its cache cannot be carried on."""
    try:
        reader = Reader(model)
    except ValueError:
        return None
    # Hooks of an evaluation judge the logits of its questions, and this text asks none.
    hooks, model._forward_hooks = model._forward_hooks, OrderedDict()
    try:
        reader(torch.zeros(1, tokens, dtype=torch.long, device=model.device))
    finally:
        model._forward_hooks = hooks
    return reader.nbytes()


def nbytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds for later tokens."""
    if isinstance(cache, MemoryCache):
        return cache.nbytes()
    held = state_layer(cache)
    tensors = [] if held is None else list(leaves(held.states))
    for layer in own(cache).layers:
        # Recurrent layers hold dicts of tensors.
        held_by = (x.values() if isinstance(x, dict) else [x] for x in vars(layer).values())
        tensors += [x for values in held_by for x in values if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def _words(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _cache_word(model: PreTrainedModel) -> str:
    """The keyword of ``model.forward`` that takes a memory."""
    return "cache_params" if "cache_params" in _words(model) else CACHE


def continues(model: PreTrainedModel) -> bool:
    """Whether several tokens may follow others in one call; some recurrent models of transformers then begin anew, and
    must read on token by token.

    A model of transformers is tried with a short text. Raises ValueError if its memory cannot be carried on and
    copied.
    """
    new_memory(model)
    if isinstance(model, MemLMPreTrainedModel):
        return True
    if model not in _continue:
        exact = [_is_exact(model, step) for step in (_TRIED, 1)]
        fault = "predicts another text when its cache is carried on or copied, so its memory cannot be measured"
        require(any(exact), f"{type(model).__name__} {fault}")
        _continue[model] = exact[0]
    return _continue[model]


@torch.no_grad()
def _is_exact(model: PreTrainedModel, step: int) -> bool:
    """Whether a text that is read on in calls of ``step`` tokens is predicted as in one call, while copies of the
    memory read another text.
    """
    rows, draws = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    ids_2T = torch.randint(rows, (2, _TRIED), generator=draws)
    text_1T, other_1T = ids_2T.to(model.device).split(1)
    whole_TV = model(text_1T, use_cache=False).logits[0].double()
    cache, word, found = new_memory(model), _cache_word(model), []
    for piece_1T in (text_1T[:, :_FIRST], *text_1T[:, _FIRST:].split(step, 1)):
        found.append(model(piece_1T, use_cache=True, **{word: cache}).logits[0].double())
        model(other_1T[:, :step], use_cache=True, **{word: fork(cache)})
    errors_T = torch.linalg.vector_norm(torch.cat(found) - whole_TV, dim=-1)
    sizes_T = torch.linalg.vector_norm(whole_TV, dim=-1)
    # Rounding changes the experts of single tokens. Logits that are not finite are reported where they are used.
    return not bool((errors_T / sizes_T)[_FIRST:].median() > max(1e-3, 6 * torch.finfo(model.dtype).eps))
