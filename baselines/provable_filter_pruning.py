"""Provable Filter Pruning: channels drawn by their sensitivity, and one error bound that decides every layer's count.

Liebenwein, Baykal, Lang, Feldman, Rus, "Provable Filter Pruning for Efficient Neural Networks", ICLR 2020
(https://arxiv.org/abs/1911.07412); constants as in the authors' code, https://github.com/lucaslie/torchprune.

Taken: the sensitivities s (`prune_env.pruning.sensitivity`); the distribution p_c = s_c / S, S = sum s; the draws that
an error of epsilon asks for, and how many different channels they are expected to hit; one epsilon for all layers;
the three variants: the most sensitive channels without reweighting (deterministic, the authors' experiments), drawn
ones with reweighted consumers (random), and the most probable ones whole with the rest drawn (mixed).

Where we deviate:

- The unit is a coupled group: as sensitive as its most sensitive consumer, and kept or lost for all of them. The
  authors let every layer pick its own inputs, which only index tables at run time can turn into speed.
- The budget may be on macs or params, and the network's exact cost is solved for, not that of a chain. Every epsilon
  at which a group rises by a channel is known in closed form, so the search for epsilon is one over whole numbers.
- The random variants keep a given number of channels, where the authors' number is right in expectation only. In the
  random one the draws go on until the next would bring in one channel too many: as any order of the draws before it
  is as likely, count / (draws p) still is one in expectation. In the mixed one a channel enters once p draws >= 1, or
  when it is first drawn, if that is earlier; a drawn one is divided by the probability that it was drawn by the time
  the next channel would enter: what count / (draws p) is on average, once it was drawn.
- Reweighting takes the place of a refit; in the environment, which repairs by itself, there is none.
- Nothing is trained between prunings: one shot. The authors prune and retrain ResNet-56 twenty times.

Reported against ours, ResNet-20 on CIFAR-10. One shot and one full retraining, by the authors themselves (ALDS, NeurIPS
2021, table 1): -.28 points at 40.3 % fewer params and 30.1 % fewer macs; plain filter thresholding -.32 at 39.7 % and
39.6 %. Ours is test accuracy right after the cut, recalibrated, no refit, seed 0, dense .9175 (`python -m
benchmarks.pfp_curve --task cifar10-resnet20 --weights FILE --out DIR --budgets .8 .6 .5 .35`):

    | kept             | uniform l1 | global magnitude | most sensitive | mixed | random | one epsilon, l1 ranks |
    |------------------|------------|------------------|----------------|-------|--------|-----------------------|
    | .80 of macs      | .844       | .869             | .771           | .742  | .621   | .832                  |
    | .50 of macs      | .566       | .469             | .406           | .385  | .300   | .469                  |
    | .35 of macs      | .277       | .229             | .232           | .231  | .206   | .256                  |
    | .80 of params    | .845       | .846             | .806           | .783  | .643   | .844                  |
    | .60 of params    | .697       | .704             | .586           | .486  | .399   | .663                  |
    | .35 of params    | .281       | .281             | .296           | .252  | .233   | .346                  |

So the sensitivities rank channels worse than their l1 norm here, and the allocation pays where few params are left.
After two epochs of fine-tuning (README has all rows) the order stays: half the macs, .883 uniform l1, .878 global
magnitude, .876 one epsilon with l1 ranking, .861 most sensitive; .35 of the macs, .856, .843, .848, .820.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from baselines import allocate
from baselines.allocate import Counts
from baselines.method import Case, Method, Scores
from baselines.potential import Curve
from prune_env.envs.dynamics import Problem
from prune_env.pruning.consumer import complement, weights_of
from prune_env.pruning.graph import Group, LayerGraph
from prune_env.pruning.plan import Plan
from prune_env.pruning.sensitivity import CONSTANT, FAILURE, Shares, sample_size, sensitivities, summed
from prune_env.pruning.surgery import dropped_axes, tensor_axes

Gains = Callable[
    [Float[np.ndarray, " channel"], Float[np.ndarray, " channel"], int, np.random.Generator],
    Float[np.ndarray, " channel"],
]
"""(p, scores, channels kept, generator) -> what the consumers' weights are multiplied with; 0 for a lost channel."""
BISECTIONS = 64


