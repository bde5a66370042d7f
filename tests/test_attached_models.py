"""An attached memory with a window, auxiliary losses, other precisions and devices; and wrong input."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import cpu_offload
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, T5Config
from transformers.cache_utils import QuantizedLayer

import memlm
from memlm.attached.cache import state_layer
from memlm.memory.state import leaves
from memlm_kernels.testing import assert_close
from tests.backbones import FAMILIES, VOCAB, backbone
from tests.conftest import build
from tests.test_attached import EXACT, LENGTH, SLIDING, attached, ids, logits, opened, padded, settings, streamed

# In a window, every family whose attention is not all sliding.
CUT = [family for family in FAMILIES if family != "mistral"]
WINDOWS = [(5, 0), (5, 2), (1, 3)]


def quick(values, families=CUT):
    """Each value with each family; by default all with Llama, and one with each of the others."""
    return [
        pytest.param(*x, family, marks=[] if family == "llama" or i % len(values) == n else pytest.mark.slow)
        for n, x in enumerate(values)
        for i, family in enumerate(families)
    ]


MEMORY = {"kind": "gated_delta_net", "head_dim": 8, "num_heads": 2}


@pytest.mark.parametrize(("window", "sinks", "family"), quick(WINDOWS))
def test_a_window_is_the_same_for_any_division_of_a_stream(family, window, sinks):
    model = attached(family, window=window, sinks=sinks)
    whole = logits(model, ids())
    if family != "gemma3_text":
        # Its three layers are all sliding.
        assert (whole - logits(attached(family), ids())).abs().max() > 1e-3
    for cuts in ([1, 3, 5, 1, 13], [1] * LENGTH, [LENGTH]):
        out, cache = streamed(model, ids(), cuts)
        assert_close(f"cut at {cuts}", whole, out, EXACT)
        held = [x.keys.shape[2] for x in cache.layers if type(x).__name__ == "WindowLayer"]
        full = [] if family == "gemma3_text" else [window - 1 + sinks]
        assert {*held} == {*full} and cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("family", CUT)
def test_a_window_that_holds_the_text_changes_nothing(family):
    bare = backbone(family)
    expected = bare(ids()).logits
    assert_close("logits", expected, memlm.attach(bare, MEMORY, window=64, sinks=3)(ids()).logits, EXACT)


@pytest.mark.parametrize(
    ("where", "family"), quick([("left",), ("right",), ("middle",)], [f for f in CUT if f not in SLIDING])
)
def test_a_window_and_its_sinks_do_not_count_padding(family, where):
    model, (text, mask, places) = attached(family, window=5, sinks=2), padded(where)
    whole = logits(model, ids())
    out = logits(model, text, attention_mask=mask, position_ids=places)
    assert_close(where, whole.flatten(0, 1), out[mask.bool()], EXACT)
    pieces, cache = [], None
    for end in (9, 16, 17, text.shape[1]):
        start = 0 if cache is None else cache.get_seq_length()
        with torch.no_grad():
            result = model(
                text[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=places[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
        cache = result.past_key_values
        pieces.append(result.logits)
    assert_close("in pieces", whole.flatten(0, 1), torch.cat(pieces, 1)[mask.bool()], EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_beams_and_packed_rows_in_a_window(family):
    model = attached(family, window=5, sinks=2)
    text, mask = ids(length=12), torch.ones(3, 12, dtype=torch.long)
    if family not in SLIDING:
        mask[1, :3] = 0
    options = dict(attention_mask=mask, num_beams=3, num_return_sequences=2, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(text, **options), model.generate(text, use_cache=False, **options))
    row, places = ids().flatten()[None, :20], torch.cat([torch.arange(9), torch.arange(11)])[None]
    alone = torch.cat([logits(model, row[:, :9]), logits(model, row[:, 9:])], 1)
    assert_close("documents", alone, logits(model, row, position_ids=places), EXACT)


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.numbers = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        self.numbers += sum(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x))
        return out


@pytest.mark.parametrize(
    ("kind", "past"), [("titans_lmm", 48), ("mom", 48), pytest.param("titans_lmm", 100_000, marks=pytest.mark.slow)]
)
def test_a_token_costs_the_same_however_long_the_past(kind, past):
    """The operations of a token, the numbers they make, and the numbers that stay: exact, so no clock is needed."""
    model = attached("llama", kind, window=8, sinks=2)
    text, cache, read, found = ids(1, past + 24), None, 0, []
    with torch.no_grad():
        # In both cases the last chunk of four is full.
        for first in (20, past):
            for part in text[:, read:first].split(500, 1):
                cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            for t in range(first, first + 24):
                with Counter() as counter:
                    model(text[:, t : t + 1], past_key_values=cache)
                keys = [x for layer in cache.layers[:-1] for x in (layer.keys, layer.values)]
                held = sum(x.numel() for x in [*keys, *leaves(state_layer(cache).states)])
                found.append((counter.calls, counter.numbers, held))
            read = first + 24
    # A chunk is written at its end.
    assert [found[i::4] for i in range(4)] == [[found[i]] * 12 for i in range(4)]


@pytest.mark.parametrize("tuples", [False, True])
def test_auxiliary_losses_join_the_loss_of_the_model(tuples):
    model = attached("llama", "mom").train()
    text, labels = ids(), ids()
    labels[0, :10] = -100
    out = model(text)
    alone = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    aux = memlm.auxiliary_loss(out, labels)
    assert aux > 0 and len(out.aux_losses) == 2
    got = model(text, labels=labels, return_dict=not tuples)
    assert_close("loss", alone + aux, got[0] if tuples else got.loss, EXACT)
    # A step of two calls: the parts of its loss sum to the loss of the whole.
    scored = (labels[:, 1:] != -100).sum()
    parts = [model(text[i], labels=labels[i], num_items_in_batch=scored).loss for i in ([0], [1, 2])]
    assert_close("in parts", alone + aux, sum(parts), EXACT)
    with pytest.raises(ValueError, match="aux_losses: the loss leaves out layer0/"):
        F.cross_entropy(model(text).logits.flatten(0, 1), labels.flatten()).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_backbone_has_a_memory_in_fp32(dtype):
    bare = backbone("llama").to(dtype)
    expected = bare(ids()).logits
    model = memlm.attach(bare, settings("titans_lmm"))
    assert {p.dtype for name, p in model.named_parameters() if ".memlm." in name} == {torch.float32}
    assert torch.equal(model(ids()).logits, expected)
    _, cache = streamed(opened(model), ids(), [LENGTH])
    assert {x.dtype for x in leaves(state_layer(cache).states) if x.is_floating_point()} == {torch.float32}
    again = memlm.attach(backbone("llama").to(dtype), settings("titans_lmm"), dtype=dtype)
    assert torch.equal(again(ids()).logits, expected)


def test_an_offloaded_backbone_takes_a_memory():
    model = attached("llama", "titans_lmm")
    expected = logits(model, ids())
    torch.manual_seed(0)
    bare = cpu_offload(backbone("llama", exact=True))
    late = opened(memlm.attach(bare, settings("titans_lmm"), [0, 2])).eval()
    assert_close("offloaded, then attached", expected, logits(late, ids()), EXACT)
    with pytest.raises(ValueError, match=r"the memory was offloaded; .* preload_module_classes=\['Attached'\]"):
        logits(cpu_offload(copy.deepcopy(model)), ids())
    early = cpu_offload(copy.deepcopy(model), preload_module_classes=["Attached"])
    assert_close("attached, then offloaded", expected, logits(early, ids()), EXACT)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_backbone_takes_a_memory():
    bare = torch.ao.quantization.quantize_dynamic(backbone("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    expected = bare(ids()).logits
    model = memlm.attach(bare, settings("titans_lmm"))
    assert torch.equal(model(ids()).logits, expected)
    assert not torch.equal(opened(model)(ids()).logits, expected)


@pytest.mark.parametrize("given", ["all", "new"])
def test_a_memory_is_filled_in_one_call_and_asked_in_the_next(given):
    """``generate`` takes all ids, as transformers' own chats do, or the new ones with a mask over all."""
    model, book, question = attached("llama"), ids(1, 30), ids(1, 5, seed=4)
    whole = torch.cat([book, question], 1)
    options = dict(max_new_tokens=6, do_sample=False)
    expected = model.generate(whole, **options)[:, 35:]
    _, cache = streamed(model, book, [30])
    if given == "all":
        got = model.generate(whole, past_key_values=memlm.fork(cache), **options)[:, 35:]
    else:
        mask = torch.ones(1, 35, dtype=torch.long)
        got = model.generate(question, attention_mask=mask, past_key_values=memlm.fork(cache), **options)[:, 5:]
    assert torch.equal(got, expected) and cache.get_seq_length() == 30
    _, other = streamed(model, ids(1, 30, seed=9), [30])
    assert not torch.equal(streamed(model, question, [5], other)[0], streamed(model, question, [5], cache)[0])


