"""The gated network: any traced network with a gate at every group that can carry one."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prune_env.pruning.gating.layer import Decide, GatedLayer, Question, unfit
from prune_env.pruning.gating.static import STATIC_IMPORTANCES
from prune_env.pruning.graph import Group, LayerGraph, Slot
from prune_env.pruning.measure import evaluating
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut, dropped_axes, masked
from prune_env.pruning.tracing import trace

TOLERANCE = 1e-3
"""Allowed difference of gated and masked outputs, relative to the largest output."""


class GatedNetwork(nn.Module):
    """A network whose gated layers ask, for every input, which of their channels are active.

    Without an answer (`decide` is None) every channel is active, and fresh from `attach` the network computes what the
    dense one computes.

    Attributes:
        network: The network with a `GatedLayer` in the place of each gated producer.
        static: Static importance, trained with the network.
        graph: Graph of the network underneath.
        names: Groups with a gate, in forward order.
        skipped: Groups without a gate, each with the reason.
        decide: Answers the layers' questions during `forward`.
    """

    def __init__(
        self, network: nn.Module, static: nn.Module, graph: LayerGraph, names: tuple[str, ...], skipped: dict[str, str]
    ) -> None:
        super().__init__()
        self.network, self.static = network, static
        self.graph, self.names, self.skipped = graph, names, skipped
        self.decide: Decide | None = None

    @property
    def layers(self) -> list[GatedLayer]:
        """The gated layers in forward order."""
        return [self.network.get_submodule(producer_of(self.graph, name).module) for name in self.names]

    @property
    def full(self) -> np.ndarray:
        """`[layers]` channels of each gated layer."""
        return np.array([self.graph.group(name).channels for name in self.names], dtype=np.int64)

    def forward(self, x: Float[Tensor, "sample ..."]) -> Tensor:
        """Inputs to outputs, under the decisions of `decide`."""
        with self._running(self.decide):
            return self.network(x)

    @contextmanager
    def _running(self, decide: Decide | None) -> Iterator[None]:
        """Give each layer its static scores and a way to ask, for one forward pass."""
        layers, scores = self.layers, self.static.scores()
        for index, (name, layer, static) in enumerate(zip(self.names, layers, scores, strict=True)):

            def turn(
                pooled: Tensor, runtime: Tensor, name: str = name, index: int = index, static: Tensor = static
            ) -> tuple[Tensor, Tensor]:
                if decide is None:
                    return static, torch.ones_like(runtime, dtype=torch.bool)
                question = Question(name, index, pooled.detach(), runtime.detach(), static.detach())
                return static, decide(question)

            layer._turn = turn
        try:
            yield
        finally:
            for layer in layers:
                layer._turn = None

    def refresh(self) -> None:
        """Bring the features of the static importance up to date with the weights and their gradients."""
        self.static.refresh({at: layer.producer.weight for at, layer in enumerate(self.layers)})

    def plain(self) -> nn.Module:
        """An ordinary network with the same weights, each gate at its constant part; a copy."""
        plain = copy.deepcopy(self.network)
        for name in self.names:
            group = self.graph.group(name)
            producer, norm = plain.get_submodule(group.producers[0].module).plain()
            plain.set_submodule(group.producers[0].module, producer)
            if norm is not None:
                plain.set_submodule(group.carriers[0].module, norm)
        return plain

    def cut(self, plan: Plan, example: Tensor) -> GatedNetwork:
        """A really smaller gated network: what the plan drops is gone from layers, predictors and static scores.

        Args:
            plan: Kept channels; groups not named stay whole.
            example: One input, to trace the smaller network.

        Raises:
            ValueError: The plan does not fit, or drops channels of a group without a gate.
        """
        for name, kept in plan.keep.items():
            if name in self.skipped and len(kept) < self.graph.group(name).channels:
                raise ValueError(f"keep[{name!r}] drops channels, but the group has no gate: {self.skipped[name]}")
        axes = dropped_axes(self.graph, plan)
        small = cut(self.plain(), self.graph, plan)
        graph = trace(small, example)
        static = copy.deepcopy(self.static)
        static.restrict(
            [torch.tensor(plan.keep.get(name, range(self.graph.group(name).channels))) for name in self.names]
        )
        result = _assembled(small, graph, self.names, static, dict(self.skipped))
        for name, old, new in zip(self.names, self.layers, result.layers, strict=True):
            producer = producer_of(self.graph, name).module
            rows, columns = (
                _kept(size, axes.get((producer, role)))
                for size, role in zip(old.gate.weight.shape, ("out", "in"), strict=True)
            )
            with torch.no_grad():
                new.gate.weight.copy_(old.gate.weight[rows][:, columns])
                new.gate.bias.copy_(old.gate.bias[rows])
        return result.train(self.training)


def attach(network: nn.Module, graph: LayerGraph, example: Tensor, *, static: str = "vector") -> GatedNetwork:
    """Give every group a gate whose producer can carry one.

    A gate is accepted only if, with every channel active, the network's output is the dense one's, and if inactive
    channels have the effect of `masked`.

    Args:
        network: The dense network; it is copied.
        graph: Its graph.
        example: One normalised input with its batch axis.
        static: One of `STATIC_IMPORTANCES`: `vector` or `filters`.

    Raises:
        ValueError: An unknown static importance, or no group can carry a gate.
    """
    if static not in STATIC_IMPORTANCES:
        close = difflib.get_close_matches(str(static), STATIC_IMPORTANCES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"static importance {static!r} is unknown; {hint}allowed: {', '.join(STATIC_IMPORTANCES)}")
    private = copy.deepcopy(network).eval()
    modules = dict(private.named_modules())
    skipped = {group.name: reason for group in graph.groups if (reason := _reason(group, modules)) is not None}
    names = [group.name for group in graph.groups if group.name not in skipped]
    skipped |= _failures(private, graph, names, example)
    names = [name for name in names if name not in skipped]
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"the network has no layer that can carry a gate ({reasons})")
    weights = [modules[producer_of(graph, name).module].weight.detach() for name in names]
    scores = STATIC_IMPORTANCES[static](weights).to(example.device)
    return _assembled(network, graph, tuple(names), scores, skipped).train(network.training)


def producer_of(graph: LayerGraph, name: str) -> Slot:
    """The layer that writes a gated group."""
    return graph.group(name).producers[0]


def _assembled(
    network: nn.Module, graph: LayerGraph, names: Sequence[str], static: nn.Module, skipped: dict[str, str]
) -> GatedNetwork:
    """A copy of the network with gates at the named groups."""
    private = copy.deepcopy(network)
    for name in names:
        group = graph.group(name)
        producer = private.get_submodule(group.producers[0].module)
        norm = private.get_submodule(group.carriers[0].module) if group.carriers else None
        private.set_submodule(group.producers[0].module, GatedLayer(producer, norm))
        if norm is not None:
            private.set_submodule(group.carriers[0].module, nn.Identity())
    return GatedNetwork(private, static, graph, tuple(names), skipped)


def _reason(group: Group, modules: Mapping[str, nn.Module]) -> str | None:
    """Why a group cannot carry a gate, or None if it can as far as its layers show."""
    if len(group.producers) > 1:
        return f"{len(group.producers)} layers write it"
    producer = modules.get(group.producers[0].module)
    carriers = tuple(modules.get(slot.module) for slot in group.carriers)
    reason = unfit(producer, carriers)
    if reason is None and not all(_whole(slot, group) for slot in (*group.producers, *group.carriers)):
        return "it is only a part of its producer's channels"
    return reason


def _whole(slot: Slot, group: Group) -> bool:
    """Whether a slot is exactly the group's channels in their order."""
    channels = np.arange(group.channels)
    return np.array_equal(slot.index, channels) and np.array_equal(slot.unit, channels)


