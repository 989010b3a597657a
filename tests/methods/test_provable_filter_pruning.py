"""Provable Filter Pruning: every formula on three channels by hand, the bounds as laws, the three variants."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from baselines import METHODS, MethodPolicy
from baselines import provable_filter_pruning as pfp
from baselines.method import Case, case_of, plan_of, run
from baselines.provable_filter_pruning import ErrorBound, bounds, counted, epsilons, included, one_epsilon
from prune_env.config import make_problem
from prune_env.envs.dynamics import Problem
from prune_env.pruning import sensitivity as module_of_sensitivity
from prune_env.pruning.activations import watching
from prune_env.pruning.graph import Group, Slot
from prune_env.pruning.measure import count_macs, count_params
from prune_env.pruning.plan import Plan
from prune_env.pruning.sensitivity import largest, sample_size, sensitivities, summed
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network
from prune_env.tasks.task import Task
from tests.env.graphs import traced
from tests.env.small_networks import NETWORKS, build, example
from tests.methods.own_tasks import own_task

VARIANTS = [name for name in METHODS if name.startswith("provable_filter_pruning")]
CLASSIFIERS = ("chain", "residual", "grouped", "depthwise", "concatenated", "split", "normalised", "attention")


def group_read_by(*consumers: str) -> Group:
    """Three channels, written by module `0`."""
    index = np.arange(3)
    read = tuple(Slot(name, "in", index, index) for name in consumers)
    return Group("0", 3, (Slot("0", "out", index, index),), (), read)


def with_weights(module: nn.Module, values: list) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(torch.tensor(values).reshape(module.weight.shape))
    return module


def sensed(consumer: nn.Module, inputs: torch.Tensor, shares=summed) -> list[float]:
    """Sensitivities of the three channels that a layer reads."""
    network = nn.Sequential(nn.Identity(), consumer).eval()
    return sensitivities(network, [group_read_by("1")], inputs, shares=shares)["0"].tolist()


@cache
def task(name: str) -> Task:
    return own_task(name)


@cache
def problem(name: str = "residual", resource: str = "macs") -> Problem:
    options = {"recalibrate": False, "refit": "none", "calibration_images": 96}
    return make_problem(task(name), budget=1.0, budget_resource=resource, **options)


def case(name: str, budget: float | int, *, method: str = VARIANTS[0], seed: int = 0, resource: str = "macs") -> Case:
    return case_of(METHODS[method], problem(name, resource), budget=budget, seed=seed)


# --- sensitivities ---------------------------------------------------------------------------------------------------


def test_sensitivity_by_hand_takes_positive_and_negative_weights_for_themselves() -> None:
    # Inputs 1, 2, 1. First output: 1 + 2 + 2 = 5. Second: positive 3 * 2 alone; negative 1 + 4 = 5.
    consumer = with_weights(nn.Linear(3, 2), [[1.0, 1.0, 2.0], [-1.0, 3.0, -4.0]])
    assert sensed(consumer, torch.tensor([[1.0, 2.0, 1.0]])) == pytest.approx([1 / 5, 1, 4 / 5])


def test_sensitivity_by_hand_takes_positive_and_negative_inputs_for_themselves() -> None:
    # Positive inputs 1, 0, 1: 1 of 3 and 2 of 3; 1 of 5 and 4 of 5. Negative inputs: the second channel alone.
    consumer = with_weights(nn.Linear(3, 2), [[1.0, 1.0, 2.0], [-1.0, 3.0, -4.0]])
    assert sensed(consumer, torch.tensor([[1.0, -2.0, 1.0]])) == pytest.approx([1 / 3, 1, 4 / 5])


def test_sensitivity_by_hand_sums_kernel_positions_in_the_paper_and_takes_the_largest_in_the_code() -> None:
    # One window of two positions; z = (1 + 2) + (2 + 0) + 3 = 8. The negative weight reads a zero.
    consumer = with_weights(nn.Conv1d(3, 1, 2, bias=False), [[[1.0, 1.0], [2.0, -1.0], [0.0, 1.0]]])
    inputs = torch.tensor([[[1.0, 2.0], [1.0, 0.0], [0.0, 3.0]]])
    assert sensed(consumer, inputs, summed) == pytest.approx([3 / 8, 2 / 8, 3 / 8])
    assert sensed(consumer, inputs, largest) == pytest.approx([2 / 8, 2 / 8, 3 / 8])


def test_the_largest_image_counts_and_a_vanishing_pre_activation_does_not() -> None:
    consumer = with_weights(nn.Linear(3, 1), [1.0, 1.0, 1.0])
    inputs = torch.tensor([[1.0, 1.0, 2.0], [3.0, 1.0, 0.0], [0.0, 1e-8, 0.0]])
    assert sensed(consumer, inputs) == pytest.approx([3 / 4, 1 / 4, 2 / 4])


def test_a_coupled_group_is_as_sensitive_as_its_most_sensitive_consumer() -> None:
    network = nn.ModuleDict({"1": with_weights(nn.Linear(3, 1), [1.0, 1.0, 2.0])})
    network["2"] = with_weights(nn.Linear(3, 1), [3.0, 0.0, 1.0])
    network.forward = lambda x: network["1"](x) + network["2"](x)
    found = sensitivities(network.eval(), [group_read_by("1", "2")], torch.ones(1, 3))["0"]
    assert found.tolist() == pytest.approx([3 / 4, 1 / 4, 2 / 4])


def test_what_no_module_reads_is_as_sensitive_as_can_be() -> None:
    network = nn.Sequential(nn.Identity(), nn.Linear(3, 1)).eval()
    network.unused = nn.Linear(3, 1)
    network.forward = lambda x: network[1](x)
    assert sensitivities(network, [group_read_by("unused")], torch.ones(1, 3))["0"].tolist() == [1, 1, 1]


def half(module: nn.Module, sign: int) -> nn.Module:
    """The layer with its weights of one sign, without bias."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.copy_((sign * module.weight).clamp_min(0))
    other.bias = None
    return other


