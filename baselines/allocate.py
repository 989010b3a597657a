"""How many channels each group keeps: scores or error curves and a budget in, exact integer counts out.

Everything here is a pure function of integers and arrays: no network, no data. An allocator never needs to know where
a budget comes from, whether it is in macs or params, or how counts are rounded: `Choices` says all of it.

Most allocators are an *order of rises*: every group begins at its minimum, and the groups rise level by level in some
order. The cost grows with every rise, so bisection finds the longest run of rises inside the limit, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

Counts = Int[np.ndarray, " group"]
Keys = tuple[Float[np.ndarray, " _"], ...]
Levels = tuple[Int[np.ndarray, " _"], ...]
Curves = Sequence[Float[np.ndarray, " _"]]


@dataclass(frozen=True, eq=False)
class Choices:
    """What an allocator may choose from.

    Attributes:
        levels: per group the channel counts allowed, rising; one level only for a group that is left alone.
        cost: closed form of the resource, integer counts [..., group] to [...]: a polynomial of degree at most two in
            each count; keeping more never lowers it.
        limit: the most that may be spent, in the unit of `cost`.
    """

    levels: Levels
    cost: Callable[[np.ndarray], np.ndarray]
    limit: float

    def __post_init__(self) -> None:
        """Refuse a budget that no choice can keep.

        Raises:
            ValueError: if a group has no level, levels do not rise, or the smallest network is over the limit.
        """
        for index, levels in enumerate(self.levels):
            if len(levels) == 0 or levels[0] < 1 or np.any(np.diff(levels) <= 0):
                raise ValueError(f"levels[{index}] must be rising counts of at least 1, got {levels.tolist()}")
        if not self.fits(self.minimum):
            least = float(self.cost(self.minimum))
            raise ValueError(f"limit={self.limit:g} is below the reachable minimum of {least:g}")

    @cached_property
    def heights(self) -> Counts:
        """The highest rung of each group."""
        return np.array([len(levels) - 1 for levels in self.levels], dtype=np.int64)

    @cached_property
    def _table(self) -> Int[np.ndarray, "group level"]:
        """Levels as one table, filled up with each group's highest."""
        widest = int(self.heights.max(initial=0)) + 1
        return np.stack([np.pad(levels, (0, widest - len(levels)), mode="edge") for levels in self.levels])

    @property
    def minimum(self) -> Counts:
        """Every group at its lowest level."""
        return self.at(np.zeros(len(self.levels), dtype=np.int64))

    @property
    def full(self) -> Counts:
        """Every group at its highest level."""
        return self.at(self.heights)

    def at(self, rungs: Int[np.ndarray, "*batch group"]) -> Int[np.ndarray, "*batch group"]:
        """Counts of the groups standing on these rungs (0 = the lowest level)."""
        return self._table[np.arange(len(self.levels)), rungs]

    def rungs(self, counts: Counts) -> Counts:
        """The rung of each group's count: the inverse of `at`."""
        pairs = zip(self.levels, counts, strict=True)
        return np.array([np.searchsorted(levels, count) for levels, count in pairs], dtype=np.int64)

    def fits(self, counts: Counts) -> bool:
        """Whether these counts keep the budget."""
        return bool(self.cost(counts) <= self.limit)

    def nearest(self, share: float | Float[np.ndarray, " group"]) -> Counts:
        """Counts nearest to a share of each group's highest level (the smaller of two equally near), at any cost."""
        wanted = np.broadcast_to(share, len(self.levels)) * self.full
        pairs = zip(self.levels, wanted, strict=True)
        return self.at(np.array([np.searchsorted(_middles(levels), want) for levels, want in pairs], dtype=np.int64))


def uniform(choices: Choices) -> Counts:
    """The same share in every group, the largest that fits, each count rounded to its nearest level.

    What is left after the largest common share goes to at most one more level per group, in forward order, so every
    group is within one level of the common share.
    """
    return _climb(choices, _share_keys(choices, np.ones(len(choices.levels))), reach=1)


