"""Directional pruning: gRDA by hand, its thresholds in closed form, whole channels, and constants that move on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import baselines
from baselines import directional_pruning as dp
from baselines.allocate import Choices
from baselines.channel_grda import Bundle, GroupGRDA, Part, bundles, closed_form, dead, norms
from baselines.dead_channels import fold, sending
from baselines.directional_pruning import Directional, Structured, bisected, published_lr, rates, sparsity
from baselines.grda import GRDA, rise, soft_threshold, strength
from baselines.method import Case, case_of
from prune_env.config import make_problem
from prune_env.pruning.graph import LayerGraph, Slot
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainingDiverged
from tests.contracts import cut_agrees_with_masked, random_plan
from tests.env.graphs import traced
from tests.env.small_networks import build, example
from tests.methods.own_tasks import own_task

PLAIN = {"recalibrate": False, "refit": False, "calibration_images": 96}
OPTIONS = {**PLAIN, "refit": "none"}
NAN = float("nan")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return at(own_task("residual"), tmp_path)


def at(task: Task, root: Path) -> Task:
    return replace(task, settings={"root": str(root)})


def parameters(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def moved(optimizer: torch.optim.Optimizer, gradients: dict[nn.Parameter, list[float]], lr: float) -> None:
    for parameter, gradient in gradients.items():
        parameter.grad = torch.tensor(gradient)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


# --- the update ------------------------------------------------------------------------------------------------------


def test_the_update_by_hand() -> None:
    # mu = .5 and c = .4: the threshold rises by .4 lr (sqrt(n) - sqrt(n - 1)).
    # g: .1; .1 + .1 * .41421356 = .14142136; + .04 * .31783725 = .15413485; + .2 * .26794919 = .20772468
    weight, bias = nn.Parameter(torch.tensor([1.0, -0.5])), nn.Parameter(torch.tensor([0.05]))
    optimizer = GRDA([weight, bias], lr=0.25, c=0.4, mu=0.5)
    # v: .5, .25, .1, .4 | -.25, -.45, -.25, -.25 | .05, .15, .15, .1
    steps = [
        (0.25, [2.0, -1.0], [0.0], [0.4, -0.15], [0.0]),
        (0.25, [1.0, 0.8], [-0.4], [0.10857864, -0.30857864], [0.00857864]),
        (0.1, [1.5, -2.0], [0.0], [0.0, -0.09586515], [0.0]),
        (0.5, [-0.6, 0.0], [0.1], [0.19227532, -0.04227532], [0.0]),
    ]
    for lr, of_weight, of_bias, weights, biases in steps:
        moved(optimizer, {weight: of_weight, bias: of_bias}, lr)
        torch.testing.assert_close(weight.detach(), torch.tensor(weights), rtol=0, atol=1e-7)
        torch.testing.assert_close(bias.detach(), torch.tensor(biases), rtol=0, atol=1e-7)
    assert weight.detach()[0] != 0  # it was zero a step before, and came back
    assert {name: tensor.shape for name, tensor in optimizer.state[weight].items()} == {
        "dual": (2,),
        "step": (),
        "threshold": (),
    }


@given(
    lr=st.floats(1e-4, 1),
    c=st.floats(0, 1),
    mu=st.floats(0.05, 0.95),
    steps=st.integers(1, 60),
    start=st.floats(-3, 3, width=32),
)
def test_at_a_constant_rate_the_sum_of_the_rises_is_the_closed_form(lr, c, mu, steps, start) -> None:
    parameter = nn.Parameter(torch.tensor([start]))
    optimizer = GRDA([parameter], lr=lr, c=c, mu=mu)
    for _ in range(steps):
        moved(optimizer, {parameter: [0.0]}, lr)
    threshold = c * lr**0.5 * (steps * lr) ** mu
    assert float(optimizer.state[parameter]["threshold"]) == pytest.approx(threshold, rel=1e-9)
    assert c * strength([lr] * steps, mu=mu) == pytest.approx(threshold, rel=1e-9)
    expected = math.copysign(max(abs(start) - threshold, 0), start)
    assert float(parameter.detach()) == pytest.approx(expected, abs=1e-6)


def test_without_a_threshold_it_is_sgd() -> None:
    network, twin = build("chain"), build("chain")
    ours, sgd = GRDA(network.parameters(), lr=0.1, c=0, mu=0.7), torch.optim.SGD(twin.parameters(), lr=0.1)
    for seed in range(4):
        for one, optimizer in ((network, ours), (twin, sgd)):
            optimizer.zero_grad()
            one(example(4, seed)).square().mean().backward()
            optimizer.step()
    assert torch.equal(parameters(network), parameters(twin))


def test_parameters_of_a_group_without_a_threshold_are_left_out_and_a_rest_without_gradient_stays() -> None:
    first, second, third = (nn.Parameter(torch.tensor([0.5])) for _ in range(3))
    optimizer = GRDA([{"params": [first, third]}, {"params": [second], "c": 0.0}], lr=1.0, c=0.2, mu=0.5)
    moved(optimizer, {first: [0.1], second: [0.1]}, 1.0)
    assert first.item() == pytest.approx(0.2)
    assert second.item() == pytest.approx(0.4)
    assert third.item() == 0.5
    assert optimizer.step(lambda: first.square().sum()).item() == pytest.approx(0.04)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    assert not soft_threshold(torch.tensor([value, 1.0]), 2.0)[0].isfinite()
    network = nn.Linear(2, 2, bias=False)
    optimizer = GroupGRDA(network, [rows_of("weight", 2, 2)], lr=1.0, c=1.0, mu=0.5)
    moved(optimizer, {network.weight: [[value, 0.0], [0.0, 0.0]]}, 1.0)
    assert not network.weight.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -0.1), ("lr", NAN), ("lr", "1"), ("c", -1e-9), ("c", math.inf), ("c", True), ("mu", 0), ("mu", 1.0)],
)
def test_bad_constants_are_refused_by_name(name: str, value: float) -> None:
    constants = {"lr": 0.1, "c": 0.1, "mu": 0.5}
    parameter = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=f"{name} is {value!r}; allowed is"):
        GRDA([{"params": [parameter], name: value}], **constants)
    if not isinstance(value, str):
        for make in (Directional, Structured):
            with pytest.raises(ValueError, match=f"{name} is"):
                make(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("share", 1.0), ("share", -0.1), ("share", NAN), ("target", "filter")])
def test_bad_settings_of_the_structured_use_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        Structured(**{name: value})


# --- thresholds ------------------------------------------------------------------------------------------------------


def test_the_published_rate_by_hand() -> None:
    found = [published_lr(0.1, epoch=epoch, epochs=10) for epoch in range(1, 11)]
    assert found == pytest.approx([0.1] * 5 + [0.07525, 0.0505, 0.02575, 0.001, 0.001])
    assert rates(0.1, epochs=2, steps=3) == pytest.approx([0.1] * 3 + [0.001] * 3)


@pytest.mark.parametrize(
    ("settings", "mu", "threshold"),
    [
        ("cifar10-vgg16", 0.4, 0.0077),
        ("cifar10-vgg16", 0.51, 0.0223),
        ("cifar10-vgg16", 0.7, 0.138),
        ("cifar10-wrn-28-10", 0.501, 0.0235),
        ("cifar10-wrn-28-10", 0.55, 0.0357),
        ("cifar10-wrn-28-10", 0.65, 0.0837),
    ],
)
def test_the_published_trainings_end_at_their_thresholds(settings: str, mu: float, threshold: float) -> None:
    paper = dp.PUBLISHED[settings]
    steps = rates(paper.lr, epochs=paper.epochs, steps=dp.CIFAR_STEPS)
    assert paper.c * strength(steps, mu=mu) == pytest.approx(threshold, rel=5e-3)


def test_a_shortened_training_ends_at_the_same_threshold_by_the_scaling_rule(task: Task) -> None:
    short = dp.shortened(dp.PAPER, task, epochs=20, lr=0.05)
    assert (short.epochs, short.lr, short.mu) == (20, 0.05, dp.PAPER.mu)
    # 96 images make one step of an epoch.
    assert short.c * strength(rates(0.05, epochs=20, steps=1), mu=0.55) == pytest.approx(0.0357, rel=5e-3)
    by_rule = dp.PAPER.c * (200 * 391 / 20) ** 0.55 * (0.1 / 0.05) ** 1.05
    assert short.c == pytest.approx(by_rule, rel=0.02)


def test_the_closed_form_is_exact_where_duals_do_not_move() -> None:
    network, graph = build("residual"), traced("residual")
    channels = bundles(network, graph, example(), target="scales")
    there, steps = np.concatenate([*norms(network, channels).values()]), rates(0.1, epochs=4, steps=3)
    for share in (0.0, 1 / 6, 1 / 3, 2 / 3):
        trained = copy.deepcopy(network)
        c = closed_form(there, share=share, rates=steps, mu=0.6)
        optimizer = GroupGRDA(trained, channels, lr=0.1, c=c, mu=0.6)
        gradients = {parameter: torch.zeros_like(parameter).tolist() for parameter in trained.parameters()}
        for lr in steps:
            moved(optimizer, gradients, lr)
        gone = np.concatenate([*dead(trained, channels).values()])
        assert gone.sum() == round(share * len(there))
        assert there[gone].max(initial=0) <= there[~gone].min()


def test_bisection_finds_the_c_of_a_share() -> None:
    asked = []

    def share_after(c: float) -> float:
        asked.append(c)
        return min(c / 10, 1.0)

    assert 0.28 <= share_after(bisected(share_after, share=0.3, low=0.01, high=100.0)) <= 0.32
    assert len(asked) <= 11
    assert bisected(share_after, share=0.3, low=0.1, high=3.0) == 3.0
    with pytest.raises(ValueError, match=r"share is 0\.9; c from 1 to 2 reaches 0\.100 to 0\.200"):
        bisected(share_after, share=0.9, low=1.0, high=2.0)
    for low, high in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="low is"):
            bisected(share_after, share=0.5, low=low, high=high)


# --- whole channels --------------------------------------------------------------------------------------------------


def rows_of(parameter: str, channels: int, width: int, *, unit: float = 1.0) -> Bundle:
    """Channels that are the rows of one parameter."""
    index = np.arange(channels)
    return Bundle("0", channels, (Part(parameter, Slot("", "out", index, index), 0, width, unit),))


def test_a_channel_shrinks_as_a_whole_by_hand() -> None:
    network = nn.Linear(2, 3)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]))
        network.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = GroupGRDA(network, [rows_of("weight", 3, 2)], lr=1.0, c=0.5, mu=0.5)
    moved(optimizer, {network.weight: [[0.0, 0.0]] * 3, network.bias: [0.5, 0.0, 0.0]}, 1.0)
    # rms: 5 / sqrt(2), .5 / sqrt(2) = .354 below g = .5, and 0.
    left = 1 - 0.5 * math.sqrt(2) / 5
    torch.testing.assert_close(network.weight.detach(), torch.tensor([[3 * left, 4 * left], [0.0, 0.0], [0.0, 0.0]]))
    assert network.bias.tolist() == [0.5, 2.0, 3.0]  # plain SGD


def test_a_unit_is_what_entries_are_measured_in_and_parts_count_together() -> None:
    network = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.3, 0.4]]))
        network.bias.copy_(torch.tensor([2.0]))
    (filters,), (bias,) = rows_of("weight", 1, 2, unit=0.1).parts, rows_of("bias", 1, 1).parts
    bundle = Bundle("0", 1, (filters, bias))
    # (3^2 + 4^2 + 2^2) / 3
    assert float(bundle.rms(dict(network.named_parameters()))[0]) == pytest.approx(math.sqrt(29 / 3))


@given(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), st.floats(0, 2))
def test_a_channel_of_one_entry_is_grda(values: list[float], c: float) -> None:
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for one in (ours, theirs):
        with torch.no_grad():
            one.weight.copy_(torch.tensor(values))
    optimizers = (
        GroupGRDA(ours, [rows_of("weight", 3, 1)], lr=0.5, c=c, mu=0.5),
        GRDA([theirs.weight], lr=0.5, c=c, mu=0.5),
    )
    for one, optimizer in zip((ours, theirs), optimizers, strict=True):
        for gradient in ([0.1, -0.2, 0.3], [-1.0, 0.0, 0.5]):
            moved(optimizer, {one.weight: gradient}, 0.5)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_what_no_channel_owns_in_a_shared_parameter_is_plain_sgd() -> None:
    norm = nn.BatchNorm1d(4)
    index = np.array([1, 3])
    bundle = Bundle("0", 2, (Part("weight", Slot("", "both", index, np.array([1, 0])), 0, 1),))
    optimizer = GroupGRDA(norm, [bundle], lr=1.0, c=0.5, mu=0.5)
    moved(optimizer, {norm.weight: [0.0, 0.0, 0.25, 0.5], norm.bias: [0.0] * 4}, 1.0)
    assert norm.weight.tolist() == pytest.approx([1.0, 0.5, 0.75, 0.0])


def test_targets_hold_what_the_graph_says() -> None:
    network, graph = build("concatenated"), traced("concatenated")
    scales = {bundle.name: bundle for bundle in bundles(network, graph, example(), target="scales")}
    assert [part.parameter for part in scales["a.0"].parts] == ["a.1.weight", "norm.weight"]
    assert scales["b.0"].entries.tolist() == [2.0] * 4
    with torch.no_grad():
        network.norm.weight.copy_(torch.arange(15.0))
        network.b[1].weight.fill_(3.0)
    expected = np.sqrt((9 + np.arange(6.0, 10.0) ** 2) / 2)
    np.testing.assert_allclose(norms(network, [scales["b.0"]])["b.0"], expected, rtol=1e-6)
    filters = {bundle.name: bundle for bundle in bundles(network, graph, example(), target="filters")}
    assert filters["b.0"].entries.tolist() == [6 * 9 + 1 + 2 + 2] * 4
    # Where no norm carries a group, its filters are thresholded.
    hidden = bundles(build("chain"), traced("chain"), example(), target="scales")[-1]
    assert [part.parameter for part in hidden.parts] == ["hidden.weight", "hidden.bias"]
    assert hidden.parts[0].unit == pytest.approx(math.sqrt(2 / 96))


@pytest.mark.parametrize(
    ("name", "group", "parts"),
    [
        ("residual", "one.0.0", ["one.0.1.weight"]),
        # Two of the three layers that write the stream have no norm.
        ("residual", "stem.0", ["stem.0.weight", "one.1.weight", "two.1.weight"]),
        # What squeeze-and-excitation makes of a constant depends on the image.
        ("depthwise", "expand.0", ["expand.0.weight"]),
        ("normalised", "first", ["first.weight"]),
        ("digits-cnn", "down.0", ["down.1.weight", "block.bn2.weight"]),
    ],
)
def test_scales_are_thresholded_only_where_they_can_silence_a_channel(name: str, group: str, parts: list[str]) -> None:
    network, graph, x = shaped(name)
    before = parameters(network)
    found = {bundle.name: bundle.parts for bundle in bundles(network, graph, x[:1], target="scales")}
    assert [part.parameter for part in found[group]][: len(parts)] == parts
    assert len(found[group]) == len(parts) or parts[0] == f"{group}.weight"
    assert torch.equal(parameters(network), before)


# --- dead channels ---------------------------------------------------------------------------------------------------


def killed(
    network: nn.Module, graph: LayerGraph, x: torch.Tensor, *, target: str = "scales", share: float = 0.5
) -> list[Bundle]:
    """Sets all that a share of the channels has to zero, and statistics and shifts to anything; the bundles."""
    draw = np.random.default_rng(0)
    channels = bundles(network, graph, x[:1], target=target)
    tensors = dict(network.named_parameters())
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.bias.uniform_(-0.5, 0.5)
        for bundle in channels:
            gone = draw.permutation(bundle.channels) < share * bundle.channels
            for part in bundle.parts:
                part.rows(tensors[part.parameter])[part.slot.positions(gone)] = 0
    return list(channels)


def free(network: nn.Module, graph: LayerGraph, channels: list[Bundle], x: torch.Tensor) -> Plan:
    """Everything but the dead channels that no layer hears any more."""
    gone, heard = dead(network, channels), None
    heard = sending(network, graph, gone, x[:1])
    keep = {name: np.flatnonzero(~gone[name] | heard[name]).tolist() for name in gone}
    return Plan({name: kept or [0] for name, kept in keep.items()})


def difference(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = one(x)
        return float((other(x) - wanted).abs().max() / wanted.abs().max())


class Bare(nn.Module):
    """Convolutions without padding: one is followed by a norm, one has a bias; then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.two, self.norm2 = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.three, self.norm3 = nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(4 * 16, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.norm1(self.one(x)))
        x = torch.relu(self.norm2(self.two(x)))
        x = torch.tanh(self.norm3(self.three(x)))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def shaped(name: str) -> tuple[nn.Module, LayerGraph, torch.Tensor]:
    """A network, its graph and a few inputs."""
    draw = torch.Generator().manual_seed(3)
    if name in ("digits-cnn", "resnet20"):
        channels, side = (1, 8) if name == "digits-cnn" else (3, 16)
        x = torch.randn(4, channels, side, side, generator=draw)
        network = make_network(name.removeprefix("digits-"), classes=10, channels=channels, side=side)
        return network, trace(network, x[:1]), x
    if name == "bare":
        network, x = Bare().eval(), example(4)
        return network, trace(network, x[:1]), x
    return build(name), traced(name), example(4)


