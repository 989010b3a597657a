"""Masked and cut compute the same, and neither disturbs the network."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import count_macs, count_params
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import Cutter, cut, masked
from prune_env.pruning.tracing import trace
from tests.env.small_networks import NETWORKS, build, example

GRAPHS: dict[str, LayerGraph] = {}


def _graph(name: str) -> LayerGraph:
    if name not in GRAPHS:
        GRAPHS[name] = trace(build(name), example())
    return GRAPHS[name]


def random_plan(graph: LayerGraph, seed: int) -> Plan:
    generator = np.random.default_rng(seed)
    return Plan({
        group.name: tuple(generator.permutation(group.channels)[: generator.integers(1, group.channels + 1)].tolist())
        for group in graph.groups
    })  # fmt: skip


def assert_law_one_and_four(network: nn.Module, graph: LayerGraph, plan: Plan, x: torch.Tensor) -> None:
    """cut = masked; what torch counts on the cut network = the closed form."""
    with torch.no_grad():
        with masked(network, graph, plan):
            expected = network(x)
        small = cut(network, graph, plan)
        found = small(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert count_macs(small, x) == graph.macs(plan)
    assert count_params(small) == graph.params(plan)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NETWORKS)
def test_cut_equals_masked_and_costs_what_the_closed_form_says(name: str, seed: int) -> None:
    assert_law_one_and_four(build(name), _graph(name), random_plan(_graph(name), seed), example(3))


@pytest.mark.parametrize("name", NETWORKS)
def test_one_channel_per_group_still_runs(name: str) -> None:
    graph = _graph(name)
    assert_law_one_and_four(build(name), graph, Plan({g.name: (g.channels - 1,) for g in graph.groups}), example(2))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_full_plan_is_the_identity(name: str) -> None:
    network, graph = build(name), _graph(name)
    small = cut(network, graph, Plan.full(graph))
    with torch.no_grad():
        assert torch.equal(small(example()), network(example()))
        with masked(network, graph, Plan.full(graph)):
            assert torch.equal(network(example()), small(example()))
    assert graph.macs(Plan.full(graph)) == count_macs(network, example())


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_gives_the_exact_weights_back_also_after_an_error(name: str) -> None:
    network, graph = build(name), _graph(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), masked(network, graph, random_plan(graph, 1)):
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_masked_really_changes_the_output() -> None:
    network, graph = build("chain"), _graph("chain")
    with torch.no_grad():
        full = network(example())
        with masked(network, graph, Plan({"hidden": (0,)})):
            assert not torch.allclose(network(example()), full)


def test_a_cut_network_shares_nothing_with_the_original() -> None:
    network, graph = build("residual"), _graph("residual")
    small = cut(network, graph, Plan({"one.0.0": (0, 1)}))
    pointers = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers()) if tensor.numel()}
    assert not pointers & {tensor.data_ptr() for tensor in (*small.parameters(), *small.buffers()) if tensor.numel()}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimiser = torch.optim.SGD(small.train().parameters(), lr=0.1)
    small(example(4)).square().sum().backward()
    optimiser.step()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not network.training


def test_a_cut_network_remembers_its_new_sizes() -> None:
    small = cut(build("grouped"), _graph("grouped"), Plan({"first.0": (1, 3), "mix.0": (0, 2, 4)}))
    assert (small.first[0].out_channels, small.grouped[0].groups, small.grouped[0].in_channels) == (4, 2, 4)
    assert (small.grouped[0].out_channels, small.grouped[1].num_features) == (6, 6)
    assert (small.multiply[0].groups, small.multiply[0].in_channels, small.head.in_features) == (3, 3, 6)
    norm = cut(build("normalised"), _graph("normalised"), Plan({"first": (0, 2)})).norm
    assert (norm.num_groups, norm.num_channels) == (2, 4)


def test_mode_and_requires_grad_are_kept() -> None:
    network = build("chain").train()
    network.hidden.weight.requires_grad_(False)
    small = cut(network, _graph("chain"), Plan({"hidden": (1, 2)}))
    assert small.training
    assert not small.hidden.weight.requires_grad
    assert small.head.weight.requires_grad


def test_cutting_twice_is_cutting_once() -> None:
    network, graph = build("residual"), _graph("residual")
    once = cut(network, graph, Plan({"stem.0": (1, 4, 6)}))
    twice = cut(cut(network, graph, Plan({"stem.0": (1, 2, 4, 6)})), trace(once, example()), Plan({}))
    first = cut(network, graph, Plan({"stem.0": (1, 2, 4, 6)}))
    again = cut(first, trace(first, example()), Plan({"stem.0": (0, 2, 3)}))
    with torch.no_grad():
        torch.testing.assert_close(again(example()), once(example()))
    assert twice.stem[0].out_channels == 4


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cutter_cuts_again_and_again_as_cut_does(name: str) -> None:
    network, graph = build(name), _graph(name)
    cutter, seen = Cutter(network, graph), set()
    kept = []  # alive, so that no memory is handed out twice
    for seed in range(3):
        small, expected = cutter.cut(random_plan(graph, seed)), cut(network, graph, random_plan(graph, seed))
        assert small.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(small.state_dict()[key], value) for key, value in expected.state_dict().items())
        assert str(small) == str(expected)  # classes and the sizes that they remember
        pointers = {tensor.data_ptr() for tensor in (*small.parameters(), *small.buffers()) if tensor.numel()}
        assert not pointers & seen
        seen |= pointers
        kept.append(small)


def test_a_cutter_cuts_the_network_as_it_is_at_the_moment() -> None:
    network, graph = build("residual"), _graph("residual")
    cutter = Cutter(network, graph)
    with torch.no_grad():
        network.stem[0].weight.mul_(2)
    network.stem[1].running_mean = network.stem[1].running_mean + 1  # another tensor
    network.stem[0].weight.requires_grad_(False)
    network.train().stem[0].register_forward_hook(lambda *_: None)
    small = cutter.cut(Plan({"stem.0": (1, 3)}))
    assert torch.equal(small.stem[0].weight, network.stem[0].weight[[1, 3]])
    assert torch.equal(small.stem[1].running_mean, network.stem[1].running_mean[[1, 3]])
    assert small.training
    assert not small.stem[0].weight.requires_grad
    assert small.stem[1].weight.requires_grad
    assert len(small.stem[0]._forward_hooks) == 1


def test_every_table_of_a_cut_network_is_its_own() -> None:
    network, graph = build("residual"), _graph("residual")
    small = cut(network, graph, Plan({"stem.0": (1, 3)}))
    assert type(small) is type(network)
    for ours, theirs in zip(small.modules(), network.modules(), strict=True):
        for name, table in theirs.__dict__.items():
            if isinstance(table, dict | OrderedDict | set):
                assert type(ours.__dict__[name]) is type(table)
                assert ours.__dict__[name] is not table
    small.stem[0].register_forward_hook(lambda *_: None)
    small.register_buffer("note", torch.zeros(1), persistent=False)
    assert not network.stem[0]._forward_hooks
    assert not network._non_persistent_buffers_set


class Tied(nn.Module):
    """One module under two names, one weight in two modules, one buffer in two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.rectify = self.again = nn.ReLU()
        self.hidden = nn.Linear(6, 5)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 2)
        self.register_buffer("scale", torch.ones(6))
        self.first.register_buffer("scale", self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[image 6] -> [image 2]."""
        return self.head(self.again(self.hidden(self.rectify(self.second(self.first(x * self.scale))))))


def test_shared_modules_and_tied_tensors_stay_shared() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Tied().eval()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    graph = trace(network, x)
    small = cut(network, graph, Plan({"hidden": (0, 3)}))
    assert small.again is small.rectify
    assert small.again is not network.again
    assert small.hidden.out_features == 2
    assert small.second.weight is small.first.weight
    assert small.first.weight is not network.first.weight
    assert small.first.scale is small.scale
    assert small.scale is not network.scale
    with torch.no_grad(), masked(network, graph, Plan({"hidden": (0, 3)})):
        torch.testing.assert_close(small(x), network(x))


def test_a_cut_network_is_made_of_ordinary_parameters() -> None:
    network, graph = build("chain"), _graph("chain")
    small = cut(network, graph, Plan({"hidden": (1, 2)}))
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in network.named_parameters()]
    for parameter in small.parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.is_leaf
        assert parameter.requires_grad
    again = pickle.loads(pickle.dumps(small))
    assert all(type(parameter) is nn.Parameter for parameter in again.parameters())


def test_a_cutter_travels_with_its_network() -> None:
    network, graph = build("chain"), _graph("chain")
    copy, cutter = pickle.loads(pickle.dumps((network, Cutter(network, graph))))
    with torch.no_grad():
        copy.hidden.bias.fill_(7)
    assert cutter.cut(Plan({"hidden": (1, 2)})).hidden.bias.tolist() == [7, 7]


@pytest.mark.parametrize("plan", [Plan({"nothing": (0,)}), Plan({"hidden": (0, 10)})])
def test_a_plan_that_does_not_fit_is_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match=r"no group is named|the group has 10"):
        cut(build("chain"), _graph("chain"), plan)


TORCHVISION = {
    "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64, "wide_resnet50_2": 64, "vgg11_bn": 32, "vgg16": 32,
    "alexnet": 64, "squeezenet1_1": 64, "densenet121": 32, "googlenet": 32, "inception_v3": 75, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "mnasnet0_5": 32, "shufflenet_v2_x0_5": 32, "efficientnet_b0": 32,
    "regnet_y_400mf": 32, "convnext_tiny": 32, "vit_b_16": 224,
}  # fmt: skip
HEAVY = {
    "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg11_bn", "vgg16", "alexnet", "densenet121", "googlenet",
    "inception_v3", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "vit_b_16", "mobilenet_v2", "mnasnet0_5",
    "mobilenet_v3_small",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HEAVY)) for n in TORCHVISION])
def test_the_laws_hold_on_torchvision_networks(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(torchvision.models, name)(weights=None, num_classes=10, **options).eval()
    x = torch.randn(1, 3, TORCHVISION[name], TORCHVISION[name], generator=torch.Generator().manual_seed(0))
    graph = trace(network, x)
    assert graph.groups
    for seed in range(2):
        plan = random_plan(graph, seed)
        with torch.no_grad():
            with masked(network, graph, plan):
                expected = network(x)
            small = cut(network, graph, plan)
            error = (small(x) - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        assert error < 1e-4
        assert count_macs(small, x) == graph.macs(plan)
        assert count_params(small) == graph.params(plan)
