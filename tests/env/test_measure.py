"""Measurements: macs against hand-worked numbers, budgets as people write them, the meter against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from prune_env.pruning.measure import (
    Budget,
    Measurement,
    Meter,
    count_macs,
    count_params,
    measure_latency,
)

from .small_networks import build, example


def split(count: int = 23) -> tuple[torch.Tensor, torch.Tensor]:
    return example(count), torch.arange(count) % 5


def test_macs_of_resnet18_are_those_of_conventions():
    assert count_macs(resnet18(), torch.zeros(1, 3, 224, 224)) == 1_814_073_344


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 8 * 8 * 8 * 3 * 9),
        (nn.Conv2d(4, 12, 3, groups=4, padding=1), 8 * 8 * 12 * 1 * 9),
        (nn.Conv2d(6, 6, 3, groups=6, stride=2, padding=1), 4 * 4 * 6 * 9),
        (nn.Conv2d(8, 4, (1, 3), groups=2, padding=(0, 1), bias=False), 8 * 8 * 4 * 4 * 3),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), 8 * 8 * 4 * 6 * 4),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_a_convolution_for_one_input_whatever_the_batch(layer: nn.Module, macs: int, batch: int):
    assert count_macs(layer, torch.zeros(batch, layer.in_channels, 8, 8)) == macs


def test_macs_see_into_fused_attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    tokens, linear = 5, 8 * 24 + 8 * 8 + 2 * 8 * 16
    assert count_macs(layer, torch.zeros(1, tokens, 8)) == tokens * linear + 2 * tokens * tokens * 8


def test_counting_leaves_mode_statistics_gradients_and_random_state_alone():
    network = nn.Sequential(build("chain"), nn.Dropout(0.5)).train()
    network[0].body[0].eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    modes, state = [m.training for m in network.modules()], torch.get_rng_state()
    count_macs(network, example(2))
    assert modes == [m.training for m in network.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_a_tied_parameter_counts_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    second.weight = first.weight
    assert count_params(nn.Sequential(first, second)) == 20


def test_latency_is_no_part_of_equality():
    assert Measurement(0.5, 1.0, 10, 3, 0.1) == Measurement(0.5, 1.0, 10, 3, 0.2)
    assert Measurement(0.5, 1.0, 10, 3) != Measurement(0.5, 1.0, 11, 3)


@given(share=st.floats(0.1, 1, exclude_min=True))
def test_a_share_is_a_share_of_the_dense_value(share: float):
    budget = Budget.of(share, resource="macs", dense=12_345, minimum=1_234)
    assert budget.limit == share * 12_345
    assert budget.fraction == pytest.approx(share)


def test_a_whole_number_above_one_is_the_amount_itself():
    for value in (5_000, 5_000.0):
        assert Budget.of(value, resource="params", dense=10_000, minimum=100) == Budget("params", 5_000.0, 0.5)


def test_one_is_the_whole_network_and_the_minimum_itself_is_allowed():
    assert Budget.of(1, resource="macs", dense=10_000, minimum=100).limit == 10_000
    assert Budget.of(100, resource="macs", dense=10_000, minimum=100).fraction == 0.01


@pytest.mark.parametrize("value", [0, 0.0, -1, -0.5, 1.5, math.nan, math.inf, True])
def test_a_budget_that_is_neither_share_nor_amount_is_refused(value: float):
    with pytest.raises(ValueError, match=r"^budget is .*a share of the dense network's macs in \(0, 1\]"):
        Budget.of(value, resource="macs", dense=10_000, minimum=100)


def test_a_budget_out_of_reach_names_the_least_share_and_that_share_works():
    with pytest.raises(ValueError, match=r"1,234 of 10,001 macs, so 0.1234 is the smallest share") as caught:
        Budget.of(0.1, resource="macs", dense=10_001, minimum=1_234)
    share = float(str(caught.value).split(" so ")[1].split()[0])
    assert Budget.of(share, resource="macs", dense=10_001, minimum=1_234).limit >= 1_234


def test_a_budget_above_the_dense_network_or_on_an_unknown_resource_is_refused():
    with pytest.raises(ValueError, match="costs only 10,000"):
        Budget.of(10_001, resource="macs", dense=10_000, minimum=100)
    with pytest.raises(ValueError, match="macs, params, latency_s"):
        Budget.of(0.5, resource="flops", dense=10_000, minimum=100)


def test_seconds_are_budgeted_by_share_only():
    assert Budget.of(0.5, resource="latency_s", dense=0.25, minimum=0.1).limit == 0.125
    with pytest.raises(ValueError, match=r"in \(0, 1\]$"):
        Budget.of(3, resource="latency_s", dense=0.25, minimum=0.1)


@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
def test_the_meter_agrees_with_plain_torch_whatever_the_batch(batch_size: int):
    network, (images, labels) = build("residual"), split()
    meter = Meter(images, labels, batch_size=batch_size, dtype=torch.float32)
    with torch.no_grad():
        logits = network(images)
    accuracy, loss = meter.accuracy_and_loss(network)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert len(meter) == 23


def test_the_meter_in_bfloat16_is_close_and_leaves_the_network_alone():
    network, (images, labels) = build("depthwise"), split()
    network.train()
    network.stem.eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    modes, state = [m.training for m in network.modules()], torch.get_rng_state()
    _, exact = Meter(images, labels, dtype=torch.float32).accuracy_and_loss(network)
    first = Meter(images, labels, dtype=torch.bfloat16).accuracy_and_loss(network)
    assert first[1] == pytest.approx(exact, rel=0.02)
    assert first == Meter(images, labels, dtype=torch.bfloat16).accuracy_and_loss(network)
    assert modes == [m.training for m in network.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in network.state_dict().items())
    network(images).sum().backward()


def test_the_meter_takes_vectors():
    network = nn.Linear(784, 10)
    accuracy, _ = Meter(torch.randn(12, 784), torch.zeros(12, dtype=torch.int64)).accuracy_and_loss(network)
    assert 0 <= accuracy <= 1


def test_the_meter_refuses_images_without_labels():
    with pytest.raises(ValueError, match="0 images"):
        Meter(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="4 images, 3 labels"):
        Meter(torch.zeros(4, 3, 8, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch_size is 0"):
        Meter(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), batch_size=0)


def test_latency_states_what_it_depends_on_and_changes_nothing():
    network, threads = build("chain").train(), torch.get_num_threads()
    latency = measure_latency(network, example(2), threads=1, min_run_time=0.01)
    assert (latency.threads, latency.batch, latency.dtype, latency.device) == (1, 2, "float32", "cpu")
    assert 0 < latency.median_s < 1
    assert latency.iqr_s >= 0
    assert network.training
    assert torch.get_num_threads() == threads
    assert measure_latency(network, example(2).bfloat16(), min_run_time=0.01).dtype == "bfloat16"
    with pytest.raises(ValueError, match="positive"):
        measure_latency(network, example(), threads=0)
