"""The decoder: embeddings, layers with one mixer slot each, and the head. It never names a mixer.

B batch, T tokens, D hidden, V vocabulary.
"""

import copy
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from memlm import card, files, side
from memlm.cache import MemoryCache
from memlm.configuration import MemLMConfig
from memlm.generation import MemoryGenerationMixin
from memlm.layer_calls import LayerCalls
from memlm.layers import RMSNorm, SwiGLU
from memlm.loss import bound, weighted
from memlm.memory.base import MixerOutput, build_mixer, checked, initialize
from memlm.memory.rows import Padding, Rows, most_documents
from memlm.memory.state import State
from memlm.memory.stretches import Stretches
from memlm.roles import Roles
from memlm.versions import CACHE


class _Fields:
    """Sets an output's fields as transformers' own method does, which takes twice as long: it lists all of them again
    for each.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not None and name in self.__dataclass_fields__:
            OrderedDict.__setitem__(self, name, value)  # type: ignore[arg-type]
        object.__setattr__(self, name, value)


@dataclass
class MemLMOutput(_Fields, BaseModelOutputWithPast):
    """last_hidden_state: [B, T, D]
    past_key_values: the ``MemoryCache``
    hidden_states: each layer's input, and the output of the final norm
    aux_losses, metrics: under ``layer{i}/{name}``, see ``MixerOutput``; losses [B]
    """

    aux_losses: dict[str, Tensor] | None = None
    metrics: dict[str, Tensor] | None = None


@dataclass
class MemLMCausalLMOutput(_Fields, CausalLMOutputWithPast):
    """loss: the cross-entropy plus all aux_losses
    logits: [B, T, V]; with ``logits_to_keep``, of the kept positions alone
    aux_losses: with labels the scalar parts of the loss; without labels [B], for ``auxiliary_loss``

    The rest is as in ``MemLMOutput``.
    """

    aux_losses: dict[str, Tensor] | None = None
    metrics: dict[str, Tensor] | None = None


class Tap(nn.Linear):
    """The projection of a read of an earlier layer's memory, which a layer adds to its input."""

    starts_silent = ("weight",)

    def __init__(self, size: int) -> None:
        super().__init__(size, size, bias=False)

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)


class MemLMDecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); with ``norm_outputs`` x + norm(mixer(x)), then x + norm(mlp(x)).

    The first layer whose mixer publishes reads returns those that later layers add, one for each in turn.
    """

    def __init__(self, config: MemLMConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.mixers and config.intermediate_size
        name = config.layer_mixers()[layer_idx]
        self.norm_outputs = config.norm_outputs
        if not config.norm_outputs:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = build_mixer(config.mixers[name], config.dims(), layer_idx, f"model.mixers.{name}")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.norm_outputs:
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        tapped = config.tapped()
        self.tap_proj = Tap(config.hidden_size) if layer_idx in tapped else None
        taken = tapped.values() if layer_idx + 1 == min(tapped, default=0) else ()
        self.taken = [self.mixer.publishes.index(name) for name in taken]

    def forward(self, x_BTD: Tensor, state: State, rows: Rows, read_BTD: Tensor | None = None) -> MixerOutput:
        if read_BTD is not None:
            assert self.tap_proj is not None
            x_BTD = x_BTD + self.tap_proj(read_BTD)
        mixed = checked(self.mixer(self.mixer_input(x_BTD), state, rows), self.mixer, x_BTD)
        if mixed.reads:
            # The others end here: compiled and checkpointed code would carry them.
            mixed = mixed._replace(reads=tuple([mixed.reads[i] for i in self.taken]))
        if self.norm_outputs:
            x_BTD = x_BTD + self.post_attention_layernorm(mixed.y_BTD)
            return mixed._replace(y_BTD=x_BTD + self.post_feedforward_layernorm(self.mlp(x_BTD)))
        x_BTD = x_BTD + mixed.y_BTD
        return MixerOutput(x_BTD + self.mlp(self.post_attention_layernorm(x_BTD, for_products=True)), *mixed[1:])

    def mixer_input(self, x_BTD: Tensor) -> Tensor:
        return x_BTD if self.norm_outputs else self.input_layernorm(x_BTD, for_products=True)


class MemLMPreTrainedModel(PreTrainedModel):
    config: MemLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemLMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Recurrent states cannot be cropped, so transformers must refuse assisted decoding.
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _initialize_weights(self, module: nn.Module, *_: Any) -> None:
        # Without the flag for custom code, which skips modules without own parameters, such as mixers.
        super()._initialize_weights(module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        decoder = self.base_model
        decoder.gradient_checkpointing = enable
        decoder.checkpointed_layers = range(0, len(decoder.every_layer), every_n_layers)
        decoder._gradient_checkpointing_func = gradient_checkpointing_func

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, side.Side | Tap):
            module.reset_parameters()
        else:
            initialize(module, self.config.initializer_range)

    def train(self, mode: bool = True) -> Any:
        """As in torch; with a side network, all other parameters are frozen, and the other layers stay in evaluation
        mode.
        """
        super().train(mode)
        if self.config.side is not None:
            self.base_model.layers.eval()
            for name, parameter in self.named_parameters():
                if not side.is_own(name):
                    parameter.requires_grad_(False)
        return self

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs
    ) -> None:
        """transformers' ``save_pretrained``, and a model card (``memlm.card``)."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            files.drop_earlier_weights(Path(save_directory))
            card.write(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Here transformers has put the repository's card, or an empty one, in the place of ours.
        card.write(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(getattr(module, "dims", None), type(self.config.dims())):
                module.dims = self.config.dims()


class MemLMModel(MemLMPreTrainedModel):
    """The decoder without its head.

    side: a network beside the layers, which are then frozen (``memlm.side``); None: there is none
    checkpointed_layers: numbers of the layers that gradient checkpointing is for, among ``every_layer``
    stretches: sequence parallelism (``memlm.memory.stretches``): the inputs are this process's stretch of the rows.
        Set on all its processes. None: the inputs are whole rows
    """

    stretches: Stretches | None = None

    def __init__(self, config: MemLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MemLMDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.side = None if config.side is None else side.build(config, MemLMDecoderLayer)
        self.gradient_checkpointing, self.checkpointed_layers = False, range(len(self.every_layer))
        self.post_init()

    @property
    def every_layer(self) -> list[MemLMDecoderLayer]:
        """All layers with a state, in the order of a memory's states: those of a side network come last."""
        return [*self.layers, *(() if self.side is None else self.side.layers)]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        max_documents: int | None = None,
        roles: Roles | None = None,
        write: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_metrics: bool = True,
        cache: MemoryCache | None = None,
        token_type_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
    ) -> MemLMOutput | tuple:
        """Run [B, T] tokens through the decoder.

        attention_mask: [B, T] or [B, past + T], 0 for padding, which may be anywhere and has no effect
        position_ids: [B, T], only for packed rows: positions in documents; a 0 starts a document, which is independent
            of all tokens before it. The first of a row continues the memory, or is 0
        max_documents: the most documents in a row; counted on the device if not given
        roles: for memories of documents: the role of each token, and a bank to ask (``memlm.roles``); None: all are
            responses
        write: False: read ``past_key_values`` and leave it unchanged
        output_metrics: False: no metrics, which read whole activations
        cache: another name of past_key_values, which transformers uses since 5.24
        token_type_ids, cache_position, and from packing collators cu_seq_lens_q, cu_seq_lens_k, max_length_q,
            max_length_k, seq_idx: accepted for compatibility and not used; position_ids suffice
        return_dict: False for a tuple; None, and output_hidden_states=None, for the configuration's

        Raises ValueError if inputs contradict each other or the memory.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        (batch, length, _), dtype = x_BTD.shape, x_BTD.dtype
        if torch.compiler.is_exporting() and not isinstance(length, int):
            self._check_any_length()
        memory = past_key_values if cache is None else cache
        if self.stretches is not None:
            if memory is not None or use_cache or roles is not None:
                raise ValueError("sequence parallelism: leave past_key_values, use_cache and roles out")
            use_cache = False
        if memory is not None and not isinstance(memory, MemoryCache):
            raise ValueError(f"past_key_values must be a memlm.MemoryCache, not {type(memory).__name__}")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if memory is None and use_cache:
            memory = MemoryCache()
        if memory is not None:
            memory.check(self, dtype, batch)
        if (cu_seq_lens_q is not None or seq_idx is not None) and position_ids is None:
            raise ValueError(
                "cu_seq_lens_q, seq_idx: give position_ids too, whose 0 starts a document of a packed row"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions=True: no attention maps are kept; read the mixers' metrics instead")

        if roles is not None and roles.bank is not None:
            roles.bank.check(self)
            if position_ids is not None:
                raise ValueError("position_ids: packed rows cannot ask a bank; give one row to each question")
        x_BTD, rows, padding = self._rows(
            x_BTD, attention_mask, position_ids, max_documents, roles, memory, output_metrics, self.stretches
        )
        call = LayerCalls(self, memory, rows, output_hidden_states)
        if self.side is None:
            for i in range(len(self.layers)):
                x_BTD = call.layer(i, x_BTD)
        else:
            x_BTD = self.side(x_BTD, call)
        hidden_states, aux_losses, metrics = call.inputs, call.aux_losses, call.metrics
        x_BTD = self.norm(x_BTD)
        if aux_losses and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            x_BTD, aux_losses = bound(x_BTD, aux_losses)
        hidden_states.append(x_BTD)
        if padding is not None:
            hidden_states = [padding.back(h) for h in hidden_states]
            metrics = {name: padding.back(x) if x.ndim == 2 else x for name, x in metrics.items()}
        if memory is not None and write:
            mask_BT = None if attention_mask is None else attention_mask[:, attention_mask.shape[1] - length :]
            memory.replace(call.states, rows, self, dtype, memory.reading(input_ids, mask_BT))
        return MemLMOutput(
            last_hidden_state=hidden_states[-1],
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            aux_losses=aux_losses,
            metrics=metrics,
            **{CACHE: memory},
        )

    def _check_any_length(self) -> None:
        if self.side is not None:
            raise ValueError("dynamic_shapes: a side network needs a fixed number of tokens; leave it out")
        names = [
            name
            for name, layer in zip(self.config.layer_mixers(), self.layers, strict=True)
            if not layer.mixer.any_length
        ]
        if names:
            kind = self.config.mixers[names[0]]["kind"]
            raise ValueError(
                f"dynamic_shapes: mixer {names[0]!r} of kind {kind!r} loops over chunks or a window, so torch.export "
                "needs a fixed number of tokens; leave their dimension out of dynamic_shapes"
            )

    @staticmethod
    def _rows(
        x_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        max_documents: int | None,
        roles: Roles | None,
        memory: MemoryCache | None,
        metrics: bool,
        stretches: Stretches | None,
    ) -> tuple[Tensor, Rows, Padding | None]:
        """Inputs with each row's real tokens first, their ``Rows``, and the padding (None: none was given)."""
        batch, length, _ = x_BTD.shape
        if position_ids is not None:
            if position_ids.shape not in ((batch, length), (1, length), (length,)):
                shape = list(position_ids.shape)
                raise ValueError(f"position_ids {shape} must be [batch, tokens] = {[batch, length]}")
            position_ids = position_ids.expand(batch, length)
        if roles is not None:
            roles.check(batch, length)
            roles = roles.to(x_BTD.device)
            if roles.counts is not None and attention_mask is not None:
                raise ValueError("roles.counts are of rows without an attention_mask; leave them out")
        padding = None
        if attention_mask is not None:
            widths = {length, length + (memory.get_seq_length() if memory is not None and not memory.fixed else 0)}
            fits = attention_mask.shape[-1] in widths or (memory is not None and memory.fixed)
            if attention_mask.ndim != 2 or not fits:
                allowed = " or ".join(map(str, sorted(widths)))
                raise ValueError(f"attention_mask {list(attention_mask.shape)} must be [batch, {allowed}]")
            padding = Padding.of(attention_mask[:, attention_mask.shape[1] - length :])
            x_BTD = padding.to_end(x_BTD)
            if padding.order_BT is not None:
                position_ids = None if position_ids is None else position_ids.gather(1, padding.order_BT)
                roles = None if roles is None else roles.in_order(padding.order_BT)
        lengths_B = None if padding is None else padding.lengths_B
        before: dict[str, Any] = {"start": 0}
        if memory is not None and memory.states:
            before = {"before_B": memory.position, "start": memory.start}
        elif stretches is not None:
            before = stretches.start(x_BTD, position_ids, lengths_B)
        else:
            before["before_B"] = torch.zeros(batch, dtype=torch.int64, device=x_BTD.device)
        documents = 1
        if position_ids is not None:
            documents = most_documents(position_ids, lengths_B, max_documents, before["before_B"])
            # Positions of padding may be anything.
            position_ids = position_ids.clamp(min=0)
        if roles is not None:
            roles = roles.counted(position_ids, lengths_B)
        facts: dict[str, Any] = {"max_documents": documents, "roles": roles, "metrics": metrics}
        facts["stretches"], facts["room"] = stretches, None if memory is None else memory.max_length
        rows = Rows(length, **before, given_BT=position_ids, lengths_B=lengths_B, **facts)
        if roles is not None and roles.bank is not None and rows.role_counts.within:
            raise ValueError("roles: documents in the input cannot be combined with a bank; add them to the bank")
        return x_BTD, rows, padding


class MemLMForCausalLM(MemLMPreTrainedModel, MemoryGenerationMixin):
    """The decoder with its language-model head.

    >>> model = memlm.MemLMForCausalLM(memlm.MemLMConfig(mixers={"memory": {"kind": "titans_mag"}}))
    >>> loss = model(input_ids, labels=input_ids).loss
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MemLMConfig) -> None:
        super().__init__(config)
        self.model = MemLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def add_side(self, settings: dict[str, Any]) -> None:
        """Give a trained model a side network (``memlm.side``), which begins with its weights, and freeze the rest.

        >>> model.add_side({"form": "longmem", "top_k": 8})

        Raises ValueError if the settings do not fit the model.
        """
        if self.config.side is not None:
            raise ValueError("model.side: the model has a side network already; name the decoder without it")
        config = copy.deepcopy(self.config)
        config.side = side.complete(settings)
        beside = side.build(config, MemLMDecoderLayer)
        for module in reversed([*beside.modules()]):
            self._init_weights(module)
        beside.copy_from(self.model.layers)
        self.model.side = beside.to(self.device, self.dtype)
        self.config.side = config.side
        self.train(self.training)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cache: MemoryCache | None = None,
        **kwargs: Any,
    ) -> MemLMCausalLMOutput | tuple:
        """As ``MemLMModel.forward``, which takes ``kwargs``; with ``labels``, also the loss.

        labels: [B, T]; label t is predicted from position t - 1; -100: not scored
        num_items_in_batch: scored tokens of a step of several calls; all parts of the loss are then this call's share
            of the step's
        logits_to_keep: number of last positions, or their indices, with logits; 0 for all

        The loss is the mean over scored tokens plus the mixers' auxiliary losses, in which a row counts by its scored
        tokens.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = out.last_hidden_state[:, keep] if not isinstance(keep, int) else out.last_hidden_state
        logits = self.lm_head(hidden)
        if labels is not None and self.model.stretches is not None:
            raise ValueError("sequence parallelism: leave labels out; the next stretch holds a part of the targets")
        loss, aux_losses = None, out.aux_losses
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            aux_losses = weighted(aux_losses, labels, num_items_in_batch)
            loss = loss + sum(aux_losses.values())
        return MemLMCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            aux_losses=aux_losses,
            metrics=out.metrics,
            **{CACHE: getattr(out, CACHE)},
        )


__all__ = [
    "MemLMCausalLMOutput",
    "MemLMForCausalLM",
    "MemLMModel",
    "MemLMOutput",
]
