"""SCOP: every formula on three channels by hand, what may change and what may not, the rules that decide, the cuts."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from baselines import METHODS, MethodPolicy, scop, scop_learning
from baselines.allocate import Choices
from baselines.method import Case, Method, case_of, run
from baselines.scop import (
    PAPER,
    SCOP,
    SCOP_FDR,
    SCOP_NEGATIVE,
    SCOP_PAPER,
    discovered,
    false_discoveries,
    knockoff_plus,
    negative,
    renew_statistics,
    self_deciding,
)
from baselines.scop_knockoffs import (
    BANDWIDTHS,
    KnockoffGenerator,
    discrepancy,
    knockoff_loss,
    swapped_patches,
)
from baselines.scop_layers import (
    ControlledNetwork,
    SelectionLayer,
    block_convolutions,
    group_scores,
    kept_at_rate,
    norm_scales,
    permuted,
    published_cuts,
    signed_score,
    sliced,
    writers_of,
)
from baselines.scop_learning import (
    CONTROLS,
    Settings,
    Source,
    adam_on_scales,
    learned,
    learning,
    observed,
)
from prune_env.config import make_problem
from prune_env.envs.dynamics import Problem
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import count_macs, count_params
from prune_env.pruning.plan import Plan
from prune_env.pruning.tracing import trace
from prune_env.tasks.dense import usual_training
from prune_env.tasks.images import ArrayImages, Split
from prune_env.tasks.networks import make_network
from prune_env.tasks.normalisation import parse
from prune_env.tasks.resnet import CifarResNet, ZeroPadShortcut
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainingDiverged, TrainingState
from tests.contracts import cut_agrees_with_masked
from tests.env.graphs import traced
from tests.env.small_networks import build, example
from tests.methods.own_tasks import own_task, split

QUICK = Settings(epochs=4, batch_size=32)
"""Twelve steps on an own task."""
PLAIN = {"recalibrate": False, "refit": "none", "calibration_images": 96}


@cache
def task(name: str = "residual") -> Task:
    return own_task(name)


@cache
def problem(name: str = "residual") -> Problem:
    return make_problem(task(name), budget=0.5, **PLAIN)


def case(budget: float = 1.0, *, seed: int = 0, task: Task | None = None) -> Case:
    return case_of(METHODS["uniform"], problem(), budget=budget, seed=seed, task=task)


@cache
def trained(seed: int = 0) -> ControlledNetwork:
    return learn(seed=seed)


def learn(name: str = "residual", *, seed: int = 0, settings: Settings = QUICK, **options) -> ControlledNetwork:
    source = Source(task(name).train, "own", seed, **options)
    return learned(task(name).network, traced(name), source, settings)


def scales(controlled: ControlledNetwork) -> torch.Tensor:
    return torch.cat([selection.beta.detach() for selection in controlled.selections])


def with_betas(controlled: ControlledNetwork, **values: list[float]) -> None:
    for name, selection in zip(controlled.writers, controlled.selections, strict=True):
        if name.replace(".", "_") in values:
            selection.beta.data.copy_(torch.tensor(values[name.replace(".", "_")]))


# --- mixing ----------------------------------------------------------------------------------------------------------


def test_mixing_by_hand() -> None:
    layer = SelectionLayer(3)
    assert layer.beta.tolist() == [0.5, 0.5, 0.5]
    layer.beta.data.copy_(torch.tensor([1.0, 0.25, 0.0]))
    real = torch.tensor([2.0, 4.0, 6.0]).view(1, 3, 1, 1).expand(1, 3, 1, 2)
    control = torch.tensor([5.0, 8.0, 7.0]).view(1, 3, 1, 1).expand(1, 3, 1, 2)
    mixed = layer(real, control)
    # 2; .25 * 4 + .75 * 8; 7
    assert mixed[0, :, 0, 0].tolist() == mixed[0, :, 0, 1].tolist() == [2.0, 7.0, 7.0]


def test_mixing_of_a_linear_layer_by_hand() -> None:
    layer = SelectionLayer(3, axis=-1)
    layer.beta.data.copy_(torch.tensor([1.0, 0.25, 0.0]))
    assert layer(torch.tensor([[2.0, 4.0, 6.0]]), torch.tensor([[5.0, 8.0, 7.0]])).tolist() == [[2.0, 7.0, 7.0]]


def test_an_end_of_the_range_is_exact_in_any_number_format() -> None:
    real, control = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4).bfloat16()
    for value, expected in ((1.0, real), (0.0, control)):
        assert torch.equal(SelectionLayer(3, start=value)(real, control), expected)


def test_a_network_by_hand_mixes_each_layer_with_unmixed_control_features() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False), nn.Flatten())
    network[0].weight.data.copy_(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1))
    network[1].weight.data.fill_(1.0)
    controlled = ControlledNetwork(network, ("0", "1"), control=lambda images: 10 * images)
    with_betas(controlled, **{"0": [1.0, 0.5, 0.0], "1": [0.5]})
    # First layer: 1; .5 * 2 + .5 * 20; 30, in all 42. The control alone: 60. Then .5 * 42 + .5 * 60.
    logits = controlled.train()(torch.ones(1, 1, 1, 1))
    assert logits.tolist() == [[51.0]]
    logits.sum().backward()
    # d/d beta of the first: .5 (real - control) of each channel, of the second: 42 - 60.
    assert controlled.selections[0].beta.grad.tolist() == [-4.5, -9.0, -13.5]
    assert controlled.selections[1].beta.grad.tolist() == [-18.0]
    assert all(parameter.grad is None for parameter in controlled.network.parameters())
    assert controlled.eval()(torch.ones(1, 1, 1, 1)).tolist() == [[6.0]]


def authors(controlled: ControlledNetwork, images: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    """The authors' way: one batch, whose second half passes unchanged."""

    def behind(selection: SelectionLayer):
        def hook(module: nn.Module, args: tuple, x: torch.Tensor) -> torch.Tensor:
            real, other = x.chunk(2)
            beta = selection.beta.view(1, -1, *(1,) * (x.dim() - 2))
            return torch.cat([beta * real + (1 - beta) * other, other])

        return hook

    pairs = zip(controlled.writers, controlled.selections, strict=True)
    handles = [controlled.network.get_submodule(name).register_forward_hook(behind(layer)) for name, layer in pairs]
    try:
        return controlled.network(torch.cat([images, control]))[: len(images)]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "concatenated"])