@pytest.mark.parametrize("name", ["bare", "chain", "residual", "concatenated", "split", "digits-cnn", "resnet20"])
def test_folding_leaves_the_outputs_and_dead_channels_then_go_for_nothing(name: str) -> None:
    network, graph, x = shaped(name)
    channels = killed(network, graph, x)
    before = copy.deepcopy(network)
    everything = Plan(
        {k: (np.flatnonzero(~v).tolist() or [0]) for k, v in dead(network, channels).items()}
    )  # as if nothing were said by the dead
    assert difference(before, cut(before, graph, everything), x) > 1e-2
    left = fold(network, graph, dead(network, channels), x[:1])
    assert difference(before, network, x) < 1e-5
    plan = free(network, graph, channels, x)
    assert difference(before, cut(network, graph, plan), x) < 1e-5
    cut_agrees_with_masked(network, graph, x, plan)
    cut_agrees_with_masked(network, graph, x, random_plan(graph, np.random.default_rng(1)))
    gone = dead(network, channels)
    for group in graph.groups:
        spare = int(gone[group.name].sum()) - (group.channels - len(plan.keep[group.name]))
        # All of them go, or all but the one that speaks for the others where a reader pads with zeros.
        assert spare <= (group.name in left), group.name
    again = copy.deepcopy(network)
    assert fold(again, graph, gone, x[:1]).keys() == left.keys()
    assert torch.equal(parameters(again), parameters(network))


