"""Gated networks: the dense network while open, `masked` while closed, `cut` when removed, trained as one."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from prune_env.pruning.gating.layer import GatedLayer
from prune_env.pruning.gating.network import attach
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import masked
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import NETWORKS
from tests.env.gated_networks import (
    GATEABLE,
    build,
    by_masks,
    by_plan,
    fresh,
    graph_of,
    random_masks,
    random_plan,
    trained,
)  # fmt: skip
from tests.env.small_networks import example
from tests.env.test_networks import build as build_zoo

TORCHVISION = ("resnet18", "squeezenet1_1", "mobilenet_v3_small", "googlenet", "convnext_tiny")
LIGHT = ("cnn", "lenet300100", "m-cifarnet", "resnet20", "squeezenet1_1", "resnet18")
LARGE = [pytest.param(n, marks=[pytest.mark.slow] * (n not in LIGHT)) for n in (*NETWORKS, *TORCHVISION)]


def large(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network of the zoo or of torchvision, in eval mode, and two inputs."""
    if name in NETWORKS:
        return build_zoo(name)
    options = {"init_weights": False} if name == "googlenet" else {}
    network = getattr(torchvision.models, name)(weights=None, num_classes=10, **options).eval()
    return network, torch.randn(2, 3, 32, 32)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-3)


def assert_open_is_dense_and_closed_is_masked(network: nn.Module, graph: LayerGraph, x: torch.Tensor) -> None:
    gated = attach(network, graph, x[:1])
    plan = random_plan(gated, 1)
    with torch.no_grad():
        assert_close(gated(x), network(x))
        gated.decide = by_plan(plan)
        with masked(network, graph, plan):
            assert_close(gated(x), network(x))


@pytest.mark.parametrize("name", GATEABLE)
def test_open_gates_are_the_dense_network_and_closed_ones_masked(name: str) -> None:
    assert_open_is_dense_and_closed_is_masked(build(name), graph_of(name), example(3))


@pytest.mark.parametrize("name", LARGE)
def test_the_laws_hold_on_real_networks(name: str) -> None:
    network, x = large(name)
    assert_open_is_dense_and_closed_is_masked(network, trace(network, x[:1]), x)


@pytest.mark.parametrize("name", [*GATEABLE, "cnn", pytest.param("m-cifarnet", marks=pytest.mark.slow)])
def test_a_training_step_starts_as_the_dense_network_s(name: str) -> None:
    """Outputs, gradients and BatchNorm statistics in train mode are those of the network without gates."""
    dense, x = build_zoo(name) if name in NETWORKS else (build(name), example(8))
    gated = (attach(dense, trace(dense, x), x) if name in NETWORKS else fresh(name)).train()
    dense.train()
    labels = torch.arange(len(x)) % 2
    outputs = {}
    for network in (dense, gated):
        torch.manual_seed(0)
        outputs[network] = network(x)
        F.cross_entropy(outputs[network].flatten(1), labels).backward()
    assert_close(outputs[gated], outputs[dense], 1e-4)
    for group, layer in zip(map(gated.graph.group, gated.names), gated.layers, strict=True):
        producer = dense.get_submodule(group.producers[0].module)
        assert_close(layer.producer.weight.grad, producer.weight.grad, 1e-3)
        if group.carriers:
            norm = dense.get_submodule(group.carriers[0].module)
            assert layer.norm.num_batches_tracked == norm.num_batches_tracked == 1
            torch.testing.assert_close(layer.norm.running_mean, norm.running_mean)
            torch.testing.assert_close(layer.norm.running_var, norm.running_var)
        if group.carriers and norm.affine:
            assert_close(layer.gate.bias.grad, norm.weight.grad, 1e-3)
            assert_close(layer.shift.grad, norm.bias.grad, 1e-3)


@pytest.mark.parametrize("name", GATEABLE)
def test_each_sample_has_its_own_mask(name: str) -> None:
    gated, x = fresh(name), example(3)
    masks = random_masks(gated, 3)
    gated.decide = by_masks(masks)
    network, graph = build(name), graph_of(name)
    with torch.no_grad():
        found = gated(x)
        for at in range(3):
            plan = Plan({key: mask[at].nonzero().flatten().tolist() for key, mask in masks.items()})
            with masked(network, graph, plan):
                assert_close(found[at : at + 1], network(x[at : at + 1]))


