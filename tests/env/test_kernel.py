"""The compiled kernel by itself: convolutions of any shape on any channels, and choices whatever the scores are."""

from __future__ import annotations

from functools import cache
from time import perf_counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from prune_env.pruning.engine import native
from prune_env.pruning.engine.anatomy import Anatomy, Choice
from prune_env.pruning.engine.flow import Flow
from prune_env.pruning.engine.program import Program
from prune_env.pruning.engine.steps import LayerStep, PoolStep, poolable
from prune_env.pruning.gating.layer import GatedLayer
from prune_env.pruning.gating.tradeoff import decide_static
from tests.env.deployed_networks import deployed


@pytest.fixture(autouse=True)
def _kernel() -> None:
    if not native.compiled():
        pytest.skip("no kernel here")


@cache
def flow() -> Flow:
    return Flow(deployed("chain"))


def some(draw: st.DrawFn, channels: int) -> np.ndarray:
    """Some of the channels, in rising order; half of the time all."""
    if draw(st.booleans()):
        return np.arange(channels, dtype=np.int32)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    return np.sort(rng.permutation(channels)[: draw(st.integers(1, channels))]).astype(np.int32)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, tuple[int, int]]:
    """A convolution and the size of a map that it can read."""
    limits = ((1, 5), (1, 2), (1, 2), (0, 2))
    kernel, stride, dilation, padding = (tuple(draw(st.integers(*limit)) for _ in range(2)) for limit in limits)
    channels = draw(st.sampled_from([1, 2, 3, 8, 17, 64, 65, 130])), draw(st.integers(1, 130))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = tuple(draw(st.integers(n, max(n, 9))) for n in least)
    torch.manual_seed(draw(st.integers(0, 999)))
    return nn.Conv2d(*channels, kernel, stride, padding, dilation), size


