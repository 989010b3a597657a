"""What the budgets of a study say together, from columns made up for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from benchmarks.lasting import overview
from benchmarks.lasting.candidates import Candidate, Table
from benchmarks.lasting.ranking import Estimate, Spread

INSTANT, SHORT = "instant measurement", "short training"
TRUTH = (0.1, 0.2, 0.3, 0.4)


def table(budget: float, scores: Mapping[str, tuple[str, tuple[float, ...]]], *, cpu_s: float = 2.0) -> Table:
    """A budget with scores by name: kind and values."""
    size = len(next(iter(scores.values()))[1])
    truth = np.array(TRUTH * (size // len(TRUTH)))
    found = tuple(
        Candidate(name, kind, np.array(values), cpu_s, cpu_s, (name,)) for name, (kind, values) in scores.items()
    )
    names = tuple(f"{budget}-{number}" for number in range(size))
    spreads = [Spread(size, 0.1, 0.4, 0.1, 0, None, None)] * 2
    return Table(budget, names, truth, -truth, found, *spreads)


def test_the_mean_is_over_budgets_of_the_scores_that_all_have() -> None:
    one = table(0.5, {"at once": (INSTANT, (1, 2, 3, 4)), "zen": ("trainability", (1, 2, 3, 4))})
    other = table(0.35, {"at once": (INSTANT, (2, 1, 3, 4))}, cpu_s=4.0)
    (row,) = overview.overall([one, other])
    # Of six pairs, one is out of order at the second budget: (5 - 1) / 6.
    assert row.taus == pytest.approx((1, 2 / 3))
    assert (row.mean.value, row.cpu_s) == (pytest.approx(5 / 6), 3.0)
    assert row.mean.low <= row.mean.value <= row.mean.high


def test_the_difference_is_on_the_same_resampled_plans() -> None:
    """Scores that say the same differ by nothing in every sample, however wide each one's own interval is."""
    values = (INSTANT, (3, 1, 2, 4)), (SHORT, (6, 2, 4, 8))
    one, other = overview.overall([table(0.5, {"at once": values[0], "20@0.02": values[1]})])
    assert one.mean.high - one.mean.low > 0.5
    assert one.over(other) == Estimate(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("instant", "short", "verb"),
    [
        ((4, 3, 2, 1), TRUTH, "better than"),
        (TRUTH, (4, 3, 2, 1), "worse than"),
        (TRUTH, TRUTH, "no better than"),
        ((1, 2, 4, 3), TRUTH, "no better than"),
    ],
)
def test_the_headline_says_no_more_than_the_interval_of_the_difference(
    instant: tuple[float, ...], short: tuple[float, ...], verb: str
) -> None:
    found = [table(0.5, {"at once": (INSTANT, instant), "20@0.02": (SHORT, short)})]
    text = overview.headline(overview.overall(found))
    assert text.startswith(f"short training foresees fine-tuning {verb} measuring at once\n")
    assert "(20@0.02, 2 s)" in text


def test_without_both_kinds_the_headline_names_the_best() -> None:
    found = [table(0.5, {"at once": (INSTANT, (2, 1, 3, 4)), "min": (INSTANT, (4, 3, 2, 1))})]
    assert overview.headline(overview.overall(found)) == "at once ranks plans best (mean tau-b 0.67)"


def test_the_section_shows_the_best_of_each_kind_best_first() -> None:
    scores = {
        "worst": (INSTANT, (4, 3, 2, 1)),
        "at once": (INSTANT, (2, 1, 3, 4)),
        "20@0.02": (SHORT, TRUTH),
    }
    found = [table(0.5, scores), table(0.35, scores)]
    text = overview.section(found, overview.overall(found), shown=1)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row.split(" | ")[0] for row in rows] == [
        "| score",
        "| 20@0.02",
        "| at once",
        "| the fine-tuned networks on the test split",
    ]
    assert rows[2].startswith("| at once | instant measurement | 2 | 0.67 | 0.67 | 0.67 [")
    assert rows[3].endswith(" | -1.00 | -1.00 | -1.00 |"), "its accuracies are the truth's, turned round"
    assert "4 + 4 plans" in text
    assert "`20@0.02` above `at once`, on the same plans: 0.33 [" in text
