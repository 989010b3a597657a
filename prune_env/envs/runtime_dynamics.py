"""The decision process behind runtime pruning: what is constant, and one batch of images on its way through.

An episode is an image; a batch of them goes through the gated layers together, each with its own decisions. Nothing of
gymnasium here: the environment and a deployed agent share this file, so they see and count the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from prune_env.number_format import autocast
from prune_env.pruning.gating.accounting import Accounting
from prune_env.pruning.gating.layer import Question
from prune_env.pruning.gating.network import GatedNetwork, producer_of
from prune_env.pruning.gating.tradeoff import StaticDecision, check_trust, count_of, decide_static, select
from prune_env.pruning.gating.walk import Walker
from prune_env.pruning.measure import Budget

STEEPNESS, SLACK, SAVING = 1.2, 0.03, 0.1
"""Constants of the budget terms, from the official code of the core paper."""

LARGEST = 5.0
"""Bound on the exponent of a penalty. The paper has none; its agents start inside their budget, others may not."""

SPREAD = 5.0
"""Deviations from a layer's mean that an observation resolves."""

SHAPE = ("channels", "inputs", "kernel", "stride", "positions", "macs")
"""Entries of the field `layer`: log2 / 12, log2 / 12, side / 7, / 4, log2 / 16, share of the dense macs."""


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean and deviation of what the layers read and score, to bring observations to [-1, 1].

    Attributes:
        pooled: `[layers, 2]` mean and deviation of the pooled inputs.
        runtime: `[layers, 2]` the same of the runtime scores.
        static: `[layers, 2]` the same of the static scores.
    """

    pooled: Float32[np.ndarray, "layer 2"]
    runtime: Float32[np.ndarray, "layer 2"]
    static: Float32[np.ndarray, "layer 2"]

    @classmethod
    def of(cls, walker: Walker, images: Float[Tensor, "sample ..."], dtype: torch.dtype) -> Scale:
        """Watch one batch with all channels active."""
        rows: list[list[tuple[float, float]]] = [[], [], []]
        walk = walker.walk(images)
        with torch.no_grad(), autocast(images.device, dtype):
            try:
                question = next(walk)
                while True:
                    for row, values in zip(rows, (question.pooled, question.runtime, question.static), strict=True):
                        row.append((float(values.mean()), float(values.std(correction=0)) + 1e-6))
                    question = walk.send(torch.ones_like(question.runtime, dtype=torch.bool))
            except StopIteration:
                pass
        return cls(*(np.array(row, dtype=np.float32) for row in rows))


@dataclass(frozen=True, eq=False)
class RuntimeProblem:
    """Everything that stays the same from episode to episode.

    Attributes:
        name: What is pruned, for titles.
        gated: The gated network, in eval mode.
        images: `[n, ...]` prepared inputs that episodes draw from.
        labels: `[n]` their classes.
        scale: Brings observations to [-1, 1].
        value: Budget: share of the dense network's macs in (0, 1], or a number of macs, for the mean over inputs.
        span: Lowest and highest share when the budget is drawn for each batch, else None.
        trust: Trust R in the runtime decision, in [0, 1].
        min_keep: Least share that an action can ask for; the core paper's .1.
        static_keeps: Static shares that are decided already, one per layer; then actions have no say in them.
        dtype: Number format of the forward pass.

    Raises:
        ValueError: A budget that cannot be reached, or a share that is not allowed.
    """

    name: str
    gated: GatedNetwork
    images: Tensor
    labels: Tensor
    scale: Scale
    value: int | float = 0.5
    span: tuple[int | float, int | float] | None = None
    trust: float = 0.5
    min_keep: float = 0.1
    static_keeps: tuple[float, ...] | None = None
    dtype: torch.dtype = torch.float32
    _even: dict[float, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_trust(self.trust)
        if not 0 < self.min_keep <= 1:
            raise ValueError(f"min_keep is {self.min_keep}; a share in (0, 1] is allowed")
        if len(self.images) == 0 or len(self.images) != len(self.labels):
            raise ValueError(f"one label for each image is needed, not {len(self.images)} and {len(self.labels)}")
        for value in (self.value, *(self.span or ())):
            self.budget_of(value)

    @cached_property
    def walker(self) -> Walker:
        """The gated network, one layer at a time."""
        return Walker(self.gated)

    @cached_property
    def accounting(self) -> Accounting:
        """Closed forms of its macs and parameters."""
        return Accounting.of(self.gated)

    @property
    def channels(self) -> Int64[np.ndarray, " layer"]:
        """Channels of each gated layer."""
        return self.accounting.full

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """Width of each layer's pooled input."""
        return tuple(layer.gate.in_features for layer in self.gated.layers)

    @cached_property
    def minimum(self) -> float:
        """The least macs that decisions can lead to, predictors counted."""
        full = self.channels
        least = np.maximum(1, np.round(self.min_keep * full).astype(np.int64))
        # Predictors score what is stored, and only the share of distrust can go for good.
        gone = np.floor((1 - self.trust) * (full - least) + 1e-9).astype(np.int64)
        return float(self.accounting.macs(least, full - gone))

    @cached_property
    def shapes(self) -> Float32[np.ndarray, "layer 6"]:
        """The field `layer` of each step."""
        graph = self.gated.graph
        rows = []
        for name in self.gated.names:
            layer = graph.layer(producer_of(graph, name).module)
            logs = [math.log2(max(v, 1)) for v in (layer.out_channels, layer.in_channels, layer.positions)]
            kernel, stride = max(layer.kernel, default=1) / 7, max(layer.stride, default=1) / 4
            share = layer.macs / self.accounting.dense_macs
            rows.append((logs[0] / 12, logs[1] / 12, kernel, stride, logs[2] / 16, share))
        return np.clip(np.array(rows, dtype=np.float32), 0.0, 1.0)

    def budget_of(self, value: int | float | Budget) -> Budget:
        """A share in (0, 1] or a number of macs as a budget.

        Raises:
            ValueError: Not a budget, or below what can be reached.
        """
        if isinstance(value, Budget):
            return value
        return Budget.of(value, resource="macs", dense=self.accounting.dense_macs, minimum=self.minimum)

    def even_keep(self, budget: Budget) -> float:
        """The share which, kept in every layer, costs the budget (predictors not counted)."""
        if budget.limit not in self._even:
            low, high = 0.0, 1.0
            for _ in range(40):
                middle = (low + high) / 2
                over = float(self.accounting.bare_macs(middle * self.channels)) > budget.limit
                low, high = (low, middle) if over else (middle, high)
            self._even[budget.limit] = high
        return self._even[budget.limit]

    def params_share(self, budget: Budget) -> float:
        """The budget of the static decision: the share of parameters that is stored when both keep the even share."""
        stored = 1 - (1 - self.trust) * (1 - self.even_keep(budget))
        return float(self.accounting.bare_params(stored * self.channels)) / self.accounting.dense_params


