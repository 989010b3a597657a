"""Short training: one cycle of a few steps, which shows sooner than a whole fine-tuning what a network is good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from prune_env.tasks.images import Split
from prune_env.tasks.training.hooks import Hook
from prune_env.tasks.training.loop import TrainReport, train
from prune_env.tasks.training.settings import TrainSettings


def train_steps(
    network: nn.Module,
    split: Split,
    *,
    steps: int,
    settings: TrainSettings,
    hooks: Sequence[Hook] = (),
    device: str | torch.device = "cpu",
) -> TrainReport:
    """Train a network in place for some steps of a one-cycle of their own, and leave it in eval mode on `device`.

    Every network sees the same images in the same order with the same augmentation, so that two of them differ by
    what they are and not by what they were shown.

    Args:
        network: What is trained.
        split: Training images; its first ones are taken, again from the start where the steps need more.
        steps: Optimiser steps. The learning rate is 0 at their end.
        settings: Everything else that decides the outcome; its `epochs` is not read.
        hooks: Called in order at each stage.
        device: Where to train.

    Raises:
        ValueError: No steps, or an empty split.
        TrainingDiverged: The loss became NaN or Inf; the network is as it was.
    """
    if steps < 1 or not len(split):
        raise ValueError(f"steps is {steps}, with {len(split)} training images; 1 or more of both is allowed")
    size = max(min(settings.batch_size, len(split)), 2)
    shown = split.at(torch.arange(steps * size) % len(split))
    return train(network, shown, settings=replace(settings, epochs=1, batch_size=size), hooks=hooks, device=device)
