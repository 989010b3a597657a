"""Consumers: how a convolution or linear layer reads its inputs, as columns of one weight matrix.

The weights of a consumer are `[out, channel, tap]`: the taps are the kernel's positions, or, for a linear layer behind
a flatten, the positions of the map. Two matrices are made of them:

- *window*: `[out, channel * tap]`. A column is one weight of the window: a refit solves the kernel anew.
- *mix*: `[out * tap, channel]`. A column is a channel: a refit replaces a removed channel by a linear mix of the kept
  ones, the same at every tap. It needs moments of size channels squared instead of window squared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from prune_env.pruning.activations import channels_last, watching
from prune_env.pruning.graph import Group, Slot
from prune_env.pruning.surgery import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED

MAX_WIDTH = 2304
"""Largest window, channels times taps, that is solved anew: 256 channels of a 3x3 kernel."""
MAX_CHANNELS = 4096
"""Largest number of channels that are mixed; a consumer with more is left as it is."""


@dataclass(frozen=True)
class Consumer:
    """The layout of one consumer's weights and inputs.

    Attributes:
        name: Dotted module name.
        channels: Input channels.
        taps: Weights per output and channel.
        window: Whether columns are single weights of the window; otherwise they are channels.
        fold: Consecutive positions along the input axis that make one channel: 1, or the size of the flattened map.
        norm: A BatchNorm with running statistics that reads the outputs directly, if there is one.
    """

    name: str
    channels: int
    taps: int
    window: bool
    fold: int
    norm: str | None = None

    @property
    def width(self) -> int:
        """Columns of the weight matrix."""
        return self.channels * self.taps if self.window else self.channels

    def columns(self, positions: np.ndarray) -> np.ndarray:
        """Columns that belong to positions along the input axis, in rising order."""
        channels = np.unique(positions // self.fold)
        if not self.window:
            return channels
        return (channels[:, None] * self.taps + np.arange(self.taps)).ravel()

    def matrix(self, weight: Float[Tensor, "out channel *tap"]) -> Float[Tensor, "row column"]:
        """The weights (`oriented`) as a matrix; also of a cut layer, which has fewer outputs and columns."""
        weight = weight.reshape(len(weight), -1, self.taps)
        if self.window:
            return weight.flatten(1)
        return weight.transpose(1, 2).flatten(0, 1)

    def weight(self, matrix: Float[Tensor, "row column"], like: Tensor) -> Tensor:
        """The matrix back in the shape of oriented weights."""
        if not self.window:
            matrix = matrix.reshape(len(like), self.taps, -1).transpose(1, 2)
        return matrix.reshape(like.shape)

    def shifts(self, network: nn.Module) -> bool:
        """Whether a change of the mean output has a place to go: a bias, or the running mean of a BatchNorm."""
        return self.norm is not None or isinstance(network.get_submodule(self.name).bias, Tensor)

    def shift(self, network: nn.Module, change: Float[Tensor, " out"]) -> None:
        """Add a constant to the outputs as the rest of the network sees them."""
        bias = network.get_submodule(self.name).bias
        if isinstance(bias, Tensor):
            bias += change.to(bias)
        elif self.norm is not None:
            mean = network.get_buffer(f"{self.norm}.running_mean")
            mean -= change.to(mean)

    def samples(
        self, module: nn.Module, x: Tensor, *, limit: int, generator: torch.Generator
    ) -> Float[Tensor, "sample column"]:
        """What the columns are multiplied with, at some of the positions of a batch of inputs.

        Args:
            module: The consumer in the dense network, or cut to fewer input channels.
            x: The input it reads.
            limit: Positions taken from each image, the same in the whole batch.
            generator: Draws the positions when there are more.
        """
        if isinstance(module, CONVOLUTIONS) and self.window:
            return windows(module, x, limit=limit, generator=generator).flatten(0, 1).flatten(1)
        rows = channels_last(x, module)
        if self.fold > 1:
            rows = rows.reshape(len(rows), rows.shape[1], -1, self.fold).transpose(2, 3).flatten(1, 2)
        return rows[:, draw(rows.shape[1], limit, generator)].flatten(0, 1)


def draw(positions: int, limit: int, generator: torch.Generator) -> Tensor:
    """Sorted positions without repetition: all, or `limit` of them."""
    if positions <= limit:
        return torch.arange(positions)
    return torch.randperm(positions, generator=generator)[:limit].sort().values


def windows(
    module: _ConvNd, x: Float[Tensor, "sample channel *space"], *, limit: int, generator: torch.Generator
) -> Float[Tensor, "sample position channel tap"]:
    """The windows of a convolution at some output positions: any stride, padding, padding mode and dilation."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes = x.shape[2:]
    axes = tuple(zip(sizes, module.kernel_size, module.stride, module.dilation, strict=True))
    outputs = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in axes]
    chosen = np.unravel_index(draw(math.prod(outputs), limit, generator).numpy(), outputs)
    taps = np.array(list(itertools.product(*(range(kernel) for kernel in module.kernel_size)))).T
    # The place of every tap of every chosen window in the flattened map, row-major.
    place = np.zeros((len(chosen[0]), taps.shape[1]), dtype=np.int64)
    for (size, _, stride, dilation), position, tap in zip(axes, chosen, taps, strict=True):
        place = place * size + position[:, None] * stride + tap * dilation
    index = torch.from_numpy(place).to(x.device)
    return x.flatten(2).transpose(1, 2)[:, index].transpose(2, 3)


