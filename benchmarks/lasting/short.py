"""Short training as a score: a few steps of a one-cycle, measured at its end and on its way there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.lasting.quality import quality
from benchmarks.lasting.study import Record, Stopwatch, Study, timed
from prune_env.tasks.training import Hook, TrainingDiverged, TrainingState, train_steps

Entry = dict[str, Any]
"""CPU and wall seconds, and `values` by name."""


@dataclass(frozen=True, order=True)
class Short:
    """A short training: steps of one one-cycle, and its peak learning rate.

    Raises:
        ValueError: A value that is not allowed.
    """

    steps: int
    lr: float

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr > 0:
            raise ValueError(f"short training {self.name}: 1 or more steps and a learning rate above 0 are allowed")

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"{self.steps}@{self.lr:g}"

    @classmethod
    def parse(cls, text: str) -> Short:
        """`20@.05`: 20 steps at most at .05.

        Raises:
            ValueError: It is nothing like that.
        """
        steps, _, lr = text.partition("@")
        try:
            return cls(int(steps), float(lr))
        except ValueError:
            raise ValueError(f"short is {text!r}; allowed is STEPS@LR, e.g. 20@.05") from None


def trained(
    study: Study, plan: Record, short: Short, *, search: tuple[Tensor, Tensor], stops: set[int]
) -> dict[str, Entry]:
    """The entry of a short training, and one for each prefix of it, which costs what had been spent by then.

    A training that diverges leaves the network as it was: that is then what it is worth.

    Args:
        study: The study.
        plan: What is trained, from the network that its fine-tuning starts from.
        short: For how long.
        search: Images, prepared, and labels that it is measured on.
        stops: Numbers of steps at which it is measured on the way, while the learning rate is still high.
    """
    watch = Stopwatch()
    watch.start()
    network = study.realised(plan)
    found: dict[str, Entry] = {}

    def measured() -> Entry:
        """What the network is worth now, at the cost of the training so far and of this one measurement."""
        watch.stop()
        values, own = timed(lambda: quality(network, *search))
        return {**{name: round(spent + own[name], 4) for name, spent in watch.spent.items()}, "values": values}

    def look(state: TrainingState) -> None:
        if state.step + 1 in stops:
            found[f"{state.step + 1} of {short.name}"] = measured()
            watch.start()

    settings = study.training(lr=short.lr)
    try:
        train_steps(network, study.task.train, steps=short.steps, settings=settings, hooks=[Hook(after_step=look)])
    except TrainingDiverged:
        found.clear()
    return {**found, short.name: measured()}


def power_law(steps: Mapping[int, float]) -> tuple[float, float]:
    """Coefficient and exponent of error = a * steps^-b, by least squares between their logarithms.

    Learning curves fall like this over wide ranges (Hestness et al., arXiv 1712.00409; as one of the curves of Domhan
    et al., IJCAI 2015, without its asymptote, which few points cannot tell).

    Args:
        steps: Number of steps, two or more -> error, above 0.
    """
    x, y = np.log(list(steps)), np.log(np.maximum(list(steps.values()), 1e-6))
    slope, intercept = np.polyfit(x, y, 1)
    return float(np.exp(intercept)), -float(slope)


def extrapolated(steps: Mapping[int, float], *, at: int) -> dict[str, float]:
    """What the curve of some short trainings says: its slope, and minus the error that it promises later.

    Args:
        steps: Number of steps -> error at the end of that training.
        at: Steps of the fine-tuning.
    """
    coefficient, exponent = power_law(steps)
    return {"slope": exponent, "promise": -coefficient * at**-exponent}
