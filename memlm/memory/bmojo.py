"""B'MOJO (arXiv:2407.06324): a window, a memory that fades behind it, and the most surprising tokens kept exactly.

    f            the output of a linear recurrence at each token
    in context   keys and values of the last W tokens, i - W < j <= i
    fading       keys and values of f, made by the same projections, of i - 2 W < j <= i - W
    eidetic      keys and values of M tokens before the window, which surprised most (``memlm.memory.eidetic``)
    y            one softmax over all three

Fading tokens are as in the paper's release, B'MOJO-F, which has no eidetic tokens. ``innovation`` selects the number
that measures surprise:

- "delta_residual": the size of the recurrence's own correction, beta |v - k M|, summed over heads. It has no
  parameters (HOLA, arXiv:2607.02303). The rule must be a delta rule.
- "predictor": the squared error of a prediction of f from the last four f, for each channel; a loss of its own trains
  the predictor and reaches nothing else.
- "none": no eidetic tokens.

``gate: tanh`` accepts a trained backbone: ``train.init_from`` of the kind ``attention`` with the same window and
projections. Each head's output is window + tanh(g) (y - window), with g = 0 at first, so it starts as the backbone.
With full attention only documents within the window keep their outputs, because the state has a fixed size; beside
such a backbone, ``memlm.attach`` keeps them all.

B batch, T tokens, L keys, D hidden, H heads in G groups, K head dim, W window_size, M slots.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memlm.layers import ShortConv, rotary
from memlm.memory import attention, eidetic, recurrence, rules
from memlm.memory.base import Dims, MixerOutput
from memlm.memory.kv import join
from memlm.memory.parts import ReadEntries
from memlm.memory.rows import Rows
from memlm.memory.state import State
from memlm.settings import require
from memlm_kernels.grid import keep_last
from memlm_kernels.segments import exact

INNOVATIONS = ("delta_residual", "predictor", "none")
GATES = ("none", "tanh")
# Tokens of the predictor.
_TAPS = 4


@dataclass(frozen=True)
class Config(recurrence.Config, attention.Projections):
    """rule: the recurrence, one of ``rules.RULES``.
    window_size: tokens that are seen as they are; as many before them are seen through the recurrence.
    eidetic_slots: tokens that are kept exactly, at least 1.
    innovation: the number by which they are chosen: "delta_residual", "predictor" or "none".
    chunk_size: the slots change once in so many tokens, at most window_size; also of the titans rule.
    attention_conv_size: width of the convolution with SiLU on the attention's q, k, v; 0 for none.
    predictor_weight: weight of the predictor's loss in each layer.
    gate: "none", or "tanh": the window alone at first, for a trained backbone.

    The rest is as in ``recurrence.Config`` and ``attention.Projections``.
    """

    rule: str = "gated_delta_net"
    window_size: int = 64
    eidetic_slots: int = 64
    innovation: str = "delta_residual"
    attention_conv_size: int = 0
    predictor_weight: float = 0.01
    gate: str = "none"
    qk_norm: bool | str = True

    def __post_init__(self) -> None:
        recurrence.Config.__post_init__(self)
        attention.Projections.__post_init__(self)
        for name, known in (("rule", tuple(rules.RULES)), ("innovation", INNOVATIONS), ("gate", GATES)):
            value = getattr(self, name)
            require(value in known, f"{name}={value!r} must be one of {', '.join(known)}")
        for name in ("window_size", "eidetic_slots"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(
            self.attention_conv_size >= 0, f"attention_conv_size={self.attention_conv_size} must be 0 (none) or more"
        )
        require(self.predictor_weight > 0, f"predictor_weight={self.predictor_weight} must be positive")
        eidetic.check_slots(self.slots, self.chunk_size, self.window_size, "eidetic_slots")
        delta = issubclass(rules.RULES[self.rule], rules.Delta)
        require(
            delta or self.innovation != "delta_residual",
            f"innovation='delta_residual' needs a delta rule, not rule={self.rule!r}; use 'predictor'",
        )
        require(
            self.initialization == "default" or self.attention_conv_size > 0,
            f"initialization={self.initialization!r} delays keys by a convolution; set attention_conv_size, to 4 say",
        )

    @property
    def slots(self) -> int:
        return 0 if self.innovation == "none" else self.eidetic_slots

    def attention(self) -> attention.Config:
        return attention.Config(self.window_size, self.attention_conv_size, **self.projections())


class Fading(recurrence.Layer):
    """The memory that fades."""

    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        self.rule = config.rule
        super().__init__(config, dims, layer_idx)
        if isinstance(self.recurrence.rule, rules.Delta):
            self.recurrence.rule.with_residual = config.innovation == "delta_residual"


class Predictor(nn.Module):
    """The squared error of f_t from a prediction, sum_j A_j f_{t - j} with j from 1 to 4 and a diagonal A_j."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ShortConv(channels, _TAPS)

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return {"last": torch.zeros(batch_size, _TAPS, self.conv.channels, device=device, dtype=dtype)}

    def forward(self, f_BTD: Tensor, state: State, rows: Rows) -> tuple[Tensor, State]:
        """The error, [B, T], with a gradient for the predictor alone; f of another document counts as zero."""
        f_BTD = exact(f_BTD.detach())
        past_BLD = join(state["last"], f_BTD)
        back_S = torch.arange(_TAPS - 1, 0, -1, device=f_BTD.device)
        places_BL = torch.cat([rows.positions_BT[:, :1] - back_S, rows.positions_BT], 1)
        # The f before each token; the token before a document's first is of another document.
        late_BLD = past_BLD[:, :-1].masked_fill((places_BL == 0)[..., None], 0.0)
        before_BSD, late_BTD = late_BLD.tensor_split([_TAPS - 1], 1)
        predicted_BTD, _ = self.conv.over_rows(late_BTD, before_BSD, rows.history_BT, None)
        last = keep_last(past_BLD, _TAPS, rows.length, rows.lengths_B)
        return (f_BTD - predicted_BTD).square().mean(-1), {"last": last.to(state["last"].dtype)}