@dataclass(eq=False)
class Passage:
    """A batch of images on its way through the gated layers.

    Attributes:
        problem: What is decided.
        budget: The batch's budget.
        size: Images of the batch.
        active: `[layers, sample]` active channels of each decided layer.
        kept: Stored channels of each decided layer.
        keeps: `[layers, sample]` runtime shares asked for.
        statics: Static shares asked for.
    """

    problem: RuntimeProblem
    budget: Budget
    size: int
    active: list[Int64[np.ndarray, " sample"]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    keeps: list[np.ndarray] = field(default_factory=list)
    statics: list[float] = field(default_factory=list)
    _macs: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)
    _static: dict[int, StaticDecision] = field(default_factory=dict, init=False, repr=False)

    @property
    def position(self) -> int:
        """Layers decided so far."""
        return len(self.kept)

    def decide(
        self, question: Question, runtime_keep: Float[np.ndarray, " sample"], static_keep: float
    ) -> Bool[Tensor, "sample channel"]:
        """Turn the two decisions into active channels, and remember what they cost.

        Args:
            question: The layer's.
            runtime_keep: Share of the layer's channels that may be active, per image; moved into [min_keep, 1].
            static_keep: Share kept by the static decision, one for the batch; moved into [min_keep, 1].
        """
        problem, at = self.problem, question.index
        channels = question.runtime.shape[1]
        asked = np.clip(np.asarray(runtime_keep, dtype=np.float64), problem.min_keep, 1.0)
        if problem.static_keeps is not None:
            static_keep = problem.static_keeps[at]
        static_keep = float(np.clip(static_keep, problem.min_keep, 1.0))
        decision = self._decided(question) or decide_static(question.static, static_keep, problem.trust)
        counts = count_of(torch.from_numpy(asked), channels).to(question.runtime.device)
        active = select(question.runtime, question.static, counts, decision)
        self.active.append(active.sum(1).cpu().numpy())
        self.kept.append(channels - int(decision.removed.sum()))
        self.keeps.append(asked)
        self.statics.append(static_keep)
        return active

    def _decided(self, question: Question) -> StaticDecision | None:
        """The static decision about a layer if it stands before any action, made once; else None."""
        problem, at = self.problem, question.index
        if problem.static_keeps is not None and at not in self._static:
            keep = float(np.clip(problem.static_keeps[at], problem.min_keep, 1.0))
            self._static[at] = decide_static(question.static, keep, problem.trust)
        return self._static.get(at)

    def macs(self) -> Float[np.ndarray, " sample"]:
        """Macs of each image so far as a share of the dense network's; layers that are still open count nothing."""
        at, layers, forms = self.position, len(self.problem.channels), self.problem.accounting
        if at not in self._macs:
            counts, kept = np.zeros((self.size, layers), dtype=np.int64), np.zeros(layers, dtype=np.int64)
            for layer in range(at):
                counts[:, layer], kept[layer] = self.active[layer], self.kept[layer]
            self._macs[at] = forms.macs(counts, kept) / forms.dense_macs
        return self._macs[at]

    def params(self) -> float:
        """Parameters of the stored network as a share of the dense one's, open layers whole; predictors not counted."""
        kept = self.problem.channels.copy()
        kept[: self.position] = self.kept
        return float(self.problem.accounting.bare_params(kept)) / self.problem.accounting.dense_params

    def observe(self, question: Question | None) -> dict[str, Float32[np.ndarray, "sample width"]]:
        """What is seen in front of a layer; None stands for the end of the network. Every array is new."""
        problem, at = self.problem, self.position
        seen = {name: np.zeros((self.size, width), dtype=np.float32) for name, (_, width) in widths(problem).items()}
        seen["position"][:] = at / len(problem.channels)
        seen["budget"][:] = self.budget.fraction
        seen["even"][:] = problem.even_keep(self.budget)
        seen["index"][:, at] = 1.0
        seen["spent"][:, 0] = np.clip(self.macs(), 0.0, 2.0) / 2.0
        seen["previous_keep"][:, 0] = self.keeps[-1] if at else 1.0
        if question is None:
            return seen
        seen["layer"][:] = problem.shapes[at]
        for name, values, (mean, spread) in (
            ("pooled", question.pooled, problem.scale.pooled[at]),
            ("runtime_importance", question.runtime, problem.scale.runtime[at]),
            ("static_importance", question.static, problem.scale.static[at]),
        ):
            numbers = (values.float() - float(mean)) / float(SPREAD * spread)
            seen[name][:, : values.shape[-1]] = numbers.clamp_(-1.0, 1.0).nan_to_num_(0.0).cpu().numpy()
        decision = self._decided(question)
        if decision is not None:
            # Cut away where the agent is deployed. As inputs they are zero for every image already.
            gone = decision.removed.nonzero().flatten().cpu().numpy()
            seen["runtime_importance"][:, gone] = seen["static_importance"][:, gone] = 0.0
        return seen


