"""The loss of a step does not depend on how its rows are divided into calls, under any trainer."""

import copy

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import memlm
from memlm.roles import Roles
from memlm.training.objective import Objective
from tests.conftest import build

ROWS, LENGTH, STEPS = 4, 40, 2
# One memory without its own losses, and each kind that has some.
KINDS = [
    ("titans_mag", {}),
    ("mom", {"balance_loss": 0.7, "z_loss": 0.5, "balance_bias": True}),
    ("msa", {"loss_weight": 0.7, "chunk_size": 4, "top_k": 1}),
    ("chunk_sparse", {"learning": "distilled", "loss_weight": 0.7, "chunk_size": 4, "window_size": 8, "top_k": 2}),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])


def rows() -> dict[str, torch.Tensor]:
    """Padded rows of different lengths; most have two documents, one to be found, then a query and an answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(259, (STEPS * ROWS, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(24, LENGTH + 1, (STEPS * ROWS, 1), generator=generator)
    doc_ids = torch.tensor([1] * 8 + [2] * 8 + [0] * 4 + [-1] * (LENGTH - 20)).repeat(STEPS * ROWS, 1)
    doc_ids[::3] = -1
    labels = ids.masked_fill(~mask | (torch.rand(ids.shape, generator=generator) < 0.3), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, "doc_ids": doc_ids}


def batch_of(kind: str, first: int, end: int) -> dict[str, torch.Tensor]:
    batch = {name: x[first:end] for name, x in rows().items() if kind == "msa" or name != "doc_ids"}
    doc_ids = batch.pop("doc_ids", None)
    return batch if doc_ids is None else batch | {"roles": Roles(doc_ids, doc_ids == 2)}


def trained(kind: tuple[str, dict], size: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of the steps and the weights after them, with ``size`` rows per call, counted as in transformers."""
    model, losses = build(kind[0], **kind[1]).train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        scored = (batch_of(kind[0], step * ROWS, (step + 1) * ROWS)["labels"][:, 1:] != -100).sum()
        losses.append(0.0)
        for first in range(step * ROWS, (step + 1) * ROWS, size):
            out = model(**batch_of(kind[0], first, first + size), num_items_in_batch=scored)
            assert size < ROWS or bool(out.aux_losses) == (kind[0] != "titans_mag")
            out.loss.backward()
            losses[-1] += out.loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def assert_same_training(expected, got, tolerance) -> None:
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    for name, weight in expected[1].items():
        assert torch.allclose(got[1][name], weight, rtol=0, atol=tolerance), name


@kinds
def test_a_step_is_the_same_in_calls_of_any_size(kind):
    whole = trained(kind, ROWS)
    for size in (2, 1):
        assert_same_training(whole, trained(kind, size), 1e-6)


@kinds
def test_loss_is_the_cross_entropy_plus_what_is_reported(kind):
    model, batch = build(*kind[:1], **kind[1]).train(), batch_of(kind[0], 0, 4)
    plain = model(**{name: x for name, x in batch.items() if name != "labels"})
    assert all(x.shape == (4,) for x in plain.aux_losses.values())
    scored = (batch["labels"][:, 1:] != -100).sum(1)
    for items in (None, 1000):
        out = model(**batch, num_items_in_batch=items)
        weights = scored / (items or scored.sum())
        for name, x in out.aux_losses.items():
            assert x.item() == pytest.approx((plain.aux_losses[name] * weights).sum().item(), rel=1e-6)
        logits, labels = out.logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten()
        nats = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / (items or scored.sum())
        assert out.loss.item() == pytest.approx((nats + sum(out.aux_losses.values())).item(), rel=1e-6)
        alone = torch.as_tensor(memlm.auxiliary_loss(plain, batch["labels"], items))
        assert alone.item() == pytest.approx(sum(x.item() for x in out.aux_losses.values()), rel=1e-12)


@kinds
def test_objective_is_the_mean_over_calls_of_as_many_rows(kind):
    """So the loss of train.py does not depend on gradient accumulation or on the number of processes."""
    objective = Objective(build(kind[0], **kind[1]).train())

    def loss(first, size):
        part = batch_of(kind[0], first, first + size)
        del part["attention_mask"]
        return objective(**part, position_ids=None, max_documents=1)[0]

    for size in (2, 1):
        parts = [loss(first, size) for first in range(0, ROWS, size)]
        assert (sum(parts) / len(parts)).item() == pytest.approx(loss(0, ROWS).item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: kind[0])
