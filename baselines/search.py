"""Search baselines: optimisers over channel counts that spend as many network evaluations as an agent has episodes.

They start from the plans that an agent starts from. Plans are drawn as shares, which are scaled together to the
budget: all of them keep it, and spend it (so a reward that pays for spending less than the budget is wasted on them).
The one exception is NetAdapt, which comes down to the budget from above; its networks over the budget are measured,
but never chosen.

    search = begin("cem", case, evaluations=100)     # see `baselines.trials`: ask, tell, best
    search_method("cem", evaluations=400)            # the same as a method

The constants were chosen on a made-up landscape (accuracy falls with the square of what each group loses, and with the
differences between neighbours) of 5, 12 and 30 groups, at 100 evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from baselines import allocate, heuristics
from baselines.allocate import Counts
from baselines.method import Case, Method, plan_of
from baselines.surrogate import promising
from baselines.trials import EVALUATIONS, Optimiser, Search, Shares, Value, check_evaluations, plain
from prune_env.checks import check_name
from prune_env.pruning.measure import Budget, Measurement

KNOWN = (heuristics.UNIFORM, heuristics.ERROR_CURVES, heuristics.GLOBAL_MAGNITUDE, heuristics.FIRST_LAST)
"""Plans that cost no evaluation to find: where an agent's first episodes come from, too. Uniform is the first."""


def random_shares(search: Search, rng: np.random.Generator, width: float) -> Counts:
    """Shares drawn from U(0, 1), scaled to the budget. With recalibration before the measurement, this is EagleEye."""
    return allocate.random(search.choices, rng)


GENERATION, ELITE, TRUST = 12, 6, 0.7
"""Plans drawn from one distribution; best plans that the next one is fitted to; how far it moves there."""
SPREAD, LEAST_SPREAD = 0.35, 0.05
"""Standard deviation of the logarithm of a share at the start, and the least it may fall to."""


def cross_entropy(search: Search, rng: np.random.Generator, width: float) -> Counts:
    """Shares drawn from a log-normal distribution, which is fitted to the best plans after each generation.

    Rubinstein 1999, smoothed as in de Boer et al. 2005, "A tutorial on the cross-entropy method". The elite are the
    best of all plans so far, not of one generation: evaluations are few, and what they return is not random.
    """
    mean, spread = fitted(search)
    return allocate.scaled(search.choices, np.exp(rng.normal(mean, width * spread)))


def fitted(search: Search) -> tuple[Shares, Shares]:
    """Mean and standard deviation of the logarithm of each share, after the last whole generation."""
    logs, begin = np.log(search.shares), len(search.known)
    mean, spread = logs[search.ranked(begin)[0]], np.full(logs.shape[1], SPREAD)
    for end in range(begin + GENERATION, len(logs) + 1, GENERATION):
        elite = logs[search.ranked(end)[:ELITE]]
        mean = mean + TRUST * (elite.mean(0) - mean)
        spread = np.maximum(spread + TRUST * (elite.std(0) - spread), LEAST_SPREAD)
    return mean, spread


PARENTS, CROSSOVER = 4, 0.3
"""Best plans that have children; how many of these have two parents."""
MUTATED, MUTATION = 0.3, 0.2
"""Share of the groups that mutate, and the standard deviation of the logarithm of the change."""


def evolution(search: Search, rng: np.random.Generator, width: float) -> Counts:
    """A child of the best plans: each group from one of two parents, or one parent with a few groups changed.

    The operators of MetaPruning's search (Liu et al. 2019, arXiv 1903.10258), one child at a time.
    """
    parents = search.shares[search.ranking[:PARENTS]]
    one, other = parents[rng.integers(len(parents), size=2)]
    crossed = np.where(rng.random(len(one)) < 0.5, one, other)
    # a child of two parents mutates only after a child like it was drawn before
    both = rng.random() < CROSSOVER
    child = _mutated(crossed, rng, (width - 1) * MUTATION) if both else _mutated(one, rng, width * MUTATION)
    return allocate.scaled(search.choices, child)