@torch.no_grad()
def by_definition(network: nn.Module, group: Group, images: torch.Tensor) -> np.ndarray:
    """The paper's sensitivity from the layers themselves: each channel alone, over all inputs."""
    found = np.zeros(group.channels)
    inputs: dict[str, list[torch.Tensor]] = {slot.module: [] for slot in group.consumers}
    with watching(network, inputs, lambda name, module, x: inputs[name].append(x.clone())):
        network(images)
    for name, xs in inputs.items():
        module = network.get_submodule(name)
        axis = -1 if isinstance(module, nn.Linear) else 1
        for x in xs:
            for part in (x.clamp_min(0), (-x).clamp_min(0)):
                for layer in (half(module, 1), half(module, -1)):
                    total = layer(part)
                    for unit in range(group.channels):
                        own = torch.zeros_like(part)
                        for slot in group.consumers:
                            if slot.module == name:
                                index = torch.from_numpy(slot.index[slot.unit == unit])
                                own.index_copy_(axis, index, part.index_select(axis, index))
                        share = torch.where(total > module_of_sensitivity.TINY, layer(own) / total, 0)
                        found[unit] = max(found[unit], float(share.max()))
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_of_coupling_gives_what_the_definition_says(name: str) -> None:
    network, graph, images = build(name), traced(name), example(2)
    found = sensitivities(network, graph.groups, images)
    for group in graph.groups:
        np.testing.assert_allclose(found[group.name], by_definition(network, group, images), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "same", "dilation": 2},
        {"stride": 2, "padding": (0, 2)},
        {"padding": 1, "padding_mode": "reflect", "dilation": (2, 1), "stride": (1, 3)},
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_both_forms_hold_for_any_stride_padding_and_dilation(options: dict, signed: bool) -> None:
    consumer = nn.Conv2d(3, 4, 3, **options)
    inputs = torch.randn(2, 3, 7, 9) if signed else torch.rand(2, 3, 7, 9)
    network = nn.Sequential(nn.Identity(), consumer).eval()
    whole = by_definition(network, group_read_by("1"), inputs)
    np.testing.assert_allclose(sensed(consumer, inputs), whole, rtol=1e-4)
    # A tap alone is a kernel with one weight left: the released code's form, from the definition.
    best = np.zeros(3)
    for tap in np.ndindex(3, 3):
        alone = copy.deepcopy(consumer)
        with torch.no_grad():
            mask = torch.zeros(3, 3)
            mask[tap] = 1
            alone.weight.mul_(mask)
        best = np.maximum(best, _tap_share(consumer, alone, inputs))
    np.testing.assert_allclose(sensed(consumer, inputs, largest), best, rtol=1e-4)
    assert (best <= whole + 1e-6).all()