def test_where_nothing_is_padded_no_channel_has_to_speak_for_others() -> None:
    network, graph, x = shaped("bare")
    channels = killed(network, graph, x, share=1.0)
    assert fold(network, graph, dead(network, channels), x[:1]) == {}
    assert not any(heard.any() for heard in sending(network, graph, dead(network, channels), x[:1]).values())


def test_a_constant_moves_into_the_bias_or_the_norm_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 2), nn.Flatten(1))
    network.append(nn.Linear(9, 1))
    network.eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([1.0, 0.0]))
        network[1].bias.copy_(torch.tensor([0.0, 0.5]))
        network[3].weight.copy_(torch.arange(8.0).reshape(1, 2, 2, 2))
        network[3].bias.fill_(1.0)
    x = torch.randn(1, 1, 4, 4)
    graph = trace(network, x)
    fold(network, graph, {group.name: np.arange(group.channels) == 1 for group in graph.groups}, x)
    assert network[3].bias.tolist() == [1.0 + 0.5 * (4 + 5 + 6 + 7)]
    assert network[3].weight.flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0]


def test_one_dead_channel_speaks_for_all_at_padded_borders_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 3, padding=1), nn.Flatten(1), nn.Linear(16, 1)
    ).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([1.0, 0.0, 0.0]))
        network[1].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
        network[3].weight.copy_(torch.tensor([5.0, 6.0, 7.0]).view(1, 3, 1, 1).expand(1, 3, 3, 3))
    x = torch.randn(1, 1, 4, 4)
    graph = trace(network, x)
    gone = {group.name: np.arange(group.channels) > 0 for group in graph.groups}
    left = fold(network, graph, gone, x)
    assert left == {"0": "3 pads its input with zeros, so that channel 2 speaks for all dead ones"}
    assert network[3].weight[0, :, 0, 0].tolist() == [5.0, 0.0, 7.0 + 6.0 * 1 / 2]
    assert sending(network, graph, gone, x)["0"].tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("between", "reader", "reason"),
    [
        (nn.AvgPool2d(3, 1, 1), nn.Conv2d(2, 4, 1), "does not read the same everywhere"),
        (nn.ReLU(), nn.Conv2d(2, 4, 1, bias=False), "neither a bias nor a BatchNorm"),
        (nn.ReLU(), nn.ConvTranspose2d(2, 4, 2), "does not weigh each place of the map alike"),
        (nn.ReLU(), nn.Conv2d(2, 4, 3, padding="same"), "pads its input with zeros"),
        (nn.ReLU(), nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), None),
        (nn.ReLU(), nn.Conv2d(2, 4, 1, padding="same"), None),
    ],
)
def test_what_cannot_be_moved_says_why(between: nn.Module, reader: nn.Module, reason: str | None) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), between, reader, nn.Sigmoid(), nn.Flatten(1))
    x = torch.randn(2, 1, 4, 4)
    network.append(nn.Linear(network.eval()(x).shape[1], 3)).eval()
    with torch.no_grad():
        network[1].weight[1] = 0.0
        network[1].bias[1] = 0.5
    graph, before = trace(network, x[:1]), copy.deepcopy(network)
    gone = {group.name: np.zeros(group.channels, dtype=bool) for group in graph.groups}
    gone["0"][1] = True
    left = fold(network, graph, gone, x[:1])
    assert left.keys() == ({"0"} if reason else set())
    assert reason is None or reason in left["0"]
    assert sending(network, graph, gone, x[:1])["0"].tolist() == [False, reason is not None]
    assert difference(before, network, x) < 1e-5


