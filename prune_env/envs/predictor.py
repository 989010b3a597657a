"""A predictor: accuracy after fine-tuning as a linear function of a plan's widths and of its network as it is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prune_env.envs.widths import WIDTHS, widths
from prune_env.pruning.evaluator import Worth
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import Meter
from prune_env.pruning.plan import Plan

FEATURES = (*WIDTHS, "accuracy", "neg_loss")
"""What a predictor may read: statistics of the plan, accuracy and minus the loss of the network on the search split."""


@dataclass(frozen=True)
class Predictor:
    """Coefficients, and what they were learned on.

    Raises:
        ValueError: A value that is not allowed; names the field.
    """

    task: str
    """Name of the task, `<data>-<network>`."""
    channels: tuple[int, ...]
    """Channels of the groups that its plans decide."""
    refit: str
    """Refit of the networks that it measures."""
    recalibrate: bool
    """Whether their statistics are estimated anew."""
    features: tuple[str, ...]
    """What it reads, some of `FEATURES`."""
    weights: tuple[float, ...]
    """Accuracy per unit of each feature."""
    constant: float
    """Accuracy where all features are 0."""
    plans: int
    """Plans that it learned from."""
    tau: float | None = None
    """Kendall's tau-b with the truth of plans that it did not learn from."""

    def __post_init__(self) -> None:
        allowed = {
            "features": (bool(self.features) and set(self.features) <= set(FEATURES), f"some of {', '.join(FEATURES)}"),
            "weights": (
                len(self.weights) == len(self.features) and all(map(math.isfinite, self.weights)),
                "a finite number for each feature",
            ),
            "constant": (math.isfinite(self.constant), "a finite number"),
        }
        for name, (fits, what) in allowed.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {what}")

    def accuracy(self, values: Sequence[float]) -> float:
        """Foretold accuracy in [0, 1].

        Args:
            values: The features, in order.
        """
        foretold = self.constant + sum(w * value for w, value in zip(self.weights, values, strict=True))
        return min(max(foretold, 0.0), 1.0)

    def to_json(self) -> str:
        """The predictor as JSON; `from_json` gives an equal one back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Predictor:
        """The predictor that `to_json` wrote.

        Raises:
            ValueError: Not JSON, or fields that are missing, unknown or not allowed.
        """
        record = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(record, dict) or not known - {"tau"} <= set(record) <= known:
            raise ValueError(f"a predictor is a JSON object of {', '.join(sorted(known))}")
        lists = ("channels", "features", "weights")
        if not all(isinstance(record[name], list) for name in lists):
            raise ValueError(f"{', '.join(lists)} are lists")
        fields: dict[str, Any] = record | {name: tuple(record[name]) for name in lists}
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"a field has a value of the wrong kind: {error}") from None

    def check(self, **own: object) -> None:
        """Refuse to foretell what it did not learn about.

        Args:
            **own: `task`, `channels`, `refit` and `recalibrate` of the networks to come.

        Raises:
            ValueError: One of them is another than the predictor's.
        """
        for name, value in own.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"predictor is of {name} {getattr(self, name)!r}; {value!r} is asked for, take its own"
                )

    @classmethod
    def read(cls, file: Path | str) -> Predictor:
        """The predictor in a file.

        Raises:
            ValueError: It cannot be read, or holds none.
        """
        try:
            return cls.from_json(Path(file).read_text())
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise ValueError(f"predictor {str(file)!r} is none: {said}") from None


@dataclass(frozen=True, eq=False)
class Foretelling:
    """A judge that foretells what a fine-tuning will make of a network; its loss is that of the network as it is.

    Attributes:
        predictor: The coefficients.
        graph: Of the dense network.
        steps: The groups that plans decide, as positions in `graph.groups`.
        meter: The search split.
    """

    predictor: Predictor
    graph: LayerGraph
    steps: tuple[int, ...]
    meter: Meter

    def __call__(self, network: nn.Module, plan: Plan) -> Worth:
        """Foretold accuracy, and loss as it is."""
        accuracy, loss = self.meter.accuracy_and_loss(network)
        values = widths(self.graph, self.steps, self.graph.counts(plan)[list(self.steps)])
        values |= {"accuracy": accuracy, "neg_loss": -loss}
        return Worth(self.predictor.accuracy([values[name] for name in self.predictor.features]), loss)