def t5():
    sizes = dict(vocab_size=VOCAB, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    return transformers.T5ForConditionalGeneration(T5Config(**sizes))


def deaf(name):
    """A Llama whose layers, or whose attention, take no further keywords."""
    model = backbone("llama")
    module = model.model.layers[0] if name == "layer" else model.model.layers[0].self_attn

    class DeafAttention(type(module)):
        def forward(self, hidden_states, attention_mask=None):
            return hidden_states

    module.__class__ = DeafAttention
    return model


def flexible():
    model = backbone("llama")
    model.config._attn_implementation = "flex_attention"
    return model


REFUSED = [
    (t5, {}, "T5ForConditionalGeneration is an encoder-decoder"),
    (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, state_size=4)),
        {},
        "MambaModel has no layers with an attention",
    ),
    (lambda: torch.nn.Linear(2, 2), {}, "Linear is no PreTrainedModel"),
    (build, {}, "MemLMForCausalLM has a memory slot of its own in each layer.*memory="),
    (flexible, {"window": 4}, "attn_implementation='flex_attention' cannot cut attention to a window"),
    (lambda: deaf("layer"), {}, "DeafAttention does not hand keywords on"),
    (lambda: deaf("attention"), {}, "DeafAttention does not hand keywords on"),
    (lambda: attached("llama"), {}, "LlamaForCausalLM has a memory already; memlm.detach it first"),
    (None, {"layers": [3]}, "layer 3 of LlamaForCausalLM has no attention; choose from 0 to 2"),
    (None, {"layers": [-1]}, "layer -1 of LlamaForCausalLM has no attention"),
    (None, {"layers": [0, 0]}, r"layers=\[0, 0\] must be different numbers"),
    (None, {"layers": []}, r"layers=\[\] must be different numbers, one at least"),
    (None, {"layers": ["0"]}, "layers='0' must be int"),
    (None, {"memory": "titans_lm"}, "memory.kind='titans_lm'.*did you mean 'titans_lmm'"),
    (None, {"memory": {"kind": "mom", "topk": 2}}, "memory.topk=2 is not a setting; did you mean 'top_k'"),
    (None, {"memory": {"chunk_size": 2}}, "memory.kind is missing"),
    (None, {"memory": None}, "memory=None must be the name of a kind or {kind: ..., settings}"),
    (None, {"memory": ["mom"]}, r"memory=\['mom'\] must be the name of a kind or"),
    (None, {"layers": 2}, r"layers=2 must be numbers, such as \[0, 2\]"),
    (None, {"dtype": "bfloat16"}, "dtype='bfloat16' must be a torch.dtype"),
    (None, {"memory": "attention"}, "memory.kind='attention' is attention alone"),
    (None, {"window": 0}, "window=0 must be at least 1"),
    (None, {"window": 4.5}, "window=4.5 must be int or null"),
    (None, {"sinks": 2}, "sinks=2 are the first tokens beside a window"),
    (None, {"window": 4, "sinks": -1}, "sinks=-1 must not be negative"),
    (None, {"dtype": torch.int8}, "dtype=torch.int8 must be a floating type"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else None)
