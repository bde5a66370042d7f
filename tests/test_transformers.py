"""Every feature of transformers works as with its own models, or is refused in one line."""

import copy
import io
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, TextStreamer, Trainer, TrainingArguments, pipeline

from memlm import MemLMConfig, MemLMForCausalLM, MemoryCache
from memlm.data.tokenizer import byte_tokenizer

GREEDY = dict(max_new_tokens=5, do_sample=False, pad_token_id=256, eos_token_id=None)
MIXERS = {"memory": {"kind": "titans_mag"}, "attention": {"kind": "attention"}}
SEEN, NEW = 11, 9


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MemLMConfig(mixers=MIXERS, mixer_pattern=list(MIXERS), initializer_range=0.3)
    return MemLMForCausalLM(config).double().eval()


def ids(batch=2, length=NEW, seed=0):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


def filled(model, text, mask=None):
    memory = MemoryCache()
    with torch.no_grad():
        model(text, attention_mask=mask, past_key_values=memory)
    return memory


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"repetition_penalty": 1.3}], ids=str
)
def test_a_prompt_that_begins_with_what_was_read_is_read_once(model, options, padded):
    text, new = ids(length=SEEN, seed=1), ids()
    mask = torch.ones(2, SEEN + NEW, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
    whole = torch.cat([text, new], 1)
    expected = model.generate(whole, attention_mask=mask, **GREEDY, **options)
    memory = filled(model, text, mask[:, :SEEN])
    memory.batch_repeat_interleave(options.get("num_beams", 1))
    fork = memory.fork()
    got = model.generate(whole, attention_mask=mask, past_key_values=fork, **GREEDY, **options)
    assert torch.equal(got, expected)
    assert fork.get_seq_length() == SEEN + NEW + 4
    if not options.get("repetition_penalty"):
        given = mask if padded else mask[:, SEEN:]
        after = model.generate(new, attention_mask=given, past_key_values=memory.fork(), **GREEDY, **options)
        assert torch.equal(after, expected[:, SEEN:])


def test_a_prompt_is_recognised_after_save_fork_reorder_and_any_division(model, tmp_path):
    text, new = ids(length=SEEN, seed=1), ids()
    memory = MemoryCache()
    with torch.no_grad():
        for piece in text.split([1, 6, 4], 1):
            model(piece, past_key_values=memory)
        model(new, past_key_values=memory, write=False)
    memory.fork().save(tmp_path)
    memory = MemoryCache.load(tmp_path)
    memory.reorder_cache(torch.tensor([1, 0, 1]))
    text, new = text[[1, 0, 1]], new[[1, 0, 1]]
    ones = torch.ones_like(text)
    assert memory.begins(torch.cat([text, new], 1), torch.ones(3, SEEN + NEW)) and memory.begins(text, ones)
    for wrong in (text.roll(1, 0), text.roll(1, 1), text + 1, text[:, :-1]):
        assert not memory.begins(wrong, torch.ones_like(wrong))
    assert not memory.begins(text, ones.index_fill(1, torch.tensor([2]), 0))
    expected = model.generate(torch.cat([text, new], 1), **GREEDY)
    assert torch.equal(model.generate(torch.cat([text, new], 1), past_key_values=memory, **GREEDY), expected)


def test_a_text_may_be_repeated_and_one_that_was_read_to_its_end_is_refused(model):
    text = ids(length=SEEN)
    memory = filled(model, text)
    with pytest.raises(ValueError, match="inputs: the memory has read all of these 11 tokens"):
        model.generate(text, past_key_values=memory.fork(), **GREEDY)
    twice = torch.cat([text, text], 1)
    assert torch.equal(model.generate(twice, past_key_values=memory.fork(), **GREEDY), model.generate(twice, **GREEDY))


def test_a_conversation_passes_all_ids(model):
    """As in transformers' chats: each prompt contains the text generated before."""
    memory, text = MemoryCache(), ids()
    for turn in range(3):
        expected = model.generate(text, **GREEDY)
        text = model.generate(text, past_key_values=memory, **GREEDY)
        assert torch.equal(text, expected)
        text = torch.cat([text, ids(seed=turn)], 1)


def test_what_was_not_read_as_ids_is_never_recognised(model):
    text, memory = ids(length=SEEN), MemoryCache()
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(text), past_key_values=memory)
        model(text, past_key_values=memory)
    assert memory.read is None and not memory.begins(torch.cat([text, text, text], 1), torch.ones(2, 3 * SEEN))