def test_two_passes_give_what_the_authors_one_batch_gives(name: str) -> None:
    images, control = example(4), example(4, seed=2)
    controlled = ControlledNetwork(build(name), writers_of(traced(name)), control=lambda _: control).train()
    for selection in controlled.selections:
        nn.init.uniform_(selection.beta)
    found, expected = controlled(images), authors(controlled, images, control)
    torch.testing.assert_close(found, expected)
    betas = list(controlled.selections.parameters())
    for one, two in zip(
        torch.autograd.grad(found.square().sum(), betas),
        torch.autograd.grad(expected.square().sum(), betas),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_features_that_are_rectified_in_place_wait_as_they_were() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1), nn.Flatten())
    controlled = ControlledNetwork(network, ("0",), control=lambda images: -images).train()
    x = torch.randn(8, 1, 1, 1)
    expected = network[1:](0.5 * network[0](x) + 0.5 * network[0](-x))
    torch.testing.assert_close(controlled(x), expected)


# --- the control -----------------------------------------------------------------------------------------------------


def test_a_permutation_is_drawn_anew_and_knows_no_labels() -> None:
    labels = torch.arange(50) % 5
    images = labels.float().view(50, 1, 1, 1)
    draws = [permuted(images).flatten() for _ in range(400)]
    assert all(torch.equal(draw.sort().values, labels.sort().values.float()) for draw in draws)
    same = torch.stack([draw == labels for draw in draws]).float()
    assert float(same.mean()) == pytest.approx(1 / 5, abs=0.01)
    # No place is tied to a class, its own or any other.
    meets = torch.stack([torch.stack(draws).eq(label).float().mean(0) for label in range(5)])
    assert float((meets - 1 / 5).abs().max()) < 0.1
    torch.manual_seed(3)
    first = permuted(images)
    torch.manual_seed(3)
    assert torch.equal(permuted(images), first)
    assert not torch.equal(permuted(images), first)


