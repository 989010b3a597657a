"""Recalibration: BatchNorm statistics estimated anew on training images, after a change of channels."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_env.number_format import autocast
from prune_env.pruning.measure import evaluating, prepare_images

BATCH_SIZE = 250
"""Images per forward pass."""


def recalibrate(
    network: nn.Module,
    images: Float[Tensor, "image ..."],
    *,
    batch_size: int = BATCH_SIZE,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Replace the running statistics of every BatchNorm, in place, by their average over batches of equal size.

    Only BatchNorm runs in training mode, so dropout stays off and nothing random happens; every module's mode and
    momentum return. Weights are not touched. Without BatchNorm nothing runs at all.

    Args:
        network: On the device of the images.
        images: Normalised training images. They are dealt into the fewest equal batches of at most `batch_size`;
            what is left over, always fewer images than there are batches, is not used.
        batch_size: Most images per forward pass.
        dtype: Number format of the forward pass; bfloat16 runs under autocast, with statistics summed in float32.

    Raises:
        ValueError: Fewer than two images to a batch: a variance needs two.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    batches = -(-len(images) // max(batch_size, 1))
    size = len(images) // max(batches, 1)
    if size < 2:
        raise ValueError(f"recalibration needs batches of at least 2 images, not {len(images)} images, {batch_size=}")
    images = prepare_images(images, device=images.device, dtype=dtype)
    momenta = [norm.momentum for norm in norms]
    with evaluating(network), autocast(images.device, dtype):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's own way to say: a plain average over all batches
                norm.training = True
            for batch in images[: batches * size].split(size):
                network(batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.training = False