def random(choices: Choices, rng: np.random.Generator) -> Counts:
    """A random plan that spends the budget: shares drawn from U(0, 1), scaled together until they just fit."""
    return scaled(choices, rng.uniform(size=len(choices.levels)))


def scaled(choices: Choices, shares: Float[np.ndarray, " group"]) -> Counts:
    """Shares of unlike groups, scaled together until they just fit; one that reaches the whole group stops there.

    What is left goes to at most one more level per group, as in `uniform`, which is the case of equal shares.

    Args:
        choices: what may be chosen.
        shares: not negative; only their ratios matter.
    """
    return _climb(choices, _share_keys(choices, np.maximum(shares, 1e-6)), reach=1)


def protected(choices: Choices, protect: Sequence[int]) -> Counts:
    """Some groups stay as whole as the budget allows; all others share what is left uniformly.

    If the protected groups alone are over the budget, the others stay at their minimum and the protected ones share.

    Args:
        choices: what may be chosen.
        protect: indices of the groups to protect.
    """
    keys = list(_share_keys(choices, np.ones(len(choices.levels))))
    for group in protect:
        keys[group] = keys[group] - 2.0  # shares are at most 1: every protected rise comes before any other
    return _climb(choices, tuple(keys), reach=1)


def threshold(choices: Choices, scores: Curves) -> Counts:
    """One threshold for the normalised scores of all groups: every channel above it is kept.

    A group's scores are divided by their mean, which makes layers of unlike weight scale and width comparable (the
    default normalisation of Torch-Pruning's global pruning).

    Args:
        choices: what may be chosen.
        scores: per group the importance of each channel, higher = keep.

    Raises:
        ValueError: if a score is not finite.
    """
    # |mean|: signed scores (Taylor) keep their sign, and a group of zero scores is left as it is
    return ranking(choices, [score / (abs(np.mean(score)) or 1.0) for score in map(np.asarray, scores)])


def ranking(choices: Choices, scores: Curves) -> Counts:
    """One threshold for the scores of all groups as they are: for scores that have a common scale.

    A block of channels that rises together (`round_to`) counts with its mean score. The threshold is lowered until the
    next channel does not fit; lower channels that still fit then fill the rest, so that no group could keep one more
    level.

    Args:
        choices: what may be chosen.
        scores: per group the importance of each channel, higher = keep.

    Raises:
        ValueError: if a score is not finite.
    """
    keys = tuple(
        _score_keys(levels, np.asarray(score, dtype=np.float64), group)
        for group, (levels, score) in enumerate(zip(choices.levels, scores, strict=True))
    )
    return rising(choices, keys)


def rising(choices: Choices, keys: Keys) -> Counts:
    """Groups rise in the order of their keys, smallest first, until one does not fit; then whatever still fits.

    No group could keep one more level.

    Args:
        choices: what may be chosen.
        keys: per group one number for each rise from a level to the next, not falling.
    """
    return _climb(choices, keys, reach=max(map(len, choices.levels)))


def _middles(levels: Int[np.ndarray, " level"]) -> Float[np.ndarray, " rise"]:
    return (levels[1:] + levels[:-1]) / 2.0


def _share_keys(choices: Choices, direction: Float[np.ndarray, " group"]) -> Keys:
    """A group rises when its wanted count passes the middle of two levels; the key is the scale at which it does."""
    scales = (_middles(levels) / levels[-1] / along for levels, along in zip(choices.levels, direction, strict=True))
    return tuple(scales)


def _score_keys(
    levels: Int[np.ndarray, " level"], score: Float[np.ndarray, " channel"], group: int
) -> Float[np.ndarray, " rise"]:
    if not np.all(np.isfinite(score)):
        raise ValueError(f"scores[{group}] must be finite, got {np.count_nonzero(~np.isfinite(score))} that are not")
    ordered = np.sort(score)[::-1]
    total = np.concatenate([[0.0], np.cumsum(ordered)])
    keys = -(total[levels[1:]] - total[levels[:-1]]) / np.diff(levels)
    return np.maximum.accumulate(keys)  # block means fall anyway; cumsum's rounding must not swap two rises


