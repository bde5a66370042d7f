"""A batch of no rows goes through every memory, as a rank's last batch may."""

import pytest
import torch

from tests.conftest import MEMORIES, build


@pytest.mark.parametrize("memory", MEMORIES)
def test_no_rows(memory):
    model = build(memory, torch.float32).train()
    ids = torch.zeros(0, 20, dtype=torch.int64)
    mask = torch.ones_like(ids)
    places = torch.arange(20).expand(0, 20)
    for given in ({}, {"attention_mask": mask}, {"position_ids": places}):
        out = model(ids, labels=ids, num_items_in_batch=7, **given)
        assert out.logits.shape[:2] == (0, 20) and out.loss == 0
        out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        out = model(ids[:, :9], use_cache=True)
        for part in (ids[:, 9:10], ids[:, 10:]):
            out = model(part, past_key_values=out.past_key_values)
    assert out.logits.shape[:2] == (0, 10) and out.past_key_values.get_seq_length() == 20
