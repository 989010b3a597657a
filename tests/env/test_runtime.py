"""Runtime importance: pooled activations per image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from prune_env.pruning.graph import Group, LayerGraph, Slot
from prune_env.pruning.runtime import PooledActivation
from tests.env.graphs import traced
from tests.env.small_networks import NETWORKS, build, example


def test_pooled_activation_by_hand() -> None:
    # A 1x1 convolution doubles channel 0 and negates channel 1; the map means of |x| are what counts.
    network = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 1, 1)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, -1.0]])[:, :, None, None])
    both = np.arange(2)
    group = Group("0", 2, (Slot("0", "out", both, both),), (), (Slot("1", "in", both, both),))
    images = torch.tensor([[[[1.0, -1.0]], [[4.0, 0.0]]], [[[0.0, 0.0]], [[1.0, 1.0]]]])
    found = PooledActivation().collect(network, LayerGraph((group,), {}, (), {}), images)["0"]
    # Levels 2, 2 for the first image and 0, 1 for the second, over the largest.
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0], [0.0, 0.5]]))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_image_gives_one_share_per_channel_whatever_the_batch(name: str) -> None:
    network, graph = build(name), traced(name)
    images = example(120)
    found = PooledActivation().collect(network, graph, images)
    for group in graph.groups:
        level = found[group.name]
        assert level.shape == (120, group.channels)
        assert level.min() >= 0
        assert level.max() == 1
        alone = PooledActivation().collect(network, graph, images[:10])[group.name]
        torch.testing.assert_close(alone * level[:10].max(), level[:10], rtol=1e-4, atol=1e-5)
