"""transformers' ``generate`` with a memory. B rows, T tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin

from memlm.cache import MemoryCache
from memlm.roles import QUERY, RESPONSE, Roles
from memlm.versions import CACHE, CACHES


class MemoryGenerationMixin(GenerationMixin):
    """Generation that continues a ``MemoryCache``."""

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """transformers' ``generate``; with a filled ``past_key_values``, ``inputs`` continue the memory.

        >>> output_ids = model.generate(question_ids, past_key_values=memory.fork(), max_new_tokens=20)

        inputs: [B, T]. If they begin with all ids that the memory has read, they are the whole text, as transformers'
            chats pass it, and only the rest is read. To repeat that text after itself, pass it twice
        inputs_embeds: always continue the memory
        attention_mask: of the inputs, or of the memory and the inputs
        memory_bank: a bank; the inputs are a query to it, unless ``doc_ids`` [B, T] gives other roles

        Returns the inputs and the generated tokens.
        Raises ValueError if the memory has already read all inputs.
        """
        kwargs = {CACHE if name in CACHES else name: x for name, x in kwargs.items()}
        memory, embeds = kwargs.get(CACHE), kwargs.get("inputs_embeds")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        given = ids if embeds is None else embeds
        if given is None or given.ndim < 2:
            return super().generate(inputs, generation_config, **kwargs)
        batch, length = given.shape[:2]
        seen = memory.get_seq_length() if isinstance(memory, MemoryCache) else 0
        chunk = kwargs.get("prefill_chunk_size") or (generation_config or self.generation_config).prefill_chunk_size
        if chunk and (embeds is not None or kwargs.get("memory_bank") is not None):
            raise ValueError(
                f"prefill_chunk_size={chunk}: inputs_embeds, and a query to a memory_bank, are read as a whole; "
                "leave it out"
            )
        if kwargs.get("memory_bank") is not None and kwargs.get("doc_ids") is None:
            kwargs["doc_ids"] = torch.full((batch, length), QUERY, device=given.device)
        mask = kwargs.get("attention_mask")
        ones = torch.ones(batch, length, dtype=torch.int64, device=given.device)
        _check_positions(kwargs.pop("position_ids", None), ones if mask is None else mask)
        if seen:
            mask = ones if mask is None else mask
            whole = embeds is None and mask.shape == ids.shape and memory.begins(ids, mask)
            if whole and length == seen:
                raise ValueError(
                    f"inputs: the memory has read all of these {seen} tokens and keeps no logits; "
                    "pass tokens that follow, or read all but the last before"
                )
            if not whole and mask.shape[1] == length:
                # transformers finds the number of old tokens from the width of the mask.
                mask = torch.cat([mask.new_ones(batch, seen), mask], 1)
            kwargs["attention_mask"] = mask
            if kwargs.get("doc_ids") is not None and not whole:
                kwargs["doc_ids"] = F.pad(kwargs["doc_ids"], (seen, 0), value=RESPONSE)
        return super().generate(inputs, generation_config, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, mode: Any, batch_size: int, max_length: int, *args: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r}: a memory is 'dynamic', or 'static' to keep its addresses"
            )
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            # Set before the first call, because prefill_chunk_size looks for it.
            most = max(max_length, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs[CACHE] = MemoryCache(True, most) if kind == "static" else MemoryCache()
            generation_config.cache_implementation = None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_length, *args)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """transformers makes masks of attention for a compiled step; here a mask is of padding alone."""
        return attention_mask

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        chunk, memory = generation_config.prefill_chunk_size, model_kwargs.get(CACHE)
        if chunk is None or memory is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        # The chunks of transformers 5.17 begin at the first token, even if it was read before.
        seen, mask = memory.get_seq_length(), model_kwargs.pop("attention_mask")
        # transformers 5.24 replaces a mask of ones by its width.
        width = generation_config._mask_length if mask is None else mask.shape[1]
        for piece in input_ids[:, seen - width :].split(chunk, dim=1):
            seen += piece.shape[1]
            until = None if mask is None else mask[:, :seen]
            inputs = self.prepare_inputs_for_generation(piece, attention_mask=until, **model_kwargs)
            out = self(**inputs, return_dict=True)
        model_kwargs["attention_mask"] = mask
        return out

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        doc_ids: Tensor | None = None,
        memory_bank: Any = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if inputs_embeds is not None and is_first_iteration:
            # transformers treats them as the whole text; here they continue the memory.
            next_sequence_length = None
        for name in ("tokenizer", "assistant_tokenizer"):
            # Arguments of stop_strings, which transformers passes on to the model.
            kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        inputs.setdefault("output_metrics", False)
        # A memory has its own positions; here position_ids would mean packing.
        inputs.pop("position_ids", None)
        read = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        memory = inputs.get(CACHE)
        new, generated = read.shape[1], next_sequence_length == 1 and not is_first_iteration
        if attention_mask is not None and (
            generated or bool(attention_mask[:, attention_mask.shape[1] - new :].all())
        ):
            # Without a mask the faster paths are open. A generated token is never padding.
            inputs.pop("attention_mask")
        past = 0 if memory is None or doc_ids is None else memory.get_seq_length()
        if doc_ids is not None and past < doc_ids.shape[1]:
            # Generated tokens are a response.
            doc_ids = F.pad(doc_ids, (0, max(0, past + new - doc_ids.shape[1])), value=RESPONSE)
            # The bank is asked once; after that, the memory holds the chosen documents.
            inputs["roles"] = Roles(doc_ids[:, past : past + new], bank=memory_bank)
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("continuous batching pages keys and values, and a memory is a state: call generate instead")


def _check_positions(position_ids: Tensor | None, mask_BT: Tensor) -> None:
    """Raise ValueError unless the positions of each row's real tokens are consecutive."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return
    width = position_ids.shape[-1]
    real_BT = mask_BT[:, mask_BT.shape[1] - width :].to(position_ids.device).bool()
    step_BT = position_ids.expand(len(mask_BT), -1).diff(dim=1)
    if bool(((step_BT != 1) & real_BT[:, 1:] & real_BT[:, :-1]).any()):
        raise ValueError("position_ids: generate continues one document in each row; leave them out")