def test_logits_stay_with_their_images() -> None:
    images = example(8)
    controlled = ControlledNetwork(build("residual"), writers_of(traced("residual")), control=permuted, start=1.0)
    with torch.no_grad():
        torch.testing.assert_close(controlled.train()(images), build("residual")(images))


def test_the_training_seed_decides_the_permutations() -> None:
    assert torch.equal(scales(trained()), scales(learn()))
    assert not torch.equal(scales(trained()), scales(trained(1)))


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    learn(settings=replace(QUICK, control="generator", epochs=1))
    assert torch.equal(before, torch.random.get_rng_state())


# --- learning --------------------------------------------------------------------------------------------------------


def test_nothing_but_the_scales_changes() -> None:
    controlled, dense = trained(), task().network
    assert controlled.network.state_dict().keys() == dense.state_dict().keys()
    for name, value in dense.state_dict().items():
        assert torch.equal(controlled.network.state_dict()[name], value), name
    assert not dense.training
    assert all(parameter.requires_grad for parameter in dense.parameters())
    for selection in controlled.selections:
        assert (selection.beta != 0.5).any()
    with torch.no_grad():
        assert torch.equal(controlled(example(3)), dense(example(3)))


def test_scales_stay_in_their_range() -> None:
    found = scales(learn(settings=replace(QUICK, rate=0.4)))
    assert ((found >= 0) & (found <= 1)).all()
    assert (found == 0).any()
    assert (found == 1).any()


def test_only_the_scales_are_given_to_adam_without_decay_at_a_constant_rate() -> None:
    controlled = trained()
    settings = QUICK.training(data="own", images=96, seed=0)
    assert (settings.weight_decay, settings.label_smoothing, settings.lr) == (0.0, 0.0, 0.004)
    optimizer = adam_on_scales(controlled, settings, decays=QUICK.decays)
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(selection.beta) for selection in controlled.selections}
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.004, (0.5, 0.9), 0)
    group["lr"] = 7.0
    learning(controlled, QUICK).before_step(TrainingState(controlled, optimizer, steps=12))
    assert group["lr"] == 0.004


def test_a_first_step_is_one_rate_long() -> None:
    moved = (scales(learn(settings=Settings(epochs=1, batch_size=96))) - 0.5).abs()
    assert float(moved.max()) == pytest.approx(0.004, rel=1e-3)
    assert float(moved.median()) == pytest.approx(0.004, rel=1e-2)


def test_the_scaled_default_follows_its_rule_and_the_paper_its_code() -> None:
    # 375 steps an epoch: 3 epochs are the fewest for 1,000. 17 an epoch would need 59: 30 are the most.
    assert Settings().training(data="cifar10", images=48_000, seed=0).epochs == 3
    digits = Settings().training(data="digits", images=1137, seed=2)
    assert (digits.epochs, digits.batch_size, digits.crop, digits.flip, digits.seed) == (30, 64, 1, False, 2)
    assert Settings().training(data="own", images=96, seed=0).crop == 0
    paper = PAPER.training(data="imagenet", images=1_281_167, seed=0)
    assert (paper.epochs, paper.batch_size, paper.lr, PAPER.decays, PAPER.start) == (20, 512, 0.004, (0.5, 0.9), 0.5)


def test_a_killed_training_goes_on_to_the_same_scales_and_is_then_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def kill(done: int, total: int, _: str) -> None:
        if done > total / 2 + 1:
            raise KeyboardInterrupt

    def watch(done: int, total: int, _: str) -> None:
        seen.append(done)

    with pytest.raises(KeyboardInterrupt):
        learn(seed=1, task=task(), progress=kill)
    resumed = learn(seed=1, task=task(), progress=watch)
    assert seen[0] > 1
    assert seen[-1] == 12
    assert torch.equal(scales(resumed), scales(trained(1)))
    again = learn(seed=1, task=task(), progress=lambda *told: pytest.fail("trained again"))
    assert torch.equal(scales(again), scales(resumed))


