"""What may be compared: every method that the project has, by name, and what kind of row it makes."""

from __future__ import annotations

from collections.abc import Iterable

from agents.algorithms import ALGORITHMS
from baselines import METHODS
from baselines.method import given_scores
from baselines.runtime import RUNTIME_METHODS
from baselines.search import OPTIMISERS
from prune_env.checks import check_name
from prune_env.pruning.importance import IMPORTANCES

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


WITH = "@"
"""`METHOD@IMPORTANCE` is the method with that importance in place of the comparison's."""


def kind_of(method: str) -> str:
    """Kind of a row."""
    name, _ = parts_of(method)
    return next((kind for kind, names in KINDS.items() if name in names), DENSE)


def parts_of(method: str) -> tuple[str, str | None]:
    """The method's own name, and the importance that it is given, if it is given one."""
    name, found, importance = method.partition(WITH)
    return name, importance if found else None


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
    if WITH in word:
        return (_with_importance(*word.split(WITH, 1)),)
    name = "td3" if word == LEARNED else word.removeprefix(f"{LEARNED}:")
    plain = [name for names in KINDS.values() for name in names]
    check_name("method", word, (*plain, LEARNED, *GROUPS, *(f"{LEARNED}:{a}" for a in ALGORITHMS)))
    return (name,)


def _with_importance(word: str, importance: str) -> str:
    """The name of a method with an importance of its own."""
    check_name("importance", importance, IMPORTANCES)
    names = _methods(word)
    brought = any(name in METHODS and METHODS[name].importance is not given_scores for name in names)
    if len(names) != 1 or brought or kind_of(names[0]) == "runtime":
        raise ValueError(
            f"method {word + WITH + importance!r}: {word!r} takes no importance; allowed is one method that does not "
            "bring its own"
        )
    return f"{names[0]}{WITH}{importance}"
