"""Compact values: feature maps that hold only the channels that are active, images with the same choice together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Part(NamedTuple):
    """Images of a batch that share their active channels.

    Attributes:
        rows: `[row]` their places in the batch, int64; None for all of it.
        map: `[row, ..., active, ...]` their values.
        active: `[active]` positions along the channel axis of the whole map, int64, rising; None if it is whole.
    """

    rows: np.ndarray | None
    map: Tensor
    active: np.ndarray | None


class Compact:
    """A batch of feature maps without the channels that are zero anyway.

    Attributes:
        parts: At least one; each image is in one of them.
        samples: Images of the batch.
        axis: The channel axis: 1, or the last one behind a linear layer.
        width: Channels of the whole map.
    """

    __slots__ = ("axis", "parts", "samples", "width")

    def __init__(self, parts: tuple[Part, ...], samples: int, axis: int, width: int) -> None:
        self.parts, self.samples, self.axis, self.width = parts, samples, axis, width

    def each(self, function: Callable[[Tensor], Tensor]) -> Compact:
        """The same channels after a function that treats each of them alike."""
        parts = tuple(Part(part.rows, function(part.map), part.active) for part in self.parts)
        return Compact(parts, self.samples, self.axis, self.width)

    def expand(self) -> Tensor:
        """The whole map, zero where a channel is not active."""
        return merged([(rows, scattered(map, active, self.axis, self.width)) for rows, map, active in self.parts],
                      self.samples)  # fmt: skip

    def flatten(self) -> Compact | Tensor:
        """All axes from the channels' on as one, each position of the flat map for itself."""
        if self.axis != 1:
            return self.expand().flatten(1)
        parts, repeat = [], 1
        for rows, map, active in self.parts:
            repeat = map[0, 0].numel()
            flat = active if repeat == 1 else (active[:, None] * repeat + np.arange(repeat)).ravel()
            parts.append(Part(rows, map.flatten(1), flat))
        return Compact(tuple(parts), self.samples, 1, self.width * repeat)


Value = Tensor | Compact


def whole(value: Value) -> Tensor:
    """A value with all of its channels."""
    return value.expand() if value.__class__ is Compact else value


def scattered(map: Tensor, active: np.ndarray, axis: int, width: int) -> Tensor:
    """Active channels at their positions in a map that is zero elsewhere."""
    shape = list(map.shape)
    shape[axis] = width
    out = map.new_zeros(shape)
    index = torch.from_numpy(active)
    if shape[0] == 1 and axis == 1:
        # Whole blocks of memory.
        out[0].index_copy_(0, index, map[0])
        return out
    return out.index_copy_(axis, index, map)


def merged(pieces: list[tuple[np.ndarray | None, Tensor]], samples: int) -> Tensor:
    """Rows of a batch back in their places."""
    if pieces[0][0] is None:
        return pieces[0][1]
    first = pieces[0][1]
    out = first.new_empty((samples, *first.shape[1:]))
    for rows, tensor in pieces:
        out[torch.from_numpy(rows)] = tensor
    return out


def joined(values: list[Value]) -> Value:
    """Maps behind one another along axis 1; compact if their images are grouped alike."""
    compact = [value for value in values if value.__class__ is Compact]
    first = compact[0]
    alike = all(value.axis == 1 and _same_rows(value, first) for value in compact)
    if not alike or (len(compact) < len(values) and first.parts[0].rows is not None):
        return torch.cat([whole(value) for value in values], 1)
    parts = []
    for at, part in enumerate(first.parts):
        maps, positions, start = [], [], 0
        for value in values:
            map, active, width = _piece(value, at)
            maps.append(map)
            positions.append(active + start)
            start += width
        parts.append(Part(part.rows, torch.cat(maps, 1), np.concatenate(positions)))
    return Compact(tuple(parts), first.samples, 1, start)


def _piece(value: Value, at: int) -> tuple[Tensor, np.ndarray, int]:
    if value.__class__ is Compact:
        return value.parts[at].map, value.parts[at].active, value.width
    return value, np.arange(value.shape[1]), value.shape[1]


def _same_rows(one: Compact, other: Compact) -> bool:
    if len(one.parts) != len(other.parts):
        return False
    return all(a.rows is b.rows or np.array_equal(a.rows, b.rows) for a, b in zip(one.parts, other.parts, strict=True))


def shared(masks: np.ndarray) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    """Rows with the same mask, and the positions it holds; None for all rows.

    Args:
        masks: `[row, channel]` bool.
    """
    if len(masks) == 1:
        yield None, masks[0].nonzero()[0]
        return
    groups: dict[bytes, list[int]] = {}
    for row, mask in enumerate(np.packbits(masks, axis=1)):
        groups.setdefault(mask.tobytes(), []).append(row)
    for rows in groups.values():
        yield (None if len(rows) == len(masks) else np.array(rows)), masks[rows[0]].nonzero()[0]
