"""Channel gating: the layer by hand, its limits, what is counted, what trains, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prune_env
from baselines import channel_gating
from baselines.channel_gating import (
    PAPER,
    PAPER_POST_ACTIVATION,
    GatingSettings,
    attached,
    post_activated,
    prepared,
    pull_of,
    run_channel_gating,
    scaled,
    surrogate,
    target_of,
    towards,
    undecayed,
    within,
)
from baselines.channel_gating_layers import (
    BASES,
    ChannelGatedNetwork,
    GatedConvolution,
    Gating,
    attach,
    shuffled,
)
from baselines.channel_gating_measurement import (
    GatingCost,
    GatingMeasurement,
    measure_gating,
    open_share,
    open_share_importance,
)
from baselines.method import case_of
from prune_env.config import make_problem
from prune_env.pruning.importance import IMPORTANCES
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainingDiverged, TrainingState, TrainSettings
from prune_env.tasks.training.settings import one_cycle
from tests.env.small_networks import build, example
from tests.methods.own_tasks import own_task

QUICK = TrainSettings(epochs=2, lr=0.05, batch_size=32, crop=0, flip=False, dtype="float32", threads=1)


class Three(nn.Module):
    """Three channels at two positions: a stem that hands them through, a convolution whose weights are small integers.

    The norm has no mean and unit variance, so that every number can be worked out by hand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1, bias=False)
        self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, eps=1e-12)
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(3)[:, :, None, None])
            weight = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, -1.0], [0.0, 1.0, 1.0]])
            self.conv.weight.copy_(weight[:, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(self.stem(x))).relu().mean((2, 3)))


X = torch.tensor([[[[1.0, -1.0]], [[2.0, 0.5]], [[-1.0, 3.0]]]])
"""One image. The base of output i is input i, with weight 1: z is the image."""


def three(step: str = "sparse") -> ChannelGatedNetwork:
    """The network above with thresholds 0, 1 and 3, and a BN_1 that differs from BN_2."""
    network, x = Three().eval(), torch.zeros(1, 3, 1, 2)
    gated = attach(network, trace(network, x), x, Gating(parts=3, step=step))
    with torch.no_grad():
        gated.thresholds[0].copy_(torch.tensor([0.0, 1.0, 3.0]))
        gated.layers[0].scale.copy_(torch.tensor([1.0, 2.0, 1.0]))
        gated.layers[0].shift.copy_(torch.tensor([0.0, 0.0, 0.5]))
    return gated


def bell(u: float) -> float:
    """The derivative of a sigmoid of slope 2."""
    s = 1 / (1 + math.exp(-2 * u))
    return 2 * s * (1 - s)


@pytest.fixture(scope="module")
def task() -> Task:
    """Digits, barely trained, and few of them to train on."""
    task = prune_env.make_task("digits-cnn", epochs=8)
    few = dataclasses.replace(task.train, indices=task.train.indices[:256], labels=task.train.labels[:256])
    return dataclasses.replace(task, train=few)


# The layer


def test_the_layer_by_hand() -> None:
    # Y = (3, -.5), (5, -4.5), (1, 3.5). Open are 1 > 0, not -1; 2 > 1, not .5; not -1, and not 3, which is not above 3.
    layer = three().layers[0]
    assert layer.partial(X)[0, :, 0].tolist() == [[1.0, -1.0], [2.0, 0.5], [-1.0, 3.0]]
    assert layer(X)[0, :, 0].tolist() == [[3.0, -1.0], [5.0, 1.0], [-0.5, 3.5]]


