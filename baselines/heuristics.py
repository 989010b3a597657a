"""Heuristics: how much each group keeps, without learning. Each is one allocate stage; everything else is the default.

All of them hold at any budget, on macs or params, and none looks at the test split. Only `greedy` evaluates networks.
"""

from __future__ import annotations

import numpy as np
import torch

from baselines import allocate
from baselines.allocate import Counts
from baselines.method import Case, Method, Scores, plan_of, same_share
from prune_env.pruning.importance import score

GREEDY_ROUNDS = 8
"""Slices in which greedy goes down to the budget; it evaluates at most this many networks per group."""


def random_shares(case: Case) -> Counts:
    """Shares drawn at random and scaled together to the budget."""
    return allocate.random(case.choices, np.random.default_rng(case.seed))


def global_threshold(case: Case) -> Counts:
    """One threshold for the scores of all groups, each group's divided by their mean."""
    names = [case.problem.graph.groups[step].name for step in case.problem.steps]
    return allocate.threshold(case.choices, [np.asarray(case.scores[name], dtype=np.float64) for name in names])


def lamp_scores(case: Case) -> Scores:
    """LAMP scores, which have one scale for all groups, whatever importance the user named."""
    network, images = case.problem.evaluator.network, case.problem.evaluator.calibration
    unread = torch.zeros(len(images), dtype=torch.int64)
    found = score("lamp", network, case.problem.graph, (images, unread))
    return {name: scores.double().numpy() for name, scores in found.items()}


def one_ranking(case: Case) -> Counts:
    """One threshold for the scores of all groups as they are."""
    names = [case.problem.graph.groups[step].name for step in case.problem.steps]
    return allocate.ranking(case.choices, [np.asarray(case.scores[name], dtype=np.float64) for name in names])


def first_and_last_whole(case: Case) -> Counts:
    """The first and the last group stay as whole as the budget allows, the rest shares uniformly."""
    return allocate.protected(case.choices, sorted({0, len(case.problem.steps) - 1}))


def look_ahead(case: Case) -> Counts:
    """NetAdapt's greedy search on the search split, with the same repair before each measurement as the env's."""

    def value(counts: Counts) -> tuple[float, float]:
        measured = case.problem.evaluator.measure(plan_of(case, counts))
        return measured.accuracy, -measured.loss

    return allocate.greedy(case.choices, value, rounds=GREEDY_ROUNDS)


def least_error(case: Case) -> Counts:
    """The least sum of the groups' relative reconstruction errors under the budget; evaluates nothing."""
    return allocate.knapsack(case.choices, errors_of(case))


def errors_of(case: Case) -> list[np.ndarray]:
    """Each group's error curve at its allowed counts, for the channels that the case's scores would keep."""
    problem, moments = case.problem, case.problem.evaluator.moments
    assert moments is not None, "a problem is built with them"
    curves = []
    for step, levels in zip(problem.steps, problem.allowed, strict=True):
        group = problem.graph.groups[step]
        scores = torch.as_tensor(np.array(case.scores[group.name]))
        curve = moments.error_curve(problem.evaluator.network, group, scores=scores)
        curves.append(curve[levels])
    return curves


UNIFORM = Method("uniform", "the same share in every group", allocate=same_share)
RANDOM = Method("random", "random shares, scaled to the budget", allocate=random_shares)
GLOBAL_MAGNITUDE = Method(
    "global_magnitude",
    "Molchanov et al. 2017 (arXiv 1611.06440): one ranking for all layers, scores normalised per layer",
    allocate=global_threshold,
)
LAMP = Method(
    "lamp",
    "Lee et al., ICLR 2021 (arXiv 2010.07611), over channels: one threshold for layer-adaptive magnitudes",
    importance=lamp_scores,
    allocate=one_ranking,
)
FIRST_LAST = Method("first_last", "first and last group protected, the rest uniform", allocate=first_and_last_whole)
GREEDY = Method(
    "greedy", "Yang et al. 2018 (NetAdapt, arXiv 1804.03230), algorithm 1, without fine-tuning", allocate=look_ahead
)
ERROR_CURVES = Method("error_curves", "reconstruction error curves under the budget, a knapsack", allocate=least_error)
