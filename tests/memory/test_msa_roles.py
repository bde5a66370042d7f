"""Roles of tokens in Memory Sparse Attention: counted once, documents laid on rows, no read from the device."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from memlm.data import Batch, RetrievalRow
from memlm.memory.base import Dims
from memlm.memory.msa.layout import Layout
from memlm.memory.rows import Rows
from memlm.training.objective import Objective, model_inputs
from memlm_kernels.testing import Watch, assert_close
from tests.conftest import step
from tests.memory.test_msa import EXACT, context, ids_like, inputs, mixer_of, model_of, packed, roles_of


def test_documents_of_like_length_are_laid_on_rows():
    """Rows have one length unless this doubles the tokens: a long document would fill short rows with padding."""
    for rows, groups in (
        ([[9, 1, 4, 13]], [(0, 13, 4)]),
        ([[2, 1, 25, 2]], [(0, 1, 1), (1, 2, 2), (16, 25, 1)]),
        ([[16, 1, 1, 1, 1, 1], [3, 2, 8], []], [(0, 1, 5), (1, 2, 1), (2, 4, 1), (4, 8, 1), (8, 16, 1)]),
    ):
        pieces = [roles_of([(n + 1, size) for n, size in enumerate(row)] + [(0, 40)])[:, :40] for row in rows]
        facts, x = context(torch.cat(pieces)), inputs(40, len(rows))
        mixer = mixer_of()
        layout = Layout.of(Rows.of(x, **facts), mixer.init_state(len(rows), x.device, x.dtype), 4, 2)
        assert layout.within.groups == groups
        slots, size = layout.within.on_rows()
        real = [
            slot for row, of in zip(slots.view(len(rows), -1).tolist(), rows, strict=True) for slot in row[: sum(of)]
        ]
        assert len({*real}) == len(real) and max(real) < size <= 2 * max(map(sum, rows)) * len(rows)
        alone = [step(mixer, x[i : i + 1], **context(piece)).y_BTD for i, piece in enumerate(pieces)]
        assert_close("rows", torch.cat(alone), step(mixer, x, **facts).y_BTD, EXACT)


def test_a_long_document_among_short_ones_costs_what_it_is():
    """There is no mask over all documents: no tensor is larger than heads of twice the tokens."""
    mixer = mixer_of(routes=False)
    doc_ids = roles_of([(1, 1500), *((n, 3) for n in range(2, 502)), (0, 2)])
    x = inputs(doc_ids.shape[1])
    with torch.no_grad(), Watch() as watch:
        step(mixer, x, **context(doc_ids))
    assert watch.largest <= 2 * 3000 * 24 + 24


def test_the_device_is_not_asked_and_cost_is_linear_in_documents():
    mixer, sizes = mixer_of(), []
    mixer.dims = Dims(24, 4, 2, 6, attn_implementation="eager")
    for count in (16, 32):
        doc_ids = roles_of([(n + 1, 37) for n in range(count)] + [(0, 5), (-1, 5)])
        x, facts = inputs(doc_ids.shape[1]), context(doc_ids, found=doc_ids == 2)
        with Watch() as watch:
            out = step(mixer, x, **facts)
            step(mixer, x[:, :1], out.state)
        assert not watch.asked
        sizes.append(watch.largest)
    assert sizes[1] <= 2.2 * sizes[0]


class Asking(TorchFunctionMode):
    """Records reads of numbers from tensors, which ``Watch`` does not see on a CPU."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "item", "__bool__", "__int__", "__index__", "__float__", "numpy", "cpu"):
            self.asked.append(name)
        return function(*args, **(kwargs or {}))


def test_a_training_step_does_not_ask_the_device_for_what_the_collator_knows(monkeypatch):
    """Roles are counted when the batch is made; without these counts the same forward reads the device once."""
    # Only on a CPU values are read, and all are checked at once.
    monkeypatch.setattr("memlm.modeling.most_documents", lambda *given: given[2])
    for name, module in sys.modules.items():
        if name.startswith("memlm_kernels") and hasattr(module, "readable"):
            monkeypatch.setattr(module, "readable", lambda _: False)
    names = ["usual", "documents last", "no template", "one long document"]
    rows = []
    for order in (names, names[::-1]):
        _, doc_ids, positions = packed(order)
        ids = ids_like(doc_ids)[0].numpy()
        rows.append(RetrievalRow(ids, ids, positions[0].numpy(), doc_ids[0].numpy(), (doc_ids[0] == 2).long().numpy()))
    objective, inputs = Objective(model_of().train()), model_inputs(Batch.from_rows(rows, [0, 0]), "cpu")
    results = []
    roles = inputs["roles"]
    for given, asked in ((roles, []), (replace(roles, counts=None), ["tolist"])):
        with Asking() as asking, Watch() as watch:
            results.append(objective(**inputs | {"roles": given})[0])
        assert watch.asked == [] and asking.asked == asked
    assert torch.equal(*results)
    with pytest.raises(ValueError, match=r"roles\.counts are of rows without an attention_mask; leave them out"):
        model_of()(inputs["input_ids"], roles=roles, attention_mask=torch.ones_like(roles.doc_ids))
