"""Tracing: which channels share a group, what stays whole and why, and the closed forms of the cost."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from prune_env.pruning.graph import Group, LayerGraph
from prune_env.pruning.measure import count_macs, count_params
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace
from tests.env.small_networks import NETWORKS, build, example


def _shape(graph: LayerGraph) -> dict[str, int]:
    return {group.name: group.channels for group in graph.groups}


def _modules(group: Group) -> tuple[list[str], list[str], list[str]]:
    return tuple([slot.module for slot in slots] for slots in (group.producers, group.carriers, group.consumers))


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("chain", {"body.0.0": 8, "body.2.0": 6, "hidden": 10}),
        ("residual", {"stem.0": 8, "one.0.0": 6, "two.0.0": 4}),
        ("paddedshortcut", {"conv1.0": 6}),
        ("grouped", {"first.0": 4, "mix.0": 5}),
        ("depthwise", {"stem.0": 6, "expand.0": 12, "squeeze": 4}),
        ("concatenated", {"a.0": 6, "b.0": 4, "c.0": 5}),
        ("split", {"left.0": 6}),
        ("shuffled", {"first.0": 8, "second.0": 6, "fourth.0": 4}),
        ("normalised", {"first": 4, "up": 12}),
        ("transposed", {"down.0": 8, "up": 6}),
        ("attention", {"mlp.0": 16}),
        ("spatialattention", {"first.0": 10, "second.0": 6}),
    ],
)
def test_groups_are_the_ones_a_reader_expects(name: str, groups: dict[str, int]) -> None:
    assert _shape(trace(build(name), example())) == groups


def test_a_residual_stream_couples_its_producers_and_consumers() -> None:
    group = trace(build("residual"), example()).group("stem.0")
    assert _modules(group) == (["stem.0", "one.1", "two.1"], ["stem.1"], ["one.0.0", "two.0.0", "head"])


def test_squeeze_and_excitation_belongs_to_the_depthwise_group() -> None:
    group = trace(build("depthwise"), example()).group("expand.0")
    assert _modules(group)[0] == ["expand.0", "excite"]
    assert set(_modules(group)[1]) == {"expand.1", "depthwise.0", "depthwise.1"}
    assert set(_modules(group)[2]) == {"squeeze", "project.0"}


def test_a_flatten_gives_each_channel_all_of_its_positions() -> None:
    slot = trace(build("chain"), example()).group("body.2.0").consumers[0]
    assert slot.module == "hidden"
    np.testing.assert_array_equal(slot.unit, np.repeat(np.arange(6), 16))


def test_a_concatenation_gives_an_offset() -> None:
    slots = {s.module: s for s in trace(build("concatenated"), example()).group("b.0").consumers}
    np.testing.assert_array_equal(slots["c.0"].index, np.arange(6, 10))
    np.testing.assert_array_equal(slots["head"].index, np.arange(6, 10))


def test_a_grouped_convolution_is_pruned_by_whole_groups() -> None:
    group = trace(build("grouped"), example()).group("first.0")
    carrier = next(slot for slot in group.carriers if slot.module == "grouped.0")
    np.testing.assert_array_equal(carrier.unit, np.repeat(np.arange(4), 3))


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("chain", "head", "output"),
        ("paddedshortcut", "stem.0", "pads"),
        ("shuffled", "third.0", "reordered"),
        ("split", "stem.0", "breaks the forward pass"),
        ("normalised", "second", "LayerNorm"),
        ("attention", "patch", "MultiheadAttention"),
    ],
)
def test_what_stays_whole_says_why(name: str, layer: str, words: str) -> None:
    fixed = trace(build(name), example()).fixed
    assert layer in fixed
    assert words in fixed[layer]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_either_fixed_or_in_a_group(name: str) -> None:
    graph = trace(build(name), example())
    written = {slot.module for group in graph.groups for slot in group.slots if slot.role != "in"}
    assert {layer.name for layer in graph.layers} <= written | set(graph.fixed)
    assert not written & set(graph.fixed)


@pytest.mark.parametrize("name", NETWORKS)
def test_keeping_more_never_costs_less(name: str) -> None:
    graph = trace(build(name), example())
    generator = np.random.default_rng(0)
    for _ in range(20):
        fewer = generator.integers(1, graph.full + 1)
        more = generator.integers(fewer, graph.full + 1)
        for cost in graph.cost.values():
            assert cost(more) >= cost(fewer) > 0


def test_costs_of_many_counts_come_in_one_call() -> None:
    graph = trace(build("concatenated"), example())
    counts = np.random.default_rng(0).integers(1, graph.full + 1, (7, len(graph.groups)))
    np.testing.assert_array_equal(graph.cost["macs"](counts), [graph.cost["macs"](row) for row in counts])


def test_a_batch_of_examples_costs_what_one_costs() -> None:
    network = build("chain")
    assert trace(network, example(4)).macs(Plan({})) == trace(network, example(1)).macs(Plan({}))


def test_tracing_leaves_the_network_as_it_was() -> None:
    network = build("residual").train()
    network.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    trace(network, example())
    assert network.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_graph_survives_pickling() -> None:
    graph = trace(build("grouped"), example())
    again = pickle.loads(pickle.dumps(graph))
    assert _shape(again) == _shape(graph)
    assert again.macs(Plan({"mix.0": (0, 3)})) == graph.macs(Plan({"mix.0": (0, 3)}))


def test_tied_weights_stay_whole() -> None:
    widths = ((6, 6), (6, 6), (6, 4), (4, 2))
    layers = [layer for width in widths for layer in (nn.Linear(*width), nn.ReLU())]
    network = nn.Sequential(*layers)
    network[2].weight = network[0].weight
    graph = trace(network, torch.randn(1, 6))
    assert _shape(graph) == {"4": 4}
    assert "shares a tensor" in graph.fixed["0"]


def test_one_layer_called_twice_counts_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.shared(torch.relu(self.shared(torch.relu(self.first(x))))))

    network = Twice()
    graph = trace(network, torch.randn(1, 4))
    assert graph.macs(Plan({})) == count_macs(network, torch.randn(1, 4)) == 24 + 36 + 36 + 12
    plan = Plan({group.name: (0, 2) for group in graph.groups})
    small = cut(network, graph, plan)
    assert count_macs(small, torch.randn(1, 4)) == graph.macs(plan)


def test_a_group_that_the_forward_pass_pins_is_rejected_by_running_it() -> None:
    class Pinned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x)).softmax(1)
            return self.last(torch.relu(self.second(x)).view(-1, 6))

    with pytest.raises(ValueError, match="no prunable group"):
        trace(Pinned(), torch.randn(1, 4))


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        (nn.Linear(4, 2), (1, 4), "no prunable group"),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (1, 5), "fails on an input of shape"),
        (nn.Flatten(), (1, 4), "no prunable group"),
    ],
)
def test_what_cannot_be_traced_is_refused(network: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(network, torch.randn(shape))


def test_weights_that_are_not_numbers_are_refused() -> None:
    network = build("chain")
    with torch.no_grad():
        network.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        trace(network, example())


def test_an_unknown_group_gets_the_closest_name() -> None:
    graph = trace(build("chain"), example())
    with pytest.raises(ValueError, match="did you mean 'hidden'"):
        graph.group("hiden")


def test_params_of_the_full_plan_are_the_network_s() -> None:
    network = build("transposed")
    graph = trace(network, example())
    assert graph.params(Plan.full(graph)) == count_params(network)
