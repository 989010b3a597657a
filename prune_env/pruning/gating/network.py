"""The gated network: any traced network with a gate at every group that can carry one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from prune_env.checks import check_name
from prune_env.pruning.gating.layer import Decide, GatedLayer, Producer, Question, unfit
from prune_env.pruning.gating.static import STATIC_IMPORTANCES, StaticPredictor, StaticVector
from prune_env.pruning.graph import Group, LayerGraph, Slot
from prune_env.pruning.measure import evaluating
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut, dropped_axes

LEAST_SCALE = 0.1
"""Least share of a mean gate that a static score takes over: a channel that is all but closed is not blown up."""

TOLERANCE = 1e-3
"""Allowed difference of outputs with and without gates, relative to the largest output."""


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
        self,
        network: nn.Module,
        static: StaticVector | StaticPredictor,
        graph: LayerGraph,
        names: tuple[str, ...],
        skipped: dict[str, str],
    ) -> None:
        super().__init__()
        self.network, self.static = network, static
        self.graph, self.names, self.skipped = graph, names, skipped
        self.decide: Decide | None = None

    @property
    def layers(self) -> list[GatedLayer]:
        """The gated layers in forward order."""
        layers = [self.network.get_submodule(producer_of(self.graph, name).module) for name in self.names]
        # By name torch knows them as modules only.
        return cast("list[GatedLayer]", layers)

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

    @torch.no_grad()
    def calibrate(self, images: Float[Tensor, "sample ..."]) -> None:
        """Take from some inputs, with every channel active, what the predictors' inputs are standardised by.

        A network whose predictors have learned something computes something else afterwards.
        """
        seen: dict[int, Tensor] = {}

        def noting(at: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, args: seen.update({at: args[0]})

        handles = [layer.sight.register_forward_pre_hook(noting(at)) for at, layer in enumerate(self.layers)]
        before, self.decide = self.decide, None
        try:
            with evaluating(self):
                self(images)
        finally:
            self.decide = before
            for handle in handles:
                handle.remove()
        for at, layer in enumerate(self.layers):
            layer.sight.calibrate(seen[at])

    @torch.no_grad()
    def share_scales(self) -> None:
        """Let runtime and static scores share each channel's mean gate, half and half; what is computed stays.

        A gate is the product of both scores. At first the runtime score has all of it (the BatchNorm's scale), and all
        static scores are one: they rank channels by what a short training makes of that, which is next to nothing (a
        deviation of .025 after an epoch of CIFAR-10). The paper starts them at random and trains for long. Here they
        take over the root of each mean gate's size, so that both rank alike before they learn. A layer without a norm
        has no scales: the sizes of its filters become some.
        """
        if not isinstance(self.static, StaticVector):
            return
        filters = [layer.filter_sizes().clamp_min(LEAST_SCALE) for layer in self.layers]
        sizes = [layer.gate.bias.abs() * size for layer, size in zip(self.layers, filters, strict=True)]
        shares = [(size / size.mean().clamp_min(1e-12)).sqrt().clamp_min(LEAST_SCALE) for size in sizes]
        self.static.absorb(shares)
        for layer, size, share in zip(self.layers, filters, shares, strict=True):
            layer.rescale(1 / size, size / share)

    def refresh(self) -> None:
        """Bring the features of the static importance up to date with the weights and their gradients."""
        self.static.refresh({at: layer.producer.weight for at, layer in enumerate(self.layers)})

    def cut(self, plan: Plan) -> GatedNetwork:
        """A really smaller gated network: what the plan drops is gone from layers, predictors and static scores.

        Args:
            plan: Kept channels; groups not named stay whole.

        Raises:
            ValueError: The plan does not fit, or drops channels of a group without a gate.
        """
        for name, kept in plan.keep.items():
            if name in self.skipped and len(kept) < self.graph.group(name).channels:
                raise ValueError(f"keep[{name!r}] drops channels, but the group has no gate: {self.skipped[name]}")
        small = cut(self.network, _gated_graph(self.graph, self.names), plan)
        static = copy.deepcopy(self.static)
        static.restrict(
            [torch.tensor(plan.keep.get(name, range(self.graph.group(name).channels))) for name in self.names]
        )
        result = GatedNetwork(small, static, _cut_graph(self.graph, plan), self.names, dict(self.skipped))
        result.training = self.training
        for name, layer, whole in zip(self.names, result.layers, self.layers, strict=True):
            if layer.gate.in_features < whole.gate.in_features:
                layer.absorb_zeros(whole, plan.keep.get(name))
        return result


def attach(network: nn.Module, graph: LayerGraph, example: Tensor, *, static: str = "vector") -> GatedNetwork:
    """Give every group a gate whose producer can carry one.

    A gate is accepted only if, with every channel active, the network's output is the dense one's, and if inactive
    channels are zero where they are read, so that they have the effect of `masked`.

    Args:
        network: The dense network; it is copied.
        graph: Its graph.
        example: One normalised input with its batch axis.
        static: One of `STATIC_IMPORTANCES`: `vector` or `filters`.

    Raises:
        ValueError: An unknown static importance, or no group can carry a gate.
    """
    check_name("static importance", static, STATIC_IMPORTANCES)
    private = copy.deepcopy(network).eval()
    modules = dict(private.named_modules())
    skipped = {group.name: reason for group in graph.groups if (reason := _reason(group, modules)) is not None}
    names = [group.name for group in graph.groups if group.name not in skipped]
    skipped |= _failures(private, graph, names, example)
    names = [name for name in names if name not in skipped]
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"the network has no layer that can carry a gate ({reasons})")
    weights = [_producer(private, graph, name).weight.detach() for name in names]
    with torch.random.fork_rng():
        scores = STATIC_IMPORTANCES[static](weights).to(example.device)
    return _assembled(network, graph, tuple(names), scores, skipped).train(network.training)


def producer_of(graph: LayerGraph, name: str) -> Slot:
    """The layer that writes a gated group."""
    return graph.group(name).producers[0]


def _producer(network: nn.Module, graph: LayerGraph, name: str) -> Producer:
    """That layer of a network without gates."""
    producer = network.get_submodule(producer_of(graph, name).module)
    assert isinstance(producer, Producer)  # or the group would have been skipped
    return producer


def _assembled(
    network: nn.Module,
    graph: LayerGraph,
    names: Sequence[str],
    static: StaticVector | StaticPredictor,
    skipped: dict[str, str],
) -> GatedNetwork:
    """A copy of the network with gates at the named groups."""
    private = copy.deepcopy(network)
    for name in names:
        group = graph.group(name)
        producer = _producer(private, graph, name)
        norm = private.get_submodule(group.carriers[0].module) if group.carriers else None
        assert norm is None or isinstance(norm, _BatchNorm)  # likewise
        private.set_submodule(group.producers[0].module, GatedLayer(producer, norm))
        if norm is not None:
            private.set_submodule(group.carriers[0].module, nn.Identity())
    return GatedNetwork(private, static, graph, tuple(names), skipped)


def _gated_graph(graph: LayerGraph, names: Sequence[str]) -> LayerGraph:
    """The groups as the gated network has them: its layers' parts hold the axes."""
    gated = {producer_of(graph, name).module for name in names}
    groups = []
    for group in graph.groups:
        producers, carriers, consumers = group.producers, group.carriers, []
        for slot in group.consumers:
            if slot.module not in gated:
                consumers.append(slot)
                continue
            consumers += [replace(slot, module=f"{slot.module}.{part}") for part in ("producer", "gate")]
            consumers.append(replace(slot, module=f"{slot.module}.sight", role="both"))
        if group.name in names:
            slot = producers[0]
            carriers = tuple(replace(norm, module=f"{slot.module}.norm") for norm in carriers)
            carriers += (replace(slot, module=f"{slot.module}.shift", role="parameter"),)
            producers = tuple(replace(slot, module=f"{slot.module}.{part}") for part in ("producer", "gate"))
        groups.append(replace(group, producers=producers, carriers=carriers, consumers=tuple(consumers)))
    return replace(graph, groups=tuple(groups))


def _cut_graph(graph: LayerGraph, plan: Plan) -> LayerGraph:
    """The graph of the cut network; tracing it would lose groups of which one channel is left."""
    gone = {key: np.sort(positions) for key, (_, positions) in dropped_axes(graph, plan).items()}
    nothing = np.zeros(0, dtype=np.int64)
    groups = []
    for group in graph.groups:
        kept = np.isin(np.arange(group.channels), plan.keep.get(group.name, range(group.channels)))

        def rest(slot: Slot, kept: np.ndarray = kept) -> Slot:
            stays = kept[slot.unit]
            index = slot.index[stays]
            index = index - np.searchsorted(gone.get((slot.module, slot.role), nothing), index)
            return replace(slot, index=index, unit=(kept.cumsum() - 1)[slot.unit[stays]])

        axes = (tuple(map(rest, slots)) for slots in (group.producers, group.carriers, group.consumers))
        groups.append(Group(group.name, int(kept.sum()), *axes))
    layers = (
        replace(
            layer,
            in_channels=layer.in_channels - len(gone.get((layer.name, "in"), nothing)),
            out_channels=layer.out_channels - len(gone.get((layer.name, "out"), nothing)),
        )
        for layer in graph.layers
    )
    return replace(graph, groups=tuple(groups), layers=tuple(layers))


def _reason(group: Group, modules: Mapping[str, nn.Module]) -> str | None:
    """Why a group cannot carry a gate, or None if it can as far as its layers show."""
    first, *others = group.producers
    if others:
        return f"{len(group.producers)} layers write it"
    producer = modules[first.module]
    reason = unfit(producer, tuple(modules.get(slot.module) for slot in group.carriers))
    if reason is not None:
        return reason
    assert isinstance(producer, Producer)  # or it would be unfit
    if not (len(producer.weight) == group.channels and all(_whole(slot, group) for slot in (first, *group.carriers))):
        return "it is only a part of its producer's channels"
    return None


def _whole(slot: Slot, group: Group) -> bool:
    """Whether a slot is exactly the group's channels in their order."""
    channels = np.arange(group.channels)
    return np.array_equal(slot.index, channels) and np.array_equal(slot.unit, channels)


def _failures(
    network: nn.Module, graph: LayerGraph, names: Sequence[str], example: Tensor, beside: Sequence[str] = ()
) -> dict[str, str]:
    """Groups whose gate does not do what it should beside those accepted before, with the reason; by halving."""
    reason = _disagreement(network, graph, (*beside, *names), example) if names else None
    if reason is None:
        return {}
    if len(names) == 1:
        return {names[0]: reason}
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    failed = _failures(network, graph, first, example, beside)
    accepted = [name for name in first if name not in failed]
    return failed | _failures(network, graph, second, example, (*beside, *accepted))


def _disagreement(network: nn.Module, graph: LayerGraph, names: Sequence[str], example: Tensor) -> str | None:
    """How gates at these groups change the network, or fail to close channels; None if they do neither."""
    generator = np.random.default_rng(0)
    noise = torch.from_numpy(generator.standard_normal((2, *example.shape[1:]))).to(example)
    sample = noise if example.is_floating_point() else example[:1].expand_as(noise)
    weights = [_producer(network, graph, name).weight.detach() for name in names]
    trial = _assembled(network, graph, names, STATIC_IMPORTANCES["vector"](weights).to(sample.device), {})
    dropped = {
        name: generator.permutation(len(weight)) >= max(1, round(0.7 * len(weight)))
        for name, weight in zip(names, weights, strict=True)
    }
    asked: list[tuple[str, int]] = []
    leaks: list[str] = []

    def drop(question: Question) -> Tensor:
        asked.append((question.name, len(question.runtime)))
        closed = torch.from_numpy(dropped[question.name]).to(question.runtime.device)
        return (~closed).expand_as(question.runtime)

    def watch(name: str, slot: Slot) -> None:
        module = network.get_submodule(slot.module)
        closed = torch.from_numpy(slot.positions(dropped[name])).to(sample.device)

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].index_select(-1 if isinstance(module, nn.Linear) else 1, closed).any():
                leaks.append(name)

        trial.network.get_submodule(slot.module).register_forward_pre_hook(hook)

    try:
        with evaluating(network), evaluating(trial):
            if not _agree(network(sample), trial(sample)):
                return "with all channels active its gate changes the output"
            for name in names:
                for slot in graph.group(name).consumers:
                    watch(name, slot)
            trial.decide = drop
            trial(sample)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"its gate breaks the forward pass: {(str(error).splitlines() or [''])[0][:120]}"
    if asked != [(name, len(sample)) for name in names]:
        return "its layer does not run exactly once for an input"
    return "an inactive channel does not stay zero up to its consumers" if leaks else None


def _agree(expected: object, found: object) -> bool:
    pairs = zip(tree_leaves(expected), tree_leaves(found), strict=True)
    return all(
        bool((a - b).abs().max() <= TOLERANCE * a.abs().max().clamp_min(1e-30))
        for a, b in pairs
        if isinstance(a, Tensor)
    )