@pytest.mark.parametrize(
    ("step", "thresholds"),
    [
        # BN_2(Y) - BN_1(Y_p) is (2, .5), (1, -5.5), (1.5, 0), z - Delta is (1, -1), (1, -.5), (-4, 0).
        ("smooth", [-2.5 * bell(1), -bell(1) + 5.5 * bell(-0.5), -1.5 * bell(-4)]),
        ("sparse", [-2 * bell(1), -bell(1), 0.0]),
    ],
)
def test_the_gradient_of_the_gates_by_hand(step: str, thresholds: list[float]) -> None:
    layer = three(step).layers[0]
    layer(X).sum().backward()
    assert layer.gate.threshold.grad.tolist() == pytest.approx(thresholds)
    # Weight (0, 0) is in the base: read in full at the first position, alone at the second, and by the gate.
    by_gate = {"smooth": 2 * bell(1) - 0.5 * bell(-1), "sparse": 2 * bell(1)}[step]
    assert layer.convolution.weight.grad[0, 0].item() == pytest.approx(1 - 1 + by_gate)
    # Weight (0, 1) is not: it learns where the gate is open alone.
    assert layer.convolution.weight.grad[0, 1].item() == 2.0


def test_the_slope_is_that_of_the_sigmoid() -> None:
    layer = GatedConvolution(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, eps=0.0), Gating(parts=2, slope=6.0)).eval()
    with torch.no_grad():
        layer.gate.threshold.fill_(0.0)
    z = torch.tensor([0.1, 0.5]).view(1, 2, 1).requires_grad_()
    layer.gate(z).sum().backward()
    assert z.grad.flatten().tolist() == pytest.approx([3 * bell(0.3), 3 * bell(1.5)])


def test_both_norms_follow_their_own_sums_in_training() -> None:
    torch.manual_seed(1)
    layer = GatedConvolution(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, momentum=1.0), Gating(parts=2)).train()
    x = torch.randn(5, 6, 6, 6)
    layer(x)
    torch.testing.assert_close(layer.full_norm.running_mean, layer.convolution(x).mean((0, 2, 3)))
    torch.testing.assert_close(layer.base_norm.running_mean, layer.partial(x).mean((0, 2, 3)))
    assert not torch.allclose(layer.full_norm.running_mean, layer.base_norm.running_mean)


def test_maps_stay_in_the_number_format_of_the_step() -> None:
    layer, x = three().layers[0], torch.randn(4, 3, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        with torch.no_grad():
            layer.gate.threshold.fill_(-torch.inf)
            assert torch.equal(layer(x), layer.full_norm(layer.convolution(x)))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.gate.threshold.grad.abs().sum() > 0


@pytest.mark.parametrize(("channels", "parts"), [(8, 2), (12, 4), (7, 3), (10, 4), (5, 5)])
def test_a_shuffle_is_a_permutation_that_can_be_undone(channels: int, parts: int) -> None:
    order = shuffled(channels, parts)
    assert sorted(order) == list(range(channels))
    assert order[np.argsort(order)].tolist() == list(range(channels))
    x = torch.randn(2, channels, 3, 3)
    assert torch.equal(x[:, order][:, np.argsort(order)], x)
    if channels % parts == 0:
        assert torch.equal(x[:, order], nn.ChannelShuffle(parts)(x))


def test_bases_by_hand() -> None:
    def base(name: str, outputs: int, inputs: int, parts: int) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in BASES[name](outputs, inputs, parts)]

    assert base("first", 3, 4, 2) == [[0, 1]] * 3
    assert base("grouped", 4, 4, 2) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert base("mixed", 4, 4, 2) == [[0, 2], [0, 2], [1, 3], [1, 3]]
    assert base("grouped", 3, 5, 2) == [[0, 1, 2], [0, 1, 2], [3, 4]]  # nothing is dropped
    for name in ("grouped", "mixed"):
        assert BASES[name](7, 10, 3).any(0).all()


