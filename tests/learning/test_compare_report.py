"""What a comparison says: statistics against hand-worked numbers, and files that stand for themselves."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents import comparison_words as words
from agents.comparison_report import write_report
from agents.comparison_store import Record
from agents.comparison_summary import Summary, claims, comparable, front, rank_table, ranks, summaries, value_of
from agents.comparison_tables import COLUMNS, csv_text, markdown
from tests.learning.comparison_records import GROUPS, failed, many, record, runtime, stored

VOID = {"meta", "br", "hr", "img", "link", "input"}
SCORES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)


def test_the_front_by_hand() -> None:
    # b costs what a costs and is worth less; d is dearer than c and worth less; e is dearer and worth more
    points = [(1.0, 0.5), (1.0, 0.4), (2.0, 0.7), (3.0, 0.6), (4.0, 0.8)]
    assert front(points) == [0, 2, 4]
    assert front([(1.0, 0.5), (0.5, 0.5)]) == [1]
    assert front([]) == []


@given(SCORES)
def test_the_front_is_what_no_point_beats(points: list[tuple[int, int]]) -> None:
    kept = front(points)
    for i, (cost, value) in enumerate(points):
        beaten = any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
        assert beaten == ((cost, value) not in [points[j] for j in kept])
        assert i not in kept or not beaten
    assert len({points[i] for i in kept}) == len(kept)


def test_ranks_by_hand() -> None:
    assert ranks({"a": 0.9, "b": 0.5, "c": 0.7}) == {"a": 1, "b": 3, "c": 2}
    # two share the ranks 2 and 3
    assert ranks({"a": 0.9, "b": 0.7, "c": 0.7, "d": 0.1}) == {"a": 1, "b": 2.5, "c": 2.5, "d": 4}


def test_the_rank_table_has_static_methods_only_and_those_without_a_budget_last() -> None:
    made = [
        record("cem", 0.8, budget=0.5),
        record("cem", 0.5, budget=0.3),
        record("uniform", 0.7, budget=0.5),
        record("uniform", 0.6, budget=0.3),
        record("lamp", 0.6, budget=0.5),
        record("lamp", 0.55, budget=0.3),
        record("greedy", 0.9, budget=0.5),
        runtime("fbs", 0.99),
        record("dense", 0.99, budget=1.0),
    ]
    # at .5: greedy, cem, uniform, lamp; at .3: uniform, lamp, cem
    table = rank_table(summaries(made))
    assert table == {
        "uniform": {0.5: 3, 0.3: 1},
        "cem": {0.5: 2, 0.3: 3},
        "lamp": {0.5: 4, 0.3: 2},
        "greedy": {0.5: 1},
    }
    assert list(table) == ["uniform", "cem", "lamp", "greedy"]


def rows_of(*records: Record) -> list[Summary]:
    return summaries(records)


def seeds(method: str, accuracies: list[float], **options: Any) -> list[Record]:
    return [record(method, value, seed=seed, **options) for seed, value in enumerate(accuracies)]


def test_means_and_intervals_by_hand() -> None:
    (row,) = rows_of(*seeds("cem", [0.71, 0.72, 0.73]))
    assert row.mean("test_accuracy") == pytest.approx(0.72)
    assert row.half("test_accuracy") == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert row.mean("fine_tuned_test_accuracy") is None
    assert row.mean("macs_share") == pytest.approx(0.498)
    assert row.mean("params_share") == pytest.approx(0.6)
    assert row.mean("latency_share") == pytest.approx(0.5)
    assert row.seeds == (0, 1, 2)


def test_a_claim_by_hand() -> None:
    # differences 3, 4 and 5 points: mean 4, deviation 1, half width 4.303 / sqrt(3) = 2.48
    better, worse = seeds("cem", [0.73, 0.75, 0.77], evaluations=60), seeds("td3", [0.70, 0.71, 0.72], evaluations=60)
    (claim,), looked = claims(rows_of(*better, *worse))
    assert (claim.better, claim.worse, claim.seeds, claim.evaluations, looked) == ("cem", "td3", 3, 60, 1)
    assert claim.mean == pytest.approx(0.04)
    assert claim.half == pytest.approx(4.303 * 0.01 / 3**0.5)
    # 1, 4 and 7 points: mean 4, deviation 3, half width 7.45
    wide = seeds("cem", [0.71, 0.75, 0.79], evaluations=60)
    assert claims(rows_of(*wide, *worse)) == ([], 1)


@pytest.mark.parametrize(
    "other",
    [
        seeds("td3", [0.50, 0.51, 0.53], evaluations=61),
        seeds("td3", [0.50, 0.51, 0.53], evaluations=60, budget=0.4),
        seeds("td3", [0.50, 0.51, 0.53], evaluations=60, epochs=1),
        seeds("td3", [0.50, 0.51, 0.53], evaluations=60, task="digits-mlp"),
        seeds("td3", [0.50, 0.51], evaluations=60),
        [runtime("fbs", value, seed=seed) for seed, value in enumerate([0.50, 0.51, 0.53])],
        seeds("dense", [0.50, 0.51, 0.53], evaluations=60),
    ],
    ids=["evaluations", "budget", "epochs", "task", "seeds", "runtime", "dense"],
)
def test_nothing_is_claimed_of_rows_that_differ_in_more_than_the_method(other: list[Record]) -> None:
    one, another = rows_of(*seeds("cem", [0.73, 0.75, 0.77], evaluations=60), *other)
    assert not comparable(one, another)
    assert claims([one, another]) == ([], 0)


def test_nothing_is_claimed_where_seeds_change_nothing() -> None:
    assert claims(rows_of(*seeds("lamp", [0.7] * 3), *seeds("uniform", [0.5] * 3))) == ([], 1)


def test_mean_macs_over_images_and_macs_are_never_one_number() -> None:
    static, dynamic = record("cem", 0.7), runtime("fbs", 0.7)
    assert value_of(static, "dynamic_macs_share") is None
    assert value_of(dynamic, "macs_share") is None
    lines = list(csv.DictReader(io.StringIO(csv_text([static, dynamic]))))
    assert [bool(line["macs"]) for line in lines] == [True, False]
    assert [bool(line["dynamic_macs"]) for line in lines] == [False, True]
    assert "runtime" not in words.title_of_tradeoff(rows_of(static, dynamic))
    assert words.title_of_tradeoff(rows_of(static, dynamic)).endswith("cem")


def test_every_record_is_a_line_of_the_csv() -> None:
    made = [record("cem", 0.8, before=0.7, evaluations=60, epochs=2, seed=3), failed("lamp", 'it said "no", twice')]
    text = csv_text(made)
    assert text.splitlines()[0] == ",".join(COLUMNS)
    one, other = csv.DictReader(io.StringIO(text))
    assert (one["method"], one["kind"], one["seed"], one["status"]) == ("cem", "search", "3", "done")
    assert (one["test_accuracy"], one["fine_tuned_test_accuracy"]) == ("0.7", "0.8")
    assert (one["importance"], one["repair"], one["fine_tune_epochs"], one["evaluations"]) == ("l1", "auto", "2", "60")
    assert (one["macs"], one["macs_share"], one["cpu_seconds_find"]) == ("498", "0.498", "0.5")
    assert (other["status"], other["reason"], other["test_accuracy"]) == ("failed", 'it said "no", twice', "")


def test_the_markdown_table_is_one(tmp_path: Path) -> None:
    lines = markdown(summaries(many(seeds=1, budgets=(0.5,))[:-1])).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 1 + 11


class Checked(HTMLParser):
    """Every tag is closed, every identifier is one element's, and nothing is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.used: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "srcset", "href", "xlink:href", "data", "poster", "action"):
                assert str(value).startswith(("#", "data:image/png;base64,")), f"{tag} {name} {str(value)[:80]}"
                self.used += [str(value)[1:]] if str(value).startswith("#") else []
            self.used += re.findall(r"url\(#([^)]+)\)", str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a report with runtime methods and a failure."""
    store = stored(tmp_path_factory.mktemp("results") / "all", many(seeds=2, budgets=(0.5,)), fine_tune_epochs=2)
    write_report(store)
    return store.path


def test_the_page_is_well_formed_and_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Checked(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.used) <= set(page.ids)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert not re.findall(r"@import|url\((?!#)", text)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", text)
    assert text.count("<svg") == 5
    assert 'aria-label="' in text


def test_the_page_follows_the_theme(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    figures = text[text.index("<svg") :]
    assert "var(--ink)" in figures
    assert "var(--grid)" in figures
    # no ink of one theme is left in a figure
    assert not re.findall(r"#1b1f24|#5b6471|#d9dde2|#fefefe|#000000", figures)


def test_the_page_says_what_failed_and_what_is_missing(folder: Path, tmp_path: Path) -> None:
    text = (folder / "report.html").read_text()
    assert "1 of 26 cells failed" in text
    assert "the loss became nan at epoch 2 &lt;b&gt;" in text
    store = stored(tmp_path / "part", [record("cem", 0.8), record("lamp", 0.7, seed=1)])
    report = write_report(store)
    assert "4 not measured yet" in report.lead[0]  # two seeds each of dense, cem and lamp, less two
    assert "digits-cnn-lamp-0.5-seed0" in (store.path / "report.html").read_text()


@pytest.mark.parametrize("records", [[], [failed("lamp", "no")], [record("dense", 0.9, budget=1.0)]])
def test_a_folder_with_hardly_anything_has_a_report(records: list[Record], tmp_path: Path) -> None:
    store = stored(tmp_path / "few", records)
    write_report(store)
    assert Checked((store.path / "report.html").read_text()).open == []
    assert (store.path / "results.csv").exists()


def test_runtime_methods_alone_have_a_report(tmp_path: Path) -> None:
    store = stored(tmp_path / "runtime", [runtime("runtime", 0.9), runtime("fbs", 0.8)])
    write_report(store)
    assert "Images differ most under" in (store.path / "report.html").read_text()


def test_the_same_figures_are_in_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    names = {"tradeoff", "methods", "profiles", "costs", "spreads"}
    assert set(events.Tags()["images"]) == {f"digits-cnn/{name}" for name in names}
    assert "digits-cnn/cem/test_accuracy" in events.Tags()["scalars"]


def test_the_words_claim_no_more_than_the_rows(folder: Path) -> None:
    few = summaries([record("cem", 0.9), record("uniform", 0.5)])
    said = " ".join(words.lead(few, [], 0))
    assert "no row may be said to beat another" in said
    close = summaries([*seeds("cem", [0.7, 0.72, 0.71]), *seeds("lamp", [0.71, 0.70, 0.72])])
    assert "none differs by an interval that excludes 0" in " ".join(words.lead(close, [], 0))
    apart = summaries([*seeds("cem", [0.73, 0.75, 0.77]), *seeds("lamp", [0.70, 0.71, 0.72])])
    said = " ".join(words.lead(apart, [], 0))
    assert "1 differs: cem over lamp at 50 % by 4.0 points (1.5 to 6.5; 3 seeds, 0 evaluations each)" in said


def test_takeaways_by_hand() -> None:
    made = [record("cem", 0.9, before=0.8, epochs=1), record("lamp", 0.88, before=0.5, epochs=1)]
    made[0]["kept"]["wide.0"], made[1]["kept"]["wide.0"] = [8, 32], [32, 32]
    made[0]["cpu_seconds"] = {"find": 5.0}
    rows = summaries(made)
    assert words.title_of_methods(rows) == (
        "Fine-tuning narrows the gap between best and worst: from 30.0 to 2.0 points at 50 %"
    )
    assert words.title_of_profiles(rows) == "Methods differ most in wide.0, of which they keep 25 to 100 %"
    assert words.title_of_costs(rows) == "cem takes 10 times as long as lamp to find its plan"
    assert words.title_of_ranks(rank_table(rows)) == "Best mean rank over 1 budget: cem, 1 of 2"
    assert words.title_of_spreads(summaries([runtime("fbs", 0.9, budget=0.4)])).startswith(
        "Images differ most under fbs: 20.0 %"
    )
    assert set(GROUPS) == set(made[0]["kept"])
