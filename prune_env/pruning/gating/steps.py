"""Steps of a deployed network: what one operation does to whole and to compact values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from prune_env.pruning.gating.compact import Compact, Part, Value, joined, merged, shared, whole
from prune_env.pruning.gating.kernel import Kernel
from prune_env.pruning.gating.layer import Decide, GatedLayer, Question


HEAVY = 1 << 17
"""Weights above which it is faster to scale the map."""


class Gate:
    """A gated layer: asks which channels are active, and computes these alone where that is faster.

    Normalisation and gate are one factor and one shift per channel: with `z` the producer's output divided by the
    norm's deviation, `out = g z + (g * offset + shift)` on active channels.

    Args:
        layer: The gated layer.
        name: Its group.
        index: Its place in forward order.
        static: `[channel]` static scores.
        rectify: Whether a rectifier follows.

    Attributes:
        most: Active channels up to which gathering is faster than the whole layer with masked channels.
    """

    def __init__(self, layer: GatedLayer, name: str, index: int, static: Tensor, *, rectify: bool) -> None:
        self.name, self.index, self.rectify = name, index, rectify
        weight, offset = _normalised(layer)
        self.kernel = Kernel(layer.producer, weight, None, rectify=False)
        self.most = self.kernel.channels
        # Transposed as a view: the matrix product reads it row by row.
        self._weight, self._bias = layer.gate.weight.detach().contiguous().t(), layer.gate.bias.detach().contiguous()
        self.static = static
        self._static = static.numpy()
        self._signed = bool((self._static < 0).any())
        self._offset, self._shift = offset.numpy(), layer.shift.detach().numpy()
        self._averages: dict[int, Tensor] = {}

    def __call__(self, ask: Decide, value: Value) -> Value:
        """The layer's output: compact, or whole with zeros."""
        pooled = self._pooled(value)
        scores = torch.addmm(self._bias, pooled, self._weight)
        mask = ask(Question(self.name, self.index, pooled, scores, self.static))
        active, runtime = mask.numpy(), scores.numpy()
        factor = runtime * self._static
        if self._signed:
            factor[(runtime < 0) & (self._static < 0)] *= -1
        shift = factor * self._offset + self._shift
        count = np.count_nonzero(active)
        if count > self.most * len(active) or count == 0 or (len(active) > 1 and not active.any(1).all()):
            return self._masked(whole(value), factor * active, shift * active)
        return self._gathered(value, factor, shift, active)

    def _pooled(self, value: Value) -> Tensor:
        """`[sample, input]` the layer's input averaged over positions."""
        if value.__class__ is not Compact:
            return self._mean(value)
        out = np.zeros((value.samples, value.width), dtype=np.float32)
        for rows, map, active in value.parts:
            mean = self._mean(map).numpy()
            if rows is None and len(mean) == 1:
                out[0][active] = mean[0]
            else:
                out[np.arange(len(out))[:, None] if rows is None else rows[:, None], active] = mean
        return torch.from_numpy(out)

    def _mean(self, map: Tensor) -> Tensor:
        if map.dim() == 2:
            return map
        if map.dim() == 4 and len(map) == 1 and map.stride(1) == 1 and not self.kernel.linear:
            # As a product with a row of equal numbers: the scores, a product too, find its code in the cache.
            positions = map.shape[2] * map.shape[3]
            average = self._averages.get(positions)
            if average is None:
                average = self._averages[positions] = torch.full((1, positions), 1 / positions)
            return torch.mm(average, map.permute(0, 2, 3, 1).reshape(positions, -1))
        return map.mean(tuple(range(1, map.dim() - 1)) if self.kernel.linear else tuple(range(2, map.dim())))

    def _masked(self, x: Tensor, factor: np.ndarray, shift: np.ndarray) -> Tensor:
        """The whole layer, with factors and shifts that are zero where a channel is not active."""
        y = self._scaled(self.kernel.whole(x), factor, shift)
        return y.relu_() if self.rectify else y

    def _gathered(self, value: Value, factor: np.ndarray, shift: np.ndarray, active: np.ndarray) -> Compact:
        """The layer on active channels alone, for each group of images that share all choices so far."""
        parts, samples = [], len(active)
        for rows, map, inputs in value.parts if value.__class__ is Compact else ((None, value, None),):
            for places, outputs in shared(active if rows is None else active[rows]):
                x = map if places is None else map[torch.from_numpy(places)]
                mine = rows if places is None else (places if rows is None else rows[places])
                some = (factor, shift) if mine is None else (factor[mine], shift[mine])
                y = self._some(x, inputs, outputs, some[0].take(outputs, axis=1), some[1].take(outputs, axis=1))
                parts.append(Part(mine, y, outputs))
        return Compact(tuple(parts), samples, y.dim() - 1 if self.kernel.linear else 1, self.kernel.channels)

    def _some(
        self, x: Tensor, inputs: np.ndarray | None, outputs: np.ndarray, factor: np.ndarray, shift: np.ndarray
    ) -> Tensor:
        weight = self.kernel.some(outputs, inputs)
        if len(factor) == 1 and weight.size < HEAVY:
            weight *= factor.T
            y = self.kernel.run(x, weight, torch.from_numpy(shift[0]))
        else:
            y = self._scaled(self.kernel.run(x, weight, None), factor, shift)
        return y.relu_() if self.rectify else y

    def _scaled(self, y: Tensor, factor: np.ndarray, shift: np.ndarray) -> Tensor:
        ones = (1,) * (y.dim() - 2)
        shape = (len(y), *ones, -1) if self.kernel.linear else (len(y), -1, *ones)
        return y.mul_(torch.from_numpy(factor).view(shape)).add_(torch.from_numpy(shift).view(shape))


