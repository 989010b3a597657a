"""Recalibration: statistics worked by hand, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_env.pruning.calibration import recalibrate

from .small_networks import build, example


def norm_first() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))


def test_one_batch_gives_its_own_mean_and_variance():
    network, images = norm_first(), example(20) * 3 + 1
    recalibrate(network, images, batch_size=20, dtype=torch.float32)
    assert torch.allclose(network[0].running_mean, images.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(network[0].running_var, images.var((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize(("count", "batch_size", "used"), [(20, 10, (2, 10)), (21, 10, (3, 7)), (23, 9, (3, 7))])
def test_several_batches_are_equal_and_averaged(count: int, batch_size: int, used: tuple[int, int]):
    network, images = norm_first(), example(count)
    recalibrate(network, images, batch_size=batch_size, dtype=torch.float32)
    batches = images[: used[0] * used[1]].unflatten(0, used)
    assert torch.allclose(network[0].running_mean, batches.mean((1, 3, 4)).mean(0), atol=1e-6)
    assert torch.allclose(network[0].running_var, batches.permute(0, 2, 1, 3, 4).flatten(2).var(2).mean(0), rtol=1e-5)


def test_deeper_statistics_are_those_of_a_network_already_recalibrated_before_them():
    network = build("chain")
    first, second = network.body[0][1], network.body[2][1]
    recalibrate(network, example(50), batch_size=50, dtype=torch.float32)
    seen = []
    hook = second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    first.train()
    with torch.no_grad():
        network(example(50))
    hook.remove()
    assert torch.allclose(second.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)


def test_bfloat16_statistics_are_close_to_float32():
    exact, fast = build("residual"), build("residual")
    recalibrate(exact, example(200), dtype=torch.float32)
    recalibrate(fast, example(200))
    norms = [(a, b) for a, b in zip(exact.modules(), fast.modules(), strict=True) if isinstance(a, nn.BatchNorm2d)]
    for a, b in norms:
        assert b.running_mean.dtype == torch.float32
        assert ((a.running_mean - b.running_mean).abs() / a.running_var.sqrt()).max() < 0.02
        assert (a.running_var / b.running_var).log().abs().max() < 0.02


def test_what_was_there_before_does_not_matter_and_repeating_changes_nothing():
    network = build("depthwise")
    recalibrate(network, example(40))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(torch.nan)
    recalibrate(network, example(40))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_mode_momentum_weights_and_random_state_return():
    network = nn.Sequential(build("chain"), nn.Dropout(0.5)).train()
    network[0].body.eval()
    network[0].body[0][1].momentum = 0.3
    weights = {k: v.clone() for k, v in network.named_parameters()}
    modes, state = [m.training for m in network.modules()], torch.get_rng_state()
    recalibrate(network, example(10))
    assert modes == [m.training for m in network.modules()]
    assert network[0].body[0][1].momentum == 0.3
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) and v.grad is None for k, v in network.named_parameters())


def test_mode_and_momentum_return_after_an_error():
    network = build("chain").train()
    with pytest.raises(RuntimeError):
        recalibrate(network, torch.randn(10, 4, 8, 8))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.training and norm.momentum == 0.1 for norm in norms)


def test_a_network_without_batch_norm_is_not_even_run():
    class Untouchable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    recalibrate(nn.Sequential(Untouchable(), nn.BatchNorm2d(3, track_running_stats=False)), example(4))


def test_a_variance_needs_two_images():
    for count, batch_size in ((1, 10), (0, 10), (10, 1)):
        with pytest.raises(ValueError, match="at least 2"):
            recalibrate(build("chain"), example(count), batch_size=batch_size)