@torch.no_grad()
def _tap_share(consumer: nn.Module, alone: nn.Module, x: torch.Tensor) -> np.ndarray:
    best = np.zeros(3)
    for part in (x.clamp_min(0), (-x).clamp_min(0)):
        for sign in (1, -1):
            total = half(consumer, sign)(part)
            for unit in range(3):
                own = torch.zeros_like(part)
                own[:, unit] = part[:, unit]
                share = torch.where(total > module_of_sensitivity.TINY, half(alone, sign)(own) / total, 0)
                best[unit] = max(best[unit], float(share.max()))
    return best


def test_for_a_single_kernel_position_both_forms_are_one() -> None:
    consumer, inputs = nn.Conv2d(3, 5, 1), torch.randn(4, 3, 6, 6)
    assert sensed(consumer, inputs, summed) == pytest.approx(sensed(consumer, inputs, largest))


def test_shares_add_up_to_between_one_and_all_channels() -> None:
    for name in NETWORKS:
        for values in sensitivities(build(name), traced(name).groups, example(4)).values():
            assert ((values >= 0) & (values <= 1 + 1e-5)).all()
            assert 1 - 1e-5 <= values.sum() <= len(values) + 1e-5


@pytest.mark.parametrize("shares", [summed, largest])
def test_the_result_does_not_depend_on_how_the_work_is_cut_up(shares, monkeypatch: pytest.MonkeyPatch) -> None:
    network, groups, images = build("chain"), traced("chain").groups, example(40)
    before = sensitivities(network, groups, images, shares=shares)
    for name, value in {"ELEMENTS": 100, "MIN_ROWS": 3, "BATCH_SIZE": 7}.items():
        monkeypatch.setattr(module_of_sensitivity, name, value)
    for name, values in sensitivities(network, groups, images, shares=shares).items():
        torch.testing.assert_close(values, before[name])


def test_a_sample_of_positions_is_never_more_sensitive_than_all() -> None:
    network, groups, images = build("chain"), traced("chain").groups, example(8)
    whole, some = sensitivities(network, groups, images), sensitivities(network, groups, images, positions=5)
    assert all((some[name] <= whole[name] + 1e-6).all() for name in whole)
    assert any((some[name] < whole[name] - 1e-3).any() for name in whole)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet20", 183), ("resnet56", 186), ("resnet110", 188), ("vgg16_bn", 188)]
)
def test_the_sample_is_as_large_as_the_released_code_makes_it(name: str, size: int) -> None:
    assert sample_size(make_network(name, classes=10), torch.zeros(1, 3, 32, 32)) == size


def test_sample_size_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 5)).eval()
    # 2 x 2 x 2 pre-activations, then 5: ceil(3 ln(8 * 8 * 13 / 1e-16)) = ceil(3 * 43.565).
    assert sample_size(network, torch.zeros(2, 3, 4, 4)) == math.ceil(3 * (math.log(832) + 16 * math.log(10))) == 131


def test_dropping_channels_changes_no_pre_activation_by_more_than_their_sensitivities() -> None:
    network, images = build("chain"), example(6)
    group = traced("chain").groups[1]
    (slot,) = group.consumers
    module, read = network.get_submodule(slot.module), []
    with torch.no_grad(), watching(network, [slot.module], lambda name, m, x: read.append(x)):
        network(images)
    values = sensitivities(network, [group], images)[group.name].numpy()
    for lost in itertools.chain.from_iterable(itertools.combinations(range(6), size) for size in range(6)):
        alive = torch.from_numpy(~np.isin(slot.unit, lost))
        for sign in (1, -1):
            z, rest = half(module, sign)(read[0]), half(module, sign)(read[0] * alive)
            assert (rest <= z + 1e-5).all()
            assert (rest >= (1 - values[list(lost)].sum()) * z - 1e-5).all()


# --- the bound -------------------------------------------------------------------------------------------------------

THREE = ErrorBound(np.array([1.0, 0.5, 0.5]), positions=4, weights=9)
"""S = 2, p = 1/2, 1/4, 1/4; one, two, three draws hit 1, 1.625, 2.03125 channels."""