def test_generate_takes_embeddings(model):
    text, new, embed = ids(length=SEEN, seed=1), ids(), model.get_input_embeddings()
    mask = torch.ones_like(new)
    mask[0, :3] = 0
    for given in ({}, {"attention_mask": mask}):
        expected = model.generate(new, **given, **GREEDY)[:, NEW:]
        assert torch.equal(model.generate(inputs_embeds=embed(new), **given, **GREEDY), expected)
        memory = filled(model, text)
        expected = model.generate(new, past_key_values=memory.fork(), **given, **GREEDY)[:, NEW:]
        got = model.generate(inputs_embeds=embed(new), past_key_values=memory.fork(), **given, **GREEDY)
        assert torch.equal(got, expected)


def test_chunks_that_cannot_be_cut_are_refused(model):
    embeds = model.get_input_embeddings()(ids())
    with pytest.raises(ValueError, match="prefill_chunk_size=4: inputs_embeds, and a query"):
        model.generate(inputs_embeds=embeds, prefill_chunk_size=4, **GREEDY)


def test_generate_stops_at_strings(model):
    tokenizer = byte_tokenizer()
    plain = model.generate(ids(1), **GREEDY | {"max_new_tokens": 12})
    word = next(chr(x) for x in plain[0, NEW + 2 :].tolist() if 31 < x < 127)
    got = model.generate(ids(1), stop_strings=word, tokenizer=tokenizer, **GREEDY | {"max_new_tokens": 12})
    first = next(i for i, x in enumerate(plain[0].tolist()) if i >= NEW and chr(x) == word)
    assert torch.equal(got, plain[:, : first + 1])


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_memory_has_either_name(model, name):
    """transformers' own models have the second since 5.24."""
    text, new, memory = ids(length=SEEN, seed=1), ids(), MemoryCache()
    model.model(text, **{name: memory})
    expected = model(new, past_key_values=memory.fork())
    assert torch.equal(model(new, **{name: memory.fork()}).logits, expected.logits)
    assert expected.past_key_values.get_seq_length() == SEEN + NEW
    expected = model.generate(new, past_key_values=memory.fork(), **GREEDY)
    assert torch.equal(model.generate(new, **{name: memory.fork()}, **GREEDY), expected)


def test_prefill_in_chunks_changes_nothing(model):
    mask = torch.ones(2, NEW, dtype=torch.long)
    mask[1, :5] = 0
    for given in ({}, {"attention_mask": mask}):
        expected = model.generate(ids(), **given, **GREEDY)
        for size in (1, 4, 100):
            assert torch.equal(model.generate(ids(), prefill_chunk_size=size, **given, **GREEDY), expected)


def test_tokenizers_and_old_callers_may_pass_what_is_not_used(model):
    zeros, places = torch.zeros_like(ids()), torch.arange(NEW)
    expected = model(ids()).logits
    assert torch.equal(model(ids(), token_type_ids=zeros, cache_position=places).logits, expected)
    expected = model.generate(ids(), **GREEDY)
    assert torch.equal(model.generate(ids(), token_type_ids=zeros, position_ids=places[None], **GREEDY), expected)
    with pytest.raises(ValueError, match="position_ids: generate continues one document"):
        model.generate(ids(), position_ids=places[None] % 4, **GREEDY)


OUTPUTS = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True)


