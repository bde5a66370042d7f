"""The device of a run and its precision; speeds and memories of GPUs, by the names that torch gives them."""

from typing import NamedTuple

import torch
from accelerate import Accelerator

from memlm.training.settings import HardwareSettings


class Device(NamedTuple):
    """flops: dense products of bf16 a second; memory: bytes"""

    flops: float
    memory: float


# NVIDIA prints figures with sparsity, twice these: nvidia.com/en-us/data-center/h100 and h200, and its Blackwell data
# sheet. AMD prints both: amd.com/en/products/accelerators/instinct/mi300/mi300x.html. The figures were compared with
# the table of torchtitan/tools/utils.py, which cites these pages, not with the pages themselves.
DEVICES = {
    "NVIDIA H100 80GB HBM3": Device(989e12, 80e9),
    "NVIDIA H100 PCIe": Device(756e12, 80e9),
    "NVIDIA H100 NVL": Device(835e12, 94e9),
    "NVIDIA H200": Device(989e12, 141e9),
    "NVIDIA B200": Device(2250e12, 180e9),
    "AMD Instinct MI300X": Device(1307e12, 192e9),
    "AMD Instinct MI300X OAM": Device(1307e12, 192e9),
}


def peak_flops(device: torch.device) -> float | None:
    """Dense products of bf16 a second of a device; None if it is not in the table."""
    known = DEVICES.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.flops if known else None


def build_accelerator(hardware: HardwareSettings) -> Accelerator:
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("hardware.device='cuda' but torch sees no GPU; use hardware.device=auto")
    return Accelerator(cpu=not _on_gpu(hardware), mixed_precision=precision(hardware))


def precision(hardware: HardwareSettings) -> str:
    """``auto`` is bf16 on GPUs that support it, else fp32, which is ``no``."""
    if hardware.mixed_precision != "auto":
        return hardware.mixed_precision
    return "bf16" if _on_gpu(hardware) and torch.cuda.is_bf16_supported() else "no"


def _on_gpu(hardware: HardwareSettings) -> bool:
    return hardware.device != "cpu" and torch.cuda.is_available()