def run(
    step: LayerStep, x: torch.Tensor, read: np.ndarray, write: np.ndarray, scale: torch.Tensor, shift: torch.Tensor,
    *, whole: bool, threads: int,
) -> torch.Tensor:  # fmt: skip
    """The kernel's convolution of channels `read` into channels `write`, from a map that holds all or only those."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    held = (x if whole else x[:, torch.from_numpy(read).long()]).contiguous(memory_format=layout)
    step.flow.begin(threads)
    height, width = (x.shape[2], x.shape[3]) if x.dim() == 4 else (1, len(x))
    return step._convolve(
        held, height, width, read.ctypes.data if whole else None, read.ctypes.data, len(read), held.shape[1],
        write.ctypes.data, len(write), scale.data_ptr(), shift.data_ptr(),
    )  # fmt: skip


@given(convolutions(), st.data())
def test_it_convolves_as_torch_does(drawn: tuple[nn.Conv2d, tuple[int, int]], data: st.DataObject) -> None:
    layer, size = drawn
    read, write = some(data.draw, layer.in_channels), some(data.draw, layer.out_channels)
    threads, rectify, whole = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.booleans()), data.draw(st.booleans())
    x, scale, shift = torch.randn(1, layer.in_channels, *size), torch.randn(len(write)), torch.randn(len(write))
    step = LayerStep(layer, flow(), norm=None, rectify=rectify, reader=None)
    found = run(step, x, read, write, scale, shift, whole=whole, threads=threads)
    ins, outs = torch.from_numpy(read).long(), torch.from_numpy(write).long()
    with torch.no_grad():
        y = F.conv2d(x[:, ins], layer.weight[outs][:, ins], None, layer.stride, layer.padding, layer.dilation)
        expected = y * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(found, expected.relu() if rectify else expected, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 300), st.integers(1, 130), st.integers(1, 40), st.data())
def test_it_runs_linear_layers_on_rows(inputs: int, outputs: int, rows: int, data: st.DataObject) -> None:
    layer, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    read, write = some(data.draw, inputs), some(data.draw, outputs)
    step = LayerStep(layer, flow(), norm=None, rectify=False, reader=None)
    one, zero = torch.ones(len(write)), torch.zeros(len(write))
    found = run(step, x, read, write, one, zero, whole=data.draw(st.booleans()), threads=data.draw(st.integers(1, 3)))
    ins, outs = torch.from_numpy(read).long(), torch.from_numpy(write).long()
    torch.testing.assert_close(found, x[:, ins] @ layer.weight.detach()[outs][:, ins].T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("side", "kernel"), [(24, 3), (2, 3), (24, 1), (1, 1)])
def test_threads_share_the_map_or_the_weight_and_change_nothing(side: int, kernel: int) -> None:
    layer = nn.Conv2d(230, 215, kernel, padding=kernel // 2, bias=False)
    x, read = torch.randn(1, 230, side, side), np.arange(0, 230, 2, dtype=np.int32)
    write = np.sort(np.random.default_rng(0).permutation(215)[:99]).astype(np.int32)
    step, one, zero = LayerStep(layer, flow(), norm=None, rectify=True, reader=None), torch.ones(99), torch.zeros(99)
    first, *others = (run(step, x, read, write, one, zero, whole=False, threads=n) for n in (1, 2, 3, 5))
    assert all(torch.equal(first, other) for other in others)


def test_a_norm_and_a_bias_are_folded_in() -> None:
    layer, norm, x = nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20).eval(), torch.randn(1, 3, 6, 6)
    for values in (norm.running_mean, norm.weight.data, norm.bias.data):
        nn.init.normal_(values)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    with torch.no_grad():
        expected = F.relu(norm(layer(x)))
    step = LayerStep(layer, flow(), norm=norm, rectify=True, reader=None)
    torch.testing.assert_close(step(x), expected, atol=1e-5, rtol=1e-5)


def test_nan_stays_nan_behind_a_rectifier() -> None:
    layer = nn.Conv2d(3, 70, 1)
    step = LayerStep(layer, flow(), norm=None, rectify=True, reader=None)
    assert step(torch.full((1, 3, 9, 9), torch.nan)).isnan().all()


def test_a_map_smaller_than_the_kernel_is_refused() -> None:
    """Stride two would round the size of the output up, from less than nothing to one."""
    for size, stride in ((2, 2), (2, 1), (1, 3)):
        step = LayerStep(nn.Conv2d(3, 4, 3, stride), flow(), norm=None, rectify=False, reader=None)
        with pytest.raises(ValueError, match=f"the map is {size} x 9: too small for a layer"):
            step(torch.zeros(1, 3, size, 9))


def test_few_channels_take_less_time() -> None:
    """A quarter of the inputs and of the outputs is a sixteenth of the work."""
    layer, x = nn.Conv2d(128, 128, 3, padding=1, bias=False), torch.randn(1, 128, 16, 16)
    step, one, zero = LayerStep(layer, flow(), norm=None, rectify=True, reader=None), torch.ones(128), torch.zeros(128)
    every, few = np.arange(128, dtype=np.int32), np.arange(0, 128, 4, dtype=np.int32)

    def seconds(channels: np.ndarray) -> float:
        begin = perf_counter()
        run(step, x, channels, channels, one, zero, whole=False, threads=1)
        return perf_counter() - begin

    assert min(seconds(few) for _ in range(15)) < 0.5 * min(seconds(every) for _ in range(15))


@st.composite
def pools(draw: st.DrawFn) -> nn.MaxPool2d:
    """A maximum over windows, of any shape."""
    size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stride = draw(st.none() | st.integers(1, 3) | st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return nn.MaxPool2d(size, stride, tuple(draw(st.integers(0, n // 2)) for n in size))


@given(pools(), st.integers(1, 70), st.integers(4, 9), st.integers(4, 9), st.booleans())
def test_it_pools_as_torch_does(module: nn.MaxPool2d, channels: int, height: int, width: int, laid_out: bool) -> None:
    x = torch.randn(1, channels, height, width)
    x[0, 0, 1, 2] = torch.nan
    x = x.contiguous(memory_format=torch.channels_last) if laid_out else x
    assert poolable(module)
    torch.testing.assert_close(PoolStep(module, flow())(x), module(x), atol=0, rtol=0, equal_nan=True)
    mean = nn.AdaptiveAvgPool2d(1)
    torch.testing.assert_close(PoolStep(mean, flow())(x), mean(x), equal_nan=True)


def test_several_maps_at_once_are_refused() -> None:
    step = LayerStep(nn.Conv2d(3, 4, 3), flow(), norm=None, rectify=False, reader=None)
    with pytest.raises(ValueError, match="one map at a time; there are 2"):
        step(torch.zeros(2, 3, 5, 5))


def test_other_pools_are_left_to_torch() -> None:
    others = (nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(2, return_indices=True),
              nn.MaxPool2d(2, padding=2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d((1, None)), nn.AvgPool2d(2),
              nn.Identity())  # fmt: skip
    assert not any(map(poolable, others))
    for x in (torch.randn(3, 4, 4), torch.randn(2, 3, 4, 4)):
        for module in (nn.MaxPool2d([2, 2]), nn.AdaptiveAvgPool2d(1)):
            assert poolable(module)
            assert torch.equal(PoolStep(module, flow())(x), module(x))
    with pytest.raises(RuntimeError, match="Output size is too small"):
        PoolStep(nn.MaxPool2d(5), flow())(torch.randn(1, 3, 4, 4))


@given(st.data())
def test_it_chooses_as_the_trade_off_does(data: st.DataObject) -> None:
    """Scores that tie, infinite ones and NaN included, with what a static decision has left."""
    channels = data.draw(st.integers(1, 90))
    kinds = st.one_of(st.integers(-2, 2).map(float), st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, -0.0]))
    values = kinds if data.draw(st.booleans()) else st.floats(-2, 2, width=32)
    runtime, static = (torch.tensor(data.draw(st.lists(v, min_size=channels, max_size=channels)))
                       for v in (values, st.integers(-3, 3).map(float)))  # fmt: skip
    trust, keep = data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])), data.draw(st.floats(0.01, 1))
    decision = decide_static(static, data.draw(st.floats(0.01, 1)), trust)
    kept, layer = decision.kept, GatedLayer(nn.Linear(1, len(decision.kept), bias=False), None).eval()
    layer.gate.bias.data = runtime[kept].clone()
    choice = Choice(full=channels, keep=keep, score=static[kept], doubted=decision.doubted[kept], trust=trust)
    program = Program(Anatomy(nn.Sequential(layer), [choice], None, deployed("chain").costs, ("0",), ()))
    _, counts = program.run(torch.zeros(1, 1))
    active = choice.select(runtime[None, kept], torch.tensor([keep], dtype=torch.float64))[0]
    assert program.flow.active[0][: int(counts[0])].sort().values.tolist() == active.nonzero().flatten().tolist()
