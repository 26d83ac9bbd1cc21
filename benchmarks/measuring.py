"""Timing, peak rates and memory readings for the benchmarks."""

import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from byol_func.runtime import precision


def resolved(policy: str, device: torch.device) -> str:
    """Returns the precision to measure: `policy`, or what 'auto' stands for on the device."""
    return precision.fastest(device) if policy == 'auto' else policy


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds_per_call(
    fn: Callable[[], Any], device: torch.device, repeats: int, seconds: float, warm_up: int = 1
) -> list[float]:
    """Returns the mean seconds per call in each of `repeats` stretches of about `seconds` each."""
    for _ in range(warm_up):
        fn()
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    calls = max(1, round(seconds / max(time.perf_counter() - start, 1e-6)))
    means = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        synchronize(device)
        means.append((time.perf_counter() - start) / calls)
    return means


def median(values: list[float]) -> float:
    """Returns the median."""
    return statistics.median(values)


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Returns the FLOP/s of a large matrix product and of a large convolution, each in its best stretch.

    The product is [2048, 2048] x [2048, 2048] (8192 on a GPU). The convolution is 3 x 3 from 128 to 128
    channels on 64 images (2048 on a GPU) of 16 x 16 pixels, channels last, like the convolutions of
    ResNet-18. Both are forward passes only.
    """
    gpu = device.type == 'cuda'
    size, batch = (8192, 2048) if gpu else (2048, 64)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(batch, 128, 16, 16, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        product = seconds_per_call(lambda: a @ b, device, repeats, 0.5, warm_up=3)
        convolution = seconds_per_call(
            lambda: torch.nn.functional.conv2d(x, w, padding=1), device, repeats, 0.5, warm_up=3
        )
    return {
        'matrix_product': 2 * size**3 / min(product),
        'convolution': 2 * batch * 16 * 16 * 128 * 128 * 9 / min(convolution),
    }


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory so far, of the GPU's allocator or, on a CPU, of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_gib(device: torch.device) -> float:
    """Returns the memory in use now, of the GPU's allocator or, on a CPU, of this process."""
    if device.type == 'cuda':
        return torch.cuda.memory_allocated(device) / 2**30
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**30


def machine(device: torch.device) -> dict[str, Any]:
    """Returns a description of the machine and its software."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else _cpu_name()
    return {
        'device': name,
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'python': platform.python_version(),
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    try:
        with open('/proc/cpuinfo') as file:
            names = [line.split(':')[1].strip() for line in file if line.startswith('model name')]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
