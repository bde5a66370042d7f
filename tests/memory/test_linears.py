"""Tools that wrap, move or replace a module, on every memory: hooks, adapters, offloaded weights, eight bits.

Each of them acts between a module and its parameters. So only the owner's ``forward`` may read a parameter, and an
``nn.Linear`` must be called, as an affine map of its input.
"""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from memlm import MemLMForCausalLM
from memlm.evaluation.ablation import memory_off
from memlm.roles import Roles
from memlm_kernels.testing import assert_close, relative_error
from tests.conftest import build, variants

# Features with their own scales, which a memory of this form reads in a second way.
MORE = [
    pytest.param(("titans_mac", {"polynomial_degree": 2, "memory_head_dim": 8}), id="titans_mac-polynomial_degree=2")
]
pytestmark = pytest.mark.parametrize("variant", variants() + MORE)
EXACT = 1e-10


def model_of(variant, **kwargs) -> MemLMForCausalLM:
    name, settings = variant
    return build(name, **settings, **kwargs)


def inputs(variant) -> dict[str, torch.Tensor]:
    """Tokens, and the roles that a memory of documents needs."""
    ids = torch.randint(259, (1, 40), generator=torch.Generator().manual_seed(0))
    if variant[0] != "msa":
        return {"input_ids": ids, "labels": ids}
    row = torch.tensor([-2] * 2 + [1] * 14 + [2] * 9 + [3] * 4 + [0] * 5 + [-1] * 6)
    return {"input_ids": ids, "labels": ids, "roles": Roles(row[None], (row == 2).long()[None])}


def outputs(model: nn.Module, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and those without the long-term memory, if there is one."""
    logits = model(**given).logits
    if not any(getattr(m, "long_term", False) for m in model.modules()):
        return logits, logits
    with memory_off(model):
        return logits, model(**given).logits


@pytest.mark.kinds
def test_every_linear_is_called_and_is_an_affine_map(variant):
    model, called = model_of(variant).train(), set()

    def check(linear, given, output, name):
        called.add(name)
        assert_close(name, F.linear(given[0], linear.weight, linear.bias), output, 1e-14)

    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        linear.register_forward_hook(lambda *args, name=name: check(*args, name))
    model(**inputs(variant))
    assert called == set(linears)


@pytest.mark.kinds
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # From peft.
def test_adapters_of_all_linears_are_trained_and_can_be_merged(variant):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model, given = get_peft_model(model_of(variant), config).train(), inputs(variant)
    model(**given).loss.backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert adapters and not [name for name, p in adapters.items() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        plain = model(**given).logits
        for p in adapters.values():
            p.normal_(std=0.5)
        adapted, silenced = outputs(model.eval(), given)
        assert (adapted - plain).abs().max() > 1e-2
        merged = outputs(model.merge_and_unload(), given)
        assert_close("merged", adapted, merged[0], EXACT)
        assert_close("merged, memory off", silenced, merged[1], EXACT)


@pytest.mark.kinds
def test_layers_on_a_disk_change_nothing(variant, tmp_path):
    model, given = model_of(variant), inputs(variant)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk", "lm_head": "cpu"}
    again = MemLMForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded", dtype=torch.float64
    )
    assert all(p.is_meta for p in again.model.layers.parameters())
    with torch.no_grad():
        assert_close("logits", model(**given).logits, again(**given).logits, EXACT)


class EightBits(nn.Module):
    """Replaces a Linear, as quantisers do: a module that is no Linear and has no floating-point ``weight``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.levels = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.bias = linear.bias

    @property
    def rounded(self) -> torch.Tensor:
        return self.levels * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.rounded, self.bias)


@pytest.mark.kinds
# From torch's own quantisation, which will move to another package.
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_linears_of_eight_bits_run_and_err_by_their_rounding_alone(variant):
    model, eight, given = model_of(variant), model_of(variant), inputs(variant)
    with torch.no_grad():
        for name in [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]:
            eight.set_submodule(name, EightBits(eight.get_submodule(name)))
            model.get_submodule(name).weight.copy_(eight.get_submodule(name).rounded)
        expected = model(**given).logits
        assert_close("logits", expected, eight(**given).logits, EXACT)
        # torch's quantisation rounds activations too, to seven or eight bits, depending on the machine.
        torchs = torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)
        assert isinstance(torchs.lm_head, torch.ao.nn.quantized.dynamic.Linear)
        assert relative_error(expected, torchs(**given).logits) < 0.5