def test_the_bound_by_hand() -> None:
    np.testing.assert_allclose(THREE.probability, [0.5, 0.25, 0.25])
    assert THREE.complexity == pytest.approx(2 * 2 * 3 * (math.log(8 * 5 * 9) + 16 * math.log(10)))
    for epsilon in (0.5, 10.0, 300.0, 1e4):
        assert THREE.draws(epsilon) == math.ceil(3 * (6 + 2 * epsilon) * THREE.complexity / epsilon**2)
    # m draws are unrounded at epsilon = (3 A + sqrt(9 A^2 + 18 A m)) / m.
    a = THREE.complexity
    at = [(3 * a + math.sqrt(9 * a**2 + 18 * a * m)) / m for m in (1, 2, 3)]
    assert [THREE.draws(e * (1 + 1e-9)) for e in at] == [1, 2, 3]
    assert [THREE.kept(e * (1 + 1e-9)) for e in at] == [1, 2, 3]
    # 2.03125 is past 2 with the third draw, 1.625 past 1 with the second: there the group rises.
    np.testing.assert_allclose(THREE.rises, [np.inf, np.inf, at[0], at[1]])
    assert THREE.kept(1e9) == 1


def test_the_error_of_a_count_by_hand() -> None:
    # Two channels: 3 - (1/2)^m - 2 (3/4)^m = 2.
    m = THREE.needed[2]
    assert 1 - 0.5**m + 2 * (1 - 0.75**m) == pytest.approx(2)
    np.testing.assert_allclose(THREE.needed[[0, 1, 3]], [0, 1, np.inf])
    a = THREE.complexity
    np.testing.assert_allclose(THREE.epsilon[[0, 3]], [np.inf, 0])
    np.testing.assert_allclose(THREE.epsilon[2], (3 * a + math.sqrt(9 * a**2 + 18 * a * m)) / m)


sensitivity_vectors = st.lists(
    st.one_of(st.floats(1e-6, 1), st.sampled_from([0.0, 1e-12, 0.5, 1.0])), min_size=1, max_size=12
)


@given(values=sensitivity_vectors)
def test_a_group_rises_exactly_where_the_number_of_kept_channels_does(values: list[float]) -> None:
    bound = ErrorBound(np.array(values), positions=16, weights=9)
    assert (np.diff(bound.rises[1:]) <= 0).all()
    for count in range(2, len(values) + 1):
        at = bound.rises[count]
        if at > 0:
            assert bound.kept(at * (1 - 1e-6)) >= count
            assert bound.kept(at * (1 + 1e-6)) < count


@given(values=sensitivity_vectors)
def test_the_error_falls_with_every_channel_and_a_whole_group_has_none(values: list[float]) -> None:
    error = ErrorBound(np.array(values)).epsilon
    assert error.shape == (len(values) + 1,)
    assert (error[1:-1] >= error[2:]).all()
    assert error[-1] == 0
    for m, epsilon in zip(ErrorBound(np.array(values)).needed, error, strict=True):
        if 0 < m < np.inf:  # (d) of the error is the number of draws again
            assert 3 * (6 + 2 * epsilon) * ErrorBound(np.array(values)).complexity / epsilon**2 == pytest.approx(m)


# --- the allocation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource", ["macs", "params"])
@pytest.mark.parametrize("name", ["residual", "concatenated", "grouped"])
def test_one_epsilon_decides_all_groups_and_any_budget_is_hit_within_one_channel(name: str, resource: str) -> None:
    posed = problem(name, resource)
    found = [bounds(posed)[posed.graph.groups[step].name] for step in posed.steps]
    for limit in np.linspace(posed.minimum, posed.total, 12).astype(int).tolist():
        asked = case(name, limit, resource=resource)
        counts = one_epsilon(asked)
        assert asked.choices.fits(counts)
        for group, channels in enumerate(posed.channels):
            more = counts.copy()
            more[group] += 1
            assert counts[group] == channels or not asked.choices.fits(more)
        candidates = sorted({e for bound in found for e in bound.rises[2:] if e > 0})
        fitting = [
            at
            for e in candidates
            if asked.choices.fits(at := np.array([bound.kept(e * (1 - 1e-9)) for bound in found]))
        ]
        # What the smallest epsilon that fits keeps is kept; anything above is what was left of the budget.
        assert (counts >= (fitting[0] if fitting else 1)).all()