@dataclass(frozen=True, eq=False)
class ErrorBound:
    """What the paper's bound says of one group.

    Attributes:
        sensitivity: s of each channel, in [0, 1].
        positions: P, positions of the map that the consumer writes.
        weights: k, positions of its kernel.
    """

    sensitivity: Float[np.ndarray, " channel"]
    positions: int = 1
    weights: int = 1

    @cached_property
    def probability(self) -> Float[np.ndarray, " channel"]:
        """p, the chance of each channel at a draw; all zero if no channel has any sensitivity."""
        return self.sensitivity / (self.sensitivity.sum() or 1.0)

    @cached_property
    def complexity(self) -> float:
        """A = S 2 C ln(8 (P + 1) k / delta): the sensitivities' sum, and the price of failing at no position."""
        price = 2 * CONSTANT * np.log(8 * (self.positions + 1) * self.weights / FAILURE)
        return float(self.sensitivity.sum() * price)

    def draws(self, epsilon: float) -> float:
        """Draws for an error of epsilon: m = ceil(3 (6 + 2 epsilon) A / epsilon^2), at least 1."""
        return max(1.0, float(np.ceil(3 * (6 + 2 * epsilon) * self.complexity / epsilon**2)))

    def kept(self, epsilon: float) -> int:
        """Channels for an error of epsilon: the expected number of different ones in its draws, rounded up."""
        expected = self._distinct(np.array([self.draws(epsilon)]))
        return int(np.clip(np.ceil(expected[0]), 1, len(self.sensitivity)))

    @cached_property
    def needed(self) -> Float[np.ndarray, " count"]:
        """Draws that are expected to hit 0, 1, ..., all different channels; endless where they cannot be hit."""
        reachable = np.count_nonzero(self.probability)
        draws = np.full(len(self.sensitivity) + 1, np.inf)
        draws[0] = 0.0
        if reachable > 1:
            counts = np.arange(1.0, reachable)
            # m draws hit at most m, and log(C + 1) / p draws of the rarest miss less than one channel.
            rarest = self.probability[self.probability > 0].min()
            low, high = np.log(counts), np.full(len(counts), np.log(np.log(reachable + 1) / rarest))
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                enough = self._distinct(np.exp(middle)) >= counts
                low, high = np.where(enough, low, middle), np.where(enough, middle, high)
            draws[1:reachable] = np.exp(high)
        return draws

    @cached_property
    def epsilon(self) -> Float[np.ndarray, " count"]:
        """The error that keeping 0, 1, ..., all channels stands for: endless, ..., 0; `draws` solved for epsilon."""
        return self._error(self.needed)

    @cached_property
    def rises(self) -> Float[np.ndarray, " count"]:
        """For each count, the epsilon below which `kept` gives as many: the paper's roundings included."""
        before = np.maximum(np.floor(self.needed[:-1]), 1.0)
        return np.concatenate([[np.inf, np.inf], self._error(before)[1:]])

    def _error(self, draws: Float[np.ndarray, " count"]) -> Float[np.ndarray, " count"]:
        ratio = np.divide(self.complexity, draws, out=np.full(len(draws), np.inf), where=draws > 0)
        return 3 * ratio + np.sqrt(9 * ratio**2 + 18 * ratio)

    def _distinct(self, draws: Float[np.ndarray, " _"]) -> Float[np.ndarray, " _"]:
        """Expected number of different channels, sum_c 1 - (1 - p_c)^m; a hair less, lest rounding add a channel."""
        values, times = np.unique(self.probability, return_counts=True)
        with np.errstate(divide="ignore"):  # a single channel has p = 1
            return -np.expm1(np.outer(draws, np.log1p(-values))) @ times * (1 - 1e-12)


_OBSERVED: WeakKeyDictionary[object, dict[Shares, Mapping[str, ErrorBound]]] = WeakKeyDictionary()
"""Evaluator -> bounds: a policy asks again for each budget, and sensitivities cost seconds."""


