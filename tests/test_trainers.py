"""Trainers of transformers and TRL, with the memory alone trained, and with losses of its own."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import memlm
from memlm import MemLMConfig, MemLMForCausalLM
from memlm.data.tokenizer import byte_tokenizer
from memlm.loss import weighted
from tests.backbones import SIZES

MIXERS = {
    "titans_lmm": {"kind": "titans_lmm", "chunk_size": 4, "memory_head_dim": 8},
    "mom": {"kind": "mom", "head_dim": 8, "balance_loss": 0.5},
}
WORDS = ["the ", "memory ", "of ", "a ", "model ", "writes ", "reads ", "long "]


def own(kind: str) -> PreTrainedModel:
    """Attention and a memory in turn; the memory alone is trained."""
    mixers = {"attention": {"kind": "attention"}, "memory": MIXERS[kind]}
    model = MemLMForCausalLM(MemLMConfig(mixers=mixers, mixer_pattern=list(mixers), initializer_range=0.1))
    model.requires_grad_(False)
    model.model.layers[1].mixer.requires_grad_(True)
    return model


def attached(kind: str) -> PreTrainedModel:
    config = LlamaConfig(**SIZES | {"vocab_size": len(byte_tokenizer()), "num_hidden_layers": 2, "pad_token_id": 256})
    return memlm.attach(LlamaForCausalLM(config).requires_grad_(False), MIXERS[kind], [1])


# TRL's own default still has transformers' old name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
every_form = pytest.mark.parametrize("make", [own, attached])


def made(make, kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return make(kind)


def text(words: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return "".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator))


def arguments(folder, cls=TrainingArguments, **settings):
    given = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return cls(**given | settings)


@every_form
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(make, tmp_path):
    rows = torch.randint(256, (12, 24), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]

    def run(checkpoint=None):
        model = made(make, "titans_lmm")
        options = arguments(tmp_path, save_strategy="steps", save_steps=2, lr_scheduler_type="cosine")
        trainer = Trainer(model, options, train_dataset=data)
        trainer.train(resume_from_checkpoint=checkpoint)
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        return losses, model.state_dict()

    before, whole = made(make, "titans_lmm"), run()
    resumed = run(str(tmp_path / "checkpoint-2"))
    assert resumed[0] == whole[0] and len(whole[0]) == 4
    assert all(torch.equal(x, whole[1][name]) for name, x in resumed[1].items())
    moved = {name for name, p in before.named_parameters() if not torch.equal(p, whole[1][name])}
    assert moved == {name for name, p in before.named_parameters() if p.requires_grad}


def sft(make, folder, items: list[dict], **settings):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    class SFTTrainer(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    options = arguments(folder, trl.SFTConfig, bf16=False, max_steps=1, **settings)
    model, data = made(make, "mom"), datasets.Dataset.from_list(items)
    return SFTTrainer(copy.deepcopy(model), options, train_dataset=data, processing_class=byte_tokenizer()), model


def trained_and_expected(trainer, model, documents: list[tuple[list[int], int]]) -> tuple[float, float]:
    """The loss of the trainer's step, and that of documents (ids, number of those not scored) read one by one, with
    the memory's own losses of the trainer's batch.
    """
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch.pop("labels")
    scored = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        balance = sum(weighted(model.train()(**batch).aux_losses, labels, scored).values())
        nats = 0.0
        for ids, prompt in documents:
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            nats -= logits[range(len(ids) - 1), ids[1:]][max(prompt - 1, 0) :].sum()
    assert balance > 0.05
    trainer.train()
    old = dict(model.named_parameters())
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, old[name])}
    assert moved and moved <= {name for name, p in old.items() if p.requires_grad}
    return trainer.state.log_history[0]["loss"], float(nats / scored + balance)


@every_form
def test_trl_packs_documents(make, tmp_path):
    tokenizer = byte_tokenizer()
    documents = [text(n, n) for n in (3, 5, 2, 4)]
    options = dict(packing=True, max_length=64, per_device_train_batch_size=4)
    trainer, model = sft(make, tmp_path, [{"text": x} for x in documents], **options)
    assert len(trainer.train_dataset) < len(documents)
    ids = [(tokenizer(x + tokenizer.eos_token).input_ids, 0) for x in documents]
    got, expected = trained_and_expected(trainer, model, ids)
    assert got == pytest.approx(expected, rel=1e-5)


@every_form
def test_trl_scores_completions_alone(make, tmp_path):
    tokenizer = byte_tokenizer()
    pairs = [(text(n, n), text(2, n + 10)) for n in (3, 1)]
    trainer, model = sft(make, tmp_path, [{"prompt": a, "completion": b} for a, b in pairs])
    ids = [(tokenizer(a + b + tokenizer.eos_token).input_ids, len(tokenizer(a).input_ids)) for a, b in pairs]
    got, expected = trained_and_expected(trainer, model, ids)
    assert got == pytest.approx(expected, rel=1e-5)