def test_a_task_is_prepared_once_and_handed_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = scop.prepare(task(), 5, None, settings=QUICK)
    assert prepared is task()
    monkeypatch.setattr(scop_learning, "train", lambda *args, **options: pytest.fail("trained again"))
    scores = scop.importance(case(seed=5, task=task()), settings=QUICK)
    monkeypatch.undo()
    expected = group_scores(learn(seed=5), problem().graph, task().example)
    for name, values in expected.items():
        np.testing.assert_array_equal(scores[name], values)


def test_what_is_not_finite_stops_the_training() -> None:
    broken = copy.deepcopy(task().network)
    broken.head.weight.data[0, 0] = torch.nan
    with pytest.raises(TrainingDiverged, match="loss is nan"):
        learned(broken, traced("residual"), Source(task().train, "own", 0), QUICK)


class Branching(nn.Module):
    """A network that asks its input which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.second(self.second(x)) if x.mean() > 0 else self.second(x)
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_network_that_treats_control_images_otherwise_is_refused(sign: int) -> None:
    network = Branching().eval()
    network.first.bias.data.fill_(0.0)
    network.first.weight.data.fill_(0.1)
    controlled = ControlledNetwork(network, ("first", "second"), control=lambda images: -images, start=1.0).train()
    with pytest.raises(ValueError, match="SCOP cannot control this network: it runs layer 'second' otherwise"):
        controlled(sign * torch.ones(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0"),
        ({"decays": (0.5, 1.0)}, "decays is"),
        ({"start": 1.5}, r"start is 1.5; allowed is a number in \[0, 1\]"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"pass_size": 1}, "pass_size is 1"),
        ({"control": "generater"}, "did you mean 'generator'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)


# --- the score -------------------------------------------------------------------------------------------------------


def test_the_score_by_hand_is_signed() -> None:
    beta, gamma = torch.tensor([0.75, 0.25, 1.0]), torch.tensor([2.0, -1.0, 0.5])
    assert signed_score(beta, gamma.abs()).tolist() == [1.0, -0.5, 0.5]
    assert signed_score(beta).tolist() == [0.5, -0.5, 1.0]


def test_a_norm_scales_the_layer_that_it_reads_and_no_other() -> None:
    network = build("residual")
    found = norm_scales(network, writers_of(traced("residual")), example())
    assert set(found) == {"stem.0", "one.0.0", "two.0.0"}
    network.one[0][1].weight.data[2] = -3.0
    assert float(norm_scales(network, ("one.0.0",), example())["one.0.0"][2]) == 3.0


def test_a_groups_score_is_the_sum_over_its_writers_by_hand() -> None:
    network, graph = build("residual"), traced("residual")
    network.stem[1].weight.data.copy_(torch.tensor([2.0, -1.0] + [1.0] * 6))
    controlled = ControlledNetwork(network, writers_of(graph), control=permuted)
    with_betas(
        controlled,
        stem_0=[0.75, 0.25] + [0.5] * 6,
        one_1=[1.0, 0.0, 0.6] + [0.5] * 5,
        two_1=[0.5, 0.5, 0.1] + [0.5] * 5,
    )
    # |2| * .5 + 1 + 0; |-1| * -.5 - 1 + 0; 0 + .2 - .8
    stream = group_scores(controlled, graph, example())["stem.0"]
    np.testing.assert_allclose(stream, [2.0, -1.5, -0.6, 0, 0, 0, 0, 0], atol=1e-6)


def test_a_unit_of_several_positions_has_the_sum_of_their_scores() -> None:
    network, graph = build("grouped"), traced("grouped")
    controlled = ControlledNetwork(network, writers_of(graph), control=permuted)
    group, network.first[1].weight.data = graph.group("first.0"), torch.ones(8)
    (slot,) = group.producers
    beta = [0.5 + 0.05 * position for position in range(8)]
    with_betas(controlled, first_0=beta)
    scale = norm_scales(controlled.network, ("first.0",), example())["first.0"]
    expected = np.zeros(group.channels)
    for position, unit in zip(slot.index, slot.unit, strict=True):
        expected[unit] += float(scale[position]) * (2 * beta[position] - 1)
    assert group.channels < 8
    np.testing.assert_allclose(group_scores(controlled, graph, example())["first.0"], expected, rtol=1e-5)


# --- the self-deciding rules -----------------------------------------------------------------------------------------


def scored(*, budget: float = 1.0, **scores: list[float]) -> Case:
    """Groups of 8, 6 and 4 channels."""
    found = {name.replace("_", "."): np.array(values) for name, values in scores.items()}
    return replace(case(budget), scores=found)


SCORES = {
    "stem_0": [3.0, -1.0, 2.0, -0.5, 0.0, 1.0, -2.0, 0.3],
    "one_0_0": [-1.0, -1.0, -2.0, -3.0, -0.1, -0.2],
    "two_0_0": [4.0, 5.0, 6.0, 0.7],
}
"""Four positive channels, none, and all."""


@pytest.mark.parametrize(
    ("level", "threshold"),
    # t = 1: 2 of 5; 1.5: 2 of 4; 2: 1 of 4; 3: 1 of 3; 4: 1 of 2; 5: 1 of 1
    [(0.5, 1.0), (0.4, 1.0), (0.39, 2.0), (0.25, 2.0), (0.2, np.inf)],
)
def test_the_knockoff_threshold_by_hand(level: float, threshold: float) -> None:
    scores = np.array([5.0, -1.5, 4.0, 0.0, 3.0, 2.0, 1.0, 0.0])
    assert knockoff_plus(scores, level) == threshold
    assert discovered(scores, level=level).tolist() == (scores >= threshold).tolist()


def test_the_negative_rule_keeps_what_beats_the_control_and_never_less_than_the_minimum() -> None:
    assert negative(scored(**SCORES)).tolist() == [4, 1, 4]
    least = case_of(
        METHODS["uniform"], make_problem(task(), budget=1.0, min_channels=2, round_to=2, **PLAIN), budget=1.0
    )
    odd = {**scored(**SCORES).scores, "stem.0": np.array([3.0, -1.0, 2.0, -0.5, 0.0, 1.0, -2.0, -0.3])}
    # Three of eight go up to the next even count.
    assert negative(replace(least, scores=odd)).tolist() == [4, 2, 4]


def test_the_false_discovery_rule_counts_all_groups_at_once() -> None:
    # Of 18 channels, at t = 3: (1 + 1) / 4; at 4: (1 + 0) / 3; at .3: (1 + 7) / 8.
    assert knockoff_plus(np.concatenate([np.array(v) for v in SCORES.values()]), 0.4) == 4.0
    asked = scored(**SCORES)
    rule = partial(self_deciding, keep=partial(discovered, level=0.4))
    assert rule(asked).tolist() == [1, 1, 3]
    # At the level of .1 nothing is found, and the minimum stays.
    assert false_discoveries(asked).tolist() == [1, 1, 1]


@pytest.mark.parametrize("rule", [negative, false_discoveries])
def test_a_tighter_budget_raises_one_threshold_for_all_groups(rule) -> None:
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(1.5, 1.0, size=len(values)).tolist() for name, values in SCORES.items()}
    free = rule(scored(**scores))
    assert 9 < free.sum() < 18
    for budget in (0.7, 0.5):
        asked = scored(budget=budget, **scores)
        counts = rule(asked)
        assert asked.choices.fits(counts)
        assert (counts <= free).all()
        for group in np.flatnonzero(counts < free):
            more = counts.copy()
            more[group] += 1
            assert not asked.choices.fits(more)
    # Only what filled up the budget, or a group's minimum, may lie below what went.
    ordered = [np.sort(values)[::-1] for values in asked.scores.values()]
    lost = [high for values, n, most in zip(ordered, counts, free, strict=True) for high in values[n:most]]
    kept = [low for values, n in zip(ordered, counts, strict=True) for low in values[1:n]]
    assert lost
    assert sum(high > low for high in lost for low in kept) <= 2


def test_what_a_rule_does_not_need_is_left() -> None:
    asked = scored(budget=0.9, **SCORES)
    assert negative(asked).tolist() == [4, 1, 4]
    assert asked.choices.cost(negative(asked)) < 0.9 * asked.choices.limit
    narrow = replace(
        asked, choices=Choices((np.array([8]), np.array([3, 6]), np.array([1, 4])), asked.choices.cost, 1e9)
    )
    assert negative(narrow).tolist() == [8, 3, 4]


# --- the methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SCOP, SCOP_PAPER, SCOP_NEGATIVE, SCOP_FDR], ids=lambda method: method.name)
def test_every_method_keeps_its_budget(method: Method) -> None:
    result = run(method, problem(), task=method.prepare(task(), 0, None))
    assert count_macs(result.network, example()) == result.search.macs <= 0.5 * count_macs(task().network, example())
    assert count_params(result.network) == result.search.params
    assert min(result.counts.values()) >= 1
    assert not result.network.training
    if method in (SCOP, SCOP_PAPER):
        whole = run(method, problem(), task=task(), keep=1.0)
        assert whole.plan == Plan.full(problem().graph)
        with torch.no_grad():
            torch.testing.assert_close(whole.network(example(3)), task().network(example(3)))


def random_images(network: str, *, channels: int, side: int) -> tuple[nn.Module, LayerGraph, Split]:
    built = make_network(network, classes=10, channels=channels, side=side)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (16, channels, side, side), generator=draw, dtype=torch.uint8)
    labels = torch.randint(10, (16,), generator=draw)
    images = Split(ArrayImages(pixels), torch.arange(16), labels, 10, parse("half", channels=channels))
    # The contract itself is what verifies.
    return built, trace(built, images.take(1)[0], verify=False), images


@pytest.mark.parametrize(("network", "channels", "side"), [("cnn", 1, 8), ("resnet20", 3, 16)])
def test_cut_agrees_with_masked_for_what_the_scores_keep(network: str, channels: int, side: int) -> None:
    built, graph, images = random_images(network, channels=channels, side=side)
    controlled = learned(built, graph, Source(images, "own", 0), Settings(epochs=2, batch_size=8))
    scores = group_scores(controlled, graph, images.take(1)[0])
    assert all(len(np.unique(values)) > 1 for values in scores.values())
    plan = Plan.of_counts(graph, graph.full // 2, scores)
    cut_agrees_with_masked(built, graph, images.take(4)[0], plan)


def test_without_a_task_scales_are_learned_on_calibration_images_once(monkeypatch: pytest.MonkeyPatch) -> None:
    posed = replace(problem())
    images = observed(posed)
    shown, labels = images.take(96)
    torch.testing.assert_close(shown, posed.evaluator.calibration, rtol=0, atol=2 / 255 / 2 + 1e-5)
    with torch.no_grad():
        assert torch.equal(labels, posed.evaluator.network(posed.evaluator.calibration).argmax(1))
    importance = partial(scop.importance, settings=QUICK)
    method = replace(SCOP_NEGATIVE, importance=importance)
    policy = MethodPolicy(method, posed)
    expected = method.allocate(case_of(method, posed, budget=0.6))
    monkeypatch.setattr(scop, "learned", lambda *args: pytest.fail("learned again"))
    np.testing.assert_array_equal(policy.counts(0.6), expected)


def test_inputs_that_are_no_images_are_refused_where_there_is_no_task() -> None:
    evaluator = copy.copy(problem().evaluator)
    evaluator.calibration = torch.zeros(4, 7)
    with pytest.raises(ValueError, match=r"learns from images, not from inputs of shape \(7,\)"):
        observed(replace(problem(), evaluator=evaluator))


# --- the repair ------------------------------------------------------------------------------------------------------


def test_the_pass_moves_statistics_by_their_momentum_and_nothing_else() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(192, 5)).eval()
    images = split(40, 1)
    before = copy.deepcopy(network.state_dict())
    renew_statistics(network, images, replace(usual_training("own", "cnn", seed=0), batch_size=64))
    expected = images.take(40)[0].mean((0, 2, 3))
    torch.testing.assert_close(network[0].running_mean, 0.1 * expected, rtol=1e-2, atol=1e-3)
    assert int(network[0].num_batches_tracked) == 1
    renew_statistics(network, images, replace(usual_training("own", "cnn", seed=0), batch_size=13))
    assert int(network[0].num_batches_tracked) == 4  # a fourth batch would be a single image
    assert not any(module.training for module in network.modules())
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_published_repair_is_that_pass_in_the_place_of_any_other() -> None:
    asked = case(task=task())
    plan = Plan({"one.0.0": (0, 2, 3)})
    repaired = scop.published_repair(asked, plan, settings=PAPER)
    usual = problem().evaluator.realise(plan)
    changed = {
        name for name, tensor in repaired.state_dict().items() if not torch.equal(tensor, usual.state_dict()[name])
    }
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}


# --- published cuts --------------------------------------------------------------------------------------------------


def scattered(network: nn.Module, kept: dict[str, list[int]], images: torch.Tensor) -> torch.Tensor:
    """The authors' masked network: what a norm writes is zero outside the kept channels."""

    def only(channels: list[int]):
        def hook(module: nn.Module, args: tuple, x: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(x.shape[1])
            mask[channels] = 1
            return x * mask.view(1, -1, 1, 1)

        return hook

    for name, channels in kept.items():
        network.get_submodule(name.replace("conv", "bn")).register_forward_hook(only(channels))
    return network(images)


def test_the_sliced_network_computes_what_the_masked_one_does() -> None:
    network = CifarResNet(1, classes=10, channels=3).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data, module.weight.data):
                nn.init.uniform_(tensor, -1, 1)
    blocks = block_convolutions(network)
    assert blocks == tuple((f"layer{stage}.0.conv1", f"layer{stage}.0.conv2") for stage in (1, 2, 3))
    rng = np.random.default_rng(0)
    kept = {}
    for name in (name for block in blocks for name in block):
        channels = network.get_submodule(name).out_channels
        kept[name] = sorted(rng.choice(channels, kept_at_rate(channels, 0.45), replace=False).tolist())
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        small, masked = sliced(network, kept)(images), scattered(copy.deepcopy(network), kept, images)
        dense = network(images)
        torch.testing.assert_close(sliced(network, {})(images), dense)
    torch.testing.assert_close(small, masked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(small, dense, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "rate", "macs", "params"),
    [
        ("resnet18", 0.30, 38.1, 39.3),
        ("resnet18", 0.35, 43.5, 45.0),
        ("resnet50", 0.35, 45.4, 42.8),
        ("resnet50", 0.45, 55.6, 52.2),
    ],
)
def test_published_cuts_of_imagenet_networks(name: str, rate: float, macs: float, params: float) -> None:
    with torch.device("meta"):
        network, image = torchvision.models.get_model(name).eval(), torch.empty(1, 3, 224, 224)
    found = published_cuts(network, image, rate=rate)
    assert {resource: round(100 * cut, 1) for resource, cut in found.items()} == {"macs": macs, "params": params}


