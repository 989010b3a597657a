"""Steps of a program: one layer each, with its weights laid out for the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_env.pruning.engine import native
from prune_env.pruning.engine.flow import Flow, Reader, positions_of
from prune_env.pruning.gating.layer import GatedLayer, RectifiedLinear

BLOCK = 64
"""Outputs that lie together in a weight: `BLOCK` of layer.h."""

MOST = 2**31
"""Numbers of workspace that the kernel's integers can tell apart."""

Runnable = nn.Linear | nn.Conv2d
"""A layer that the kernel may be able to run."""


def runnable(module: Any) -> TypeGuard[Runnable]:
    """Whether the kernel can run a layer: a linear one, or a plain two-dimensional convolution."""
    if type(module) is nn.Linear:
        return True
    plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
    return plain and not isinstance(module.padding, str)


def poolable(module: Any) -> bool:
    """Whether the kernel can pool as a module does: by the largest value of windows, or by the mean of the map."""
    if type(module) is nn.AdaptiveAvgPool2d:
        return module.output_size in (1, (1, 1))
    if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices:
        return False
    # A window's padding that torch refuses is torch's to refuse.
    fits = all(2 * p <= k for p, k in zip(_pair(module.padding), _pair(module.kernel_size), strict=True))
    return fits and _pair(module.dilation) == (1, 1)


class PoolStep:
    """Pooling of whatever channels the map holds.

    Args:
        module: What `poolable` accepts.
        flow: What goes along with the maps.
    """

    def __init__(self, module: nn.Module, flow: Flow) -> None:
        self.module, self.kernel, self.windows = module, flow.kernel, isinstance(module, nn.MaxPool2d)
        if isinstance(module, nn.MaxPool2d):
            self.size, self.padding = _pair(module.kernel_size), _pair(module.padding)
            self.stride = self.size if module.stride is None else _pair(module.stride)
            self._sizes = [(c_int * 2)(*pair) for pair in (self.size, self.stride, self.padding)]

    def __call__(self, x: Tensor) -> Tensor:
        """The smaller map."""
        if x.dim() != 4 or len(x) != 1 or x.dtype != torch.float32:
            return self.module(x)
        _, channels, *extent = x.shape
        if not self.windows:
            x, y = x.contiguous(memory_format=torch.channels_last), torch.empty(1, channels, 1, 1)
            self.kernel.pool_mean(x.data_ptr(), extent[0] * extent[1], channels, y.data_ptr())
            return y
        size = [
            (n + 2 * p - k) // s + 1 for n, k, s, p in zip(extent, self.size, self.stride, self.padding, strict=True)
        ]
        if min(size) < 1:
            return self.module(x)
        x = x.contiguous(memory_format=torch.channels_last)
        y = torch.empty((1, channels, *size), memory_format=torch.channels_last)
        self.kernel.pool_largest(x.data_ptr(), *extent, channels, *self._sizes, *size, y.data_ptr())
        return y


