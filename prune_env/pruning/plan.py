"""The plan: which channels of each group are kept. The answer of an episode, and what a run's record replays."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prune_env.pruning.graph import LayerGraph

NO_INDICES = (str, int, float, type(None))
"""What people hand over in the place of a collection of indices."""


@dataclass(frozen=True)
class Plan:
    """Kept channel indices per group.

    Attributes:
        keep: Group name -> kept channel indices. Stored sorted; groups not named are kept whole.
        runtime_keep: Group name -> share of the kept channels that may be active for one input.

    Raises:
        ValueError: An empty or repeated or negative index, or a share outside (0, 1].
    """

    # Any, not tuple[int, ...]: what JSON and people hand over is checked, with better words than a type checker's.
    keep: Mapping[str, Any]
    runtime_keep: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.runtime_keep.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"runtime_keep[{name!r}] is {value!r}; a share in (0, 1] is allowed")
        object.__setattr__(self, "keep", {str(name): _indices(name, kept) for name, kept in self.keep.items()})
        object.__setattr__(self, "runtime_keep", {str(name): float(v) for name, v in self.runtime_keep.items()})

    def __hash__(self) -> int:
        return hash((frozenset(self.keep.items()), frozenset(self.runtime_keep.items())))

    @classmethod
    def full(cls, graph: LayerGraph) -> Plan:
        """The plan that keeps everything."""
        return cls({group.name: tuple(range(group.channels)) for group in graph.groups})

    @classmethod
    def of_counts(cls, graph: LayerGraph, counts: np.ndarray, scores: Mapping[str, Any]) -> Plan:
        """Keep the highest-scored channels of each group.

        Args:
            graph: The network's graph.
            counts: `[groups]` channels to keep.
            scores: Group name -> one score per channel, higher = keep; ties go to the lower index.

        Raises:
            ValueError: A score vector that is missing, has the wrong length or holds NaN.
        """
        keep = {}
        for group, count in zip(graph.groups, np.asarray(counts).tolist(), strict=True):
            if group.name not in scores:
                raise ValueError(f"scores has no entry for group {group.name!r}")
            score = np.asarray(scores[group.name], dtype=np.float64)
            order = (-score).argsort(kind="stable") if score.shape == (group.channels,) else None
            if order is None or math.isnan(score[order[-1]]):  # NaN is sorted last
                raise ValueError(
                    f"scores[{group.name!r}] must be {group.channels} numbers without NaN, not shape {score.shape}"
                )
            kept = order[: int(count)]
            kept.sort()
            keep[group.name] = kept.tolist()
        return cls(keep)

    def check(self, graph: LayerGraph) -> None:
        """Refuse a plan that does not fit the graph.

        Raises:
            ValueError: An unknown group, or an index beyond its channels.
        """
        for name, kept in self.keep.items():
            group = graph.group(name)
            if kept[-1] >= group.channels:
                raise ValueError(f"keep[{name!r}] holds channel {kept[-1]}; the group has {group.channels} (from 0)")
        for name in self.runtime_keep:
            graph.group(name)

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps({"keep": self.keep, "runtime_keep": self.runtime_keep})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that `to_json` wrote.

        Raises:
            ValueError: The text is not a plan.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a plan must be JSON: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("keep"), dict):
            raise ValueError('a plan must be a JSON object with "keep": {group: [indices]}')
        runtime_keep = data.get("runtime_keep", {})
        if not isinstance(runtime_keep, dict):
            raise ValueError('a plan\'s "runtime_keep" must be {group: share}')
        return cls(data["keep"], runtime_keep)


def _indices(name: str, kept: Any) -> tuple[int, ...]:
    """Sorted indices, or a ValueError that says what is wrong with them."""
    values = list(kept) if not isinstance(kept, NO_INDICES) else None
    if not values:
        raise ValueError(f"keep[{name!r}] is {kept!r}; at least one channel index is needed")
    # What episodes hand over are plain integers: one pass over the types tells.
    plain = set(map(type, values)) == {int}
    whole = plain or all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in values)
    if not whole or min(values) < 0:
        raise ValueError(f"keep[{name!r}] must hold whole channel indices from 0 on, not {values[:8]}")
    if len(set(values)) != len(values):
        raise ValueError(f"keep[{name!r}] names a channel twice")
    return tuple(sorted(values if plain else map(int, values)))
