"""Methods that train before they prune, on the zoo: all laws hold after `prepare`, or the network is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from baselines import METHODS, channel_gating, preparation, prune, scop_learning
from baselines.method import unprepared
from prune_env.pruning.measure import count_macs
from prune_env.pruning.plan import Plan
from prune_env.pruning.tracing import trace
from prune_env.tasks.images import ArrayImages, Split
from prune_env.tasks.networks import make_network
from prune_env.tasks.normalisation import parse
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainSettings, train
from tests.contracts import (
    counted_cost_is_the_closed_form,
    cut_agrees_with_masked,
    full_plan_is_the_identity,
    keeping_more_never_lowers_cost,
    random_plan,
)
from tests.methods.own_tasks import own_task

TRAINED = [name for name, method in METHODS.items() if method.prepare is not unprepared]
PLAIN: dict[str, Any] = {"recalibrate": False, "refit": False, "calibration_images": 8}
SHAPES = {
    "cnn": (1, 8),
    "resnet20": (3, 16),
    "lenet300100": (1, 28),
    "m-cifarnet": (3, 32),
    "vgg16_bn": (3, 32),
    "wrn-40-4": (3, 16),
}
"""Network -> channels and side of its images."""
FAST = ("cnn", "lenet300100")
REFUSED = {
    ("lenet300100", "polarization"): r"no prunable group passes through a BatchNorm with a scale \(ip1: no norm",
    ("lenet300100", "slimming"): r"no prunable group passes through a BatchNorm with a scale \(ip1: no norm",
    ("lenet300100", "channel_gating_surrogate"): "the network has no convolution that channel gating supports",
}
"""(Network, method) -> why it is refused."""


@pytest.fixture(autouse=True)
def one_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a network was trained is nothing that the laws depend on."""

    def short(network: nn.Module, split: Split, *, settings: TrainSettings, **options: Any) -> object:
        return train(network, split, settings=replace(settings, epochs=1), **options)

    for module in (preparation, scop_learning, channel_gating):
        monkeypatch.setattr(module, "train", short)


def zoo_task(network: str, root: Path) -> Task:
    """Eight random images of five classes."""
    channels, side = SHAPES[network]
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, channels, side, side), generator=draw, dtype=torch.uint8)
    images = Split(ArrayImages(pixels), torch.arange(8), torch.arange(8) % 5, 5, parse("half", channels=channels))
    return Task(
        name=f"own-{network}",
        network=make_network(network, classes=5, channels=channels, side=side).eval(),
        example=images.take(1)[0],
        **{name: images for name in ("train", "search", "test")},
        classes=5,
        normalise=images.normalise,
        seed=0,
        data="own",
        network_name=network,
        weights=None,
        settings={"root": str(root)},
    )


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize(
    "network", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SHAPES if name not in FAST)]
)
def test_all_laws_hold_after_prepare_or_the_network_is_refused_with_the_reason(
    network: str, method: str, tmp_path: Path
) -> None:
    task, rng = zoo_task(network, tmp_path), np.random.default_rng(0)
    if (network, method) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[network, method]) as caught:
            prune(method, task, budget=0.5, **PLAIN)
        assert "\n" not in str(caught.value)
        return
    prepared, images = METHODS[method].prepare(task, 0, None), task.train.take(4)[0]
    graph = trace(prepared.network, task.example)
    plan = random_plan(graph, rng)
    for law in (cut_agrees_with_masked, counted_cost_is_the_closed_form):
        law(prepared.network, graph, images, plan)
    full_plan_is_the_identity(prepared.network, graph, images)
    keeping_more_never_lowers_cost(graph, rng)
    result = prune(method, task, budget=0.5, **PLAIN)
    assert count_macs(result.network, task.example) == result.search.macs <= 0.5 * graph.macs(Plan({}))
    cut_agrees_with_masked(prepared.network, graph, images, result.plan)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_that_trains_says_for_how_many_epochs(method: str) -> None:
    trains = METHODS[method].prepare is not unprepared
    assert (METHODS[method].epochs(own_task("residual")) > 0) == trains