class Mixer(eidetic.EideticAttention):
    def __init__(self, config: Config, dims: Dims, layer_idx: int) -> None:
        super().__init__(config.attention(), config.slots, config.chunk_size, dims, layer_idx)
        self.settings = config
        self.memory = Fading(config, dims, layer_idx)
        self.faded = ReadEntries()
        if config.innovation == "predictor":
            self.predictor = Predictor(dims.hidden_size)
        if config.gate == "tanh":
            self.gate = nn.Parameter(torch.empty(dims.num_attention_heads))
            own = [name for name, _ in self.named_parameters() if name.startswith(("memory.", "predictor."))]
            self.starts_silent = ("gate", *own)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.settings.gate == "tanh":
            init.zeros_(self.gate)
        if self.settings.initialization == "recall":
            self.start_for_recall()

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        state = super().init_state(batch_size, device, dtype)
        shape = (batch_size, 2 * self.window_size - 1, *state["k"].shape[2:])
        state["fading"] = {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}
        if self.settings.innovation == "predictor":
            # Sums of many numbers choose the slots.
            state["predictor"] = self.predictor.init_state(
                batch_size, device, torch.promote_types(dtype, torch.float32)
            )
        return state | {"memory": self.memory.init_state(batch_size, device, dtype)}

    def forward(self, x_BTD: Tensor, state: State, rows: Rows, score_BT: Tensor | None = None) -> MixerOutput:
        if rows.length == 0:
            return MixerOutput(x_BTD, state, {}, {})
        recalled, aux_losses, predictor = self.memory(x_BTD, state["memory"], rows), {}, {}
        metrics = dict(recalled.metrics)
        if self.settings.innovation == "delta_residual":
            score_BT = metrics.pop("residual").sum(-1)
        elif self.settings.innovation == "predictor":
            score_BT, predictor["predictor"] = self.predictor(recalled.y_BTD, state["predictor"], rows)
            if self.training:
                aux_losses["predictor"] = self.settings.predictor_weight * _mean(score_BT, rows)
        if rows.metrics:
            metrics["fading_share"] = torch.zeros_like(rows.positions_BT, dtype=torch.float32)
            if score_BT is not None:
                metrics["surprise"] = score_BT.detach()
        turned_BTHK, streams, after = self.streams(x_BTD, state, rows, score_BT)
        after |= {"memory": recalled.state, **predictor}
        after["fading"] = self._fade(recalled.y_BTD, turned_BTHK, streams, state["fading"], rows)
        gate_H = torch.tanh(exact(self.gate)) if self.settings.gate == "tanh" else None
        y_BTD, shares = self.joined(streams, rows, gate_H)
        return MixerOutput(y_BTD, after, aux_losses, metrics | shares)

    def _fade(self, f_BTD: Tensor, q_BTHK: Tensor, streams: eidetic.Streams, state: State, rows: Rows) -> State:
        """Adds the stream of the memory's keys, and returns them."""
        window, joined, after = self.window_size, {}, {}
        projected = [F.silu(x) if self.config.conv_size else x for x in (self.k_proj(f_BTD), self.v_proj(f_BTD))]
        k_BTGK = self._heads(projected[0], self.k_norm if self.config.qk_norm else None)
        turned = {"k": rotary(k_BTGK, self.angles(rows, k_BTGK.dtype)), "v": self._heads(projected[1])}
        for name, x in turned.items():
            entries = join(state[name], x)
            after[name] = keep_last(entries, 2 * window - 1, rows.length, rows.lengths_B)
            joined[name] = entries[:, :-window]
        if rows.start is not None and rows.goes_on and rows.start + rows.length <= window:
            # No token has faded.
            return after
        o_BTHK, lse_BTH = eidetic.within(rows, q_BTHK, joined["k"], joined["v"], window, late=window)
        some_BT = self.faded(rows.once(("faded", window), lambda: rows.positions_BT >= window))
        streams["fading"] = o_BTHK, lse_BTH.masked_fill(~some_BT[..., None], float("-inf"))
        return after


def _mean(x_BT: Tensor, rows: Rows) -> Tensor:
    """[B]: the mean over a row's real tokens."""
    if rows.real_BT is None:
        return x_BT.mean(1)
    return (x_BT * rows.real_BT).sum(1) / rows.real_BT.sum(1).clamp(min=1)
