"""Which number format is fast: what the hardware is asked, and for which networks and images it matters."""

import pytest
import torch
from torch import nn

from prune_env.number_format import CHOICES, autocast, fast_format, format_named, number_format

LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.ReLU(), nn.BatchNorm1d(2))
CONVOLUTIONAL = nn.Sequential(nn.Sequential(nn.ConvTranspose2d(3, 2, 1)), nn.Linear(2, 2))
PHOTOS, DIGITS = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 8, 8)
AMX, INSTRUCTIONS = "_is_amx_tile_supported", "_is_avx512_bf16_supported"


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch):
    """Says whether the CPU multiplies in bfloat16, in matrix units and by instructions alone."""

    def answer(there: bool, instructions: bool = False):
        monkeypatch.setattr(torch.cpu, AMX, lambda: there)
        monkeypatch.setattr(torch.cpu, INSTRUCTIONS, lambda: instructions)

    return answer


@pytest.mark.parametrize(
    ("answers", "fast"),
    [
        ((True, True), torch.bfloat16),
        ((True, False), torch.bfloat16),
        ((False, True), torch.bfloat16),
        ((False, False), torch.float32),
    ],
)
def test_a_lower_format_is_fast_only_where_the_cpu_multiplies_in_it(units, answers, fast):
    units(*answers)
    assert fast_format("cpu") is fast
    assert format_named("auto", "cpu") is fast
    assert format_named("bfloat16", "cpu") is torch.bfloat16


@pytest.mark.parametrize("missing", [AMX, INSTRUCTIONS])
def test_a_torch_that_cannot_say_is_taken_for_one_without(units, monkeypatch, missing):
    units(False)
    monkeypatch.delattr(torch.cpu, missing)
    assert fast_format("cpu") is torch.float32


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_cuda_is_asked_for_the_device_that_is_used(monkeypatch, capability, fast):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    assert fast_format("cuda:1") is fast
    assert asked == [torch.device("cuda:1")]


def test_other_devices_run_in_float32(units):
    units(True)
    assert fast_format("meta") is torch.float32


@pytest.mark.parametrize(
    ("network", "images", "expected"),
    [
        (CONVOLUTIONAL, PHOTOS, torch.bfloat16),
        (CONVOLUTIONAL, DIGITS, torch.float32),
        (LINEAR, PHOTOS, torch.float32),
        (CONVOLUTIONAL, torch.zeros(1, 3072), torch.float32),
    ],
)
def test_only_convolutions_on_images_of_some_size_are_worth_a_lower_format(units, network, images, expected):
    units(True)
    assert number_format(network, images) is expected
    units(False)
    assert number_format(network, images) is torch.float32


def test_autocast_lowers_only_what_it_is_told_to():
    layer, x = nn.Linear(2, 2), torch.zeros(1, 2)
    for name in CHOICES[1:]:
        with autocast("cpu", format_named(name, "cpu")):
            assert layer(x).dtype is format_named(name, "cpu")