def _failures(network: nn.Module, graph: LayerGraph, names: Sequence[str], example: Tensor) -> dict[str, str]:
    """Groups whose gate does not do what `masked` does, with the reason; found by halving."""
    reason = _disagreement(network, graph, names, example) if names else None
    if reason is None:
        return {}
    if len(names) == 1:
        return {names[0]: reason}
    middle = len(names) // 2
    first, second = (_failures(network, graph, part, example) for part in (names[:middle], names[middle:]))
    return first | second


def _disagreement(network: nn.Module, graph: LayerGraph, names: Sequence[str], example: Tensor) -> str | None:
    groups = [graph.group(name) for name in names]
    modules = dict(network.named_modules())
    if any(len(modules[group.producers[0].module].weight) != group.channels for group in groups):
        return "it is only a part of its producer's channels"
    generator = np.random.default_rng(0)
    sample = torch.from_numpy(generator.standard_normal((2, *example.shape[1:]))).to(example)
    weights = [modules[group.producers[0].module].weight.detach() for group in groups]
    trial = _assembled(network, graph, names, STATIC_IMPORTANCES["vector"](weights).to(sample.device), {})
    plan = Plan({g.name: generator.permutation(g.channels)[: max(1, round(0.7 * g.channels))].tolist() for g in groups})
    asked: list[str] = []

    def drop(question: Question) -> Tensor:
        asked.append(question.name)
        active = torch.zeros_like(question.runtime, dtype=torch.bool)
        active[:, list(plan.keep[question.name])] = True
        return active

    try:
        with evaluating(network), evaluating(trial):
            if not _agree(network(sample), trial(sample)):
                return "with all channels active its gate changes the output"
            with masked(network, graph, plan):
                expected = network(sample)
            trial.decide = drop
            found = trial(sample)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"its gate breaks the forward pass: {(str(error).splitlines() or [''])[0][:120]}"
    if asked != list(names):
        return "its layer does not run exactly once for an input"
    return None if _agree(expected, found) else "an inactive channel does not stay zero up to its consumers"


def _agree(expected: object, found: object) -> bool:
    pairs = zip(tree_leaves(expected), tree_leaves(found), strict=True)
    return all(
        bool((a - b).abs().max() <= TOLERANCE * a.abs().max().clamp_min(1e-30))
        for a, b in pairs
        if isinstance(a, Tensor)
    )


def _kept(size: int, axis: tuple[int, np.ndarray] | None) -> Tensor:
    """Positions of an axis that a plan leaves."""
    keep = np.ones(size, dtype=bool)
    if axis is not None:
        keep[axis[1]] = False
    return torch.from_numpy(np.flatnonzero(keep))
