"""Images and the splits of them: pixels stay bytes until a batch is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from prune_env.tasks.normalisation import Normalisation


@runtime_checkable
class Images(Protocol):
    """A sequence of equally sized images."""

    def __len__(self) -> int: ...

    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        ...

    def pixels(self, indices: Int64[Tensor, " n"]) -> UInt8[Tensor, "n c h w"]:
        """The images at these positions."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in memory.

    Attributes:
        array: All pixels, NCHW by shape; channels last in memory is as good and faster to train on.
    """

    array: UInt8[Tensor, "n c h w"]

    def __len__(self) -> int:
        return len(self.array)

    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, channels, height, width = self.array.shape
        return channels, height, width

    def pixels(self, indices: Int64[Tensor, " n"]) -> UInt8[Tensor, "n c h w"]:
        """The images at these positions, a copy."""
        return self.array[indices]


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images in files, decoded when asked for: the shorter side scaled to 8/7 of `size`, then the centre cut out."""

    paths: tuple[Path, ...]
    size: int
    threads: int = 4

    def __len__(self) -> int:
        return len(self.paths)

    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return 3, self.size, self.size

    def pixels(self, indices: Int64[Tensor, " n"]) -> UInt8[Tensor, "n c h w"]:
        """The images at these positions.

        Raises:
            ValueError: A file that is no readable image.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            decoded = list(pool.map(self._decode, (self.paths[i] for i in indices.tolist())))
        array = np.stack(decoded) if decoded else np.zeros((0, self.size, self.size, 3), np.uint8)
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def _decode(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is no readable image: {error}") from error
        scale = self.size * 8 / 7 / min(rgb.size)
        width, height = (max(self.size, round(side * scale)) for side in rgb.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(rgb.crop((left, top, left + self.size, top + self.size)))


@dataclass(frozen=True, eq=False)
class Split:
    """Some images of a data set with their labels, in an order of which every prefix is a fair sample.

    Attributes:
        images: Where the pixels are.
        indices: Positions in `images`, one per image of the split.
        labels: Class of each image of the split.
        classes: Number of classes of the data set.
        normalise: Bytes to what the network reads.
    """

    images: Images
    indices: Int64[Tensor, " n"]
    labels: Int64[Tensor, " n"]
    classes: int
    normalise: Normalisation

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one image."""
        return self.images.shape()

    def pixels(self, positions: Int64[Tensor, " m"]) -> UInt8[Tensor, "m c h w"]:
        """Raw bytes of the images at these positions of the split."""
        return self.images.pixels(self.indices[positions])

    def at(self, positions: Int64[Tensor, " m"]) -> Split:
        """The images at these positions as a split of its own; a position may come more than once."""
        return replace(self, indices=self.indices[positions], labels=self.labels[positions])

    def take(self, count: int) -> tuple[Float[Tensor, "m c h w"], Int64[Tensor, " m"]]:
        """The first `count` images, normalised, and their labels (all there are, if fewer).

        Raises:
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count is {count}; at least 1 image is allowed")
        positions = torch.arange(min(count, len(self)))
        return self.normalise(self.pixels(positions)), self.labels[positions].clone()

    def batches(self, batch_size: int) -> Iterator[tuple[Float[Tensor, "m c h w"], Int64[Tensor, " m"]]]:
        """All images in order, normalised, at most `batch_size` at a time.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least 1 is allowed")
        for positions in torch.arange(len(self)).split(batch_size):
            yield self.normalise(self.pixels(positions)), self.labels[positions].clone()


def stratified_order(labels: Int64[np.ndarray, " n"], seed: int) -> Int64[np.ndarray, " n"]:
    """A seeded shuffle of which every prefix holds the classes in proportion.

    Each class is shuffled and spread evenly over [0, 1) from a random start; sorting all images by that place mixes
    the classes. A prefix misses the exact share of a class by less than two images.
    """
    rng = np.random.default_rng(seed)
    place = np.empty(len(labels))
    for value in np.unique(labels):
        members = np.flatnonzero(labels == value)
        place[rng.permutation(members)] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")
