"""Candidate scores by hand, on networks small enough for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lasting import proxies
from benchmarks.lasting.errors import error_sums
from benchmarks.lasting.proxies import PROXIES, ZEN_DRAWS, ZEN_MIX, zen
from benchmarks.lasting.quality import quality
from benchmarks.lasting.short import Short, extrapolated, power_law
from prune_env.envs.widths import widths
from tests.env import small_networks
from tests.env.problems import chain

NOTHING = torch.zeros(1, dtype=torch.int64)


class Functional(nn.Module):
    """Two rectified values, by a function and not by a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)


def linear(*rows: list[float]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return layer


@pytest.fixture
def classifier() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Logits (log 3, 0), so probabilities (3/4, 1/4), for one image of the first class."""
    return linear([math.log(3), 5.0], [0.0, 7.0]), torch.tensor([[1.0, 0.0]]), NOTHING


def test_gradient_norm_by_hand(classifier):
    # dL/dz = (-1/4, 1/4)
    assert proxies.gradient_norm(*classifier) == pytest.approx(math.sqrt(2) / 4)


def test_snip_by_hand(classifier):
    assert proxies.snip(*classifier) == pytest.approx(math.log(3) / 4)


def test_grasp_by_hand(classifier):
    # H = 3/16 ((1, -1), (-1, 1)), so H g = 3/16 (-1/2, 1/2), and only the weight log 3 meets it.
    assert proxies.grasp(*classifier) == pytest.approx(3 / 32 * math.log(3))


def test_synflow_by_hand():
    network = nn.Sequential(linear([1.0, -2.0], [3.0, 4.0]), nn.ReLU(), linear([1.0, -1.0]))
    # All ones become (3, 7), then 10; each of two layers has a flow of 10.
    assert proxies.synflow(network.eval(), torch.zeros(1, 2), NOTHING) == pytest.approx(math.log(20))


def test_synflow_sees_the_scale_of_a_norm_but_no_shift():
    norm = nn.BatchNorm1d(1, eps=0.0)
    norm.weight.data, norm.bias.data = torch.tensor([-3.0]), torch.tensor([11.0])
    norm.running_var, norm.running_mean = torch.tensor([4.0]), torch.tensor([7.0])
    network = nn.Sequential(linear([2.0]), norm).eval()
    assert proxies.synflow(network, torch.zeros(1, 1), NOTHING) == pytest.approx(math.log(2 * 3 / 2))


@pytest.mark.parametrize("rectify", [nn.ReLU(), nn.ReLU(inplace=True), Functional()], ids=repr)
def test_naswot_by_hand(rectify: nn.Module):
    network = nn.Sequential(linear([1.0, 0.0], [0.0, 1.0]), rectify)
    images = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    # Codes (1, 0) and (1, 1) agree in one of two places: K = ((2, 1), (1, 2)).
    assert proxies.naswot(network, images, NOTHING) == pytest.approx(math.log(3))


def test_jacobian_covariance_by_hand():
    # All Jacobians of a linear network are the same: two images have correlations of eigenvalues 2 and 0.
    images, k = torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 1.0]]), proxies.EPSILON
    expected = -(math.log(2 + k) + 1 / (2 + k) + math.log(k) + 1 / k)
    assert proxies.jacobian_covariance(linear([1.0, -2.0, 4.0]), images, NOTHING) == pytest.approx(expected)


def by_hand(shape: tuple[int, ...], score: Callable[..., float]) -> float:
    """Mean score of as many draws of one weight, an input and a disturbance."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(ZEN_DRAWS):
        weight = torch.randn(1, 1, 1, 1, generator=generator)
        x, e = (torch.randn(shape, generator=generator) for _ in range(2))
        drawn.append(score(weight * x, weight * (x + ZEN_MIX * e)))
    return sum(drawn) / ZEN_DRAWS


def test_zen_by_hand():
    def score(one: torch.Tensor, other: torch.Tensor) -> float:
        return math.log((one.relu() - other.relu()).flatten(1).norm(dim=1).mean())

    images = torch.zeros(3, 1, 2, 2)
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU())
    assert zen(network, images, NOTHING) == pytest.approx(by_hand(images.shape, score), rel=1e-4)


def test_zen_gives_back_the_scale_that_a_norm_takes_away():
    def score(one: torch.Tensor, other: torch.Tensor) -> float:
        first, second = ((x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in (one, other))
        apart = (first.relu() - second.relu()).flatten(1).norm(dim=1).mean()
        return math.log(apart) + 0.5 * math.log(one.var(correction=0))

    images = torch.zeros(3, 1, 2, 2)
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU()).eval()
    assert zen(network, images, NOTHING) == pytest.approx(by_hand(images.shape, score), rel=1e-3)


@pytest.mark.parametrize("name", PROXIES)
def test_proxies_leave_the_network_and_the_random_state_as_they_are(name: str):
    network, images = small_networks.build("residual").requires_grad_(True), small_networks.example(6)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    random = torch.get_rng_state()
    labels = torch.arange(6) % 5
    value = PROXIES[name](network, images, labels)
    assert math.isfinite(value)
    assert PROXIES[name](network, images, labels) == value
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_quality_by_hand():
    images, labels = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 2])
    found = quality(linear([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]), images, labels)
    losses = [math.log(math.e**2 + math.e + 1) - 2, math.log(1 + math.e**3 + math.e) - 1]
    assert found == pytest.approx({"accuracy": 0.5, "neg_loss": -sum(losses) / 2, "margin": (1 - 2) / 2})


def test_widths_by_hand():
    # params = 3 a + a b + b c + c d + 5 d, macs twice that; the group of 6 is not decided.
    found = widths(chain([4, 6, 8, 8]), (0, 2, 3), np.array([2, 4, 8]))
    dense = 12 + 24 + 48 + 64 + 40
    assert found == pytest.approx({
        "mean_keep": 2 / 3, "min_keep": 0.5, "min_channels": 2, "log_widths": math.log(64),
        "log_params": math.log(6 + 12 + 24 + 32 + 40), "tilt": 0.5,
        "macs_early": (6 + 12) / dense, "macs_middle": (24 + 32) / dense, "macs_late": (32 + 40) / dense,
    })  # fmt: skip


def test_error_sums_by_hand():
    curves = [np.array([0.5, 0.25, 0.0]), np.array([0.75, 0.0])]
    assert error_sums(curves, [1, 0]) == {"neg_sum": -1.0, "neg_max": -0.75}


def test_a_power_law_is_found_and_followed():
    curve = {10: 0.4, 20: 0.2, 40: 0.1}
    assert power_law(curve) == pytest.approx((4.0, 1.0))
    assert extrapolated(curve, at=80) == pytest.approx({"slope": 1.0, "promise": -0.05})


def test_short_trainings_are_written_as_steps_at_rate():
    assert Short.parse("20@.05") == Short(20, 0.05)
    assert Short.parse(Short(300, 0.02).name) == Short(300, 0.02)


@pytest.mark.parametrize("text", ["20", "@.1", "0@.1", "20@0", "20@x", "20@nan"])
def test_any_other_short_training_is_refused(text: str):
    with pytest.raises(ValueError, match=r"short is .*; allowed is STEPS@LR"):
        Short.parse(text)
