"""The evaluator: the one place where a plan becomes a repaired, measured network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prune_env.pruning.calibration import recalibrate
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import Measurement, Meter, prepare_images
from prune_env.pruning.moments import REFITS, Moments
from prune_env.pruning.plan import Plan
from prune_env.pruning.sequential import sequential_refit
from prune_env.pruning.surgery import Cutter

CACHE_SIZE = 4096
"""Measurements remembered; the plan measured longest ago is forgotten first."""

Key = tuple[tuple[int, ...] | None, ...]


class Worth(NamedTuple):
    """What a judge says of a network: fields of its `Measurement`."""

    accuracy: float
    loss: float
    steps: int = 0
    rungs: tuple[float, ...] = ()


Judge = Callable[[nn.Module, Plan], Worth]
"""(realised network, its plan) -> what it is worth. The network is the judge's own, and may be changed."""


class Evaluator:
    """Cuts, repairs and measures; the environments, the methods and the reports all use it, so they agree.

    The full plan is the dense network itself: nothing was cut, so nothing is repaired.

    Args:
        network: The dense network, on `device`. It is only read.
        graph: Its graph.
        meter: What accuracy and loss are measured on.
        calibration: `[n, ...]` normalised training images for recalibration and the sequential refit.
        recalibrate: Whether BatchNorm statistics are estimated anew after the cut.
        refit: How the consumers of cut channels are refitted, one of `REFITS`.
        moments: Second moments of the dense network; needed for `refit="moments"`.
        judge: What `measure` makes of a realised network; by default its accuracy and loss at once.
        device: Where networks are cut and measured.

    Attributes:
        calibration: The normalised training images, on `device`.
        evaluations: Plans that were really cut and measured, not taken from the cache.

    Raises:
        ValueError: An unknown refit, or moments are missing.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: LayerGraph,
        meter: Meter,
        *,
        calibration: Float[Tensor, "image ..."],
        recalibrate: bool = True,
        refit: str = "none",
        moments: Moments | None = None,
        judge: Judge | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if refit not in REFITS:
            raise ValueError(f"refit is {refit!r}; allowed are {', '.join(REFITS)}")
        if refit == "moments" and moments is None:
            raise ValueError("refit='moments' needs the second moments of the dense network (moments=)")
        self.network = network
        self.graph = graph
        self._cutter = Cutter(network, graph)
        self.meter = meter
        self.judge = judge or self.instant
        self.moments = moments
        self.refit = refit
        self.recalibrate = recalibrate
        self.evaluations = 0
        self.calibration = calibration.to(device)
        self._prepared = prepare_images(calibration, device=device, dtype=meter.dtype)
        self._measured: OrderedDict[Key, Measurement] = OrderedDict()

    def realise(self, plan: Plan, *, repair: Callable[[nn.Module, Plan], None] | None = None) -> nn.Module:
        """The network of a plan: cut, repaired, recalibrated, in evaluation mode; an ordinary module of its own.

        Args:
            plan: What is kept. The full plan is not repaired: nothing was cut.
            repair: (cut network, plan) -> None, changes the cut network in place; in the place of the refit.

        Raises:
            ValueError: The plan does not fit the graph.
        """
        small = self._cutter.cut(plan).eval().to(memory_format=torch.channels_last)
        if any(self._key(plan)):
            (repair or self._refit)(small, plan)
            if self.recalibrate:
                recalibrate(small, self._prepared, dtype=self.meter.dtype)
        return small

    def _refit(self, small: nn.Module, plan: Plan) -> None:
        if self.refit == "moments" and self.moments is not None:
            self.moments.refit(self.network, small, self.graph, plan)
        elif self.refit == "sequential":
            sequential_refit(self.network, small, self.graph, plan, self.calibration)

    def measure(self, plan: Plan) -> Measurement:
        """What the evaluator's judge says of the realised plan, its macs and params by closed form; remembered by plan.

        Raises:
            ValueError: The plan does not fit the graph.
        """
        plan.check(self.graph)
        key = self._key(plan)
        if key not in self._measured:
            self._measured[key] = self.judged(plan, self.judge)
            if len(self._measured) > CACHE_SIZE:
                self._measured.popitem(last=False)
        self._measured.move_to_end(key)
        return self._measured[key]

    def judged(self, plan: Plan, judge: Judge) -> Measurement:
        """What any judge says of the realised plan; not remembered.

        Raises:
            ValueError: The plan does not fit the graph.
        """
        worth = judge(self.realise(plan), plan)
        self.evaluations += 1
        return Measurement(macs=self.graph.macs(plan), params=self.graph.params(plan), **worth._asdict())

    def instant(self, network: nn.Module, plan: Plan) -> Worth:
        """The usual judge: accuracy and loss as the network is."""
        return Worth(*self.meter.accuracy_and_loss(network))

    def _key(self, plan: Plan) -> Key:
        """Kept channels per group, None where all are: the same for two plans that say the same."""
        kept = ((plan.keep.get(group.name), group.channels) for group in self.graph.groups)
        return tuple(None if indices is None or len(indices) == channels else indices for indices, channels in kept)