@pytest.mark.parametrize(("name", "macs"), [("resnet20", 55.8), ("resnet32", 55.9), ("resnet56", 56.0)])
def test_published_cuts_of_cifar_networks(name: str, macs: float) -> None:
    network = make_network(name, classes=10, channels=3, side=32)
    # The authors' shortcuts are bare convolutions.
    for shortcut in [name for name, module in network.named_modules() if isinstance(module, ZeroPadShortcut)]:
        first = network.get_submodule(shortcut.replace("shortcut", "conv1"))
        bare = nn.Conv2d(first.in_channels, first.out_channels, 1, stride=2, bias=False)
        network.set_submodule(shortcut, bare)
    found = published_cuts(network.to("meta"), torch.empty(1, 3, 32, 32, device="meta"), rate=0.45)
    assert round(100 * found["macs"], 1) == macs


def test_what_has_no_published_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="Chain has no residual block"):
        published_cuts(build("chain"), example(), rate=0.3)
    with torch.device("meta"):
        grouped = torchvision.models.resnext50_32x4d()
    with pytest.raises(ValueError, match=r"ResNet has no residual block .*: plain convolutions conv1, conv2, conv3"):
        sliced(grouped, {})
    with pytest.raises(ValueError, match=r"rate is 1.0; a share from 0 below 1"):
        published_cuts(build("chain"), example(), rate=1.0)
    with pytest.raises(ValueError, match="'stem', which is no convolution of a residual block"):
        sliced(CifarResNet(1, classes=10, channels=3), {"stem": (0,)})