@pytest.mark.parametrize(
    "options",
    [
        OUTPUTS,
        OUTPUTS | {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[3]], "min_new_tokens": 2},
        {"guidance_scale": 1.5},
        {"max_time": 9.0, "renormalize_logits": True},
    ],
    ids=str,
)
def test_options_of_generate_are_as_without_a_memory(model, options):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        # Guidance keeps its own cache.
        model.generation_config.use_cache = use_cache
        out = model.generate(ids(), **GREEDY | options)
        found.append(out if isinstance(out, torch.Tensor) else out.sequences)
    model.generation_config.use_cache = True
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True: no attention maps"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful models"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "trust_remote_code"),
    ],
    ids=str,
)
def test_what_a_memory_cannot_do_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(ids(1), **GREEDY | options)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(ids(1), assistant_model=model, **GREEDY)
    with pytest.raises(ValueError, match="continuous batching pages keys and values"):
        model.generate_batch(ids().tolist())


def test_pipelines_and_streamers(model, capsys):
    generator = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    both = generator(["ab", "abcdef"], max_new_tokens=3, do_sample=False, batch_size=2)
    alone = generator("ab", max_new_tokens=3, do_sample=False)
    assert both[0] == alone
    model.generate(ids(1), streamer=TextStreamer(byte_tokenizer()), **GREEDY)
    assert capsys.readouterr().out


def test_models_outputs_and_memories_are_copied_and_pickled(model):
    text = ids()
    out = model(text, labels=text)
    assert torch.equal(pickle.loads(pickle.dumps(model))(text).logits, out.logits)
    file = io.BytesIO()
    torch.save(out.to_tuple()[1], file)
    # The lines of the README read without torch.no_grad().
    memory = copy.deepcopy(out.past_key_values)
    assert torch.equal(
        model(text, past_key_values=memory).logits, model(text, past_key_values=out.past_key_values).logits
    )


def test_embeddings_are_resized_and_weights_sharded(model, tmp_path):
    grown = copy.deepcopy(model).float()
    grown.resize_token_embeddings(300)
    assert grown(ids()).logits.shape[-1] == grown.config.vocab_size == 300
    grown.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids()).logits, grown(ids()).logits)
    assert again.get_input_embeddings().weight.shape == again.get_output_embeddings().weight.shape == (300, 64)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_either_kind_changes_nothing(model, reentrant):
    plain = copy.deepcopy(model).train()
    kept = copy.deepcopy(plain)
    kwargs = {"use_reentrant": reentrant}
    if hasattr(kept, "activation_checkpointing_enable"):
        kept.activation_checkpointing_enable(kwargs)
    else:
        kept.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    for m in (plain, kept):
        memory = MemoryCache()
        for piece in ids(length=20).split(10, 1):
            # The gradient flows back through the memory.
            loss = m(piece, labels=piece, past_key_values=memory).loss
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), kept.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12), name
    if hasattr(kept, "activation_checkpointing_enable"):
        kept.activation_checkpointing_enable(every_n_layers=2)
        assert [*kept.model.checkpointed_layers] == [0, *range(2, len(kept.model.layers), 2)]


def test_trainer_evaluates_and_predicts(model, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in ids(5)]
    for settings in ({}, {"label_smoothing_factor": 0.1}):
        options = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        trainer = Trainer(copy.deepcopy(model).float(), options, eval_dataset=rows)
        predicted = trainer.predict(rows)
        assert predicted.predictions.shape == (5, NEW, 259) and predicted.label_ids.shape == (5, NEW)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(predicted.metrics["test_loss"])


def test_a_batch_of_no_rows(model):
    out = model(ids(0), labels=ids(0))
    assert out.logits.shape == (0, NEW, 259) and len(model(ids(0), attention_mask=ids(0)).logits) == 0


def test_no_call_waits_for_the_device_to_recognise_a_prompt(model):
    """The hash uses only tensor operations, so it runs on tensors without data."""
    with torch.device("meta"):
        memory = MemoryCache()
        assert memory.reading(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5)).shape == (2,)
