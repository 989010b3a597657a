"""While tests run, one letter means one length throughout a call, and plain types are checked as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError

from baselines.allocate import protected
from prune_env.pruning.plan import Plan
from tests.typechecks import OFTEN, ONE_IN, checked

Weights = Float[np.ndarray, " n"]


@checked
def added(a: Weights, b: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return a + b


@checked
@dataclass
class Pair:
    first: Weights
    rest: tuple[Weights, ...]


@checked
@dataclass
class Named:
    name: str


def test_a_letter_is_one_length_throughout_a_call_also_by_another_name() -> None:
    assert added(np.ones(2), np.ones(2)).tolist() == [2, 2]
    for wrong in (np.ones(1), np.ones((2, 2)), np.ones(2, dtype=np.int64)):
        with pytest.raises(TypeCheckError):
            added(np.ones(2), wrong)
    with pytest.raises(TypeCheckError):
        Pair(np.ones(2), (np.ones(2), np.ones(3)))


def test_plain_types_are_checked_too() -> None:
    assert Named("l1").name == "l1"
    with pytest.raises(TypeCheckError):
        Named(1)  # type: ignore[arg-type]


def test_a_function_inside_another_is_checked_when_it_is_first_made() -> None:
    def make() -> Callable[[str], str]:
        @checked
        def same(name: str) -> str:
            return name

        return same

    first, second = make(), make()
    with pytest.raises(TypeCheckError):
        first(1)  # type: ignore[arg-type]
    assert second(1) == 1  # type: ignore[arg-type, comparison-overlap]


def test_what_is_called_very_often_is_checked_now_and_then() -> None:
    @checked
    def summed(a: Weights) -> float:
        return float(np.sum(a))

    refused = []
    for call in range(OFTEN + 3 * ONE_IN):
        try:
            assert summed(np.ones((2, 2))) == 4.0
        except TypeCheckError:
            refused.append(call)
    assert refused == [*range(OFTEN), *range(OFTEN, OFTEN + 3 * ONE_IN, ONE_IN)]


def test_the_packages_are_checked_so() -> None:
    assert jaxtyping.jaxtyped(typechecker=None) is checked
    with pytest.raises(TypeCheckError):
        Plan(keep=3)  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        protected(3, ())  # type: ignore[arg-type]
