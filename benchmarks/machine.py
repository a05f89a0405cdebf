"""What a table of measurements has to say about where it comes from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch


def describe(device: torch.device, packages: Sequence[str]) -> str:
    """Processor or GPU, threads, load and versions, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    parts = [f"{name}, {os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()})"]
    if device.type == "cuda":
        parts = [torch.cuda.get_device_name(device), *parts]
    parts.append(f"{torch.get_num_threads()} threads")
    if hasattr(os, "getloadavg"):
        parts.append(f"load {os.getloadavg()[0]:.1f} at the end")
    parts.append(f"Python {platform.python_version()}")
    parts += [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return "; ".join(parts)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and, in brackets, the smallest and the largest."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
