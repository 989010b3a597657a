"""Augmentation of whole batches of bytes, which costs a few percent of a training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Generator, Tensor


def augment(
    pixels: UInt8[Tensor, "n c h w"], *, crop: int, flip: bool, generator: Generator
) -> UInt8[Tensor, "n c h w"]:
    """Random crop of the zero-padded images, then a random mirror image; one draw per image.

    Args:
        pixels: Raw images.
        crop: Pixels of padding on each side, i.e. the largest shift.
        flip: Whether to mirror (each image with probability 1/2).
        generator: Source of the draws.
    """
    count, _, height, width = pixels.shape
    if not crop and not flip:
        return pixels
    down = torch.randint(2 * crop + 1, (count, 1), generator=generator) + torch.arange(height)
    right = torch.randint(2 * crop + 1, (count, 1), generator=generator) + torch.arange(width)
    if flip:
        mirrored = torch.randint(2, (count, 1), generator=generator, dtype=torch.bool)
        right = torch.where(mirrored, right.flip(1), right)
    # One gather from channels-last memory does crop and mirror at once.
    padded = F.pad(pixels.permute(0, 2, 3, 1), (0, 0, crop, crop, crop, crop))
    rows = torch.arange(count).view(-1, 1, 1)
    return padded[rows, down.unsqueeze(2), right.unsqueeze(1)].permute(0, 3, 1, 2)