def test_dead_filters_say_nothing() -> None:
    network, graph, x = shaped("residual")
    channels = killed(network, graph, x, target="filters")
    assert any(gone.any() for gone in dead(network, channels).values())
    assert not any(heard.any() for heard in sending(network, graph, dead(network, channels), x[:1]).values())
    plan = free(network, graph, channels, x)
    assert difference(network, cut(network, graph, plan), x) < 1e-5


# --- preparation -----------------------------------------------------------------------------------------------------


def test_sparsity_counts_every_parameter() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)), nn.ReLU())
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        network[0].bias.fill_(1.0)
    found = sparsity(network)
    assert found.layers == {"0": 3 / 6, "1.0": 2 / 4}
    assert found.whole == 5 / 10


def test_a_greater_c_leaves_more_at_zero(task: Task) -> None:
    settings = Directional(epochs=4, lr=0.1, mu=0.6)
    found = [sparsity(dp.sparse(task, settings=replace(settings, c=c)).network).whole for c in (0, 0.1, 0.5, 2, 50)]
    assert found[0] == 0
    assert found == sorted(found)
    assert found[1] < found[2] < found[3]
    assert found[4] == 1


STRUCTURED = Structured(epochs=4, share=0.4)


@pytest.mark.parametrize("target", ["scales", "filters"])
def test_a_structured_training_leaves_about_the_wanted_share_and_whole_channels(task: Task, target: str) -> None:
    settings = replace(STRUCTURED, target=target)
    prepared = dp.structured(task, settings=settings)
    graph = trace(task.network, task.example)
    gone = np.concatenate([*dead(prepared.network, bundles(task.network, graph, task.example, target=target)).values()])
    assert 0.2 < gone.mean() < 0.6
    share_after = dp.share_after(task, settings=settings)
    assert share_after(1e-9) == 0
    assert share_after(1e3) == 1


