"""Number formats of a forward pass: which one is fast where it runs.

bfloat16 pays where the hardware multiplies in it: AMX, the bfloat16 instructions of AVX-512, and CUDA from Ampere on. A
CPU with neither is slower in it than in float32: by 1.4 to 1.7, CIFAR networks, plain AVX-512; one with the
instructions alone is faster by 1.6 to 1.9 (`benchmarks.number_formats`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Name -> format; weights and gradients are float32 in either."""

CHOICES = ("auto", *FORMATS)
"""What a training may be told; `auto` is the fast one of its device."""

CPU_QUESTIONS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
"""torch.cpu's questions; a yes to any makes bfloat16 the fast format."""

SMALL_IMAGE = 256
"""Pixels up to which an image is too small for a lower format to pay."""


def fast_format(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the device has units or instructions that multiply in it, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # Private in torch, and the only way to ask; a torch without a question is taken for one without what it asks.
        fast = device.type == "cpu" and any(getattr(torch.cpu, question, bool)() for question in CPU_QUESTIONS)
    return torch.bfloat16 if fast else torch.float32


def format_named(name: str, device: str | torch.device) -> torch.dtype:
    """The format that one of `CHOICES` means on a device."""
    return fast_format(device) if name == "auto" else FORMATS[name]


def number_format(network: nn.Module, images: Tensor) -> torch.dtype:
    """What a network is measured in: the fast format of its device where convolutions make that pay, else float32.

    bfloat16 moves the accuracy of a small linear network by tenths of a per cent and saves it hardly any time; nor
    does it save any on images as small as digits.

    Args:
        network: Whose device is asked.
        images: `[n, channel, height, width]`, or feature vectors; only their shape is read.
    """
    convolves = any(isinstance(module, _ConvNd) for module in network.modules())
    large = images.ndim == 4 and images.shape[-2] * images.shape[-1] > SMALL_IMAGE
    return fast_format(next(network.parameters()).device) if convolves and large else torch.float32


def autocast(device: str | torch.device, dtype: torch.dtype) -> torch.autocast:
    """Lower formats as a context in which each weight is cast once; nothing for float32."""
    lower = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(torch.device(device).type, dtype=dtype if lower else torch.bfloat16, enabled=lower)
