"""Plans: JSON in and out, equality, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_env.pruning.plan import Plan
from prune_env.pruning.tracing import trace
from tests.env.small_networks import build, example

keeps = st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 500), min_size=1, unique=True))
shares = st.dictionaries(st.text(min_size=1), st.floats(0.01, 1.0))


@given(keeps, shares)
def test_json_and_back_is_equal(keep: dict, share: dict) -> None:
    plan = Plan(keep, share)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)


def test_order_of_indices_does_not_matter() -> None:
    assert Plan({"a": (2, 0)}) == Plan({"a": [0, 2]})


@pytest.mark.parametrize("kept", [(), (1, 1), (-1,), (0.5,), None, "01", (True,)])
def test_bad_indices_are_refused(kept: object) -> None:
    with pytest.raises(ValueError, match=r"keep\['a'\]"):
        Plan({"a": kept})


BROKEN = ["", "{", "[]", '{"keep": 3}', '{"keep": {"a": []}}', '{"keep": {}, "runtime_keep": 1}']


@pytest.mark.parametrize("text", BROKEN)
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"plan|keep"):
        Plan.from_json(text)


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_runtime_share_is_in_zero_one(share: float) -> None:
    with pytest.raises(ValueError, match="runtime_keep"):
        Plan({}, {"a": share})


def test_of_counts_keeps_the_best_and_breaks_ties_by_index() -> None:
    graph = trace(build("chain"), example())
    scores = {"body.0.0": [1, 5, 3, 3, 0, 3, 2, 9], "body.2.0": np.zeros(6), "hidden": -np.arange(10.0)}
    plan = Plan.of_counts(graph, np.array([4, 2, 3]), scores)
    assert plan.keep == {"body.0.0": (1, 2, 3, 7), "body.2.0": (0, 1), "hidden": (0, 1, 2)}
    np.testing.assert_array_equal(graph.counts(plan), [4, 2, 3])


def test_scores_that_are_not_numbers_are_refused() -> None:
    graph = trace(build("chain"), example())
    scores = {"body.0.0": np.full(8, np.nan), "body.2.0": np.zeros(6), "hidden": np.zeros(10)}
    with pytest.raises(ValueError, match=r"body\.0\.0"):
        Plan.of_counts(graph, np.array([4, 2, 3]), scores)
