"""What machines can do by their makers' datasheets, how much memory there is here, and how a tensor gets to a GPU."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peak:
    """Arithmetic of a GPU in 10^12 floating-point operations a second, dense: bf16 on tensor cores that add in fp32, and fp32
    outside of them."""

    bf16: float
    fp32: float


# By a part of the name that torch.cuda.get_device_name gives; the first that fits counts.
# Datasheets print bf16 of Hopper with sparsity, which is twice the dense number; dense ones are half of that.
PEAKS = {
    # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet, and www.nvidia.com/en-us/data-center/h200
    "H200": Peak(bf16=989, fp32=67),
    "H100 PCIe": Peak(bf16=756, fp32=51),
    "H100 NVL": Peak(bf16=835, fp32=60),
    "H100": Peak(bf16=989, fp32=67),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    "A100": Peak(bf16=312, fp32=19.5),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf, appendix A
    "RTX 4090": Peak(bf16=165.2, fp32=82.6),
}


# Where a container's limit stands, in versions 2 and 1 of control groups.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def peak_of(name: str) -> Peak | None:
    """The datasheet's numbers of a GPU by its name; None if it is not listed."""
    words = f" {name.lower()} ".replace("-", " ")  # "NVIDIA A100-SXM4-80GB"
    if " 4090 d " in words or "laptop" in words:  # smaller chips of the same name
        return None
    return next((peak for part, peak in PEAKS.items() if f" {part.lower()} " in words), None)


def memory_of(device: str) -> int:
    """Bytes of memory that a device has; of the CPU those that this process may use at most."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in LIMITS:
        try:
            memory = min(memory, int(Path(limit).read_text()))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return memory


def onto(device: torch.device | str, tensor: Tensor) -> Tensor:
    """A tensor on a device; the same one if it is there. Nothing waits for what a GPU is at."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        # From memory that is not pinned, a copy waits for the kernels before it; of one that is not contiguous, too.
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)
