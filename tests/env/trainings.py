"""Trainings of the small digits network: its images, its settings, and how two states compare."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from prune_env.tasks.datasets import load_splits
from prune_env.tasks.dense import recipe
from prune_env.tasks.images import Split
from prune_env.tasks.training import TrainSettings


@cache
def training_split() -> Split:
    """The few images that it is trained on."""
    return load_splits("digits", seed=0, search_size=1000).train


def settings(**changes: Any) -> TrainSettings:
    return recipe("digits", "cnn", seed=0, **{"epochs": 3, **changes})


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