def test_a_model_that_cannot_have_a_memory_is_refused_and_unchanged(make, options, message):
    model = make() if make else backbone("llama")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message) as raised:
        memlm.attach(model, **{"memory": MEMORY, **options})
    assert "\n" not in str(raised.value)
    assert list(model.state_dict()) == names


def quantised():
    # A real one needs a further package.
    kept = {"_quantize": lambda self, x, axis: x, "_dequantize": lambda self, x: x}
    cache = DynamicCache()
    cache.layers.append(type("Quantised", (QuantizedLayer,), kept)())
    return cache


def bare_cache():
    with torch.no_grad():
        return backbone("llama", exact=True)(ids(), use_cache=True).past_key_values


def continued_without_the_memory():
    cache = streamed(attached("llama"), ids(), [LENGTH])[1]
    streamed(backbone("llama", exact=True), ids(length=2), [2], cache)
    return cache


def other_memory():
    return streamed(attached("llama", "mom"), ids(), [LENGTH])[1]


CALLS = [
    (dict(past_key_values=bare_cache), "past_key_values was filled without the memory"),
    (
        dict(past_key_values=continued_without_the_memory),
        "past_key_values holds 25 tokens, and the memory has read 23 of them",
    ),
    (dict(past_key_values=other_memory), "past_key_values was filled by another memory"),
    (dict(past_key_values=quantised), "past_key_values has a Quantised, which cannot carry a memory"),
    (
        dict(past_key_values=memlm.MemoryCache),
        "past_key_values is a MemoryCache; .* must be a transformers.DynamicCache",
    ),
    (dict(attention_mask=lambda: torch.ones(3, 1, LENGTH, LENGTH)), "attention_mask .* must be .batch, 23."),
    (dict(attention_mask=lambda: torch.ones(3, 5)), r"attention_mask \[3, 5\] must be \[batch, 23\]"),
    (
        dict(position_ids=lambda: torch.arange(LENGTH)[None] % 9, use_cache=lambda: True),
        "position_ids: packed rows cannot fill a cache; give use_cache=False",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), CALLS, ids=lambda x: x if isinstance(x, str) else None)