@pytest.mark.parametrize(
    "prepare",
    [
        lambda task, progress: dp.sparse(task, 0, progress, settings=Directional(c=0.5, epochs=4)),
        lambda task, progress: dp.structured(task, 0, progress, settings=STRUCTURED),
    ],
    ids=["sparse", "structured"],
)
@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_preparation_goes_on_to_the_same_network(task: Task, tmp_path: Path, prepare, stop: int) -> None:
    def kill(done: int, total: int, _: str) -> None:
        if done > stop:
            raise KeyboardInterrupt

    whole = prepare(at(task, tmp_path / "whole"), None)
    with pytest.raises(KeyboardInterrupt):
        prepare(at(task, tmp_path / "killed"), kill)
    seen: list[int] = []
    resumed = prepare(at(task, tmp_path / "killed"), lambda done, *_: seen.append(done))
    assert seen[0] > 1
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    assert (parameters(whole.network) == 0).any()
    assert not torch.equal(parameters(whole.network), parameters(task.network))


@pytest.mark.parametrize(
    "prepare",
    [
        lambda task: dp.sparse(task, settings=Directional(c=0, lr=1e30, epochs=3)),
        lambda task: dp.structured(task, settings=Structured(lr=1e30, epochs=3, c=0)),
    ],
    ids=["sparse", "structured"],
)
def test_a_diverging_training_says_so(task: Task, prepare) -> None:
    with pytest.raises(TrainingDiverged, match=r"(loss is|weights hold) .* at learning rate .*e\+"):
        prepare(task)


