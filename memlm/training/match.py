"""Equal sizes for a fair comparison: a setting of the model is solved, so that a size equals that of a reference.

    python train.py memory=none match.parameters=titans_mag
    python train.py memory=gated_delta_net match.state=titans_mag match.parameters=titans_mag

``match.parameters`` and ``match.flops`` solve ``model.intermediate_size``. ``match.state``, the bytes of a stream's
state after ``data.seq_len`` tokens, solves a width of the memory. No weights are made.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from memlm.cli import of_memory
from memlm.configuration import MemLMConfig
from memlm.data import load_tokenizer
from memlm.flops import count_flops, count_parameters, state_bytes
from memlm.hub.causal import read_config
from memlm.modeling import MemLMForCausalLM
from memlm.settings import build_config, check_type, require
from memlm.training import checkpoint

_MLP = "model.intermediate_size"
# Settings that make a memory wider. The first that a memory has is solved.
_WIDTHS = ("memory_head_dim", "head_dim", "window_size")
# Widths that a device multiplies fast, then any.
_MULTIPLES = (64, 8, 1)
_MOST = 2**14
# Widths that are tried beyond one that a memory refuses.
_NEAR = 64


@dataclass(frozen=True)
class Match:
    """parameters, state, flops: the reference: a choice of memory=..., a folder with a run or checkpoint, or
        "default", the memory that the command trains without memory=...; null for none
    tolerance: the largest difference, as a share of the reference's size
    """

    parameters: str | None = None
    state: str | None = None
    flops: str | None = None
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        both = self.parameters is not None and self.flops is not None
        require(not both, f"parameters={self.parameters} and flops={self.flops} both solve {_MLP}; leave one out")
        require(0 < self.tolerance < 1, f"tolerance={self.tolerance} must lie between 0 and 1")


def matched(cfg: DictConfig, hydra: DictConfig) -> DictConfig:
    """``cfg`` without ``match``, with the solved settings; prints a line for each.

    hydra: the ``hydra`` node of the same composition

    Raises ValueError, with the reached size, if no setting gives the reference's size within ``match.tolerance``.
    """
    if "match" not in cfg:
        return cfg
    with open_dict(cfg):
        asked = cfg.pop("match")
    require(OmegaConf.is_dict(asked), f"match={asked} must be settings, {{parameters: memory}}")
    match = build_config(Match, OmegaConf.to_container(asked, resolve=True), "match")
    # Unresolved: a value may name another key.
    overrides: list[str] = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    given = [_key(override) for override in overrides]
    own_width = _MLP in given
    for size, solve in (("state", _solve_state), ("parameters", _solve_mlp), ("flops", _solve_mlp)):
        source = getattr(match, size)
        if source is None:
            continue
        key = f"match.{size}={source}"
        if size != "state" and own_width:
            require(f"match.{size}" not in given, f"{key} solves {_MLP}; leave one of the two out")
            continue
        if OmegaConf.select(cfg, "model.backbone") is not None:
            chosen = f"match.{size}" in given
            require(not chosen, f"{key}: a backbone has its own sizes; leave it out")
            continue
        check_type(cfg.data.seq_len, int, "data.seq_len")
        wanted = _MEASURES[size](_reference(cfg, hydra.job.config_name, overrides, source, key), cfg.data.seq_len)
        reached, told = solve(cfg, partial(_size, cfg, size), wanted, key)
        off = reached / wanted - 1
        said = f"{key}: {told} gives {reached:,.0f} {_UNITS[size]}, {wanted:,.0f} are wanted ({100 * off:+.2f} %)"
        fix = f"accept it by match.tolerance={math.ceil(1000 * abs(off)) / 1000}, or choose another reference"
        require(abs(off) <= match.tolerance, f"{said}; {fix}")
        if int(os.environ.get("RANK", "0")) == 0:
            print(said)
    return cfg


def _parameters(config: MemLMConfig, seq_len: int) -> float:
    with torch.device("meta"):
        return count_parameters(MemLMForCausalLM(config))


_MEASURES: dict[str, Callable[[MemLMConfig, int], float]] = {
    "parameters": _parameters,
    "state": state_bytes,
    "flops": count_flops,
}
_UNITS = {"parameters": "parameters", "state": "bytes of state", "flops": "FLOPs a token"}


def _size(cfg: DictConfig, size: str) -> float:
    return _MEASURES[size](_config(cfg), cfg.data.seq_len)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _config(cfg: DictConfig) -> MemLMConfig:
    given: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)
    settings = {name: value for name, value in given.items() if value is not None}
    if "vocab_size" not in settings:
        spec = OmegaConf.to_container(cfg.data, resolve=True).get("tokenizer")
        # A BPE has as many entries as it is asked for, and is not trained yet.
        size = spec.get("bpe") if isinstance(spec, dict) else None
        settings["vocab_size"] = size if type(size) is int else _entries(spec)
    return MemLMConfig.from_hydra(settings)


@functools.cache
def _entries(tokenizer: str) -> int:
    return len(load_tokenizer(tokenizer))


def _reference(cfg: DictConfig, name: str, overrides: list[str], source: str, key: str) -> MemLMConfig:
    """The configuration of the reference, with the vocabulary of ``cfg``."""
    if "/" in source or source.startswith("."):
        require(Path(source).is_dir(), f"{key}: there is no such folder; name a run, a checkpoint or a memory")
        folder, _ = checkpoint.newest_whole(Path(source))
        config = read_config(folder or source)
        require(isinstance(config, MemLMConfig), f"{key}: a {config.model_type} is no decoder of memlm; name another")
        config.vocab_size = _config(cfg).vocab_size
        return config
    # Settings of this command's memory are not the other's.
    kept = [o for o in overrides if not _key(o).startswith(("memory", "match", "model.mixers.memory", "model.taps"))]
    kept += [o for o in overrides if _key(o).startswith("memory/")]
    try:
        other = compose(name, [*kept, *([] if source == "default" else [f"memory={source}"])], True)
    except Exception as error:
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error
    with open_dict(other):
        return _config(of_memory(other, other.pop("hydra")))


def _solve_mlp(cfg: DictConfig, measure: Callable[[], float], wanted: float, key: str) -> tuple[float, str]:
    """The size is affine in the MLP's width."""
    least = _at(cfg, _MLP, 1, measure)
    slope = (_at(cfg, _MLP, 65, measure) - least) / 64
    width = 1 + (wanted - least) / slope
    require(width > 0.5, f"{key}: {wanted:,.0f} are wanted, the model has {least:,.0f} with an MLP of width 1")
    for step in _MULTIPLES:
        found = max(1, round(width / step)) * step
        # A device multiplies such widths faster, at little cost in size.
        if abs(found - width) * slope <= 0.001 * wanted:
            break
    return _at(cfg, _MLP, found, measure), f"{_MLP}={found}"


