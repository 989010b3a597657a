"""What one method of a comparison is above the others, by hand."""

from __future__ import annotations

import pytest

from benchmarks.against import over_budgets, sections, table


def line(method: str, seed: int, tuned: str, budget: str = "0.15", test: str = "0.2") -> dict[str, str]:
    return {
        "task": "digits-cnn",
        "method": method,
        "kind": "dense" if method == "dense" else "learned",
        "seed": str(seed),
        "budget": budget,
        "search_accuracy": "0.3",
        "test_accuracy": test,
        "fine_tuned_test_accuracy": tuned,
        "cpu_seconds_find": "" if method == "dense" else f"{10 + seed}",
    }


LINES = [
    line("uniform", 0, "0.70"),
    line("uniform", 1, "0.72"),
    line("td3", 1, "0.75"),
    line("td3", 0, "0.71"),
    line("td3", 0, "0.99", budget="0.5"),
    line("uniform", 0, "0.95", budget="0.5"),
    line("uniform", 1, "", budget="0.5"),
    line("dense", 0, "", budget="1.0"),
    line("cem", 0, "", test=""),
]
PLACE = "digits-cnn", "0.15"


def test_differences_are_paired_by_seed() -> None:
    text = table(sections(LINES)[PLACE], "td3").splitlines()
    assert text[0] == "| plan | before | fine-tuned | by seed | td3 above it | CPU s |"
    assert text[2] == "| td3 | 20.00 | 73.00 | 71.00, 75.00 |  | 10 |"
    # Differences 1 and 3: mean 2, deviation sqrt(2), 12.706 sqrt(2) / sqrt(2).
    assert text[3] == "| uniform | 20.00 | 71.00 | 70.00, 72.00 | +2.00 (-10.71 to 14.71, n = 2) | 10 |"
    assert len(text) == 4, "neither another budget nor what failed"


def test_without_fine_tuning_it_is_the_test_split_as_cut() -> None:
    lines = [line("uniform", 0, "", test="0.50"), line("td3", 0, "", test="0.58")]
    text = table(sections(lines)[PLACE], "td3").splitlines()
    assert text[0] == "| plan | search split | test split | by seed | td3 above it | CPU s |"
    assert text[2] == "| td3 | 30.00 | 58.00 | 58.00 |  | 10 |"
    assert text[3].startswith("| uniform | 30.00 | 50.00 | 50.00 | +8.00 (")


def test_dense_networks_and_cells_that_are_not_fine_tuned_yet_are_left_out() -> None:
    found = sections(LINES)
    assert found.keys() == {PLACE, ("digits-cnn", "0.5")}
    assert found["digits-cnn", "0.5"].keys() == {"td3", "uniform"}
    assert found["digits-cnn", "0.5"]["uniform"].keys() == {0}


def test_means_over_budgets_are_of_the_seeds_that_are_everywhere() -> None:
    # Seed 0 alone: (71 + 99) / 2 - (70 + 95) / 2.
    text = over_budgets(list(sections(LINES).values()), "td3")
    assert text == "- td3 above uniform: +2.50 (n = 1)"


def test_a_method_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="td3"):
        table(sections(LINES)[PLACE], "td")