def bounds(problem: Problem, *, shares: Shares = summed) -> Mapping[str, ErrorBound]:
    """The bound of every group, from as many calibration images as the paper asks for (or all there are).

    Args:
        problem: The decision problem; its evaluator holds the dense network and the images.
        shares: The paper's form of the sensitivities (`summed`), or that of the released code (`largest`).
    """
    known = _OBSERVED.setdefault(problem.evaluator, {})
    if shares not in known:
        network, images = problem.evaluator.network, problem.evaluator.calibration
        sample = images[: sample_size(network, images[:1])]
        found = sensitivities(network, problem.graph.groups, sample, shares=shares)
        known[shares] = {
            group.name: _bound(problem.graph, group, found[group.name].double().numpy())
            for group in problem.graph.groups
        }
    return known[shares]


def _bound(graph: LayerGraph, group: Group, sensitivity: Float[np.ndarray, " channel"]) -> ErrorBound:
    layers = [graph.layer(slot.module) for slot in group.consumers]
    # Consumers of one group differ in the logarithm alone: the dearest counts.
    sizes = [(layer.positions, int(np.prod(layer.kernel))) for layer in layers] or [(1, 1)]
    return ErrorBound(sensitivity, *max(sizes, key=lambda size: (size[0] + 1) * size[1]))


def _decided(problem: Problem, shares: Shares) -> list[ErrorBound]:
    """The bounds of the groups to decide, in the order of `problem.steps`."""
    found = bounds(problem, shares=shares)
    return [found[problem.graph.groups[step].name] for step in problem.steps]


def epsilons(problem: Problem, counts: Counts, *, shares: Shares = summed) -> Float[np.ndarray, " group"]:
    """The error of each group to decide when it keeps so many channels; 0 for a whole one.

    Args:
        problem: The decision problem.
        counts: Channels kept, in the order of `problem.steps`.
        shares: Form of the sensitivities.

    Raises:
        ValueError: Not one count per step, or a count outside 1 to all.
    """
    if len(counts) != len(problem.steps) or any(not 1 <= n <= c for n, c in zip(counts, problem.channels, strict=True)):
        raise ValueError(f"counts is {counts.tolist()}; from 1 each up to {list(problem.channels)} are allowed")
    pairs = zip(_decided(problem, shares), counts, strict=True)
    return np.array([bound.epsilon[count] for bound, count in pairs])


def error_bounds(problem: Problem) -> dict[str, Curve]:
    """For shaping: -log(1 + epsilon) of each group by count; relative errors of layers multiply, so logarithms add up.

    An extension, not in the paper. The sensitivities are those of the dense network, as in the paper; epsilon goes by
    how many channels are kept (`ErrorBound.epsilon`), whichever ones the environment's importance keeps.
    """
    return {name: -np.log1p(bound.epsilon) for name, bound in bounds(problem).items()}


def one_epsilon(case: Case, *, shares: Shares = summed) -> Counts:
    """The smallest epsilon, the same for all groups, whose channels fit the budget; what is left is filled up."""
    pairs = zip(_decided(case.problem, shares), case.choices.levels, strict=True)
    return allocate.rising(case.choices, tuple(-bound.rises[levels[1:]] for bound, levels in pairs))


def sensitivity(case: Case, *, shares: Shares = summed) -> Scores:
    """Deterministic: the most sensitive channels stay."""
    return {name: bound.sensitivity for name, bound in bounds(case.problem, shares=shares).items()}


def drawn(case: Case, *, shares: Shares = summed) -> Scores:
    """Random: channels in the order in which independent draws from p first hit them.

    A channel that is hit at rate p is first hit after a time e / p, e exponential; the score is one over that time.
    """
    return {name: p / waiting for name, p, waiting in _waiting(case, shares)}


def mixed(case: Case, *, shares: Shares = summed) -> Scores:
    """Mixed: a channel enters when it is first drawn, or after a time of 1 / p if that is earlier."""
    return {name: p / np.minimum(waiting, 1.0) for name, p, waiting in _waiting(case, shares)}


def _waiting(case: Case, shares: Shares) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each group's name, p, and exponential waiting times."""
    for number, (name, bound) in enumerate(bounds(case.problem, shares=shares).items()):
        rng = np.random.default_rng([case.seed, number])
        yield name, bound.probability, rng.exponential(size=len(bound.probability))