def test_the_published_rounding() -> None:
    assert [kept_at_rate(channels, 0.35) for channels in (64, 16, 2)] == [42, 11, 2]


# --- knockoff images -------------------------------------------------------------------------------------------------


def test_the_discrepancy_by_hand() -> None:
    one, two = torch.tensor([[0.0]]), torch.tensor([[3.0]])
    across = sum(np.exp(-9 / (2 * width**2)) for width in BANDWIDTHS)
    assert float(discrepancy(one, two)) == pytest.approx(np.sqrt(2 * (len(BANDWIDTHS) - across)), rel=1e-5)
    assert float(discrepancy(one, one)) == pytest.approx(0, abs=1e-5)


def test_the_knockoff_loss_tells_exchangeable_and_unrelated_from_the_rest() -> None:
    images, other = torch.randn(512, 1, 4, 4), torch.randn(512, 1, 4, 4)
    swap = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    swap[..., :2, :] = True
    unrelated = float(knockoff_loss(images, other, swap))
    assert float(knockoff_loss(images, images, swap)) > unrelated + 0.5  # says all about its image
    assert float(knockoff_loss(images, 3 * other, swap)) > unrelated + 0.05  # of another size
    # Each pixel with a neighbour that its knockoff goes with: not exchangeable once only one of them is swapped.
    tied = images[..., :1].expand(512, 1, 4, 4)
    assert float(knockoff_loss(tied, other, swap)) > unrelated + 0.05