def _mutated(shares: Shares, rng: np.random.Generator, width: float) -> Shares:
    """A few shares, at least one, multiplied by log-normal factors."""
    few = rng.random(len(shares)) < MUTATED
    few[rng.integers(len(shares))] = True
    return np.minimum(shares * np.exp(few * rng.normal(0.0, width, len(shares))), 1.0)


MAGNITUDE, COOLED = 0.35, 0.1
"""Largest change of a share at the start; the part of it, and of the temperature, that is left at the end."""
TEMPERATURE = 0.02
"""Temperature at the start, as a share of the span of all rewards so far."""


def annealing(search: Search, rng: np.random.Generator, width: float) -> Counts:
    """The current plan with every share changed by U(-m, m), where m falls with the temperature.

    AutoCompress (Liu et al. 2020, arXiv 1907.03141), with the first magnitude and the geometric cooling of NNI's
    implementation. Deviations: its temperature falls from 100 to 20 while accuracies differ by hundredths, so that it
    accepts nearly every plan, and ours is in units of what the rewards differ by; and it cools to a tenth, not a fifth.
    """
    reach = width * MAGNITUDE * COOLED**search.progress
    shares = search.shares[standing(search)]
    return allocate.scaled(search.choices, np.clip(shares + rng.uniform(-reach, reach, len(shares)), 0.01, 1.0))


def standing(search: Search) -> int:
    """Number of the trial at which the annealing stands: the known plans' best, then whatever was accepted."""
    begin, rewards = len(search.known), np.array([trial.value[0] for trial in search.trials])
    span = np.maximum.accumulate(rewards) - np.minimum.accumulate(rewards)
    spent = (np.arange(len(rewards)) - begin) / max(search.evaluations - begin - 1, 1)
    heat = TEMPERATURE * COOLED**spent * span
    luck = np.random.default_rng([search.seed, 0, 1]).random(len(rewards))
    current = search.ranked(begin)[0]
    for i in range(begin, len(rewards)):
        rise = rewards[i] - rewards[current]
        if rise >= 0 or luck[i] < np.exp(rise / heat[i]):  # where rewards differ, their span is not 0
            current = i
    return current


def netadapt(search: Search, rng: np.random.Generator, width: float) -> Counts:
    """NetAdapt's descent in as many rounds as the evaluations pay for; what they leave is spent on its neighbours.

    Yang et al. 2018 (arXiv 1804.03230), algorithm 1, without fine-tuning. If the descent takes longer than planned
    (groups that are used up cost extra), the last evaluation is the network at hand, scaled to the budget.
    """
    # a second draw is asked for only where the first was no news: the descent is over
    found = _descended(search) if width == 1 else None
    if found is not None and plain(found) not in search.measured:
        return found
    return allocate.scaled(search.choices, _mutated(search.shares[search.ranking[0]], rng, width * MUTATION))


