"""Shared by all tests: configurations composed as the scripts compose them, and small models."""

import copy
import functools
import importlib
import os
from pathlib import Path

import pytest
import torch

# Before anything imports Triton: where no GPU can run its kernels they are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from omegaconf import OmegaConf

from memlm import MemLMConfig, MemLMForCausalLM, cli

ROOT = Path(__file__).parent.parent
MEMORIES = sorted(path.stem for path in (ROOT / "configs" / "memory").glob("*.yaml"))


def composed(*overrides: str, config: str = "train"):
    """The configuration that ``python <config>.py *overrides`` runs."""
    return cli.composed(ROOT / "configs", config, overrides)


def model_config(memory: str = "titans_mag", **settings) -> MemLMConfig:
    """``model=tiny memory=...`` with settings of the memory changed."""
    model = copy.deepcopy(_tiny(memory))
    model["mixers"]["memory"] |= settings
    return MemLMConfig.from_hydra(model)


@functools.cache
def _tiny(memory: str) -> dict:
    # Composing takes longer than most tests.
    return OmegaConf.to_container(composed("model=tiny", f"memory={memory}").model, resolve=True)


def build(memory: str = "titans_mag", dtype=torch.float64, seed: int = 0, **settings) -> MemLMForCausalLM:
    """A tiny model at its initialisation, gates and all, moved off the points where they are symmetric."""
    torch.manual_seed(seed)
    model = MemLMForCausalLM(model_config(memory, **settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.to(dtype).eval()


def variants() -> list:
    """Every YAML of configs/memory, and the ``VARIANTS`` (changed settings) of tests/memory/test_<kind>.py."""
    found = [pytest.param((name, {}), id=name) for name in MEMORIES]
    for path in sorted((ROOT / "tests" / "memory").glob("test_*.py")):
        if path.stem == "test_contract":
            continue
        module = importlib.import_module(f"tests.memory.{path.stem}")
        for name, settings in getattr(module, "VARIANTS", []):
            label = "-".join(f"{key}={value}" for key, value in settings.items())
            found.append(pytest.param((name, settings), id=f"{name}-{label}"))
    return found
