"""Plans as unlike as possible at one budget: by depth, by chance, by published allocations and by searches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from baselines import METHODS, allocate
from baselines.allocate import Counts
from baselines.method import Case, Method, case_of, plan_of
from baselines.search import Searched
from baselines.trials import EVALUATIONS
from benchmarks.lasting.study import Job, Record, Study, save, timed
from prune_env.checks import check_name

PAIRS = (("l1", "none"), ("l1", "refit"), ("second_order", "none"), ("second_order", "refit"))
"""The four combinations of score and repair."""


@dataclass(frozen=True)
class Recipe:
    """How a plan is made.

    Attributes:
        name: Of the plan, without its budget.
        allocate: Case -> channels per group.
        importance: Score that ranks the channels of a group.
        repair: `none` or `refit`; what the network is given before it is fine-tuned.
        core: Whether it is made at every budget, not at the first alone.
    """

    name: str
    allocate: Callable[[Case], Counts]
    importance: str = "l1"
    repair: str = "none"
    core: bool = False


def leaning(case: Case, *, slope: float = 0.0, bend: float = 0.0, spread: float = 0.0, draw: int = 0) -> Counts:
    """Shares in proportion to exp(slope d + bend d^2 + spread z), d from -1 (first group) to 1 (last), z from N(0, 1).

    Args:
        case: The problem at a budget.
        slope: Above 0 keeps more in late groups.
        bend: Above 0 keeps more at both ends.
        spread: Standard deviation of the logarithm of a share.
        draw: Number of the random draw.
    """
    depth = np.linspace(-1, 1, len(case.choices.levels))
    chance = np.random.default_rng([case.seed, draw]).normal(size=len(depth))
    return allocate.scaled(case.choices, np.exp(slope * depth + bend * depth**2 + spread * chance))


def _pairs(name: str, made: Callable[[Case], Counts], *, core: tuple[int, ...]) -> list[Recipe]:
    """One allocation under all combinations of score and repair; `core` numbers those made at every budget."""
    return [Recipe(f"{name}-{i}-{r}", made, i, r, at in core) for at, (i, r) in enumerate(PAIRS)]


def recipes(evaluations: int) -> list[Recipe]:
    """All plans of a study.

    Args:
        evaluations: Networks that each search measures.
    """
    late = {-1.2: False, -0.66: True, -0.33: True, -0.16: False, 0.16: False, 0.33: True, 1.0: True, 1.4: False}
    chance = {(0.2, 0.0): (0, 3), (0.4, 0.0): (2, 3), (0.8, 0.0): (2, 3), (0.4, 0.5): (1, 3), (0.4, -0.5): (0, 1)}
    return [
        *_pairs("uniform", METHODS["uniform"].allocate, core=(0, 1, 2, 3)),
        *(Recipe(f"lean{slope:+g}", partial(leaning, slope=slope), core=core) for slope, core in late.items()),
        *_pairs("lean+0.66", partial(leaning, slope=0.66), core=(0, 3)),
        *(Recipe(f"bend{bend:+g}", partial(leaning, bend=bend), core=True) for bend in (-1.0, 1.0)),
        *(
            Recipe(
                f"chance{spread:g}{f'{slope:+g}' if slope else ''}-{draw}",
                partial(leaning, slope=slope, spread=spread, draw=draw),
                core=draw < core,
            )
            for (spread, slope), (core, draws) in chance.items()
            for draw in range(draws)
        ),
        Recipe("random", METHODS["random"].allocate),
        Recipe("knapsack-l1", METHODS["error_curves"].allocate, core=True),
        Recipe("knapsack-second_order-refit", METHODS["error_curves"].allocate, "second_order", "refit"),
        Recipe("global_magnitude", METHODS["global_magnitude"].allocate),
        Recipe("first_last", METHODS["first_last"].allocate),
        *_pairs("cem", Searched("cem", evaluations), core=(0, 3)),
    ]


def jobs(study: Study, *, only: tuple[str, ...] = ()) -> list[Job]:
    """The plans of a study that are to be made.

    Args:
        study: The study.
        only: Names of recipes, for every budget; by default all at the first budget and the core at the others.
    """
    made_of = recipes(study.settings.evaluations)
    return [
        _job(study, one, budget)
        for at, budget in enumerate(study.settings.budgets)
        for one in made_of
        if ((one.name in only) if only else (at == 0 or one.core))
    ]


def check_names(names: tuple[str, ...]) -> None:
    """Refuse names that are no recipe's.

    Raises:
        ValueError: Names the closest.
    """
    known = [one.name for one in recipes(EVALUATIONS)]
    for name in names:
        check_name("plan", name, known)


def _job(study: Study, recipe: Recipe, budget: float) -> Job:
    file = study.path("plans", f"{budget:g}-{recipe.name}")
    return Job(file, file.exists, lambda: save(file, made(study, recipe, budget)))


def made(study: Study, recipe: Recipe, budget: float) -> Record:
    """A plan's record."""
    problem = study.problem(recipe.importance, recipe.repair, budget)
    case = case_of(Method(recipe.name, "", allocate=recipe.allocate), problem, seed=study.settings.seed)
    counts, cost = timed(lambda: recipe.allocate(case))
    plan = plan_of(case, counts)
    return {
        "name": f"{budget:g}-{recipe.name}",
        "budget": budget,
        "importance": recipe.importance,
        "repair": recipe.repair,
        "macs": problem.graph.macs(plan) / problem.dense.macs,
        "params": problem.graph.params(plan) / problem.dense.params,
        "counts": np.asarray(counts).tolist(),
        "keep": dict(plan.keep),
        **cost,
    }
