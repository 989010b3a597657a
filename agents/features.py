"""Feature extractor for a flat Dict of Boxes: every field, flattened, centred and joined."""

from __future__ import annotations

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor


class JoinedFields(BaseFeaturesExtractor):
    """All fields of an observation as one vector, moved from [0, 1] to [-1, 1].

    It has no parameters: the fields are already normalised by the environment, and a search has few samples.
    """

    def __init__(self, observation_space: spaces.Space) -> None:
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(f"a flat Dict of Boxes is allowed as observation space, not {observation_space}")
        super().__init__(observation_space, features_dim=sum(spaces.flatdim(s) for s in observation_space.values()))
        self.fields = tuple(observation_space.spaces)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Join a batch, `{field: [n, ...]}` to `[n, features]`."""
        return torch.cat([observations[name].flatten(1) for name in self.fields], dim=1) * 2.0 - 1.0
