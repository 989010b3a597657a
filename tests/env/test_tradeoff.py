"""The trade-off: equations 3 to 5 against sets written out, permanent removal, and the two ends of the trust."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_env.pruning.gating.tradeoff import StaticDecision, check_trust, count_of, decide_static, rank, select

SAMPLES = 4
"""Inputs of a drawn case."""


def literal(
    runtime: list[float], static: list[float], count: int, keep: float, trust: Fraction, *, impose: bool = True
) -> set[int]:
    """Active channels of one input, as the paper's text has it, in sets; with or without the removal imposed."""
    channels = range(len(static))
    by_static = sorted(channels, key=lambda c: (-static[c], c))
    outside_static = set(by_static[max(1, round(keep * len(channels))) :])
    gone = math.floor((1 - trust) * len(outside_static)) if impose else 0
    removed = set(by_static[len(channels) - gone :])
    by_runtime = sorted(set(channels) - removed, key=lambda c: (-runtime[c], c))
    outside_runtime = set(channels) - set(by_runtime[:count])
    overlap = outside_runtime & outside_static
    only_runtime, only_static = outside_runtime - overlap, outside_static - overlap
    lowest_runtime = [c for c in reversed(by_runtime) if c in only_runtime][: math.floor(trust * len(only_runtime))]
    lowest_static = [c for c in reversed(by_static) if c in only_static]
    lowest_static = lowest_static[: math.floor((1 - trust) * len(only_static))]
    return set(channels) - overlap - set(lowest_runtime) - set(lowest_static)


@dataclass(frozen=True)
class Case:
    """Scores, counts and shares of one layer for a few inputs."""

    runtime: list[list[float]]
    static: list[float]
    counts: list[int]
    keep: float
    trust: Fraction

    def decision(self) -> StaticDecision:
        return decide_static(torch.tensor(self.static), self.keep, float(self.trust))

    def active(self) -> torch.Tensor:
        return select(torch.tensor(self.runtime), torch.tensor(self.static), torch.tensor(self.counts), self.decision())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few different scores, so that ties are common."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels, levels = draw(st.integers(1, 20)), draw(st.sampled_from([2, 5, 1000]))
    return Case(
        generator.integers(-levels, levels, (SAMPLES, channels)).astype(float).tolist(),
        generator.integers(-levels, levels, channels).astype(float).tolist(),
        generator.integers(1, channels + 1, SAMPLES).tolist(),
        draw(st.integers(1, 20)) / 20,
        Fraction(draw(st.integers(0, 20)), 20),
    )


@settings(max_examples=100)
@given(case=cases())
def test_the_selection_is_that_of_the_equations_written_out(case: Case) -> None:
    for row, runtime, count in zip(case.active(), case.runtime, case.counts, strict=True):
        expected = literal(runtime, case.static, count, case.keep, case.trust)
        assert set(row.nonzero().flatten().tolist()) == expected


@settings(max_examples=100)
@given(case=cases())
def test_what_is_removed_is_never_active_and_something_always_is(case: Case) -> None:
    active, decision = case.active(), case.decision()
    channels = len(case.static)
    outside = channels - max(1, round(case.keep * channels))
    assert int(decision.removed.sum()) == math.floor((1 - case.trust) * outside)
    assert int(decision.doubted.sum()) == outside - int(decision.removed.sum())
    assert not (decision.doubted & decision.removed).any()
    assert not active[:, decision.removed].any()
    assert active.any(1).all()
    # What both decisions want is active whatever the trust.
    top = (rank(torch.tensor(case.static)) < channels - outside) & ~decision.removed
    for row, runtime, count in zip(active, case.runtime, case.counts, strict=True):
        stored = torch.tensor(runtime).masked_fill(decision.removed, -math.inf)
        assert row[top & (rank(stored) < count)].all()


@settings(max_examples=100)
@given(case=cases())
def test_on_a_layer_that_was_cut_the_selection_is_the_same(case: Case) -> None:
    decision, runtime, static = case.decision(), torch.tensor(case.runtime), torch.tensor(case.static)
    kept = decision.kept
    assert kept.tolist() == [c for c in range(len(static)) if not decision.removed[c]]
    rest = StaticDecision(decision.removed[kept], decision.doubted[kept], decision.trust)
    cut = select(runtime[:, kept], static[kept], torch.tensor(case.counts), rest)
    assert torch.equal(cut, case.active()[:, kept])


@given(case=cases())
def test_without_trust_the_static_decision_alone_counts(case: Case) -> None:
    static_only = Case(case.runtime, case.static, case.counts, case.keep, Fraction(0))
    top = rank(torch.tensor(case.static)) < max(1, round(case.keep * len(case.static)))
    assert torch.equal(static_only.active(), top.expand(len(case.runtime), -1))
    assert torch.equal(static_only.decision().removed, ~top)


@given(case=cases())
def test_with_full_trust_the_runtime_decision_alone_counts(case: Case) -> None:
    runtime_only = Case(case.runtime, case.static, case.counts, case.keep, Fraction(1))
    assert torch.equal(runtime_only.active(), rank(torch.tensor(case.runtime)) < torch.tensor(case.counts).unsqueeze(1))
    assert not runtime_only.decision().removed.any()