def _climb(choices: Choices, keys: Keys, *, reach: int) -> Counts:
    """The longest run of rises, smallest key first, that fits; then at most `reach` more per group, where they fit."""
    who = np.repeat(np.arange(len(keys)), [len(key) for key in keys])
    order = who[np.argsort(np.concatenate(keys), kind="stable")] if len(who) else who
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if choices.fits(choices.at(_run(order[:middle], len(keys)))) else (low, middle - 1)
    return choices.at(_fill(choices, _run(order[:low], len(keys)), order[low:], reach=reach))


def _run(order: Int[np.ndarray, " rise"], groups: int) -> Counts:
    return np.bincount(order, minlength=groups).astype(np.int64)


def _fill(choices: Choices, rungs: Counts, order: Int[np.ndarray, " rise"], *, reach: int) -> Counts:
    left = np.full(len(rungs), reach)
    rungs = rungs.copy()
    for group in order:
        if left[group] == 0:
            continue
        rungs[group] += 1
        if choices.fits(choices.at(rungs)):
            left[group] -= 1
        else:  # a higher level of this group costs more still
            rungs[group] -= 1
            left[group] = 0
    return rungs


def knapsack(choices: Choices, errors: Curves) -> Counts:
    """The least sum of the groups' errors under the budget, nearly.

    The budget enters with a price (Everett 1963, generalised Lagrange multipliers): for a price p, error + p * cost is
    lowered group by group, each choosing its best level while the others stand, until none moves. The price is
    bisected; the tightest answers that fit are filled up greedily, largest fall of error per cost first, and groups
    then trade levels as long as the sum falls. Never worse than `uniform`; not always the optimum, because the cost
    couples neighbouring groups.

    Args:
        choices: what may be chosen.
        errors: per group the error at each of its levels, not rising with the level.

    Raises:
        ValueError: if a curve does not have one finite number per level.
    """
    for group, (error, levels) in enumerate(zip(errors, choices.levels, strict=True)):
        if np.shape(error) != levels.shape or not np.all(np.isfinite(error)):
            raise ValueError(f"errors[{group}] must be {len(levels)} finite numbers, got {np.asarray(error)}")
    candidates = [choices.rungs(uniform(choices)), *_priced(choices, errors)]
    filled = np.unique([_spend(choices, rungs, errors) for rungs in candidates], axis=0)
    traded = [_trade(choices, rungs, errors) for rungs in filled]
    return choices.at(min(traded, key=lambda rungs: _total(errors, rungs)))


def _total(errors: Curves, rungs: Counts) -> float:
    return float(sum(error[rung] for error, rung in zip(errors, rungs, strict=True)))


def _priced(choices: Choices, errors: Curves) -> list[Counts]:
    """The answers that fit on the way of the bisected price; the last ones are the tightest."""
    spread = sum(float(error[0] - error[-1]) for error in errors)
    # a price of the whole error per least unit of cost (1) buys nothing: every group goes to its minimum
    low, high = -40.0, float(np.log(max(spread, 1e-30)) + 1.0)
    found: list[Counts] = []
    for _ in range(40):
        price = (low + high) / 2
        rungs = _respond(choices, errors, price=float(np.exp(price)))
        if choices.fits(choices.at(rungs)):
            high = price
            found.append(rungs)
        else:
            low = price
    return found[-4:]


def _respond(choices: Choices, errors: Curves, *, price: float) -> Counts:
    rungs, counts = choices.heights.copy(), choices.full
    for _ in range(20):  # error + price * cost falls in every sweep, so this ends; the bound is for float ties
        before = rungs.copy()
        for group, error in enumerate(errors):
            value = error + price * _slope(choices, counts, group)
            rungs[group] = len(value) - 1 - int(np.argmin(value[::-1]))
            counts[group] = choices.levels[group][rungs[group]]
        if np.array_equal(before, rungs):
            break
    return rungs