def _normalised(layer: GatedLayer) -> tuple[Tensor, Tensor]:
    """The producer's weight divided by the norm's deviation, and the constant that the norm adds."""
    weight = layer.producer.weight.detach()
    bias = weight.new_zeros(layer.channels) if layer.producer.bias is None else layer.producer.bias.detach()
    mean = getattr(layer.norm, "running_mean", None)
    if mean is None:
        return weight, bias
    inverse = (layer.norm.running_var.double() + layer.norm.eps).rsqrt()
    scaled = weight.double() * inverse.view(-1, *(1,) * (weight.dim() - 1))
    return scaled.float(), ((bias.double() - mean.double()) * inverse).float()


class Reader:
    """A convolution or linear layer without a gate: reads only what is active, writes everything."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __call__(self, value: Value) -> Tensor:
        """The layer's whole output."""
        kernel = self.kernel
        if value.__class__ is not Compact:
            return kernel.whole(value)
        map = value.parts[0].map
        # With one row of features there is more to copy than to compute.
        fits = value.axis == (map.dim() - 1 if kernel.linear else 1)
        if kernel.grouped or not fits or (kernel.linear and map.dim() == 2):
            return kernel.whole(value.expand())
        return merged([(rows, kernel.part(x, active)) for rows, x, active in value.parts], value.samples)


class Alike:
    """A function that treats all channels alike and leaves zero channels zero: it works on what is active.

    Args:
        function: The operation.
        spatial: Whether it works on positions, so that the channels must be axis 1.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], *, spatial: bool) -> None:
        self.function, self.spatial = function, spatial

    def __call__(self, value: Value) -> Value:
        """The function's value."""
        if value.__class__ is not Compact:
            return self.function(value)
        if self.spatial and value.axis != 1:
            return self.function(value.expand())
        return value.each(self.function)


class Flat:
    """All axes but the first as one."""

    def __call__(self, value: Value) -> Value:
        """The flat value."""
        return value.flatten() if value.__class__ is Compact else value.flatten(1)


class Joined:
    """Maps behind one another along axis 1."""

    def __call__(self, *values: Value) -> Value:
        """The joined map."""
        if any(value.__class__ is Compact for value in values):
            return joined(list(values))
        return torch.cat(values, 1)


class Whole:
    """Any other operation: it sees whole values."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def __call__(self, *values: Value) -> object:
        """The operation's value."""
        return self.function(*map(whole, values))
