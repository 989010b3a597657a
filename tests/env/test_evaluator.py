"""The evaluator: a plan's network is cut, repaired and measured one way, once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_env.pruning import evaluator as rooms
from prune_env.pruning.calibration import recalibrate
from prune_env.pruning.evaluator import Evaluator
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import Measurement, Meter, count_macs, count_params
from prune_env.pruning.moments import Moments
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace

from .small_networks import build, example

Case = tuple[nn.Module, LayerGraph, Meter]


@pytest.fixture(scope="module")
def case() -> Case:
    network = build("residual")
    return network, trace(network, example()), Meter(example(40, seed=2), torch.arange(40) % 5)


def half(graph: LayerGraph) -> Plan:
    return Plan({group.name: tuple(range(0, group.channels, 2)) for group in graph.groups})


def evaluator(case: Case, **options: object) -> Evaluator:
    return Evaluator(*case, calibration=example(30, seed=3), **options)


def test_the_full_plan_is_the_dense_network_itself(case: Case):
    network, graph, meter = case
    small = evaluator(case).realise(Plan.full(graph))
    assert torch.equal(small(example(3)), network.to(memory_format=torch.channels_last)(example(3)))
    dense = Measurement(*meter.accuracy_and_loss(network), count_macs(network, example()), count_params(network))
    assert evaluator(case).measure(Plan({})) == dense


def test_realise_is_cut_then_recalibrate(case: Case):
    network, graph, meter = case
    by_hand = cut(network, graph, half(graph))
    recalibrate(by_hand, example(30, seed=3))
    small = evaluator(case).realise(half(graph))
    for name, value in by_hand.state_dict().items():
        assert torch.allclose(small.state_dict()[name].double(), value.double(), rtol=1e-2, atol=1e-2), name
    assert evaluator(case).measure(half(graph)).accuracy == meter.accuracy_and_loss(small)[0]


def test_without_repair_it_is_the_cut_alone(case: Case):
    network, graph, _ = case
    small = evaluator(case, recalibrate=False).realise(half(graph))
    assert torch.allclose(small(example(3)), cut(network, graph, half(graph))(example(3)), atol=1e-6)


def test_macs_and_params_are_those_torch_counts(case: Case):
    one = evaluator(case)
    measured, small = one.measure(half(one.graph)), one.realise(half(one.graph))
    assert (measured.macs, measured.params) == (count_macs(small, example()), count_params(small))


def test_refit_from_moments_brings_the_outputs_closer(case: Case):
    network, graph, _ = case
    moments = Moments.collect(network, graph, example(60, seed=4))
    plain = evaluator(case, recalibrate=False).realise(half(graph))
    refitted = evaluator(case, recalibrate=False, refit="moments", moments=moments).realise(half(graph))
    x = example(60, seed=5)
    with torch.no_grad():
        errors = [(small(x) - network(x)).square().mean() for small in (plain, refitted)]
    assert errors[1] < errors[0]


def test_the_sequential_refit_gets_dense_and_cut_network_and_training_images(
    case: Case, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    monkeypatch.setattr(rooms, "sequential_refit", lambda *args: calls.append(args))
    one = evaluator(case, refit="sequential")
    small = one.realise(half(one.graph))
    ((dense, fitted, graph, plan, images),) = calls
    assert dense is one.network
    assert fitted is small
    assert (graph, plan) == (one.graph, half(one.graph))
    assert torch.equal(images, example(30, seed=3))


def test_a_plan_is_evaluated_once_however_it_is_written(case: Case):
    one = evaluator(case)
    first = half(one.graph)
    whole = {group.name: tuple(range(group.channels)) for group in one.graph.groups}
    name = one.graph.groups[0].name
    assert one.measure(first) is one.measure(Plan(dict(reversed(first.keep.items()))))
    assert one.evaluations == 1
    assert one.measure(Plan({name: (0, 1)})) is one.measure(Plan({**whole, name: (0, 1)}))
    assert one.evaluations == 2


def test_the_cache_is_bounded_and_forgets_the_oldest(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rooms, "CACHE_SIZE", 2)
    one = evaluator(case)
    name = one.graph.groups[0].name
    for kept in ((0,), (1,), (0,), (2,), (0,)):
        one.measure(Plan({name: kept}))
    assert one.evaluations == 3
    one.measure(Plan({name: (1,)}))
    assert one.evaluations == 4


def test_measuring_again_gives_an_equal_measurement_and_the_dense_network_stays(case: Case):
    before = {k: v.clone() for k, v in case[0].state_dict().items()}
    state = torch.get_rng_state()
    assert evaluator(case).measure(half(case[1])) == evaluator(case).measure(half(case[1]))
    assert all(torch.equal(v, before[k]) for k, v in case[0].state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_bad_choices_are_refused_by_name(case: Case):
    with pytest.raises(ValueError, match="none, moments, sequential"):
        evaluator(case, refit="moment")
    with pytest.raises(ValueError, match="moments="):
        evaluator(case, refit="moments")
    with pytest.raises(ValueError, match="no group"):
        evaluator(case).measure(Plan({"nowhere": (0,)}))