def test_a_mixed_base_is_a_grouped_one_of_shuffled_inputs() -> None:
    convolution, norm, order = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), shuffled(8, 2)
    moved = copy.deepcopy(convolution)
    with torch.no_grad():
        moved.weight.copy_(convolution.weight[:, order])
    x = torch.randn(2, 8, 5, 5)
    mixed = GatedConvolution(convolution, norm, Gating(parts=2, base="mixed")).partial(x)
    grouped = GatedConvolution(moved, norm, Gating(parts=2)).partial(x[:, order])
    torch.testing.assert_close(mixed, grouped)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("inputs", "outputs", "parts", "options"), [(7, 5, 3, {}), (8, 4, 4, {"stride": 2})])
def test_parts_keep_the_shape(base: str, inputs: int, outputs: int, parts: int, options: dict[str, Any]) -> None:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect", **options)
    layer, x = GatedConvolution(convolution, nn.BatchNorm2d(outputs), Gating(parts, base)), torch.randn(2, inputs, 6, 6)
    assert layer(x).shape == layer.partial(x).shape == convolution(x).shape


# Thresholds at their limits


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "concatenated", "split", "shuffled"])
@pytest.mark.parametrize("base", BASES)
def test_open_everywhere_it_is_the_dense_network_bit_for_bit(name: str, base: str) -> None:
    network, x = build(name), example(4)
    before = copy.deepcopy(network.state_dict())
    gated = attach(network, trace(network, example()), example(), Gating(parts=2, base=base, start=0.5))
    gated.calibrate(x)
    with torch.no_grad():
        dense = network(x)
        assert not torch.equal(gated(x), dense)
        with gated.at(-torch.inf):
            assert torch.equal(gated(x), dense)
    assert all((own == 0.5).all() for own in gated.thresholds)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_closed_everywhere_it_computes_from_the_base_alone() -> None:
    network, x = build("chain"), example(4)
    gated = attach(network, trace(network, example()), example(), Gating(parts=2))
    gated.calibrate(x)
    layer, seen = gated.layers[0], []
    layer.register_forward_hook(lambda module, args, out: seen.append((layer.partial(args[0]), out)))
    with torch.no_grad(), gated.at(torch.inf):
        nn.init.uniform_(layer.scale)
        closed = gated(x)
        (partial, out), norm = seen[0], layer.base_norm
        expected = nn.functional.batch_norm(partial, norm.running_mean, norm.running_var, layer.scale, layer.shift)
        torch.testing.assert_close(out, expected)
        layer.convolution.weight.mul_(layer.base[:, :, None, None])
        layer.full_norm.weight.normal_()  # BN_2 is not asked
        assert torch.equal(gated(x), closed)