def test_a_loss_that_leaves_out_the_auxiliary_losses_is_refused(kind):
    model, batch = build(kind[0], **kind[1]).train(), batch_of(kind[0], 0, 2)
    labels = batch.pop("labels")
    out = model(**batch)
    with pytest.raises(ValueError, match=r"aux_losses: the loss leaves out layer0/\w+, .*Trainer.compute_loss"):
        out.logits.sum().backward()
    out = model(**batch)
    (out.logits.sum() + memlm.auxiliary_loss(out, labels)).backward()
    with torch.no_grad():
        assert model(**batch).logits.shape
    model.eval()
    model(**batch).logits.sum().backward()


class Plain(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def arguments(folder, size, cls=TrainingArguments, **settings):
    return cls(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=ROWS // size,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
        **settings,
    )


def logged(trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach() for name, p in trainer.model.named_parameters()}


def own_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch
    return nats + memlm.auxiliary_loss(outputs, labels, num_items_in_batch)


def examples() -> Plain:
    columns = rows()
    return Plain([{name: columns[name][i] for name in ("input_ids", "labels")} for i in range(STEPS * ROWS)])


def in_trainer(folder, model, size, **settings):
    return logged(Trainer(copy.deepcopy(model), arguments(folder, size), train_dataset=examples(), **settings))


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda *_: None)


def test_trainer_trains_the_same_in_calls_of_any_size(tmp_path):
    model = build("chunk_sparse", torch.float32, **KINDS[3][1])
    whole = in_trainer(tmp_path, model, ROWS)
    assert_same_training(whole, in_trainer(tmp_path, model, 1), 1e-5)
    assert_same_training(whole, in_trainer(tmp_path, model, 2, compute_loss_func=own_loss), 1e-5)


def test_collators_that_pack_rows_train_the_same(tmp_path):
    """Rows laid behind each other, with transformers' names for their starts."""
    model, each = build("chunk_sparse", **KINDS[3][1]).train(), examples().items[:3]
    pack = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = pack([{name: x.tolist() for name, x in example.items()} for example in each])
    scored = (batch["labels"][:, 1:] != -100).sum()
    alone = [model(**{k: x[None] for k, x in e.items()}, num_items_in_batch=scored) for e in each]
    packed = model(**batch, num_items_in_batch=scored)
    nats = [out.loss - sum(out.aux_losses.values()) for out in (*alone, packed)]
    assert nats[3].item() == pytest.approx(sum(nats[:3]).item(), rel=1e-6)
    with pytest.raises(ValueError, match="cu_seq_lens_q, seq_idx: give position_ids too"):
        model(**{name: x for name, x in batch.items() if name != "position_ids"})


def test_label_smoothing_that_would_lose_the_auxiliary_losses_is_refused(tmp_path):
    model = build("chunk_sparse", torch.float32, **KINDS[3][1])
    smooth = arguments(tmp_path, ROWS, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="aux_losses: the loss leaves out"):
        Trainer(model, smooth, train_dataset=examples()).train()
    Trainer(build(dtype=torch.float32), smooth, train_dataset=examples()).train()


# Its own default still has transformers' old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_trl_trains_as_trainer_does_or_is_refused(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from memlm.data.tokenizer import byte_tokenizer

    model = build("chunk_sparse", torch.float32, **KINDS[3][1])
    whole = in_trainer(tmp_path, model, ROWS)
    data = datasets.Dataset.from_list(
        [{name: x.tolist() for name, x in example.items()} for example in examples().items]
    )

    class SFTTrainer(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    def sft(cls, size):
        settings = arguments(tmp_path, size, trl.SFTConfig, max_length=None, bf16=False)
        return cls(copy.deepcopy(model), settings, train_dataset=data, processing_class=byte_tokenizer())

    assert_same_training(whole, logged(sft(SFTTrainer, 2)), 1e-5)
    with pytest.raises(ValueError, match=r"TRL: a subclass with compute_loss = transformers\.Trainer\.compute_loss"):
        sft(trl.SFTTrainer, ROWS).train()