def test_epsilons_of_an_allocation_are_alike_and_a_whole_group_has_none() -> None:
    posed = problem("residual")
    np.testing.assert_array_equal(epsilons(posed, np.array(posed.channels)), 0)
    counts = one_epsilon(case("residual", 0.5))
    found = [bounds(posed)[posed.graph.groups[step].name] for step in posed.steps]
    expected = [bound.epsilon[count] for bound, count in zip(found, counts, strict=True)]
    np.testing.assert_array_equal(epsilons(posed, counts), expected)
    # Channels that never contribute leave no error when they go.
    least = epsilons(posed, np.ones_like(counts))
    assert (least >= expected).all()
    assert (least > expected).any()
    other = epsilons(posed, counts, shares=largest)
    assert (other != epsilons(posed, counts)).any()


@pytest.mark.parametrize("counts", [[1], [0, 1, 1], [99, 1, 1]])
def test_epsilons_of_impossible_counts_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"counts is \[.*\]; from 1 each up to \[8, 6, 4\] are allowed"):
        epsilons(problem("residual"), np.array(counts))


def test_the_bound_counts_positions_and_weights_of_the_consumer() -> None:
    found = bounds(problem("chain"))
    first, second = (group.name for group in problem("chain").graph.groups[:2])
    assert (found[first].positions, found[first].weights) == (16, 9)  # a 4 x 4 map, a 3 x 3 kernel
    assert (found[second].positions, found[second].weights) == (1, 1)  # a linear layer behind a flatten


# --- the variants ----------------------------------------------------------------------------------------------------

P = np.array([0.6, 0.3, 0.1])


def test_counted_by_hand() -> None:
    class Draws(np.random.Generator):
        """Two repetitions after the first hit; one after the second, of the second."""

        repetitions, hits = iter([3, 2]), iter([[2], [0, 1]])

        def geometric(self, p: float) -> int:
            return next(self.repetitions)

        def multinomial(self, n: int, p: np.ndarray) -> np.ndarray:
            return np.array(next(self.hits))

    # Channel 1 is hit first, then channel 0: draws 1 1 1 0 0, so counts 2, 3, 0 of 5.
    gains = counted(P, np.array([2.0, 3.0, 1.0]), 2, Draws(np.random.PCG64()))
    np.testing.assert_allclose(gains, [2 / (5 * 0.6), 3 / (5 * 0.3), 0])


def test_included_by_hand() -> None:
    # The third would enter at time 1 / .5 = 2: expected draws 1.2, .6, .2.
    gains = included(P, np.array([2.0, 1.0, 0.5]), 2, np.random.default_rng(0))
    np.testing.assert_allclose(gains, [1, 1 / (1 - math.exp(-0.6)), 0])


@pytest.mark.parametrize(("gains", "method"), [(counted, pfp.drawn), (included, pfp.mixed)])
@pytest.mark.parametrize("kept", [1, 2])
def test_a_reweighted_channel_counts_once_in_expectation(gains, method, kept: int, monkeypatch) -> None:
    monkeypatch.setattr(pfp, "bounds", lambda problem, shares: {"0": ErrorBound(P)})
    one, drawn = case("residual", 0.5), []
    for seed in range(1500):
        scores = method(replace(one, seed=seed))["0"]
        drawn.append(gains(P, scores, kept, np.random.default_rng([seed, 0, 1])))
        assert np.count_nonzero(drawn[-1]) == kept
    error = np.std(drawn, axis=0) / len(drawn) ** 0.5
    assert (np.abs(np.mean(drawn, axis=0) - 1) < 4 * error + 1e-9).all()


def test_the_first_channel_drawn_is_drawn_by_its_probability(monkeypatch) -> None:
    monkeypatch.setattr(pfp, "bounds", lambda problem, shares: {"0": ErrorBound(P)})
    one = case("residual", 0.5)
    first = [int(pfp.drawn(replace(one, seed=seed))["0"].argmax()) for seed in range(1000)]
    np.testing.assert_allclose(np.bincount(first, minlength=3) / 1000, P, atol=0.05)


@pytest.mark.parametrize("gains", [counted, included])
def test_a_whole_group_and_all_that_can_be_drawn_are_not_reweighted(gains) -> None:
    p = np.array([0.75, 0.25, 0.0])
    scores, rng = np.array([2.0, 1.0, 0.0]), np.random.default_rng(0)
    np.testing.assert_array_equal(gains(p, scores, 3, rng), 1)
    np.testing.assert_array_equal(gains(p, scores, 2, rng), [1, 1, 0])


