"""Deployed networks for tests: gates that differ between inputs, what they choose, and networks of unusual layers."""

from __future__ import annotations

import copy
from functools import cache
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.subjects import random_policy
from prune_env.pruning.calibration import recalibrate
from prune_env.pruning.engine.anatomy import Choice
from prune_env.pruning.engine.deployed import DeployedNetwork, deploy
from prune_env.pruning.gating.fixed import FixedDecisions
from prune_env.pruning.gating.layer import RectifiedLinear
from prune_env.pruning.gating.network import GatedNetwork, attach
from prune_env.pruning.tracing import trace
from tests.env.gated_networks import trained
from tests.env.small_networks import example


class Kernels(nn.Module):
    """Sizes, strides and dilations of convolutions, biases without a norm, a window over the map, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Conv2d(3, 10, 5, padding=2)
        self.tall, self.norm = nn.Conv2d(10, 9, (3, 1), stride=(2, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(9)
        self.dilated = nn.Conv2d(9, 20, 3, padding=2, dilation=2)
        self.single = nn.Conv2d(20, 7, 1)
        self.strided = nn.Conv2d(7, 12, 2, stride=2)
        self.window, self.average, self.flat = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d((1, 2)), nn.Flatten()
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.tall(F.relu(self.large(x)))).relu_()
        x = F.dropout(self.window(torch.tanh(self.dilated(x))), 0.5, self.training)
        return self.head(self.flat(self.average(F.pad(self.strided(self.single(x).relu()), (0, 0)))))


class Wide(nn.Module):
    """More outputs than one block of a weight holds, in several tiles, with positions that fill no tile."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 70, 3, padding=1), nn.BatchNorm2d(70), nn.ReLU(),
            nn.Conv2d(70, 130, 3, bias=False), nn.BatchNorm2d(130), nn.ReLU(inplace=True), nn.Dropout(0.5),
            nn.Conv2d(130, 66, 2, bias=False), nn.BatchNorm2d(66), nn.ReLU(inplace=True), nn.Flatten(1),
            nn.Linear(66 * 25, 80), nn.ReLU(), nn.Linear(80, 5),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Flat(nn.Module):
    """Linear layers only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(192, 30), nn.Linear(30, 20), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x.flatten(1)).relu()).relu())


class Tokens(nn.Module):
    """A linear layer that runs on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.up, self.down = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 24), nn.Linear(24, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class InPlace(nn.Module):
    """It begins with an operation that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.ReLU(inplace=True)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(F.relu_(self.first(self.begin(x))))
        x += 1
        return self.head(F.adaptive_avg_pool2d(x.relu_(), 1).flatten(1))


class Stream(nn.Module):
    """A gated stem that a residual block's closed inside leaves alone, and a depthwise convolution behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.depthwise, self.last = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.outer(self.inner(x).relu())
        return self.head(self.last(self.depthwise(x)).relu().mean((2, 3)))


class Sequence(nn.Module):
    """One-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv1d(24, 16, 3), nn.BatchNorm1d(16), nn.Conv1d(16, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x.flatten(1, 2))).relu()
        return self.head(self.second(x).relu().mean(2))


class Padded(nn.Module):
    """Padding that the kernel does not know: by name, and by reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same")
        self.second = nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")
        self.third, self.head = nn.Conv2d(6, 8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.third(self.second(self.first(x).relu()).relu()).relu().mean((2, 3)))


class Branching(Flat):
    """The way through it depends on the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 1e9:
            x = x / 2
        return super().forward(x)


class TwoInputs(Flat):
    """A second input, which need not be given."""

    def forward(self, x: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if offset is None else x + offset)


class Named(Flat):
    """A layer is called by the name of its argument."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(input=self.two(self.one(x.flatten(1)).relu()).relu())


class Enclosed(nn.Module):
    """A gated layer inside a module of torch's own, which no tracer opens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, activation=F.silu, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class Paired(nn.Module):
    """A module that changes nothing hands on two maps at once."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(16, 5)
        self.kept = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x).relu()
        pair = self.kept((y, self.two(y).relu()))
        return self.head(torch.cat([pair[0].mean((2, 3)), pair[1].mean((2, 3))], dim=1))


