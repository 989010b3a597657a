"""Merging sites: where a scaled copy of a channel can be merged away exactly, and where it says why not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from baselines.merging_sites import NOT_HOMOGENEOUS, absorb, filters, norm_of, positions, unmergeable
from baselines.neuron_merging import Merging, merge
from prune_env.pruning.graph import Group, LayerGraph
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace
from tests.env.graphs import traced
from tests.env.small_networks import NETWORKS, build, example

IMAGES = example(16, seed=5)


def copied(network: nn.Module, group: Group, scales: dict[str, float]) -> None:
    """Make every second channel of a group the one before, its tensors multiplied by factors of their own."""
    for slot in group.producers + group.carriers:
        module, order = network.get_submodule(slot.module), positions(slot, group.channels)[:, 0]
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor, kind = getattr(module, name, None), "norm_" if slot.role == "both" else ""
            if tensor is not None:
                axis = 1 if isinstance(module, nn.ConvTranspose2d) and name == "weight" else 0
                source = tensor.detach().index_select(axis, order[0 : group.channels // 2 * 2 : 2])
                value = scales.get(kind + name, 1.0) * source
                if kind + name == "norm_running_var" and "norm_running_var" in scales:
                    value += (scales["norm_running_var"] - 1) * module.eps
                tensor.detach().index_copy_(axis, order[1::2], value)


def halved(name: str, scales: dict[str, float]) -> tuple[nn.Module, LayerGraph, Plan]:
    """A small network with copied channels in every group that can be merged, and the plan without the copies."""
    network, graph = build(name), traced(name)
    keep = {}
    for group in graph.groups:
        if group.name not in unmergeable(network, graph, example()):
            copied(network, group, scales)
            keep[group.name] = tuple(range(0, group.channels, 2))
    return network, graph, Plan(keep)


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_copies_merge_without_any_change(name: str) -> None:
    # Through pooling, flatten, concatenation, gates and inside residual blocks.
    network, graph, plan = halved(name, {})
    small = cut(network, graph, plan)
    merge(network, small, graph, plan, settings=Merging())
    with torch.no_grad():
        wanted, merged, bare = network(IMAGES), small(IMAGES), cut(network, graph, plan)(IMAGES)
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)
    assert not plan.keep or (bare - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["chain", "residual", "shuffled", "paddedshortcut"])
def test_scaled_copies_merge_by_algebra_without_any_change(name: str) -> None:
    # Three times the weights, variance and mean to match, twice the gain and shift.
    scales = {"weight": 3.0, "bias": 3.0, "norm_weight": 2.0, "norm_bias": 2.0}
    network, graph, plan = halved(name, {**scales, "norm_running_mean": 3.0, "norm_running_var": 9.0})
    small = cut(network, graph, plan)
    merge(network, small, graph, plan, settings=Merging(formula="algebraic"))
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_bias_before_a_norm_counts_as_part_of_its_mean() -> None:
    network, graph = build("chain"), traced("chain")
    group = graph.group("body.0.0")
    conv, norm = network.body[0][0], network.body[0][1]
    torch.testing.assert_close(norm_of(network, group).mean.float(), norm.running_mean - conv.bias.detach())
    assert filters(network, group).shape == (8, 27)
    assert filters(network, graph.group("hidden")).shape == (10, 97)


def test_every_group_that_cannot_be_merged_says_why() -> None:
    reasons = {
        name: {group.name: found.get(group.name, "") for group in traced(name).groups}
        for name in NETWORKS
        for found in [unmergeable(build(name), traced(name), example())]
    }
    assert set(reasons["chain"].values()) == set(reasons["shuffled"].values()) == {""}
    assert reasons["residual"]["stem.0"].startswith("written by 3 layers (stem.0, one.1, two.1)")
    assert reasons["residual"]["one.0.0"] == reasons["residual"]["two.0.0"] == ""
    assert reasons["grouped"]["first.0"] == "a channel of it is several channels of first.0"
    assert reasons["grouped"]["mix.0"].startswith("passes through multiply.0 (Conv2d)")
    assert reasons["depthwise"]["expand.0"].startswith("written by 2 layers (expand.0, excite)")
    assert reasons["depthwise"]["squeeze"] == ""
    assert reasons["concatenated"]["c.0"] == "passes through 2 norms (c.1, norm)"
    assert reasons["transposed"]["down.0"].startswith("passes through down.1 (PReLU)")
    assert reasons["transposed"]["up"].endswith("parameter scale")
    assert reasons["normalised"]["up"] == reasons["attention"]["mlp.0"] == NOT_HOMOGENEOUS


class Between(nn.Module):
    """Two convolutions with something between them; `twice` also reads the first around its norm."""

    def __init__(self, *between: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Conv2d(3, 6, 3), nn.Sequential(*between), nn.Conv2d(6, 4, 1)
        self.around = nn.Conv2d(6, 4, 1) if twice else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.second(self.between(x))
        return y if self.around is None else torch.cat([y, self.around(torch.relu(x))], 1)


@pytest.mark.parametrize(
    "between",
    [
        (nn.ReLU(inplace=True),),
        (nn.LeakyReLU(0.1), nn.MaxPool2d(2)),
        (nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.5)),
        (nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        (nn.BatchNorm2d(6, affine=False), nn.ReLU()),
        (nn.ReLU(), nn.BatchNorm2d(6)),
        (),
    ],
)
def test_what_is_positively_homogeneous_merges(between: tuple[nn.Module, ...]) -> None:
    network = Between(*between).eval()
    assert unmergeable(network, trace(network, example()), example()) == {}


@pytest.mark.parametrize(
    "between",
    [(nn.GELU(),), (nn.ReLU6(),), (nn.Sigmoid(),), (nn.SiLU(),), (nn.BatchNorm2d(6), nn.Hardswish()), (nn.Softplus(),)],
)
def test_what_is_not_positively_homogeneous_does_not_merge(between: tuple[nn.Module, ...]) -> None:
    network = Between(*between).eval()
    assert unmergeable(network, trace(network, example()), example()) == {"first": NOT_HOMOGENEOUS}


def test_a_channel_read_on_both_sides_of_its_norm_does_not_merge() -> None:
    network = Between(nn.BatchNorm2d(6), nn.ReLU(), twice=True).eval()
    assert unmergeable(network, trace(network, example()), example()) == {"first": NOT_HOMOGENEOUS}


def test_a_norm_without_statistics_does_not_merge() -> None:
    network = Between(nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU()).eval()
    found = unmergeable(network, trace(network, example(4)), example(4))
    assert found == {"first": "the norm between.0 has no running statistics"}


def test_the_check_leaves_the_network_alone() -> None:
    network, graph = build("chain").train(), traced("chain")
    before = copy.deepcopy(network.state_dict())
    unmergeable(network, graph, example())
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_that_cannot_be_merged_stay_as_they_were_cut(name: str) -> None:
    network, graph = build(name), traced(name)
    leave = unmergeable(network, graph, example())
    plan = Plan({group.name: (0, 1) for group in graph.groups if group.name in leave})
    small, bare = cut(network, graph, plan), cut(network, graph, plan)
    merge(network, small, graph, plan, settings=Merging(), leave=leave)
    for key, value in bare.state_dict().items():
        assert torch.equal(small.state_dict()[key], value)


@pytest.mark.parametrize("name", ["chain", "residual", "concatenated"])
def test_the_full_plan_and_the_dense_network_are_left_alone(name: str) -> None:
    network, graph = build(name), traced(name)
    before = copy.deepcopy(network.state_dict())
    small = cut(network, graph, Plan.full(graph))
    leave = unmergeable(network, graph, example())
    merge(network, small, graph, Plan.full(graph), settings=Merging(), leave=leave)
    half = Plan({group.name: tuple(range(group.channels // 2)) for group in graph.groups})
    merge(network, cut(network, graph, half), graph, half, settings=Merging(), leave=leave)
    for key, value in before.items():
        assert torch.equal(network.state_dict()[key], value)
        assert torch.equal(small.state_dict()[key], value)


def test_absorbing_mixes_the_columns_of_each_consumer_as_z_says() -> None:
    # A concatenation: c.0 reads a at 0-5 and b at 6-9; b loses channels, so a's columns stay and b's move.
    network, graph = build("concatenated"), traced("concatenated")
    plan = Plan({"b.0": (1, 3), "a.0": (0, 2, 4)})
    mix = torch.rand(2, 4, generator=torch.Generator().manual_seed(0)).double()
    small = cut(network, graph, plan)
    absorb(network, small, graph, plan, {"b.0": mix})
    dense = network.c[0].weight.detach()
    torch.testing.assert_close(small.c[0].weight[:, 3:], torch.einsum("kc,ocij->okij", mix.float(), dense[:, 6:]))
    assert torch.equal(small.c[0].weight[:, :3], dense[:, [0, 2, 4]])