def test_partial_sums_are_calibrated_with_every_gate_open() -> None:
    network, x = build("residual"), example(16)
    gated = attach(network, trace(network, example()), example(), Gating(parts=2, start=9.0))
    gated.calibrate(x)
    seen: list[torch.Tensor] = []
    handle = gated.layers[-1].base_norm.register_forward_hook(lambda module, args, z: seen.append(z))
    with torch.no_grad(), gated.at(-torch.inf):
        gated(x)
    handle.remove()
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].var((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


# Which convolutions


def test_gated_are_the_convolutions_with_norm_and_rectifier_behind_them() -> None:
    def found(network: nn.Module, x: torch.Tensor, parts: int = 2) -> ChannelGatedNetwork:
        return attach(network.eval(), trace(network, x), x, Gating(parts))

    gated = found(build("depthwise"), example())
    assert gated.names == ("expand.0",)
    assert {name: " ".join(reason.split()[:3]) for name, reason in gated.refused.items()} == {
        "stem.0": "the first convolution",
        "depthwise.0": "a grouped convolution",
        "squeeze": "no BatchNorm with",
        "excite": "no BatchNorm with",
        "project.0": "no rectifier stands",
        "head": "a Linear is",
    }
    resnet = make_network("resnet20", classes=10)
    names = found(resnet, torch.zeros(1, 3, 32, 32), 4).names
    assert names == tuple(f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3))
    assert len(found(post_activated(resnet), torch.zeros(1, 3, 32, 32), 2).names) == 18
    assert "8 inputs and 4 outputs are too few" in found(build("shuffled"), example(), 5).refused["fourth.0"]


class Odd(nn.Module):
    """Convolutions that run twice, are read elsewhere, are changed in place; norms that do nothing and show nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        for name in ("twice", "leaky", "read", "changed", "bare", "fine"):
            setattr(self, name, nn.Conv2d(4, 4, 1))
            setattr(self, f"{name}_norm", nn.BatchNorm2d(4, track_running_stats=name != "bare"))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = self.twice_norm(self.twice(x)).relu()
        x = nn.functional.leaky_relu(self.leaky_norm(self.leaky(x)))
        y = self.read(x)
        x = self.read_norm(y).relu() + y
        x = self.changed_norm(self.changed(x).relu_()).relu()
        x = self.bare_norm(self.bare(x)).relu()
        return self.head(self.fine_norm(self.fine(x)).relu().mean((2, 3)))


def test_what_is_not_supported_is_left_whole_with_the_reason() -> None:
    network = Odd().eval()
    gated = attach(network, trace(network, example()), example(), Gating(parts=2))
    assert gated.names == ("fine",)
    assert gated.refused == {
        "stem": "the first convolution stays whole",
        "twice": "it or its norm runs more than once for an input",
        "leaky": "no rectifier stands directly behind its norm: what is negative there still counts",
        "read": "something else than its norm reads its output, too",
        "changed": "no BatchNorm with statistics reads its output directly",
        "bare": "no BatchNorm with statistics reads its output directly",
        "head": "a Linear is no ordinary convolution",
    }
    with torch.no_grad(), gated.at(-torch.inf):
        assert torch.equal(gated(example(2)), network(example(2)))


def test_a_network_that_looks_at_its_own_layers_is_refused() -> None:
    class Looking(Three):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (2 if isinstance(self.norm, nn.Identity) else 1)

    network = Looking().eval()
    with pytest.raises(ValueError, match="something else with gates, although every gate is open"):
        attach(network, trace(network, X), X, Gating(parts=3))


@pytest.mark.parametrize("name", ["normalised", "transposed", "attention"])
def test_a_network_without_such_a_convolution_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"no convolution that channel gating supports \(.*first convolution"):
        prepared(own_task(name), GatingSettings(QUICK))


def test_a_block_that_rectifies_before_the_addition() -> None:
    network, x = make_network("resnet20", classes=10), torch.randn(2, 16, 8, 8)
    block, other = network.layer1[0], post_activated(network).layer1[0]
    with torch.no_grad():
        branch = block.bn2(block.conv2(block.relu1(block.bn1(block.conv1(x)))))
        assert torch.equal(other(x), branch.relu() + x)
        assert torch.equal(block(x), (branch + x).relu())
    with pytest.raises(ValueError, match="no ResidualBlock"):
        post_activated(build("chain"))


# What is counted


def test_macs_by_hand() -> None:
    # Stem and layer have 3 * 3 * 2 macs, the head 3 * 2. Each of the layer's 6 outputs saves 2 macs where it is closed.
    gated = three()
    cost = GatingCost.of(gated)
    assert (cost.dense, cost.least) == (18 + 18 + 6, 18 + 6 + 6)
    # The second image has channel 0 closed, 1 and 2 open at both positions.
    images = torch.cat([X, torch.tensor([[[[0.0, -1.0]], [[2.0, 1.5]], [[4.0, 5.0]]]])])
    for batches in ([images], images.split(1)):
        found = measure_gating(gated, [(part, torch.zeros(len(part)).long()) for part in batches], dtype=torch.float32)
        assert found.macs.tolist() == [18 + 6 + 6 + 2 * 2, 18 + 6 + 6 + 4 * 2]
        assert found.macs_share == pytest.approx((34 + 38) / 2 / 42)
        assert found.opened == pytest.approx([6 / 12])
        assert found.closed == pytest.approx([2 / 6])
        assert found.varying == pytest.approx([2 / 3])  # 0 and 2 are closed for one image each
        assert found.params == found.dense_params + 3 * 3
        assert found.row()["open_gates"] == found.opened
    shares = open_share(gated, gated.graph.groups, images)
    assert {name: share.tolist() for name, share in shares.items()} == {"conv": [1 / 4, 3 / 4, 2 / 4]}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_cost_at_its_limits_is_eta_and_one(base: str, parts: int) -> None:
    network, x = build("shuffled"), example(3)
    gated = attach(network, trace(network, example()), example(), Gating(parts=parts, base=base))
    cost, batch = GatingCost.of(gated), [(x, torch.zeros(3).long())]
    assert gated.names == ("second.0", "third.0", "fourth.0")
    with gated.at(-torch.inf):
        assert set(measure_gating(gated, batch).macs) == {cost.dense} == {prune_env.count_macs(network, example())}
    with gated.at(torch.inf):
        closed = measure_gating(gated, batch)
    assert set(closed.macs) == {cost.least}
    assert closed.closed == [1.0] * 3
    assert closed.varying == [0.0] * 3
    whole = sum(gated.graph.layer(name).macs for name in gated.names)
    left = whole - (cost.dense - cost.least)
    # 8, 6 and 8 inputs: half of each, exactly; other parts differ by a channel.
    assert left == whole / 2 if parts == 2 else 0 < left < whole / 2


def test_more_open_gates_cost_what_they_read() -> None:
    gated = attached(own_task("chain"), Gating(parts=3))  # 8 inputs in parts of 3, 3, 2; two outputs each
    (rest,), (positions,) = GatingCost.of(gated).rest, GatingCost.of(gated).positions
    assert positions == 16
    assert rest.tolist() == [9 * 5] * 4 + [9 * 6] * 2
    with torch.no_grad():
        gated.thresholds[0].copy_(torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0, -1.0]) * torch.inf)
    found = measure_gating(gated, [(example(2), torch.zeros(2).long())])
    assert (found.macs == GatingCost.of(gated).least + 16 * (45 + 54)).all()
    assert found.opened == pytest.approx([2 / 6])


# The static surrogate


def test_the_surrogate_is_an_importance_and_leaves_other_groups_alone() -> None:
    gated, images = three(), torch.cat([X, X])
    network, batch = Three().eval(), (images, torch.zeros(2).long())
    importance = open_share_importance(gated)
    scores = {group.name: importance(network, group, batch) for group in gated.graph.groups}
    assert scores["conv"].tolist() == [0.5, 0.5, 0.0]
    assert torch.equal(scores["stem"], IMPORTANCES["l1"](network, gated.graph.group("stem"), batch))


def test_the_surrogate_method_scores_the_groups_that_gates_write(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(task: Task, settings: GatingSettings) -> ChannelGatedNetwork:
        gated = attached(task, settings.gating)
        with torch.no_grad():
            for own in gated.thresholds:
                own.copy_(torch.arange(len(own)) / 10)
        return gated

    monkeypatch.setattr(channel_gating, "prepared", untrained)
    problem = make_problem(task, budget=0.5)
    case = case_of(channel_gating.SURROGATE, problem, task=task)
    assert case.scores.keys() == problem.scores.keys()
    gated = untrained(task, GatingSettings(QUICK))
    for name, scores in case.scores.items():
        assert scores.shape == (problem.graph.group(name).channels,)
        assert np.array_equal(scores, problem.scores[name]) is (name not in gated.names)
    wide = case.scores["wide.0"]
    assert wide.min() >= 0
    assert wide.max() <= 1
    assert wide[:8].mean() > wide[-8:].mean()  # the higher a threshold, the less it opens
    assert surrogate(dataclasses.replace(case, task=None)) is problem.scores


# Training


def test_the_penalty_by_hand() -> None:
    gated = three()
    network = nn.Linear(1, 1)
    state = TrainingState(network, torch.optim.SGD(network.parameters()), 1)
    penalty = towards(gated, target=2.0, pull=0.1).penalty(state)
    assert penalty.item() == pytest.approx(0.1 * (4 + 1 + 1))  # thresholds 0, 1, 3
    penalty.backward()
    assert gated.thresholds[0].grad.tolist() == pytest.approx([-0.4, -0.2, 0.2])


def test_the_scaled_pull_takes_thresholds_nearly_to_their_target() -> None:
    training = TrainSettings(epochs=10, lr=0.05, batch_size=32, momentum=0.9)
    pull, steps = pull_of(training, images=6400), 2000
    place, speed = 0.0, 0.0
    for step in range(steps):
        speed = 0.9 * speed + 2 * pull * (place - 1.0)
        place -= one_cycle(training, step=step, steps=steps) * speed
    assert place == pytest.approx(1 - math.exp(-3), abs=0.02)


def test_what_has_one_axis_is_not_decayed() -> None:
    gated = three()
    groups = undecayed(gated, PAPER.training).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 1e-4]
    assert {parameter.dim() for parameter in groups[0]["params"]} == {1}
    assert any(parameter is gated.thresholds[0] for parameter in groups[0]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(gated.parameters()))
    assert not any(group["nesterov"] for group in groups)


def test_the_published_constants() -> None:
    assert (PAPER.gating, PAPER.target, PAPER.pull) == (Gating(4, "grouped", 0.0, 2.0, "sparse"), 1.0, 1e-4)
    training = PAPER.training
    assert (training.epochs, training.lr, training.batch_size, training.weight_decay) == (250, 0.1, 128, 1e-4)
    other = PAPER_POST_ACTIVATION
    assert (other.gating.parts, other.target, other.training.lr, other.training.weight_decay) == (2, 0.6, 0.08, 3e-4)


def test_a_higher_target_costs_less(task: Task) -> None:
    results = {t: run_channel_gating(task, scaled(task, target=t, epochs=6)) for t in (-1.0, 1.0)}
    for target, result in results.items():
        assert torch.cat(list(result.gated.thresholds)).mean().item() == pytest.approx(target, abs=0.3)
        assert result.search.accuracy > 0.3
        assert not result.gated.training
        assert isinstance(result.search, GatingMeasurement)
        assert len(result.search.macs) == len(task.search)
    assert results[1.0].search.macs_share < results[-1.0].search.macs_share - 0.2
    assert len(results[1.0].test.macs) == len(task.test)
    assert results[1.0].test is results[1.0].test


def test_a_killed_training_goes_on_to_the_same_network_and_is_trained_once(tmp_path: Path) -> None:
    def kill(done: int, total: int, _: str) -> None:
        if done > total / 2 + 1:
            raise KeyboardInterrupt

    own = own_task("chain")
    whole, killed = (dataclasses.replace(own, settings={"root": str(tmp_path / name)}) for name in ("whole", "killed"))
    settings = GatingSettings(QUICK, Gating(parts=2), pull=0.1, teacher=0.5)
    expected = prepared(whole, settings).state_dict()
    with pytest.raises(KeyboardInterrupt):
        prepared(killed, settings, progress=kill)
    seen: list[int] = []
    resumed = prepared(killed, settings, progress=lambda done, *_: seen.append(done)).state_dict()
    assert 0 < len(seen) < seen[-1]
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    again = prepared(killed, settings, progress=lambda *_: pytest.fail("trained again")).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in expected.items())


def test_the_teacher_has_a_say(tmp_path: Path) -> None:
    task = dataclasses.replace(own_task("chain"), settings={"root": str(tmp_path)})
    x = task.calibration(96)[0]
    with torch.no_grad():
        answers = task.network(x).softmax(1)
    distance = {}
    for share in (0.0, 1.0):
        gated = prepared(task, GatingSettings(QUICK, Gating(parts=2), pull=0.0, teacher=share))
        with torch.no_grad():
            distance[share] = nn.functional.cross_entropy(gated(x), answers).item()
    assert distance[1.0] < distance[0.0]


def test_a_diverging_training_stops_and_can_be_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ChannelGatedNetwork] = []
    monkeypatch.setattr(channel_gating, "attached", lambda *args: made.append(attached(*args)) or made[-1])

    def poison(done: int, total: int, what: str) -> None:
        if what.startswith("epoch 2/2"):
            with torch.no_grad():
                made[-1].thresholds[0][0] = torch.nan

    task = dataclasses.replace(own_task("chain"), settings={"root": str(tmp_path)})
    settings = GatingSettings(QUICK, Gating(parts=2))
    with pytest.raises(TrainingDiverged, match="epoch 2"):
        prepared(task, settings, progress=poison)
    assert all(value.isfinite().all() for value in made[-1].state_dict().values())
    assert [file.suffixes[0] for file in (tmp_path / "channel-gating").glob("*.safetensors")] == [".checkpoint"]
    assert prepared(task, settings).thresholds[0].isfinite().all()


# Budgets


def test_the_target_of_a_budget_is_found_by_bisection_and_no_more_often_than_allowed() -> None:
    asked: list[float] = []

    def macs(target: float) -> float:
        asked.append(target)
        return 100.0 - 10 * target

    assert target_of(macs, 90.0, low=0.0, high=4.0, evaluations=4) == 1.0
    assert asked == [4.0, 2.0, 1.0, 0.5]
    asked.clear()
    assert target_of(macs, 60.0, low=0.0, high=4.0, evaluations=3) == 4.0
    assert asked == [4.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"budget 59 macs is not reached: the highest target, 4, costs 60"):
        target_of(macs, 59.0, high=4.0)
    with pytest.raises(ValueError, match="evaluations is 0"):
        target_of(macs, 90.0, evaluations=0)


def test_a_budget_is_met_on_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def untrained(task: Task, settings: GatingSettings, *, progress: Any = None) -> ChannelGatedNetwork:
        asked.append(settings.target)
        gated = attached(task, settings.gating)
        with torch.no_grad():
            for own in gated.thresholds:
                own.fill_(settings.target)
        return gated

    monkeypatch.setattr(channel_gating, "prepared", untrained)
    task, settings = own_task("chain"), GatingSettings(QUICK, Gating(parts=4))
    found = within(task, settings, 0.9, evaluations=5)
    assert asked[:2] == [3.0, 0.0]
    assert len(asked) == 5
    images = [task.calibration(96)]
    assert measure_gating(untrained(task, found), images, dtype=torch.float32).macs_share <= 0.9
    lower = untrained(task, dataclasses.replace(found, target=found.target - 6 / 2**4))
    assert measure_gating(lower, images, dtype=torch.float32).macs_share > 0.9
    assert dataclasses.replace(found, target=settings.target) == settings
    with pytest.raises(ValueError, match="smallest share allowed"):
        within(task, settings, 0.1)


# Bad input


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Gating(parts=1), "parts is 1; allowed is 2 or more"),
        (lambda: Gating(base="last"), "base is 'last'; allowed is first, grouped, mixed"),
        (lambda: Gating(step="hard"), "step is 'hard'; allowed is smooth, sparse"),
        (lambda: Gating(start=math.inf), "start is inf"),
        (lambda: Gating(slope=0.0), "slope is 0.0"),
        (lambda: GatingSettings(QUICK, target=math.nan), "target is nan"),
        (lambda: GatingSettings(QUICK, pull=-1.0), r"pull is -1.0"),
        (lambda: GatingSettings(QUICK, teacher=1.5), r"teacher is 1.5; allowed is a share in \[0, 1\]"),
        (lambda: GatingSettings(QUICK, temperature=0.0), "temperature is 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
