"""What a 3x3 convolution costs by its channels: why a narrower layer is not always a faster one.

Batches of 50 images, channels_last, in the number format that is fast here, as evaluation runs them: the shapes inside
the blocks of a CIFAR ResNet, whole and at half their width.

    python -m benchmarks.convolutions
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import nn

from benchmarks.timing import show, take_turns
from prune_env.number_format import fast_format

SHAPES = tuple(
    (side, inputs, outputs)
    for side, width in ((32, 16), (16, 32), (8, 64))
    for inputs, outputs in ((width, width), (width, width // 2), (width // 2, width))
)
"""Side of the map, input channels, output channels."""


@dataclass(frozen=True)
class Settings:
    """Convolutions by their channels."""

    images: int = 50
    """Images of a batch."""
    rounds: int = 15
    """Timed rounds per shape; the medians are shown."""
    threads: int = 1
    """CPU threads."""


def measure(side: int, inputs: int, outputs: int, settings: Settings) -> list[str]:
    """One row of the table."""
    dtype = fast_format("cpu")
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False).to(dtype=dtype, memory_format=torch.channels_last)
    images = torch.randn(settings.images, inputs, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        seconds = take_turns(settings.rounds, {"one": lambda _: layer(images)})["one"]
    each = float(np.median(seconds)) / settings.images
    macs = 9 * inputs * outputs * side * side
    return [f"{side} x {side}", f"{inputs} -> {outputs}", f"{each * 1e6:.1f}", f"{macs / each / 1e9:.0f}"]


def main(settings: Settings) -> None:
    """Time all shapes and print the table."""
    torch.set_num_threads(settings.threads)
    show(
        f"3x3 convolutions in {fast_format('cpu')}, {settings.threads} thread (median of {settings.rounds})",
        ["map", "channels", "us an image", "GMAC/s"],
        [measure(*shape, settings) for shape in SHAPES],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