def _descended(search: Search) -> Counts:
    """What the descent wants to see next, or where it ended."""
    choices, left = search.choices, search.evaluations - len(search.known)
    rounds = min((left - 1) // len(choices.levels), int(choices.heights.sum()))

    def value(counts: Counts) -> Value:
        if plain(counts) not in search.measured:
            raise _UnmeasuredError(counts)
        return search.measured[plain(counts)]

    try:
        return allocate.greedy(choices, value, rounds=max(rounds, 1))
    except _UnmeasuredError as gap:
        last = len(search.trials) == search.evaluations - 1
        return allocate.scaled(choices, gap.counts / choices.full) if last else gap.counts


class _UnmeasuredError(Exception):
    """The descent needs a plan that was not measured."""

    def __init__(self, counts: Counts) -> None:
        super().__init__(counts)
        self.counts = counts


def bayesian(search: Search, rng: np.random.Generator, width: float) -> Counts:
    """Of plans near the best ones, the one that a Gaussian process expects the largest improvement of.

    Chen et al. 2018 (ECCV, "Constraint-Aware Deep Neural Network Compression") searched ratios so. Deviations: costs
    are known here, so that every candidate spends the budget and no constraint is cooled; candidates are local.
    """
    if width > 1:  # nothing of what was promising was new: few plans are left, and any will do
        return allocate.scaled(search.choices, _mutated(search.shares[search.ranking[0]], rng, width * MUTATION))
    values = np.array([trial.value[0] for trial in search.trials])
    return promising(search.choices, search.shares, values, search.measured, rng)


OPTIMISERS: dict[str, Optimiser] = {
    "random_search": Optimiser(
        "random_search",
        "Li et al. 2020 (EagleEye, arXiv 2007.02491): the best of random plans, recalibrated",
        random_shares,
        (heuristics.UNIFORM,),
    ),
    "cem": Optimiser("cem", "Rubinstein 1999: the cross-entropy method over shares", cross_entropy, KNOWN),
    "evolution": Optimiser("evolution", "Liu et al. 2019 (MetaPruning, arXiv 1903.10258): evolution", evolution, KNOWN),
    "annealing": Optimiser(
        "annealing", "Liu et al. 2020 (AutoCompress, arXiv 1907.03141): annealing", annealing, KNOWN
    ),
    "netadapt": Optimiser("netadapt", "Yang et al. 2018 (NetAdapt, arXiv 1804.03230): greedy descent", netadapt, KNOWN),
    "bayesian": Optimiser(
        "bayesian", "Chen et al. 2018 (ECCV): expected improvement under a Gaussian process", bayesian, KNOWN
    ),
}


def begin(name: str, case: Case, *, evaluations: int = EVALUATIONS) -> Search:
    """A search that was told nothing yet.

    Args:
        name: A name in `OPTIMISERS`.
        case: The problem at a budget, and the seed.
        evaluations: Networks to measure.

    Raises:
        ValueError: An unknown name, or a number that is not allowed.
    """
    optimiser = optimiser_of(name)
    known: dict[tuple[int, ...], str] = {}
    for method in optimiser.known:
        known.setdefault(plain(method.allocate(case)), method.name)
    return Search(case.choices, optimiser, {name: plan for plan, name in known.items()}, evaluations, case.seed)


def terms(case: Case, measured: Measurement) -> dict[str, float]:
    """Terms of the problem's reward for a network at the case's budget."""
    problem, limit = case.problem, case.choices.limit
    paid = problem.reward(problem.dense, measured, Budget(problem.resource, limit, limit / problem.total))
    return {name: float(value) for name, value in paid.items()}


def worth(case: Case, measured: Measurement) -> Value:
    """What searches compare plans by: the problem's reward, and among equals the lower loss."""
    return sum(terms(case, measured).values()), -measured.loss


@dataclass(frozen=True)
class Searched:
    """An allocate stage that measures networks on the search split and takes the best.

    Attributes:
        name: A name in `OPTIMISERS`.
        evaluations: Networks that it measures.
    """

    name: str
    evaluations: int = EVALUATIONS

    def __post_init__(self) -> None:
        check_evaluations(self.evaluations)

    def __call__(self, case: Case) -> Counts:
        """Counts of the best plan."""
        search = begin(self.name, case, evaluations=self.evaluations)
        while (counts := search.ask()) is not None:
            search = search.tell(counts, worth(case, case.problem.evaluator.measure(plan_of(case, counts))))
        return np.array(search.best.counts, dtype=np.int64)


def search_method(name: str, *, evaluations: int = EVALUATIONS) -> Method:
    """A search as a method.

    Args:
        name: A name in `OPTIMISERS`.
        evaluations: Networks that it measures.

    Raises:
        ValueError: An unknown name, or a number that is not allowed.
    """
    return Method(name, optimiser_of(name).paper, allocate=Searched(name, evaluations))


def optimiser_of(name: str) -> Optimiser:
    """The optimiser of that name.

    Raises:
        ValueError: There is none; names the closest.
    """
    check_name("search", name, OPTIMISERS)
    return OPTIMISERS[name]
