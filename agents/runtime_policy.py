"""The core paper's policies for SB3: an encoder per layer, recurrence over layers, means that start at the budget."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentMultiInputActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.nn import functional

PER_LAYER = ("pooled", "runtime_importance", "static_importance")
"""Fields whose entries mean something else in every layer: each layer has its own encoder for them."""

WIDTH = 128
"""Units of the encoders and of the recurrent layer, as in the official code."""

LEAST = 0.1
"""Shares that the mean is kept in: [.1, 1], as in the official code."""


class LayerEncoders(BaseFeaturesExtractor):
    """`Linear(., 128) - ReLU` of its own for each layer, then the fields that all layers share.

    Core paper, section 3.3 and its official code (there the budget alone is joined; here also what was spent, the
    previous share and the layer's shape).
    """

    def __init__(self, observation_space: spaces.Space, width: int = WIDTH) -> None:
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(f"a flat Dict of Boxes is allowed as observation space, not {observation_space}")
        sizes = {name: spaces.flatdim(space) for name, space in observation_space.items()}
        self_fields = [name for name in PER_LAYER if name in sizes]
        shared = [name for name in sizes if name not in self_fields and name != "index"]
        super().__init__(observation_space, features_dim=width + sum(sizes[name] for name in shared))
        self.own, self.shared, self.width, layers = self_fields, shared, width, sizes["index"]
        self.encoders = nn.ModuleList(
            [nn.Linear(sum(sizes[name] for name in self_fields), width) for _ in range(layers)]
        )

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Encode a batch, `{field: [n, ...]}` to `[n, features]`."""
        own = torch.cat([observations[name] for name in self.own], dim=1)
        index = observations["index"].argmax(1)
        hidden = own.new_zeros(len(own), self.width)
        for at in index.unique().tolist():
            rows = index == at
            if rows.all():
                hidden = self.encoders[at](own)
            else:
                hidden = hidden.masked_scatter(rows[:, None], self.encoders[at](own[rows]))
        return torch.cat([functional.relu(hidden), *(observations[name] for name in self.shared)], dim=1)


class BudgetPolicy(RecurrentMultiInputActorCriticPolicy):
    """Recurrent actor and critic on one LSTM, with the regulariser that keeps means in range.

    The regulariser (core paper, eq. 13; smooth L1 as in the official code) is a term of the loss, which SB3's PPO has
    no place for, except one: the entropy, whose coefficient is 0 in the paper. `evaluate_actions` hands out minus the
    regulariser as the entropy, so `ent_coef` is its weight. Deviation: an LSTM for both agents (official code: a plain
    RNN for the runtime agent).
    """

    features_extractor: LayerEncoders
    action_net: nn.Linear

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {
            "features_extractor_class": LayerEncoders,
            "net_arch": [],
            "lstm_hidden_size": WIDTH,
            "shared_lstm": True,
            "enable_critic_lstm": False,
            "normalize_images": False,
        }
        super().__init__(*args, **kwargs)

    def evaluate_actions(
        self, obs: dict[str, Tensor], actions: Tensor, lstm_states: RNNStates, episode_starts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, log probabilities, and minus the range regulariser of each sample."""
        features, (hidden, cell) = self.extract_features(obs), lstm_states.pi
        assert isinstance(features, Tensor)  # a pair where actor and critic do not share them
        latent, _ = self._process_sequence(features, (hidden, cell), episode_starts, self.lstm_actor)
        values = self.value_net(self.mlp_extractor.forward_critic(latent.detach()))
        distribution = self._get_action_dist_from_latent(self.mlp_extractor.forward_actor(latent))
        mean = obs["even"] + distribution.mode()
        outside = functional.smooth_l1_loss(mean, mean.detach().clamp(LEAST, 1.0), reduction="none").sum(1)
        return values, distribution.log_prob(actions), -outside
