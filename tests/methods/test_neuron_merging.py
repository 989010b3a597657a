"""Neuron Merging: each formula on three channels by hand, what the method promises, and the published table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import prune_env
from baselines import METHODS, prune
from baselines.merging_sites import Norm
from baselines.method import run
from baselines.neuron_merging import (
    NEURON_MERGING,
    PUBLISHED,
    WIDTHS,
    Merging,
    algebraic,
    coded,
    decompose,
    merge,
    published_widths,
    repair_by,
    scaled_to_unit,
)
from benchmarks import merging_table, merging_widths
from prune_env.config import make_problem
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.importance import IMPORTANCES, score
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network
from tests.methods.own_tasks import own_task

PLAIN: dict[str, Any] = {"recalibrate": False, "refit": False, "calibration_images": 96}
NORMS = {"gamma": [1.0, 2.0, 4.0], "beta": [1.0, 0.0, 1.0], "mean": [0.0, 1.0, 2.0], "var": [1.0, 4.0, 1.0]}
"""Of three channels."""


def rows(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


WEIGHTS = rows([[2.0, 0.0], [0.6, 0.8], [4.0, 0.0]])
"""Lengths 2, 1 and 4; the first has a cosine of .6 with the second and of 1 with the third."""


def three_norms(**changes: list[float]) -> Norm:
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in (NORMS | changes).items()}
    return Norm(**values, eps=0.0)


def z(weight: torch.Tensor, norm: Norm | None, kept: list[int], **settings: Any) -> list[list[float]]:
    """Z, rounded so that it compares to what a hand writes."""
    return decompose(weight, norm, torch.tensor(kept), Merging(**settings)).round(decimals=9).tolist()


def test_a_linear_channel_is_merged_into_the_most_similar_kept_one_scaled_by_the_lengths() -> None:
    # The bias is the last weight. Lengths 5, 2 and 10; the third is twice the first.
    weight = rows([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0], [6.0, 0.0, 8.0]])
    assert z(weight, None, [0, 1]) == [[1, 0, 2], [0, 1, 0]]
    assert z(weight, None, [1, 2]) == [[0, 1, 0], [0.5, 0, 1]]


def test_a_channel_less_similar_than_the_threshold_is_dropped() -> None:
    # Cosines of the third with the others: .6 and .8.
    weight = rows([[1.0, 0.0], [0.0, 2.0], [0.6, 0.8]])
    assert z(weight, None, [0, 1], plain_threshold=0.79) == [[1, 0, 0], [0, 1, 0.5]]
    assert z(weight, None, [0, 1], plain_threshold=0.81) == [[1, 0, 0], [0, 1, 0]]


def test_scale_and_bias_distance_behind_a_norm_as_coded_by_hand() -> None:
    # With the second: s = 2, Scale = 2 * 2/1 * 1/4 = 1, B = |2/4 (2 (0 - 1) - 1) + 0| / 1 = 1.5.
    # With the third: s = .5, Scale = .5 * 4/1 * 1/1 = 2, B = |4/1 (.5 (0 - 1) - 2) + 1| / 2 = 4.5.
    one, two = three_norms()[torch.tensor([[0]])], three_norms()[torch.tensor([1, 2])]
    scale, distance = coded(rows([[2.0, 0.5]]), one, two)
    assert (scale.tolist(), distance.tolist()) == ([[1, 2]], [[1.5, 4.5]])


def test_lambda_weighs_the_angle_against_the_bias_distance() -> None:
    # Distances lam * .4 + (1 - lam) * 0 and lam * 0 + (1 - lam) * 1: equal at lam = 1 / 1.4 = .714.
    assert z(WEIGHTS, three_norms(), [1, 2], lam=0.72) == [[0, 1, 0], [2, 0, 1]]
    assert z(WEIGHTS, three_norms(), [1, 2], lam=0.71) == [[1, 1, 0], [0, 0, 1]]


def test_the_threshold_is_that_of_the_chosen_partner() -> None:
    assert z(WEIGHTS, three_norms(), [1, 2], lam=0.71, threshold=0.7) == [[0, 1, 0], [0, 0, 1]]


def test_scale_and_bias_by_algebra_by_hand() -> None:
    # Deviations 1, 2, 1. With the second: Scale = 2 * 1/2 * 2/1 = 2, B = 1/1 (2 (1 - 0) - 0) + 1 = 3.
    # With the third: Scale = .5 * 1/4 * 1/1 = .125, B = 1/1 (.5 (2 - 1/4) - 0) + 1 = 1.875.
    one, two = three_norms()[torch.tensor([[0]])], three_norms()[torch.tensor([1, 2])]
    scale, distance = algebraic(rows([[2.0, 0.5]]), one, two)
    assert (scale.tolist(), distance.tolist()) == ([[2, 0.125]], [[3, 1.875]])
    assert z(WEIGHTS, three_norms(), [1, 2], formula="algebraic") == [[0, 1, 0], [0.125, 0, 1]]


@given(st.integers(0, 1000))
def test_by_algebra_the_norm_of_a_scaled_input_is_the_partners_norm_scaled_and_shifted(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    gamma, beta, mean, var = (torch.rand(4, 2, generator=draw, dtype=torch.float64) + 0.1).unbind()
    norm, x, ratio = Norm(gamma, beta - 0.6, mean, var, 1e-3), torch.linspace(-2, 2, 5).double(), 0.7
    one, two = norm[torch.tensor([[0]])], norm[torch.tensor([1])]
    scale, distance = algebraic(torch.full((1, 1), ratio).double(), one, two)

    def value(channel: int, at: torch.Tensor) -> torch.Tensor:
        own = norm[torch.tensor([channel])]
        return own.gamma * (at - own.mean) / (own.var + own.eps).sqrt() + own.beta

    shift = value(0, ratio * x) - scale[0] * value(1, x)
    torch.testing.assert_close(shift.abs(), distance[0].expand(5))


@pytest.mark.parametrize("formula", ["coded", "algebraic"])
def test_a_single_kept_channel_takes_in_whatever_is_similar_enough(formula: str) -> None:
    (row,) = z(WEIGHTS, three_norms(), [2], formula=formula)
    assert row[2] == 1
    assert row[0] > 0
    assert row[1] > 0
    assert np.isfinite(row).all()


def test_bias_distances_span_zero_to_one_and_equal_ones_tell_nothing() -> None:
    known = torch.tensor([[True, True, False, True], [True, False, False, True], [True, False, False, False]])
    offset = rows([[1.0, 3.0, 99.0, 2.0], [5.0, 0.0, torch.nan, 5.0], [7.0, torch.inf, 0.0, 0.0]])
    found = scaled_to_unit(offset, known)
    assert found[known].tolist() == [0, 1, 0.5, 0, 0, 0]


@pytest.mark.parametrize("formula", ["coded", "algebraic"])
def test_gammas_of_two_signs_never_give_a_negative_scale(formula: str) -> None:
    assert z(WEIGHTS, three_norms(gamma=[-1.0, 2.0, 4.0]), [1, 2], formula=formula) == [[0, 1, 0], [0, 0, 1]]
    same = z(WEIGHTS, three_norms(gamma=[-1.0, 2.0, -4.0]), [2], formula=formula)
    assert same[0][0] > 0
    assert same[0][1] == 0


@pytest.mark.parametrize("formula", ["coded", "algebraic"])
def test_a_zero_gamma_or_an_empty_filter_is_no_partner_and_has_none(formula: str) -> None:
    dead = three_norms(gamma=[0.0, 2.0, 4.0])
    assert z(WEIGHTS, dead, [1, 2], formula=formula) == [[0, 1, 0], [0, 0, 1]]
    empty = rows([[2.0, 0.0], [0.6, 0.8], [0.0, 0.0]])
    assert z(empty, three_norms(), [0, 1], formula=formula) == [[1, 0, 0], [0, 1, 0]]
    found = z(empty, three_norms(), [1, 2], formula=formula)
    assert found[0][0] > 0
    assert found[1] == [0, 0, 1]


def test_without_a_norm_an_empty_filter_is_no_partner_and_has_none() -> None:
    weight = rows([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert z(weight, None, [0, 1], plain_threshold=-1.0) == [[1, 0, 0], [0, 1, 1]]
    assert z(weight, None, [1], plain_threshold=-1.0) == [[0, 1, 1]]


def hidden_three() -> tuple[nn.Module, LayerGraph]:
    """Two inputs, three hidden channels of which the last two are 2 and 3 times the first, two outputs."""
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))
        network[0].bias.copy_(torch.tensor([-1.0, -2.0, -3.0]))
        network[2].weight.copy_(torch.tensor([[1.0, 10.0, 100.0], [-1.0, 0.0, 1.0]]))
    return network, trace(network, torch.randn(1, 2))


def test_two_channels_merged_into_one_add_up() -> None:
    network, graph = hidden_three()
    plan = Plan({"0": (0,)})
    small = cut(network, graph, plan)
    merge(network, small, graph, plan, settings=Merging())
    # 1 + 2 * 10 + 3 * 100, and -1 + 2 * 0 + 3 * 1.
    torch.testing.assert_close(small[2].weight, torch.tensor([[321.0], [2.0]]))
    x = torch.randn(20, 2)
    torch.testing.assert_close(small(x), network(x), rtol=1e-5, atol=1e-4)


def test_merging_composes_with_every_criterion() -> None:
    task = own_task("chain")
    problem = make_problem(task, budget=1.0, recalibrate=False, refit="none", calibration_images=32)
    batch = task.calibration(32)
    for importance in IMPORTANCES:
        scores = score(importance, task.network, problem.graph, batch, moments=problem.evaluator.moments)
        ranked = dataclasses.replace(problem, scores={name: s.double().numpy() for name, s in scores.items()})
        plain, merged = (run(METHODS[name], ranked, task=task, keep=0.5) for name in ("uniform", "neuron_merging"))
        assert (merged.plan, merged.search.macs) == (plain.plan, plain.search.macs)
        own = merged.network.state_dict()
        changed = {name for name, value in plain.network.state_dict().items() if not torch.equal(own[name], value)}
        assert changed, importance
        assert changed <= {"body.2.0.weight", "hidden.weight", "head.weight"}


def test_the_recalibration_comes_after_the_merge_and_the_refit_not_at_all() -> None:
    task = own_task("residual")
    merged = prune("neuron_merging", task, keep=0.5, **PLAIN)
    refitted = prune("neuron_merging", task, keep=0.5, **{**PLAIN, "refit": True})
    recalibrated = prune("neuron_merging", task, keep=0.5, **{**PLAIN, "recalibrate": True})
    for name, value in merged.network.state_dict().items():
        assert torch.equal(refitted.network.state_dict()[name], value)
        if "running" not in name and "tracked" not in name:
            assert torch.equal(recalibrated.network.state_dict()[name], value)
    norm = "one.0.1.running_mean"
    assert not torch.equal(recalibrated.network.state_dict()[norm], merged.network.state_dict()[norm])


def test_settings_of_ones_own_take_the_place_of_the_published_ones() -> None:
    task, nothing = own_task("chain"), Merging(threshold=1.0, plain_threshold=1.0)
    cautious = dataclasses.replace(NEURON_MERGING, repair=repair_by(nothing))
    bare = prune("uniform", task, keep=0.5, **PLAIN).network.state_dict()
    for name, value in prune(cautious, task, keep=0.5, **PLAIN).network.state_dict().items():
        assert torch.equal(value, bare[name])


def test_the_published_settings_are_those_of_the_authors_scripts() -> None:
    assert PUBLISHED["fashion-mnist-lenet300100"].plain_threshold == 0.45
    assert {(s.threshold, s.lam) for name, s in PUBLISHED.items() if "cifar" in name} == {
        (0.1, 0.85),
        (0.1, 0.7),
        (0.1, 0.8),
    }
    assert {settings.formula for settings in PUBLISHED.values()} == {"coded"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5; -1 to 1"),
        ({"plain_threshold": float("nan")}, "plain_threshold is nan"),
        ({"lam": -0.1}, "lam is -0.1; 0 to 1"),
        ({"formula": "code"}, "did you mean 'coded'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Merging(**options)


def test_the_published_widths_cut_what_the_authors_report() -> None:
    graph = trace(make_network("vgg16_bn", classes=10), torch.zeros(1, 3, 32, 32), verify=False)
    for task, params, macs in (("cifar10", 0.640, 0.342), ("cifar100", 0.442, 0.191)):
        counts = np.array(WIDTHS[f"{task}-vgg16_bn"])
        for resource, share in (("params", params), ("macs", macs)):
            cost = graph.cost[resource]
            # Their classifier has one linear layer more: .26 M parameters of 15 M.
            assert 1 - cost(counts) / cost(graph.full) == pytest.approx(share, abs=0.012)


def test_widths_are_refused_where_none_were_published() -> None:
    method = dataclasses.replace(NEURON_MERGING, allocate=published_widths)
    with pytest.raises(ValueError, match="no published widths fit 'own-chain'"):
        prune(method, own_task("chain"), budget=1.0, **PLAIN)


def test_the_criteria_count_the_bias_of_a_neuron_unless_a_norm_follows() -> None:
    network, graph = hidden_three()
    batch = (torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    assert IMPORTANCES["l1"](network, graph.groups[0], batch).tolist() == [4, 8, 12]
    assert IMPORTANCES["l2"](network, graph.groups[0], batch).tolist() == pytest.approx([6**0.5, 24**0.5, 54**0.5])
    normed = nn.Sequential(network[0], nn.BatchNorm1d(3), *network[1:]).eval()
    group = trace(normed, torch.randn(1, 2)).groups[0]
    assert IMPORTANCES["l1"](normed, group, batch).tolist() == [3, 6, 9]


def test_the_method_says_what_it_is() -> None:
    assert METHODS["neuron_merging"] is NEURON_MERGING
    assert "2010.13160" in NEURON_MERGING.paper


def test_the_table_of_widths_prunes_and_merges_the_same_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    task = own_task("residual")
    channels = [group.channels for group in trace(task.network, task.example).groups]
    monkeypatch.setitem(WIDTHS, task.name, tuple(count // 2 for count in channels))
    found = merging_widths.measure(task, criterion="l1", recalibrate=False)
    assert found["pruned"].params == found["merged"].params < prune_env.count_params(task.network)
    assert merging_widths.METHODS_AT_WIDTHS["merged"].repair is NEURON_MERGING.repair
    assert len(merging_widths.row(task, "l1")) == 6


@pytest.mark.slow
def test_the_published_table_to_two_decimals(data_root: Path, weights_root: Path) -> None:
    weights = weights_root / "fashionmnist_lenet300100.safetensors"
    if not weights.exists() or not (data_root / "FashionMNIST").exists():
        pytest.skip("Fashion-MNIST or the authors' weights are not there")
    task = prune_env.make_task("fashion-mnist-lenet300100", weights=weights, root=data_root)
    assert merging_table.base(task) == 89.80
    for cut_share, published in merging_table.PUBLISHED["l1"].items():
        assert merging_table.measure(task, criterion="l1", cut=cut_share) == published
    for criterion in ("l2", "geometric_median"):
        pruned, merged = merging_table.measure(task, criterion=criterion, cut=0.7)
        assert merged > pruned + 5