NATIVE = {cls.__name__.lower(): cls for cls in (Kernels, Wide, Flat, Tokens, InPlace, Stream)}
"""Networks that the kernel runs."""

OTHERS = {cls.__name__.lower(): cls for cls in (Sequence, Padded, Branching, TwoInputs, Named, Enclosed, Paired)}
"""Networks that only torch's operations run."""


def inputs(count: int = 5, seed: int = 3) -> torch.Tensor:
    """Inputs whose means and deviations differ, 3x8x8."""
    generator = torch.Generator().manual_seed(seed)
    x = example(count, seed) * (0.5 + torch.rand(count, 1, 1, 1, generator=generator))
    return x + torch.randn(count, 3, 1, 1, generator=generator)


def lively(gated: GatedNetwork, seed: int = 0) -> GatedNetwork:
    """The network with gates that depend on the input: not every input has the same active channels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gated.layers:
            layer.gate.weight.normal_(generator=generator)
            layer.gate.weight /= (layer.predictor()[0] * layer.sight.running_var.sqrt()).norm(dim=1, keepdim=True)
            layer.shift += 0.3 * torch.randn(layer.shift.shape, generator=generator)
        for scores in gated.static.parameters():
            scores += 0.3 * torch.randn(scores.shape, generator=generator)
    recalibrate(gated, inputs(32), dtype=torch.float32)
    return gated


@cache
def gated_of(name: str) -> GatedNetwork:
    """A small network by name, with lively gates; input 3x8x8. Not to be changed."""
    if name not in NATIVE | OTHERS:
        return lively(trained(name))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = (NATIVE | OTHERS)[name]().eval()
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(norm.running_mean, -0.5, 0.5)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return lively(attach(network, trace(network, example()), example()))


def shares(gated: GatedNetwork, keep: float, trust: float, static: float | None = None) -> FixedDecisions:
    """The same shares in every layer."""
    layers = len(gated.names)
    return FixedDecisions((keep,) * layers, (keep if static is None else static,) * layers, trust=trust)


def deployed(name: str, keep: float = 0.5, trust: float = 1.0, *, agent: bool = False) -> DeployedNetwork:
    """A small network, deployed with the same shares everywhere, or with a random agent that moves away from them."""
    gated = gated_of(name)
    decide = shares(gated, keep, trust)
    return deploy(gated, decide, random_policy(gated, decide, even=keep, hidden=20) if agent else None)


def rectified(name: str) -> DeployedNetwork:
    """A network with gates that are never negative, as feature boosting and suppression has them."""
    gated = copy.deepcopy(gated_of(name))
    for layer in gated.layers:
        layer.gate = RectifiedLinear.of(layer.gate)
    return deploy(gated, shares(gated, 0.5, 1.0))


def choices(network: DeployedNetwork, x: torch.Tensor) -> list[torch.Tensor]:
    """The active channels `[sample, channel]` of each layer."""
    found, select = [], Choice.select

    def watched(self: Choice, *args: torch.Tensor) -> torch.Tensor:
        found.append(select(self, *args))
        return found[-1]

    with mock.patch.object(Choice, "select", watched):
        network.masked(x)
    return found


def one_by_one(network: DeployedNetwork, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and counts of inputs that run alone."""
    outputs, counts = zip(*(network.run(one) for one in x.split(1)), strict=True)
    return torch.cat(outputs), torch.cat(counts)


def assert_same(
    found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], tolerance: float = 1e-4
) -> None:
    """Equal counts, and outputs that differ by a small share of the largest one."""
    assert torch.equal(found[1], expected[1])
    assert expected[0].isfinite().all()
    assert (found[0] - expected[0]).abs().max() <= tolerance * expected[0].abs().max().clamp_min(1e-3)