IMAGE_FIELDS = ("pooled", "runtime_importance", "spent", "previous_keep")
"""Fields that depend on the image: a static decision may not see them."""


def widths(problem: RuntimeProblem) -> Mapping[str, tuple[float, int]]:
    """Field -> lowest value and length; the highest is 1."""
    layers, widest = len(problem.channels), int(problem.channels.max())
    return {
        "position": (0.0, 1),
        "budget": (0.0, 1),
        "even": (0.0, 1),
        "index": (0.0, layers + 1),
        "layer": (0.0, len(SHAPE)),
        "static_importance": (-1.0, widest),
        "spent": (0.0, 1),
        "previous_keep": (0.0, 1),
        "pooled": (-1.0, max(problem.inputs)),
        "runtime_importance": (-1.0, widest),
    }


@dataclass(frozen=True)
class LossMean:
    """The mean loss that rewards are relative to: cumulative over the first batches, then with a slow decay.

    The official code of the core paper: `0.995 m + 0.005 batch` after 200 batches (one counter here; the code mixes
    two).
    """

    value: float = 0.0
    batches: int = 0
    FIRST = 200

    def updated(self, losses: Sequence[float] | np.ndarray) -> LossMean:
        """With one more batch of losses."""
        batch, count = float(np.mean(losses)), self.batches + 1
        weight = 1 / count if count <= self.FIRST else 0.005
        return LossMean(self.value + weight * (batch - self.value), count)


def budget_term(used: float | np.ndarray, limit: float, *, saving: float) -> np.ndarray:
    """Reward for a share of a resource: exponentially bad above the limit, slightly good below it.

    Core paper, eq. 10 with the sign and constants of its official code: `-1.2 (exp((B - Bbar) / 0.03) - 1)` for B above
    Bbar, else `saving (Bbar - B)`, with .1 for the runtime agent and 0 for the static one.
    """
    over = np.asarray(used, dtype=np.float64) - limit
    penalty = -STEEPNESS * np.expm1(np.minimum(np.maximum(over, 0.0) / SLACK, LARGEST))
    return np.where(over > 0, penalty, -saving * over)


def rewards(
    losses: Float[np.ndarray, " sample"], mean: LossMean, passage: Passage
) -> dict[str, Float[np.ndarray, " sample"]]:
    """Terms of the terminal reward, core paper section 3.4 (eq. 7 to 10).

    Args:
        losses: Cross-entropy of each image.
        mean: The mean loss, this batch included.
        passage: The finished passage.

    Returns:
        `accuracy` = -loss / mean loss, `macs` and `params` = the budget terms of what was *really* kept.
    """
    problem, budget = passage.problem, passage.budget
    params = budget_term(passage.params(), problem.params_share(budget), saving=0.0)
    return {
        "accuracy": -np.asarray(losses, dtype=np.float64) / max(mean.value, 1e-8),
        "macs": budget_term(passage.macs(), budget.fraction, saving=SAVING),
        "params": np.full(passage.size, float(params)),
    }