def counted(
    p: Float[np.ndarray, " channel"], scores: Float[np.ndarray, " channel"], kept: int, rng: np.random.Generator
) -> Float[np.ndarray, " channel"]:
    """What a kept channel is multiplied with: its count / (draws p), before the draw that would hit one too many.

    Given the order of first hits, the draws in between are repetitions: as many as a geometric number says.
    """
    order = np.argsort(-scores, kind="stable")
    left = np.append(np.cumsum(p[order][::-1])[::-1], 0.0)  # chance that a draw hits none of the first channels
    if left[kept] <= 0:
        return np.isin(np.arange(len(p)), order[:kept]).astype(np.float64)
    counts = np.zeros(len(p))
    for hit in range(1, kept + 1):
        known = order[:hit]
        counts[known[-1]] += 1
        # Beyond 1e12 draws the shares are p to any precision that matters.
        again = int(rng.geometric(np.clip(left[hit], 1e-12, 1.0))) - 1
        counts[known] += rng.multinomial(again, p[known] / p[known].sum())
    return np.divide(counts, counts.sum() * p, out=np.zeros(len(p)), where=p > 0)


def included(
    p: Float[np.ndarray, " channel"], scores: Float[np.ndarray, " channel"], kept: int, rng: np.random.Generator
) -> Float[np.ndarray, " channel"]:
    """One over the chance to have entered when the next channel would: 1 if p draws >= 1, else of having been drawn."""
    order = np.argsort(-scores, kind="stable")
    gain = np.zeros(len(p))
    gain[order[:kept]] = 1.0
    later = scores[order[kept]] if kept < len(p) else 0.0
    if later > 0:
        expected = p / later
        rare = (gain > 0) & (expected < 1)
        gain[rare] = 1 / -np.expm1(-expected[rare])
    return gain


def reweighted(case: Case, plan: Plan, *, gains: Gains, shares: Shares = summed) -> nn.Module:
    """Cut, multiply what the consumers read of each kept channel by its gain, recalibrate if the user asked for it."""
    found: dict[str, np.ndarray] = {}
    for number, (name, bound) in enumerate(bounds(case.problem, shares=shares).items()):
        rng = np.random.default_rng([case.seed, number, 1])
        scores = np.asarray(case.scores[name], dtype=np.float64)
        found[name] = gains(bound.probability, scores, len(plan.keep[name]), rng)

    def scale(small: nn.Module, plan: Plan) -> None:
        _scale(small, plan, dense=case.problem.evaluator.network, graph=case.problem.graph, gains=found)

    return case.problem.evaluator.realise(plan, repair=scale)


@torch.no_grad()
def _scale(
    small: nn.Module, plan: Plan, *, dense: nn.Module, graph: LayerGraph, gains: Mapping[str, np.ndarray]
) -> None:
    """Multiply the input weights of a cut network's consumers."""
    factors: dict[str, np.ndarray] = {}
    for group in graph.groups:
        for slot in group.consumers:
            size = weights_of(dense.get_submodule(slot.module)).shape[_axis(dense, slot.module)]
            factors.setdefault(slot.module, np.ones(size))[slot.index] = gains[group.name][slot.unit]
    dropped = dropped_axes(graph, plan)
    for name, factor in factors.items():
        _, lost = dropped.get((name, "in"), (0, np.empty(0, dtype=np.int64)))
        weight, axis = weights_of(small.get_submodule(name)), _axis(dense, name)
        kept = torch.from_numpy(factor)[complement(lost, len(factor))]
        weight.mul_(kept.to(weight).reshape(-1, *(1,) * (weight.dim() - axis - 1)))


def _axis(network: nn.Module, name: str) -> int:
    """The axis of a consumer's weight that its inputs run along."""
    ((_, axis),) = tensor_axes(network.get_submodule(name), "in")
    return axis


PAPER = "Liebenwein et al., ICLR 2020 (arXiv 1911.07412)"
DETERMINISTIC = Method(
    "provable_filter_pruning", f"{PAPER}: the most sensitive", importance=sensitivity, allocate=one_epsilon
)
RANDOM = Method(
    "provable_filter_pruning_random",
    f"{PAPER}: drawn by sensitivity, reweighted",
    importance=drawn,
    allocate=one_epsilon,
    repair=partial(reweighted, gains=counted),
)
MIXED = Method(
    "provable_filter_pruning_mixed",
    f"{PAPER}: the most probable, the rest drawn and reweighted",
    importance=mixed,
    allocate=one_epsilon,
    repair=partial(reweighted, gains=included),
)
