"""Static importances: each formula on three channels by hand, and the laws that bind them all."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch_pruning
from torch import nn
from torch.nn import functional

from prune_env.pruning.graph import Group, LayerGraph, Slot
from prune_env.pruning.importance import IMPORTANCES, score
from prune_env.pruning.moments import Moments
from prune_env.pruning.surgery import tensor_axes
from tests.env.graphs import traced
from tests.env.small_networks import NETWORKS, build, example

WEIGHTS = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]])
"""Three filters of two weights: norms 5, 0, 13."""
ONE_BATCH = (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))


TORCH_PRUNING_FAILS = ("grouped", "spatialattention")
"""Networks with a grouped convolution that writes several channels for each it reads."""


def slot(module: str, role: str, index: list[int] | None = None, unit: list[int] | None = None) -> Slot:
    return Slot(module, role, np.array(index or [0, 1, 2]), np.array(unit or [0, 1, 2]))


def three_channels() -> tuple[nn.Module, Group]:
    """Linear, norm, ReLU, linear with three hidden channels."""
    network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        network[0].weight.copy_(WEIGHTS)
        network[1].weight.copy_(torch.tensor([-2.0, 1.0, 0.5]))
    return network, Group("0", 3, (slot("0", "out"),), (slot("1", "both"),), (slot("3", "in"),))


def found(name: str) -> list[float]:
    network, group = three_channels()
    return IMPORTANCES[name](network, group, ONE_BATCH).tolist()


def test_l1_by_hand() -> None:
    assert found("l1") == [7, 0, 17]


def test_l1_of_the_inputs_by_hand() -> None:
    network, group = three_channels()
    with torch.no_grad():
        network[3].weight.copy_(torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.5, 0.0]]))
    assert IMPORTANCES["l1_inputs"](network, group, ONE_BATCH).tolist() == [4, 2.5, 0]


def test_l1_of_the_inputs_sums_over_the_kernel_and_over_the_map_behind_a_flatten() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, (1, 2)), nn.Flatten(), nn.Linear(4, 1))
    read = slot("1", "in", [0, 1], [0, 1]), slot("3", "in", [0, 1, 2, 3], [0, 0, 1, 1])
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[[[1.0, -2.0]], [[0.0, 4.0]]]]))
        network[3].weight.copy_(torch.tensor([[1.0, 1.0, -5.0, 0.0]]))
    group = Group("0", 2, (slot("0", "out", [0, 1], [0, 1]),), (), read)
    assert IMPORTANCES["l1_inputs"](network, group, ONE_BATCH).tolist() == [3 + 2, 4 + 5]


def test_l2_by_hand() -> None:
    assert found("l2") == [5, 0, 13]


def test_lamp_by_hand() -> None:
    # Squared norms 25, 0, 169: each over itself and all that are larger.
    assert found("lamp") == pytest.approx([25 / 194, 0, 1])


def test_lamp_gives_equal_units_equal_scores_and_a_dead_group_none() -> None:
    network, group = three_channels()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0], [5.0, 0.0]]))
    assert IMPORTANCES["lamp"](network, group, ONE_BATCH).tolist() == pytest.approx([25 / 50, 1 / 51, 25 / 50])
    with torch.no_grad():
        network[0].weight.zero_()
    assert IMPORTANCES["lamp"](network, group, ONE_BATCH).tolist() == [0, 0, 0]


def test_geometric_median_by_hand() -> None:
    # Distances: 0-1 is 5, 1-2 is 13, 0-2 is sqrt(64 + 64).
    across = 128**0.5
    assert found("geometric_median") == pytest.approx([5 + across, 18, 13 + across])


def test_bn_scale_by_hand() -> None:
    assert found("bn_scale") == [2, 1, 0.5]


def test_bn_scale_falls_back_to_l2_where_no_norm_carries_the_channels() -> None:
    network, group = three_channels()
    bare = Group(group.name, 3, group.producers, (), group.consumers)
    assert IMPORTANCES["bn_scale"](network, bare, ONE_BATCH).tolist() == [5, 0, 13]


def test_what_torch_pruning_computes_by_hand() -> None:
    network, group = three_channels()
    with torch.no_grad():
        network[3].weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [1.0, 2.0, 0.0]]))
    # Squared norms of filter, scale and columns, averaged over the three layers, then divided by their mean.
    sums = np.array([25 + 4 + 2, 0 + 1 + 4, 169 + 0.25 + 4])
    assert IMPORTANCES["tp_magnitude"](network, group, ONE_BATCH).tolist() == pytest.approx(sums / sums.mean())
    # LAMP: each over itself and all that are larger.
    lamp = [31 / (31 + 173.25), 5 / (5 + 31 + 173.25), 1]
    assert IMPORTANCES["tp_lamp"](network, group, ONE_BATCH).tolist() == pytest.approx(lamp)


@pytest.mark.parametrize("name", ["magnitude", "lamp", "fpgm", "taylor", "hessian"])
def test_what_torch_pruning_gives_by_itself(name: str) -> None:
    network, graph = build("residual"), traced("residual")
    images, labels = example(8), torch.arange(8) % 5
    found = score(f"tp_{name}", network, graph, (images, labels))
    dependencies = torch_pruning.DependencyGraph().build_dependency(network, images[:1])
    measure = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
        "lamp": torch_pruning.importance.LAMPImportance,
        "fpgm": torch_pruning.importance.FPGMImportance,
        "taylor": torch_pruning.importance.GroupTaylorImportance,
        "hessian": torch_pruning.importance.GroupHessianImportance,
    }[name]()
    if name == "hessian":
        for loss in functional.cross_entropy(network(images), labels, reduction="none"):
            network.zero_grad()
            loss.backward(retain_graph=True)
            measure.accumulate_grad(network)
    else:
        functional.cross_entropy(network(images), labels).backward()
    for group in graph.groups:
        layer = network.get_submodule(group.producers[0].module)
        whole = list(range(group.channels))
        coupled = dependencies.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, whole)
        torch.testing.assert_close(found[group.name], measure(coupled).detach(), rtol=1e-4, atol=1e-7)


def test_activation_by_hand() -> None:
    # Both images see one weight per channel; the norm scales by -2, 1, .5 and the ReLU clips.
    values = WEIGHTS * torch.tensor([[-2.0], [1.0], [0.5]]) / (1 + 1e-5) ** 0.5
    assert found("activation") == pytest.approx(values.clamp_min(0).mean(1).tolist())


def test_apoz_by_hand() -> None:
    # After norm and ReLU, for the two images: -6 and -8, 0 and 0, -2.5 and 6.
    assert found("apoz") == [0, 0, 0.5]


def test_hrank_by_hand() -> None:
    # Maps of rank 0, 1 and 3, and a second image whose third map has rank 2.
    network = nn.Sequential(nn.Identity(), nn.Conv2d(3, 2, 1)).eval()
    group = Group("0", 3, (slot("0", "out"),), (), (slot("1", "in"),))
    maps = torch.stack([torch.zeros(3, 3), torch.ones(3, 3), torch.eye(3)]).repeat(2, 1, 1, 1)
    maps[1, 2, 0, 0] = 0
    score = IMPORTANCES["hrank"](network, group, (maps, torch.zeros(2, dtype=torch.int64)))
    assert score.tolist() == [0, 1, 2.5]


def test_pfp_by_hand() -> None:
    # Both images read 2, 1, 1 in turn: 4 of 8, 3 of 8, 1 of 8; then 2 of 3 and 1 of 3 in the negative weights.
    network = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).eval()
    group = Group("0", 3, (slot("0", "out"),), (), (slot("1", "in"),))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[2.0, 3.0, 1.0], [-1.0, -1.0, 0.0]]))
    batch = (torch.tensor([[2.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 1]))
    for name in ("pfp", "pfp_max"):
        assert IMPORTANCES[name](network, group, batch).tolist() == pytest.approx([2 / 3, 3 / 8, 1 / 8])


def test_obd_by_hand() -> None:
    # As for Taylor below: the gradient of weight i of any channel is -(1 - p) x_i, so H_ii is (1 - p)^2 x_i^2.
    network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)).eval()
    weights = torch.tensor([[1.0, 0.5], [0.0, -1.0], [-0.5, 0.25]])
    with torch.no_grad():
        network[0].weight.copy_(weights)
        network[1].weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    group = Group("0", 3, (slot("0", "out"),), (), (slot("1", "in"),))
    x = torch.tensor([[1.0, 2.0]])
    wanted = (weights * x).square().sum(1) * (1 - torch.sigmoid((weights * x).sum())) ** 2 / 2
    torch.testing.assert_close(IMPORTANCES["obd"](network, group, (x, torch.tensor([0]))), wanted)
    # B times the squared mean gradient: for independent images without mean it does not depend on B.
    doubled = (x.repeat(2, 1), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(IMPORTANCES["obd"](network, group, doubled), 2 * wanted)


def test_taylor_by_hand() -> None:
    # Outputs h = W x, logits (h_0 + h_1 + h_2, 0), label 0: dL/dh = -(1 - p), so w dL/dw summed is -(1 - p) h.
    network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, 0.5], [0.0, -1.0], [-0.5, 0.25]]))
        network[1].weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    group = Group("0", 3, (slot("0", "out"),), (), (slot("1", "in"),))
    x = torch.tensor([[1.0, 2.0]])
    h = torch.tensor([2.0, -2.0, 0.0])
    wanted = ((1 - torch.sigmoid(h.sum())) * h) ** 2
    torch.testing.assert_close(IMPORTANCES["taylor"](network, group, (x, torch.tensor([0]))), wanted)
    # Batches of 32 are averaged: a second, equal batch changes nothing.
    doubled = (x.repeat(64, 1), torch.zeros(64, dtype=torch.int64))
    torch.testing.assert_close(IMPORTANCES["taylor"](network, group, doubled), wanted)


def test_second_order_by_hand() -> None:
    # Uncorrelated inputs of equal power 2 and output weights 1, 3, 2 (no bias): energies 2, 18, 8 and 28 at the end.
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(3))
        network[1].weight.copy_(torch.tensor([[1.0, 3.0, 2.0]]))
    group = Group("0", 3, (slot("0", "out"),), (), (slot("1", "in"),))
    images = 6**0.5 * torch.cat([torch.eye(3), -torch.eye(3)])
    score = IMPORTANCES["second_order"](network, group, (images, torch.zeros(6, dtype=torch.int64)))
    torch.testing.assert_close(score, torch.tensor([1.0, 14.0, 5.0]) / 14)


def test_several_producers_and_positions_of_one_channel_are_one_unit() -> None:
    network, _ = three_channels()
    pairs = Group("0", 1, (slot("0", "out", [0, 2], [0, 0]), slot("0", "out", [1], [0])), (), (slot("3", "in"),))
    assert IMPORTANCES["l1"](network, pairs, ONE_BATCH).tolist() == [24]
    assert IMPORTANCES["l2"](network, pairs, ONE_BATCH).tolist() == pytest.approx([(25 + 169) ** 0.5])


def permuted(network: nn.Module, graph: LayerGraph, orders: dict[str, np.ndarray]) -> nn.Module:
    """The same function with the channels of every group in another order."""
    other = copy.deepcopy(network)
    for group in graph.groups:
        for one in group.slots:
            _reorder(other, one, orders[group.name])
    return other


@torch.no_grad()
def _reorder(network: nn.Module, one: Slot, order: np.ndarray) -> None:
    sort = np.argsort(one.unit, kind="stable")
    index, unit = one.index[sort], one.unit[sort]
    first = np.searchsorted(unit, np.arange(len(order)))
    source = index[first[order[unit]] + np.arange(len(unit)) - first[unit]]
    if one.role == "parameter":
        tensors = [(network.get_parameter(one.module), one.dim)]
    else:
        module = network.get_submodule(one.module)
        tensors = [(getattr(module, name, None), axis) for name, axis in tensor_axes(module, one.role)]
    for tensor, axis in tensors:
        if tensor is not None:
            values = tensor.index_select(axis, torch.from_numpy(source))
            tensor.index_copy_(axis, torch.from_numpy(index), values)


@pytest.mark.parametrize("name", NETWORKS)
def test_permuting_channels_permutes_every_importance(name: str) -> None:
    network, graph = build(name), traced(name)
    generator = np.random.default_rng(0)
    orders = {group.name: generator.permutation(group.channels) for group in graph.groups}
    other = permuted(network, graph, orders)
    images = example(40)
    with torch.no_grad():
        logits = network(images)
        torch.testing.assert_close(other(images), logits, rtol=1e-3, atol=1e-4)
    # Classes are a map where the network gives one.
    labels = torch.arange(40) % 2 if logits.dim() == 2 else torch.arange(40 * 64).reshape(40, 8, 8) % 2
    for importance in IMPORTANCES:
        if importance.startswith("tp_") and name in TORCH_PRUNING_FAILS:
            with pytest.raises(ValueError, match=f"importance '{importance}' is Torch-Pruning's, which fails"):
                score(importance, network, graph, (images, labels))
            continue
        plain = score(importance, network, graph, (images, labels))
        again = score(importance, other, graph, (images, labels))
        for group in graph.groups:
            expected = plain[group.name][torch.from_numpy(orders[group.name])]
            torch.testing.assert_close(again[group.name], expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_scores_are_repeatable_finite_and_leave_the_network_alone(importance: str) -> None:
    network, graph = build("residual"), traced("residual")
    network.stem.train()
    network.head.requires_grad_(False)
    network.stem[0].requires_grad_(False)
    network.head.weight.grad = gradient = torch.ones_like(network.head.weight)
    before = copy.deepcopy(network)
    state = torch.get_rng_state()
    batch = (example(40), torch.arange(40) % 5)
    one, two = (score(importance, network, graph, batch) for _ in range(2))
    assert list(one) == [group.name for group in graph.groups]
    for group in graph.groups:
        assert one[group.name].shape == (group.channels,)
        assert one[group.name].dtype == torch.float32
        assert one[group.name].isfinite().all()
        assert (one[group.name] >= 0).all()
        assert not one[group.name].requires_grad
        assert torch.equal(one[group.name], two[group.name])
        alone = IMPORTANCES[importance](network, group, batch)
        torch.testing.assert_close(alone, one[group.name], rtol=1e-3, atol=1e-6)
    assert torch.equal(state, torch.get_rng_state())
    for left, right in zip(network.modules(), before.modules(), strict=True):
        assert left.training == right.training
    for left, right in zip(network.parameters(), before.parameters(), strict=True):
        assert left.requires_grad == right.requires_grad
        assert torch.equal(left, right)
        assert left.grad is (gradient if left is network.head.weight else None)
    for left, right in zip(network.buffers(), before.buffers(), strict=True):
        assert torch.equal(left, right)


def test_a_misspelt_importance_names_the_closest() -> None:
    network, group = three_channels()
    graph = LayerGraph((group,), {}, (), {})
    with pytest.raises(ValueError, match="did you mean 'taylor'"):
        score("tailor", network, graph, ONE_BATCH)
    with pytest.raises(ValueError, match="allowed: l1, l2"):
        score("xyz", network, graph, ONE_BATCH)


def test_random_scores_follow_the_seed() -> None:
    network, group = three_channels()
    graph = LayerGraph((group,), {}, (), {})
    one, two = (score("random", network, graph, ONE_BATCH, seed=seed)["0"] for seed in (0, 1))
    assert not torch.equal(one, two)
    assert len(set(one.tolist())) == 3


def test_given_moments_are_used() -> None:
    network, graph = build("residual"), traced("residual")
    moments = Moments.collect(network, graph, example(50, seed=9))
    scores = score("second_order", network, graph, (example(4), torch.zeros(4, dtype=torch.int64)), moments=moments)
    for group in graph.groups:
        assert torch.equal(scores[group.name], moments.second_order(network, group))