@pytest.mark.parametrize("static", ["vector", "filters"])
@pytest.mark.parametrize("name", GATEABLE)
def test_a_cut_gated_network_is_the_masked_one(name: str, static: str) -> None:
    gated, x = trained(name, static=static), example(3)
    for seed in range(3):
        plan = random_plan(gated, seed)
        if seed == 2:  # what a tracer would no longer see as a group
            plan = Plan({name: (1,) for name in gated.names})
        small, masks = gated.cut(plan), random_masks(gated, 3, seed)
        kept = {key: torch.tensor(indices) for key, indices in plan.keep.items()}
        inside = {key: mask & torch.zeros_like(mask).index_fill(1, kept[key], True) for key, mask in masks.items()}
        assert small.full.tolist() == [len(indices) for indices in plan.keep.values()]
        for whole, part in (
            (by_plan(plan), None),
            (by_masks(inside), by_masks({k: inside[k][:, kept[k]] for k in kept})),
        ):
            gated.decide, small.decide = whole, part
            with torch.no_grad():
                assert_close(small(x), gated(x))


def test_cutting_twice_is_cutting_once_and_shares_nothing() -> None:
    gated, x = trained("chain"), example(3)
    before = copy.deepcopy(gated.state_dict())
    twice = gated.cut(Plan({"hidden": (1, 3, 4, 8), "body.0.0": (0, 2, 5, 6)})).cut(
        Plan({"hidden": (0, 3), "body.0.0": (1, 2)})
    )
    once = gated.cut(Plan({"hidden": (1, 8), "body.0.0": (2, 5)}))
    with torch.no_grad():
        assert torch.equal(twice(x), once(x))
        for parameter in once.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in gated.state_dict().items())


def test_a_plan_that_drops_what_has_no_gate_is_refused() -> None:
    gated = fresh("residual")
    with pytest.raises(
        ValueError, match=r"keep\['stem\.0'\] drops channels, but the group has no gate: 3 layers write"
    ):
        gated.cut(Plan({"stem.0": (0, 1)}))
    with pytest.raises(ValueError, match=r"did you mean 'one\.0\.0'"):
        gated.cut(Plan({"one.0": (0, 1)}))
    assert gated.cut(Plan({"stem.0": range(8)})).full.tolist() == [6, 4]


def unit_layer(gates: list[float], shifts: list[float]) -> GatedLayer:
    """Copies one input channel to two outputs; the runtime scores are the given numbers."""
    convolution, norm = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0)
    with torch.no_grad():
        convolution.weight.fill_(1.0)
        norm.weight.copy_(torch.tensor(gates))
        norm.bias.copy_(torch.tensor(shifts))
    return GatedLayer(convolution, norm).eval()


def test_two_negative_scores_close_a_channel_by_hand() -> None:
    layer = unit_layer([-2.0, 3.0], [0.5, 0.5])
    x, everything = torch.full((1, 1, 1, 2), 4.0), torch.ones(1, 2, dtype=torch.bool)
    _, _, runtime = layer.scores(x)
    assert runtime.tolist() == [[-2.0, 3.0]]
    for static, first, second in (([-0.5, 1.0], -3.5, 12.5), ([0.5, -1.0], -3.5, -11.5), ([1.0, 0.5], -7.5, 6.5)):
        # -(-2 * -.5) * 4 + .5 = -3.5: without the sign rule it would be 4.5, which a rectifier lets pass.
        out = layer.gated(x, runtime, torch.tensor(static), everything)
        assert out[0, :, 0, 0].tolist() == [first, second]
    off = layer.gated(x, runtime, torch.tensor([-0.5, 1.0]), torch.tensor([[True, False]]))
    assert off[0].flatten().tolist() == [-3.5, -3.5, 0.0, 0.0]  # the shift is masked, too


