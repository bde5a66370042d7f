"""The sources and tiles of Triton's kernels: what all targets take, and the table of their compilations."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import memlm_kernels

pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[cpu-kernels]'")


def test_kernels_keep_to_what_every_target_has():
    from memlm_kernels.launch import Kernel

    folder = Path(memlm_kernels.__file__).parent
    sources = {path: path.read_text() for path in folder.glob("*/*.py")}
    sources = {path: text for path, text in sources.items() if "\n@tiled(" in text}
    names = [".".join(path.relative_to(folder.parent).with_suffix("").parts) for path in sources]
    found = [x for name in names for x in vars(importlib.import_module(name)).values() if isinstance(x, Kernel)]
    assert len(found) == sum(text.count("\n@tiled(") for text in sources.values()) >= 24
    compiled = (folder.parent / "compiled.md").read_text()
    for kernel in found:
        assert f"| `{kernel.function.__name__}` |" in compiled
        for target, choices in kernel.tiles.items():
            for tiles in choices:
                stages = 2 if target == "hip" else 3
                assert tiles["num_stages"] <= stages and tiles["num_warps"] * (64 if target == "hip" else 32) <= 1024
        for architecture in kernel.tiles.keys() - {"cuda", "hip"}:
            first = " ".join(f"{name}={size}" for name, size in kernel.tiles[architecture][0].items())
            assert re.search(rf"\| `{kernel.function.__name__}` \|[^|]*\| {architecture} \| {first} \|", compiled)
    loads = []
    for source in sources.values():
        assert not re.search(r"inline_asm|tensor_descriptor|block_ptr|tf32x3|atomic", source)
        loads += re.findall(r"tl\.load\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", source)
    # A masked load without ``other`` reads arbitrary values.
    assert loads and all("other=" in load for load in loads if "mask=" in load)


def test_an_architecture_may_have_tiles_of_its_own(monkeypatch):
    """Devices of two architectures in one process; a limit cuts the tiles of each."""
    from memlm_kernels import launch

    one, other = {"BK": 32, "num_warps": 4}, {"BK": 64, "num_warps": 8}

    def function():
        """Stands for a Triton function."""

    function.fn = function
    kernel = launch.tiled([one], [{"BK": 16, "num_warps": 2}], sm_90=[other, one])(function)
    assert kernel.tiles_on("sm_90") == [other, one] and kernel.tiles_on("sm_80") == kernel.tiles_on("cuda") == [one]
    assert kernel.tiles_on("gfx942") == kernel.tiles_on("hip") == [{"BK": 16, "num_warps": 2}]
    names = {torch.device("cuda", 0): "sm_90", torch.device("cuda", 1): "sm_100"}
    monkeypatch.setattr(launch, "architecture", names.get)
    first, second = names
    for _ in range(2):
        assert kernel.choices({}, first) == [other, one] and kernel.choices({}, second) == [one]
        assert kernel.choices({"BK": 16}, first) == [{**other, "BK": 16}, {**one, "BK": 16}]
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    launch.architecture.cache_clear()
    assert launch.architecture(first) == "sm_90" and launch.architecture(torch.device("cpu")) == "cuda"
    launch.architecture.cache_clear()