def complement(positions: np.ndarray, size: int) -> Tensor:
    """The positions below `size` that are not named, rising."""
    kept = np.ones(size, dtype=bool)
    kept[positions] = False
    return torch.from_numpy(np.flatnonzero(kept))


def weights_of(module: nn.Module) -> Tensor:
    """A module's weights, detached."""
    weight = module.weight
    assert isinstance(weight, Tensor), f"{type(module).__name__} has no weights"
    return weight.detach()


def oriented(module: nn.Module) -> Float[Tensor, "out channel *tap"]:
    """A layer's weights with the outputs first."""
    weights = weights_of(module)
    return weights.transpose(0, 1) if isinstance(module, TRANSPOSED) else weights


def consumers(
    network: nn.Module, groups: Iterable[Group], example: Tensor, *, max_width: int = MAX_WIDTH
) -> dict[str, Consumer]:
    """The consumers of groups that a refit can treat, by module name.

    Left out are grouped convolutions, and layers with more than `MAX_CHANNELS` inputs that no flatten folds into
    fewer channels.

    Args:
        network: The dense network.
        groups: Its groups.
        example: A few inputs to run once, which shows the norm behind each consumer.
        max_width: Largest window that is solved anew.
    """
    slots: dict[str, list[Slot]] = {}
    for slot in (slot for group in groups for slot in group.consumers):
        slots.setdefault(slot.module, []).append(slot)
    norms = norms_behind(network, slots, example)
    found = (_consumer(network.get_submodule(name), name, read, max_width) for name, read in slots.items())
    return {one.name: replace(one, norm=norms.get(one.name)) for one in found if one is not None}


def norms_behind(network: nn.Module, names: Iterable[str], example: Tensor) -> dict[str, str]:
    """For each named layer whose output is the very tensor that a BatchNorm reads next: that norm's name."""
    written: dict[int, tuple[str, Tensor, int]] = {}
    found: dict[str, str] = {}

    def read(name: str, module: nn.Module, x: Tensor) -> None:
        layer, tensor, version = written.get(id(x), ("", None, 0))
        # An activation in place leaves the same tensor with a higher version.
        if tensor is x and x._version == version:
            found[layer] = name

    norms = [
        name
        for name, module in network.named_modules()
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    ]
    handles = []
    try:
        for name in names:
            # The tensor is held, so that no other can take its identity while the network runs.
            def write(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
                written[id(output)] = (name, output, output._version)

            handles.append(network.get_submodule(name).register_forward_hook(write))
        with watching(network, norms, read), torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _consumer(module: nn.Module, name: str, slots: list[Slot], max_width: int) -> Consumer | None:
    if isinstance(module, nn.Linear):
        fold = _fold(module.in_features, slots) if module.in_features > max_width else 1
        consumer = Consumer(name, module.in_features // fold, fold, window=fold == 1, fold=fold)
    elif isinstance(module, CONVOLUTIONS + TRANSPOSED) and module.groups == 1:
        taps = math.prod(module.kernel_size)
        window = isinstance(module, CONVOLUTIONS) and (taps == 1 or module.in_channels * taps <= max_width)
        consumer = Consumer(name, module.in_channels, taps, window=window, fold=1)
    else:
        return None
    return consumer if consumer.channels <= MAX_CHANNELS else None


def _fold(features: int, slots: list[Slot]) -> int:
    """Size of the flattened map in front of a linear layer: the largest number that divides every channel's run."""
    numbers = {features}
    for slot in slots:
        breaks = np.flatnonzero((np.diff(slot.unit) != 0) | (np.diff(slot.index) != 1)) + 1
        numbers.update(slot.index[np.r_[0, breaks]].tolist(), np.diff(np.r_[0, breaks, len(slot.index)]).tolist())
    return math.gcd(*numbers)