def test_a_call_that_a_memory_cannot_serve_is_refused(arguments, message):
    model = attached("llama")
    with pytest.raises(ValueError, match=message) as raised:
        model(ids(), **{name: make() for name, make in arguments.items()})
    assert "\n" not in str(raised.value)


def test_calls_of_generate_that_a_memory_cannot_serve_are_refused():
    model, options = attached("llama"), dict(max_new_tokens=3, do_sample=False)
    _, cache = streamed(model, ids(), [LENGTH])
    for message, arguments in (
        ("past_key_values has a StaticLayer", {"cache_implementation": "static"}),
        ("assisted generation is not supported with stateful models", {"prompt_lookup_num_tokens": 2}),
        ("the memory has read 23 tokens, and nothing is left of these", {"past_key_values": memlm.fork(cache)}),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(ids(length=5), **options, **arguments)
    with pytest.raises(ValueError, match="holds a memory of 3 rows, the input has 2"):
        model(ids(2), past_key_values=cache)
    with pytest.raises(ValueError, match="a memory cannot be cropped"):
        cache.crop(-1)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention' cannot cut attention to a window"):
        memlm.attach(memlm.detach(model), MEMORY, window=4)(ids())


def test_a_memory_of_another_backbone_and_damaged_files_are_refused(tmp_path):
    model = memlm.attach(backbone("llama"), MEMORY, [0, 2])
    memlm.save_memory(model, tmp_path)
    other = backbone("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    for wrong in (other, backbone("llama").bfloat16(), backbone("qwen2")):
        with pytest.raises(ValueError, match=r"this memory was trained with .* not .*strict=False"):
            memlm.load_memory(wrong, tmp_path)
        assert not any(".memlm." in name for name in wrong.state_dict())
    memlm.detach(memlm.load_memory(other, tmp_path, strict=False))
    sizes = dict(vocab_size=VOCAB, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=64, **sizes))
    with pytest.raises(ValueError, match=r"memlm.gate is \[32\] there, and \[64\] in the model; they do not fit"):
        memlm.load_memory(wide, tmp_path, strict=False)
    weights = tmp_path / "memlm_memory.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"memlm_memory.safetensors: cannot be read"):
        memlm.load_memory(backbone("llama"), tmp_path)
    (tmp_path / "memlm_memory.json").write_text("{}")
    with pytest.raises(ValueError, match=r"memlm_memory.json: holds no attached memory"):
        memlm.load_memory(backbone("llama"), tmp_path)
    with pytest.raises(ValueError, match=r"no such file; a memory is written by memlm.save_memory"):
        memlm.load_memory(backbone("llama"), tmp_path / "nowhere")
    for function in (memlm.detach, lambda model: memlm.save_memory(model, tmp_path)):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no memory"):
            function(backbone("llama"))


def test_a_saved_memory_finds_its_backbone_and_a_model_without_one_is_loaded_too(tmp_path):
    backbone("llama").save_pretrained(tmp_path / "backbone")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    memlm.save_memory(opened(memlm.attach(model, MEMORY)), tmp_path / "memory")
    assert torch.equal(memlm.from_pretrained(tmp_path / "memory")(ids()).logits, model(ids()).logits)
    plain = memlm.from_pretrained(tmp_path / "backbone")
    assert torch.equal(plain(ids()).logits, backbone("llama")(ids()).logits)
