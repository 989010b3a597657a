"""Trained static importance: features by hand, kept up to date, and neutral at the start."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from prune_env import gates
from prune_env.config import make_task
from prune_env.pruning.gating.network import attach
from prune_env.pruning.gating.static import STATIC_IMPORTANCES, StaticPredictor, filter_distance, taylor
from prune_env.pruning.plan import Plan
from prune_env.pruning.tracing import trace
from tests.env.gated_networks import GATEABLE, fresh, trained
from tests.env.small_networks import example

WEIGHT = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 4.0]])
"""Filters at pairwise distances 5 (0 and 1), 3 (0 and 2), 4 (1 and 2)."""


def test_features_by_hand() -> None:
    assert filter_distance(WEIGHT).tolist() == pytest.approx([4.0, 4.5, 3.5])
    gradient = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -0.5]])
    # Squares of w * gradient, summed over a filter: 9, 0, 4.
    expected = [value / (math.sqrt(97) + 1e-3) for value in (9.0, 0.0, 4.0)]
    assert taylor(WEIGHT, gradient).tolist() == pytest.approx(expected)
    weight = torch.nn.Parameter(WEIGHT.clone())
    weight.grad = gradient
    predictor = StaticPredictor([weight])
    features = predictor.get_buffer("features_0")
    assert features[:, 0].tolist() == pytest.approx([1.0, 1.125, 0.875])  # distances over their mean, 4
    assert features[:, 1].tolist() == pytest.approx([5 / 3, 0.0, 4 / 3])  # norms over their mean, 3
    assert features[:, 2].tolist() == pytest.approx(expected)


def test_the_predictor_reads_learned_value_and_features_in_that_order() -> None:
    predictor = StaticPredictor([WEIGHT])
    with torch.no_grad():
        for layer in (predictor.predictor[0], predictor.predictor[2]):
            layer.weight.zero_()
            layer.bias.zero_()
        predictor.predictor[0].weight[0] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
        predictor.predictor[2].weight[0, 0] = 1.0
        predictor.learned[0].copy_(torch.tensor([1.0, 2.0, 3.0]))
        predictor.get_buffer("features_0")[:, 2] = torch.tensor([0.1, 0.2, 0.3])
    inner = torch.tensor([1 + 10 + 500 / 3 + 100, 2 + 11.25 + 0 + 200, 3 + 8.75 + 400 / 3 + 300])
    torch.testing.assert_close(predictor.scores()[0], F.selu(inner))
    assert [tuple(layer.weight.shape) for layer in (predictor.predictor[0], predictor.predictor[2])] == [
        (100, 4),
        (1, 100),
    ]


@pytest.mark.parametrize("static", STATIC_IMPORTANCES)
@pytest.mark.parametrize("name", GATEABLE)
def test_scores_start_at_one_per_channel(name: str, static: str) -> None:
    gated = fresh(name, static)
    for scores, channels in zip(gated.static.scores(), gated.full.tolist(), strict=True):
        assert scores.tolist() == [1.0] * channels
        assert scores.requires_grad


def test_shared_scales_by_hand() -> None:
    gated = fresh("chain", "vector")
    layer = gated.layers[0]
    with torch.no_grad():
        layer.gate.weight.fill_(2.0)
        layer.gate.bias.fill_(1.0)
        layer.gate.bias[:3] = torch.tensor([4.0, -0.25, 0.0])
    mean = (4.25 + layer.channels - 3) / layer.channels
    gated.share_scales()
    static = gated.static.scores()[0]
    shares = torch.tensor([4 / mean, 0.25 / mean]).sqrt()
    torch.testing.assert_close(static[:3], torch.tensor([*shares.tolist(), 0.1]))
    torch.testing.assert_close(layer.gate.bias[:3], torch.tensor([4 / shares[0], -0.25 / shares[1], 0.0]))
    torch.testing.assert_close(layer.gate.weight[:, 0], 2 / static)


@pytest.mark.parametrize("static", STATIC_IMPORTANCES)
@pytest.mark.parametrize("name", GATEABLE)
def test_sharing_scales_changes_no_output_and_lets_both_scores_rank_alike(name: str, static: str) -> None:
    gated = trained(name, static=static)
    before, scores = gated(example(7)), [score.detach().clone() for score in gated.static.scores()]
    sizes = [layer.gate.bias.detach().abs() * layer.filter_sizes() for layer in gated.layers]
    gated.share_scales()
    torch.testing.assert_close(gated(example(7)), before, rtol=1e-3, atol=1e-4)
    for found, score, size in zip(gated.static.scores(), scores, sizes, strict=True):
        if static == "filters":
            assert torch.equal(found, score)
        else:
            share = found / score
            assert (share >= 0.099).all()
            assert (share[size.argsort()].diff() >= -1e-6).all()


def test_without_a_norm_the_sizes_of_filters_are_shared() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    network[0].weight.data = WEIGHT.clone()  # norms 5, 0 and 4, their mean 3
    x = torch.tensor([[1.0, 2.0]])
    gated = attach(network, trace(network, x), x).eval()
    layer, expected = gated.layers[0], gated(x)
    gated.share_scales()
    sizes = torch.tensor([5 / 3, 0.1, 4 / 3])  # the least there is stands for 0
    shares = (sizes / sizes.mean()).sqrt()
    torch.testing.assert_close(gated.static.scores()[0].detach(), shares)
    torch.testing.assert_close(layer.gate.bias.detach(), sizes / shares)
    torch.testing.assert_close(layer.producer.weight.detach(), WEIGHT / sizes[:, None])
    torch.testing.assert_close(gated(x), expected)


def test_prepared_gates_begin_with_shared_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[torch.Tensor] = []
    monkeypatch.setattr(gates, "train_once", lambda gated, *_, **__: begun.extend(gated.static.scores()))
    task = make_task("digits-cnn", epochs=0)
    attached = gates.attached(task)
    scales = [1 + torch.rand(layer.channels) for layer in attached.layers]
    for layer, scale in zip(attached.layers, scales, strict=True):
        layer.gate.bias.data.copy_(scale)
    monkeypatch.setattr(gates, "attached", lambda *_, **__: attached)
    gates.prepared(task, epochs=1, root=tmp_path)
    assert len(begun) == len(scales)
    for scale, score in zip(scales, begun, strict=True):
        torch.testing.assert_close(score.detach(), (scale / scale.mean()).sqrt().clamp_min(0.1))


def test_a_refresh_follows_weights_and_gradients() -> None:
    gated = trained("chain", static="filters")
    before = [gated.static.get_buffer(f"features_{at}").clone() for at in range(3)]
    scores = [score.detach().clone() for score in gated.static.scores()]
    gated(example(4)).square().sum().backward()
    with torch.no_grad():
        for layer in gated.layers:
            layer.producer.weight[0] *= 3.0
    assert all(torch.equal(a, b) for a, b in zip(scores, gated.static.scores(), strict=True))  # not by itself
    gated.refresh()
    for at, (old, layer) in enumerate(zip(before, gated.layers, strict=True)):
        features, weight = gated.static.get_buffer(f"features_{at}"), layer.producer.weight
        norms = weight.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(features[:, 1], norms / norms.mean())
        torch.testing.assert_close(features[:, 2], taylor(weight, weight.grad))
        assert (features != old).any(0).all()
        assert not torch.equal(gated.static.scores()[at], scores[at])
    learned = [gated.static.get_buffer(f"features_{at}").clone() for at in range(3)]
    gated.zero_grad()
    gated.refresh()
    # Without a gradient there is nothing new to say of it.
    assert all(torch.equal(gated.static.get_buffer(f"features_{at}"), learned[at]) for at in range(3))


@pytest.mark.parametrize("static", STATIC_IMPORTANCES)
def test_a_cut_keeps_the_scores_of_what_stays(static: str) -> None:
    gated = trained("chain", static=static)
    gated(example(4)).square().sum().backward()
    gated.refresh()
    scores = [score.detach() for score in gated.static.scores()]
    small = gated.cut(Plan({"hidden": (1, 7), "body.0.0": (3,)}))
    for found, whole, kept in zip(small.static.scores(), scores, ([3], range(6), [1, 7]), strict=True):
        torch.testing.assert_close(found, whole[list(kept)])
    small(example(2)).sum().backward()
    small.refresh()
    assert all(torch.equal(a, b) for a, b in zip(scores, gated.static.scores(), strict=True))
