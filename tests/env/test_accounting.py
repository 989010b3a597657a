"""Accounting: what torch counts on networks that were really cut, and predictors counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prune_env.pruning.gating.accounting import Accounting
from prune_env.pruning.gating.network import GatedNetwork
from prune_env.pruning.measure import count_macs, count_params
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from tests.env.gated_networks import GATEABLE, build, fresh, graph_of, random_plan
from tests.env.small_networks import example


def counts(gated: GatedNetwork, plan: Plan) -> np.ndarray:
    return np.array([len(plan.keep[name]) for name in gated.names])


def predictors(gated: GatedNetwork) -> int:
    """Weights of the predictors that are really there: their multiply-accumulates for one input."""
    return sum(layer.gate.in_features * layer.gate.out_features for layer in gated.layers)


@pytest.mark.parametrize("name", GATEABLE)
def test_the_whole_network_costs_what_torch_counts(name: str) -> None:
    gated, dense, x = fresh(name), build(name), example(2)
    forms = Accounting.of(gated)
    assert forms.macs(forms.full, forms.full) == count_macs(gated, x) == count_macs(dense, x) + predictors(gated)
    assert forms.params(forms.full) == count_params(gated)
    assert forms.dense_macs == forms.bare_macs(forms.full) == count_macs(dense, x)
    assert forms.dense_params == forms.bare_params(forms.full) == count_params(dense)
    assert forms.full.tolist() == gated.full.tolist()


@pytest.mark.parametrize("name", GATEABLE)
def test_a_cut_network_costs_what_torch_counts(name: str) -> None:
    gated, x = fresh(name), example(2)
    forms = Accounting.of(gated)
    for seed in range(4):
        plan = random_plan(gated, seed) if seed else Plan({name: (0,) for name in gated.names})
        small, kept = gated.cut(plan), counts(gated, plan)
        assert forms.predictor_macs(kept) == predictors(small)
        assert forms.params(kept) == count_params(small)
        assert forms.macs(kept, kept) == count_macs(small, x)
        bare = cut(build(name), graph_of(name), plan)
        assert forms.bare_macs(kept) == count_macs(bare, x)
        assert forms.bare_params(kept) == count_params(bare)
        # The smaller network's own accounting continues where the larger one's stopped.
        own = Accounting.of(small)
        assert own.full.tolist() == kept.tolist()
        assert own.macs(own.full, own.full) == forms.macs(kept, kept)
        assert own.params(own.full) == forms.params(kept)


@pytest.mark.parametrize("name", GATEABLE)
def test_an_input_costs_the_layers_at_its_active_channels_and_the_predictors_at_the_stored_ones(name: str) -> None:
    gated, x = fresh(name), example(2)
    forms = Accounting.of(gated)
    stored = random_plan(gated, 1)
    active = Plan({key: indices[: max(1, len(indices) // 2)] for key, indices in stored.keep.items()})
    expected = count_macs(cut(build(name), graph_of(name), active), x) + predictors(gated.cut(stored))
    assert forms.macs(counts(gated, active), counts(gated, stored)) == expected


def test_chain_by_hand() -> None:
    # 3x8x8 -> conv 3x3 to 8 -> pool -> conv 3x3 to 6 at 4x4 -> linear 96 to 10 -> linear 10 to 5.
    forms = Accounting.of(fresh("chain"))
    assert forms.names == ("body.0.0", "body.2.0", "hidden")
    assert forms.dense_macs == 64 * 27 * 8 + 16 * 72 * 6 + 96 * 10 + 10 * 5
    active, kept = np.array([[2, 3, 4], [1, 1, 1]]), np.array([4, 5, 6])
    # Predictors at what is stored: 3 inputs -> 4, 4 -> 5, and 16 positions of 5 channels -> 6.
    gates = 3 * 4 + 4 * 5 + 80 * 6
    layers = [64 * 27 * 2 + 16 * 18 * 3 + 48 * 4 + 4 * 5, 64 * 27 + 16 * 9 + 16 + 5]
    assert forms.predictor_macs(kept) == gates
    assert forms.macs(active, kept).tolist() == [layers[0] + gates, layers[1] + gates]
    # Parameters: weights and biases, two per channel of each BatchNorm (now gate and shift), predictors, static
    # scores; the hidden layer has no BatchNorm, so its gate's constant part comes on top of its bias.
    stored = (27 * 4 + 4 + 8) + (36 * 5 + 5 + 10) + (80 * 6 + 6) + (6 * 5 + 5)
    assert forms.bare_params(kept) == stored
    assert forms.params(kept) == stored + gates + (4 + 5 + 6) + 6


def test_leading_axes_are_kept_and_more_active_channels_cost_more() -> None:
    forms = Accounting.of(fresh("joined"))
    generator = np.random.default_rng(0)
    active = generator.integers(1, forms.full + 1, (4, 7, len(forms.full)))
    costs = forms.macs(active, forms.full)
    assert costs.shape == (4, 7)
    assert costs[2, 3] == forms.macs(active[2, 3], forms.full)
    assert forms.params(active).shape == forms.predictor_macs(active).shape == (4, 7)
    for at in range(len(forms.full)):
        more = active.copy()
        more[..., at] = forms.full[at]
        assert (forms.macs(more, forms.full) >= costs).all()


def test_layers_without_a_norm_or_bias_store_what_the_dense_ones_do_not() -> None:
    # Bias: the gate's constant part is new. No bias, or a norm without scale: the shift, too. BatchNorm: nothing.
    assert Accounting.of(fresh("joined")).added.tolist() == [1, 2, 2, 1]
    assert Accounting.of(fresh("chain")).added.tolist() == [0, 0, 1]


def test_the_counted_network_is_the_one_that_computes() -> None:
    gated = fresh("joined")
    small = gated.cut(random_plan(gated, 2))
    with torch.no_grad():
        assert small(example(2)).shape == (2, 5)
    for layer, channels in zip(small.layers, small.full.tolist(), strict=True):
        assert layer.channels == layer.gate.out_features == len(layer.producer.weight) == channels
        assert layer.gate.in_features == layer.producer.weight.shape[1]
