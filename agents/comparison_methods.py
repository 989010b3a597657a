"""What may be compared: every method that the project has, by name, and what kind of row it makes."""

from __future__ import annotations

from collections.abc import Iterable

from agents.algorithms import ALGORITHMS
from baselines import METHODS
from baselines.runtime import RUNTIME_METHODS
from baselines.search import OPTIMISERS
from prune_env.checks import check_name

HEURISTICS = ("uniform", "random", "global_magnitude", "lamp", "first_last", "greedy", "error_curves")
"""Of `baselines.METHODS`, those that are rules of thumb; the others are searches or published methods."""

RUNTIME_TRUSTS = {"runtime": 1.0, "runtime_both": 0.5, "runtime_static": 0.0}
"""Runs of `agents.train runtime`: name -> trust in the runtime decision."""

DENSE = "dense"
"""The whole network: a row of every comparison, whatever is asked for."""

KINDS = {
    "heuristic": HEURISTICS,
    "paper": tuple(name for name in METHODS if name not in {*HEURISTICS, *OPTIMISERS}),
    "search": tuple(OPTIMISERS),
    "learned": tuple(ALGORITHMS),
    "runtime": (*RUNTIME_TRUSTS, *RUNTIME_METHODS),
}
"""Kind -> names of its methods."""

GROUPS = {
    "heuristics": "heuristic",
    "papers": "paper",
    "searches": "search",
    "agents": "learned",
    "runtimes": "runtime",
}
"""What may be asked for in place of a name: all methods of a kind."""

LEARNED = "learned"
"""`learned` is the usual algorithm, `learned:NAME` that of the name."""


def kind_of(method: str) -> str:
    """Kind of a row."""
    return next((kind for kind, names in KINDS.items() if method in names), DENSE)


def methods_of(words: Iterable[str]) -> tuple[str, ...]:
    """Methods that some words ask for, each once, in order.

    Raises:
        ValueError: A word that is neither a method nor a group; names the closest.
    """
    found: dict[str, None] = {}
    for word in words:
        found |= dict.fromkeys(_methods(word))
    if not found:
        raise ValueError("methods is empty; at least one method is needed")
    return tuple(found)


def _methods(word: str) -> tuple[str, ...]:
    """Methods of one word."""
    if word in GROUPS:
        return KINDS[GROUPS[word]]
    name = "td3" if word == LEARNED else word.removeprefix(f"{LEARNED}:")
    plain = [name for names in KINDS.values() for name in names]
    check_name("method", word, (*plain, LEARNED, *GROUPS, *(f"{LEARNED}:{a}" for a in ALGORITHMS)))
    return (name,)