def test_runtime_scores_by_hand_and_apart_from_position() -> None:
    layer = unit_layer([1.0, 1.0], [0.0, 0.0])
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[2.0], [-1.0]]))
        layer.sight.running_mean.fill_(1.0)
        layer.sight.running_var.fill_(4.0)
        layer.sight.eps = 0.0
    _, pooled, runtime = layer.eval().scores(torch.tensor([[[[1.0, 3.0]]], [[[0.0, -2.0]]]]))
    assert pooled.tolist() == [[2.0], [-1.0]]
    # Standardised: .5 and -1.
    assert runtime.tolist() == [[2.0, 0.5], [-1.0, 2.0]]
    weight, bias = layer.predictor()
    assert weight.tolist() == [[1.0], [-0.5]]
    assert bias.tolist() == [0.0, 1.5]
    tokens = GatedLayer(nn.Linear(2, 3), None).eval()
    assert tokens.scores(torch.tensor([[[1.0, 5.0], [3.0, 7.0]]]))[1].tolist() == [[2.0, 6.0]]


@pytest.mark.parametrize("static", ["vector", "filters"])
def test_gradients_reach_everything_that_is_trained(static: str) -> None:
    gated = trained("chain", static=static)
    gated(example(4)).square().sum().backward()
    for name, parameter in gated.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_scores_are_float32_under_autocast_and_the_map_is_not() -> None:
    gated, seen, formats = trained("chain", static="filters"), [], []

    def decide(question):
        seen.append((question.pooled, question.runtime, question.static))
        return torch.ones_like(question.runtime, dtype=torch.bool)

    gated.decide = decide
    for layer in gated.layers:
        layer.register_forward_hook(lambda _, __, output: formats.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        gated(example(2).bfloat16())
    assert formats == [torch.bfloat16] * 3
    assert {tensor.dtype for tensors in seen for tensor in tensors} == {torch.float32}
    torch.testing.assert_close(seen[0][0], example(2).bfloat16().double().mean((2, 3)).float())


def test_decisions_are_asked_once_in_forward_order_and_never_outside() -> None:
    gated, asked = fresh("chain"), []
    gated.decide = lambda question: asked.append((question.index, question.name)) or question.runtime.bool()
    gated(example(2))
    assert asked == list(enumerate(gated.names))
    gated.decide = lambda question: 1 / 0
    with pytest.raises(ZeroDivisionError):
        gated(example(2))
    with pytest.raises(RuntimeError, match="only inside its GatedNetwork"):
        gated.network(example(2))


@pytest.mark.parametrize("static", ["vector", "filters"])
def test_copies_and_state_dicts_carry_all_of_it(static: str) -> None:
    gated, x = trained("joined", static=static), example(2)
    gated(x).sum().backward()
    gated.refresh()
    twin, other = copy.deepcopy(gated), fresh("joined", static)
    other.load_state_dict(gated.state_dict())
    with torch.no_grad():
        expected = gated(x)
        assert torch.equal(twin(x), expected)
        assert torch.equal(other(x), expected)
        twin.layers[0].shift += 1
        assert not torch.equal(twin(x), expected)
        assert torch.equal(gated(x), expected)


def test_calibration_standardises_what_predictors_read_and_leaves_a_fresh_network_alone() -> None:
    gated, images = fresh("chain").eval(), torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = gated(images)
    gated.calibrate(images)
    torch.testing.assert_close(gated(images), before)
    for layer in gated.layers:
        assert len(layer.sight.running_var.unique()) == 1  # one variance for all inputs
    first = gated.layers[0]
    seen = first.sight(images.mean((2, 3)))
    torch.testing.assert_close(seen.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.var(0, correction=0).mean(), torch.tensor(1.0), atol=1e-2, rtol=0)
    first.train()
    torch.testing.assert_close(first.sight(images.mean((2, 3))), seen)  # nothing runs along in training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_hands_its_gradient_to_every_position(dtype):
    layer = GatedLayer(nn.Conv2d(3, 2, 1), None)
    torch.manual_seed(0)
    x, to_x, to_mean = torch.randn(4, 3, 5, 2).to(dtype), torch.randn(4, 3, 5, 2).to(dtype), torch.randn(4, 3)
    ours, plain = (x.clone().requires_grad_() for _ in range(2))
    handed, pooled, _ = layer.scores(ours)
    assert torch.equal(handed, x)
    assert torch.equal(pooled, x.mean((2, 3), dtype=torch.float32))
    torch.autograd.backward([handed, pooled], [to_x, to_mean])
    torch.autograd.backward([plain, plain.mean((2, 3), dtype=torch.float32)], [to_x, to_mean])
    torch.testing.assert_close(ours.grad, plain.grad)
