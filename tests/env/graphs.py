"""Graphs of the small networks, traced once per session: they hold only names and integers."""

from __future__ import annotations

from functools import cache

from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.tracing import trace
from tests.env.small_networks import build, example


@cache
def traced(name: str) -> LayerGraph:
    """The graph of the small network of that name."""
    return trace(build(name), example())
