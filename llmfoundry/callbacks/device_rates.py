"""How fast a device can multiply matrices: measured for processors, from data sheets for GPUs. Model FLOPs utilisation is counted against it.

Imports torch when called and the standard library only, so that benchmarks can load this file by its path in an interpreter that has another ``llmfoundry``.
"""

from __future__ import annotations

import time
from typing import Any, Sequence

__all__ = ['DEFAULT_SHAPES', 'PEAK_FLOPS', 'matmul_rate', 'peak_flops']

# (rows, inner, columns) of a product: a block of tokens times a weight, of sizes at which a processor has reached its rate.
DEFAULT_SHAPES = ((512, 1024, 1024), (512, 1024, 4096), (512, 4096, 1024))

# Dense peaks in FLOP/s from the makers' data sheets, which often print twice that for 2:4 sparsity, by a part of the device's name; the first match counts.
# 'bf16' stands for float16 as well, on the tensor or matrix cores, with accumulation in float32. 'fp32' is the rate outside of them, which is what float32 products use unless TF32 is on.
PEAK_FLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA Blackwell datasheet (HGX B200 / B300, GB200 NVL72, GB300 NVL72), per GPU
    ('GB300', {'bf16': 2.5e15, 'fp8': 5e15, 'tf32': 1.25e15, 'fp32': 80e12}),
    ('GB200', {'bf16': 2.5e15, 'fp8': 5e15, 'tf32': 1.25e15, 'fp32': 80e12}),
    ('B300', {'bf16': 2.25e15, 'fp8': 4.5e15, 'tf32': 1.125e15, 'fp32': 75e12}),
    ('B200', {'bf16': 2.25e15, 'fp8': 4.5e15, 'tf32': 1.125e15, 'fp32': 75e12}),
    # NVIDIA H200, H100, GH200 datasheets
    ('H200 NVL', {'bf16': 835.5e12, 'fp8': 1.671e15, 'tf32': 417.5e12, 'fp32': 60e12}),
    ('GH200', {'bf16': 989.5e12, 'fp8': 1.979e15, 'tf32': 494.5e12, 'fp32': 67e12}),
    ('H200', {'bf16': 989.5e12, 'fp8': 1.979e15, 'tf32': 494.5e12, 'fp32': 67e12}),
    ('H100 PCIe', {'bf16': 756e12, 'fp8': 1.513e15, 'tf32': 378e12, 'fp32': 51e12}),
    ('H100 NVL', {'bf16': 835.5e12, 'fp8': 1.671e15, 'tf32': 417.5e12, 'fp32': 60e12}),
    ('H100', {'bf16': 989.5e12, 'fp8': 1.979e15, 'tf32': 494.5e12, 'fp32': 67e12}),
    ('H800', {'bf16': 989.5e12, 'fp8': 1.979e15, 'tf32': 494.5e12, 'fp32': 67e12}),
    # NVIDIA Ampere and Ada datasheets
    ('A100', {'bf16': 312e12, 'tf32': 156e12, 'fp32': 19.5e12}),
    ('A800', {'bf16': 312e12, 'tf32': 156e12, 'fp32': 19.5e12}),
    ('L40S', {'bf16': 362e12, 'fp8': 733e12, 'tf32': 183e12, 'fp32': 91.6e12}),
    ('L40', {'bf16': 181e12, 'fp8': 362e12, 'tf32': 90.5e12, 'fp32': 90.5e12}),
    ('L4', {'bf16': 121e12, 'fp8': 242.5e12, 'tf32': 60e12, 'fp32': 30.3e12}),
    ('A40', {'bf16': 149.7e12, 'tf32': 74.8e12, 'fp32': 37.4e12}),
    ('A10G', {'bf16': 70e12, 'tf32': 35e12, 'fp32': 31.5e12}),
    ('A10', {'bf16': 125e12, 'tf32': 62.5e12, 'fp32': 31.2e12}),
    ('RTX 4090', {'bf16': 165.2e12, 'fp8': 330.3e12, 'tf32': 82.6e12, 'fp32': 82.6e12}),
    ('RTX 3090', {'bf16': 71e12, 'tf32': 35.6e12, 'fp32': 35.6e12}),
    # AMD Instinct datasheets; the device name of ROCm holds the model
    ('MI355X', {'bf16': 2.5e15, 'fp8': 5e15, 'fp32': 157.3e12}),
    ('MI350X', {'bf16': 2.3e15, 'fp8': 4.6e15, 'fp32': 144.2e12}),
    ('MI325X', {'bf16': 1.3074e15, 'fp8': 2.6149e15, 'tf32': 653.7e12, 'fp32': 163.4e12}),
    ('MI300X', {'bf16': 1.3074e15, 'fp8': 2.6149e15, 'tf32': 653.7e12, 'fp32': 163.4e12}),
    ('MI300A', {'bf16': 980.6e12, 'fp8': 1.9612e15, 'tf32': 490.3e12, 'fp32': 122.6e12}),
    ('MI250', {'bf16': 191.5e12, 'fp32': 47.9e12}),  # each of its two dies is a device
)


def peak_flops(device_name: str, precision: str = 'amp_bf16', tf32: bool = False) -> float | None:
    """The device's dense peak in FLOP/s; None if the table does not have the device, or no rate for the precision.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        precision: ``fp32``, ``amp_fp16``, ``amp_bf16`` or ``amp_fp8``.
        tf32: whether float32 products may use TF32.
    """
    kind = {'amp_fp16': 'bf16', 'amp_bf16': 'bf16', 'amp_fp8': 'fp8', 'fp32': 'tf32' if tf32 else 'fp32'}.get(precision, precision)
    return next((peaks.get(kind) for part, peaks in PEAK_FLOPS if part.lower() in device_name.lower()), None)


def matmul_rate(shapes: Sequence[tuple[int, int, int]] = DEFAULT_SHAPES, dtype: Any = None, repeats: int = 3, limit_s: float | None = None) -> float:
    """Best matrix-product rate of this process with its number of threads, in FLOP/s.

    Args:
        shapes: (rows, inner, columns) of the products to try.
        dtype: torch dtype of the factors; float32 if None.
        repeats: runs of each product.
        limit_s: stop after so many seconds, but not before the first product has run twice (the first run also sets up the library).
    """
    import torch

    best, runs, begin = 0.0, 0, time.perf_counter()
    for rows, inner, columns in shapes:
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(a, b.t(), out=out)
            now = time.perf_counter()
            best, runs = max(best, 2.0 * rows * inner * columns / (now - start)), runs + 1
            if limit_s is not None and runs >= 2 and now - begin > limit_s:
                return best
    return best
