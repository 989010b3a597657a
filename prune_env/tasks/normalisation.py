"""Normalisation: the mean and standard deviation that a network expects its images to have been shifted by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from prune_env.checks import did_you_mean


@dataclass(frozen=True)
class Normalisation:
    """Pixels in [0, 1] minus `mean`, divided by `std`, channel by channel.

    Raises:
        ValueError: Lengths differ, a number is not finite, or a standard deviation is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"normalise has {len(self.mean)} means and {len(self.std)} standard deviations")
        if not all(math.isfinite(v) for v in self.mean + self.std) or min(self.std) <= 0:
            raise ValueError(f"normalise is mean {self.mean}, std {self.std}; finite numbers and std > 0 are allowed")

    def __call__(self, pixels: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Bytes to normalised float32."""
        std = torch.tensor(self.std, device=pixels.device).view(1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=pixels.device).view(1, -1, 1, 1)
        return pixels.to(torch.float32).mul_(1 / (255 * std)).sub_(mean / std)

    def __str__(self) -> str:
        """The numbers as `parse` reads them: means, then standard deviations."""
        return ",".join(repr(value) for value in self.mean + self.std)


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

NORMALISATIONS = {
    "imagenet": IMAGENET,
    "cifar": CIFAR,
    "half": Normalisation((0.5,), (0.5,)),
    "none": Normalisation((0.0,), (1.0,)),
}
"""Name -> normalisation; one with a single number holds for any number of channels."""


def parse(text: str, *, channels: int) -> Normalisation:
    """The normalisation named by `text`, or spelt out as numbers (all means, then all standard deviations).

    Args:
        text: A name of `NORMALISATIONS`, or numbers with commas or blanks between them, e.g. six for RGB.
        channels: Channels of the images.

    Raises:
        ValueError: An unknown name (names the closest) or numbers that do not fit the channels.
    """
    entry = NORMALISATIONS.get(text) or _numbers(text)
    if len(entry.mean) == 1:
        entry = Normalisation(entry.mean * channels, entry.std * channels)
    if len(entry.mean) != channels:
        raise ValueError(f"normalise {text!r} is for images of {len(entry.mean)} channels, these have {channels}")
    return entry


def _numbers(text: str) -> Normalisation:
    try:
        values = tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        values = ()
    if not values or len(values) % 2:
        raise ValueError(
            f"normalise is {text!r}; {did_you_mean(text, NORMALISATIONS)}allowed are {', '.join(NORMALISATIONS)}, or "
            "numbers: means, then standard deviations"
        )
    half = len(values) // 2
    return Normalisation(values[:half], values[half:])