def test_whole_patches_are_swapped_the_same_in_all_images() -> None:
    swap = torch.stack([swapped_patches(torch.zeros(3, 1, 8, 10)) for _ in range(200)])
    assert swap.shape == (200, 1, 1, 8, 10)
    assert float(swap.float().mean()) == pytest.approx(0.5, abs=0.1)
    for patch in (swap[..., :4, :4], swap[..., 4:, 8:]):
        assert (patch.flatten(1).all(1) | ~patch.flatten(1).any(1)).all()
    assert not torch.equal(swap[..., 0, 0], swap[..., 0, 4])


def test_a_generator_learns_knockoffs_and_stays_as_it_was_while_scales_are_learned() -> None:
    source = Source(task().train, "own", 0)
    control = CONTROLS["generator"](source)
    images = task().train.take(96)[0]
    with torch.no_grad():
        swap = swapped_patches(images)
        fresh = [float(knockoff_loss(images, KnockoffGenerator(3)(images), swap)) for _ in range(3)]
        assert float(knockoff_loss(images, control(images), swap)) < min(fresh)
        assert not torch.equal(control(images), control(images))  # noise of its own each time
    controlled = learn(settings=replace(QUICK, control="generator"))
    for name, tensor in control.state_dict().items():
        assert torch.equal(controlled.control.state_dict()[name], tensor)
    assert not torch.equal(scales(controlled), scales(trained()))
