"""PEFT: LoRA on the backbone, and the whole memory trained and saved beside it."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

import memlm
from memlm import MemLMConfig, MemLMForCausalLM
from tests.backbones import VOCAB, backbone

# From peft itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def beside(kind: str) -> MemLMForCausalLM:
    """Layers of attention and of a memory in turn: the second layer's mixer is the memory."""
    mixers = {"attention": {"kind": "attention"}, "memory": {"kind": kind}}
    return MemLMForCausalLM(MemLMConfig(mixers=mixers, mixer_pattern=list(mixers), initializer_range=0.3))


def inside() -> MemLMForCausalLM:
    """Attention and memory in each layer's mixer."""
    mixers = {"memory": {"kind": "titans_mag"}}
    return MemLMForCausalLM(MemLMConfig(mixers=mixers, mixer_pattern=["memory"], initializer_range=0.3))


def attached(family: str, kind: str) -> PreTrainedModel:
    return memlm.attach(backbone(family).double(), {"kind": kind}, [0, 2])


LORA = {"r": 2, "lora_alpha": 64, "task_type": "CAUSAL_LM"}
BESIDE = {
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": r".*layers\.1\..*",
    "modules_to_save": ["layers.1.mixer"],
}
INSIDE = {"target_modules": r".*\.attention\.[qv]_proj", "modules_to_save": ["mixer.memory", "mixer.gate"]}
ATTACHED = {"exclude_modules": r".*\.memlm\..*", "modules_to_save": ["memlm"]}
# How a model is made, its adapters, and the part of a name by which its memory is known.
CASES = {
    "titans_lmm": (lambda: beside("titans_lmm"), BESIDE, (".1.mixer.",)),
    "mom": (lambda: beside("mom"), BESIDE, (".1.mixer.",)),
    "titans_mag": (inside, INSIDE, (".mixer.memory.", ".mixer.gate.")),
    "attached-titans_lmm": (
        lambda: attached("llama", "titans_lmm"),
        ATTACHED | {"target_modules": ["q_proj", "v_proj"]},
        (".memlm.",),
    ),
    "attached-mom": (
        lambda: attached("gpt2", "mom"),
        ATTACHED | {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        (".memlm.",),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make, adapters, parts = CASES[request.param]
    torch.manual_seed(0)
    return make().double().eval(), LoraConfig(**LORA, **adapters), parts


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (2, 21), generator=torch.Generator().manual_seed(seed))


def trained(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Two steps: a closed gate and LoRA's zeros leave the rest without a gradient in the first."""
    adapted = get_peft_model(copy.deepcopy(model), config).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.3)
    for seed in range(2):
        optimizer.zero_grad()
        adapted(input_ids=ids(seed), labels=ids(seed)).loss.backward()
        optimizer.step()
    return adapted.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids(7)).logits


def greedy(model, text: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy decoding that reads the whole text for each token."""
    for _ in range(steps):
        with torch.no_grad():
            best = model(input_ids=text, use_cache=False).logits[:, -1].argmax(-1)
        text = torch.cat([text, best[:, None]], 1)
    return text


def test_adapters_are_trained_with_the_whole_memory(case):
    model, config, parts = case
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    assert torch.equal(logits(adapted), logits(model))
    adapted = trained(model, config)
    memory = {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    own = {name.removeprefix("base_model.model."): p for name, p in adapted.named_parameters() if p.requires_grad}
    whole = {name.replace(".modules_to_save.default", "") for name in own if ".lora_" not in name}
    assert memory and whole == memory
    assert not [name for name in own if ".lora_" in name and any(part in name for part in parts)]
    assert not [name for name, p in own.items() if p.grad is None or not p.grad.any()]
    assert not [name for name, p in adapted.named_parameters() if not p.requires_grad and p.grad is not None]
    kept = dict(model.named_parameters())
    for name, p in adapted.get_base_model().named_parameters():
        name = name.replace(".base_layer", "").replace(".original_module", "")
        assert p.requires_grad or torch.equal(p, kept[name]), name


def test_adapters_and_memory_are_saved_loaded_and_merged(case, tmp_path):
    model, config, _ = case
    adapted = trained(model, config)
    expected = logits(adapted)
    assert (expected - logits(model)).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(logits(again), expected)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(again.generate(input_ids=ids(3), **options), greedy(again, ids(3), 6))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(model))
    merged = again.merge_and_unload()
    assert type(merged) is type(model)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert torch.allclose(logits(merged), expected, rtol=0, atol=1e-10)
    merged.save_pretrained(tmp_path / "merged")
    loaded = dict(memlm.from_pretrained(tmp_path / "merged", dtype=torch.float64).named_parameters())
    assert all(torch.equal(p, loaded[name]) for name, p in merged.named_parameters())
