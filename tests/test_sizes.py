"""Sizes that are known without weights are those of the model."""

import pytest
import torch

from memlm.flops import state_bytes
from memlm.reader import Reader
from tests.conftest import MEMORIES, build, model_config


@pytest.mark.parametrize("memory", MEMORIES)
def test_bytes_of_state_are_those_of_a_memory_that_has_read(memory):
    """Past the window, and inside of a chunk."""
    reader = Reader(build(memory, torch.float32))
    reader(torch.arange(37)[None])
    assert state_bytes(model_config(memory), 37) == reader.nbytes() > 0