def _slope(choices: Choices, counts: Counts, group: int) -> Float[np.ndarray, " level"]:
    """What one group costs at each of its levels, above no channels at all, while the others stand."""
    rows = np.repeat(counts[None], 3, axis=0)
    rows[:, group] = (0, 1, 2)
    zero, one, two = choices.cost(rows)
    square = (two - 2 * one + zero) / 2
    levels = choices.levels[group]
    return levels * (one - zero - square + square * levels)


def _spend(choices: Choices, rungs: Counts, errors: Curves) -> Counts:
    """Raise groups a level at a time while any fits, first where the error falls most per cost."""
    rungs, steps = rungs.copy(), np.eye(len(errors), dtype=np.int64)
    while True:
        spent = choices.cost(choices.at(rungs))
        free = np.flatnonzero(rungs < choices.heights)
        price = choices.cost(choices.at(rungs + steps[free])) - spent
        fits = price <= choices.limit - spent
        free, price = free[fits], price[fits]
        if not len(free):
            return rungs
        falls = np.array([errors[group][rungs[group]] - errors[group][rungs[group] + 1] for group in free])
        rungs[free[np.argmax(falls / np.maximum(price, 1e-9))]] += 1


def _trade(choices: Choices, rungs: Counts, errors: Curves) -> Counts:
    """Lower one group by some levels and spend what that frees, as long as the sum of errors falls."""
    steps = np.concatenate([np.eye(len(rungs), dtype=np.int64) * stride for stride in (1, 2, 4)])
    for _ in range(len(errors)):
        lowered = np.unique(np.maximum(rungs - steps, 0), axis=0)
        traded = [_spend(choices, lower, errors) for lower in lowered]
        best = min(traded, key=lambda other: _total(errors, other))
        if _total(errors, best) >= _total(errors, rungs) - 1e-12:
            break
        rungs = best
    return rungs


def greedy(choices: Choices, value: Callable[[Counts], float | tuple[float, ...]], *, rounds: int = 8) -> Counts:
    """From the full network down to the limit in equal slices of cost, each taken from the group that hurts least.

    In a round every group is tried alone: it gives up just enough channels to save the slice, and `value` looks at the
    result; the best stays. This is NetAdapt's search (Yang et al., ECCV 2018, algorithm 1) without its fine-tuning.
    `value` is called at most rounds * groups times, plus once per group for every group that is used up.

    Args:
        choices: what may be chosen.
        value: how good counts are, higher is better (say, the measured accuracy; a tuple is compared in order).
        rounds: slices between the full network and the limit.
    """
    counts = choices.full
    start = float(choices.cost(counts))
    for step in range(1, rounds + 1):
        goal = start + (min(choices.limit, start) - start) * step / rounds
        while choices.cost(counts) > goal:
            candidates = [_lowered(choices, counts, group, goal) for group in range(len(counts))]
            moved = [candidate for candidate in candidates if not np.array_equal(candidate, counts)]
            counts = max(moved, key=value)
    share_order = np.argsort(counts / choices.full, kind="stable")
    rises = np.repeat(
        share_order,
        [
            len(choices.levels[group]) - 1 - rung
            for group, rung in zip(share_order, choices.rungs(counts)[share_order], strict=True)
        ],
    )
    return choices.at(_fill(choices, choices.rungs(counts), rises, reach=len(rises)))


def _lowered(choices: Choices, counts: Counts, group: int, goal: float) -> Counts:
    """One group at its highest level, not above the present one, that reaches the goal; else at its minimum."""
    levels = choices.levels[group][: choices.rungs(counts)[group] + 1]
    variants = np.repeat(counts[None], len(levels), axis=0)
    variants[:, group] = levels
    reached = np.count_nonzero(choices.cost(variants) <= goal)
    return variants[max(reached - 1, 0)]
