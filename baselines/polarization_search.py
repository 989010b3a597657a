"""Algorithm 1 of polarization (Zhuang et al., NeurIPS 2020): lambda and t for a given saving, by trial trainings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from baselines.method import Method
from baselines.polarization import POLARIZATION, TITLE, prepare
from baselines.polarization_scales import Threshold, by_group, clear_valley, own_counts
from baselines.polarization_settings import Settings, published, scaled
from prune_env.pruning.tracing import trace
from prune_env.tasks.task import Task
from prune_env.tasks.training.loop import Progress

BOUNDS = (0.0, 2e-4)
"""Least and most lambda, as published."""
T = 1.2
"""t while lambda is looked for."""
STEP = 0.1
"""What t is moved by."""
TOLERANCE = 0.05
"""delta, how near is near enough; twice as much ends the search for lambda."""
TRIALS = 12
"""Most trainings. The authors need about 5, and say that their algorithm may go on for ever."""

TrainAndCount = Callable[[float, float], float]
"""(lambda, t) -> share of the dense cost that the network's own ratios save, in [0, 1]."""


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        strength: lambda, in published units.
        t: What the L1 norm weighs.
        saved: Share of the dense cost that was saved.
    """

    strength: float
    t: float
    saved: float


@dataclass(frozen=True)
class Found:
    """What a search ends in.

    Attributes:
        best: The trial nearest to the target, the first of equally near ones.
        met: Whether it is within the tolerance.
        trials: All trials in order.
    """

    best: Trial
    met: bool
    trials: tuple[Trial, ...]


def search(
    train_and_count: TrainAndCount,
    target: float,
    *,
    bounds: tuple[float, float] = BOUNDS,
    t: float = T,
    tolerance: float = TOLERANCE,
    trials: int = TRIALS,
) -> Found:
    """Bisect lambda at a fixed t until F is within 2 delta of the target F*, then move t until it is within delta.

        lambda = (lambda_l + lambda_u) / 2    lambda_u = lambda if F - F* >= 2 delta, lambda_l = lambda if <= -2 delta
        t = t - .1 if F - F* >= delta, else t + .1

    It ends, too, when the trials are used up, or when t would return to where it was: from there it only repeats.

    Args:
        train_and_count: What is searched over.
        target: F*, the share of the dense cost that is to be saved.
        bounds: lambda_l and lambda_u.
        t: Where t starts.
        tolerance: delta.
        trials: Most calls.

    Raises:
        ValueError: A number outside its range; names it.
    """
    _check(target, bounds, tolerance, trials)
    done: list[Trial] = []

    def off(strength: float, t: float) -> float:
        done.append(Trial(strength, t, train_and_count(strength, t)))
        return done[-1].saved - target

    low, high = bounds
    strength = (low + high) / 2
    gap = off(strength, t)
    while abs(gap) >= 2 * tolerance and len(done) < trials:
        low, high = (low, strength) if gap > 0 else (strength, high)
        strength = (low + high) / 2
        gap = off(strength, t)
    while abs(gap) >= tolerance and len(done) < trials:
        t = round(t - STEP if gap > 0 else t + STEP, 6)  # tenths, whatever the path
        if any(trial.strength == strength and trial.t == t for trial in done):
            break
        gap = off(strength, t)
    best = min(done, key=lambda trial: abs(trial.saved - target))
    return Found(best, abs(best.saved - target) < tolerance, tuple(done))


def _check(target: float, bounds: tuple[float, float], tolerance: float, trials: int) -> None:
    allowed = {
        "target": (target, 0 < target < 1, "a share between 0 and 1"),
        "bounds": (bounds, 0 <= bounds[0] < bounds[1] < math.inf, "two rising numbers from 0"),
        "tolerance": (tolerance, 0 < tolerance < 1, "a share between 0 and 1"),
        "trials": (trials, trials >= 1, "1 or more"),
    }
    for name, (value, fits, what) in allowed.items():
        if not fits:
            raise ValueError(f"{name} is {value!r}; allowed is {what}")


def settings_at(task: Task, strength: float, t: float, *, epochs: int | None = None) -> Settings:
    """The scaled settings at a published lambda and a t.

    Args:
        task: Whose network.
        strength: lambda in published units.
        t: What the L1 norm weighs.
        epochs: Passes over the training split; None takes those of `scaled`.
    """
    ours = scaled(task, epochs=epochs)
    return dataclasses.replace(ours, strength=strength * ours.strength / published(task).strength, t=t)


def trial_of(
    task: Task,
    *,
    seed: int = 0,
    resource: str = "macs",
    settings: Callable[[Task, float, float], Settings] = settings_at,
    threshold: Threshold = clear_valley,
    progress: Progress | None = None,
) -> TrainAndCount:
    """The real trial: a whole training, from the cache if there was one, then what its own ratios save.

    Args:
        task: Whose network; it is left as it is.
        seed: Seed of the trainings.
        resource: `macs` or `params`.
        settings: (task, lambda, t) -> how to train. The authors' trials have a quarter of the epochs; `scaled` is
            shorter than that.
        threshold: Where a group's scales part.
        progress: Told about every step.
    """

    def train_and_count(strength: float, t: float) -> float:
        trained = prepare(task, seed, progress, settings=lambda task: settings(task, strength, t))
        graph = trace(trained.network, trained.example)
        kept = own_counts(by_group(trained.network, graph), graph, threshold=threshold)
        cost = graph.cost[resource]
        return 1 - float(cost(np.maximum(kept, 1)) / cost(graph.full))

    return train_and_count


def best_trial(
    task: Task,
    budget: float,
    *,
    seed: int = 0,
    resource: str = "macs",
    trials: int = TRIALS,
    epochs: int | None = None,
    progress: Progress | None = None,
) -> Trial:
    """The trial of algorithm 1 whose own ratios come nearest to a budget.

    Args:
        task: Whose network; it is left as it is.
        budget: Share of the dense cost to be kept, between 0 and 1.
        seed: Seed of the trainings, which are kept in the cache: a killed search goes on.
        resource: `macs` or `params`.
        trials: Most trainings.
        epochs: Of each training; None takes those of `scaled`.
        progress: Told about every step.

    Raises:
        ValueError: A number outside its range, or a network without a prunable channel that a BatchNorm scales.
        TrainingDiverged: The loss became NaN or Inf.
    """
    at = partial(settings_at, epochs=epochs)
    aim = trial_of(task, seed=seed, resource=resource, settings=at, progress=progress)
    return search(aim, 1 - budget, trials=trials).best


def prepare_for(
    task: Task, seed: int, progress: Progress | None, *, budget: float, trials: int = TRIALS, epochs: int | None = None
) -> Task:
    """A prepare stage: under the lambda and t that algorithm 1 finds for a share of the macs.

    Raises:
        ValueError: See `best_trial`.
        TrainingDiverged: The loss became NaN or Inf.
    """
    best = best_trial(task, budget, seed=seed, trials=trials, epochs=epochs, progress=progress)
    settings = partial(settings_at, strength=best.strength, t=best.t, epochs=epochs)
    return prepare(task, seed, progress, settings=settings)


def searched(
    task: Task,
    budget: float,
    *,
    seed: int = 0,
    resource: str = "macs",
    trials: int = TRIALS,
    progress: Progress | None = None,
) -> Method:
    """Polarization with the lambda and t that algorithm 1 finds for a budget, at once and by name.

    Args:
        task: Whose network; it is left as it is.
        budget: Share of the dense cost to be kept, between 0 and 1.
        seed: Seed of the trainings; `prune` with the same finds the best one in the cache.
        resource: `macs` or `params`.
        trials: Most trainings.
        progress: Told about every step.

    Raises:
        ValueError: See `best_trial`.
        TrainingDiverged: The loss became NaN or Inf.
    """
    best = best_trial(task, budget, seed=seed, resource=resource, trials=trials, progress=progress)
    return dataclasses.replace(
        POLARIZATION,
        name="polarization_searched",
        paper=f"{TITLE}: lambda {best.strength:g} and t {best.t:g}, by algorithm 1",
        prepare=partial(prepare, settings=partial(settings_at, strength=best.strength, t=best.t)),
    )