@pytest.mark.parametrize("name", ["chain", "residual", "concatenated", "split"])
def test_reweighting_scales_exactly_what_the_consumers_read(name: str) -> None:
    asked = case(name, 0.6)
    graph, network = asked.problem.graph, asked.problem.evaluator.network
    plan = plan_of(asked, one_epsilon(asked))

    def gains(p: np.ndarray, scores: np.ndarray, kept: int, rng: np.random.Generator) -> np.ndarray:
        return np.arange(1.0, len(p) + 1)

    small, plain = pfp.reweighted(asked, plan, gains=gains), cut(network, graph, plan)
    expected = copy.deepcopy(network)
    with torch.no_grad():
        for group in graph.groups:
            for slot in group.consumers:
                weight = expected.get_submodule(slot.module).weight
                scale = torch.from_numpy(slot.unit + 1.0).float().reshape(-1, *(1,) * (weight.dim() - 2))
                weight[:, slot.index] *= scale
        torch.testing.assert_close(small(example(4)), cut(expected, graph, plan)(example(4)), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(small(example(4)), plain(example(4)))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_variant_holds_whole_tiny_and_at_the_smallest_budget(name: str) -> None:
    posed, x = problem(name), example(4)
    for method in VARIANTS:
        for value in (1.0, posed.minimum, (posed.minimum + 1) / posed.total, 0.5):
            if value != 0.5 or posed.minimum < 0.5 * posed.total:
                result = run(METHODS[method], replace(posed, value=value), task=task(name), seed=1)
                assert count_macs(result.network, x) == result.search.macs <= posed.budget_of(value).limit
                assert count_params(result.network) == result.search.params
                with torch.no_grad():
                    assert result.network(x).isfinite().all()
                if value == 1.0:
                    assert result.plan == Plan.full(posed.graph)
                    with torch.no_grad():
                        torch.testing.assert_close(result.network(x), task(name).network(x))
        for keep in (1e-9, 0.5):
            kept = run(METHODS[method], posed, task=task(name), keep=keep).counts
            assert all(1 <= count <= posed.graph.group(group).channels for group, count in kept.items())


def test_the_random_variants_differ_by_seed_and_the_deterministic_one_does_not() -> None:
    for method in VARIANTS:
        cases = [case("chain", 0.5, method=method, seed=seed) for seed in range(4)]
        plans = {plan_of(asked, one_epsilon(asked)) for asked in cases}
        assert (len(plans) == 1) == (method == VARIANTS[0])


def test_as_a_policy_it_decides_the_same_counts_and_looks_at_the_images_once(monkeypatch) -> None:
    posed = make_problem(task("residual"), budget=0.5, refit="none", calibration_images=96)
    calls = []
    original = pfp.sensitivities
    monkeypatch.setattr(pfp, "sensitivities", lambda *args, **options: calls.append(1) or original(*args, **options))
    policy = MethodPolicy(METHODS[VARIANTS[0]], posed)
    for share in (0.5, 0.6, 0.7):
        np.testing.assert_array_equal(
            policy.counts(share), one_epsilon(case_of(METHODS[VARIANTS[0]], posed, budget=share))
        )
    assert len(calls) == 1


# --- every network ---------------------------------------------------------------------------------------------------

LARGE = {
    "cnn": (1, 8),
    "lenet300100": (1, 28),
    "m-cifarnet": (3, 32),
    "resnet56": (3, 32),
    "vgg16_bn": (3, 32),
    "wrn-40-4": (3, 32),
    "torchvision:resnext50_32x4d": (3, 64),
    "torchvision:mobilenet_v2": (3, 64),
    "torchvision:densenet121": (3, 64),
    "torchvision:googlenet": (3, 64),
    "torchvision:vgg11_bn": (3, 64),
    "torchvision:efficientnet_b0": (3, 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_sensitivities_of_every_kind_of_network_are_shares_that_fit_the_bound(name: str) -> None:
    channels, side = LARGE[name]
    network = make_network(name, classes=10, channels=channels, side=side)
    images = torch.randn(2, channels, side, side)
    graph = trace(network, images[:1])
    for shares in (summed, largest):
        found = sensitivities(network, graph.groups, images, shares=shares)
        for group in graph.groups:
            values = found[group.name].double().numpy()
            assert ((values >= 0) & (values <= 1 + 1e-4)).all()
            rises = ErrorBound(values).rises
            assert (np.diff(rises[1:]) <= 0).all()
            assert len(rises) == group.channels + 1