class LayerStep:
    """A convolution or linear layer on its active inputs.

    Args:
        module: The layer.
        flow: What goes along with the maps.
        norm: BatchNorm behind it, folded in.
        rectify: Whether a rectifier follows, folded in.
        reader: Which inputs are channels of gated layers.
        columns: The output that each column of the laid out weight is; None for their own order.

    Attributes:
        order: The input that each row of the laid out weight is: where one gated layer alone is read, the order of its
            columns, so that active rows follow each other in memory. None for their own order.
    """

    def __init__(
        self,
        module: Runnable,
        flow: Flow,
        *,
        norm: _BatchNorm | None,
        rectify: bool,
        reader: Reader | None,
        columns: Tensor | None = None,
    ) -> None:
        self.flow, self.kernel, self.linear = flow, flow.kernel, isinstance(module, nn.Linear)
        weight = module.weight.detach().float()
        before = None if reader is None else reader.alone(flow)
        self.order = None if before is None else flow.order[before]
        weight = weight if columns is None else weight[columns]
        weight = weight if self.order is None else weight[:, self.order]
        outputs, inputs = weight.shape[:2]
        blocks = -(-outputs // BLOCK)
        rows = torch.zeros(inputs, weight[0, 0].numel(), blocks * BLOCK)
        rows[..., :outputs] = weight.flatten(2).permute(1, 2, 0) if weight.dim() > 2 else weight.t()[:, None]
        rows = rows.unflatten(2, (blocks, BLOCK)).permute(2, 0, 1, 3)
        scale, shift = _folded(module, norm)
        sizes = ((1, 1), (1, 1), (0, 0), (1, 1)) if isinstance(module, nn.Linear) else _sizes(module)
        self.layer = native.Layer(
            inputs, outputs, *sizes, flow.pin(rows), flow.pin(scale), flow.pin(shift), int(rectify)
        )
        self.reference = byref(self.layer)
        self.outputs, self.reader, self.sizes = outputs, reader or Reader(), sizes
        self._whole, self._tables = not self.reader.parts, _tables(self.reader)
        self._extents: dict[tuple[int, int], tuple[int, list[int]]] = {}
        self._read = np.zeros(inputs, dtype=np.int32)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output."""
        x, height, width = self._laid_out(x)
        return self._convolve(
            x, height, width, *self._source(x), None, self.outputs, self.layer.scale, self.layer.shift
        )

    def _laid_out(self, x: Tensor) -> tuple[Tensor, int, int]:
        """The map as the kernel reads it, its height and width."""
        if x.dtype != torch.float32:
            raise ValueError(f"the kernel reads float32; the map is {x.dtype}")
        if self.linear:
            return x.contiguous(), 1, x.numel() // x.shape[-1]
        if len(x) != 1:
            raise ValueError(f"the kernel convolves one map at a time; there are {len(x)}")
        return x.contiguous(memory_format=torch.channels_last), x.shape[2], x.shape[3]

    def _source(self, x: Tensor) -> tuple[int | None, int | None, int, int]:
        """Which channels of the map are read, which stored inputs they are, how many, and how many the map has."""
        held = x.shape[-1 if self.linear else 1]
        if self._whole:
            return None, None, self._checked(held, self.layer.inputs), held
        flow, (layer, _) = self.flow, self.reader.parts[0]
        if self.order is not None:
            return None, flow.columns[layer].data_ptr(), self._checked(held, flow.kept[layer]), held
        if not flow.whole[layer]:
            kept = self._tables[layer][flow.active[layer].numpy()[: flow.kept[layer]]].ravel()
            self._read[: self._checked(held, len(kept))] = kept
            return None, self._read.ctypes.data, held, held
        positions = np.ones(self._checked(held, self.layer.inputs), dtype=bool)
        for layer, places in self.reader.parts:
            open_ = np.zeros(len(flow.active[layer]), dtype=bool)
            open_[flow.active[layer].numpy()[: flow.kept[layer]]] = True
            if places is None:
                positions &= open_
            else:
                index, unit = places
                positions[index] &= open_[unit]
        read = positions.nonzero()[0]
        self._read[: len(read)] = read
        return self._read.ctypes.data, self._read.ctypes.data, len(read), held

    def _checked(self, held: int, expected: int) -> int:
        """The channels of the map; the kernel itself would read on behind them."""
        if held != expected:
            raise ValueError(f"the map has {held} channels; the layer reads {expected}")
        return held

    def _extent(self, height: int, width: int) -> tuple[int, list[int]]:
        """The workspace for a map of this size, and the size of the output."""
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip((height, width), *self.sizes, strict=True)
        ]
        room = self.kernel.convolve_space(self.reference, height, width)
        if min(size) < 1 or room >= MOST:
            raise ValueError(f"the map is {height} x {width}: too {'small' if min(size) < 1 else 'large'} for a layer")
        return room, size

    def _convolve(
        self, x: Tensor, height: int, width: int, source: int | None, inputs: int | None, channels: int, held: int,
        chosen: int | None, outputs: int, scale: int, shift: int,
    ) -> Tensor:  # fmt: skip
        flow, key = self.flow, (height, width)
        if key not in self._extents:
            self._extents[key] = self._extent(height, width)
        room, size = self._extents[key]
        if self.linear:
            y = torch.empty((*x.shape[:-1], outputs))
        else:
            y = torch.empty((1, outputs, *size), memory_format=torch.channels_last)
        self.kernel.convolve(
            self.reference, x.data_ptr(), height, width, held, source, inputs, channels, chosen, outputs,
            scale, shift, y.data_ptr(), flow.space(room), flow.threads,
        )  # fmt: skip
        return y


class GateStep(LayerStep):
    """A gated layer: it decides which of its outputs are active, and computes those.

    Args:
        gated: The gated layer.
        flow: What goes along with the maps.
        at: Its place among the gated layers.
        rectify: Whether a rectifier follows, folded in.
        reader: Which inputs are channels of gated layers.

    Attributes:
        whole: Whether inactive channels are put back as zeros: what follows does not treat channels alike.
    """

    def __init__(self, gated: GatedLayer, flow: Flow, at: int, *, rectify: bool, reader: Reader | None) -> None:
        norm = None if isinstance(gated.norm, nn.Identity) else gated.norm
        assert runnable(gated.producer)
        super().__init__(gated.producer, flow, norm=norm, rectify=rectify, reader=reader, columns=flow.order[at])
        self.at = at
        self._thinks = 2 * self.layer.inputs + self.outputs + BLOCK
        self.gate = _gate(gated, flow, at, self.order)
        self.active, self.chosen = flow.active[at].data_ptr(), flow.columns[at].data_ptr()
        seat = flow.seat(at, self.order)
        self.seat = None if seat is None else byref(seat)
        self.factors = torch.zeros(2, self.outputs)
        self.scale, self.shift = (row.data_ptr() for row in self.factors)

    @property
    def whole(self) -> bool:
        """Whether inactive channels are put back as zeros."""
        return self.flow.whole[self.at]

    @whole.setter
    def whole(self, value: bool) -> None:
        self.flow.whole[self.at] = value

    def __call__(self, x: Tensor) -> Tensor:
        """The active channels of the layer's output; all of them, zeros included, where it is to be whole."""
        flow, at = self.flow, self.at
        x, height, width = self._laid_out(x)
        source, inputs, channels, held = self._source(x)
        memory = None if flow.memory is None else byref(flow.memory)
        policy = None if flow.policy is None else byref(flow.policy)
        # A whole map holds zeros where a channel is not active: its mean needs no list of those that are.
        read, seen = (None, held) if source is not None else (inputs, channels)
        kept = self.kernel.decide(
            self.reference, byref(self.gate), policy, self.seat, memory, x.data_ptr(), height * width, read, seen,
            self.active, self.chosen, self.scale, self.shift, flow.space(self._thinks), flow.threads,
        )  # fmt: skip
        flow.kept[at] = kept
        y = self._convolve(x, height, width, source, inputs, channels, held, self.chosen, kept, self.scale, self.shift)
        if not flow.whole[at]:
            return y
        shape, axis = list(y.shape), y.dim() - 1 if self.linear else 1
        shape[axis] = self.outputs
        layout = torch.contiguous_format if self.linear else torch.channels_last
        full = torch.zeros(shape).contiguous(memory_format=layout)
        return full.index_copy_(axis, flow.active[at][:kept].long(), y)


def _gate(gated: GatedLayer, flow: Flow, at: int, order: Tensor | None) -> native.Gate:
    choice = flow.choices[at]
    # Lowest static score first; of equal ones the higher index, as in the trade-off's order turned round.
    behind = choice.score.argsort(descending=True, stable=True).flip(0)
    weight, bias = gated.predictor()
    return native.Gate(
        full=choice.full,
        rectify=int(isinstance(gated.gate, RectifiedLinear)),
        weight=flow.pin(weight.t() if order is None else weight.t()[order]),
        bias=flow.pin(bias),
        shift=flow.pin(gated.shift),
        score=flow.pin(choice.score),
        doubted=flow.pin(choice.doubted, torch.uint8),
        behind=flow.pin(behind, torch.int32),
        column=flow.pin(flow.order[at], torch.int32),
        trust=choice.trust,
        keep=choice.keep,
    )


def _folded(module: Runnable, norm: _BatchNorm | None) -> tuple[Tensor, Tensor]:
    """Scale and shift that the norm (or a bias) is, in evaluation mode."""
    outputs = len(module.weight)
    bias = torch.zeros(outputs) if module.bias is None else module.bias.detach().float()
    if norm is None:
        return torch.ones(outputs), bias
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    shift = (bias.double() - mean.double()) * scale
    if norm.affine:
        shift = shift + norm.bias.detach().double()
    return scale.float(), shift.float()


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _sizes(module: nn.Conv2d) -> tuple[tuple[int, int], ...]:
    return tuple((int(pair[0]), int(pair[1])) for pair in (
        module.kernel_size, module.stride, module.padding, module.dilation,
    ))  # fmt: skip


def _tables(reader: Reader) -> dict[int, np.ndarray]:
    """Gated layer -> `[channel, position]` of the inputs that are its channels, where they are not one by one."""
    return {layer: positions_of(*places) for layer, places in reader.parts if places is not None}