def test_the_rate_of_the_training_is_the_published_one(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = GRDA.step
    monkeypatch.setattr(
        GRDA, "step", lambda self: (seen.append(self.param_groups[0]["lr"]), original(self))[1], raising=True
    )
    dp.sparse(task, settings=Directional(epochs=10, lr=0.1))
    assert seen == pytest.approx(rates(0.1, epochs=10, steps=1))


# --- the method ------------------------------------------------------------------------------------------------------


def method(**changes: object) -> baselines.Method:
    return dp.directional("own", replace(STRUCTURED, **changes))


@pytest.mark.parametrize("target", ["scales", "filters"])
def test_its_own_ratios_stand_and_the_cut_network_is_the_prepared_one(task: Task, target: str) -> None:
    chosen = method(target=target)
    prepared = chosen.prepare(task, 0, None)
    graph = trace(task.network, task.example)
    gone = dead(prepared.network, bundles(task.network, graph, task.example, target=target))
    heard = sending(prepared.network, graph, gone, task.example)
    result = baselines.prune(chosen, task, budget=1.0, **PLAIN)
    own = {name: max(1, int((~gone[name] | heard[name]).sum())) for name in gone}
    assert result.counts == own
    assert sum(own.values()) < graph.full.sum()
    x = example(8)
    assert difference(prepared.network, result.network, x) < 1e-5
    # A budget with a little more room than that changes nothing.
    assert baselines.prune(chosen, task, budget=result.search.macs + 1, **PLAIN).counts == own


def test_a_tighter_budget_takes_the_weakest_and_never_revives_the_dead(task: Task) -> None:
    chosen = method()
    own = baselines.prune(chosen, task, budget=1.0, **PLAIN)
    for share in (0.9, 0.6, 0.4):
        limit = int(share * own.search.macs)
        result = baselines.prune(chosen, task, budget=limit, **PLAIN)
        assert result.search.macs <= limit
        assert all(result.counts[name] <= count for name, count in own.counts.items())
    counts = baselines.prune(chosen, task, budget=0.9, min_channels=3, **PLAIN).counts
    assert min(counts.values()) >= 3


def test_the_allocation_by_hand(task: Task) -> None:
    problem = make_problem(task, budget=1.0, **OPTIONS)
    lists = ([0.0, 3.0, 1.0, 0.0], [2.0, 0.0, 0.5], [0.0, 0.0])
    scores = {group.name: np.array(score) for group, score in zip(problem.graph.groups, lists, strict=True)}
    levels = (np.arange(1, 5), np.arange(1, 4), np.arange(1, 3))

    def counts(limit: float) -> list[int]:
        choices = Choices(levels, lambda counts: np.asarray(counts).sum(-1), limit)
        return dp.own_ratios(Case(problem, choices, scores)).tolist()

    # Two, two and none are above zero; then .5 goes, then 1.
    assert [counts(limit) for limit in (9.0, 5.0, 4.0, 3.0)] == [[2, 2, 1], [2, 2, 1], [2, 1, 1], [1, 1, 1]]


def test_a_dead_channel_that_speaks_for_others_comes_behind_the_living(task: Task) -> None:
    network, graph, x = shaped("residual")
    channels = killed(network, graph, x)
    gone = dead(network, channels)
    fold(network, graph, gone, x[:1])
    problem = make_problem(replace(task, network=network), budget=1.0, **OPTIONS)
    scores = case_of(method(), problem).scores
    heard = sending(network, graph, gone, x[:1])
    assert any(speaks.any() for speaks in heard.values())
    least = min(score[~gone[name]].min() for name, score in scores.items() if not gone[name].all())
    for name, score in scores.items():
        assert (score[gone[name] & ~heard[name]] == 0).all()
        assert ((score[heard[name]] > 0) & (score[heard[name]] < least)).all()
        np.testing.assert_allclose(score[~gone[name]], norms(network, channels)[name][~gone[name]])


def test_the_unstructured_training_is_a_method_with_the_importance_of_the_user(task: Task) -> None:
    short = replace(
        dp.DIRECTIONAL_UNSTRUCTURED, prepare=lambda *a: dp.sparse(*a, settings=Directional(c=0.5, epochs=2))
    )
    result = baselines.prune(short, task, budget=0.5, importance="l1", **PLAIN)
    assert result.search.macs <= 0.5 * trace(task.network, task.example).cost["macs"](traced("residual").full)
    assert rise(0.1, mu=0.5, step=1) == pytest.approx(0.1)
