"""Which groups may carry a gate: what attaching accepts, refuses with a reason, and leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prune_env.pruning.gating import network as gating
from prune_env.pruning.gating.network import attach
from prune_env.pruning.tracing import trace
from tests.env import small_networks
from tests.env.gated_networks import GATEABLE, build, graph_of
from tests.env.small_networks import example


class Between(nn.Module):
    """A residual branch with something between its two convolutions; its last norm may start at zero."""

    def __init__(self, between: nn.Module, last: float = 1.0) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Conv2d(3, 6, 3, padding=1), between, nn.Conv2d(6, 3, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 5)
        nn.init.constant_(self.norm.weight, last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.norm(self.second(self.between(self.first(x))))).mean((2, 3)))


class Scale(nn.Module):
    """A bare parameter per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).relu()


class Twice(Between):
    """The first convolution runs twice for an input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.second((self.first(x) + self.first(x.flip(3))).relu())).mean((2, 3)))


class Windows(Between):
    """Quarters of an image pass as images of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return self.head(self.second(self.first(windows).relu()).mean((2, 3)).unflatten(0, (-1, 4)).mean(1))


def refusal(network: nn.Module) -> str:
    """Why the group between the two convolutions has no gate."""
    network.eval()
    with pytest.raises(ValueError, match=r"^the network has no layer that can carry a gate \(.+\)$") as error:
        attach(network, trace(network, example()), example())
    return str(error.value)


@pytest.mark.parametrize(
    "between", [nn.ReLU(), nn.GELU(), nn.Hardswish(), nn.Dropout2d(), nn.Sequential(nn.BatchNorm2d(6), nn.SiLU())]
)
def test_what_is_zero_at_zero_may_follow_a_gate(between: nn.Module) -> None:
    network = Between(between).eval()
    assert attach(network, trace(network, example()), example()).names == ("first",)


@pytest.mark.parametrize("last", [1.0, 0.0])
@pytest.mark.parametrize("between", [nn.Sigmoid(), nn.Softplus(), nn.Sequential(nn.BatchNorm2d(6), nn.Sigmoid())])
def test_what_is_not_zero_at_zero_is_found_even_behind_a_dead_norm(between: nn.Module, last: float) -> None:
    # A residual branch that starts at zero shows nothing of itself in the output.
    assert "does not stay zero up to its consumers" in refusal(Between(between, last))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Between(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6))), "with all channels active its gate changes the output"),
        (Between(nn.BatchNorm2d(6, track_running_stats=False)), "a BatchNorm2d lies on its way; only a BatchNorm with"),
        (Between(Scale()), "a bare parameter lies on its way"),
        (Between(nn.PReLU(6)), "a PReLU lies on its way"),
        (Between(nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6))), "more than one layer lies between"),
        (Twice(nn.ReLU()), "does not run exactly once for an input"),
        (Windows(nn.ReLU()), "does not run exactly once for an input"),
    ],
)
def test_a_group_that_cannot_carry_a_gate_says_why(network: nn.Module, reason: str) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    assert reason in refusal(network)


@pytest.mark.parametrize("name", sorted(set(small_networks.NETWORKS) - set(GATEABLE)))
def test_a_network_without_a_gateable_layer_is_refused_in_one_line(name: str) -> None:
    assert "\n" not in refusal(build(name))


def test_every_group_has_a_gate_or_a_reason_and_what_is_accepted_is_accepted_together(monkeypatch) -> None:
    """Each gate passes alone; two of them do not pass together. The later one gives way."""

    def disagreement(network, graph, names, example):
        return "not beside the other" if {"first.0", "fourth.0"} <= set(names) else None

    monkeypatch.setattr(gating, "_disagreement", disagreement)
    gated = attach(build("shuffled"), graph_of("shuffled"), example())
    assert gated.names == ("first.0", "second.0")
    assert gated.skipped == {"fourth.0": "not beside the other"}


@pytest.mark.parametrize("static", ["vector", "filters"])
def test_attaching_leaves_network_and_random_state_alone(static: str) -> None:
    network = build("chain").train()
    network.body[0][1].eval()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    attach(network, graph_of("chain"), example(), static=static)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training
    assert not network.body[0][1].training


def test_an_unknown_static_importance_names_the_closest() -> None:
    with pytest.raises(ValueError, match=r"'vectr' is unknown; did you mean 'vector'\? allowed: vector, filters"):
        attach(build("chain"), graph_of("chain"), example(), static="vectr")
