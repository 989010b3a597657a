"""Refit: the kept weights reproduce what the dense network computed, from moments or layer by layer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from prune_env.pruning.activations import watching
from prune_env.pruning.consumer import complement, oriented
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.moments import RIDGE, Moments
from prune_env.pruning.plan import Plan
from prune_env.pruning.sequential import sequential_refit
from prune_env.pruning.surgery import cut, dropped_axes, tensor_axes
from prune_env.pruning.tracing import trace
from tests.env.graphs import traced
from tests.env.small_networks import NETWORKS, build, example

IMAGES = example(64, seed=5)


def random_plan(graph: LayerGraph, seed: int) -> Plan:
    generator = np.random.default_rng(seed)
    return Plan({
        group.name: tuple(generator.permutation(group.channels)[: (group.channels + 1) // 2].tolist())
        for group in graph.groups
    })  # fmt: skip


def repaired(kind: str, network: nn.Module, graph: LayerGraph, plan: Plan, *, max_width: int = 2304) -> nn.Module:
    small = cut(network, graph, plan)
    if kind == "moments":
        moments = Moments.collect(network, graph, IMAGES, max_width=max_width, positions=64)
        moments.refit(network, small, graph, plan)
    else:
        sequential_refit(network, small, graph, plan, IMAGES, positions=64)
    return small


def duplicated(name: str, seed: int = 0) -> tuple[nn.Module, LayerGraph, Plan]:
    """A network in which every second channel of each group repeats the one before, and the plan without them."""
    network, graph = build(name, seed), traced(name)
    keep = {}
    for group in graph.groups:
        source = np.arange(group.channels) // 2 * 2
        keep[group.name] = tuple(sorted(set(source.tolist())))
        for slot in group.producers + group.carriers:
            _repeat(network, slot, source)
    return network, graph, Plan(keep)


def _repeat(network: nn.Module, slot: object, source: np.ndarray) -> None:
    order = np.argsort(slot.unit, kind="stable")
    index, unit = slot.index[order], slot.unit[order]
    first = np.searchsorted(unit, unit)
    copied = index[np.searchsorted(unit, source[unit]) + np.arange(len(unit)) - first]
    with torch.no_grad():
        if slot.role == "parameter":
            tensor = network.get_parameter(slot.module)
            tensor.index_copy_(
                slot.dim, torch.from_numpy(index), tensor.index_select(slot.dim, torch.from_numpy(copied))
            )
            return
        module = network.get_submodule(slot.module)
        for attribute, axis in tensor_axes(module, slot.role):
            tensor = getattr(module, attribute, None)
            if tensor is not None:
                values = tensor.index_select(axis, torch.from_numpy(copied))
                tensor.index_copy_(axis, torch.from_numpy(index), values)


@pytest.mark.parametrize("kind", ["moments", "sequential"])
@pytest.mark.parametrize("name", NETWORKS)
def test_channels_that_repeat_others_can_go_without_loss(name: str, kind: str) -> None:
    # Every kind of consumer: strided, flattened, concatenated, coupled, transposed, behind grouped layers.
    network, graph, plan = duplicated(name)
    small = repaired(kind, network, graph, plan)
    with torch.no_grad():
        wanted, found, before = network(IMAGES), small(IMAGES), cut(network, graph, plan)(IMAGES)
    scale = (wanted - wanted.mean(0)).square().sum()
    error, loss = (found - wanted).square().sum() / scale, (before - wanted).square().sum() / scale
    if name == "transposed" and kind == "sequential":
        assert error < loss
    else:
        assert error < min(1e-3, loss / 10)


@pytest.mark.parametrize("name", ["chain", "residual", "concatenated", "depthwise", "transposed"])
def test_mixing_channels_also_replaces_repeated_ones(name: str) -> None:
    network, graph, plan = duplicated(name)
    small = repaired("moments", network, graph, plan, max_width=0)
    with torch.no_grad():
        wanted, found = network(IMAGES), small(IMAGES)
    assert (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum() < 1e-2


@pytest.mark.parametrize("kind", ["moments", "sequential"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_full_plan_is_left_alone(name: str, kind: str) -> None:
    network, graph = build(name), traced(name)
    small = repaired(kind, network, graph, Plan.full(graph))
    for key, value in network.state_dict().items():
        assert torch.equal(value, small.state_dict()[key])


@pytest.mark.parametrize("name", ["chain", "residual", "concatenated", "transposed"])
def test_the_dense_network_is_left_alone(name: str) -> None:
    network = build(name)
    before = copy.deepcopy(network.state_dict())
    graph = trace(network, example())
    for kind in ("moments", "sequential"):
        repaired(kind, network, graph, random_plan(graph, 0))
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", NETWORKS)
def test_windows_are_solved_by_least_squares_on_the_dense_inputs(name: str) -> None:
    network, graph = build(name), traced(name)
    plan = random_plan(graph, 1)
    moments = Moments.collect(network, graph, IMAGES, positions=64)
    small = cut(network, graph, plan)
    moments.refit(network, small, graph, plan)
    dropped = dropped_axes(graph, plan)
    read: dict[str, list[torch.Tensor]] = {consumer: [] for consumer in moments.consumers}

    def observe(module: str, layer: nn.Module, x: torch.Tensor) -> None:
        samples = moments.consumers[module].samples(layer, x, limit=64, generator=torch.Generator())
        read[module].append(samples.double())

    with watching(network, read, observe), torch.no_grad():
        network(IMAGES)
    checked = 0
    for (module, role), (_, positions) in dropped.items():
        if role != "in" or not moments.consumers[module].window:
            continue
        consumer, x = moments.consumers[module], torch.cat(read[module])
        outputs = dropped.get((module, "out"), (0, np.empty(0, dtype=np.int64)))[1]
        dense = oriented(network.get_submodule(module))
        weight = consumer.matrix(dense[complement(outputs, len(dense))]).double()
        if consumer.shifts(network):
            x = x - x.mean(0)
        # The ridge as noise: rows that add it to both sides of the least squares problem.
        noise = (RIDGE * x.square().mean(0).mean() * len(x)).sqrt() * torch.eye(x.shape[1]).double()
        x = torch.cat([x, noise])
        kept = complement(consumer.columns(positions), consumer.width)
        solution = torch.linalg.lstsq(x[:, kept], x @ weight.T, driver="gelsd").solution.T
        found = consumer.matrix(oriented(small.get_submodule(module)))
        torch.testing.assert_close(found, solution.float(), rtol=1e-2, atol=2e-3)
        checked += 1
    assert checked or name == "transposed"


def test_the_mean_output_moves_into_the_bias_or_the_norm_behind() -> None:
    network, graph = build("residual"), traced("residual")
    moments = Moments.collect(network, graph, IMAGES, positions=64)
    assert moments.consumers["one.1"].norm is None
    assert moments.consumers["one.0.0"].norm == "one.0.1"
    assert moments.consumers["one.1"].shifts(network)


def test_a_running_mean_serves_as_the_bias_of_a_layer_without_one() -> None:
    class Normed(nn.Sequential):
        pass

    torch.manual_seed(1)
    network = Normed(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ).eval()
    graph = trace(network, example())
    plan = Plan({"0": (0, 1, 2)})
    small = repaired("moments", network, graph, plan)
    with torch.no_grad():
        wanted, found = network[:4](IMAGES), small[:4](IMAGES)
        bare = cut(network, graph, plan)[:4](IMAGES)
    torch.testing.assert_close(found.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=0, atol=1e-4)
    assert (bare.mean((0, 2, 3)) - wanted.mean((0, 2, 3))).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_layer_by_layer_sees_the_errors_of_earlier_layers(seed: int) -> None:
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(5)]
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), *layers, nn.Linear(12, 3)).eval()
    graph = trace(network, example())
    plan = random_plan(graph, seed)
    moments, sequential = (repaired(kind, network, graph, plan) for kind in ("moments", "sequential"))
    with torch.no_grad():
        wanted = network(IMAGES)
        errors = [(small(IMAGES) - wanted).square().sum() for small in (sequential, moments, cut(network, graph, plan))]
    assert errors == sorted(errors)


def test_frozen_parameters_and_training_mode_survive_a_refit() -> None:
    network = build("chain").requires_grad_(False).train()
    graph = traced("chain")
    for kind in ("moments", "sequential"):
        small = repaired(kind, network, graph, random_plan(graph, 0))
        assert all(module.training for module in small.modules())
        assert not any(parameter.requires_grad for parameter in small.parameters())
