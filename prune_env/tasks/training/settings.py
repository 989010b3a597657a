"""Settings of a training: data that decides its outcome, and the learning rate they imply."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prune_env.number_format import CHOICES


@dataclass(frozen=True)
class TrainSettings:
    """One-cycle SGD with Nesterov momentum.

    Raises:
        ValueError: A value that is not allowed; names the field.
    """

    epochs: int = 30
    """Passes over the training split."""
    lr: float = 0.2
    """Peak learning rate."""
    batch_size: int = 128
    """Images per step; an incomplete last batch is left out, and other images miss the next epoch's."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 decay of all parameters."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    warmup: float = 0.3
    """Share of the steps on which the learning rate rises."""
    crop: int = 4
    """Pixels of zero padding for random crops; 0 for none."""
    flip: bool = True
    """Mirror every second image at random."""
    dtype: str = "auto"
    """Precision of the forward pass, `bfloat16` or `float32`; `auto` takes the one that is fast on its device."""
    seed: int = 0
    """Seed of order, augmentation and dropout."""
    threads: int = 0
    """CPU threads; 0 takes torch's own setting. One is faster for tiny networks, and gives the same everywhere."""

    def __post_init__(self) -> None:
        allowed = {
            "epochs": (self.epochs >= 1, "1 or more"),
            "lr": (0 < self.lr < math.inf, "a finite number above 0"),
            "batch_size": (self.batch_size >= 2, "2 or more"),
            "momentum": (0 < self.momentum < 1, "a number between 0 and 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a finite number from 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "a number from 0 below 1"),
            "warmup": (0 <= self.warmup < 1, "a share from 0 below 1"),
            "crop": (self.crop >= 0, "0 or more"),
            "threads": (self.threads >= 0, "0 or more"),
            "dtype": (self.dtype in CHOICES, " or ".join(CHOICES)),
        }
        for name, (fits, what) in allowed.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {what}")


def one_cycle(settings: TrainSettings, *, step: int, steps: int) -> float:
    """Learning rate of a step: a straight rise to the peak, then a half cosine to 0.

    After Smith and Topin, Super-Convergence (2018), with cosine annealing. A function of the step alone, so that a
    resumed training needs no scheduler.
    """
    rise = settings.warmup * steps
    if step < rise:
        return settings.lr * (step + 1) / (rise + 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))
