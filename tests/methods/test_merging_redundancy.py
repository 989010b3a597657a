"""Redundancy: merge cost, clusters and residual on three channels by hand, and the laws behind them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from baselines.merging_redundancy import MERGING_CLUSTERS, Redundancy, redundancies
from baselines.method import case_of
from baselines.neuron_merging import cosines
from prune_env.config import make_problem
from prune_env.envs.dynamics import Problem
from prune_env.pruning.tracing import trace
from tests.env.graphs import traced
from tests.env.small_networks import NETWORKS, build
from tests.methods.own_tasks import own_task


def three() -> Redundancy:
    """Strengths 3, 1 and 2; the first two have a cosine of .92, the others none."""
    return Redundancy(np.array([3.0, 1.0, 2.0]), np.array([[1, 0.92, 0], [0.92, 1, 0], [0, 0, 1.0]]), True)


def drawn(seed: int, channels: int) -> Redundancy:
    draw = np.random.default_rng(seed)
    weights = torch.from_numpy(draw.normal(size=(channels, 3)))
    return Redundancy(draw.random(channels) + 0.1, cosines(weights).numpy(), True)


def test_strength_is_what_a_channel_sends_on_times_its_gamma_or_its_length() -> None:
    network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[3.0, 4.0], [1.0, 0.0], [4.0, 3.0]]))
        network[1].weight.copy_(torch.tensor([-2.0, 1.0, 0.5]))
        network[3].weight.copy_(torch.tensor([[3.0, 0.0, 5.0], [4.0, 1.0, 12.0]]))
    found = Redundancy.of(network, trace(network, torch.randn(1, 2)).groups[0])
    # Sent on: 5, 1 and 13.
    np.testing.assert_allclose(found.strength, [10, 1, 6.5])
    np.testing.assert_allclose(found.cosine, [[1, 0.6, 0.96], [0.6, 1, 0.8], [0.96, 0.8, 1]], rtol=1e-6)
    assert found.mergeable
    plain = nn.Sequential(network[0], nn.ReLU(), network[3]).eval()
    np.testing.assert_allclose(redundancies(plain, trace(plain, torch.randn(1, 2)).groups)["0"].strength, [25, 1, 65])


def test_merge_costs_by_hand() -> None:
    # sqrt(2 (1 - .92)) = .4. The second goes first, for 1 * .4. Then the third has no partner: 2. Last the first: 3,
    # and what the second costs without it, 1 - .4.
    np.testing.assert_allclose(three().costs(), [0.4 + 2 + 3.6, 0.4, 2.4])


def test_what_cannot_be_merged_costs_its_strength() -> None:
    whole = Redundancy(three().strength, three().cosine, False)
    np.testing.assert_allclose(whole.costs(), [6, 1, 3])
    assert whole.residual((0, 2)) == pytest.approx(1 / 14)


def test_leaders_by_hand() -> None:
    # The strongest leads; the third has nothing in common with it; the second is .08 from the first.
    np.testing.assert_allclose(three().leaders(), [3, 0.08, 1])


def test_the_residual_is_the_share_of_energy_that_merging_cannot_carry() -> None:
    # Energies 9, 1, 4: of the second .92^2 survives in the first, of the third nothing.
    assert three().residual((0, 1, 2)) == 0
    assert three().residual((0, 2)) == pytest.approx((1 - 0.92**2) / 14)
    assert three().residual((0,)) == pytest.approx((1 - 0.92**2 + 4) / 14)
    assert Redundancy(np.zeros(3), three().cosine, True).residual((0,)) == 0


@given(st.integers(0, 10_000), st.integers(2, 7))
def test_merge_costs_are_those_of_an_elimination_that_recounts_everything(seed: int, channels: int) -> None:
    found = drawn(seed, channels)
    each = found.strength[:, None] * np.minimum(1, np.sqrt(2 * (1 - found.cosine)))

    def spent(kept: list[int]) -> float:
        gone = [n for n in range(channels) if n not in kept]
        return sum(min([found.strength[n], *each[n, kept]]) for n in gone)

    kept, expected = list(range(channels)), np.zeros(channels)
    while kept:
        least = min(kept, key=lambda n: spent([m for m in kept if m != n]))
        kept.remove(least)
        expected[least] = spent(kept)
    np.testing.assert_allclose(found.costs(), expected, atol=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 12), st.floats(-0.9, 0.99))
def test_leaders_lie_apart_and_every_other_channel_is_near_one(seed: int, channels: int, tau: float) -> None:
    found = drawn(seed, channels)
    leads = found.leaders() > 1 - tau
    among = found.cosine[np.ix_(leads, leads)][~np.eye(leads.sum(), dtype=bool)]
    assert (among < tau + 1e-9).all()
    assert (found.cosine[~leads][:, leads].max(axis=1, initial=-1) >= tau - 1e-9).all()


def test_the_residuals_of_an_order_by_hand() -> None:
    # energies 4, 1, 1; the second is .6 like the first, the third .8 like the second and not like the first
    found = Redundancy(np.array([2.0, 1.0, 1.0]), np.array([[1, 0.6, 0], [0.6, 1, 0.8], [0, 0.8, 1]]), True)
    assert found.residuals(np.array([0, 1, 2])) == pytest.approx([1, (0.64 + 1) / 6, 0.36 / 6, 0])
    assert found.residuals(np.array([2, 0, 1])) == pytest.approx([1, (4 + 0.36) / 6, 0.36 / 6, 0])
    apart = Redundancy(found.strength, found.cosine, False)
    assert apart.residuals(np.array([2, 0, 1])) == pytest.approx([1, 5 / 6, 1 / 6, 0])


@given(st.integers(0, 10_000), st.integers(2, 8))
def test_keeping_more_never_raises_the_residual(seed: int, channels: int) -> None:
    found = drawn(seed, channels)
    order = np.random.default_rng(seed).permutation(channels).tolist()
    residuals = [found.residual(order[:count]) for count in range(1, channels + 1)]
    assert all(0 <= after <= before + 1e-12 <= 1 + 1e-12 for before, after in itertools.pairwise(residuals))
    assert residuals[-1] == 0


def test_channels_that_repeat_others_cost_nothing() -> None:
    found = Redundancy(np.array([2.0, 1.0, 2.0, 1.0]), np.kron(np.eye(2), np.ones((2, 2))), True)
    costs = found.costs()
    assert np.sort(costs)[:2].tolist() == [0, 0]
    assert costs[:2].min() == costs[2:].min() == 0
    assert found.residual((0, 2)) == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_costs_leaders_and_residuals(name: str) -> None:
    graph = traced(name)
    found = redundancies(build(name), graph.groups)
    for group in graph.groups:
        costs, leaders = found[group.name].costs(), found[group.name].leaders()
        assert costs.shape == leaders.shape == (group.channels,)
        assert np.isfinite(costs).all()
        assert (costs >= 0).all()
        assert np.argmax(leaders) == np.argmax(found[group.name].strength)
        order = np.argsort(-costs)
        residuals = [found[group.name].residual(order[:count].tolist()) for count in range(1, group.channels + 1)]
        assert found[group.name].residuals(order)[1:] == pytest.approx(residuals, abs=1e-12)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(own_task("residual"), budget=0.5, recalibrate=False, refit="none", calibration_images=32)


def test_clusters_keep_less_of_what_is_redundant(problem: Problem) -> None:
    before = dict(zip(problem.steps, MERGING_CLUSTERS.allocate(case_of(MERGING_CLUSTERS, problem)), strict=True))
    step = next(i for i in problem.steps if problem.graph.groups[i].name == "one.0.0")
    weight = problem.evaluator.network.one[0][0].weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight[1:] = weight[:1] + 0.01 * weight[1:]
        after = dict(zip(problem.steps, MERGING_CLUSTERS.allocate(case_of(MERGING_CLUSTERS, problem)), strict=True))
        weight.copy_(original)
    assert after[step] == 1 < before[step]
    assert all(after[i] >= before[i] for i in problem.steps if i != step)
