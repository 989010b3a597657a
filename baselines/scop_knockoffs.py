"""Knockoff images: a small generator that makes control images for SCOP, trained here.

The paper trains a GAN whose discriminator checks the knockoff condition, with the loss of a paper on knockoffs, and
exchanges several pixels at once. Neither the code of that training nor its weights are to be had, and the generator in
the released code never looks at the real image. This one is no part of the paper. It takes the loss of

    Romano, Sesia, Candes, Deep Knockoffs (2018, https://arxiv.org/abs/1811.06687), as in the authors' code,
    https://github.com/msesia/deepknockoffs

which needs no discriminator. With (X', X~') and (X'', X~'') the two halves of a batch, and swap(S) the exchange of the
square patches in a random set S between an image and its knockoff,

    loss = MMD[(X', X~'), (X~'', X'')] + MMD[(X', X~'), (X'', X~'')_swap(S)] + delta mean_p corr(X_p, X~_p)^2
    MMD[Z', Z'']^2 = mean k(Z', Z') + mean k(Z'', Z'') - 2 mean k(Z', Z'')
    k(z, z') = sum_w exp(-|z - z'|^2 / (2 w^2)),  w = 1, 2, 4, ..., 128

The first two terms ask that nobody can tell which is which, the last that a knockoff says little about its image.

Where it differs from theirs: convolutions in place of linear layers over all pixels; patches are swapped in place of
single variables; no penalty on second moments, which is a matrix of pixels times pixels; the wanted correlation of a
pixel with its knockoff is 0, where theirs solves a semidefinite program for the least that the others allow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from prune_env.tasks.training import Hook, TrainingState, TrainSettings

WIDTH = 32
"""Channels inside the generator."""
PATCH = 4
"""Side of the squares that are swapped as a whole, in pixels."""
BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""w of the kernels, for standardised pixels."""
DECORRELATION = 1.0
"""delta."""
RATE = 1e-3
"""Peak learning rate of Adam."""
TINY = 1e-3
"""Added to a standard deviation: the corner of a digit is always black."""


class KnockoffGenerator(nn.Module):
    """Three convolutions on an image and as much noise."""

    def __init__(self, channels: int, *, width: int = WIDTH) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.PReLU(width),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """A knockoff for each normalised image; the noise is a draw of the global generator."""
        noise = torch.randn(images.shape).to(images)
        return self.body(torch.cat([images, noise], dim=1)).to(images.dtype)


class KnockoffTraining(nn.Module):
    """The generator in the shape that the training loop trains: images in, logits out, a loss as a penalty.

    The logits say nothing, so that the loop's own loss is a constant.

    Attributes:
        generator: What is trained.
        classes: Width of the logits.
        discrepancy: Loss of the last batch.
    """

    def __init__(self, generator: KnockoffGenerator, classes: int) -> None:
        super().__init__()
        self.generator, self.classes = generator, classes
        self.discrepancy = torch.zeros(())

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Zeros; the discrepancy is kept for the penalty."""
        self.discrepancy = knockoff_loss(images, self.generator(images), swapped_patches(images))
        return images.new_zeros(len(images), self.classes)

    def hooks(self) -> Sequence[Hook]:
        """The knockoff loss for the training loop."""

        def penalty(state: TrainingState) -> Tensor:
            return self.discrepancy

        return (Hook(penalty=penalty),)


def adam(network: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Adam on the generator."""
    return torch.optim.Adam(network.parameters(), lr=settings.lr)


def swapped_patches(images: Float[Tensor, "n c h w"]) -> Bool[Tensor, "1 1 h w"]:
    """Pixels that are exchanged: each square patch with probability 1/2, the same in all images of a batch."""
    height, width = images.shape[2:]
    coarse = torch.randint(2, (1, 1, -(-height // PATCH), -(-width // PATCH))).float()
    fine = functional.interpolate(coarse, scale_factor=float(PATCH), mode="nearest")[..., :height, :width]
    return fine.bool().to(images.device)


def knockoff_loss(
    images: Float[Tensor, "n c h w"], knockoffs: Float[Tensor, "n c h w"], swap: Bool[Tensor, "1 1 h w"]
) -> Float[Tensor, " "]:
    """How far images and knockoffs are from exchangeable, plus how much one says about the other.

    Args:
        images: A batch; of an odd number the last is not compared.
        knockoffs: Theirs.
        swap: Pixels that change sides in the second comparison.
    """
    half = len(images) // 2
    first = _side_by_side(images[:half], knockoffs[:half])
    exchanged = _side_by_side(knockoffs[half : 2 * half], images[half : 2 * half])
    some = torch.where(swap, knockoffs, images), torch.where(swap, images, knockoffs)
    partly = _side_by_side(*(side[half : 2 * half] for side in some))
    correlation = (_standardised(images) * _standardised(knockoffs)).mean(0)
    return discrepancy(first, exchanged) + discrepancy(first, partly) + DECORRELATION * correlation.square().mean()


def discrepancy(one: Float[Tensor, "n feature"], two: Float[Tensor, "n feature"]) -> Float[Tensor, " "]:
    """MMD of two samples of equal size under the mixed kernel (the biased estimate)."""
    both = torch.cat([one, two])
    squared = both.square().sum(1)
    distance = squared[:, None] + squared - 2 * both @ both.T
    kernel = torch.stack([torch.exp(-distance / (2 * width**2)) for width in BANDWIDTHS]).sum(0)
    n = len(one)
    value = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    # The root has no slope at 0, where two samples are the same.
    return value.clamp_min(1e-12).sqrt()


def _side_by_side(one: Tensor, two: Tensor) -> Float[Tensor, "n feature"]:
    return torch.cat([one.flatten(1), two.flatten(1)], dim=1)


def _standardised(x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    return (x - x.mean(0)) / (x.var(0, correction=0).clamp_min(1e-12).sqrt() + TINY)
