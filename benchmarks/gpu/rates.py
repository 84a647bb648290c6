"""What the device reaches: bytes copied in a second, and operations of a large product."""

import functools
import statistics

import torch

from mts_fast.tuning.timing import on_device

# a copy far larger than any cache, and a product that fills any GPU; on a CPU they only have to run
COPIED_BYTES = {"cuda": 2**32, "cpu": 2**24}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 128}
RATE_ROUNDS = 10


@functools.cache
def copy_bandwidth(device):
    """Bytes read and written in a second by a large copy within the device."""
    source = torch.empty(COPIED_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    call = {"copy": lambda: target.copy_(source)}
    on_device(call, 2, device)
    return (
        2 * source.numel() / statistics.median(on_device(call, RATE_ROUNDS, device).device["copy"])
    )


def product_rate(device, dtype):
    """Operations in a second of a large square product of random matrices, in torch's current
    float32 matmul precision."""
    return _product_rate(device, dtype, torch.get_float32_matmul_precision())


@functools.cache
def _product_rate(device, dtype, _):
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    call = {"product": lambda: left @ right}
    on_device(call, 2, device)
    seconds = statistics.median(on_device(call, RATE_ROUNDS, device).device["product"])
    return 2 * size**3 / seconds
