"""Second moments: what is collected, what an error curve says, how channels are eliminated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from prune_env.pruning.consumer import consumers, oriented, windows
from prune_env.pruning.graph import Group, LayerGraph, Slot
from prune_env.pruning.moments import RIDGE, Moments
from prune_env.pruning.second_order import Reader, eliminate, nested_errors
from tests.env.graphs import traced
from tests.env.small_networks import NETWORKS, build, example


def slot(module: str, role: str, channels: int, *, positions: int = 1) -> Slot:
    return Slot(module, role, np.arange(channels * positions), np.repeat(np.arange(channels), positions))


def two_layers(first: nn.Module, second: nn.Module, *, positions: int = 1) -> tuple[nn.Module, LayerGraph]:
    """`first` writes one group that `second` reads."""
    channels = len(oriented(first))
    group = Group("0", channels, (slot("0", "out", channels),), (), (slot("1", "in", channels, positions=positions),))
    return nn.Sequential(first, second).eval(), LayerGraph((group,), {}, (), {})


def ridged(second: torch.Tensor) -> torch.Tensor:
    return second + RIDGE * second.diagonal().mean() * torch.eye(len(second))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(3, 4, 3, padding="same", dilation=2, padding_mode="reflect"),
        nn.Conv2d(3, 4, 1, stride=2),
        nn.Conv3d(3, 4, 2, padding=1),
    ],
)
def test_windows_times_weights_are_the_outputs_of_any_convolution(layer: nn.Module) -> None:
    x = torch.randn(2, 3, *[7] * (layer.weight.dim() - 2))
    read = windows(layer, x, limit=10**6, generator=torch.Generator())
    found = torch.einsum("npct,oct->nop", read, layer.weight.flatten(2)) + layer.bias[:, None]
    torch.testing.assert_close(found, layer(x).flatten(2), rtol=1e-4, atol=1e-5)


def test_without_a_bias_the_moment_is_uncentred_and_with_one_it_is_centred() -> None:
    x = torch.randn(50, 3) + 1
    for bias, mean in ((False, torch.zeros(2)), (True, None)):
        network, graph = two_layers(nn.Linear(3, 2), nn.Linear(2, 4, bias=bias))
        read = network[0](x).detach()
        about = read - (read.mean(0) if mean is None else mean)
        found = Moments.collect(network, graph, x)
        torch.testing.assert_close(found.second["1"], ridged(about.T @ about / 50), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mean["1"], read.mean(0), rtol=1e-4, atol=1e-5)


def test_channels_are_mixed_where_the_window_is_too_wide() -> None:
    network, graph = two_layers(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, bias=False))
    x = torch.randn(6, 3, 5, 5)
    read = network[0](x).detach().transpose(0, 1).flatten(1)
    found = Moments.collect(network, graph, x, max_width=35)
    assert (found.consumers["1"].window, found.consumers["1"].width) == (False, 4)
    torch.testing.assert_close(found.second["1"], ridged(read @ read.T / read.shape[1]), rtol=1e-4, atol=1e-5)
    assert Moments.collect(network, graph, x, max_width=36).consumers["1"].window


def test_a_flattened_map_too_wide_for_its_features_is_read_as_channels() -> None:
    class Flattened(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](self[0](x).flatten(1))

    network, graph = two_layers(nn.Conv2d(3, 4, 1), nn.Linear(4 * 25, 5, bias=False), positions=25)
    network = Flattened(*network)
    x = torch.randn(6, 3, 5, 5)
    read = network[0](x).detach().transpose(0, 1).flatten(1)
    found = Moments.collect(network, graph, x, max_width=99)
    assert (found.consumers["1"].channels, found.consumers["1"].taps) == (4, 25)
    torch.testing.assert_close(found.second["1"], ridged(read @ read.T / read.shape[1]), rtol=1e-4, atol=1e-5)


def test_a_norm_is_found_only_directly_behind_its_layer() -> None:
    class Acts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))
            self.one, self.two, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.two(self.relu(self.second(self.one(self.first(x))))))

    names = ("first", "second", "third")
    group = Group("first", 3, (), (), tuple(slot(name, "in", 3) for name in names))
    found = consumers(Acts().eval(), (group,), torch.randn(2, 3, 4, 4))
    assert {name: consumer.norm for name, consumer in found.items()} == {"first": "one", "second": None, "third": None}


@pytest.mark.parametrize("name", NETWORKS)
def test_collecting_leaves_the_network_as_it_was(name: str) -> None:
    network, graph = build(name), traced(name)
    next(network.children()).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    one, two = (Moments.collect(network, graph, example(8), batch_size=4) for _ in range(2))
    assert modes == [module.training for module in network.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(state, torch.get_rng_state())
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    assert one.second
    for key, value in one.second.items():
        assert torch.equal(value, two.second[key])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("max_width", [0, 2304])
def test_an_error_curve_falls_from_at_most_one_to_zero(name: str, max_width: int) -> None:
    network, graph = build(name), traced(name)
    moments = Moments.collect(network, graph, example(40), max_width=max_width)
    for group in graph.groups:
        scores = torch.randn(group.channels)
        curve = moments.error_curve(network, group, scores=scores)
        assert curve.shape == (group.channels + 1,)
        assert curve[-1] == 0
        assert 0 < curve[0] <= 1 + 1e-12
        assert (np.diff(curve) <= 0).all()
        assert moments.error_curve(network, group, scores=scores, points=5)[[0, -1]].tolist() == curve[[0, -1]].tolist()


def test_nested_errors_are_those_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 9, generator=generator, dtype=torch.float64) @ torch.randn(9, 9, generator=generator).double()
    weights = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    owner = np.array([0, 0, -1, 1, 1, 2, 2, -1, 3])
    order = np.array([2, 0, 3, 1])
    errors = nested_errors(weights, x.T @ x / 400, owner, order)
    wanted = x @ weights.T
    for count in range(5):
        kept = np.flatnonzero(np.isin(owner, [-1, *order[:count]]))
        solution = torch.linalg.lstsq(x[:, kept], wanted).solution
        residual = (x[:, kept] @ solution - wanted).square().sum() / wanted.square().sum()
        assert errors[count] == pytest.approx(float(residual), abs=1e-9)


def test_elimination_of_three_independent_channels_by_hand() -> None:
    # Outputs are 3 a + 1 b + 2 c with variances 1, 4, 1: energies 9, 4, 4; of the equals the higher index goes first.
    weights, second = torch.tensor([[3.0, 1.0, 2.0]]).double(), torch.diag(torch.tensor([1.0, 4.0, 1.0])).double()
    score = eliminate([Reader.of(weights, second, np.arange(3))], 3)
    torch.testing.assert_close(score, torch.tensor([17.0, 8.0, 4.0]).double() / 17)


def test_of_two_equal_channels_one_is_free_and_the_other_then_carries_both() -> None:
    # b repeats a: without it a takes over its weight, 1 + 1, and its loss then costs 4; c costs 2.25 on its own.
    weights = torch.tensor([[1.0, 1.0, 1.5]]).double()
    second = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double() + 1e-9 * torch.eye(3)
    score = eliminate([Reader.of(weights, second, np.arange(3))], 3)
    torch.testing.assert_close(score, torch.tensor([6.25, 0.0, 2.25]).double() / 6.25, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_curve_in_the_order_of_elimination_is_the_score(name: str) -> None:
    network, graph = build(name), traced(name)
    moments = Moments.collect(network, graph, example(60))
    for group in graph.groups:
        score = moments.second_order(network, group)
        curve = moments.error_curve(network, group, scores=score)
        np.testing.assert_allclose(curve[:-1], score.sort(descending=True).values, rtol=1e-4, atol=1e-6)


def test_a_group_without_moments_has_a_straight_curve_and_no_second_order_score() -> None:
    network, graph = two_layers(nn.Linear(3, 4), nn.Linear(4, 2))
    moments = Moments({}, {}, {})
    np.testing.assert_allclose(
        moments.error_curve(network, graph.groups[0], scores=torch.ones(4)), [1, 0.75, 0.5, 0.25, 0]
    )
    with pytest.raises(ValueError, match="'0'"):
        moments.second_order(network, graph.groups[0])


def test_positions_are_drawn_without_bias() -> None:
    layer = nn.Conv2d(2, 1, 3, padding=1)
    x = torch.randn(64, 2, 12, 12)
    every = functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([windows(layer, x, limit=16, generator=generator).flatten(0, 1).flatten(1) for _ in range(40)])
    torch.testing.assert_close(drawn.square().mean(0), every.square().mean(0), rtol=0.2, atol=0)
