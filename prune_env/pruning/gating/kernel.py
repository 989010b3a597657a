"""Kernels: a convolution or linear layer that runs whole, or as a smaller one on some of its channels.

Whole convolutions run on weights that were laid out once, as torch's own compiler does it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FUNCTIONS = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}
NARROW = 8
"""Input channels below which a convolution on a small map is faster as torch runs it than on weights laid out once."""
SMALL = 20480
"""Values of a small map: torch itself runs a convolution on it as a matrix product."""


class Kernel:
    """One layer, its weights laid out so that channels are picked as blocks of memory.

    Args:
        module: The layer; its sizes count, not its tensors.
        weight: `[output, input, ...]`.
        bias: `[output]`, or none.
        rectify: Whether a rectifier follows.

    Attributes:
        linear: Whether channels are the last axis of its maps, not axis 1.
        grouped: Whether its inputs are more than its weight shows.
        channels: Output channels.
    """

    def __init__(self, module: nn.Module, weight: Tensor, bias: Tensor | None, *, rectify: bool) -> None:
        self.linear, self.grouped = isinstance(module, nn.Linear), getattr(module, "groups", 1) > 1
        self.rectify = rectify
        self._run = _function(module)
        self._weight, self._bias = weight.detach().contiguous(), None if bias is None else bias.detach().contiguous()
        self.channels, self.inputs, *self._kernel = self._weight.shape
        window = int(np.prod(self._kernel))
        # One record per pair of channels: numpy copies records faster than torch selects along two axes.
        blocks = self._weight.numpy().reshape(self.channels, self.inputs, window)
        self._records = blocks[..., 0] if window == 1 else blocks.view(f"V{4 * window}")[..., 0]
        self._flat, self._starts = self._records.reshape(-1), np.arange(self.channels)[:, None] * self.inputs
        self._options = _options(module)
        self._packed: Tensor | None = None

    def whole(self, x: Tensor) -> Tensor:
        """The layer with all its channels."""
        if self._options and (x.shape[1] >= NARROW or x.numel() > SMALL):
            if self._packed is None:
                self._packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
                    self._weight.to_mkldnn(), *self._options, list(x.shape)
                )
            after = "relu" if self.rectify else "none"
            return _PACKED(x, self._packed, self._bias, *self._options, after, [], "")
        y = self._run(x, self._weight, self._bias)
        return y.relu_() if self.rectify else y

    def some(self, outputs: np.ndarray | None, inputs: np.ndarray | None) -> np.ndarray:
        """A copy of the weights of some channels, `[output, input * window]`.

        Args:
            outputs: Positions of output channels; None for all.
            inputs: Positions of input channels; None for all.
        """
        if outputs is None:
            picked = self._records if inputs is None else self._records.take(inputs, axis=1)
        elif inputs is None:
            picked = self._records.take(outputs, axis=0)
        else:
            picked = self._flat.take((self._starts.take(outputs, axis=0) + inputs).ravel())
        return picked.view(np.float32).reshape(self.channels if outputs is None else len(outputs), -1)

    def run(self, x: Tensor, weight: np.ndarray, bias: Tensor | None) -> Tensor:
        """The layer with other weights, from `some`; without the rectifier."""
        return self._run(x, torch.from_numpy(weight).view(len(weight), -1, *self._kernel), bias)

    def part(self, x: Tensor, inputs: np.ndarray) -> Tensor:
        """The whole layer on a map that holds some of its inputs."""
        y = self.run(x, self.some(None, inputs), self._bias)
        return y.relu_() if self.rectify else y


def _function(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The layer as a function of input, weight and bias."""
    if isinstance(module, nn.Linear):
        return functional.linear
    if module.padding_mode != "zeros":
        return module._conv_forward
    return partial(
        FUNCTIONS[type(module)],
        stride=module.stride, padding=module.padding, dilation=module.dilation, groups=module.groups,
    )  # fmt: skip


def _options(module: nn.Module) -> tuple | None:
    """What torch's convolution on weights laid out once needs to know, if the layer is one that it can run."""
    fits = isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if not fits or _PACKED is None or not torch.backends.mkldnn.is_available():
        return None
    return list(module.padding), list(module.stride), list(module.dilation), module.groups


_PACKED = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
"""Torch's convolution on weights laid out once, where it is built with it."""