def test_a_hand_worked_layer() -> None:
    # C = 8, both keep half, R = .5. Static order is 0 1 2 3 | 4 5 6 7: 6 and 7 go for good, 4 and 5 are doubted.
    static = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    # First input: the top is 4 5 0 1 among the stored. Only outside the runtime's: 2 3, the lower one (3) goes.
    # Only outside the static's: 4 5, the lower one (5) goes.
    # Second input: top 0 1 2 3, so 4 and 5 are outside both. Nothing else is decided.
    runtime = [[6.0, 5.0, 4.0, 3.0, 8.0, 7.0, 99.0, 98.0], [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]
    case = Case(runtime, static, [4, 4], 0.5, Fraction(1, 2))
    assert case.decision().removed.nonzero().flatten().tolist() == [6, 7]
    assert case.decision().doubted.nonzero().flatten().tolist() == [4, 5]
    assert [row.nonzero().flatten().tolist() for row in case.active()] == [[0, 1, 2, 4], [0, 1, 2, 3]]


def test_the_paper_s_claim_fails_unless_it_is_imposed() -> None:
    # C = 16, both keep half, R = .5: the lowest four static ranks should be out of reach, and are not by themselves.
    runtime = torch.rand(2000, 16, generator=torch.Generator().manual_seed(0))
    static = [float(c) for c in range(16)]
    free = [literal(row, static, 8, 0.5, Fraction(1, 2), impose=False) for row in runtime.tolist()]
    shares = [sum(c in active for active in free) / len(free) for c in range(4)]
    assert shares == pytest.approx([0.0, 0.03, 0.125, 0.25], abs=0.03)
    assert min(shares[1:]) > 0
    case = Case(runtime.tolist(), static, [8] * 2000, 0.5, Fraction(1, 2))
    active = case.active()
    assert not active[:, :4].any()
    # Nothing is lost by it: an input still gets its half, or one more where both shares are rounded down.
    assert set(active.sum(1).tolist()) == {8, 9}
    assert active[:, 4:8].any(0).all()


def test_ties_go_to_the_lower_index_and_rows_do_not_disturb_each_other() -> None:
    assert rank(torch.tensor([1.0, 3.0, 1.0, 3.0])).tolist() == [2, 0, 3, 1]
    equal = Case([[0.0] * 6] * 3, [1.0] * 6, [1, 3, 6], 0.5, Fraction(1, 2))
    assert equal.decision().removed.tolist() == [False] * 5 + [True]
    assert equal.decision().doubted.tolist() == [False] * 3 + [True] * 2 + [False]
    # Outside the runtime's only: channels 1 2, then none, then none; the doubted are out, out, and in (one of two).
    assert [row.nonzero().flatten().tolist() for row in equal.active()] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    for at in range(3):
        alone = Case(equal.runtime[:1], equal.static, equal.counts[at : at + 1], equal.keep, equal.trust)
        assert torch.equal(alone.active()[0], equal.active()[at])


def test_every_small_layer_keeps_a_channel_at_the_edges_of_trust() -> None:
    for trust, keep, order in itertools.product((1e-10, 1 - 1e-10), (0.25, 0.5), itertools.permutations(range(4))):
        decision = decide_static(torch.tensor([3.0, 2.0, 1.0, 0.0]), keep, trust)
        runtime = torch.tensor([order], dtype=torch.float32)
        for count in range(1, 5):
            assert select(runtime, torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([count]), decision).any()


def test_shares_become_the_nearest_count_within_the_layer() -> None:
    shares = torch.tensor([0.0, 0.001, 0.1, 0.26, 0.7, 0.74, 1.0, 1.5], dtype=torch.float64)
    assert count_of(shares, 10).tolist() == [1, 1, 1, 3, 7, 7, 10, 10]
    assert count_of(shares.float(), 10).tolist() == [1, 1, 1, 3, 7, 7, 10, 10]
    assert count_of(torch.tensor([[0.5], [0.1]]), 3).tolist() == [[2], [1]]


@pytest.mark.parametrize(("trust", "gone"), [(0.7, 3), (0.9, 1), (0.1, 9), (0.35, 6)])
def test_whole_numbers_of_channels_survive_floating_point(trust: float, gone: int) -> None:
    # (1 - .7) * 10 is 3.0000000000000004 or 2.9999999999999996, depending on who rounds.
    assert int(decide_static(torch.arange(11.0), 1 / 11, trust).removed.sum()) == gone


@pytest.mark.parametrize("trust", [-0.01, 1.01, math.nan, math.inf, True, "0.5", None])
def test_a_trust_outside_zero_to_one_is_refused(trust: object) -> None:
    with pytest.raises(ValueError, match=r"runtime_trust is .* \[0, 1\]"):
        check_trust(trust)


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.001, math.nan])
def test_a_static_share_outside_zero_to_one_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=r"static keep is .* \(0, 1\]"):
        decide_static(torch.ones(4), keep, 0.5)
