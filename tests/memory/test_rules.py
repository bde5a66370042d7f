"""The later delta rules, from gates to reads, against their papers' recurrences, one token at a time."""

import pytest
import torch
import torch.nn.functional as F

from memlm.memory.rules import RULES, Config
from memlm_kernels.testing import assert_close

HEADS, KEYS, VALUES = 2, 6, 5
VARIANTS = [("kda", {"num_heads": 2, "head_dim": 32, "value_dim": 24, "initial_decay": None})]


def rule_of(name):
    torch.manual_seed(0)
    rule = RULES[name](Config(HEADS, KEYS, VALUES, initial_decay=None)).double()
    with torch.no_grad():
        for p in rule.parameters():
            p.copy_(torch.randn_like(p))
    return rule


def tokens(rule, length=40):
    q, k, v = (torch.randn(2, length, HEADS, n, dtype=torch.float64) for n in (KEYS, KEYS, VALUES))
    logits = torch.randn(2, length, rule.logits, dtype=torch.float64)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, logits


def kept(rule, logits):
    """The share that a token leaves of a memory, [B, T, H] or [B, T, H, K]."""
    if rule.decay.of_head == 1:
        return torch.exp(-rule.decay.A_log.exp() * F.softplus(logits + rule.decay.dt_bias))
    steps = F.softplus(logits @ rule.spread.weight.T + rule.decay.dt_bias).unflatten(-1, (HEADS, KEYS))
    return torch.exp(-rule.decay.A_log.exp()[:, None] * steps)


def token_by_token(name, rule, q, k, v, logits):
    beta, more = logits[..., :HEADS].sigmoid(), logits[..., HEADS:]
    M, S, reads = torch.zeros(3, 2, HEADS, KEYS, VALUES, dtype=torch.float64)[0], 0.0, []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = q[:, t, :, None], k[:, t, :, :, None], v[:, t, :, None]

        def held(M, k_t=k_t):
            return k_t.mT @ M

        if name == "momentum_delta_net":
            gates = (logits[:, t] + rule.bias).sigmoid().view(2, 3, HEADS, 1, 1).unbind(1)
            lr, momentum, a = gates[0], gates[1], 1 - gates[2]
            S = momentum * S - lr * k_t @ (a * held(M) - v_t)
            M = a * M + S
        else:
            rate, a = beta[:, t, :, None, None], kept(rule, more[:, t : t + 1])[:, 0].reshape(2, HEADS, -1, 1)
            if name == "comba":
                M = a * M + rate * k_t @ (v_t - rule.feedback.sigmoid()[:, None, None] * held(M))
                q_t = q_t - rule.correction[:, None, None] * k_t.mT
            else:
                M = a * M
                M = M + rate * k_t @ (v_t - held(M))
        reads.append((q_t @ M)[:, :, 0])
    return torch.stack(reads, 1), M


@pytest.mark.parametrize("name", ["gated_delta_net", "kda", "comba", "momentum_delta_net"])
def test_a_rule_is_its_papers_recurrence(name):
    rule = rule_of(name)
    given = tokens(rule)
    start = {key: x[:, None] for key, x in rule.init_state(2, torch.device("cpu"), torch.float64).items()}
    o, after, metrics = rule(*given, None, start, True, None)
    expected, memory = token_by_token(name, rule, *given)
    assert_close("o", expected, o, 1e-11)
    got = after["memory"][:, 0]
    assert_close("memory", memory, got[:, 0] if name == "momentum_delta_net" else got, 1e-11)
    assert metrics["decay"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["comba", "momentum_delta_net"])
def test_a_token_that_forgets_everything(name, dtype):
    """Both rules divide values by the share that is left, which has a floor: e^-8."""
    rule = rule_of(name)
    q, k, v, logits = tokens(rule)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    logits = torch.where(torch.arange(40)[:, None] == 20, 1e4, logits.float()).requires_grad_()
    expected, _ = token_by_token(name, rule, *(x.double() for x in (q, k, v, logits)))
    start = {key: x[:, None] for key, x in rule.init_state(2, torch.device("cpu"), dtype).items()}
    o, _, _ = rule.float()(q, k, v, logits, None, start, False, None)
    o.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, logits, *rule.parameters()))
    assert_close("o", expected, o, 5e-4 if dtype == torch.float32 else 2e-3)
