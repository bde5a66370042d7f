"""Weights of earlier versions: names, shapes and order are the same, so an optimiser's state can continue, and so is
their function. Version 0.1 (commit 78b8980) wrote tests/reference/weights.json.
"""

import json

import pytest
import torch

from memlm.roles import Roles
from memlm.training.optim import parameter_groups
from memlm_kernels.testing import assert_close
from tests.conftest import ROOT, build, variants

REFERENCE = json.loads((ROOT / "tests" / "reference" / "weights.json").read_text())
PREFIX = "model.layers.0.mixer."


def fill(model) -> None:
    """Fill with numbers from -0.3 to 0.3 that are equal on every machine."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            n = torch.arange(1, p.numel() + 1)
            p.copy_((((n * n * 2654435761 + 97 * i * n) % 2**32) / 2**31 - 1).view_as(p) * 0.3)


@pytest.mark.parametrize("variant", [p for p in variants() if p.id in REFERENCE])
def test_weights_mean_what_they_meant(variant, request):
    name, settings = variant
    model, expected = build(name, **settings), REFERENCE[request.node.callspec.id]
    group_of = {id(p): group for group, parameters in parameter_groups(model).items() for p in parameters}
    found = [
        f"{name.removeprefix(PREFIX)} {list(p.shape)} {group_of[id(p)]}"
        for name, p in model.named_parameters()
        if name.startswith(PREFIX)
    ]
    assert found == expected["parameters"]
    fill(model)
    roles = torch.tensor([-2] * 4 + [1] * 12 + [2] * 10 + [0] * 8 + [-1] * 6).expand(2, -1)
    ids, more = (torch.arange(80).view(2, 40) * 7) % 259, {"roles": Roles(roles)} if name == "msa" else {}
    with torch.no_grad():
        got = model(ids, **more).logits[:, -1, :3]
    assert_close("logits", torch.tensor(expected["logits"], dtype=torch.float64).view(2, 3), got, 1e-10)


def test_every_memory_of_then_is_there():
    assert set(REFERENCE) <= {p.id for p in variants()}