def _solve_state(cfg: DictConfig, measure: Callable[[], float], wanted: float, key: str) -> tuple[float, str]:
    """The size never falls with the memory's width."""
    memory = (_config(cfg).mixers or {}).get("memory", {})
    name = next((name for name in _WIDTHS if memory.get(name) is not None), None)
    fix = "set the memory's sizes by hand"
    require(name is not None, f"{key}: {memory.get('kind')} has none of {', '.join(_WIDTHS)}, which are solved; {fix}")
    setting, sizes = f"model.mixers.memory.{name}", dict[int, float]()

    def at(width: int) -> float:
        """The size at a width, or at the next one that the memory takes."""
        for near in range(width, width + _NEAR):
            try:
                if near not in sizes:
                    sizes[near] = _at(cfg, setting, near, measure)
                return sizes[near]
            except ValueError as error:
                wrong = error
        raise ValueError(f"{key}: {wrong}")

    assert name is not None
    low = high = memory[name]
    while at(high) < wanted and high < _MOST:
        low, high = high, 2 * high
        # A window sees no more than the whole text.
        if at(high) == at(low):
            break
    while at(low) > wanted and low > 1:
        low, high = low // 2, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < wanted else (low, middle)
    found = min(sizes, key=lambda width: abs(sizes[width] - wanted))
    return _at(cfg, setting, found, measure), f"{setting}={found}"


def _at(cfg: DictConfig, key: str, value: int, measure: Callable[[], float]) -> float:
    """The size with a setting at a value, which stays in ``cfg``."""
    with open_dict(cfg):
        OmegaConf.update(cfg, key, value)
    return measure()
