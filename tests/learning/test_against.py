"""What one method of a comparison is above the others, by hand."""

from __future__ import annotations

import pytest

from benchmarks.against import rows_of, table


def line(method: str, seed: int, tuned: str, budget: str = "0.15") -> dict[str, str]:
    return {
        "method": method,
        "seed": str(seed),
        "budget": budget,
        "test_accuracy": "0.2",
        "fine_tuned_test_accuracy": tuned,
    }


LINES = [
    line("uniform", 0, "0.70"),
    line("uniform", 1, "0.72"),
    line("td3", 1, "0.75"),
    line("td3", 0, "0.71"),
    line("td3", 0, "0.99", budget="0.5"),
    line("dense", 0, ""),
]


def test_differences_are_paired_by_seed() -> None:
    text = table(rows_of(LINES, "0.15"), "td3").splitlines()
    assert text[2] == "| td3 | 20.00 | 73.00 | 71.00, 75.00 |  |"
    # Differences 1 and 3: mean 2, deviation sqrt(2), 12.706 sqrt(2) / sqrt(2).
    assert text[3] == "| uniform | 20.00 | 71.00 | 70.00, 72.00 | +2.00 (-10.71 to 14.71, n = 2) |"
    assert len(text) == 4, "neither another budget nor a network without fine-tuning"


def test_a_method_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="td3"):
        table(rows_of(LINES, "0.15"), "td")
